"""The memory that a model needs, computed from its headers before loading, and the memory that is available.

    weights used in place, in the mapped file    as large as in the file
    weights made on loading                      rows that are packed then, joined shards, float32 for NumPy
    KV cache                                     2 * n_layers * K * Dh numbers a stored position
    scratch                                      RoPE's table, and the activations of the widest step

If they do not fit, `MemoryPlan.check` raises an error with these numbers. Otherwise the system might kill the
process during loading.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from .. import system
from ..backend import cache_of
from ..backend.formats import QK, PackedTensor, StoredTensor
from ..backend.limits import groups
from ..config import ModelArgs
from ..errors import ResourceLimitError
from ..lora import LowRank
from ..system import peak_memory as peak_memory
from ..system.proc import numbers
from ..window import PREFILL_CHUNK, positions_stored
from .convert import target_format

LEAST_CONTEXT = 512  # positions that a model must at least have room for
BYTES_A_TOKEN = 800  # in a tokenizer: texts, bytes, ranks and merges; measured on 128,256 tokens
PYTHON = 64 << 20  # the interpreter, NumPy and this package


@dataclass(frozen=True)
class MemoryPlan:
    """Numbers are bytes, except `parameters`, and the positions that the model allows and the cache stores.

    `stored_positions` is `max_seq_len`, or less with a sliding window.
    """

    mapped: int
    made: int
    kv_per_position: int
    scratch: int
    max_seq_len: int
    stored_positions: int
    parameters: int
    instead: Mapping[str, int]  # another way to run the model -> the bytes of its weights then

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.mapped + self.made + self.scratch

    def peak(self, positions: int, batch: int = 1) -> int:
        """All memory, with a KV cache for `batch` sequences of `positions` positions, all in use."""
        return self.fixed + batch * min(positions, self.stored_positions) * self.kv_per_position

    def context_within(self, available: int) -> int:
        """The number of positions that fit."""
        stored = (available - self.fixed) // self.kv_per_position
        return self.max_seq_len if stored >= self.stored_positions else max(0, stored)

    def beside(self, adapters: Sequence[Mapping[str, LowRank]]) -> "MemoryPlan":
        """The same model with the updates of these adapters."""
        arrays = [x for adapter in adapters for update in adapter.values() for x in (update.a, update.b)]
        return replace(self, made=self.made + sum(x.nbytes for x in arrays))

    def check(self, available: int, source: object) -> None:
        """ResourceLimitError if the model `source` does not fit. It names the numbers, and ways that fit."""
        positions = min(LEAST_CONTEXT, self.max_seq_len)
        cache = self.peak(positions) - self.fixed
        if self.peak(positions) <= available:
            return
        other = self.scratch + cache
        smaller = {how: nbytes + other for how, nbytes in self.instead.items() if nbytes + other <= available}
        hint = "no other format would fit, the smallest takes " + gib(min(self.instead.values()) + other)
        if smaller:
            hint = "what would fit: " + ", ".join(f"{how} ({gib(n)})" for how, n in smaller.items())
        raise ResourceLimitError(
            f"{source} does not fit: weights {gib(self.mapped + self.made)}, KV cache {gib(cache)} for "
            f"{positions} tokens, scratch {gib(self.scratch)}, in all {gib(self.peak(positions))}; "
            f"{gib(available)} are available; {hint}"
        )


def memory_plan(
    args: ModelArgs,
    weights: Mapping[str, StoredTensor],
    backend: str,
    dtype: DTypeLike | None = None,
    exact: bool = False,
    cache_dtype: str | None = None,
) -> MemoryPlan:
    """The memory plan of a model on one backend, from the shapes and formats of its weights alone."""
    cache, kept = cache_of(args, backend, dtype, exact, cache_dtype)
    position = cache(args, 1, 1, kept)
    mapped = made = parameters = 0
    instead = {"`--backend c`": 0} if backend == "numpy" else {}
    converted = {dtype: f"a file by `numpy-llama convert --dtype {dtype}`" for dtype in ("bf16", "q8", "q4")}
    instead |= dict.fromkeys(converted.values(), 0)
    itemsize = np.dtype(dtype or np.float32).itemsize
    embedding = weights["tok_embeddings.weight"]
    only_rows = embedding is not weights["output.weight"]  # of the embedding are used
    for name, w in {id(w): (name, w) for name, w in weights.items()}.values():  # a tied weight counts once
        n, rows = math.prod(w.shape), math.prod(w.shape[:-1])
        parameters, expanded = parameters + n, n * itemsize
        for to, how in converted.items():
            instead[how] += rows * target_format(name, w.shape, to).row_bytes(w.shape[-1])
        if backend == "numpy":
            instead["`--backend c`"] += w.nbytes
        if backend == "numpy" or dtype is not None:
            in_place = w.in_place and w.format.name == "F32" and itemsize == 4 and w.row_order is None
            mapped, made = (mapped + expanded, made) if in_place else (mapped, made + expanded)
        elif isinstance(w, PackedTensor):
            mapped += w.packed.nbytes
        elif w.format.block > 1 and len(w.shape) == 2 and not (only_rows and w is embedding):
            made += w.format.packed.nbytes(w.shape)
        elif w.in_place and w.shape[-1] % QK == 0:
            mapped += w.nbytes
        else:
            made += w.nbytes + (-w.shape[-1] % QK) * w.nbytes // w.shape[-1]
    table = args.max_seq_len * args.head_dim * itemsize  # and half as much again while it is made
    heads, kv_heads = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    step = PREFILL_CHUNK * itemsize * (5 * args.dim + 3 * heads + 2 * kv_heads + 5 * args.hidden_dim)
    step += 4 * args.vocab_size * itemsize
    if backend == "numpy":  # scores and probabilities of one layer, keys and values repeated for each head
        positions = min(LEAST_CONTEXT, args.max_seq_len)
        step += itemsize * positions * (4 * PREFILL_CHUNK * args.n_heads + 4 * heads)
    scratch = PYTHON + BYTES_A_TOKEN * args.vocab_size + table + max(step, table // 2)
    kv_per_position = position.k.nbytes + position.v.nbytes
    context = args.max_seq_len, positions_stored(args, args.max_seq_len)
    return MemoryPlan(mapped, made, kv_per_position, scratch, *context, parameters, instead)


def available_memory(mapped: int = 0) -> int:
    """The bytes that this process may still use: the least that machine, container and own limit leave.

    `mapped` bytes are mapped already. They count as used in the own limit, so they are added again.
    """
    own = _own_limit()
    limits = [system.free_memory(), _container(), None if own is None else own + mapped]
    return max(0, min(limit for limit in limits if limit is not None))


def _container() -> int | None:
    """The least memory that a control group leaves: the process's own group or one that contains it.

    Memory that only caches files counts as free, because the system can take it back.
    """
    left = [n for folder in groups("memory") if (n := _left_in(folder)) is not None]
    return min(left, default=None)


def _left_in(group: Path) -> int | None:
    for names in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        try:
            limit, used = ((group / name).read_text(encoding="utf-8").strip() for name in names)
        except OSError:
            continue
        if limit.isdigit() and used.isdigit():  # not "max"
            return int(limit) - int(used) + numbers(group / "memory.stat").get("inactive_file", 0)
    return None


def _own_limit() -> int | None:
    """The address space that `ulimit -v` leaves. A mapped file takes its whole size there."""
    limit, used = system.ulimit("v"), numbers("/proc/self/status").get("VmSize:")
    return None if limit is None or used is None else limit - used * 1024


def gib(nbytes: int) -> str:
    """12.3 GiB, or 45.6 MiB."""
    return f"{nbytes / 2**30:,.1f} GiB" if nbytes >= 1 << 30 else f"{nbytes / 2**20:,.1f} MiB"
