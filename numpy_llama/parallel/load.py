"""Opening a checkpoint on every rank: each maps its own files, and takes its part of the weights."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import DTypeLike

from .. import __version__
from ..backend import Progress, build
from ..backend.formats import StoredTensor
from ..backend.limits import affinity
from ..checkpoint import open_checkpoint
from ..checkpoint.adapters import Adapter, open_adapter, updates_of
from ..checkpoint.base import Checkpoint
from ..checkpoint.files import MappedFile
from ..checkpoint.memory import MemoryPlan, available_memory
from ..config import ModelArgs
from ..errors import MismatchError, NumpyLlamaError
from ..lora import LowRank
from ..model import Transformer
from .cut import Plan, checked_shares
from .model import part_of
from .network import measured_bandwidth
from .ranks import Ranks, share_of_cpus
from .whole import ParallelTransformer, Shared

SAMPLES, SAMPLE = 16, 1 << 12  # pieces of a file, and their bytes, by which ranks compare their files
HEAD = 1 << 20


@dataclass(frozen=True)
class LoadOrder:
    """What rank 0 asks the others to load: its file, under the same path, and the options of nl.load."""

    path: Path
    args: ModelArgs  # with the context that was asked for
    shares: Sequence[float]
    dtype: DTypeLike | None
    backend: str
    threads: int | None
    exact: bool
    activation_bits: int
    cache_dtype: str | None
    adapters: Sequence[tuple[Path, float]] = ()  # and their factors


def load(
    ranks: Ranks,
    opened: Checkpoint,
    args: ModelArgs,
    shares: Sequence[float] | str | None,
    options: tuple[Any, ...],
    progress: Progress,
) -> tuple[Transformer, int]:
    """On rank 0: the model of an opened checkpoint on all ranks, and the positions that memory has room for.

    `options` are the last fields of a LoadOrder.
    """
    order = LoadOrder(opened.path, args, numbers(ranks, shares), *options)
    plan = Plan.of(args, order.shares)  # an error here is one of the arguments
    if order.backend == "c":
        from ..backend.kernels import Kernels  # imported here: NumPy's path runs without a compiler

        Kernels(order.threads, order.exact, order.activation_bits)
    number = ranks.new_number()
    with ranks.together("load", number, order, passing=NumpyLlamaError):
        part, room = load_part(ranks, order, opened, progress)
    return ParallelTransformer(Shared(part, plan, ranks, number), args), room


def numbers(ranks: Ranks, shares: Sequence[float] | str | None) -> list[float]:
    """On rank 0: the share of each rank. "auto" measures once how fast each reads from its memory."""
    if shares != "auto":
        return checked_shares(shares, ranks.size)
    if not ranks.bandwidths:
        with ranks.together("call", measure):
            measure(ranks)
    return in_eighths(ranks.bandwidths)


def measure(ranks: Ranks) -> None:
    """On all ranks at the same time, because those of one machine share its memory."""
    ranks.bandwidths = ranks.exchange(measured_bandwidth(ranks.threads(), ranks.local))


def in_eighths(bandwidths: Sequence[float]) -> list[float]:
    """Shares in eighths of the fastest, so that equal machines have equal shares in spite of noise."""
    return [float(max(1, round(8 * one / max(bandwidths)))) for one in bandwidths]


def own_memory(
    ranks: Ranks,
    args: ModelArgs,
    weights: Mapping[str, StoredTensor],
    shares: Sequence[float] | str | None,
    *how: Any,
) -> MemoryPlan:
    """On rank 0: its memory plan. `how` are the last arguments of memory_plan."""
    plan = Plan.of(args, numbers(ranks, shares))
    return plan.memory(plan.weights(weights, ranks.rank), ranks.rank, *how)


def load_part(
    ranks: Ranks,
    order: LoadOrder,
    opened: Checkpoint | None = None,
    progress: Progress = lambda what, done, total: None,
) -> tuple[Transformer, int]:
    """On every rank: its part of the model, and the positions for which every machine has memory.

    An error of one rank is raised on all, before any weight is read.
    """
    plan = Plan.of(order.args, order.shares)
    files = ranks.everywhere(lambda: open_checkpoint(order.path) if opened is None else opened)
    adapters = ranks.everywhere(lambda: [open_adapter(path) for path, _ in order.adapters])
    check_alike(ranks, ranks.everywhere(lambda: facts(files, order.backend, adapters)))
    threads = order.threads if order.backend == "c" else None
    hints = ranks.exchange([f"{ranks.where}: {hint}" for hint in slow(ranks.local, threads)])
    for hint in [*chain(*hints)][:1] if ranks.rank == 0 else []:
        logging.getLogger("numpy_llama").warning(hint)

    def fit() -> tuple[dict[str, StoredTensor], list[dict[str, LowRank]], int]:
        whole = files.weights()
        updates = [
            plan.updates(updates_of(adapter, factor, order.args, whole), ranks.rank)
            for adapter, (_, factor) in zip(adapters, order.adapters, strict=True)
        ]
        weights = plan.weights(whole, ranks.rank)
        how = order.backend, order.dtype, order.exact, order.cache_dtype
        memory = plan.memory(weights, ranks.rank, *how).beside(updates)
        available = available_memory(memory.mapped) // ranks.local
        memory.check(available, files.path)
        return weights, updates, memory.context_within(available)

    def make() -> Transformer:
        files.watch()
        how = order.exact, order.activation_bits, order.cache_dtype, updates
        local, part = plan.local_args(ranks.rank), partial(part_of, plan=plan, ranks=ranks)
        n = threads or ranks.threads()
        return build(local, weights, order.dtype, order.backend, n, progress, *how, part_of=part)

    weights, updates, room = ranks.everywhere(fit)
    return ranks.everywhere(make), min(ranks.exchange(room))


def slow(local: int, threads: int | None) -> Iterator[str]:
    """What makes this rank slower than its machine, with the way out. The machine has `local` ranks."""
    share = share_of_cpus(local)
    if affinity() < share:
        yield (
            f"bound to {affinity()} of its {share} CPUs: start with --bind-to none (Open MPI) or I_MPI_PIN=0 "
            "(Intel MPI)"
        )
    if threads is not None and threads > share:
        yield f"{threads} threads, but {local} ranks on this machine have {share} CPUs each: give -t {share}"


def facts(opened: Checkpoint, backend: str, adapters: Sequence[Adapter] = ()) -> dict[str, str]:
    """What every rank must have alike: the bits depend on it."""
    found = program(backend) | {"ModelArgs": repr(opened.args)}
    files = {file.path.name: file for file in opened.files}
    files |= {str(adapter.file.path): adapter.file.file for adapter in adapters}
    for adapter in adapters:  # PEFT has the scales in another file
        pairs = hashlib.sha256(repr(sorted(adapter.pairs.items())).encode()).hexdigest()
        found[f"the updates of {adapter.path}"] = f"{len(adapter.pairs)} weights, scales {pairs[:16]}"
    return found | {name: f"a file of {file.size} bytes, {sample(file)}" for name, file in files.items()}


def program(backend: str) -> dict[str, str]:
    """`facts` without a checkpoint."""
    found = {"numpy_llama": f"version {__version__}"}
    if backend == "numpy":
        found["NumPy"] = f"version {np.__version__}"
    else:
        from ..backend import kernels

        found["the instruction set"] = kernels.isa()
    return found


def sample(file: MappedFile) -> str:
    """A checksum of the header and of some pieces of the weights: another fine-tune has the same header."""
    digest = hashlib.sha256(file.map[:HEAD])
    for i in range(SAMPLES):
        at = (file.size - SAMPLE) * i // (SAMPLES - 1)
        digest.update(file.map[max(at, 0) : max(at, 0) + SAMPLE])
    return f"checksum {digest.hexdigest()[:16]}"


def check_alike(ranks: Ranks, found: dict[str, str]) -> None:
    """MismatchError on all ranks if one has found something else than rank 0."""
    (first, wanted), *others = ranks.exchange((ranks.where, found))
    for where, theirs in others:
        for name in {**wanted, **theirs}:
            here, there = wanted.get(name, "not there"), theirs.get(name, "not there")
            if here != there:
                raise MismatchError(
                    f"{name} is {there} on {where}, and {here} on {first}: every rank needs the same"
                )
