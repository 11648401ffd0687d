"""Measure the speed of a model in tokens a second, and compare it with the limits of this machine.

A list, as in -t 1,2, repeats all tests with each number. The test pp512 reads a prompt of 512 tokens, and
tg128 generates 128 tokens. GB/s counts the weights and the KV cache that are read to generate tokens; "of
read" is the share of the read bandwidth. Gop/s counts the multiplications and additions of the matrices; "of
FMA" is the share of the peak of float32 FMAs. Both limits are measured in the same run. Peak memory is that
of the whole program so far, with the mapped pages of the model's file. Under mpiexec size, parameters and
tokens/s are those of the whole model, and all other numbers those of rank 0.
"""

import argparse
import math
from collections.abc import Callable, Iterator
from typing import Any

from .. import parallel
from ..checkpoint import open_checkpoint
from ..checkpoint.memory import available_memory, gib, memory_plan, peak_memory
from ..errors import ParameterError, printable
from ..inspect.bench import Machine, Result, Task, formats, measure
from ..llama import with_context
from . import common

# The columns after the model's name, and their widths.
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
        ("-p", "--prompt", 0, 512, "tokens in the prompt; 0: no such test"),
        ("-n", "--new", 0, 128, "tokens to generate; 0: no such test"),
        ("-d", "--depth", 0, 0, "positions in the KV cache before the test"),
        ("-b", "--batch", 1, 1, "sequences that are generated at once"),
    ]:
        numbers = common.whole_numbers(least)
        group.add_argument(
            letter, name, type=numbers, default=[default], metavar="N,...", help=f"{what} [{default}]"
        )
    group.add_argument(
        "-r", "--repeat", type=common.whole_number(1), default=5, metavar="N", help="runs of each test [5]"
    )
    group.add_argument("--json", action="store_true", help="print a JSON object for each test, not a table")


def run(args: argparse.Namespace) -> None:
    tasks = list(tests(args))
    if not tasks:
        raise ParameterError("nothing to measure: -p and -n are 0")
    ranks = parallel.ranks()
    usual = None if ranks is None else ranks.threads()
    machines = [(threads, Machine(threads)) for threads in args.threads or [usual]]
    with common.transfer_bar() as progress:
        path = common.located(args.model, progress)
    opened = open_checkpoint(path)
    model_args = opened.args
    if args.max_seq_len is not None:
        model_args = with_context(model_args, args.max_seq_len, path)
    weights, how = opened.weights(), (args.backend, None, args.exact, args.cache_dtype)
    plan = whole = memory_plan(model_args, weights, *how)
    if ranks is not None:
        plan = parallel.own_memory(ranks, model_args, weights, args.shares, *how)
    available = available_memory(plan.mapped) // (1 if ranks is None else ranks.local)
    for task in tasks:
        task.check(plan, available, path)
    name, kernels = printable(path.name), args.backend == "c"
    titles = "".join(f"{title:>{width}}" for title, width in COLUMNS.items())
    for i, (threads, machine) in enumerate(machines):
        args.threads = threads
        model = common.load_model(args).model
        if i == 0 and not args.json:  # not before the model is loaded: an error stands alone
            print(f"{'model':<{len(name)}}{titles}", flush=True)
        about = {
            "model": name,
            "size": whole.mapped + whole.made,
            "parameters": whole.parameters,
            "format": formats(model),
            "backend": args.backend,
            "isa": machine.isa if kernels else None,
            "threads": machine.threads if kernels else None,
        }
        for task in tasks:
            with common.run_bar(str(task)) as on_run:
                result = measure(model, task, machine, args.repeat, on_run)
            values = about | numbers(result)
            print(common.results_json(values) if args.json else row(values), flush=True)
        if not args.json and machine.isa is not None:
            limits = f"read {result.read_bandwidth / 1e9:.1f} GB/s, FMA {result.fma_peak / 1e9:.0f} Gop/s"
            print(f"at best, {machine.threads} threads, {machine.isa}: {limits}", flush=True)


def tests(args: argparse.Namespace) -> Iterator[Task]:
    for depth in args.depth:
        yield from (Task("pp", length, depth) for length in args.prompt if length)
        yield from (Task("tg", length, depth, batch) for batch in args.batch for length in args.new if length)


def numbers(result: Result) -> dict[str, Any]:
    """The results of one test; None for a number without a meaning in this test, or without a measurement."""
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


def row(values: dict[str, Any]) -> str:
    """One line of the table."""

    def shown(name: str, write: Callable[[Any], str]) -> str:
        return "-" if values[name] is None else write(values[name])

    def billions(number: float) -> str:
        return f"{number / 1e9:.1f}"

    def percent(share: float) -> str:
        return f"{share:.0%}"

    cells = [
        gib(values["size"]),
        f"{values['parameters'] / 1e9:.2f} B",
        values["format"],
        str(values["threads"] or "BLAS"),
        values["test"],
        f"{values['tokens_per_second']:.2f}",
        f"{values['sd']:.2f}",
        shown("bytes_per_second", billions),
        shown("share_of_read_bandwidth", percent),
        shown("operations_per_second", billions),
        shown("share_of_fma_peak", percent),
        shown("peak_memory", gib),
    ]
    padded = [f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True)]
    return "".join([values["model"], *padded])
