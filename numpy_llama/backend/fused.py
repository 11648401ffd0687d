"""Neighbouring transformer blocks in one C call, with the weights and the results of `TransformerBlock`.

A small model spends more time in Python, between the kernels, than in the kernels: a token passes 30
layers, and each layer makes 20 calls. A block with an exchanged part runs its parts, as model.py does.
A pass with much work is several calls, so that Ctrl-C waits less than 250 ms.
"""

from collections.abc import Callable
from functools import partial
from itertools import groupby
from operator import is_
from typing import Any

import numpy as np

from ..cache import KVCache
from ..config import Array
from ..errors import MismatchError, NumericsError, ParameterError
from ..lora import LoRALinear
from ..model import Linear, Transformer, TransformerBlock
from ..window import WindowKVCache
from .formats import MAX_F16
from .kernels import MAX_HEAD_DIM, Cut, FusedWeights, Kernels
from .quantized_cache import QuantizedKVCache, QuantizedWindowKVCache

CACHED = {
    *((kind, np.dtype(kept)) for kind in (KVCache, WindowKVCache) for kept in (np.float32, np.float16)),
    *((kind, np.dtype(np.uint8)) for kind in (QuantizedKVCache, QuantizedWindowKVCache)),
}


class FusedBlock(TransformerBlock):
    """A TransformerBlock that calls csrc/layer.c: the same result within the rounding of float32.

    It runs its parts instead where `fuses` is False.
    """

    cut: Cut | None = None  # how the block is cut for several ranks

    def __init__(self, block: TransformerBlock, kernels: Kernels, weights: FusedWeights):
        vars(self).update(vars(block))
        self.kernels, self.weights, self.fused_parts = kernels, weights, parts_of(block)

    def fuses(self, cache: Any) -> bool:
        """Whether it takes a BatchCache: see batch.py."""
        return self.in_c(cache)

    def in_c(self, cache: Any) -> bool:
        """Whether C computes this block: its parts are unchanged, and C can store into the cache."""
        return self.unchanged() and stores(cache)

    def unchanged(self) -> bool:
        """Whether the block still has the parts that were fused."""
        try:
            return all(map(is_, parts_of(self), self.fused_parts))
        except AttributeError:  # an exchanged part has other attributes
            return False

    def __call__(self, x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        if not self.in_c(cache):
            return self.in_parts(x, start_pos, freqs_cis, cache)
        return run([self], x, start_pos, freqs_cis, cache)

    def in_parts(self, x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        """The block that this one was made of."""
        return super().__call__(x, start_pos, freqs_cis, cache)


class FusedTransformer(Transformer):
    """A Transformer in which neighbouring fused blocks are one C call."""

    def __init__(self, model: Transformer):
        vars(self).update(vars(model))

    def run_layers(self, h: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        can_store = stores(cache)

        def together(at: tuple[int, Any]) -> tuple[Any, ...]:
            """Equal for neighbours that one call computes."""
            i, layer = at
            ours = isinstance(layer, FusedBlock) and type(layer).__call__ is FusedBlock.__call__
            fused = can_store and ours and layer.unchanged()
            alike = (layer.kernels, layer.weights.sizes, layer.cut) if fused else ()
            return alike if fused and layer.attention.layer == i else (i,)

        for key, group in groupby(enumerate(self.layers), together):
            blocks: list[Any] = [block for _, block in group]
            if len(key) == 1:
                h = blocks[0](h, start_pos, freqs_cis, cache)
            else:
                h = run(blocks, h, start_pos, freqs_cis, cache)
        return h


def stores(cache: Any) -> bool:
    """Whether C can store into this cache, or into all caches of a batch, which are of one kind."""
    caches = getattr(cache, "caches", [cache])
    kinds = {
        (getattr(one, "kind", type(one)), getattr(getattr(one, "k", None), "dtype", None)) for one in caches
    }
    return len(kinds) == 1 and kinds <= CACHED


def run(blocks: list[FusedBlock], x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
    """Neighbouring blocks in C: one call, or several if a call would be long."""
    caches, (B, T, _), first = getattr(cache, "caches", [cache]), x.shape, blocks[0].attention.layer
    starts, layers = np.atleast_1d(start_pos).tolist(), range(first, first + len(blocks))
    if few := [len(one.filled) for one in caches if len(one.filled) < layers.stop]:
        raise MismatchError(f"a cache of {few[0]} layers does not fit layer {layers.stop - 1} of the model")
    if not x.size:
        raise ParameterError("there is no token to compute")
    if sum(one.batch for one in caches) == B and have_room(caches, starts, layers, T):
        at_layers = slice(first, layers.stop)
        for one, at in zip(caches, starts, strict=True):
            one.filled[at_layers] = [at] * len(blocks)  # until all are stored, as in KVCache.update
        keys = [one.k[at_layers, b] for one in caches for b in range(one.batch)]
        values = [one.v[at_layers, b] for one in caches for b in range(one.batch)]
        first_of_each = [at for one, at in zip(caches, starts, strict=True) for _ in range(one.batch)]
        dropped = [one.dropped[first] for one in caches for _ in range(one.batch)]
        weights = [block.weights for block in blocks]
        cut, kernels = blocks[0].cut, blocks[0].kernels
        compute = kernels.layers if cut is None else partial(cut.layers, kernels)
        y = compute(weights, x, first_of_each, freqs_cis, keys, values, dropped)
        if y is not None:
            for one, at in zip(caches, starts, strict=True):
                one.filled[at_layers] = [at + T] * len(blocks)
            return y
        if cut is not None:  # the other ranks go on
            raise NumericsError(
                f"positions {starts[0]}..{starts[0] + T - 1}: a key or value is beyond {MAX_F16:.6g}, the "
                "largest float16: exact=True keeps a cache of float32"
            )
    # A number is beyond float16, or the cache is of another batch: the parts raise an error with its place.
    # Or a cache has no room for T tokens at once.
    for block in blocks:
        x = block.in_parts(x, start_pos, freqs_cis, cache)
    return x


def have_room(caches: list[Any], starts: list[int], layers: range, T: int) -> bool:
    """Whether T more positions can be stored in each cache; an error if they have no place in one."""
    for one, at in zip(caches, starts, strict=True):
        for worst in min(layers, key=one.filled.__getitem__), max(layers, key=one.dropped.__getitem__):
            one.check(worst, at, one.batch, T)
    windows = [(one, at) for one, at in zip(caches, starts, strict=True) if isinstance(one, WindowKVCache)]
    return all([one.make_room(layers, at, T) for one, at in windows])


def parts_of(block: TransformerBlock) -> tuple[Any, ...]:
    """Everything that nl_layers computes with: the block's parts, and their attributes."""
    a, f, norm, ffn_norm = block.attention, block.feed_forward, block.attention_norm, block.ffn_norm
    q, k, v, o, gate, up, down = a.wq, a.wk, a.wv, a.wo, f.w_gate, f.w_up, f.w_down
    linears = q, k, v, o, gate, up, down
    return (
        *(type(a), type(f), norm, ffn_norm, *linears, a.attention),
        *(a.n_heads, a.n_kv_heads, a.head_dim, norm.weight, norm.eps, ffn_norm.weight, ffn_norm.eps),
        *(attribute for linear in linears for attribute in _attributes(linear)),
    )


def _attributes(linear: Any) -> tuple[Any, ...]:
    """What a Linear or a LoRALinear computes with."""
    below = _attributes(linear.base) if isinstance(linear, LoRALinear) else ()
    return (*getattr(linear, "__dict__", {}).values(), *below)


def fuse(
    model: Transformer, kernels: Kernels, fused_block: Callable[..., FusedBlock] = FusedBlock
) -> Transformer:
    """The same model with its blocks as one C call, where the kernels take their sizes."""
    window = model.args.sliding_window
    made = [(block, fused_weights(block, kernels, window)) for block in model.layers]
    blocks = {f"layers.{i}": one for i, one in enumerate(made)}
    fused = {name: fused_block(block, kernels, w) for name, (block, w) in blocks.items() if w}
    return FusedTransformer(model.with_parts(fused))


def fused_weights(
    block: TransformerBlock, kernels: Kernels, window: int | None = None
) -> FusedWeights | None:
    """A block's weights in the form of nl_layers; None if it cannot take their sizes."""
    a, f = block.attention, block.feed_forward
    linears: tuple[Any, ...] = (a.wq, a.wk, a.wv, a.wo, f.w_gate, f.w_up, f.w_down)
    if not all(type(part.base if type(part) is LoRALinear else part) is Linear for part in linears):
        return None
    weights = [part.weight for part in linears]
    norms = [norm.weight for norm in (block.attention_norm, block.ffn_norm)]
    whole = all(w.width == w.shape[1] > 0 and (w.row_order is None or i < 2) for i, w in enumerate(weights))
    wq, wk, wv, _, w_gate, w_up, _ = weights  # C sorts the columns of x once for those that multiply it
    alike = all(_same_order(*pair) for pair in ((wq, wk), (wq, wv), (w_gate, w_up)))
    if not whole or not alike or a.head_dim > MAX_HEAD_DIM or any(norm.dtype != np.float32 for norm in norms):
        return None
    updates = [_update(part) if isinstance(part, LoRALinear) else None for part in linears]
    eps, bits = block.attention_norm.eps, kernels.activation_bits
    return FusedWeights(weights, norms, eps, a.head_dim, bits, updates, window)


def _same_order(a: Any, b: Any) -> bool:
    """Whether two weights have their columns in the same order."""
    if a.columns is None or b.columns is None:
        return a.columns is b.columns
    return np.array_equal(a.columns, b.columns)


def _update(part: LoRALinear) -> tuple[Array, Array]:
    """A, and B^T with the scale in it. The rows of B have the order of the base's rows."""
    b, order = part.lora_b[:], part.weight.row_order
    b = np.float32(part.scale) * (b if order is None else b[np.argsort(order)])
    return np.array(part.lora_a[:]), np.ascontiguousarray(b.T)
