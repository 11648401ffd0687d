"""Linear: y = x W^T. Sums of products, so the one place where the order of additions shows."""

import numpy as np
from hypothesis import strategies as st

from . import torch_ops
from .bounds import assert_close_on_average, assert_same, assert_within, g, unit
from .laws import assert_that, law, sizes, small_sizes, sources

lengths = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 129, 255, 256, 257, 1023]))


def bound(x, w):
    """g(IN) sum |x_i w_i|, for one result against the true one."""
    return g(x.shape[-1], u=unit(x.dtype)) * (np.abs(x).astype(np.float64) @ np.abs(w).T)


@law("linear", sources, sizes, lengths, sizes)
def test_the_sum_is_as_exact_as_sums_are(ops, source, T, IN, OUT):
    """|y - x W^T| <= g(IN) sum |x_i w_i|: the rounding of a sum of IN terms and no more."""
    x, w = source.array(T, IN), source.array(OUT, IN)
    assert_within(ops.linear(x, w), x.astype(np.longdouble) @ w.T, bound(x, w))


@law("linear", sources, sizes, lengths, sizes)
def test_in_float32(ops, source, T, IN, OUT):
    """The same in float32, against the sum in float64."""
    x, w = (source.array(n, IN).astype(np.float32) for n in (T, OUT))
    y = ops.linear(x, w)
    assert_that(y.dtype == np.float32, f"float32 went in, {y.dtype} came out")
    assert_within(y, x.astype(np.float64) @ w.T.astype(np.float64), bound(x, w))


@law("linear", sources, sizes, lengths, sizes)
def test_whole_numbers_are_multiplied_exactly(ops, source, T, IN, OUT):
    """With small whole numbers over 4 every sum is exact, in any order."""
    x, w = source.rng.integers(-8, 9, (T, IN)), source.rng.integers(-8, 9, (OUT, IN))
    assert_same(ops.linear(x.astype(np.float32) / 4, w.astype(np.float32) * 2), x @ w.T / 2)


@law("linear", sources, sizes, lengths, sizes)
def test_as_pytorch(ops, source, T, IN, OUT):
    """It gives what torch.nn.functional.linear gives, within the rounding of both sums."""
    x, w = source.array(T, IN), source.array(OUT, IN)
    assert_within(ops.linear(x, w), torch_ops.linear(x, w), 2 * bound(x, w))


@law("linear", sources)
def test_the_errors_are_those_of_chance(ops, source):
    """Over 1,024 numbers the root mean square error stays below 4 sqrt(IN) u of the result's."""
    IN, u = 1024, unit(np.float32)
    x, w = (source.normal(32, IN).astype(np.float32) for _ in "xw")
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert_close_on_average(ops.linear(x, w), exact, 4 * np.sqrt(IN) * u)


@law("linear", sources, sizes, sizes)
def test_the_unit_matrix_changes_nothing(ops, source, T, n):
    """x I^T = x, to the last bit."""
    x = source.array(T, n)
    assert_same(ops.linear(x, np.eye(n, dtype=x.dtype)), x)


@law("linear", sources, small_sizes, sizes, sizes)
def test_a_row_with_one_1_picks_a_column(ops, source, T, IN, OUT):
    """Row r of W that is 1 at i alone gives y_r = x_i."""
    x, picked = source.array(T, IN), source.ids(IN, OUT)
    assert_same(ops.linear(x, np.eye(IN, dtype=x.dtype)[picked]), x[:, picked])


@law("linear", sources, small_sizes, sizes, sizes)
def test_scaling_by_two_is_exact(ops, source, T, IN, OUT):
    """linear(2 x, w) = 2 linear(x, w) = linear(x, 2 w), to the last bit."""
    x, w = source.array(T, IN), source.array(OUT, IN)
    y = ops.linear(x, w)
    assert_same(ops.linear(2 * x, w), 2 * y)
    assert_same(ops.linear(x, 2 * w), 2 * y)


