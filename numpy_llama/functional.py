"""The mathematics of LLaMA: pure functions on NumPy arrays, nothing else.

This file defines every operation of the forward pass; tests hold the C kernels equal to it. A function
computes in the dtype of its input (float32 in use, float64 in tests). config.py explains the letters.
"""

import math

import numpy as np

from .config import Array, RopeScaling
from .errors import ContextOverflowError, MismatchError, ParameterError


def embedding(tokens: Array, weight: Array) -> Array:
    """Row `tokens[b, t]` of the table: (B, T) ids, (V, D) -> (B, T, D)."""
    if tokens.ndim != 2 or not np.issubdtype(tokens.dtype, np.integer):
        raise ParameterError(
            f"tokens are {tokens.dtype} of shape {tokens.shape}, wanted whole numbers of shape (B, T)"
        )
    if tokens.size and not (tokens.min() >= 0 and tokens.max() < len(weight)):
        raise ParameterError(
            f"token ids from {tokens.min()} to {tokens.max()}, they must lie in 0..{len(weight) - 1}"
        )
    return weight[tokens]


def linear(x: Array, w: Array) -> Array:
    """y = x W^T: (..., IN), (OUT, IN) -> (..., OUT)."""
    return x @ w.T


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x: Array) -> Array:
    """exp(x_i) / sum_j exp(x_j) over the last axis; shifted by the maximum, so no exp overflows."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x: Array) -> Array:
    """x * sigmoid(x) (Hendrycks & Gimpel 2016). Far below zero exp(-x) is inf and the result -0."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def swiglu(gate: Array, up: Array) -> Array:
    """silu(gate) * up: the gated activation of the FFN (Shazeer 2020, eq. 6)."""
    return silu(gate) * up


def rope_freqs(head_dim: int, rope_theta: float, dtype: type = np.float64, by: Array | int = 1) -> Array:
    """theta_j = rope_theta^(-2j / head_dim) / by, the turn of pair j a position (RoFormer) -> (Dh / 2,)."""
    powers = np.power(rope_theta, np.arange(0, head_dim, 2, dtype=dtype) / dtype(head_dim), dtype=np.float64)
    return 1 / (powers.astype(dtype) * np.asarray(by, dtype))  # rounded once, as PyTorch rounds its powers


def precompute_freqs_cis(
    head_dim: int, end: int, rope_theta: float, scaling: RopeScaling | None = None, dtype: type = np.float32
) -> Array:
    """e^(i m theta_j) for positions m < end -> (end, Dh / 2) complex, for example (8192, 32).

    RoFormer (Su et al. 2021), section 3.2.2. A scaling (rope.py) divides each theta_j and scales the result.
    """
    freqs = rope_freqs(head_dim, rope_theta, dtype)
    if scaling is not None:
        freqs = rope_freqs(head_dim, rope_theta, dtype, scaling.divisors(freqs, rope_theta, end))
    angles = np.outer(np.arange(end, dtype=dtype), freqs)
    freqs_cis = np.empty(angles.shape, np.result_type(dtype, np.complex64))
    np.cos(angles, out=freqs_cis.real)
    np.sin(angles, out=freqs_cis.imag)
    return freqs_cis if scaling is None else freqs_cis * dtype(scaling.length_factor)


def freqs_cis_at(freqs_cis: Array, start_pos: int | Array, T: int) -> Array:
    """The angles of the T positions from start_pos on: (end, Dh / 2) -> (T, Dh / 2).

    With an array of B starts, those of T positions in each of B sequences: -> (B, T, Dh / 2).
    """
    first, last = np.min(start_pos), np.max(start_pos) + T - 1
    if first < 0 or last >= len(freqs_cis):
        raise ContextOverflowError(f"positions {first}..{last} do not fit a context of {len(freqs_cis)}")
    return freqs_cis[np.asarray(start_pos)[..., None] + np.arange(T)]


def apply_rotary_emb(x: Array, freqs_cis: Array) -> Array:
    """Turn each pair (x_2j, x_2j+1), read as one complex number, by its angle.

    (B, T, H, Dh), (T, Dh / 2) or (B, T, Dh / 2) -> (B, T, H, Dh), for example (1, 8, 32, 128), (8, 64).
    """
    return (x.view(freqs_cis.dtype) * freqs_cis[..., None, :]).view(x.dtype)


def causal_mask(T: int, S: int, dtype: type = np.float32, window: int | None = None) -> Array:
    """0 where query t sees a position, -inf where it does not. The T queries are the last of S positions.

    -> (T, S). With T = 2 new tokens after 3 cached ones: [[0 0 0 0 -inf], [0 0 0 0 0]].
    With a window, a query sees only the last `window` of these positions, its own included.
    """
    if T > S:
        raise MismatchError(f"{T} queries cannot be the last of {S} positions")
    mask: Array = np.triu(np.full((T, S), -np.inf, dtype), k=S - T + 1)
    return mask if window is None else mask + np.tril(np.full_like(mask, -np.inf), k=S - T - window)


def repeat_kv(x: Array, n_rep: int) -> Array:
    """Each key/value head serves n_rep query heads: (B, S, K, Dh) -> (B, S, H, Dh) (Ainslie et al. 2023)."""
    return np.repeat(x, n_rep, axis=2)


def attention_scores(q: Array, k: Array, window: int | None = None) -> Array:
    """q k^T / sqrt(Dh) + mask: (B, T, H, Dh), (B, S, K, Dh) -> (B, H, T, S)."""
    (T, H, Dh), (S, K) = q.shape[1:], k.shape[1:3]
    k = repeat_kv(k, H // K).astype(q.dtype).transpose(0, 2, 3, 1)  # (B, H, Dh, S)
    return q.swapaxes(1, 2) @ k / math.sqrt(Dh) + causal_mask(T, S, q.dtype.type, window)


def weighted_values(weights: Array, v: Array) -> Array:
    """Each query's weights times the values: (B, H, T, S), (B, S, K, Dh) -> (B, T, H, Dh)."""
    v = repeat_kv(v, weights.shape[1] // v.shape[2]).astype(weights.dtype).swapaxes(1, 2)  # (B, H, S, Dh)
    return (weights @ v).swapaxes(1, 2)


def attention(q: Array, k: Array, v: Array, window: int | None = None) -> Array:
    """softmax(q k^T / sqrt(Dh) + mask) v for each head (Vaswani et al. 2017, eq. 1).

    q (B, T, H, Dh); k, v (B, S, K, Dh) -> (B, T, H, Dh), for example (1, 8, 32, 128).
    """
    (B, _, H, Dh), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, Dh) or v.shape != k.shape or H % K:  # NumPy would broadcast what it can
        raise MismatchError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
    return weighted_values(softmax(attention_scores(q, k, window)), v)
