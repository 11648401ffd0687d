"""`linear` and `attention` of functional.py, cut into short calls so that Ctrl-C can act between them.

Python handles a signal only when NumPy's call returns. With the shapes of an 8B model, 512 tokens and a long
context, one call takes from 0.3 s to several seconds. A small call is not cut, and its result has the same
bits.

The gradient of `attention` is backward.py's, which computes some keys at a time.
"""

import numpy as np

from .. import backward as B
from .. import functional as F
from ..config import Array
from ..learner import SavingAttention

# Multiply-adds a call: about 50 ms on two cores. With fewer than 32 tokens memory is the limit, and a call
# takes as long as with 32.
LINEAR_WORK, LEAST_TOKENS = 1 << 32, 32
ATTENTION_WORK = 1 << 29  # less, because NumPy multiplies one head at a time, and mask and softmax follow


def linear(x: Array, w: Array) -> Array:
    """F.linear, some rows of w at a time."""
    IN = max(x.shape[-1], 1)
    rows = max(1, LINEAR_WORK // (max(x.size // IN, LEAST_TOKENS) * IN))
    if rows >= len(w):
        return F.linear(x, w)
    return np.concatenate([F.linear(x, w[i : i + rows]) for i in range(0, len(w), rows)], axis=-1)


def _attention(q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """F.attention, some key heads at a time, each with the query heads that share it."""
    (B, T, H, Dh), (S, K) = q.shape, k.shape[1:3]
    heads = max(1, ATTENTION_WORK * K // max(B * T * S * H * Dh, 1))
    if heads >= K:
        return F.attention(q, k, v, window)
    n_rep, parts = H // K, []
    for i in range(0, K, heads):
        some, shared = slice(i, i + heads), slice(i * n_rep, (i + heads) * n_rep)
        parts.append(F.attention(q[:, :, shared], k[:, :, some], v[:, :, some], window))
    return np.concatenate(parts, axis=2)


attention = SavingAttention(_attention, B.attention_saving, B.attention_backward)
