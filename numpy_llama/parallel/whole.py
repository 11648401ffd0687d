"""The whole model, as rank 0 shows it: its parts are whole too, and any of them can be exchanged.

A part that nobody has exchanged is a command to all ranks:

    hidden    all layers of the model as it was loaded
    block     one layer, if another one was exchanged
    linear    the output matrix, or one in a layer of which a part was exchanged; rank 0 gets all rows
    update    keys and values: each rank stores those of its heads, and rank 0 gets those of all heads

All else runs on rank 0 alone, in the lines of model.py. So functions of a user run there once, on whole
activations. The bits are those of one process, where a block with an exchanged part runs these lines too.
"""

import weakref
from collections.abc import Sequence
from copy import copy
from dataclasses import replace
from operator import index, is_
from typing import Any

import numpy as np

from .. import functional as F
from ..backend.formats import InPlace
from ..cache import KVCache
from ..config import Array, ModelArgs
from ..errors import MismatchError, ParameterError, UnsupportedError
from ..generation.batch import BatchCache
from ..lora import LoRALinear
from ..model import Attention, FeedForward, Linear, RMSNorm, Transformer, TransformerBlock
from ..parts import with_parts
from .cut import Plan
from .model import SharedCache, remembered
from .ranks import Ranks


class Part(InPlace):
    """What one rank has of a model, and what all ranks do with theirs at the same time."""

    def __init__(self, model: Transformer, plan: Plan, ranks: Ranks):
        self.model, self.plan, self.ranks = model, plan, ranks

    def new_cache(self, n_layers: int, batch: int, max_seq_len: int | None) -> SharedCache:
        model = with_parts(self.model, {"args": replace(self.model.args, n_layers=n_layers)})
        cache = model.new_cache(batch, max_seq_len)
        assert isinstance(cache, SharedCache)
        return cache

    def linear(self, name: str, x: Array) -> Array:
        """Each rank multiplies its rows; rank 0 gets all of them, (..., IN) -> (..., OUT)."""
        y: Array = self.find(name)(x)
        widths = self.plan.widths(name)
        return self.ranks.gather_on_first(y[..., : widths[self.ranks.rank]], widths)

    def find(self, name: str) -> Any:
        """The part of that name."""
        part: Any = self.model
        for step in name.split("."):
            part = part[int(step)] if isinstance(part, list) else getattr(part, step)
        return part

    def block(
        self, i: int, layer: int, x: Array, start_pos: Any, freqs_cis: Array, caches: Sequence[SharedCache]
    ) -> Array:
        """Block i, whose keys and values are those of that layer of the caches."""
        block: Any = self.model.layers[i]
        if layer != i:
            block = with_parts(block, {"attention.layer": layer})
        return block(x, start_pos, freqs_cis, as_one(caches, start_pos))


def as_one(caches: Sequence[SharedCache], start_pos: Any) -> Any:
    """The cache of a pass: one, or those of sequences of several lengths."""
    return caches[0] if np.ndim(start_pos) == 0 else BatchCache(caches)


class Shared(Part):
    """On rank 0: the part of this rank, and the model's number. When it is gone, the others forget theirs."""

    def __init__(self, model: Transformer, plan: Plan, ranks: Ranks, number: int):
        super().__init__(model, plan, ranks)
        self.number = number
        weakref.finalize(self, ranks.forgotten.append, ("forget", number)).atexit = False


class WholeLinear(Linear):
    """A matrix of which each rank has some rows. `weight` is rank 0's part of it."""

    def __init__(self, name: str, shared: Shared):
        part = shared.find(name)
        base = part.base if isinstance(part, LoRALinear) else part
        super().__init__(base.weight, base.linear)
        self.name, self.shared, self.own = name, shared, (base.weight, base.linear)

    def __call__(self, x: Array) -> Array:
        if self.weight is not self.own[0]:  # of somebody who has all of it
            return super().__call__(x)
        if self.linear is not self.own[1]:
            raise UnsupportedError(
                f"{self.name}.linear was exchanged, but rank 0 has only a part of the weight that it would "
                f"take: exchange {self.name}, or start without mpiexec"
            )
        x, IN = np.asarray(x), self.weight.shape[1]
        if x.shape[-1:] != (IN,) or x.dtype.kind not in "biuf":
            raise MismatchError(
                f"x is {x.dtype} of shape {x.shape}, {self.name} takes numbers of shape (..., {IN})"
            )
        with self.shared.ranks.together("linear", self.shared.number, self.name, x):
            return self.shared.linear(self.name, x)


