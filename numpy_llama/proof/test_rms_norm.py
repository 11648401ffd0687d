"""RMSNorm: x / sqrt(mean(x^2) + eps) * weight (Zhang & Sennrich 2019, equation 4)."""

import numpy as np
import pytest
from hypothesis import strategies as st

from . import torch_ops
from .bounds import EXACT_64, U32, assert_same, assert_within, unit
from .laws import assert_that, law, sizes, small_sizes, sources

eps_values = st.sampled_from([1e-6, 1e-5, 1e-1, 10.0])  # large ones too: eps must stand inside the root
magnitudes = st.integers(-3, 3).map(lambda k: 10.0**k)


def formula(x, weight, eps):
    """The equation in Python's own numbers, term by term."""
    rows = []
    for row in x.reshape(-1, x.shape[-1]).tolist():
        root = (sum(x_i * x_i for x_i in row) / len(row) + eps) ** 0.5
        rows.append([x_i / root * w_i for x_i, w_i in zip(row, weight.tolist(), strict=True)])
    return np.array(rows).reshape(x.shape)


@law("rms_norm", sources, sizes, eps_values, magnitudes)
def test_the_formula(ops, source, D, eps, magnitude):
    """y_i = x_i / sqrt(mean(x^2) + eps) * w_i."""
    x, weight = source.array(2, D) * magnitude, source.positive(D)
    expected = formula(x, weight, eps)
    assert_within(ops.rms_norm(x, weight, eps), expected, EXACT_64 * np.abs(expected))


@law("rms_norm", sources, sizes, eps_values, magnitudes)
def test_as_pytorch(ops, source, D, eps, magnitude):
    """It gives what torch.nn.functional.rms_norm gives."""
    x, weight = source.array(2, 3, D) * magnitude, source.positive(D)
    expected = torch_ops.rms_norm(x, weight, eps)
    assert_within(ops.rms_norm(x, weight, eps), expected, EXACT_64 * np.abs(expected))


@law("rms_norm", sources, sizes, eps_values, magnitudes)
def test_in_float32(ops, source, D, eps, magnitude):
    """In float32 it errs by (D + 8) u: the sum of squares by (D + 3) u, halved by the root; the rest by 8."""
    x, weight = (source.array(2, D) * magnitude).astype(np.float32), source.positive(D).astype(np.float32)
    y = ops.rms_norm(x, weight, eps)
    assert_that(y.dtype == np.float32, f"float32 went in, {y.dtype} came out")
    exact = formula(x.astype(np.float64), weight.astype(np.float64), eps)
    assert_within(y, exact, (D + 8) * U32 * np.abs(exact))


@law("rms_norm", sources, sizes)
def test_the_mean_of_the_squares_becomes_1(ops, source, D):
    """With a weight of ones and no eps, mean(y^2) = 1."""
    y = ops.rms_norm(source.positive(3, D), np.ones(D), 0.0)
    assert_within(np.mean(y**2, axis=-1), np.ones(3), EXACT_64)


@law("rms_norm", sources, sizes, st.integers(-20, 20))
def test_the_length_of_x_does_not_matter(ops, source, D, k):
    """Without eps, rms_norm(2^k x) = rms_norm(x), to the last bit: only the direction counts."""
    x, weight = source.positive(3, D), source.positive(D)
    assert_same(ops.rms_norm(x * 2.0**k, weight, 0.0), ops.rms_norm(x, weight, 0.0))


@law("rms_norm", sources, sizes, eps_values)
def test_the_sign_goes_through(ops, source, D, eps):
    """rms_norm(-x) = -rms_norm(x)."""
    x, weight = source.array(3, D), source.positive(D)
    assert_same(ops.rms_norm(-x, weight, eps), -ops.rms_norm(x, weight, eps))


@law("rms_norm", sources, sizes, eps_values)
def test_the_mean_is_not_taken_away(ops, source, D, eps):
    """A constant vector c stays one, c / sqrt(c^2 + eps): LayerNorm would make 0 of it."""
    c, weight = float(source.positive(1)[0]), source.positive(D)
    expected = c / np.sqrt(c * c + eps) * weight
    assert_within(ops.rms_norm(np.full((1, D), c), weight, eps), expected[None], EXACT_64 * expected)


