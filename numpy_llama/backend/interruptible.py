"""`linear` and `attention` of functional.py, in calls so short that Ctrl-C is heard between them.

A signal waits until NumPy's call returns. With the shapes of an 8B model, 512 tokens and a long context, one
call takes from 0.3 s to several. What is small goes through as it is, to the bit.
"""

import numpy as np

from .. import functional as F

# Multiply-adds a call: some 50 ms on two cores. Fewer tokens than 32 wait for the memory as long as 32 do.
LINEAR_WORK, LEAST_TOKENS = 1 << 32, 32
ATTENTION_WORK = 1 << 29  # NumPy multiplies one head after the other, and then come mask and softmax


def linear(x, w):
    """F.linear, some rows of w at a time."""
    IN = max(x.shape[-1], 1)
    rows = max(1, LINEAR_WORK // (max(x.size // IN, LEAST_TOKENS) * IN))
    if rows >= len(w):
        return F.linear(x, w)
    return np.concatenate([F.linear(x, w[i : i + rows]) for i in range(0, len(w), rows)], axis=-1)


def attention(q, k, v):
    """F.attention, some key heads at a time, with the query heads that share them."""
    (B, T, H, Dh), (S, K) = q.shape, k.shape[1:3]
    heads = max(1, ATTENTION_WORK * K // max(B * T * S * H * Dh, 1))
    if heads >= K:
        return F.attention(q, k, v)
    n_rep = H // K
    parts = [
        F.attention(q[:, :, i * n_rep : (i + heads) * n_rep], k[:, :, i : i + heads], v[:, :, i : i + heads])
        for i in range(0, K, heads)
    ]
    return np.concatenate(parts, axis=2)
