"""SiLU, x sigmoid(x) (Hendrycks & Gimpel 2016), and SwiGLU, silu(gate) * up (Shazeer 2020, equation 6)."""

import math

import numpy as np
import pytest
from hypothesis import strategies as st

from . import torch_ops
from .bounds import EXACT_64, EXP_32, U32, assert_same, assert_within
from .laws import assert_that, law, sizes, sources

scales = st.sampled_from([0.25, 1.0, 10.0, 100.0])


@law("silu", sources, sizes)
def test_the_formula(ops, source, n):
    """silu(x) = x / (1 + exp(-x))."""
    x = source.array(n)
    expected = np.array([x_i / (1 + math.exp(-x_i)) for x_i in x])
    assert_within(ops.silu(x), expected, EXACT_64 * np.abs(expected))


@law("silu", sources, sizes, scales)
def test_as_pytorch(ops, source, n, scale):
    """It gives what torch.nn.functional.silu gives."""
    x = source.array(3, n) * scale
    expected = torch_ops.silu(x)
    assert_within(ops.silu(x), expected, EXACT_64 * np.abs(expected))


@law("silu", sources, sizes, scales)
def test_in_float32(ops, source, n, scale):
    """exp, 1 + exp and the quotient: 6 u. Below -88 exp(-x) is infinite and the result 0, not a subnormal."""
    x = (source.array(n) * scale).astype(np.float32)
    y = ops.silu(x)
    assert_that(y.dtype == np.float32, f"float32 went in, {y.dtype} came out")
    exact = ops.silu(x.astype(np.float64))
    assert_within(y, exact, (EXP_32 + 2 * U32) * np.abs(exact) + 100 * np.finfo(np.float32).tiny)


@law("silu", sources, sizes, scales)
def test_both_sides_make_up_x(ops, source, n, scale):
    """silu(x) - silu(-x) = x, for sigmoid(x) + sigmoid(-x) = 1."""
    x = source.array(n) * scale
    assert_within(ops.silu(x) + -ops.silu(-x), x, EXACT_64 * np.abs(x))


@law("silu", sources, sizes, scales)
def test_it_lies_between_0_and_x(ops, source, n, scale):
    """silu(x) lies between x / 2 and x for positive x, and between x / 2 and 0 for negative x."""
    x = source.array(n) * scale
    y, slack = ops.silu(x), 1 + EXACT_64
    above = (x >= 0) & (y >= x / 2 / slack) & (y <= x * slack)
    below = (x < 0) & (y <= 0) & (y >= x / 2 * slack)
    assert_that(above | below, f"silu of {x} is {y}")


@law("silu", sources)
def test_it_rises_right_of_its_lowest_point(ops, source):
    """From -1.278 on it only rises, and its lowest value is -0.278."""
    x = np.sort(source.rng.uniform(-1.27, 20, 200))
    y = ops.silu(x)
    assert_that(np.diff(y) >= 0, "it falls somewhere right of -1.27")
    assert_within(ops.silu(np.linspace(-2, 0, 2001)).min(), np.float64(-0.2784645), 1e-6)


@pytest.mark.filterwarnings("error")
@law("silu")
def test_at_the_ends(ops):
    """Far right it is x, far left -0; nothing overflows on the way, and NaN stays NaN."""
    x = np.array([-3e38, -1e4, -104, -88.8, -0.0, 0, 88.8, 1e4, 3e38, np.inf, np.nan], np.float32)
    y = ops.silu(x)
    assert_same(y[:3], [0, 0, 0])
    assert_that(np.signbit(y[:5]), f"left of 0 the sign is minus, also of 0: {y[:5]}")
    assert_that(~np.signbit(y[5:10]), f"from 0 on it is plus: {y[5:10]}")
    assert_same(y[5:], x[5:])


@pytest.mark.filterwarnings("ignore:invalid value")
@law("silu")
def test_minus_infinity_is_not_hidden(ops):
    """-inf / (1 + inf) is no number, as of torch.nn.functional.silu: what overflowed stays to be seen."""
    x = np.array([-np.inf], np.float32)
    assert_same(ops.silu(x), torch_ops.silu(x))


@law("swiglu", sources, sizes)
def test_swiglu_is_silu_times_up(ops, source, n):
    """swiglu(gate, up) = gate / (1 + exp(-gate)) * up."""
    gate, up = source.array(3, n), source.array(3, n)
    expected = gate / (1 + np.exp(-gate)) * up
    assert_within(ops.swiglu(gate, up), expected, EXACT_64 * np.abs(expected))


@law("swiglu", sources, sizes)
def test_swiglu_as_pytorch(ops, source, n):
    """It gives torch.nn.functional.silu(gate) * up."""
    gate, up = source.array(3, n), source.array(3, n)
    expected = torch_ops.swiglu(gate, up)
    assert_within(ops.swiglu(gate, up), expected, EXACT_64 * np.abs(expected))


@law("swiglu", sources, sizes)
def test_the_gate_is_the_first(ops, source, n):
    """It is linear in `up`, the second, and not in the gate."""
    gate, up = source.positive(n), source.positive(n)
    assert_same(ops.swiglu(gate, 2 * up), 2 * ops.swiglu(gate, up))
    assert_that(ops.swiglu(2 * gate, up) > 2 * ops.swiglu(gate, up), "twice the gate gave just twice as much")


@law("swiglu", sources, sizes)
def test_a_closed_gate_lets_nothing_through(ops, source, n):
    """swiglu(0, up) = 0, and far below 0 as well."""
    up = source.array(n)
    assert_same(ops.swiglu(np.zeros(n), up), np.zeros(n))
    assert_within(ops.swiglu(np.full(n, -800.0), up), np.zeros(n), EXACT_64)


@law("swiglu", sources, sizes)
def test_swiglu_in_float32(ops, source, n):
    """One product more than silu: 7 u."""
    gate, up = (source.array(n).astype(np.float32) for _ in "gu")
    y = ops.swiglu(gate, up)
    assert_that(y.dtype == np.float32, f"float32 went in, {y.dtype} came out")
    exact = ops.swiglu(gate.astype(np.float64), up.astype(np.float64))
    assert_within(y, exact, (EXP_32 + 3 * U32) * np.abs(exact) + 1e-36)
