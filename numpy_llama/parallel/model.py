"""A model of which this rank has a part, and the whole model as rank 0 shows it.

A block has four gathers, where all ranks exchange their parts of an activation:

    attention's heads -> wo reads all of them          swiglu's numbers -> w_down reads all of them
    wo's rows         -> the residual stream           w_down's rows    -> the residual stream

The residual stream is whole on every rank. Queries, keys, values and the KV cache are cut by heads.
"""

import copy
import weakref
from collections.abc import Iterator, Mapping, Sequence
from operator import is_
from typing import Any, NoReturn

import numpy as np

from .. import functional as F
from ..backend.formats import InPlace
from ..cache import KVCache
from ..config import Array, ModelArgs
from ..errors import ParameterError, UnsupportedError
from ..generation.batch import BatchCache, one_by_one
from ..model import Attention, FeedForward, Function, Linear, RMSNorm, Transformer, TransformerBlock
from .cut import Plan, widths
from .ranks import Ranks

REFUSED = "parts of a model on several ranks cannot be exchanged, traced or edited yet: start without mpiexec"


class CutBlock(TransformerBlock):
    """A TransformerBlock of which this rank has some rows."""

    def __init__(self, block: TransformerBlock, plan: Plan, ranks: Ranks):
        vars(self).update(vars(block))
        self.gather = ranks.gather
        self.heads_widths = [n * plan.args.head_dim for n in widths(plan.heads)]
        self.dim_widths, self.hidden_widths = widths(plan.dim), widths(plan.hidden_dim)
        self.attend = one_or_more(block.attention.attention)

    def fuses(self, cache: Any) -> bool:
        """It takes a BatchCache as it is: see batch.py."""
        return True

    def __call__(self, x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        """The lines of model.py, with their gathers."""
        a, ffn, (B, T, _) = self.attention, self.feed_forward, x.shape
        normed = self.attention_norm(x)
        xq = a.wq(normed).reshape(B, T, a.n_heads, a.head_dim)
        xk = a.wk(normed).reshape(B, T, a.n_kv_heads, a.head_dim)
        xv = a.wv(normed).reshape(B, T, a.n_kv_heads, a.head_dim)
        xq, xk = F.apply_rotary_emb(xq, freqs_cis), F.apply_rotary_emb(xk, freqs_cis)
        keys, values = cache.update(a.layer, start_pos, xk, xv)
        heads = self.gather(self.attend(xq, keys, values).reshape(B, T, -1), self.heads_widths)
        h = x + self.gather(a.wo(heads), self.dim_widths)

        normed = self.ffn_norm(h)
        wide = self.gather(F.swiglu(ffn.w_gate(normed), ffn.w_up(normed)), self.hidden_widths)
        return h + self.gather(ffn.w_down(wide), self.dim_widths)


def one_or_more(attention: Function) -> Function:
    """`attention`, also for the keys and values of a BatchCache."""
    each = one_by_one(attention)

    def attend(q: Array, keys: Any, values: Any) -> Array:
        return (attention if isinstance(keys, np.ndarray) else each)(q, keys, values)

    return attend


class CutOutput(Linear):
    """The output matrix, of which this rank has some rows. Rank 0 gets all logits."""

    def __init__(self, output: Linear, plan: Plan, ranks: Ranks):
        super().__init__(output.weight, output.linear)
        self.part, self.ranks, self.widths = output, ranks, widths(plan.vocab)

    def __call__(self, x: Array) -> Array:
        return self.ranks.gather_on_first(self.part(x), self.widths)


class SharedCache(KVCache):
    """A KVCache of which each rank has the positions of its own heads."""

    ranks: Ranks
    kind: type[KVCache]  # whose numbers it has
    number: int  # of the cache, the same on every rank
    kv_heads: slice

    def update(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        """As in KVCache, for this rank's heads. Outside a pass: for the keys and values of all heads."""
        if self.ranks.inside():
            return super().update(layer, start_pos, xk, xv)
        self.check(layer, start_pos, *xk.shape[:2])
        with self.ranks.together("store", self.number, layer, start_pos, xk, xv):
            return self.store(layer, start_pos, xk, xv)

    def store(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        """Store this rank's heads of the keys and values of all heads."""
        return super().update(layer, start_pos, xk[:, :, self.kv_heads], xv[:, :, self.kv_heads])

    def numbered(self, number: int) -> "SharedCache":
        """The same cache, under that number."""
        self.number = number
        return self

    def twin(self) -> "SharedCache":
        """A copy on this rank."""
        twin: SharedCache = object.__new__(type(self))
        vars(twin).update({name: copy.copy(value) for name, value in vars(self).items() if name != "ranks"})
        twin.ranks = self.ranks
        return twin

    def __copy__(self) -> "SharedCache":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedCache":
        number = self.ranks.new_number()
        with self.ranks.together("copy_cache", self.number, number):
            return remembered(self.twin().numbered(number))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a session on several ranks cannot be pickled: each rank has a part of its cache"
        )


def remembered(cache: SharedCache) -> SharedCache:
    """The same cache. When rank 0 has it no longer, the others forget theirs."""
    weakref.finalize(cache, cache.ranks.forgotten.append, ("forget", cache.number)).atexit = False
    return cache


def shared(kind: type[KVCache], ranks: Ranks, kv_heads: slice) -> type[KVCache]:
    """The class of a cache of that kind with this rank's heads."""
    facts = {"ranks": ranks, "kv_heads": kv_heads, "kind": kind}
    return type(f"Shared{kind.__name__}", (SharedCache, kind), facts)


def part_of(model: Transformer, kernels: Any, plan: Plan, ranks: Ranks) -> Transformer:
    """A model with this rank's weights, made one that runs together with the other ranks.

    kernels: those of its backend; with them C computes the blocks from one gather to the next, where it can.
    """
    blocks = {f"layers.{i}": CutBlock(block, plan, ranks) for i, block in enumerate(model.layers)}
    part = model.with_parts({**blocks, "output": CutOutput(model.output, plan, ranks)})
    if kernels is not None:
        from .fused import fused  # imported here, because the NumPy backend runs without the C extension

        part = fused(part, kernels, plan, ranks)
    part.cache_type = shared(model.cache_type, ranks, plan.kv_heads[ranks.rank])
    return part


class ParallelTransformer(InPlace, Transformer):
    """The whole model, on rank 0. Its parts are those of rank 0; each call runs on all ranks.

    What an input makes impossible is an error before the others begin.
    """

    def __init__(self, part: Transformer, args: ModelArgs, ranks: Ranks, number: int):
        vars(self).update(vars(part))
        self.part, self.args, self.ranks, self.number = part, args, ranks, number
        self._own_parts, self._no_numbers = [*self._parts()], np.empty((args.vocab_size, 0))
        weakref.finalize(self, ranks.forgotten.append, ("forget", number)).atexit = False

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None) -> KVCache:
        cache = self.part.new_cache(batch, max_seq_len)
        assert isinstance(cache, SharedCache)
        number = self.ranks.new_number()
        with self.ranks.together("new_cache", self.number, number, batch, max_seq_len):
            return remembered(cache.numbered(number))

    def hidden(self, tokens: Any, start_pos: int = 0, cache: KVCache | None = None) -> Array:
        self._check_parts()
        tokens = np.asarray(tokens)
        B, T, _ = F.embedding(tokens, self._no_numbers).shape
        if not tokens.size:
            raise ParameterError("there is no token to compute")
        F.freqs_cis_at(self.freqs_cis, start_pos, T)
        cache = cache or self.new_cache(B, T)
        caches = checked_caches(cache, start_pos, B, T, self.ranks)
        numbers = [one.number for one in caches]
        with self.ranks.together("hidden", self.number, tokens, start_pos, numbers):
            return self.part.hidden(tokens, start_pos, cache)
        return self.hidden(tokens, start_pos, cache)  # a signal's handler has returned

    def logits(self, h: Array) -> Array:
        self._check_parts()
        if h.shape[-1:] != (self.args.dim,):
            raise ParameterError(
                f"h has the shape {h.shape}, its last axis must have {self.args.dim} numbers"
            )
        with self.ranks.together("logits", self.number, h):
            return self.part.logits(h)

    def run_layers(self, h: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> NoReturn:
        raise UnsupportedError(REFUSED)

    def with_parts(self, parts: Mapping[str, Any]) -> Transformer:
        if parts:
            raise UnsupportedError(REFUSED)
        return self

    def _parts(self) -> Iterator[Any]:
        """Everything that rank 0 computes with."""
        yield self.tok_embeddings
        for part in (*self.layers, self.norm, self.output):
            yield part
            yield from parts_in(part)

    def _check_parts(self) -> None:
        """UnsupportedError if a part was put in place of another: the other ranks do not have it."""
        parts = [*self._parts()]
        if len(parts) != len(self._own_parts) or not all(map(is_, parts, self._own_parts)):
            raise UnsupportedError(REFUSED)


def parts_in(part: Any) -> Iterator[Any]:
    """What a part computes with: its attributes, and those of the parts in it."""
    for value in getattr(part, "__dict__", {}).values():
        yield value
        if isinstance(value, Attention | FeedForward | Linear | RMSNorm):
            yield from parts_in(value)


def checked_caches(cache: Any, start_pos: Any, B: int, T: int, ranks: Ranks) -> Sequence[SharedCache]:
    """The caches that all ranks have; an error if one has no place for T tokens, or is not theirs."""
    caches, starts = getattr(cache, "caches", [cache]), np.atleast_1d(start_pos).tolist()
    if not all(isinstance(one, SharedCache) and one.ranks is ranks for one in caches):
        raise ParameterError("the cache is of another model: make it with model.new_cache")
    if isinstance(cache, BatchCache) and not len(caches) == len(starts) == B:
        raise ParameterError(f"{B} sequences, {len(caches)} caches and {len(starts)} starts")
    for one, start in zip(caches, starts, strict=True):
        for layer in min_and_max(one):
            one.check(layer, start, 1 if isinstance(cache, BatchCache) else B, T)
    return caches


def min_and_max(cache: KVCache) -> tuple[int, int]:
    """The layer with the fewest positions, and the one that has dropped the most."""
    layers = range(len(cache.filled))
    return min(layers, key=cache.filled.__getitem__), max(layers, key=cache.dropped.__getitem__)
