"""LLaMA's operations, yours. The letters of the shapes are those of the course.

What comes out has the precision of what went in. No argument is changed. Sizes may be 0.
"""

import numpy as np


# Chapter 0: y = x W^T, row for row of W. With loops first.
def linear(x, w):
    """(..., IN), (OUT, IN) -> (..., OUT)."""
    raise NotImplementedError


# Chapter 1: as long as two neighbours together have a rank, merge those of the lowest; the leftmost of
# equals.
def merge(text, rank):
    """bytes, {bytes: whole number} -> list of bytes."""
    raise NotImplementedError


# Chapter 2: row tokens[b, t] of the table. Ids that are no rows of it: an error.
def embedding(tokens, weight):
    """(B, T) whole numbers, (V, D) -> (B, T, D)."""
    raise NotImplementedError


# Chapter 3: x / sqrt(mean(x^2) + eps) * weight, over the last axis.
def rms_norm(x, weight, eps):
    """(..., D), (D,) -> (..., D)."""
    raise NotImplementedError


# Chapter 4: e^(i m theta_j) for positions m < end, theta_j = rope_theta^(-2j / head_dim). Where there is a
# scaling, it is r e^(i m theta_j / d_j): r is scaling.length_factor, and d is
# scaling.divisors(theta, rope_theta, end), with all theta_j as one array.
# Chapter 14: for scaling.type "llama3" write out d yourself:
#     turns = original_max_seq_len * theta / (2 pi)
#     keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), but not below 0 or above 1
#     d = 1 / (keep + (1 - keep) / factor)
def precompute_freqs_cis(head_dim, end, rope_theta, scaling=None, dtype=np.float32):
    """-> complex (end, Dh / 2), complex64 for float32 and complex128 for float64."""
    raise NotImplementedError


# Chapter 4: turn each pair (x_2j, x_2j+1), read as a complex number, by its angle.
def apply_rotary_emb(x, freqs_cis):
    """(B, T, H, Dh), complex (T, Dh / 2) or (B, T, Dh / 2) -> (B, T, H, Dh)."""
    raise NotImplementedError


# Chapter 5: exp(x_i) / sum_j exp(x_j). What if x_i is 1000?
def softmax(x):
    """(..., n) -> (..., n)."""
    raise NotImplementedError


# Chapter 5: 0 where query t may look, -inf where it may not. The T queries are the last T of S positions.
def causal_mask(T, S, dtype=np.float32):
    """-> (T, S). T > S: an error."""
    raise NotImplementedError


# Chapter 5: each key head serves n_rep query heads, side by side.
def repeat_kv(x, n_rep):
    """(B, S, K, Dh) -> (B, S, K * n_rep, Dh)."""
    raise NotImplementedError


# Chapter 5, and once more in chapter 12: softmax(q k^T / sqrt(Dh) + mask) v, for each head.
def attention(q, k, v):
    """(B, T, H, Dh), (B, S, K, Dh), (B, S, K, Dh) -> (B, T, H, Dh). Shapes that do not fit: an error."""
    raise NotImplementedError


# Chapter 6: what was computed for a position is kept. args: n_layers, n_kv_heads, head_dim, max_seq_len.
class KVCache:
    """Keys and values of all layers, for `batch` sequences of up to max_seq_len positions."""

    def __init__(self, args, batch, max_seq_len, dtype=np.float32):
        raise NotImplementedError

    def update(self, layer, start_pos, xk, xv):
        """Store (B, T, K, Dh) at start_pos, in dtype; give back all so far, (B, S, K, Dh), twice.

        T may be 0. An earlier start_pos than last time forgets what lay behind it.
        Another batch, no room, a position below 0, a gap before start_pos: an error, and nothing is stored.
        """
        raise NotImplementedError


# Chapter 7: x / (1 + exp(-x)). What if x is -1000? A warning of NumPy counts as a failure.
def silu(x):
    """(...) -> (...)."""
    raise NotImplementedError


# Chapter 7: silu(gate) * up.
def swiglu(gate, up):
    """(...), (...) -> (...)."""
    raise NotImplementedError


# Chapter 8: the id of the largest logit; of equal ones the lowest.
def greedy(logits):
    """(V,) -> int. NaN or infinity on top: an error."""
    raise NotImplementedError


# Chapter 8: keep the k largest logits, and make the others -inf; of equal ones those with the lowest ids. k
# may exceed V. All three filters give an array of the same precision, and leave their argument as it was.
def top_k(logits, k):
    """(V,) -> (V,)."""
    raise NotImplementedError


# Chapter 8: in falling order keep ids while the mass before them does not exceed p.
def top_p(logits, p):
    """(V,) -> (V,)."""
    raise NotImplementedError


# Chapter 8: keep those at least p times as likely as the likeliest.
def min_p(logits, p):
    """(V,) -> (V,)."""
    raise NotImplementedError


# Chapter 8: with u = rng.random(), the first id whose cumulated probability exceeds u.
def draw(logits, rng):
    """(V,), numpy.random.Generator -> int. NaN or infinity on top: an error."""
    raise NotImplementedError


# Bytes are uint8, in rows.


# Chapter 9: a bfloat16 is the upper half of a float32.
def dequantize_bf16(rows):
    """(rows, 2 n) bytes -> (rows, n) float32."""
    raise NotImplementedError


# Chapter 9: to the nearest, of two equally near to the even one; a NaN stays one.
def quantize_bf16(x):
    """(rows, n) float32 -> (rows, 2 n) bytes."""
    raise NotImplementedError


# Chapter 11: blocks of 34 bytes: the scale d, a float16, and 32 signed bytes. The value is d * q.
def dequantize_q8_0(rows):
    """(rows, n / 32 * 34) bytes -> (rows, n) float32."""
    raise NotImplementedError


# Chapter 11: d = max |x| / 127; q = x * (1 / d), halves rounded away from zero. Where d is 0, q is 0.
def quantize_q8_0(x):
    """(rows, n) float32 -> (rows, n / 32 * 34) bytes."""
    raise NotImplementedError


# Chapter 11: blocks of 18 bytes: d, and 16 bytes of two 4-bit numbers q, weight i low and i + 16 high. The
# value is d * (q - 8).
def dequantize_q4_0(rows):
    """(rows, n / 32 * 18) bytes -> (rows, n) float32."""
    raise NotImplementedError


# Chapter 11: d = x_max / -8, where |x_max| is largest; q = x * (1 / d) + 8, halves rounded up, at most 15.
# Where d is 0, q is 8.
def quantize_q4_0(x):
    """(rows, n) float32 -> (rows, n / 32 * 18) bytes."""
    raise NotImplementedError
