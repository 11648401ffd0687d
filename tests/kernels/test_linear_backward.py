"""The three products of a linear layer that learns, y, dx and dW, on every instruction set of this machine.

Whole numbers give exact sums, so they agree bit for bit with NumPy. Real numbers agree within the rounding of
the sums. Threads and cuts change no bit.
"""

import numpy as np
import pytest
from helpers.kernels import Guarded, bits, exact_weight, for_each, real_weight, seeds, unaligned, whole_blocks
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama import backward as B
from numpy_llama.backend import kernels
from numpy_llama.backend.formats import FORMATS, QK, StoredTensor
from numpy_llama.backend.kernels import Kernels, KernelWeight
from numpy_llama.backend.training import TrainingKernels
from numpy_llama.errors import MismatchError
from numpy_llama.proof.bounds import assert_within, g

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")
sizes = st.one_of(st.integers(1, 20), st.sampled_from([31, 32, 33, 47, 48, 49, 65]))
# csrc/linear_backward.c: KC = 256 products are one sum, KS = 768 are packed at once, MC = 120 rows lie in L2.
long = st.one_of(sizes, st.sampled_from([119, 121, 255, 256, 257, 300, 769]))


# Eleven formats on each instruction set: a few examples of each are many in all.
for_each_format = settings(max_examples=max(settings().max_examples // 20, 2))


@pytest.fixture(params=FORMATS, scope="module")
def format(request):
    return FORMATS[request.param]


@for_each_format
@given(
    T=long, OUT=long, blocks=st.integers(1, 10), threads=st.integers(1, 4), by=st.integers(0, 15), seed=seeds
)
@example(T=121, OUT=257, blocks=9, threads=1, by=0, seed=0)
@example(T=9, OUT=1550, blocks=1, threads=2, by=0, seed=0)  # packed three times
@example(T=12, OUT=256, blocks=8, threads=3, by=1, seed=0)  # whole tiles, a whole panel of KC
@example(T=9, OUT=33, blocks=2, threads=2, by=0, seed=0)  # a packed group and one row
def test_dx_and_y_are_exact_on_exact_data(isa, format, T, OUT, blocks, threads, by, seed):
    rng = np.random.default_rng(seed)
    IN = whole_blocks(format, blocks * QK - (int(rng.integers(0, QK)) if format.block == 1 else 0))
    w = exact_weight(rng, format, OUT, IN)
    x, dy = (unaligned(rng.integers(-8, 9, (T, n)).astype(np.float32), 4 * by) for n in (IN, OUT))
    wide, k = w.dequantize(np.float64), TrainingKernels(threads)
    np.testing.assert_array_equal(k.linear_dx(dy, KernelWeight(w)), B.linear_dx(dy.astype(np.float64), wide))
    np.testing.assert_array_equal(k.linear(x, KernelWeight(w)), x.astype(np.float64) @ wide.T)


@for_each
@given(T=long, OUT=long, IN=long, threads=st.integers(1, 4), by=st.integers(0, 15), seed=seeds)
@example(T=257, OUT=121, IN=33, threads=1, by=0, seed=0)
@example(T=1550, OUT=13, IN=9, threads=2, by=0, seed=0)  # packed three times
@example(T=256, OUT=24, IN=64, threads=2, by=1, seed=0)
def test_dw_is_exact_on_exact_data_and_adds(isa, T, OUT, IN, threads, by, seed):
    rng = np.random.default_rng(seed)
    x, dy = (unaligned(rng.integers(-8, 9, (T, n)).astype(np.float32), 4 * by) for n in (IN, OUT))
    before = rng.integers(-8, 9, (OUT, IN)).astype(np.float32)
    expected, k = B.linear_dw(dy.astype(np.float64), x.astype(np.float64)), TrainingKernels(threads)
    np.testing.assert_array_equal(k.linear_dw(dy, x), expected)
    dw = before.copy()
    assert k.linear_dw(dy, x, dw) is dw
    np.testing.assert_array_equal(dw, before + expected)


@for_each
@given(T=long, OUT=long, IN=long, threads=st.integers(1, 4), seed=seeds)
def test_products_are_within_the_rounding_of_their_sums(isa, T, OUT, IN, threads, seed):
    rng = np.random.default_rng(seed)
    x, dy, w = (rng.standard_normal(s, dtype=np.float32) for s in ((T, IN), (T, OUT), (OUT, IN)))
    k, (x_, dy_, w_) = TrainingKernels(threads), (a.astype(np.float64) for a in (x, dy, w))
    assert_within(k.linear(x, w), x_ @ w_.T, g(IN) * (np.abs(x_) @ np.abs(w_).T))
    assert_within(k.linear_dx(dy, w), dy_ @ w_, g(OUT) * (np.abs(dy_) @ np.abs(w_)))
    assert_within(k.linear_dw(dy, x), dy_.T @ x_, g(T) * (np.abs(dy_).T @ np.abs(x_)))


@for_each_format
@given(T=long, OUT=long, blocks=st.integers(1, 10), cut=st.integers(0, 300), seed=seeds)
@example(T=300, OUT=600, blocks=9, cut=7, seed=0)
def test_products_give_the_same_bits_however_they_are_split(isa, format, T, OUT, blocks, cut, seed):
    rng = np.random.default_rng(seed)
    IN = whole_blocks(format, blocks * QK)
    w = KernelWeight(real_weight(rng, format, OUT, IN))
    x, dy = (rng.standard_normal((T, n), dtype=np.float32) for n in (IN, OUT))
    one = TrainingKernels(1)
    y, dx, dw = one.linear(x, w), one.linear_dx(dy, w), one.linear_dw(dy, x)
    np.testing.assert_array_equal(bits(y), bits(Kernels(1, exact=True).linear(x, w)))
    for threads in (2, 3, 5):
        k = TrainingKernels(threads)
        np.testing.assert_array_equal(bits(k.linear(x, w)), bits(y))
        np.testing.assert_array_equal(bits(k.linear_dx(dy, w)), bits(dx))
        np.testing.assert_array_equal(bits(k.linear_dw(dy, x)), bits(dw))
    parts = [one.linear_dx(part, w) for part in (dy[:cut], dy[cut:])]
    np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(dx))
    parts = [one.linear_dw(part, x) for part in (dy[:, :cut], dy[:, cut:])]
    np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(dw))


