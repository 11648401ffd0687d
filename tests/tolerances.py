"""How far two results may lie apart, each with its reason. u is the unit roundoff: half an ulp of 1."""

import math

import numpy as np

U32 = 2.0**-24
U64 = 2.0**-53

# Two float64 paths through one formula: rounding is far below this, and every real fault far above it.
EXACT_64 = 1e-12

# A whole tiny model in float64: the rounding of EXACT_64 grows through layers and the sums of the head.
MODEL_64 = 1e-11

# A whole tiny model in float32, relative to the largest logit: the bounds of its sums, added over layers.
MODEL_32 = 5e-6

# Prompt in chunks against prompt at once: BLAS sums in another order for another shape.
CHUNKS_64 = 1e-12
CHUNKS_32 = 1e-5

# exp of a float32: NumPy and PyTorch promise 2 ulp, that is 4 u.
EXP_32 = 4 * U32

# The value after rounding to float16 lies within 2^-11 of it, relatively.
U16 = 2.0**-11


def g(K: int, L: int = 1, u: float = U32) -> float:
    """A dot product of length K in L partial sums errs by at most g * sum |a_i b_i|.

    Each partial sum takes ceil(K / L) roundings, joining them log2 L, the products and slack three.
    """
    return (math.ceil(K / L) + math.log2(L) + 3) * u


def assert_near(actual, expected, tolerance: float) -> None:
    """|actual - expected| <= tolerance * the largest |expected|: for results that are sums of many terms."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    error = np.abs(_widen(actual) - expected).max(initial=0)
    assert error <= tolerance * np.abs(expected).max(initial=0), f"error {error}"


def assert_within(actual, expected, bound) -> None:
    """|actual - expected| <= bound, element by element. Equal infinities are equal; NaN never passes."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.shape == expected.shape
    with np.errstate(invalid="ignore"):  # inf - inf, counted as equal by the first clause
        within = (actual == expected) | (np.abs(_widen(actual) - expected) <= bound)
    assert within.all(), f"{(~within).sum()} of {within.size} out of bounds, first {np.argwhere(~within)[0]}"


def _widen(x):
    return x.astype(np.promote_types(x.dtype, np.float64))
