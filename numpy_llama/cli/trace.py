"""Record intermediates of a forward pass on a text, by their names.

PATTERN is a name that `numpy-llama ops` lists. A * stands for one part of a name, so
"layers.*.attention.scores" means the scores of all layers. The command prints the shape of each intermediate
and the mean, standard deviation, least and largest of its numbers.
"""

import argparse
import json
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
    with trace(llama, *args.patterns) as seen:
        llama.model(tokens)
    rows = {name: summary(array) for name, array in seen.items()}
    if args.out is not None:
        with common.new_file(args.out) as file:
            np.savez(file, allow_pickle=False, **seen)
    if args.json:
        print(json.dumps(rows))
        return
    width = max(map(len, rows))
    print(f"{'':<{width}}  {'shape':<18}{'mean':>10}{'sd':>10}{'least':>10}{'most':>10}")
    for name, row in rows.items():
        shape = " x ".join(map(str, row["shape"]))
        numbers = "".join(f"{row[key]:>10.3g}" for key in ("mean", "sd", "least", "most"))
        print(f"{name:<{width}}  {shape:<18}{numbers}")


def summary(array: npt.NDArray[Any]) -> dict[str, Any]:
    """The shape, and statistics of the finite numbers: a masked score is -inf."""
    x = array[np.isfinite(array)].astype(np.float64)
    least, most = (float(x.min()), float(x.max())) if x.size else (0.0, 0.0)
    mean, sd = (float(x.mean()), float(x.std())) if x.size else (0.0, 0.0)
    return {"shape": array.shape, "mean": mean, "sd": sd, "least": least, "most": most}