@law("linear", sources, small_sizes, sizes, sizes)
def test_it_is_linear(ops, source, T, IN, OUT):
    """linear(x + z, w) = linear(x, w) + linear(z, w), exactly so with whole numbers."""
    x, z = source.rng.integers(-8, 9, (2, T, IN)).astype(ops.dtype)
    w = source.rng.integers(-8, 9, (OUT, IN)).astype(ops.dtype)
    assert_same(ops.linear(x + z, w), ops.linear(x, w) + ops.linear(z, w))


@law("linear", sources, small_sizes, sizes, sizes)
def test_it_has_a_transpose(ops, source, T, IN, OUT):
    """<linear(x, W), y> = <x, linear(y, W^T)>, exactly so with whole numbers."""
    x, y, w = (
        source.rng.integers(-8, 9, shape).astype(ops.dtype) for shape in ((1, IN), (1, OUT), (OUT, IN))
    )
    one, other = ops.linear(x, w) @ y.T, x @ ops.linear(y, np.ascontiguousarray(w.T)).T
    assert_same(one, other)


@law("linear", sources, small_sizes, small_sizes, sizes, sizes)
def test_any_axes_may_come_before_the_last(ops, source, B, T, IN, OUT):
    """(B, T, IN) -> (B, T, OUT), each row as if it were alone."""
    x, w = source.rng.integers(-8, 9, (B, T, IN)).astype(ops.dtype), source.array(OUT, IN)
    y = ops.linear(x, w)
    assert_that(y.shape == (B, T, OUT), f"(B, T, OUT) is {(B, T, OUT)}, what came out has shape {y.shape}")
    alone = ops.linear(x[B - 1, T - 1][None], w)[0]
    assert_within(y[B - 1, T - 1], alone, 2 * bound(x[B - 1, T - 1], w))


@law("linear", sources, small_sizes, sizes, sizes)
def test_a_row_of_the_weight_makes_one_output(ops, source, T, IN, OUT):
    """NaN in row r of W comes out as output r and nowhere else."""
    x, w, bad = source.array(T, IN), source.array(OUT, IN), source.ids(OUT)
    expected = np.isnan(ops.linear(x, w)) | (np.arange(OUT) == bad)
    w[bad] = np.nan
    assert_same(np.isnan(ops.linear(x, w)), expected)


@law("linear", sources, small_sizes, sizes, sizes)
def test_a_row_of_x_makes_one_row(ops, source, T, IN, OUT):
    """NaN in row t of x comes out in row t and nowhere else."""
    x, w, bad = source.array(T, IN), source.array(OUT, IN), source.ids(T)
    x[bad] = np.nan
    nan = np.isnan(ops.linear(x, w))
    assert_same(nan, np.repeat(np.arange(T) == bad, OUT).reshape(T, OUT))


@law("linear", sources, small_sizes, sizes, sizes)
def test_it_takes_any_layout(ops, source, T, IN, OUT):
    """Strided, turned round or of Fortran's order: the numbers count, not where they lie."""
    x = source.rng.integers(-8, 9, (T, IN)).astype(ops.dtype)
    w = source.rng.integers(-8, 9, (OUT, IN)).astype(ops.dtype)
    expected = x @ w.T
    assert_same(ops.linear(np.repeat(x, 2, axis=1)[:, ::2], w), expected)
    assert_same(ops.linear(np.ascontiguousarray(x[:, ::-1])[:, ::-1], w), expected)
    assert_same(ops.linear(np.asfortranarray(x), np.asfortranarray(w)), expected)


@law("linear", sources, sizes, sizes)
def test_of_nothing(ops, source, IN, OUT):
    """No tokens give no tokens, and no inputs give sums of 0."""
    w = source.array(OUT, IN)
    assert_same(ops.linear(np.zeros((0, IN), ops.dtype), w), np.zeros((0, OUT)))
    assert_same(ops.linear(np.zeros((2, 0), ops.dtype), w[:, :0]), np.zeros((2, OUT)))


@law("linear", sources, small_sizes, sizes, sizes)
def test_it_leaves_its_arguments_alone(ops, source, T, IN, OUT):
    """x and w are what they were."""
    x, w = source.array(T, IN), source.array(OUT, IN)
    x_before, w_before = x.copy(), w.copy()
    ops.linear(x, w)
    assert_same(x, x_before)
    assert_same(w, w_before)
