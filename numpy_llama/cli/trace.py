"""Record intermediates of a forward pass on a text, by their names.

PATTERN is a name that `numpy-llama ops` lists. A * stands for one part of a name, so
"layers.*.attention.scores" means the scores of all layers. The command prints the shape of each intermediate
and the mean, standard deviation, least and largest of its finite numbers. Then it counts the numbers that are
NaN or infinite: a score of a later position is -inf.
"""

import argparse
import math
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import ParameterError
from ..inspect.tracing import trace
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_text_argument(parser)
    parser.add_argument("patterns", nargs="+", metavar="PATTERN", help="the intermediates to record")
    parser.add_argument(
        "--out", type=common.path, metavar="FILE.npz", help="write the arrays, for numpy.load"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    common.add_model_arguments(parser)


def run(args: argparse.Namespace) -> None:
    if args.out is not None and args.out.suffix != ".npz":
        raise ParameterError(f"--out is {str(args.out)!r}, it must end in .npz")
    llama = common.load_model(args)
    tokens = np.array([common.text_ids(llama, args.text)])
    with trace(llama, *args.patterns) as seen, np.errstate(all="ignore"):  # the table has what overflows
        llama.model(tokens)
    rows = {name: summary(array) for name, array in seen.items()}
    if args.out is not None:
        with common.new_file(args.out) as file:
            np.savez(file, allow_pickle=False, **seen)
    if args.json:
        print(common.results_json(rows))
        return
    width = max(map(len, rows))
    print(f"{'':<{width}}  {'shape':<18}{'mean':>10}{'sd':>10}{'least':>10}{'most':>10}{'nan':>8}{'inf':>8}")
    for name, row in rows.items():
        shape = " x ".join(map(str, row["shape"]))
        numbers = "".join(f"{row[key]:>10.3g}" for key in ("mean", "sd", "least", "most"))
        print(f"{name:<{width}}  {shape:<18}{numbers}{row['nan']:>8}{row['inf']:>8}")


def summary(array: npt.NDArray[Any]) -> dict[str, Any]:
    """The shape, statistics of the finite numbers (NaN if there are none), and counts of the others."""
    x = array[np.isfinite(array)].astype(np.float64)
    numbers = (x.mean(), x.std(), x.min(), x.max()) if x.size else [math.nan] * 4
    statistics = dict(zip(("mean", "sd", "least", "most"), map(float, numbers), strict=True))
    counts = {"nan": int(np.isnan(array).sum()), "inf": int(np.isinf(array).sum())}
    return {"shape": array.shape, **statistics, **counts}