class WholeBlock(TransformerBlock):
    """A TransformerBlock on all ranks. It runs its parts instead if one of them was exchanged."""

    def __init__(self, i: int, args: ModelArgs, shared: Shared):
        block, name = shared.model.layers[i], f"layers.{i}"
        self.attention_norm, self.ffn_norm = block.attention_norm, block.ffn_norm
        self.attention, self.feed_forward = copy(block.attention), copy(block.feed_forward)
        self.attention.n_heads, self.attention.n_kv_heads = args.n_heads, args.n_kv_heads
        for of, part in (("attention", self.attention), ("feed_forward", self.feed_forward)):
            for weight in [
                key for key, value in vars(part).items() if isinstance(value, Linear | LoRALinear)
            ]:
                setattr(part, weight, WholeLinear(f"{name}.{of}.{weight}", shared))
        self.i, self.shared = i, shared
        self.own = contents(self)

    def unchanged(self) -> bool:
        """Whether the block still has its parts. It may be of a class with hooks around them."""
        return alike(contents(self)[1:], self.own[1:])

    def fuses(self, cache: Any) -> bool:
        """It takes a BatchCache as it is: see batch.py."""
        return self.unchanged() and are_shared(cache, self.shared.ranks)

    def __call__(self, x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        shared, args, (B, T, D) = self.shared, self.shared.plan.args, x.shape
        angles = T, args.head_dim // 2
        fits = args.dim == D and freqs_cis.shape in (angles, (B, *angles))
        if not (fits and x.size and self.fuses(cache)):
            return super().__call__(x, start_pos, freqs_cis, cache)
        layer = self.attention.layer
        caches, start_pos = checked_caches(cache, start_pos, B, T, range(layer, layer + 1), shared.plan)
        dtype = shared.model.norm.weight.dtype
        if x.dtype.kind != "f" or x.dtype.itemsize > dtype.itemsize:  # as in one process, a lower one stays
            x = np.asarray(x, dtype)
        freqs_cis = np.asarray(freqs_cis, shared.model.freqs_cis.dtype)
        about = self.i, layer, x, start_pos, freqs_cis
        with shared.ranks.together("block", shared.number, *about, [one.number for one in caches]):
            return shared.block(*about, caches)
        return self(x, start_pos, freqs_cis, cache)  # a signal's handler has returned


class ParallelTransformer(InPlace, Transformer):
    """The whole model, on rank 0. What an input makes impossible is an error before the others begin."""

    def __init__(self, shared: Shared, args: ModelArgs):
        vars(self).update(vars(shared.model))
        self.args, self.shared = args, shared
        self.layers = [WholeBlock(i, args, shared) for i in range(args.n_layers)]
        self.output = WholeLinear("output", shared)
        self._no_numbers = np.empty((args.vocab_size, 0))
        self._own = self._before_the_end()

    def __copy__(self) -> "ParallelTransformer":
        other = object.__new__(type(self))
        vars(other).update(vars(self))
        return other

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None) -> KVCache:
        if self.cache_type is not self.shared.model.cache_type:
            return super().new_cache(batch, max_seq_len)
        ranks, about = self.shared.ranks, (self.args.n_layers, batch, max_seq_len)
        cache, number = self.shared.new_cache(*about), ranks.new_number()
        with ranks.together("new_cache", self.shared.number, number, *about):
            return remembered(cache.numbered(number))

    def hidden(self, tokens: Any, start_pos: int = 0, cache: KVCache | None = None) -> Array:
        tokens, shared = np.asarray(tokens), self.shared
        B, T, _ = F.embedding(tokens, self._no_numbers).shape
        if not tokens.size:
            raise ParameterError("there is no token to compute")
        F.freqs_cis_at(self.freqs_cis, start_pos, T)
        cache = cache or self.new_cache(B, T)
        if not (alike(self._before_the_end(), self._own) and are_shared(cache, shared.ranks)):
            return super().hidden(tokens, start_pos, cache)
        caches, start_pos = checked_caches(cache, start_pos, B, T, range(len(self.layers)), shared.plan)
        numbers = [one.number for one in caches]
        with shared.ranks.together("hidden", shared.number, tokens, start_pos, numbers):
            return shared.model.hidden(tokens, start_pos, cache)
        return self.hidden(tokens, start_pos, cache)  # a signal's handler has returned

    def _before_the_end(self) -> list[Any]:
        """Everything that `hidden` computes with."""
        places = [getattr(getattr(layer, "attention", None), "layer", None) for layer in self.layers]
        return [self.tok_embeddings, self.freqs_cis, *contents(*self.layers), *places]


PARTS = TransformerBlock, Attention, FeedForward, Linear, RMSNorm


def contents(*values: Any) -> list[Any]:
    """The class of each part, and all that it computes with: a copy has the same. Another value as it is."""
    found = list[Any]()
    for value in values:
        if not isinstance(value, PARTS):
            found.append(value)
            continue
        found.append(type(value))
        for name, one in vars(value).items():
            if isinstance(one, PARTS):
                found += contents(one)
            elif name not in ("own", "layer"):  # a block may stand at another place
                found.append(one)
    return found


def alike(found: Sequence[Any], wanted: Sequence[Any]) -> bool:
    """Whether both are the same objects."""
    return len(found) == len(wanted) and all(map(is_, found, wanted))


def are_shared(cache: Any, ranks: Ranks) -> bool:
    """Whether all ranks have these caches."""
    caches = getattr(cache, "caches", [cache])
    return all(isinstance(one, SharedCache) and one.ranks is ranks for one in caches)


def checked_caches(
    cache: Any, start_pos: Any, B: int, T: int, layers: range, plan: Plan
) -> tuple[Sequence[SharedCache], Any]:
    """Caches that all ranks have, and start_pos as they take it: a number, or an array for a BatchCache.

    An error if a cache is of another model, or has no place for T tokens.
    """
    caches, starts = getattr(cache, "caches", [cache]), [*map(index, np.atleast_1d(start_pos).tolist())]
    if isinstance(cache, BatchCache) and not len(caches) == len(starts) == B:
        raise ParameterError(f"{B} sequences, {len(caches)} caches and {len(starts)} starts")
    for one, start in zip(caches, starts, strict=True):
        if layers.stop > len(one.filled):
            raise MismatchError(
                f"a cache of {len(one.filled)} layers does not fit layer {layers.stop - 1} of the model"
            )
        if (one.plan.kv_heads, one.head_dim) != (plan.kv_heads, plan.args.head_dim):
            raise MismatchError(
                f"a cache of n_kv_heads {one.n_kv_heads} and head_dim {one.head_dim} is of another "
                "model or of other shares"
            )
        # The layer with the fewest positions is the strictest, and the one that has dropped the most.
        for layer in min(layers, key=one.filled.__getitem__), max(layers, key=one.dropped.__getitem__):
            one.check(layer, start, 1 if isinstance(cache, BatchCache) else B, T)
    return caches, np.array(starts) if isinstance(cache, BatchCache) else starts[0]
