"""The gradients of LLaMA: each function of functional.py backwards, attention, the loss, and the block.

The fifth file, read after config.py, functional.py, cache.py and model.py, which do not import it. dy is the
gradient of the loss by y, and has the shape of y. From it `f_backward` computes those of the arguments of f.
A function computes in the dtype of its arguments, and writes into none of them.

Documents lie one behind the other in a row of tokens, without padding. `first` (B, T) has the position where
the document of each token begins. Token t sees the positions first[t]..t, and RoPE turns it by t - first[t].
learner.py makes a model of these functions.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from . import functional as F
from .config import Array
from .errors import MismatchError, ParameterError

Gradients = dict[str, Array]

QUERIES = 64  # rows of attention's scores in memory at a time, for all heads
CHUNK = 256  # rows of logits in memory at a time


# --- the operations ---------------------------------------------------------------------------------------


def linear_dx(dy: Array, w: Array) -> Array:
    """y = x W^T: dx = dy W. (..., OUT), (OUT, IN) -> (..., IN)."""
    return dy @ w


def linear_dw(dy: Array, x: Array) -> Array:
    """y = x W^T: dW = dy^T x, summed over all rows. (..., OUT), (..., IN) -> (OUT, IN)."""
    return dy.reshape(-1, dy.shape[-1]).T @ x.reshape(-1, x.shape[-1])


def embedding_backward(dx: Array, tokens: Array, vocab_size: int) -> Array:
    """x = weight[tokens]: each row of the table sums the dx of its tokens. (B, T, D), (B, T) -> (V, D)."""
    dweight = np.zeros((vocab_size, dx.shape[-1]), dx.dtype)
    np.add.at(dweight, tokens, dx)
    return dweight


def rms_norm_backward(dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
    """y = xh weight, xh = x r, r = 1 / sqrt(mean(x^2) + eps): dx = r (g - xh mean(g xh)), g = dy weight.

    dweight = sum dy xh over all rows. (..., D), (..., D), (D,) -> (..., D), (D,).
    """
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    xh, g = x * r, dy * weight
    dx = r * (g - xh * np.mean(g * xh, axis=-1, keepdims=True))
    return dx, (dy * xh).reshape(-1, x.shape[-1]).sum(axis=0)


def apply_rotary_emb_backward(dy: Array, freqs_cis: Array) -> Array:
    """The transpose of a turn is the turn back: dx = dy conj(freqs_cis). Shapes as in the forward pass."""
    return F.apply_rotary_emb(dy, freqs_cis.conj())


def swiglu_backward(ds: Array, gate: Array, up: Array) -> tuple[Array, Array]:
    """s = gate sig up, sig = sigmoid(gate): dgate = ds up sig (1 + gate (1 - sig)), dup = ds silu(gate)."""
    with np.errstate(over="ignore"):  # as in silu: far below zero exp(-gate) is inf, and sig 0
        sig = 1 / (1 + np.exp(-gate))
    return ds * up * sig * (1 + gate * (1 - sig)), ds * F.silu(gate)


# --- attention: the weights are never stored, backward computes them again --------------------------------


def log_sum_exp(x: Array) -> Array:
    """log sum_j exp(x_j) over the last axis, shifted by the maximum. softmax(x) = exp(x - log_sum_exp(x))."""
    highest = x.max(axis=-1, keepdims=True)
    return (highest + np.log(np.exp(x - highest).sum(axis=-1, keepdims=True)))[..., 0]


def tiles(first: Array) -> Iterator[tuple[slice, slice, slice]]:
    """(row, queries, keys): at most QUERIES queries of one document, and all positions that they see.

    The queries are the last of these positions, as functional.py wants them. No other score is computed.
    """
    for b, row in enumerate(first):
        for begin, end in pairwise([*np.unique(row).tolist(), len(row)]):
            for t in range(begin, end, QUERIES):
                stop = min(t + QUERIES, end)
                yield slice(b, b + 1), slice(t, stop), slice(begin, stop)


def attention_saving(q: Array, k: Array, v: Array, first: Array) -> tuple[Array, Array]:
    """Attention within documents, and lse, the log of the sum in each softmax: all that backward needs.

    q (B, T, H, Dh); k, v (B, T, K, Dh); first (B, T) -> out (B, T, H, Dh), lse (B, H, T).
    """
    B, T, H, Dh = q.shape
    if k.shape[:2] != (B, T) or k.shape[3:] != (Dh,) or v.shape != k.shape or H % k.shape[2]:
        raise MismatchError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
    out, lse = np.empty_like(q), np.empty((B, H, T), q.dtype)
    for b, queries, keys in tiles(first):
        scores = F.attention_scores(q[b, queries], k[b, keys])  # (1, H, queries, keys)
        lse[b, :, queries] = log_sum_exp(scores)
        out[b, queries] = F.weighted_values(np.exp(scores - lse[b, :, queries, None]), v[b, keys])
    return out, lse


def attention_backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, first: Array
) -> tuple[Array, Array, Array]:
    """out = p v, p = softmax(s), s = q k^T / sqrt(Dh). FlashAttention-2 (Dao 2023, section 3.1.2).

    p = exp(s - lse); dv = p^T dout; dp = dout v^T; ds = p (dp - sum(p dp)), where sum(p dp) = dout . out;
    dq = ds k / sqrt(Dh); dk = ds^T q / sqrt(Dh). -> dq, dk, dv in the shapes of q, k, v.
    """
    dq, dk, dv = (np.zeros(x.shape, x.dtype) for x in (q, k, v))
    H, K, Dh = q.shape[2], *k.shape[2:]
    delta = (dout * out).sum(axis=-1).swapaxes(1, 2)  # (B, H, T)
    for b, queries, keys in tiles(first):
        p = np.exp(F.attention_scores(q[b, queries], k[b, keys]) - lse[b, :, queries, None])
        dp = dout[b, queries].swapaxes(1, 2) @ F.repeat_kv(v[b, keys], H // K).transpose(0, 2, 3, 1)
        ds = p * (dp - delta[b, :, queries, None]) / math.sqrt(Dh)  # (1, H, queries, keys)
        dq[b, queries] = F.weighted_values(ds, k[b, keys])
        dk[b, keys] += weighted_queries(ds, q[b, queries], K)
        dv[b, keys] += weighted_queries(p, dout[b, queries], K)
    return dq, dk, dv


def weighted_queries(weights: Array, x: Array, K: int) -> Array:
    """The transpose of weighted_values: each key sums over the queries, and over the heads that share it.

    (B, H, T, S), (B, T, H, Dh) -> (B, S, K, Dh).
    """
    y = weights.swapaxes(2, 3) @ x.swapaxes(1, 2)  # (B, H, S, Dh)
    B, H, S, Dh = y.shape
    return y.reshape(B, K, H // K, S, Dh).sum(axis=2).swapaxes(1, 2)


# --- the loss: one weight for each target -----------------------------------------------------------------


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    """nll = -log softmax(logits)[target] = lse - logits[target]: (N, V), (N,) -> nll (N,), lse (N,)."""
    if targets.size and not (targets.min() >= 0 and targets.max() < logits.shape[-1]):
        raise ParameterError(
            f"targets from {targets.min()} to {targets.max()}, they must lie in 0..{logits.shape[-1] - 1}; "
            "a target that is not trained has the weight 0"
        )
    lse = log_sum_exp(logits)
    return lse - logits[np.arange(len(targets)), targets], lse


def cross_entropy_backward(dnll: Array, logits: Array, targets: Array, lse: Array) -> Array:
    """dlogits = (softmax(logits) - onehot(target)) dnll: (N,), (N, V), (N,), (N,) -> (N, V)."""
    dlogits = np.exp(logits - lse[:, None])
    dlogits[np.arange(len(targets)), targets] -= 1
    return dlogits * dnll[:, None]


def head_loss(
    h: Array, output: Any, targets: Array, weights: Array, chunk: int = CHUNK
) -> tuple[float, Array, Gradients]:
    """loss = sum weights nll, nll = cross_entropy(output(h), targets) -> loss, dh, gradients of `output`.

    h (..., D); targets, weights (...). The logits of `chunk` rows are in memory at a time. A row of weight 0
    is not computed, and its target may be any number. Usual weights are 1 / n for the n targets that are
    trained in the whole optimizer step. DPO, REINFORCE and PPO are other weights of the same loss.
    """
    x, y, w = h.reshape(-1, h.shape[-1]), targets.reshape(-1), weights.reshape(-1).astype(h.dtype)
    loss, dx, gradients = 0.0, np.zeros_like(x), Gradients()
    for rows in chunks(w, chunk):
        logits = output(x[rows])  # (chunk, V)
        nll, lse = cross_entropy(logits, y[rows])
        loss += float(w[rows] @ nll)
        dlogits = cross_entropy_backward(w[rows], logits, y[rows], lse)
        dx[rows], own = output.backward(dlogits, x[rows])
        add(gradients, own)
    return loss, dx.reshape(h.shape), gradients


def log_probs(h: Array, output: Any, targets: Array, mask: Array, chunk: int = CHUNK) -> Array:
    """log softmax(output(h))[target] where the mask is not 0, else 0: (..., D), (...), (...) -> (...)."""
    x, y, found = h.reshape(-1, h.shape[-1]), targets.reshape(-1), np.zeros(targets.size, h.dtype)
    for rows in chunks(mask.reshape(-1), chunk):
        found[rows] = -cross_entropy(output(x[rows]), y[rows])[0]
    return found.reshape(targets.shape)


def chunks(weights: Array, chunk: int) -> Iterator[Array]:
    """The rows whose weight is not 0, `chunk` at a time. If there is none, one empty chunk of gradient 0."""
    rows = np.flatnonzero(weights)
    for start in range(0, max(len(rows), 1), chunk):
        yield rows[start : start + chunk]


def add(gradients: Gradients, more: Mapping[str, Array], path: str = "") -> None:
    """gradients[path + name] += more[name]: a weight that is used twice has the sum of both gradients."""
    for name, gradient in more.items():
        if path + name in gradients:
            gradients[path + name] += gradient
        else:
            gradients[path + name] = gradient


# --- the block --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Saved:
    """What LLaMA keeps of a block (Touvron et al. 2023, section 2.4): the rest is cheap to compute again."""

    x: Array  # (B, T, D)
    q: Array  # (B, T, H, Dh), after RoPE
    k: Array  # (B, T, K, Dh), after RoPE
    v: Array  # (B, T, K, Dh)
    out: Array  # (B, T, H, Dh), of attention
    lse: Array  # (B, H, T)
    h: Array  # (B, T, D)
    gate: Array  # (B, T, F)
    up: Array  # (B, T, F)


def block_forward(block: Any, x: Array, freqs_cis: Array, first: Array) -> tuple[Array, Saved]:
    """TransformerBlock on whole documents, without a cache. -> y and what `block_backward` needs."""
    a, ffn, (B, T, _) = block.attention, block.feed_forward, x.shape
    xn = block.attention_norm(x)
    q = F.apply_rotary_emb(a.wq(xn).reshape(B, T, a.n_heads, a.head_dim), freqs_cis)
    k = F.apply_rotary_emb(a.wk(xn).reshape(B, T, a.n_kv_heads, a.head_dim), freqs_cis)
    v = a.wv(xn).reshape(B, T, a.n_kv_heads, a.head_dim)
    out, lse = a.attention.saving(q, k, v, first)
    h = x + a.wo(out.reshape(B, T, -1))

    hn = block.ffn_norm(h)
    gate, up = ffn.w_gate(hn), ffn.w_up(hn)
    y = h + ffn.w_down(F.swiglu(gate, up))
    return y, Saved(x, q, k, v, out, lse, h, gate, up)


def block_backward(
    block: Any, dy: Array, saved: Saved, freqs_cis: Array, first: Array
) -> tuple[Array, Gradients]:
    """`block_forward` from its last line to its first. A sum passes its gradient on to both of its terms.

    -> dx, and the gradients of the parts that learn: {"attention.wq.weight": (H Dh, D), ...}.
    """
    s, gradients, (B, T, _) = saved, Gradients(), dy.shape

    def back(name: str, dy: Array, x: Array) -> Array:
        """From dy of the part y = part(x) to its dx. The gradients of its weights are kept."""
        dx, own = attrgetter(name)(block).backward(dy, x)
        add(gradients, own, f"{name}.")
        return dx

    ds = back("feed_forward.w_down", dy, F.swiglu(s.gate, s.up))
    dgate, dup = swiglu_backward(ds, s.gate, s.up)
    hn = block.ffn_norm(s.h)
    dhn = back("feed_forward.w_gate", dgate, hn) + back("feed_forward.w_up", dup, hn)
    dh = dy + back("ffn_norm", dhn, s.h)

    dout = back("attention.wo", dh, s.out.reshape(B, T, -1)).reshape(s.out.shape)
    dq, dk, dv = block.attention.attention.backward(dout, s.q, s.k, s.v, s.out, s.lse, first)
    dq, dk = apply_rotary_emb_backward(dq, freqs_cis), apply_rotary_emb_backward(dk, freqs_cis)
    dq, dk, dv = (d.reshape(B, T, -1) for d in (dq, dk, dv))
    xn = block.attention_norm(s.x)
    dxn = back("attention.wq", dq, xn) + back("attention.wk", dk, xn) + back("attention.wv", dv, xn)
    return dh + back("attention_norm", dxn, s.x), gradients
