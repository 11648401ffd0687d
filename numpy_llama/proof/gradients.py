"""For each gradient: random arguments, the function that it belongs to, and how far rounding may move it.

A bound is a sum of absolute values, because gradients cancel: where the sum is 0, its terms still round.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from .. import functional as F
from ..config import Array
from .bounds import EXP_32, U32, g, unit
from .laws import Source

Arrays = tuple[Array, ...]
TINY = 100 * float(np.finfo(np.float32).tiny)  # below it float32 loses digits


class Case(NamedTuple):
    """Arguments of an `x_backward`, the gradient by y first. f(*inputs) = y is what it belongs to."""

    arguments: tuple[Any, ...]
    f: Callable[..., Array]
    inputs: Arrays


def widened(x: Any) -> Any:
    """A float array in float64."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc":
        return x
    return x.astype(np.complex128 if x.dtype.kind == "c" else np.float64)


def narrowed(x: Any) -> Any:
    """A float array in float32."""
    if not isinstance(x, np.ndarray) or x.dtype.kind not in "fc":
        return x
    return x.astype(np.complex64 if x.dtype.kind == "c" else np.float32)


# --- the arguments, of sizes a, b, c ----------------------------------------------------------------------


def linear_dx(source: Source, a: int, b: int, c: int) -> Case:
    dy, w, x = source.array(a, c), source.array(c, b), source.array(a, b)
    return Case((dy, w), lambda x: F.linear(x, w), (x,))


def linear_dw(source: Source, a: int, b: int, c: int) -> Case:
    dy, w, x = source.array(2, a, c), source.array(c, b), source.array(2, a, b)
    return Case((dy, x), lambda w: F.linear(x, w), (w,))


def embedding_backward(source: Source, a: int, b: int, c: int) -> Case:
    tokens, weight = source.ids(c, 2, a), source.array(c, b)
    return Case((source.array(2, a, b), tokens, c), lambda weight: F.embedding(tokens, weight), (weight,))


def rms_norm_backward(source: Source, a: int, b: int, c: int) -> Case:
    x, weight, eps = source.array(2, a, b), source.positive(b), 10.0 ** (1 - c % 4)
    return Case((source.array(2, a, b), x, weight, eps), lambda x, w: F.rms_norm(x, w, eps), (x, weight))


def apply_rotary_emb_backward(source: Source, a: int, b: int, c: int) -> Case:
    shape = (2, a, 1 + c % 3, 2 * b)
    freqs_cis = (
        1.5 * F.precompute_freqs_cis(2 * b, a + c, 1e4, dtype=source.dtype.type)[c:]
    )  # a YaRN's length
    x = source.array(*shape)
    wide = widened(freqs_cis)  # differences are taken in float64
    return Case((source.array(*shape), freqs_cis), lambda x: F.apply_rotary_emb(x, wide), (x,))


def swiglu_backward(source: Source, a: int, b: int, c: int) -> Case:
    gate, up = source.array(a, b) * (10 if c % 7 == 6 else 1), source.array(a, b)
    return Case((source.array(a, b), gate, up), F.swiglu, (gate, up))


def attention_backward(source: Source, a: int, b: int, c: int) -> Case:
    q, k, v, first = attention_inputs(source, 2, a, 1 + c % 2, 1 + c % 3, b, c % 4)
    out, lse = saving(widened(q), widened(k), widened(v), first)
    dout = source.array(*q.shape)
    arguments = dout, q, k, v, out.astype(q.dtype), lse.astype(q.dtype), first
    return Case(arguments, lambda q, k, v: saving(q, k, v, first)[0], (q, k, v))


def cross_entropy_backward(source: Source, a: int, b: int, c: int) -> Case:
    logits, targets = source.array(a, b), source.ids(b, a)
    lse = np.logaddexp.reduce(logits.astype(np.float64), axis=-1).astype(logits.dtype)

    def nll(logits: Array) -> Array:
        return np.logaddexp.reduce(logits, axis=-1) - logits[np.arange(a), targets]

    return Case((source.array(a), logits, targets, lse), nll, (logits,))