@pytest.mark.parametrize("name", ["F32", "Q4_K"])
def test_products_of_more_than_one_part_are_exact(isa, name, rng):
    """csrc/linear_backward.c: a part has PART = 3072 rows and columns at most."""
    T, OUT, IN, k = 10, 3085, 3328, TrainingKernels(2)
    w = exact_weight(rng, FORMATS[name], OUT, IN)
    x, dy = (rng.integers(-8, 9, (T, n)).astype(np.float32) for n in (IN, OUT))
    wide = w.dequantize(np.float64)
    np.testing.assert_array_equal(k.linear(x, KernelWeight(w)), x.astype(np.float64) @ wide.T)
    np.testing.assert_array_equal(k.linear_dx(dy, KernelWeight(w)), dy.astype(np.float64) @ wide)
    np.testing.assert_array_equal(k.linear_dw(dy, x), dy.T.astype(np.float64) @ x)


def test_products_give_the_same_bits_in_short_calls(isa, rng, monkeypatch):
    T, OUT, IN = 70, 75, 520
    x, dy, w = (rng.standard_normal(s, dtype=np.float32) for s in ((T, IN), (T, OUT), (OUT, IN)))
    k = TrainingKernels(2)
    whole = k.linear(x, w), k.linear_dx(dy, w), k.linear_dw(dy, x)
    for work in (1, 256 * OUT * 4 // 16, T * IN * 7 // 16, T * OUT * 256 // 16):
        monkeypatch.setattr(kernels, "WORK_PER_CALL", work)
        for a, b in zip((k.linear(x, w), k.linear_dx(dy, w), k.linear_dw(dy, x)), whole, strict=True):
            np.testing.assert_array_equal(bits(a), bits(b))


@pytest.mark.parametrize("IN", [40, 64])
def test_an_array_is_the_weight_of_its_numbers(isa, rng, IN):
    w = rng.standard_normal((35, IN), dtype=np.float32)
    stored, k = KernelWeight(StoredTensor.quantize(w, "F32")), TrainingKernels(2)
    x, dy = (rng.standard_normal((2, 9, n), dtype=np.float32) for n in (IN, 35))
    for same in (w, np.asfortranarray(w), w.astype(">f4"), np.repeat(w, 2, axis=0)[::2]):
        np.testing.assert_array_equal(bits(k.linear(x, same)), bits(k.linear(x, stored)))
        np.testing.assert_array_equal(bits(k.linear_dx(dy, same)), bits(k.linear_dx(dy, stored)))
    for same in (dy[::-1][::-1], dy.astype(np.float64), np.repeat(dy, 3, axis=-1)[..., ::3]):
        np.testing.assert_array_equal(bits(k.linear_dx(same, w)), bits(k.linear_dx(dy, w)))
        np.testing.assert_array_equal(bits(k.linear_dw(same, x)), bits(k.linear_dw(dy, x)))


def test_rows_may_lie_in_another_order(isa, format, rng):
    plain = exact_weight(rng, format, 21, 2 * max(format.block, QK))
    w = StoredTensor(format, plain.shape, plain.data, rng.permutation(21))
    x, dy = (rng.integers(-8, 9, (9, n)).astype(np.float32) for n in (w.shape[1], 21))
    k, numbers = TrainingKernels(2), w.dequantize()
    np.testing.assert_array_equal(k.linear(x, KernelWeight(w)), x @ numbers.T)
    np.testing.assert_array_equal(k.linear_dx(dy, KernelWeight(w)), dy @ numbers)


@pytest.mark.parametrize("T, OUT, IN", [(0, 3, 32), (9, 0, 32), (9, 3, 0), (0, 0, 0)])
def test_products_of_nothing(isa, T, OUT, IN):
    x, dy, w = (np.ones(shape, np.float32) for shape in ((T, IN), (T, OUT), (OUT, IN)))
    k = TrainingKernels(2)
    for got, shape in (
        (k.linear(x, w), (T, OUT)),
        (k.linear_dx(dy, w), (T, IN)),
        (k.linear_dw(dy, x), (OUT, IN)),
    ):
        assert got.shape == shape and not got.any()
    assert k.linear_dw(dy, x, np.ones((OUT, IN), np.float32)).all()


def test_products_refuse_what_does_not_fit():
    k, ones = TrainingKernels(1), np.ones((9, 5), np.float32)
    for call in (
        lambda: k.linear(ones, np.ones((3, 4), np.float32)),
        lambda: k.linear_dx(ones, np.ones((4, 5), np.float32)),
        lambda: k.linear_dw(ones, np.ones((8, 5), np.float32)),
        lambda: k.linear_dw(ones, ones, np.ones((5, 4), np.float32)),
        lambda: k.linear_dw(ones, ones, np.ones((5, 5))),
    ):
        with pytest.raises(MismatchError):
            call()


@pytest.mark.parametrize("at_end", [True, False])
def test_products_touch_nothing_beside_their_arrays(isa, format, at_end, rng):
    for T, OUT, blocks in [(1, 1, 1), (13, 5, 9), (12, 33, 8), (29, 257, 1), (25, 16, 2)]:
        guarded, IN = Guarded(), whole_blocks(format, blocks * QK)
        w = exact_weight(rng, format, OUT, IN)
        rows = guarded.copy(KernelWeight(w).rows, at_end)
        x, dy = (guarded.copy(rng.integers(-8, 9, (T, n)).astype(np.float32), at_end) for n in (IN, OUT))
        y, dx, dw = (guarded.copy(np.full(s, np.nan, "f4"), at_end) for s in ((T, OUT), (T, IN), (OUT, IN)))
        y_, dx_, dw_, x_, dy_, w_ = (ffi.cast("void *", a.ctypes.data) for a in (y, dx, dw, x, dy, rows))
        matrix = ffi.new("nl_matrix *", (w_, format.code, OUT, IN))
        assert lib.nl_linear_y(y_, x_, T, matrix, 0, OUT, 2) == 0
        for begin in range(0, OUT, lib.NL_GRADIENT_ROWS):
            end = min(begin + lib.NL_GRADIENT_ROWS, OUT)
            assert lib.nl_linear_dx(dx_, dy_, T, matrix, IN, begin, end, 2) == 0
        assert lib.nl_linear_dw(dw_, dy_, x_, T, OUT, IN, 0, OUT, 0, 2) == 0
        np.testing.assert_array_equal(y, x @ w.dequantize().T)
        np.testing.assert_array_equal(dx, dy @ w.dequantize())
        np.testing.assert_array_equal(dw, dy.T @ x)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("IN", [1, 7, 33, 47])
def test_rows_of_any_length_touch_nothing_beside_them(isa, at_end, IN, rng):
    guarded, T, OUT = Guarded(), 14, 19
    shapes = (T, IN), (T, OUT), (OUT, IN)
    x, dy, w = (guarded.copy(rng.integers(-8, 9, s).astype(np.float32), at_end) for s in shapes)
    dx, dw = (guarded.copy(np.full(s, np.nan, "f4"), at_end) for s in (shapes[0], shapes[2]))
    dx_, dw_, x_, dy_, w_ = (ffi.cast("void *", a.ctypes.data) for a in (dx, dw, x, dy, w))
    matrix = ffi.new("nl_matrix *", (w_, FORMATS["F32"].code, OUT, IN))
    assert lib.nl_linear_dx(dx_, dy_, T, matrix, IN, 0, OUT, 2) == 0
    assert lib.nl_linear_dw(dw_, dy_, x_, T, OUT, IN, 0, OUT, 0, 2) == 0
    np.testing.assert_array_equal(dx, dy @ w)
    np.testing.assert_array_equal(dw, dy.T @ x)


def test_an_empty_part_of_a_product_is_nothing():
    x, matrix = np.ones(1024, np.float32), ffi.new("nl_matrix *", (ffi.NULL, FORMATS["F32"].code, 32, 32))
    x_ = ffi.from_buffer("float[]", x, require_writable=True)
    assert lib.nl_linear_y(x_, x_, 9, matrix, 32, 32, 2) == 0
    assert lib.nl_linear_dx(x_, x_, 0, matrix, 32, 0, 32, 2) == 0
    assert lib.nl_linear_dw(x_, x_, x_, 9, 32, 32, 32, 32, 0, 2) == 0
    assert (x == 1).all()


def test_an_unknown_format_is_refused():
    y, matrix = np.zeros(1024, np.float32), ffi.new("nl_matrix *", (ffi.NULL, 99, 32, 32))
    y_ = ffi.from_buffer("float[]", y, require_writable=True)
    assert lib.nl_linear_y(y_, y_, 9, matrix, 0, 32, 1) == lib.NL_UNKNOWN_FORMAT
    assert lib.nl_linear_dx(y_, y_, 9, matrix, 32, 0, 32, 1) == lib.NL_UNKNOWN_FORMAT
