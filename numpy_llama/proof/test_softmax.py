"""Softmax: exp(x_i) / sum_j exp(x_j), over the last axis."""

import math

import numpy as np
import pytest
from hypothesis import strategies as st

from . import torch_ops
from .bounds import EXACT_64, U32, assert_same, assert_within
from .laws import assert_that, law, sizes, small_sizes, sources

scales = st.sampled_from([0.0, 0.25, 1.0, 5.0, 50.0])


@law("softmax", sources, sizes)
def test_the_formula(ops, source, n):
    """p_i = exp(x_i) / sum_j exp(x_j)."""
    x = source.array(1, n)
    total = math.fsum(map(math.exp, x[0]))
    expected = np.array([[math.exp(x_i) / total for x_i in x[0]]])
    assert_within(ops.softmax(x), expected, EXACT_64 * expected)


@law("softmax", sources, sizes, scales)
def test_as_pytorch(ops, source, n, scale):
    """It gives what torch.softmax gives."""
    x = source.array(2, 3, n) * scale
    expected = torch_ops.softmax(x)
    assert_within(ops.softmax(x), expected, EXACT_64 * expected)


@law("softmax", sources, sizes, scales)
def test_in_float32(ops, source, n, scale):
    """Each p_i errs by (max - x_i + n + 8) u of itself: exp multiplies the rounding of its argument."""
    x = (source.array(2, n) * scale).astype(np.float32)
    p, below = ops.softmax(x), x.max(-1, keepdims=True) - x
    assert_that(p.dtype == np.float32, f"float32 went in, {p.dtype} came out")
    exact = ops.softmax(x.astype(np.float64))
    assert_within(p, exact, (below + n + 8) * U32 * exact + np.finfo(np.float32).tiny)


@law("softmax", sources, sizes, scales)
def test_it_sums_to_1(ops, source, n, scale):
    """sum_i p_i = 1."""
    assert_within(ops.softmax(source.array(3, n) * scale).sum(-1), np.ones(3), EXACT_64)


@law("softmax", sources, sizes, scales)
def test_it_sums_to_1_in_float32(ops, source, n, scale):
    """sum_i p_i = 1 within (2 n + 8) u."""
    p = ops.softmax((source.array(3, n) * scale).astype(np.float32))
    assert_within(p.astype(np.float64).sum(-1), np.ones(3), (2 * n + 8) * U32)


@law("softmax", sources, sizes, scales)
def test_these_are_probabilities(ops, source, n, scale):
    """0 <= p_i <= 1."""
    p = ops.softmax(source.array(2, n) * scale)
    assert_that((p >= 0) & (p <= 1), f"probabilities from {p.min()} to {p.max()}")


@law("softmax", sources, sizes, st.integers(-1000, 1000))
def test_only_differences_count(ops, source, n, shift):
    """softmax(x + c) = softmax(x), to the last bit where the shift is exact."""
    x = source.rng.integers(-400, 400, (1, n)).astype(np.float32) / 16
    assert_same(ops.softmax(x + np.float32(shift)), ops.softmax(x))


@law("softmax", sources, sizes, scales)
def test_the_order_is_kept(ops, source, n, scale):
    """x_i <= x_j makes p_i <= p_j."""
    x = source.array(n) * scale
    p = ops.softmax(x[None])[0]
    assert_that(np.diff(p[np.argsort(x, kind="stable")]) >= 0, f"of {x} it made {p}")


@law("softmax", sources, sizes)
def test_equal_scores_share_equally(ops, source, n):
    """n equal numbers get 1 / n each."""
    p = ops.softmax(np.full((1, n), source.array(1)[0]))
    assert_within(p, np.full((1, n), 1 / n), EXACT_64)


@law("softmax", sources, sizes)
def test_ratios_are_exponentials_of_differences(ops, source, n):
    """p_i / p_j = exp(x_i - x_j)."""
    x = source.array(1, n)
    p = ops.softmax(x)
    expected = np.exp(x - x[:, :1])
    assert_within(p / p[:, :1], expected, EXACT_64 * expected)


@law("softmax", sources, sizes)
def test_permuting_scores_permutes_probabilities(ops, source, n):
    """softmax(x[order]) = softmax(x)[order]."""
    x, order = source.array(2, n), source.permutation(n)
    expected = ops.softmax(x)[:, order]
    assert_within(ops.softmax(x[:, order]), expected, EXACT_64 * expected)


@law("softmax", sources, sizes)
def test_minus_infinity_gets_exactly_nothing(ops, source, n):
    """exp(-inf) = 0: what is masked has no share, and the others share as if it were not there."""
    x = source.array(2, n)
    masked = np.concatenate([x, np.full((2, 1), -np.inf)], axis=1)
    p = ops.softmax(masked)
    assert_same(p[:, n], np.zeros(2))
    assert_within(p[:, :n], ops.softmax(x), EXACT_64)


@pytest.mark.filterwarnings("ignore:invalid value")
@law("softmax", sizes)
def test_of_minus_infinity_alone_nothing_gets_a_share(ops, n):
    """Where all is masked there is nothing to share: NaN, as of torch.softmax, or 0; never a probability."""
    p = ops.softmax(np.full((1, n), -np.inf))
    assert_that(np.isnan(p) | (p == 0), f"of {n} times -inf it made {p}")


@law("softmax", sources, sizes, small_sizes)
def test_the_last_axis_is_summed(ops, source, n, rows):
    """Each row of (..., n) is for itself, whatever stands in the others."""
    x = source.array(2, rows, n)
    alone = ops.softmax(x[1, rows - 1][None])[0]
    assert_within(ops.softmax(x)[1, rows - 1], alone, EXACT_64)


@law("softmax")
def test_large_scores_do_not_overflow(ops):
    """exp(1000) is no number, but softmax([0, 1000, -1000]) is [0, 1, 0]."""
    largest = np.finfo(np.float32).max
    assert_same(ops.softmax(np.array([[0, 1000, -1000]], np.float32)), [[0, 1, 0]])
    assert_same(ops.softmax(np.array([[largest, 0, largest]], np.float32)), [[0.5, 0, 0.5]])
    assert_same(ops.softmax(np.array([[-largest, -largest]], np.float32)), [[0.5, 0.5]])
    assert_same(ops.softmax(np.array([[-np.inf, 3, -np.inf, 3]], np.float32)), [[0, 0.5, 0, 0.5]])


@law("softmax", sources, sizes)
def test_it_leaves_its_argument_alone(ops, source, n):
    """x is what it was."""
    x = source.array(2, n)
    before = x.copy()
    ops.softmax(x)
    assert_same(x, before)
