"""Attention that keeps lse, and its gradient: C against backward.py, on every instruction set."""

import numpy as np
import pytest
from helpers.kernels import Guarded, bits, for_each, seeds
from hypothesis import example, given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama import backward as B
from numpy_llama import functional as F
from numpy_llama.backend import kernels
from numpy_llama.backend.kernels import Kernels
from numpy_llama.backend.training import TrainingKernels
from numpy_llama.errors import MismatchError, UnsupportedError
from numpy_llama.proof.bounds import U32, assert_within, g

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")

shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "T": st.one_of(st.integers(1, 20), st.sampled_from([47, 48, 49, 95, 96, 97, 145, 200])),
        "K": st.integers(1, 2),
        "n_rep": st.integers(1, 3),
        "Dh": st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 64, 80])),
    }
)


def draw(rng, B, T, K, n_rep, Dh):
    """q, k, v, dout, and `first` of some documents."""
    q, k, v, dout = (
        rng.standard_normal((B, T, heads, Dh), dtype=np.float32) for heads in (K * n_rep, K, K, K * n_rep)
    )
    begins = rng.random((B, T)) < 2 / T * rng.integers(0, 2)  # half of the time each row is one document
    return q, k, v, dout, np.maximum.accumulate(np.where(begins, np.arange(T), 0), axis=1)


def visible(first: np.ndarray) -> np.ndarray:
    """(B, 1, T, T): whether token t sees position s."""
    t = np.arange(first.shape[1])
    return ((t[None, None, :] <= t[None, :, None]) & (t[None, None, :] >= first[:, :, None]))[:, None]


def bounds(q, k, v, dout, first):
    """How far out, lse, dq, dk and dv may err.

    A score errs by delta <= (g(Dh) + 3 u) |q| . |k| / sqrt(Dh). So lse errs by delta and by the rounding of
    its sum, and a weight p by the factor of both; exp adds 4 u and |score - lse| u. dp and its mean, which is
    dout . out, are sums of Dh products. The rest are sums of products with these p and ds.
    """
    H, K, Dh, T = q.shape[2], k.shape[2], q.shape[3], q.shape[1]
    n_rep, root = H // K, np.sqrt(Dh)
    q, k, v, dout = (x.astype(np.float64) for x in (q, k, v, dout))
    kk, vv = F.repeat_kv(k, n_rep), F.repeat_kv(v, n_rep)
    seen = visible(first)

    def scores(x, y):
        return np.einsum("bthd,bshd->bhts", x, y)

    s = np.where(seen, scores(q, kk) / root, -np.inf)
    lse = B.log_sum_exp(s)[..., None]
    p, far = np.exp(s - lse), np.where(seen, np.abs(s - lse), 0)
    delta = (g(Dh) + 3 * U32) * np.where(seen, scores(np.abs(q), np.abs(kk)), 0).max(-1, keepdims=True) / root
    of_lse = 2 * delta + g(T) + (T / 64 + 8 + far.max(-1, keepdims=True)) * U32 + np.abs(lse) * U32
    of_p = 1.01 * (delta + of_lse + (8 + far) * U32)  # relative
    of_out = np.einsum("bhts,bshd->bthd", p * (of_p + g(T)), np.abs(vv))
    out = np.einsum("bhts,bshd->bthd", p, vv)
    mean = (dout * out).sum(-1).swapaxes(1, 2)[..., None]
    of_mean = (np.abs(dout) * (of_out + g(Dh) * np.abs(out))).sum(-1).swapaxes(1, 2)[..., None]
    dp = scores(dout, vv)
    ds = p * (dp - mean)
    of_ds = 1.01 * (of_p + 4 * U32) * np.abs(ds) + 1.01 * p * (
        g(Dh) * scores(np.abs(dout), np.abs(vv)) + of_mean
    )

    def over_queries(weights, x):
        y = np.einsum("bhts,bthd->bshd", weights, np.abs(x))
        return y.reshape(*y.shape[:2], K, n_rep, Dh).sum(3)

    sums = g(T * n_rep)
    dq = np.einsum("bhts,bshd->bthd", of_ds + sums * np.abs(ds), np.abs(kk)) / root
    dk = over_queries(of_ds + sums * np.abs(ds), q) / root
    dv = over_queries(p * (of_p + sums), dout)
    return of_out, of_lse[..., 0], dq, dk, dv


@for_each
@given(shape=shapes, threads=st.integers(1, 3), seed=seeds)
@example(shape={"B": 1, "T": 200, "K": 2, "n_rep": 3, "Dh": 64}, threads=2, seed=0)
@example(shape={"B": 2, "T": 97, "K": 1, "n_rep": 1, "Dh": 33}, threads=3, seed=1)
def test_gradients_are_within_the_rounding_of_their_sums(isa, shape, threads, seed):
    q, k, v, dout, first = draw(np.random.default_rng(seed), **shape)
    kernel = TrainingKernels(threads)
    out, lse = kernel.attention_saving(q, k, v, first)
    got = out, lse, *kernel.attention_backward(dout, q, k, v, out, lse, first)
    wide = [x.astype(np.float64) for x in (q, k, v)]
    expected = B.attention_saving(*wide, first)
    expected += B.attention_backward(dout.astype(np.float64), *wide, *expected, first)
    for actual, right, bound in zip(got, expected, bounds(q, k, v, dout, first), strict=True):
        assert actual.dtype == np.float32 and actual.flags.c_contiguous
        assert_within(actual, right, bound)


