"""Show the contents of a model or an adapter, and the memory that it needs, from its headers alone."""

import argparse
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields
from functools import partial
from math import prod

from ..backend.formats import StoredTensor
from ..backend.limits import available_cpus
from ..checkpoint import open_checkpoint
from ..checkpoint.adapters import Adapter, is_adapter, open_adapter
from ..checkpoint.base import Checkpoint
from ..checkpoint.download import DEFAULT_MODEL, locate
from ..checkpoint.memory import LEAST_CONTEXT, MemoryPlan, available_memory, gib, memory_plan
from ..errors import NumpyLlamaError, ParameterError, escape, printable
from ..parallel import network
from ..parallel.cut import Plan, checked_shares, widths
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        nargs="?",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a file, a folder, an adapter, hf:OWNER/REPO, or a name that `pull` lists [%(default)s]",
    )
    group = parser.add_argument_group("several machines", "What each would have, and the speed to expect.")
    group.add_argument(
        "--ranks", type=common.whole_number(1), metavar="N", help="the plan for N machines, without mpiexec"
    )
    group.add_argument("--shares", type=common.shares, metavar="3,1", help="the share of each machine [even]")
    group.add_argument(
        "--bandwidth",
        type=float,
        metavar="GB/S",
        help="of the memory of a machine [that of this machine, measured]",
    )


def run(args: argparse.Namespace) -> None:
    if args.ranks is None and (args.shares or args.bandwidth) is not None:
        raise ParameterError("--shares and --bandwidth are for a plan: give --ranks too")
    if args.bandwidth is not None and not 0 < args.bandwidth < math.inf:
        raise ParameterError(f"--bandwidth is {args.bandwidth:g}, it must be a number of GB/s above 0")
    with common.transfer_bar() as progress:
        path = common.located(args.model, progress, partial(locate, wanted="either"))
    if is_adapter(path):
        show_adapter(open_adapter(path))
        return
    checkpoint = open_checkpoint(path)
    weights = checkpoint.weights()  # checks names and shapes against the arguments before anything is printed
    cut = None if args.ranks is None else Plan.of(checkpoint.args, checked_shares(args.shares, args.ranks))
    for name, value in [*contents(checkpoint, weights), *arguments(checkpoint), *text(checkpoint)]:
        print(f"{name:<16} {value}")
    plan = memory_plan(checkpoint.args, weights, "c")
    for name, value in memory(plan, available_memory(plan.mapped)):
        print(f"{name:<16} {value}")
    print()
    if cut is not None:
        show_ranks(cut, weights, args.bandwidth and 1e9 * args.bandwidth)
        return
    for name, shape, type_name, n in kinds(checkpoint):
        print(f"{name:<44} {shape:<14} {type_name:<11} {n}")


def show_ranks(cut: Plan, weights: Mapping[str, StoredTensor], bandwidth: float | None) -> None:
    """The part of each rank, and the speed of all by the arithmetic of network.py."""
    ranks, read, context = range(len(cut.heads)), list[float](), cut.args.max_seq_len
    print(f"Each rank, with a context of {context:,} tokens:")
    print("ranks  heads  kv heads  rows of F    weights   KV cache       peak")
    table = dict[str, list[int]]()
    for rank in ranks:
        part = cut.weights(weights, rank)
        plan = cut.memory(part, rank, "c")
        read.append(network.read_a_token(part))
        heads, kv_heads, rows = (widths(cuts)[rank] for cuts in (cut.heads, cut.kv_heads, cut.hidden_dim))
        fixed, peak = plan.mapped + plan.made, plan.peak(context)
        cache = plan.stored_positions * plan.kv_per_position
        sizes = "".join(f"{gib(nbytes):>11}" for nbytes in (fixed, cache, peak))
        table.setdefault(f"{heads:5}{kv_heads:10}{rows:11}{sizes}", []).append(rank)
    for line, equal in table.items():
        print(f"{numbered(equal):<7}{line}")
    of = "stated" if bandwidth else "measured here"
    bandwidth = bandwidth or network.measured_bandwidth(available_cpus())
    print(f"\nTokens a second at most, with {bandwidth / 1e9:.1f} GB/s from memory ({of}):")
    print(f"{'network':<10}{'latency':>8}{'decode':>9}{'prompt':>9}")
    one_token, many = (
        network.bytes_sent(weights["layers.0.attention.wo.weight"].format, n) for n in (1, 512)
    )
    for one in network.NETWORKS if len(ranks) > 1 else ():
        decode = 1 / network.decode_seconds(cut, read, bandwidth, one, one_token)
        prompt = network.prefill_limit(cut, one, many)
        print(f"{one.name:<10}{1e6 * one.latency:5.0f} us{decode:9.2f}{prompt:9.0f}")
    alone = bandwidth / network.read_a_token(weights)
    print(f"{'one machine':<18}{alone:9.2f}{'-':>9}")


def numbered(ranks: Sequence[int]) -> str:
    """0-3,7"""
    begins = [i for i in ranks if i - 1 not in ranks]
    ends = [i for i in ranks if i + 1 not in ranks]
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(begins, ends, strict=True))


