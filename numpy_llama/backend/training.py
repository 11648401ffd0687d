"""The C twins of the gradients in backward.py, in float32: same names, same signatures, same meaning.

    kernels = TrainingKernels(threads=2)
    learner = Learner(model, kernels.functions())

`block_forward`, `block_backward` and `head_loss` read line by line like those of backward.py.
"""

import math
from collections.abc import Iterator
from itertools import pairwise
from operator import attrgetter
from typing import Any

import numpy as np

from .. import backward as B
from .. import functional as F
from ..backward import Gradients, Saved, add, chunks
from ..config import Array
from ..errors import MismatchError, ParameterError, UnsupportedError
from ..learner import FrozenLinear, FrozenRMSNorm, Functions, TrainedLinear, TrainedRMSNorm
from . import kernels as K
from ._kernels import ffi, lib
from .formats import QK, StoredTensor
from .kernels import Kernels, KernelWeight

# Vector code computes this many times WORK_PER_CALL multiply-adds a thread in less than 100 ms.
VECTOR_WORK = 16
# Numbers that one call of a function without products takes: below 100 ms, in scalar code with exp too.
PIECE = 1 << 22
CHUNK = 512  # rows of logits in memory at a time
NORMS = (FrozenRMSNorm, TrainedRMSNorm)
ROWS = lib.NL_GRADIENT_ROWS
KEYS = lib.NL_KEYS