@for_each
@given(shape=shapes, seed=seeds)
@example(shape={"B": 1, "T": 300, "K": 1, "n_rep": 3, "Dh": 20}, seed=0)
def test_gradients_have_the_same_bits_however_they_are_split(isa, shape, seed):
    """Any number of threads; a call for each 96 keys; each sequence, and each KV head, by itself."""
    q, k, v, dout, first = draw(np.random.default_rng(seed), **shape)
    one = TrainingKernels(1)
    out, lse = one.attention_saving(q, k, v, first)
    whole = one.attention_backward(dout, q, k, v, out, lse, first)
    before = kernels.WORK_PER_CALL
    for threads, work in ((2, before), (3, 1), (1, 1)):
        kernels.WORK_PER_CALL = work
        try:
            got = TrainingKernels(threads).attention_backward(dout, q, k, v, out, lse, first)
        finally:
            kernels.WORK_PER_CALL = before
        for a, b in zip(got, whole, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
    n_rep = shape["n_rep"]
    for b in range(shape["B"]):
        for h in range(shape["K"]):
            r, q_heads, heads = slice(b, b + 1), slice(h * n_rep, (h + 1) * n_rep), slice(h, h + 1)
            some = [x[r, :, q_heads] for x in (dout, q)] + [x[r, :, heads] for x in (k, v)]
            got = one.attention_backward(*some, out[r, :, q_heads], lse[r, q_heads], first[r])
            for part, all_of, of in zip(got, whole, (q_heads, heads, heads), strict=True):
                np.testing.assert_array_equal(bits(part), bits(all_of[r, :, of]))


@given(shape=shapes, threads=st.integers(1, 3), seed=seeds)
def test_one_document_has_the_output_of_attention(isa, shape, threads, seed):
    q, k, v, _, first = draw(np.random.default_rng(seed), **shape)
    out, _ = TrainingKernels(threads).attention_saving(q, k, v, np.zeros_like(first))
    np.testing.assert_array_equal(bits(out), bits(Kernels(1).attention(q, k, v)))


def test_documents_cannot_see_each_other(isa, rng):
    """NaN in other documents changes no bit, and the bits are those of the document alone."""
    q, k, v, dout, first = draw(rng, 1, 120, 2, 2, 16)
    first[...] = np.repeat([0, 40, 100], [40, 60, 20])
    kernel, here = TrainingKernels(2), slice(40, 100)

    def all_of(q, k, v, dout, first):
        out, lse = kernel.attention_saving(q, k, v, first)
        return out, lse.swapaxes(1, 2), *kernel.attention_backward(dout, q, k, v, out, lse, first)

    whole = all_of(q, k, v, dout, first)
    alone = all_of(*(x[:, here] for x in (q, k, v, dout)), first[:, here] - 40)
    for x in (q, k, v, dout):
        x[:, :40], x[:, 100:] = np.nan, np.nan
    poisoned = all_of(q, k, v, dout, first)
    for a, b, c in zip(whole, alone, poisoned, strict=True):
        np.testing.assert_array_equal(bits(a[:, here]), bits(b))
        np.testing.assert_array_equal(bits(c[:, here]), bits(b))


def test_attention_of_nothing(isa):
    q, k, first = np.ones((0, 3, 4, 8), np.float32), np.ones((0, 3, 2, 8), np.float32), np.zeros((0, 3), int)
    out, lse = TrainingKernels(2).attention_saving(q, k, k, first)
    assert out.shape == q.shape and lse.shape == (0, 4, 3)
    dq, dk, dv = TrainingKernels(2).attention_backward(q, q, k, k, out, lse, first)
    assert dq.shape == q.shape and dk.shape == dv.shape == k.shape


def test_what_does_not_fit_is_refused(rng):
    q, k, v, dout, first = draw(rng, 2, 5, 2, 2, 8)
    kernel = TrainingKernels(1)
    out, lse = kernel.attention_saving(q, k, v, first)
    right = dout, q, k, v, out, lse, first
    for i, wrong in (
        (0, dout[:1]),
        (1, q[:, 1:]),
        (2, k[:, :, :1]),
        (3, v[..., 1:]),
        (4, out[:, :1]),
        (5, lse[:1]),
    ):
        with pytest.raises(MismatchError):
            kernel.attention_backward(*right[:i], wrong, *right[i + 1 :])
    with pytest.raises(MismatchError):
        kernel.attention_saving(q, k[:, 1:], v[:, 1:], first)
    wide = np.ones((1, 1, 1, 257), np.float32)
    with pytest.raises(UnsupportedError, match="head_dim is 257"):
        kernel.attention_backward(*[wide] * 5, np.ones((1, 1, 1), np.float32), np.zeros((1, 1), int))


@pytest.mark.parametrize("at_end", [True, False])
def test_the_kernel_touches_nothing_beside_its_arrays(isa, at_end, rng):
    for T, K, n_rep, Dh in [(1, 1, 1, 1), (7, 2, 1, 5), (97, 1, 2, 20), (49, 2, 2, 32), (110, 1, 1, 33)]:
        guarded = Guarded()
        q, k, v, dout, first = draw(rng, 1, T, K, n_rep, Dh)
        first[...] = 0
        out, lse = TrainingKernels(1).attention_saving(q, k, v, first)
        expected = TrainingKernels(1).attention_backward(dout, q, k, v, out, lse, first)
        arrays = [guarded.copy(x, at_end) for x in (dout, q, k, v, out, lse)]
        new = [guarded.copy(np.full_like(x, np.nan), at_end) for x in (q, k, v)]
        pointers = [ffi.cast("void *", x.ctypes.data) for x in (*new, *arrays)]
        arguments = ffi.new("nl_attention_backward_args *", [*pointers, 1, T, K * n_rep, K, Dh, 0, T])
        assert lib.nl_attention_backward(arguments, 2) == 0
        for a, b in zip(new, expected, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))
