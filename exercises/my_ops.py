"""LLaMA's operations, yours. The letters of the shapes are those of the course.

The result has the precision of the arguments. Do not change an argument. Sizes may be 0.
"""

import numpy as np


# Chapter 0: y = x W^T, one output for each row of W. Write it with loops first.
def linear(x, w):
    """(..., IN), (OUT, IN) -> (..., OUT)."""
    raise NotImplementedError


# Chapter 1: if the joined pair of two neighbours has a rank, it can be merged. Merge the pair of the lowest
# rank; of equal ranks the leftmost. Repeat until no pair has a rank.
def merge(text, rank):
    """bytes, {bytes: whole number} -> list of bytes."""
    raise NotImplementedError


# Chapter 2: row tokens[b, t] of the table. An id that is no row of it is an error.
def embedding(tokens, weight):
    """(B, T) whole numbers, (V, D) -> (B, T, D)."""
    raise NotImplementedError


# Chapter 3: x / sqrt(mean(x^2) + eps) * weight, over the last axis.
def rms_norm(x, weight, eps):
    """(..., D), (D,) -> (..., D)."""
    raise NotImplementedError


# Chapter 4: e^(i m theta_j) for positions m < end, theta_j = rope_theta^(-2j / head_dim). With a scaling
# it is r e^(i m theta_j / d_j). Here r is scaling.length_factor, and d is scaling.divisors(theta, rope_theta,
# end), with all theta_j as one array.
# Chapter 14: for scaling.type "llama3" compute d yourself:
#     turns = original_max_seq_len * theta / (2 pi)
#     keep = (turns - low_freq_factor) / (high_freq_factor - low_freq_factor), but not below 0 or above 1
#     d = 1 / (keep + (1 - keep) / factor)
def precompute_freqs_cis(head_dim, end, rope_theta, scaling=None, dtype=np.float32):
    """-> complex (end, Dh / 2), complex64 for float32 and complex128 for float64."""
    raise NotImplementedError


# Chapter 4: turn each pair (x_2j, x_2j+1), as a complex number, by its angle.
def apply_rotary_emb(x, freqs_cis):
    """(B, T, H, Dh), complex (T, Dh / 2) or (B, T, Dh / 2) -> (B, T, H, Dh)."""
    raise NotImplementedError


# Chapter 5: exp(x_i) / sum_j exp(x_j). It must also work where x_i is 1000.
def softmax(x):
    """(..., n) -> (..., n)."""
    raise NotImplementedError


# Chapter 5: 0 where query t may look, -inf where it may not. The T queries are the last T of S positions.
def causal_mask(T, S, dtype=np.float32):
    """-> (T, S). T > S is an error."""
    raise NotImplementedError


# Chapter 5: each key head serves n_rep neighbouring query heads.
def repeat_kv(x, n_rep):
    """(B, S, K, Dh) -> (B, S, K * n_rep, Dh)."""
    raise NotImplementedError


# Chapter 5, and again in chapter 12: softmax(q k^T / sqrt(Dh) + mask) v, for each head.
def attention(q, k, v):
    """(B, T, H, Dh), (B, S, K, Dh), (B, S, K, Dh) -> (B, T, H, Dh). Shapes that do not fit are an error."""
    raise NotImplementedError


# Chapter 6: keep the keys and values of each position. args has n_layers, n_kv_heads, head_dim, max_seq_len.
class KVCache:
    """Keys and values of all layers, for `batch` sequences of up to max_seq_len positions."""

    def __init__(self, args, batch, max_seq_len, dtype=np.float32):
        raise NotImplementedError

    def update(self, layer, start_pos, xk, xv):
        """Store (B, T, K, Dh) at start_pos, in dtype. Return all keys and all values, (B, S, K, Dh) each.

        T may be 0. If start_pos is earlier than last time, the later positions are forgotten.
        Another batch, no room, a position below 0 or a gap before start_pos is an error. Then store nothing.
        """
        raise NotImplementedError


# Chapter 7: x / (1 + exp(-x)). It must also work where x is -1000. A warning of NumPy counts as a failure.
def silu(x):
    """(...) -> (...)."""
    raise NotImplementedError


# Chapter 7: silu(gate) * up.
def swiglu(gate, up):
    """(...), (...) -> (...)."""
    raise NotImplementedError


# Chapter 8: the id of the largest logit; of equal logits the lowest id.
def greedy(logits):
    """(V,) -> int. If the largest logit is NaN or infinite, an error."""
    raise NotImplementedError


# Chapter 8: keep the k largest logits, and make the others -inf; of equal logits keep the lowest ids. k may
# exceed V. All three filters return an array of the same precision, and do not change their argument.
def top_k(logits, k):
    """(V,) -> (V,)."""
    raise NotImplementedError


# Chapter 8: in falling order of probability, keep an id while the sum before it does not exceed p.
def top_p(logits, p):
    """(V,) -> (V,)."""
    raise NotImplementedError


# Chapter 8: keep the ids that are at least p times as likely as the likeliest.
def min_p(logits, p):
    """(V,) -> (V,)."""
    raise NotImplementedError