class TrainingKernels(Kernels):
    """Kernels that multiply in float32, and their gradients. A weight is an array, or a KernelWeight."""

    def __init__(self, threads: int | None = None):
        super().__init__(threads, exact=True)

    def linear(self, x: Array, w: KernelWeight | StoredTensor | Array) -> Array:
        """y = x W^T: (..., IN), (OUT, IN) -> (..., OUT). An array is used in place if it can be."""
        (OUT, IN), T = w.shape, _tokens(x, w.shape[1])
        if T <= lib.NL_GEMV_TOKENS or not OUT or not IN or isinstance(w, StoredTensor):
            return super().linear(x, w)
        _kept, matrix = _matrix(w, QK)
        x = x if (columns := _columns(w)) is None else x.take(columns, axis=-1)
        x = _floats(x if matrix.IN == IN else np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, matrix.IN - IN)]))
        y = np.empty((*x.shape[:-1], OUT), np.float32)
        threads, limit = self._limit(T * OUT * IN)
        rows = max(limit // (T * IN * K.PANEL_ROWS), 1) * K.PANEL_ROWS
        for begin in range(0, OUT, rows):
            end = min(begin + rows, OUT)
            _check(lib.nl_linear_y(_writable(y), _pointer(x), T, matrix, begin, end, threads))
        return y if (order := _row_order(w)) is None else y.take(order, axis=-1)

    def linear_dx(self, dy: Array, w: KernelWeight | Array) -> Array:
        """backward.linear_dx: dx = dy W. (..., OUT), (OUT, IN) -> (..., IN)."""
        OUT, IN = w.shape
        T = _tokens(dy, OUT)
        if (order := _row_order(w)) is not None:
            stored_order = np.empty_like(dy)
            stored_order[..., order] = dy
            dy = stored_order
        dy, dx = _floats(dy), np.empty((*dy.shape[:-1], IN), np.float32)
        if not OUT:
            dx[...] = 0
        if not dx.size or not OUT:
            return dx
        _kept, matrix = _matrix(w, 1)
        threads, limit = self._limit(T * OUT * IN)
        rows, tokens = max(limit // (T * IN * ROWS), 1) * ROWS, max(limit // (IN * ROWS), 1)
        for t in range(0, T, tokens):
            some, to = dy.reshape(T, OUT)[t : t + tokens], dx.reshape(T, IN)[t : t + tokens]
            for begin in range(0, OUT, rows):
                end = min(begin + rows, OUT)
                arguments = _writable(to), _pointer(some), len(some), matrix, IN, begin, end, threads
                _check(lib.nl_linear_dx(*arguments))
        return dx if (columns := _columns(w)) is None else dx.take(np.argsort(columns), axis=-1)

    def linear_dw(self, dy: Array, x: Array, dw: Array | None = None) -> Array:
        """backward.linear_dw: dW = dy^T x, summed over all rows. It is added to `dw`, if given."""
        OUT, IN = dy.shape[-1], x.shape[-1]
        if dy.shape[:-1] != x.shape[:-1]:
            raise MismatchError(f"dy {dy.shape} and x {x.shape} do not fit each other")
        T, add = dy.size // max(OUT, 1), dw is not None
        dw = np.empty((OUT, IN), np.float32) if dw is None else dw
        if dw.shape != (OUT, IN) or dw.dtype != np.float32 or not dw.flags.c_contiguous:
            raise MismatchError(
                f"dw is {dw.dtype} of shape {dw.shape}, wanted dense float32 of shape {(OUT, IN)}"
            )
        if not T and not add:
            dw[...] = 0
        if not dw.size or not T:
            return dw
        dy, x = _floats(dy), _floats(x)
        threads, limit = self._limit(T * OUT * IN)
        rows = max(limit // (T * IN), 1)
        for begin in range(0, OUT, rows):
            end = min(begin + rows, OUT)
            _check(
                lib.nl_linear_dw(
                    _writable(dw), _pointer(dy), _pointer(x), T, OUT, IN, begin, end, add, threads
                )
            )
        return dw

    def add_lora(self, y: Array, x: Array, a: Array, b: Array, scale: float) -> Array:
        """lora.add_lora: y += scale (x A^T) B^T, in the memory of y if it is dense float32."""
        part, _kept = _lora_part(y, x, a, b, scale)
        y = _floats(y)
        for (y_, x_), T, threads in self._lora_calls(part, y, _floats(x)):
            _check(lib.nl_add_lora(_writable(y_), _pointer(x_), part, T, threads))
        return y

    def lora_backward(
        self, dx: Array, dy: Array, x: Array, a: Array, b: Array, scale: float
    ) -> tuple[Array, Array, Array]:
        """lora.lora_backward -> dx + dz A, in the memory of dx if it is dense float32; dA, dB."""
        part, _kept = _lora_part(dy, x, a, b, scale)
        if dx.shape != x.shape:
            raise MismatchError(f"dx {dx.shape} and x {x.shape} do not fit each other")
        dx, da, db = _floats(dx), np.zeros(a.shape, np.float32), np.zeros(b.shape, np.float32)
        for (dx_, dy_, x_), T, threads in self._lora_calls(part, dx, _floats(dy), _floats(x)):
            arrays = *map(_writable, (dx_, da, db)), *map(_pointer, (dy_, x_))
            _check(lib.nl_lora_backward(ffi.new("nl_lora_gradients *", arrays), part, T, threads))
        return dx, da, db

    def attention_saving(self, q: Array, k: Array, v: Array, first: Array) -> tuple[Array, Array]:
        """backward.attention_saving: attention within documents -> out as q, lse (B, H, T)."""
        B, T, H, _ = q.shape
        if k.shape != v.shape or k.shape[:2] != (B, T) or first.shape != (B, T):
            raise MismatchError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
        out, lse = np.empty(q.shape, np.float32), np.empty((B, H, T), np.float32)
        for rows, here in documents(first):
            out[rows, here], lse[rows, :, here] = self._attend(q[rows, here], k[rows, here], v[rows, here])
        return out, lse

    def attention_backward(
        self, dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, first: Array
    ) -> tuple[Array, Array, Array]:
        """backward.attention_backward -> dq, dk, dv in the shapes of q, k, v."""
        (B, T, H, Dh), heads = q.shape, k.shape[2]
        fits = k.shape == v.shape == (B, T, heads, Dh) and dout.shape == out.shape == q.shape
        if not fits or lse.shape != (B, H, T) or first.shape != (B, T) or not heads or H % heads:
            raise MismatchError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
        _check_head_dim(Dh)
        gradients = tuple(np.zeros(x.shape, np.float32) for x in (q, k, v))
        for rows, here in documents(first) if q.size else ():
            parts = [_floats(x[rows, here]) for x in (dout, q, k, v, out)]
            new = self._attention_backward(*parts, _floats(lse[rows, :, here]))
            for gradient, part in zip(gradients, new, strict=True):
                gradient[rows, here] = part
        return gradients  # type: ignore[return-value]

    def _attention_backward(self, *arrays: Array) -> list[Array]:
        """One document a row: dout, q, k, v, out, lse -> dq, dk, dv."""
        (B, T, H, Dh), heads = arrays[1].shape, arrays[2].shape[2]
        new = [np.empty(x.shape, np.float32) for x in arrays[1:4]]
        threads, limit = self._limit(5 * B * T * T * H * Dh // 2)
        pointers = [*map(_writable, new), *map(_pointer, arrays)]
        arguments = ffi.new("nl_attention_backward_args *", [*pointers, B, T, H, heads, Dh, 0, 0])
        keys = max(limit // (5 * B * T * H * Dh * KEYS), 1) * KEYS
        for begin in range(0, T, keys):
            arguments.begin, arguments.end = begin, min(begin + keys, T)
            _check(lib.nl_attention_backward(arguments, threads))
        return new

    def rms_norm(self, x: Array, weight: Array, eps: float) -> Array:
        """functional.rms_norm, for rows of a multiple of 32 numbers."""
        if x.shape[-1] % QK or not x.size:
            return F.rms_norm(x, weight, eps)
        x, weight, y = _floats(x), _floats(weight), np.empty(x.shape, np.float32)
        rows, threads = x.size // x.shape[-1], self._share(x.size)
        lib.nl_rms_norm(_writable(y), _pointer(x), _pointer(weight), eps, rows, x.shape[-1], threads)
        return y

    def rms_norm_backward(self, dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, Array]:
        """backward.rms_norm_backward, for rows of a multiple of 32 numbers."""
        D = x.shape[-1]
        if D % QK or not x.size:
            return B.rms_norm_backward(dy, x, weight, eps)
        dy, x, weight = map(_floats, (dy, x, weight))
        dx, dweight, threads = np.empty_like(x), np.empty(D, np.float32), self._share(x.size)
        to, of = map(_writable, (dx, dweight)), map(_pointer, (dy, x, weight))
        _check(lib.nl_rms_norm_backward(*to, *of, eps, x.size // D, D, threads))
        return dx, dweight

    def apply_rotary_emb(self, x: Array, freqs_cis: Array) -> Array:
        """functional.apply_rotary_emb: x (B, T, H, Dh); freqs_cis (T, Dh / 2) or (B, T, Dh / 2)."""
        B, T, H, Dh = x.shape
        _check_head_dim(Dh)
        x, y = _floats(x), np.empty(x.shape, np.float32)
        turns = np.ascontiguousarray(np.broadcast_to(freqs_cis, (B, T, Dh // 2)), np.complex64)
        lib.nl_rotate(_writable(y), _pointer(x), _pointer(turns), B * T, H, Dh, self._share(x.size))
        return y

    def swiglu(self, gate: Array, up: Array) -> Array:
        """functional.swiglu."""
        gate, up = _floats(gate), _floats(up)
        s, threads = np.empty_like(gate), self._share(gate.size)
        for here in _pieces(gate.size):
            to, of = _writable(s.reshape(-1)[here]), (_pointer(x.reshape(-1)[here]) for x in (gate, up))
            lib.nl_swiglu(to, *of, here.stop - here.start, threads)
        return s

    def swiglu_backward(self, ds: Array, gate: Array, up: Array) -> tuple[Array, Array]:
        """backward.swiglu_backward -> dgate, dup."""
        arrays = [*map(_floats, (ds, gate, up))]
        dgate, dup = np.empty_like(arrays[1]), np.empty_like(arrays[2])
        threads = self._share(dgate.size)
        for here in _pieces(dgate.size):
            to = (_writable(x.reshape(-1)[here]) for x in (dgate, dup))
            of = (_pointer(x.reshape(-1)[here]) for x in arrays)
            lib.nl_swiglu_backward(*to, *of, here.stop - here.start, threads)
        return dgate, dup

    def cross_entropy(self, logits: Array, targets: Array, weights: Array) -> Array:
        """backward.cross_entropy -> nll (N,), and its gradient: the logits (N, V) become dlogits."""
        (N, V), targets = logits.shape, np.ascontiguousarray(targets, np.int64)
        if N and not (targets.min() >= 0 and targets.max() < V):
            raise ParameterError(
                f"targets from {targets.min()} to {targets.max()}, they must lie in 0..{V - 1}; "
                "a target that is not trained has the weight 0"
            )
        nll, weights = np.empty(N, np.float32), _floats(weights)
        rows, threads = max(PIECE // max(V, 1), 1), self._share(logits.size)
        for begin in range(0, N, rows):
            some = slice(begin, min(begin + rows, N))
            arrays = (
                _writable(logits[some]),
                _writable(nll[some]),
                ffi.from_buffer("int64_t[]", targets[some]),
            )
            lib.nl_cross_entropy(*arrays, _pointer(weights[some]), some.stop - begin, V, threads)
        return nll

    def head_loss(
        self, h: Array, output: Any, targets: Array, weights: Array, chunk: int = CHUNK
    ) -> tuple[float, Array, Gradients]:
        """backward.head_loss. The gradient of a weight is summed in place."""
        x, y, w = _floats(h).reshape(-1, h.shape[-1]), targets.reshape(-1), _floats(weights).reshape(-1)
        loss, dx, gradients = 0.0, np.zeros_like(x), Gradients()
        for rows in chunks(w, chunk):
            logits = output(x[rows])  # (chunk, V)
            dlogits = logits if type(output) in (FrozenLinear, TrainedLinear) else logits.copy()
            loss += float(w[rows] @ self.cross_entropy(dlogits, y[rows], w[rows]))
            if type(output) is TrainedLinear and output.linear_dw == self.linear_dw:
                dx[rows] = output.linear_dx(dlogits, output.weight)
                gradients["weight"] = self.linear_dw(dlogits, x[rows], gradients.get("weight"))
            else:
                dx[rows], own = output.backward(dlogits, x[rows])
                add(gradients, own)
        return loss, dx.reshape(h.shape), gradients

    def block_forward(self, block: Any, x: Array, freqs_cis: Array, first: Array) -> tuple[Array, Saved]:
        """backward.block_forward."""
        a, ffn, (B, T, _) = block.attention, block.feed_forward, x.shape
        xn = self._norm(block.attention_norm, x)
        q = self.apply_rotary_emb(a.wq(xn).reshape(B, T, a.n_heads, a.head_dim), freqs_cis)
        k = self.apply_rotary_emb(a.wk(xn).reshape(B, T, a.n_kv_heads, a.head_dim), freqs_cis)
        v = a.wv(xn).reshape(B, T, a.n_kv_heads, a.head_dim)
        out, lse = a.attention.saving(q, k, v, first)
        h = x + a.wo(out.reshape(B, T, -1))

        hn = self._norm(block.ffn_norm, h)
        gate, up = ffn.w_gate(hn), ffn.w_up(hn)
        y = h + ffn.w_down(self.swiglu(gate, up))
        return y, Saved(x, q, k, v, out, lse, h, gate, up)

    def block_backward(
        self, block: Any, dy: Array, saved: Saved, freqs_cis: Array, first: Array
    ) -> tuple[Array, Gradients]:
        """backward.block_backward."""
        s, gradients, (B, T, _) = saved, Gradients(), dy.shape

        def back(name: str, dy: Array, x: Array) -> Array:
            part = attrgetter(name)(block)
            dx, own = self._norm_backward(part, dy, x) if type(part) in NORMS else part.backward(dy, x)
            add(gradients, own, f"{name}.")
            return dx

        ds = back("feed_forward.w_down", dy, self.swiglu(s.gate, s.up))
        dgate, dup = self.swiglu_backward(ds, s.gate, s.up)
        hn = self._norm(block.ffn_norm, s.h)
        dhn = back("feed_forward.w_gate", dgate, hn)
        dhn += back("feed_forward.w_up", dup, hn)
        dh = dy + back("ffn_norm", dhn, s.h)

        dout = back("attention.wo", dh, s.out.reshape(B, T, -1)).reshape(s.out.shape)
        dq, dk, dv = block.attention.attention.backward(dout, s.q, s.k, s.v, s.out, s.lse, first)
        dq, dk = (self.apply_rotary_emb(d, freqs_cis.conj()) for d in (dq, dk))
        dq, dk, dv = (d.reshape(B, T, -1) for d in (dq, dk, dv))
        xn = self._norm(block.attention_norm, s.x)
        dxn = back("attention.wq", dq, xn)
        dxn += back("attention.wk", dk, xn)
        dxn += back("attention.wv", dv, xn)
        return dh + back("attention_norm", dxn, s.x), gradients

    def functions(self) -> Functions:
        """All of them, as learner.Learner wants them."""
        return Functions(
            self.linear_dx,
            self.linear_dw,
            self.attention,
            self.attention_saving,
            self.attention_backward,
            self.block_forward,
            self.block_backward,
            self.head_loss,
            add_lora=self.add_lora,
            lora_backward=self.lora_backward,
        )

    def adamw(
        self, p: Array, g: Array, m: Array, v: Array, t: int, lr: float, weight_decay: float, h: Any
    ) -> None:
        """Step t of AdamW for one parameter, in place: the bits of training.optimizer.adamw.

        h has beta1, beta2 and eps.
        """
        for x in (p, m, v):
            if x.shape != g.shape or x.dtype != np.float32 or not x.flags.c_contiguous:
                raise MismatchError(
                    f"{x.dtype} of shape {x.shape}, AdamW wants dense float32 of shape {g.shape}"
                )
        rate, scale = lr / (1 - h.beta1**t), 1 / (1 - h.beta2**t)
        numbers = h.beta1, 1 - h.beta1, h.beta2, 1 - h.beta2, 1 - lr * weight_decay, rate, scale, h.eps
        step, threads = ffi.new("nl_adamw_step *", numbers), self._share(p.size)
        flat = [x.reshape(-1) for x in (p, _floats(g), m, v)]
        for here in _pieces(p.size):
            p_, g_, m_, v_ = (_pointer(x[here]) for x in flat)
            lib.nl_adamw(p_, g_, m_, v_, step, here.stop - here.start, threads)

    def squares(self, x: Array) -> float:
        """The sum of x^2, in float64 over pieces of some thousand numbers."""
        flat, total, threads = _floats(x).reshape(-1), ffi.new("double *"), self._share(x.size)
        _check(lib.nl_squares(total, _pointer(flat), flat.size, threads))
        return float(total[0])

    def _norm(self, part: Any, x: Array) -> Array:
        return self.rms_norm(x, part.weight, part.eps) if type(part) in NORMS else part(x)

    def _norm_backward(self, part: Any, dy: Array, x: Array) -> tuple[Array, Gradients]:
        dx, dweight = self.rms_norm_backward(dy, x, part.weight, part.eps)
        return dx, {"weight": dweight} if part.learned else {}

    def _lora_calls(self, part: Any, *arrays: Array) -> Iterator[tuple[list[Array], int, int]]:
        """For each call: some tokens of these arrays, their number, and the number of threads."""
        T, work = math.prod(arrays[0].shape[:-1]), 3 * part.r * (part.IN + part.OUT)
        threads, limit = self._limit(T * work)
        tokens = max(limit // (work * lib.NL_LORA_TOKENS), 1) * lib.NL_LORA_TOKENS
        for begin in range(0, T, tokens):
            some = [x.reshape(T, -1)[begin : begin + tokens] for x in arrays]
            yield some, len(some[0]), threads

    def _limit(self, work: int) -> tuple[int, int]:
        """The number of threads for `work` multiply-adds, and how many of them a call may have."""
        threads = self._share(work)
        return threads, threads * K.WORK_PER_CALL * (1 if K.isa() == "scalar" else VECTOR_WORK)


def _pieces(n: int) -> Iterator[slice]:
    """Slices of n numbers, each for one call."""
    return (slice(begin, min(begin + PIECE, n)) for begin in range(0, n, PIECE))


def documents(first: Array) -> Iterator[tuple[slice, slice]]:
    """(rows, positions) of the documents: all rows at once, if each is one document."""
    if not first.any():
        yield slice(None), slice(None)
        return
    for b, row in enumerate(first):
        for begin, end in pairwise([*np.unique(row).tolist(), len(row)]):
            yield slice(b, b + 1), slice(begin, end)


def _tokens(x: Array, width: int) -> int:
    if x.shape[-1] != width:
        raise MismatchError(f"the rows have {x.shape[-1]} columns, the weight needs {width}")
    return x.size // max(width, 1)


def _check_head_dim(Dh: int) -> None:
    if Dh > K.MAX_HEAD_DIM:
        raise UnsupportedError(f"head_dim is {Dh}, the C kernel goes up to {K.MAX_HEAD_DIM}")


def _row_order(w: KernelWeight | Array) -> Any:
    return w.row_order if isinstance(w, KernelWeight) else None


def _columns(w: KernelWeight | Array) -> Any:
    return w.columns if isinstance(w, KernelWeight) else None


def _matrix(w: KernelWeight | Array, multiple: int) -> tuple[Any, Any]:
    """The memory of an nl_matrix, which must outlive it; that matrix. Columns are padded to `multiple`."""
    if isinstance(w, KernelWeight):
        return w, w.matrix
    w = _floats(w if w.shape[1] % multiple == 0 else np.pad(w, [(0, 0), (0, -w.shape[1] % multiple)]))
    return w, ffi.new("nl_matrix *", (_pointer(w), K.F32, *w.shape))


def _lora_part(y: Array, x: Array, a: Array, b: Array, scale: float) -> tuple[Any, Any]:
    """An nl_lora_part, and the memory of its matrices, which must outlive it."""
    (r, IN), OUT = a.shape, y.shape[-1]
    if b.shape != (OUT, r) or x.shape != (*y.shape[:-1], IN) or not r * IN * OUT:
        raise MismatchError(f"A {a.shape} and B {b.shape} do not fit x {x.shape} and y {y.shape}")
    a, b = _floats(a), _floats(b)
    return ffi.new("nl_lora_part *", (_pointer(a), _pointer(b), scale, r, IN, OUT)), (a, b)


def _floats(x: Array) -> Array:
    return np.ascontiguousarray(x, np.float32)


def _pointer(x: Array) -> Any:
    return ffi.from_buffer("float[]", x)


def _writable(x: Array) -> Any:
    return ffi.from_buffer("float[]", x, require_writable=True)


def _check(status: int) -> None:
    if status == lib.NL_NO_MEMORY:
        raise MemoryError("no memory for the scratch of the gradient kernels")
    K._check(status)