@law("rms_norm", sources, sizes, eps_values)
def test_eps_stands_inside_the_root(ops, source, D, eps):
    """For x near 0 the norm is x / sqrt(eps), not x / eps."""
    x, weight = source.positive(1, D) * 1e-9 * np.sqrt(eps), np.ones(D)
    assert_within(ops.rms_norm(x, weight, eps), x / np.sqrt(eps), EXACT_64 * x / np.sqrt(eps))


@law("rms_norm", sources, sizes, eps_values)
def test_zero_stays_zero(ops, source, D, eps):
    """rms_norm(0) = 0: eps keeps it from 0 / 0."""
    assert_same(ops.rms_norm(np.zeros((2, D)), source.positive(D), eps), np.zeros((2, D)))


@law("rms_norm", sources, sizes, eps_values)
def test_each_row_is_for_itself(ops, source, D, eps):
    """A vector's norm does not depend on its neighbours: with others beside it, it is the same."""
    x, weight = source.array(2, D), source.positive(D)
    other = x.copy()
    other[1] = 3 * other[1] + 1
    assert_same(ops.rms_norm(other, weight, eps)[0], ops.rms_norm(x, weight, eps)[0])


@law("rms_norm", sources, sizes, eps_values)
def test_a_poisoned_row_poisons_no_other(ops, source, D, eps):
    """NaN in one vector stays in that vector."""
    x, weight = source.array(3, D), source.positive(D)
    y = ops.rms_norm(x, weight, eps)
    x[1, -1] = np.nan
    assert_same(ops.rms_norm(x, weight, eps)[[0, 2]], y[[0, 2]])


@law("rms_norm", sources, sizes, eps_values)
def test_the_order_of_the_channels_does_not_matter(ops, source, D, eps):
    """Permuting x and weight together permutes y."""
    x, weight, order = source.array(2, D), source.positive(D), source.permutation(D)
    expected = ops.rms_norm(x, weight, eps)[:, order]
    actual = ops.rms_norm(x[:, order], weight[order], eps)
    assert_within(actual, expected, EXACT_64 * np.abs(expected))


@law("rms_norm", sources, sizes, eps_values)
def test_the_weight_comes_last(ops, source, D, eps):
    """y is linear in the weight, channel by channel: it is no part of the mean."""
    x, weight = source.array(2, D), source.positive(D)
    expected = weight * ops.rms_norm(x, np.ones(D), eps)
    assert_within(ops.rms_norm(x, weight, eps), expected, EXACT_64 * np.abs(expected))


@law("rms_norm", sources, small_sizes, small_sizes, sizes)
def test_the_last_axis_is_the_vector(ops, source, B, T, D):
    """(B, T, D): each of the B x T vectors as if it were alone."""
    x, weight = source.array(B, T, D), source.positive(D)
    alone = ops.rms_norm(x[B - 1, T - 1][None], weight, 1e-5)[0]
    assert_within(ops.rms_norm(x, weight, 1e-5)[B - 1, T - 1], alone, EXACT_64 * np.abs(alone))


@pytest.mark.parametrize("size", [1e20, 1e-30])
@law("rms_norm")
def test_beyond_the_range_of_a_square(ops, size):
    """Where x^2 is no float32 any more, it gives what PyTorch gives: 0 beyond, x / sqrt(eps) below."""
    x, weight = np.array([[size, -size, size / 2]], np.float32), np.array([0.5, 2, 3], np.float32)
    with np.errstate(over="ignore"):
        y = ops.rms_norm(x, weight, 1e-5)
    assert_within(y, torch_ops.rms_norm(x, weight, 1e-5), 8 * unit(np.float32) * np.abs(y))


@law("rms_norm", sources, sizes)
def test_it_leaves_its_arguments_alone(ops, source, D):
    """x and weight are what they were."""
    x, weight = source.array(2, D), source.positive(D)
    x_before, weight_before = x.copy(), weight.copy()
    ops.rms_norm(x, weight, 1e-5)
    assert_same(x, x_before)
    assert_same(weight, weight_before)