def show_adapter(adapter: Adapter) -> None:
    """The base, the rank, the scale and the weights that it changes."""
    pairs, file = adapter.pairs, adapter.file
    tensors = {name for pair in pairs.values() for name in (pair.a, pair.b)}  # fused weights share theirs
    parameters = sum(prod(file.tensors[name].shape) for name in tensors)
    rows = {
        "adapter": f"{printable(str(adapter.path))} (LoRA)",
        "format": f"{adapter.format}, {file.file.size:,} bytes",
        "base model": "not named" if adapter.base is None else escape(adapter.base)[1:-1],
        "rank": _range([adapter.rank(name) for name in pairs]),
        "scale": _range([pair.scale for pair in pairs.values()]),
        "changes": f"{len(pairs)} weights",
        "parameters": f"{parameters:,}, {gib(4 * parameters)} in memory",
    }
    for name, value in rows.items():
        print(f"{name:<16} {value}")
    print()
    shapes = {name: adapter.shapes(pair) for name, pair in pairs.items()}
    kinds = Counter((re.sub(r"\b\d+\b", "N", name), shapes[name]) for name in pairs)
    for (name, (a, b)), n in kinds.items():
        print(f"{name:<44} A {' x '.join(map(str, a)):<14} B {' x '.join(map(str, b)):<14} {n}")


def _range(values: Sequence[float]) -> str:
    """One number, or the least and the largest."""
    least, most = f"{min(values):g}", f"{max(values):g}"
    return least if least == most else f"{least} to {most}"


def contents(checkpoint: Checkpoint, weights: Mapping[str, StoredTensor]) -> Iterator[tuple[str, str]]:
    files, tensors = checkpoint.files, checkpoint.tensors.values()
    yield "model", printable(str(checkpoint.path))
    number = f"{len(files)} files, " if len(files) > 1 else ""
    yield "format", f"{checkpoint.format}, {number}{sum(file.size for file in files):,} bytes"
    different = {id(w): w for w in weights.values()}.values()  # a tied weight counts once
    yield "parameters", f"{sum(prod(w.shape) for w in different):,}"
    count = Counter(t.type_name for t in tensors)
    size = Counter({name: sum(t.nbytes for t in tensors if t.type_name == name) for name in count})
    for name, nbytes in size.most_common():
        yield f"  {name}", f"{count[name]} tensors, {gib(nbytes)}"


def kinds(checkpoint: Checkpoint) -> Iterator[tuple[str, str, str, int]]:
    """Name, shape, type and count of the tensors; those that differ only in the number of a layer are one."""
    counts = Counter(
        (re.sub(r"\b\d+\b", "N", info.name), info.shape, info.type_name)
        for info in checkpoint.tensors.values()
    )
    for (name, shape, type_name), n in counts.items():
        yield escape(name)[1:-1], " x ".join(map(str, shape)), type_name, n


def arguments(checkpoint: Checkpoint) -> Iterator[tuple[str, object]]:
    for field in fields(checkpoint.args):
        value = getattr(checkpoint.args, field.name)
        if field.name == "sliding_window" and value is None:
            continue
        if field.name == "rope_scaling":
            value = "none" if value is None else value.describe(checkpoint.args.max_seq_len)
        yield field.name, value


def text(checkpoint: Checkpoint) -> Iterator[tuple[str, str]]:
    try:
        yield "tokenizer", printable(checkpoint.tokenizer_path().name)
    except NumpyLlamaError:
        yield "tokenizer", "none"
    yield "chat template", "none" if checkpoint.chat_template() is None else "the model's own"


def memory(plan: MemoryPlan, available: int) -> Iterator[tuple[str, str]]:
    if plan.mapped:
        yield "weights", f"{gib(plan.mapped)}, used where they lie in the file"
    if plan.made:
        yield "weights made", f"{gib(plan.made)}, joined, expanded or packed on loading"
    most = "" if plan.stored_positions == plan.max_seq_len else _most(plan)
    yield "KV cache", f"{gib(1024 * plan.kv_per_position)} for 1,024 tokens{most}"
    yield "scratch", f"{gib(plan.scratch)}, with Python and the tokenizer"
    fits = plan.context_within(available)
    for positions in sorted({min(LEAST_CONTEXT, plan.max_seq_len), plan.max_seq_len}):
        yield "peak", f"{gib(plan.peak(positions))} with a context of {positions:,} tokens"
    verdict = f"room for {fits:,} tokens" if fits < plan.max_seq_len else "it fits"
    if fits < min(LEAST_CONTEXT, plan.max_seq_len):
        verdict = "it does not fit"
    yield "available", f"{gib(available)}: {verdict}"


def _most(plan: MemoryPlan) -> str:
    """What a cache takes at most, with a sliding window."""
    nbytes, positions = plan.stored_positions * plan.kv_per_position, plan.stored_positions
    return f", at most {gib(nbytes)} ({positions:,} positions) with the sliding window"