def attention_inputs(
    source: Source, B: int, T: int, K: int, n_rep: int, Dh: int, cuts: int
) -> tuple[Array, Array, Array, Array]:
    """q (B, T, K n_rep, Dh), k and v (B, T, K, Dh), first (B, T): each row cut into documents at random."""
    q = source.array(B, T, K * n_rep, Dh)
    return q, source.array(B, T, K, Dh), source.array(B, T, K, Dh), documents(source, B, T, cuts)


def documents(source: Source, B: int, T: int, cuts: int) -> Array:
    """Rows of documents: the position where the document of each token begins."""
    begins = np.zeros((B, T), int)
    for row in begins:
        places = source.ids(T, cuts)
        row[places] = places
    return np.maximum.accumulate(begins, axis=1)


def saving(q: Array, k: Array, v: Array, first: Array) -> tuple[Array, Array]:
    """attention_saving by its definition: functional.py's attention of one query at a time."""
    B, T, H, _ = q.shape
    out, lse = np.empty_like(q), np.empty((B, H, T), q.dtype)
    for b, t in np.ndindex(B, T):
        one, seen = (slice(b, b + 1), slice(t, t + 1)), (slice(b, b + 1), slice(first[b, t], t + 1))
        out[one] = F.attention(q[one], k[seen], v[seen])
        lse[b, :, t] = np.logaddexp.reduce(F.attention_scores(q[one], k[seen])[0, :, 0], axis=-1)
    return out, lse


# --- the bounds: of each gradient, for arguments in float64 and the unit roundoff u -----------------------


def linear_dx_bound(u: float, dy: Array, w: Array) -> Arrays:
    return (g(len(w), u=u) * (np.abs(dy) @ np.abs(w)),)


def linear_dw_bound(u: float, dy: Array, x: Array) -> Arrays:
    dy, x = (np.abs(z).reshape(-1, z.shape[-1]) for z in (dy, x))
    return (g(len(x), u=u) * (dy.T @ x),)


def embedding_backward_bound(u: float, dx: Array, tokens: Array, vocab_size: int) -> Arrays:
    total = np.zeros((vocab_size, dx.shape[-1]))
    np.add.at(total, tokens, np.abs(dx))
    return (g(tokens.size, u=u) * total,)


def rms_norm_backward_bound(u: float, dy: Array, x: Array, weight: Array, eps: float) -> Arrays:
    """r and the mean err by (D + 8) u each, and the products by a few u."""
    D, r = len(weight), 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    xh, each = np.abs(x * r), np.abs(dy * weight)
    dx = r * (each + xh * np.mean(each * xh, axis=-1, keepdims=True))
    dweight = (np.abs(dy) * xh).reshape(-1, D).sum(axis=0)
    return 3 * (D + 8) * u * dx, (D + 8 + x.size / D) * u * dweight


def apply_rotary_emb_backward_bound(u: float, dy: Array, freqs_cis: Array) -> Arrays:
    """Two products and a sum of each pair."""
    length = np.abs(dy.view(np.complex128)) * np.abs(freqs_cis)[..., None, :]
    return (4 * u * np.repeat(length, 2, axis=-1),)


def swiglu_backward_bound(u: float, ds: Array, gate: Array, up: Array) -> Arrays:
    """exp and sig err by 8 u. 1 - sig errs by 8 u of 1, and gate multiplies it."""
    with np.errstate(over="ignore"):
        sig = 1 / (1 + np.exp(-gate))
    size = np.abs(gate)
    dgate = 16 * u * np.abs(ds * up) * sig * (1 + size) + TINY * np.abs(ds * up) * (1 + size)
    return dgate, 16 * u * np.abs(ds) * sig * size + TINY * np.abs(ds) * (1 + size)


def score_error(u: float, q: Array, k: Array) -> float:
    """How far a score may be off: the rounding of q . k / sqrt(Dh)."""
    Dh = q.shape[-1]
    return (g(Dh, u=u) + 4 * u) * longest(q) * longest(k) / math.sqrt(Dh)


def longest(x: Array) -> float:
    return float(np.linalg.norm(x, axis=-1).max(initial=0))