# Chapter 8: sample. Call u = rng.random() exactly once; the result is the first id whose cumulated
# probability exceeds u.
def sample(logits, rng):
    """(V,), numpy.random.Generator -> int. If the largest logit is NaN or infinite, an error."""
    raise NotImplementedError


# Bytes are uint8, in rows.


# Chapter 9: a bfloat16 is the upper half of a float32.
def dequantize_bf16(rows):
    """(rows, 2 n) bytes -> (rows, n) float32."""
    raise NotImplementedError


# Chapter 9: round to the nearest; if two are equally near, to the even one. A NaN stays a NaN.
def quantize_bf16(x):
    """(rows, n) float32 -> (rows, 2 n) bytes."""
    raise NotImplementedError


# Chapter 11: blocks of 34 bytes, the scale d as float16 and 32 signed bytes q. The value is d * q.
def dequantize_q8_0(rows):
    """(rows, n / 32 * 34) bytes -> (rows, n) float32."""
    raise NotImplementedError


# Chapter 11: d = max |x| / 127; q = x * (1 / d). Round halves away from zero. Where d is 0, q is 0.
def quantize_q8_0(x):
    """(rows, n) float32 -> (rows, n / 32 * 34) bytes."""
    raise NotImplementedError


# Chapter 11: blocks of 18 bytes, d and 16 bytes of two 4-bit numbers q. Weight i is the low half of byte i,
# weight i + 16 the high half. The value is d * (q - 8).
def dequantize_q4_0(rows):
    """(rows, n / 32 * 18) bytes -> (rows, n) float32."""
    raise NotImplementedError


# Chapter 11: d = x_max / -8, where |x_max| is largest; q = x * (1 / d) + 8. Round halves up; q is at most 15.
# Where d is 0, q is 8.
def quantize_q4_0(x):
    """(rows, n) float32 -> (rows, n / 32 * 18) bytes."""
    raise NotImplementedError


# dy is the gradient of the loss by y, and has the shape of y. A gradient has the shape of what it belongs to.


# Chapter 15: nll = lse - logit of the target, lse = log sum_j exp(logit_j). It must also work where a logit
# is 1e4. A target that is no column of the logits is an error.
def cross_entropy(logits, targets):
    """(N, V), (N,) whole numbers -> nll (N,), lse (N,)."""
    raise NotImplementedError


# Chapter 15: dlogits = (softmax - onehot) * dnll, with softmax = exp(logits - lse).
def cross_entropy_backward(dnll, logits, targets, lse):
    """(N,), (N, V), (N,), (N,) -> (N, V)."""
    raise NotImplementedError


# Chapter 15: the log-probability of each target, 0 where the mask is 0. There the target may be any number.
# Compute output(rows of h) for at most `chunk` rows that count at a time.
def log_probs(h, output, targets, mask, chunk=256):
    """(..., D), a function (n, D) -> (n, V), (...), (...) -> (...)."""
    raise NotImplementedError


# Chapter 15: loss = sum weights * nll, over the rows of a weight that is not 0, `chunk` at a time.
# output.backward(dlogits, rows of h) gives dh of these rows, and a dict of gradients. Sum the dicts. If no
# row has a weight, take a chunk of no rows. The dh of the other rows is 0.
def head_loss(h, output, targets, weights, chunk=256):
    """(..., D), a part, (...), (...) -> loss, dh (..., D), gradients."""
    raise NotImplementedError


# Chapter 16: y = x W^T, so dx = dy W.
def linear_dx(dy, w):
    """(..., OUT), (OUT, IN) -> (..., IN)."""
    raise NotImplementedError


# Chapter 16: dW = dy^T x, summed over all rows.
def linear_dw(dy, x):
    """(..., OUT), (..., IN) -> (OUT, IN)."""
    raise NotImplementedError


# Chapter 16: add each row of dx to the row of its token. A token may occur twice.
def embedding_backward(dx, tokens, vocab_size):
    """(B, T, D), (B, T) whole numbers -> (V, D)."""
    raise NotImplementedError


# Chapter 16: dx = r (g - xh mean(g xh)) and dweight = sum dy xh, with r = 1 / sqrt(mean(x^2) + eps), xh = x r
# and g = dy weight.
def rms_norm_backward(dy, x, weight, eps):
    """(..., D), (..., D), (D,) -> dx (..., D), dweight (D,)."""
    raise NotImplementedError


# Chapter 16: turn each pair back, by the conjugate of its complex number.
def apply_rotary_emb_backward(dy, freqs_cis):
    """(B, T, H, Dh), complex (T, Dh / 2) or (B, T, Dh / 2) -> (B, T, H, Dh)."""
    raise NotImplementedError


# Chapter 16: s = gate sig up with sig = 1 / (1 + exp(-gate)): dgate = ds up sig (1 + gate (1 - sig)), and
# dup = ds gate sig. A warning of NumPy counts as a failure.
def swiglu_backward(ds, gate, up):
    """(...), (...), (...) -> dgate (...), dup (...)."""
    raise NotImplementedError


