"""Check that a model is computed correctly here, and that its file is correct.

Every operation of every layer runs in C, in NumPy and, if it is installed, in PyTorch. The results must
agree. Then the weights and the arguments are checked by themselves, and by the prediction of a sample text.
--against compares every weight with that of another copy of the model, in any format. The last line is the
verdict. The exit code is 3 if something is wrong.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ..checkpoint import open_checkpoint
from ..checkpoint.download import DEFAULT_MODEL
from ..checkpoint.memory import available_memory, gib, memory_plan, peak_memory
from ..errors import printable
from . import common

if TYPE_CHECKING:
    from ..verify import Report
    from ..verify.operations import Error

WRONG = 3
HEADS = {
    "attention_norm": "norm", "wq": "wq", "wk": "wk", "wv": "wv", "rope": "rope", "attention": "attn",
    "wo": "wo", "ffn_norm": "norm", "w_gate": "w_gate", "w_up": "w_up", "swiglu": "swiglu",
    "w_down": "w_down", "layer": "layer",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a file, a folder, hf:OWNER/REPO, or a name that `pull` lists [%(default)s]",
    )
    parser.add_argument("--against", metavar="REFERENCE", help="another copy of the same model")
    parser.add_argument(
        "-t",
        "--threads",
        type=common.whole_number(1),
        metavar="N",
        help="threads of the C kernels [all CPUs]",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> int:
    from ..verify import examine  # imported late: it needs the C kernels

    began = time.perf_counter()
    with common.transfer_bar() as progress:
        opened = open_checkpoint(common.located(args.model, progress))
        reference = None if args.against is None else open_checkpoint(common.located(args.against, progress))
    plan = memory_plan(opened.args, opened.weights(), "c")
    plan.check(available_memory(plan.mapped), opened.path)
    files = [one for one in (opened, reference) if one is not None]
    for one in files:
        one.watch()
    with common.count_bar("steps") as progress:
        report = examine(opened, reference, args.threads, progress)
    for one in files:
        one.check_unchanged()
    seconds = time.perf_counter() - began
    if args.json:
        print(common.results_json(values(report, seconds)))
    else:
        print(f"{printable(opened.path.name)}: {opened.format}, {opened.args.n_layers} layers")
        for line in lines(report):
            print(line)
        memory = peak_memory()
        print(f"took {seconds:.1f} s" + ("" if memory is None else f", peak memory {gib(memory)}"))
        print(f"verdict: {report.verdict}")
    return WRONG if report.faults else 0


def lines(report: Report) -> Iterator[str]:
    yield "largest error of any implementation, relative to the largest result; !: more than rounding"
    yield "layer" + "".join(f"{head:>8}" for head in HEADS.values())
    worst = report.worst()
    for layer in sorted({at for at, _ in worst if at is not None}):
        yield f"{layer:>5}" + "".join(f"{_cell(worst.get((layer, name))):>8}" for name in HEADS)
    yield f"  end{_cell(worst.get((None, 'norm'))):>8}  output{_cell(worst.get((None, 'output'))):>8}"
    for name, most in report.implementations().items():
        where = "the end" if most.layer is None else f"layer {most.layer}"
        share = f"{most.share:.2g} of what rounding allows"
        yield f"{name:<11} nearest to its bound in {most.operation} of {where}: {share}"
    if "PyTorch" not in report.implementations():
        yield "PyTorch     is not installed; norm, rope and swiglu are seen in `layer` only"
    if (reading := report.reading) is not None:
        text = f"{reading.loss:.3f} nats a token (a guess: {reading.blind:.2f})"
        yield f"sample text {text}, {reading.tokens} tokens; {reading.tried} repairs tried"
    yield from (f"note        {note}" for note in report.notes)
    yield from (f"against     {line}" for line in report.compared)
    yield from (f"wrong       {fault}" for fault in report.faults)


def _cell(error: Error | None) -> str:
    if error is None:
        return "-"
    return f"{error.error:.1e}".replace("e-0", "e-") + ("!" if error.share > 1 else "")


def values(report: Report, seconds: float) -> dict[str, Any]:
    return {
        "verdict": report.verdict,
        "faults": report.faults,
        "notes": report.notes,
        "compared": report.compared,
        "errors": [asdict(error) for error in report.errors],
        "sample": None if report.reading is None else asdict(report.reading),
        "seconds": round(seconds, 3),
        "peak_memory": peak_memory(),
    }
