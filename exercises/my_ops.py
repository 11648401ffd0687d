"""LLaMA's operations, yours. The letters of the shapes are those of the course."""

import numpy as np


# Chapter 2: row tokens[b, t] of the table. Ids that are no rows of it: an error.
def embedding(tokens, weight):
    """(B, T) whole numbers, (V, D) -> (B, T, D)."""
    raise NotImplementedError


# Chapter 3: x / sqrt(mean(x^2) + eps) * weight, over the last axis.
def rms_norm(x, weight, eps):
    """(..., D), (D,) -> (..., D)."""
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
    """-> (T, S)."""
    raise NotImplementedError


# Chapter 5: each key head serves n_rep query heads, side by side.
def repeat_kv(x, n_rep):
    """(B, S, K, Dh) -> (B, S, K * n_rep, Dh)."""
    raise NotImplementedError


# Chapter 5: softmax(q k^T / sqrt(Dh) + mask) v, for each head.
def attention(q, k, v):
    """(B, T, H, Dh), (B, S, K, Dh), (B, S, K, Dh) -> (B, T, H, Dh)."""
    raise NotImplementedError


# Chapter 7: x / (1 + exp(-x)). What if x is -1000?
def silu(x):
    raise NotImplementedError


# Chapter 7: silu(gate) * up.
def swiglu(gate, up):
    raise NotImplementedError


# Chapter 8: the id of the largest logit; of equal ones the lowest.
def greedy(logits):
    """(V,) -> int."""
    raise NotImplementedError


# Chapter 8: keep the k largest logits, and make the others -inf; of equal ones those with the lowest ids.
def top_k(logits, k):
    """(V,) -> (V,)."""
    raise NotImplementedError


# Chapter 8: in falling order keep ids while the mass before them does not exceed p.
def top_p(logits, p):
    """(V,) -> (V,)."""
    raise NotImplementedError
