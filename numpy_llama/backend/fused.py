"""One C call for a whole transformer block, with the weights and the results of `TransformerBlock`.

A small model spends more time in Python, between the kernels, than in the kernels: a token passes 30
layers, and each layer makes 20 calls. A block with an exchanged part runs its parts, as model.py does.
"""

from operator import is_
from typing import Any

import numpy as np

from ..cache import KVCache
from ..config import Array
from ..model import Transformer, TransformerBlock
from .kernels import MAX_HEAD_DIM, FusedWeights, Kernels

CACHED = (np.float32, np.float16)


class FusedBlock(TransformerBlock):
    """A TransformerBlock that calls nl_layer of csrc/layer.c: the same result within the rounding of float32.

    It runs its parts instead where `fuses` is False.
    """

    def __init__(self, block: TransformerBlock, kernels: Kernels, weights: FusedWeights):
        vars(self).update(vars(block))
        self.kernels, self.weights, self.fused_parts = kernels, weights, parts_of(block)

    def fuses(self, cache: Any) -> bool:
        """Whether one C call computes this block: its parts are unchanged, and C can store into the cache."""
        try:
            unchanged = all(map(is_, parts_of(self), self.fused_parts))
        except AttributeError:  # an exchanged part has other attributes
            return False
        return unchanged and all(
            type(one) is KVCache and one.k.dtype in CACHED for one in getattr(cache, "caches", [cache])
        )

    def __call__(self, x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        caches, (B, T, _) = getattr(cache, "caches", [cache]), x.shape
        if not self.fuses(cache) or sum(one.batch for one in caches) != B:
            return super().__call__(x, start_pos, freqs_cis, cache)
        layer, starts = self.attention.layer, np.atleast_1d(start_pos).tolist()
        ends = [one.check(layer, at, one.batch, T) for one, at in zip(caches, starts, strict=True)]
        for one, at in zip(caches, starts, strict=True):
            one.filled[layer] = at  # until all are stored, as in KVCache.update
        keys = [k for one in caches for k in one.k[layer]]  # (K, max_seq_len, Dh) of each sequence
        values = [v for one in caches for v in one.v[layer]]
        starts = [at for one, at in zip(caches, starts, strict=True) for _ in range(one.batch)]
        y = self.kernels.layer(self.weights, x, starts, freqs_cis, keys, values)
        if y is None:  # a number is beyond float16: the parts raise an error with its place
            return super().__call__(x, start_pos, freqs_cis, cache)
        for one, end in zip(caches, ends, strict=True):
            one.filled[layer] = end
        return y


def parts_of(block: TransformerBlock) -> tuple[Any, ...]:
    """Everything that nl_layer computes with: the block's parts, and their attributes."""
    a, f, norm, ffn_norm = block.attention, block.feed_forward, block.attention_norm, block.ffn_norm
    q, k, v, o, gate, up, down = a.wq, a.wk, a.wv, a.wo, f.w_gate, f.w_up, f.w_down
    return (
        *(type(a), type(f), norm, ffn_norm, q, k, v, o, gate, up, down, a.attention),
        *(a.n_heads, a.n_kv_heads, a.head_dim, norm.weight, norm.eps, ffn_norm.weight, ffn_norm.eps),
        *(q.weight, q.linear, k.weight, k.linear, v.weight, v.linear, o.weight, o.linear),
        *(gate.weight, gate.linear, up.weight, up.linear, down.weight, down.linear),
    )


def fuse(model: Transformer, kernels: Kernels) -> Transformer:
    """The same model with each block as one C call, where the kernels take its sizes."""
    blocks = {f"layers.{i}": (block, fused_weights(block, kernels)) for i, block in enumerate(model.layers)}
    return model.with_parts(
        {name: FusedBlock(block, kernels, weights) for name, (block, weights) in blocks.items() if weights}
    )


def fused_weights(block: TransformerBlock, kernels: Kernels) -> FusedWeights | None:
    """A block's weights in the form of nl_layer; None if it cannot take their sizes."""
    a, f = block.attention, block.feed_forward
    weights = [linear.weight for linear in (a.wq, a.wk, a.wv, a.wo, f.w_gate, f.w_up, f.w_down)]
    norms = [norm.weight for norm in (block.attention_norm, block.ffn_norm)]
    whole = all(w.width == w.shape[1] > 0 and (w.row_order is None or i < 2) for i, w in enumerate(weights))
    if not whole or a.head_dim > MAX_HEAD_DIM or any(norm.dtype != np.float32 for norm in norms):
        return None
    return FusedWeights(weights, norms, block.attention_norm.eps, a.head_dim, kernels.activation_bits)