def attention_backward_bound(
    u: float, dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, first: Array
) -> Arrays:
    """A weight p errs by `share` of itself: twice a score's error, that of lse, and exp.

    dp and its mean are at most |dout|_1 max |v|. Each errs by the rounding of its sum, the mean by `out` too.
    """
    (B, T, H, Dh), K = q.shape, k.shape[2]
    share = 2 * score_error(u, q, k) + 2 * u * np.abs(lse).max(initial=0) + g(T, u=u) + EXP_32 / U32 * u
    at = np.arange(T)
    seen = (first[:, None, :, None] <= at) & (at <= at[:, None])  # (B, 1, T, S)
    scores = np.einsum("bthd,bshd->bhts", q, np.repeat(k, H // K, axis=2)) / math.sqrt(Dh)
    p = np.where(seen, np.exp(np.where(seen, scores, 0) - lse[..., None]), 0)  # (B, H, T, S)
    lost = TINY * seen  # in float32 the exp of much less than 0 is 0
    most = np.abs(dout).sum(axis=-1).swapaxes(1, 2) * np.abs(v).max(initial=0)  # (B, H, T)
    relative = 3 * share + 2 * g(Dh, u=u) + 2 * g(T * H // K, u=u) + 8 * u
    ds = most[..., None] * (p * relative + lost) / math.sqrt(Dh)

    def by_key(weights: Array, x: Array) -> Array:
        summed = np.einsum("bhts,bthd->bshd", weights, np.abs(x))
        return summed.reshape(B, T, K, H // K, Dh).sum(axis=3)

    dq = np.einsum("bhts,bshd->bthd", ds, np.abs(np.repeat(k, H // K, axis=2)))
    return dq, by_key(ds, q), by_key(p * (share + g(T * H // K, u=u)) + lost, dout)


def cross_entropy_backward_bound(u: float, dnll: Array, logits: Array, targets: Array, lse: Array) -> Arrays:
    """exp multiplies the rounding of logit - lse and that of lse, which is a sum of V terms."""
    V = logits.shape[-1]
    share = np.abs(logits - lse[:, None]) + np.abs(lse[:, None]) + V + 16
    p = np.exp(logits - lse[:, None]) + TINY
    return ((p * share + 4 * np.eye(V)[targets]) * u * np.abs(dnll)[:, None],)


CASES: dict[str, tuple[Callable[[Source, int, int, int], Case], Callable[..., Arrays]]] = {
    "linear_dx": (linear_dx, linear_dx_bound),
    "linear_dw": (linear_dw, linear_dw_bound),
    "embedding_backward": (embedding_backward, embedding_backward_bound),
    "rms_norm_backward": (rms_norm_backward, rms_norm_backward_bound),
    "apply_rotary_emb_backward": (apply_rotary_emb_backward, apply_rotary_emb_backward_bound),
    "swiglu_backward": (swiglu_backward, swiglu_backward_bound),
    "attention_backward": (attention_backward, attention_backward_bound),
    "cross_entropy_backward": (cross_entropy_backward, cross_entropy_backward_bound),
}


def case_of(name: str, source: Source, a: int, b: int, c: int) -> Case:
    return CASES[name][0](source, a, b, c)


def bound(name: str, arguments: tuple[Any, ...], dtype: DTypeLike) -> Arrays:
    """How far an `x_backward` in this precision may be from the truth, for each gradient."""
    return CASES[name][1](unit(dtype), *(widened(x) for x in arguments))


def central_differences(case: Case, step: float = 1e-5) -> Arrays:
    """<dy, f(x + step e_i) - f(x - step e_i)> / (2 step) for each element i of each input."""
    dy, inputs = widened(case.arguments[0]), [x.astype(np.float64) for x in case.inputs]
    gradients = []
    for x in inputs:
        gradient = np.zeros_like(x)
        for i in np.ndindex(*x.shape):
            was = x[i]
            x[i] = was + step
            above = case.f(*inputs)
            x[i] = was - step
            gradient[i] = (dy * (above - case.f(*inputs))).sum() / (2 * step)
            x[i] = was
        gradients.append(gradient)
    return tuple(gradients)
