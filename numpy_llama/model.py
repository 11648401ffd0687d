"""LLaMA 1, 2 and 3: the whole model, in the order of the forward pass read from the bottom up.

The model keeps no state between calls, and its weights may be of any type. It receives its two inner
loops, `linear` and `attention`, when it is built. functional.py defines both.
config.py explains the letters of the shape comments.

    tokens -> tok_embeddings -> n_layers x (attention, feed_forward) -> norm -> output -> logits
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from . import functional as F
from .cache import KVCache
from .config import Array, ModelArgs
from .parts import with_parts

Function = Callable[..., Array]
Weights = Mapping[str, Any]  # an array or a KernelWeight by name


class Linear:
    """y = x W^T. LLaMA has no biases."""

    def __init__(self, weight: Any, linear: Function):
        self.weight, self.linear = weight, linear

    def __call__(self, x: Array) -> Array:
        return self.linear(x, self.weight)  # (..., IN) -> (..., OUT)


class RMSNorm:
    """Scale each vector to a root mean square of 1, then by a learnt weight."""

    def __init__(self, weight: Array, eps: float):
        self.weight, self.eps = weight, eps

    def __call__(self, x: Array) -> Array:
        return F.rms_norm(x, self.weight, self.eps)


class Attention:
    """Each new position gathers values from all positions so far, weighted by query and key."""

    def __init__(self, args: ModelArgs, layer: int, w: Weights, linear: Function, attention: Function):
        self.layer, self.head_dim = layer, args.head_dim
        self.n_heads, self.n_kv_heads = args.n_heads, args.n_kv_heads
        self.attention = attention
        self.wq = Linear(w[f"layers.{layer}.attention.wq.weight"], linear)
        self.wk = Linear(w[f"layers.{layer}.attention.wk.weight"], linear)
        self.wv = Linear(w[f"layers.{layer}.attention.wv.weight"], linear)
        self.wo = Linear(w[f"layers.{layer}.attention.wo.weight"], linear)

    def __call__(self, x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        B, T, _ = x.shape
        xq = self.wq(x).reshape(B, T, self.n_heads, self.head_dim)
        xk = self.wk(x).reshape(B, T, self.n_kv_heads, self.head_dim)
        xv = self.wv(x).reshape(B, T, self.n_kv_heads, self.head_dim)

        xq = F.apply_rotary_emb(xq, freqs_cis)
        xk = F.apply_rotary_emb(xk, freqs_cis)

        keys, values = cache.update(self.layer, start_pos, xk, xv)  # (B, S, K, Dh)
        return self.wo(self.attention(xq, keys, values).reshape(B, T, -1))  # (B, T, D)


class FeedForward:
    """Every position by itself: widen, gate, narrow."""

    def __init__(self, layer: int, w: Weights, linear: Function):
        self.w_gate = Linear(w[f"layers.{layer}.feed_forward.w_gate.weight"], linear)
        self.w_up = Linear(w[f"layers.{layer}.feed_forward.w_up.weight"], linear)
        self.w_down = Linear(w[f"layers.{layer}.feed_forward.w_down.weight"], linear)

    def __call__(self, x: Array) -> Array:
        return self.w_down(F.swiglu(self.w_gate(x), self.w_up(x)))  # D -> F -> D


class TransformerBlock:
    """One layer: two steps, each of which adds its result to the residual stream."""

    def __init__(self, args: ModelArgs, layer: int, w: Weights, linear: Function, attention: Function):
        self.attention = Attention(args, layer, w, linear, attention)
        self.feed_forward = FeedForward(layer, w, linear)
        self.attention_norm = RMSNorm(w[f"layers.{layer}.attention_norm.weight"], args.norm_eps)
        self.ffn_norm = RMSNorm(w[f"layers.{layer}.ffn_norm.weight"], args.norm_eps)

    def __call__(self, x: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, cache)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer:
    """The model. `weights` has Meta's names, but w_gate, w_up, w_down for w1, w3, w2."""

    def __init__(
        self,
        args: ModelArgs,
        weights: Weights,
        linear: Function = F.linear,
        attention: Function = F.attention,
        cache_dtype: np.dtype[Any] | type | None = None,
        cache_type: type[KVCache] = KVCache,
    ):
        self.args, self.cache_type = args, cache_type
        if args.sliding_window is not None:
            attention = partial(attention, window=args.sliding_window)
        self.tok_embeddings = weights["tok_embeddings.weight"]
        self.layers = [TransformerBlock(args, i, weights, linear, attention) for i in range(args.n_layers)]
        self.norm = RMSNorm(weights["norm.weight"], args.norm_eps)
        self.cache_dtype = self.norm.weight.dtype if cache_dtype is None else cache_dtype
        self.output = Linear(weights["output.weight"], linear)
        self.freqs_cis = F.precompute_freqs_cis(
            args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling, self.norm.weight.dtype.type
        )

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None) -> KVCache:
        """An empty cache for `batch` sequences of up to `max_seq_len` positions."""
        max_seq_len = self.args.max_seq_len if max_seq_len is None else max_seq_len
        return self.cache_type(self.args, batch, max_seq_len, self.cache_dtype)

    def __call__(self, tokens: Any, start_pos: int = 0, cache: KVCache | None = None) -> Array:
        """Logits of the next token at every position: (B, T) ids -> (B, T, V)."""
        return self.logits(self.hidden(tokens, start_pos, cache))

    def hidden(self, tokens: Any, start_pos: int = 0, cache: KVCache | None = None) -> Array:
        """The residual stream after the last layer, (B, T) -> (B, T, D): all of the model but `logits`.

        Prefill (T tokens at start_pos 0) and decode (1 token at start_pos S) are this same call.
        B sequences of different lengths have B different start_pos, in batch.py's cache.
        """
        h = F.embedding(np.asarray(tokens), self.tok_embeddings)
        freqs_cis = F.freqs_cis_at(self.freqs_cis, start_pos, h.shape[1])
        return self.run_layers(h, start_pos, freqs_cis, cache or self.new_cache(*h.shape[:2]))

    def run_layers(self, h: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
        """All layers, one after another: (B, T, D) -> (B, T, D)."""
        for layer in self.layers:
            h = layer(h, start_pos, freqs_cis, cache)
        return h

    def logits(self, h: Array) -> Array:
        """(..., D) -> (..., V)."""
        return self.output(self.norm(h))

    def with_parts(self, parts: Mapping[str, Any]) -> "Transformer":
        """The same model with other parts: {"layers.*.attention.wq": part}, `*` means every layer.

        This model is unchanged, and both use the same weights. Each layer stores into the cache by its place.
        """
        model = with_parts(self, parts)
        found = [getattr(layer, "attention", None) for layer in model.layers]
        own = {f"layers.{i}.attention.layer": i for i, a in enumerate(found) if getattr(a, "layer", i) != i}
        return with_parts(model, {**own, "args": replace(model.args, n_layers=len(model.layers))})
