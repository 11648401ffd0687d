"""The mathematics of LLaMA: pure functions on NumPy arrays, nothing else.

What this file promises: every operation of the forward pass is here and is the definition; tests hold
the C kernels equal to it. Every function computes in the dtype it is given (float32 in use,
float64 in tests). The letters of the shape comments are explained in config.py.
"""

import math

import numpy as np

from .errors import ContextOverflowError, MismatchError, ParameterError


def embedding(tokens, weight):
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


def linear(x, w):
    """y = x W^T: (..., IN), (OUT, IN) -> (..., OUT)."""
    return x @ w.T


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis (Zhang & Sennrich 2019, eq. 4)."""
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def softmax(x):
    """exp(x_i) / sum_j exp(x_j) over the last axis; shifted by the maximum, so no exp overflows."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def silu(x):
    """x * sigmoid(x) (Hendrycks & Gimpel 2016). Far below zero exp(-x) is inf and the result -0."""
    with np.errstate(over="ignore"):
        return x / (1 + np.exp(-x))


def swiglu(gate, up):
    """silu(gate) * up: the gated activation of the FFN (Shazeer 2020, eq. 6)."""
    return silu(gate) * up


def rope_freqs(head_dim, rope_theta, dtype=np.float64):
    """theta_j = rope_theta^(-2j / head_dim): how far one position turns pair j (RoFormer) -> (Dh / 2,)."""
    return 1 / dtype(rope_theta) ** (np.arange(0, head_dim, 2, dtype=dtype) / dtype(head_dim))


def precompute_freqs_cis(head_dim, end, rope_theta, scaling=None, dtype=np.float32):
    """e^(i m theta_j) for positions m < end, theta_j = rope_theta^(-2j / head_dim).

    RoFormer (Su et al. 2021), section 3.2.2. -> (end, Dh / 2) complex, for example (8192, 32). A scaling
    (rope.py) divides each theta_j by a number, and multiplies the result by one. `end` is the context.
    """
    freqs = rope_freqs(head_dim, rope_theta, dtype)
    if scaling is not None:
        freqs = (freqs / scaling.divisors(freqs, rope_theta, end)).astype(dtype)
    angles = np.outer(np.arange(end, dtype=dtype), freqs)
    freqs_cis = np.empty(angles.shape, np.result_type(dtype, np.complex64))
    np.cos(angles, out=freqs_cis.real)
    np.sin(angles, out=freqs_cis.imag)
    return freqs_cis if scaling is None else freqs_cis * dtype(scaling.length_factor)


def freqs_cis_at(freqs_cis, start_pos, T):
    """The angles of the T positions from start_pos on: (end, Dh / 2) -> (T, Dh / 2).

    Or of T positions for each of B sequences, from B starts: -> (B, T, Dh / 2).
    """
    first, last = np.min(start_pos), np.max(start_pos) + T - 1
    if first < 0 or last >= len(freqs_cis):
        raise ContextOverflowError(f"positions {first}..{last} do not fit a context of {len(freqs_cis)}")
    return freqs_cis[np.asarray(start_pos)[..., None] + np.arange(T)]


def apply_rotary_emb(x, freqs_cis):
    """Turn each pair (x_2j, x_2j+1), read as one complex number, by its angle.

    (B, T, H, Dh), (T, Dh / 2) or (B, T, Dh / 2) -> (B, T, H, Dh), for example (1, 8, 32, 128), (8, 64).
    """
    return (x.view(freqs_cis.dtype) * freqs_cis[..., None, :]).view(x.dtype)


def causal_mask(T, S, dtype=np.float32):
    """0 where query t may look, -inf where it may not: the T queries are the last T of S positions.

    -> (T, S). With T = 2 new tokens after 3 cached ones: [[0 0 0 0 -inf], [0 0 0 0 0]].
    """
    if T > S:
        raise MismatchError(f"{T} queries cannot be the last of {S} positions")
    return np.triu(np.full((T, S), -np.inf, dtype), k=S - T + 1)


def repeat_kv(x, n_rep):
    """Each key/value head serves n_rep query heads: (B, S, K, Dh) -> (B, S, H, Dh) (Ainslie et al. 2023)."""
    return np.repeat(x, n_rep, axis=2)


def attention_scores(q, k):
    """q k^T / sqrt(Dh) + mask: (B, T, H, Dh), (B, S, K, Dh) -> (B, H, T, S).

    How much each of the T queries, which are the last T of S positions, wants of each position.
    """
    (T, H, Dh), (S, K) = q.shape[1:], k.shape[1:3]
    k = repeat_kv(k, H // K).astype(q.dtype).transpose(0, 2, 3, 1)  # (B, H, Dh, S)
    return q.swapaxes(1, 2) @ k / math.sqrt(Dh) + causal_mask(T, S, q.dtype)


def weighted_values(weights, v):
    """Each query's weights times the values: (B, H, T, S), (B, S, K, Dh) -> (B, T, H, Dh)."""
    v = repeat_kv(v, weights.shape[1] // v.shape[2]).astype(weights.dtype).swapaxes(1, 2)  # (B, H, S, Dh)
    return (weights @ v).swapaxes(1, 2)


def attention(q, k, v):
    """softmax(q k^T / sqrt(Dh) + mask) v for each head (Vaswani et al. 2017, eq. 1).

    q (B, T, H, Dh); k, v (B, S, K, Dh) -> (B, T, H, Dh), for example (1, 8, 32, 128).
    """
    (B, _, H, Dh), (S, K) = q.shape, k.shape[1:3]
    if k.shape != (B, S, K, Dh) or v.shape != k.shape or H % K:  # NumPy would broadcast what it can
        raise MismatchError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
    return weighted_values(softmax(attention_scores(q, k)), v)
