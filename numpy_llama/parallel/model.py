"""A model of which this rank has a part, and its KV cache.

A block has four gathers, where all ranks exchange their parts of an activation:

    attention's heads -> wo reads all of them          swiglu's numbers -> w_down reads all of them
    wo's rows         -> the residual stream           w_down's rows    -> the residual stream

The residual stream is whole on every rank. Queries, keys, values and the KV cache are cut by heads.
"""

import copy
import weakref
from typing import Any, NoReturn

import numpy as np

from .. import functional as F
from ..backend.signals import delayed_signals
from ..cache import KVCache
from ..config import Array
from ..errors import MismatchError, NumpyLlamaError, UnsupportedError
from ..generation.batch import one_by_one
from ..generation.branch import branch
from ..model import Function, Transformer, TransformerBlock
from .cut import Plan, widths
from .ranks import Ranks


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


class SharedCache(KVCache):
    """A KVCache of which each rank has the positions of its own heads."""

    ranks: Ranks
    kind: type[KVCache]  # whose numbers it has
    plan: Plan
    number: int  # of the cache, the same on every rank

    @property
    def n_kv_heads(self) -> int:
        """Those of all ranks."""
        return self.plan.args.n_kv_heads

    def update(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        """As in KVCache, for this rank's heads. Outside a pass: for the keys and values of all heads."""
        if self.ranks.inside():
            return super().update(layer, start_pos, xk, xv)
        self.check(layer, start_pos, *xk.shape[:2])
        if not xk.shape[2:] == xv.shape[2:] == (self.n_kv_heads, self.head_dim):
            wanted = f"(B, T, {self.n_kv_heads}, {self.head_dim})"
            raise MismatchError(f"keys have the shape {xk.shape} and values {xv.shape}, wanted {wanted}")
        about = self.number, layer, start_pos, xk, xv
        with delayed_signals(), self.ranks.together("update", *about, passing=NumpyLlamaError):
            return self.update_all(layer, start_pos, xk, xv)

    def update_all(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        """Each rank stores its heads, and rank 0 gets those of all. An error of one is raised on all."""
        own, store = self.plan.kv_heads[self.ranks.rank], super().update
        keys, values = self.ranks.everywhere(lambda: store(layer, start_pos, xk[:, :, own], xv[:, :, own]))
        return self._of_all(keys), self._of_all(values)

    def _of_all(self, x: Array) -> Array:
        """On rank 0: (B, S, K of this rank, Dh) -> (B, S, K, Dh)."""
        widths, (B, S, K, Dh) = self.plan.widths("wk"), x.shape
        part = x.reshape(B, S, K * Dh)[..., : widths[self.ranks.rank]]
        return self.ranks.gather_on_first(part, widths).reshape(B, S, self.n_kv_heads, Dh)

    def numbered(self, number: int) -> "SharedCache":
        """The same cache, under that number."""
        self.number = number
        return self

    def twin(self) -> "SharedCache":
        """A copy on this rank."""
        twin: SharedCache = object.__new__(type(self))
        vars(twin).update({name: copy.copy(value) for name, value in vars(self).items()})
        return twin

    def __copy__(self) -> "SharedCache":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "SharedCache":
        number = self.ranks.new_number()
        with self.ranks.together("copy_cache", self.number, number):
            return remembered(self.twin().numbered(number))

    def branch(self) -> "SharedCache":
        """As in branch.py: each rank shares the positions of its heads."""
        number = self.ranks.new_number()
        with self.ranks.together("branch_cache", self.number, number):
            return remembered(branch(self).numbered(number))

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise UnsupportedError(
            "a session on several ranks cannot be pickled: each rank has a part of its cache"
        )


def remembered(cache: SharedCache) -> SharedCache:
    """The same cache. When rank 0 has it no longer, the others forget theirs."""
    weakref.finalize(cache, cache.ranks.forgotten.append, ("forget", cache.number)).atexit = False
    return cache


def shared(kind: type[KVCache], ranks: Ranks, plan: Plan) -> type[KVCache]:
    """The class of a cache of that kind with this rank's heads."""
    facts = {"ranks": ranks, "plan": plan, "kind": kind}
    return type(f"Shared{kind.__name__}", (SharedCache, kind), facts)


def part_of(model: Transformer, kernels: Any, plan: Plan, ranks: Ranks) -> Transformer:
    """A model with this rank's weights, made one that runs together with the other ranks.

    kernels: those of its backend; with them C computes the blocks from one gather to the next, where it can.
    """
    blocks = {f"layers.{i}": CutBlock(block, plan, ranks) for i, block in enumerate(model.layers)}
    part = model.with_parts(blocks)
    if kernels is not None:
        from .fused import fused  # imported here, because the NumPy backend runs without the C extension

        part = fused(part, kernels, plan, ranks)
    part.cache_type = shared(model.cache_type, ranks, plan)
    return part
