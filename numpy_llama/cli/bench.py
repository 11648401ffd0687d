"""How fast a model is here: tokens a second, beside what this machine can do at best.

Lists, as in -t 1,2, measure everything with each. GB/s: weights and KV cache read to make tokens, and their
share of the read bandwidth. Gop/s: multiplications and additions of the matrices, and their share of the
peak of float32 FMAs. Both limits are measured in the same run. Peak memory is the whole program's so far,
with the pages of the file that it mapped.
"""

import argparse
import json
import math
from collections.abc import Iterator
from typing import Any

from ..checkpoint import open_checkpoint
from ..checkpoint.download import locate
from ..checkpoint.memory import available_memory, gib, memory_plan, peak_memory
from ..errors import ParameterError, printable
from ..inspect.bench import Machine, Result, Task, formats, measure
from . import common

# After the model's name: what each column holds, and its width.
COLUMNS = {
    "size": 11,
    "parameters": 12,
    "format": 11,
    "threads": 9,
    "test": 17,
    "tokens/s": 10,
    "sd": 7,
    "GB/s": 7,
    "of read": 9,
    "Gop/s": 7,
    "of FMA": 8,
    "peak memory": 13,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    common.add_model_arguments(parser, many_threads=True)
    group = parser.add_argument_group("tests")
    for letter, name, least, default, what in [
        ("-p", "--prompt", 0, 512, "tokens of a prompt to read; 0: none"),
        ("-n", "--new", 0, 128, "tokens to make; 0: none"),
        ("-d", "--depth", 0, 0, "positions that the cache holds before"),
        ("-b", "--batch", 1, 1, "sequences to make tokens in at once"),
    ]:
        numbers = common.whole_numbers(least)
        group.add_argument(
            letter, name, type=numbers, default=[default], metavar="N,...", help=f"{what} [{default}]"
        )
    group.add_argument(
        "-r", "--repeat", type=common.whole_number(1), default=5, metavar="N", help="runs of each test [5]"
    )
    group.add_argument("--json", action="store_true", help="print one JSON object a test instead of a table")


def run(args: argparse.Namespace) -> None:
    tasks = list(tests(args))
    if not tasks:
        raise ParameterError("nothing to measure: -p and -n are 0")
    with common.transfer_bar() as progress:
        path = locate(args.model, progress)
    opened = open_checkpoint(path)
    plan = memory_plan(opened.args, opened.weights(), args.backend, exact=args.exact)
    available = available_memory(plan.mapped)
    for task in tasks:
        task.check(plan, available, path)
    name, kernels = printable(path.name), args.backend == "c"
    if not args.json:
        titles = "".join(f"{title:>{width}}" for title, width in COLUMNS.items())
        print(f"{'model':<{len(name)}}{titles}", flush=True)
    for threads in args.threads or [None]:
        args.threads = threads
        model, machine = common.load_model(args).model, Machine(args.threads)
        about = {
            "model": name,
            "size": plan.mapped + plan.made,
            "parameters": plan.parameters,
            "format": formats(model),
            "backend": args.backend,
            "isa": machine.isa if kernels else None,
            "threads": machine.threads if kernels else None,
        }
        for task in tasks:
            with common.run_bar(str(task)) as on_run:
                result = measure(model, task, machine, args.repeat, on_run)
            told = about | numbers(result)
            print(json.dumps(told) if args.json else row(told), flush=True)
        if not args.json and machine.isa is not None:
            limits = f"read {result.read_bandwidth / 1e9:.1f} GB/s, FMA {result.fma_peak / 1e9:.0f} Gop/s"
            print(f"at best, {machine.threads} threads, {machine.isa}: {limits}", flush=True)


def tests(args: argparse.Namespace) -> Iterator[Task]:
    for depth in args.depth:
        yield from (Task("pp", length, depth) for length in args.prompt if length)
        yield from (Task("tg", length, depth, batch) for batch in args.batch for length in args.new if length)


def numbers(result: Result) -> dict[str, Any]:
    """What was measured: tokens, bytes and operations a second. None is what has no meaning, or no answer."""
    task, decode = result.task, result.task.kind == "tg"
    limits = {
        "bytes_per_second": result.nbytes if decode else math.nan,
        "read_bandwidth": result.read_bandwidth,
        "share_of_read_bandwidth": result.nbytes / result.read_bandwidth if decode else math.nan,
        "operations_per_second": result.operations,
        "fma_peak": result.fma_peak,
        "share_of_fma_peak": result.operations / result.fma_peak,
    }
    return {
        "test": str(task),
        "length": task.length,
        "depth": task.depth,
        "batch": task.batch,
        "tokens_per_second": result.mean,
        "sd": result.sd,
        "runs": result.rates,
        **{name: None if math.isnan(x) else x for name, x in limits.items()},
        "peak_memory": peak_memory(),
    }


def row(told: dict[str, Any]) -> str:
    """One line of the table."""

    def shown(name: str, write: Any) -> str:
        return "-" if told[name] is None else write(told[name])

    def billions(number: float) -> str:
        return f"{number / 1e9:.1f}"

    def percent(share: float) -> str:
        return f"{share:.0%}"

    cells = [
        gib(told["size"]),
        f"{told['parameters'] / 1e9:.2f} B",
        told["format"],
        str(told["threads"] or "BLAS"),
        told["test"],
        f"{told['tokens_per_second']:.2f}",
        f"{told['sd']:.2f}",
        shown("bytes_per_second", billions),
        shown("share_of_read_bandwidth", percent),
        shown("operations_per_second", billions),
        shown("share_of_fma_peak", percent),
        shown("peak_memory", gib),
    ]
    return told["model"] + "".join(f"{cell:>{n}}" for cell, n in zip(cells, COLUMNS.values(), strict=True))