# Chapter 17: attention within documents. Token t sees the positions first[t]..t of its row. lse is the log of
# the sum of the exponentials of its scores. A number of heads that is no multiple of K is an error.
def attention_saving(q, k, v, first):
    """(B, T, H, Dh), (B, T, K, Dh), (B, T, K, Dh), (B, T) -> out (B, T, H, Dh), lse (B, H, T)."""
    raise NotImplementedError


# Chapter 17: p = exp(scores - lse); dv = p^T dout; dp = dout v^T; ds = p (dp - sum(dout out)) / sqrt(Dh);
# dq = ds k; dk = ds^T q. dk and dv are summed over the query heads that share a key head.
def attention_backward(dout, q, k, v, out, lse, first):
    """The shapes of attention_saving -> dq, dk, dv, in the shapes of q, k, v."""
    raise NotImplementedError


# Chapter 17: through a block from its last line to its first. `saved` has x, q, k, v, out, lse, h, gate, up:
# block_forward in backward.py shows where each comes from. A part of the block, such as block.attention.wq,
# has backward(dy, x) -> dx, {"weight": dw}. block.attention.attention.backward is attention_backward.
def block_backward(block, dy, saved, freqs_cis, first):
    """(B, T, D) -> dx (B, T, D), {"attention.wq.weight": (H Dh, D), ...}."""
    raise NotImplementedError


# Chapter 18: m = beta1 m + (1 - beta1) g; v = beta2 v + (1 - beta2) g^2; and p loses lr weight_decay p and
# lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps). h has beta1, beta2 and eps; t counts from 1.
# Change p, m and v in place, and return nothing.
def adamw(p, g, m, v, t, lr, weight_decay, h):
    """Four arrays of one shape, a whole number, two numbers, the hyperparameters."""
    raise NotImplementedError


# Chapter 19: y = base(x) + scale B A x. base.backward(dy, x) gives dx of the base, and an empty dict. Take
# nothing else of the base. functions.linear_dx and functions.linear_dw are those of chapter 16, or use yours.
class TrainedLoRA:
    """A frozen part and its adapter, A (r, IN) and B (OUT, r)."""

    def __init__(self, base, lora_a, lora_b, scale, functions):
        raise NotImplementedError

    def __call__(self, x):
        """(..., IN) -> (..., OUT)."""
        raise NotImplementedError

    def backward(self, dy, x):
        """(..., OUT), (..., IN) -> dx (..., IN), {"lora_a": (r, IN), "lora_b": (OUT, r)}."""
        raise NotImplementedError


# Chapter 20: u = beta (gained[:, 0] - gained[:, 1]) for chosen and rejected. The loss is -log sigmoid(u). The
# weights are beta sigmoid(-u) for the chosen answer, and minus that for the rejected one. It must also work
# where u is 1e4. A warning of NumPy counts as a failure.
def dpo(gained, beta):
    """(pairs, 2) -> losses (pairs,), weights (pairs, 2)."""
    raise NotImplementedError


# Chapter 21: 0 .. n in one part for each rank, in proportion to its share. A part ends at a multiple of
# `unit`, or at n. Such a part is a slice(start, stop), and it may be empty.
def cut(n, shares, unit=1):
    """A whole number, N numbers above 0, a whole number -> N slices."""
    raise NotImplementedError


# Chapter 21: the query heads and the key heads of each rank, at least one of both. n_heads is a multiple of
# n_kv_heads, and query head h reads key head h // n_rep. A rank has no key head that it does not read. Up to
# n_kv_heads ranks cut the key heads. With more ranks, neighbours have the same key head and share its query
# heads; the number of ranks is at most n_heads. The query heads of a rank must share its key heads alike.
def cut_heads(n_heads, n_kv_heads, shares):
    """Two whole numbers, N numbers above 0 -> N slices of query heads, N slices of key heads."""
    raise NotImplementedError


# Chapter 21: y = x W^T, cut by rows. For each slice of `cuts`, call linear(x, w) with that rank's rows of
# w. Put the results side by side.
def linear_by_rows(x, w, cuts, linear):
    """(..., IN), (OUT, IN), slices of OUT, a function -> (..., OUT)."""
    raise NotImplementedError


# Chapter 21: the same, cut by columns. Call linear with that rank's columns of x and w. Add the results in
# the order of the ranks.
def linear_by_columns(x, w, cuts, linear):
    """(..., IN), (OUT, IN), slices of IN, a function -> (..., OUT)."""
    raise NotImplementedError


# Chapter 22: of all beams with one more id, the k highest scores[b] + log_p[b, id]. Highest first; of equal
# ones the lowest beam, then the lowest id.
def best_continuations(scores, log_p, k):
    """(B,), (B, V), k -> list of (beam, id, score)."""
    raise NotImplementedError


# Chapter 22: at most k ids that followed the last three ids at their newest earlier place. Without such a
# place look for the last two. Without that, the draft is empty.
def lookup(ids, k):
    """list of ids, k -> list of ids."""
    raise NotImplementedError


# Chapter 23: the sum of log softmax(logits_i)[id_i], and whether each id is the likeliest of its row. It must
# also work where a logit is 10000.
def log_likelihood(logits, ids):
    """(n, V), n ids -> (float, bool)."""
    raise NotImplementedError
