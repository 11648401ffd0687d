"""How far two results may lie apart, each with its reason. u is the unit roundoff: half an ulp of 1.

A result beyond its bound is a `Miss`, which remembers both sides, so that the report can show them.
"""

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

# exp of a float32. Measured: NumPy errs by 3.6 u at most.
EXP_32 = 4 * U32

# The value after rounding to float16 lies within 2^-11 of it, relatively.
U16 = 2.0**-11

# What an array is made of if one asks for nothing else: any other kind is told.
USUAL = (np.float64, np.int64, np.complex128, np.bool_)


def unit(dtype) -> float:
    """The unit roundoff of a dtype."""
    return float(np.finfo(dtype).eps) / 2


def g(K: int, L: int = 1, u: float = U32) -> float:
    """A dot product of length K in L partial sums errs by at most g * sum |a_i b_i|.

    Each partial sum takes ceil(K / L) roundings, joining them log2 L, the products and slack three.
    """
    return (math.ceil(K / L) + math.log2(L) + 3) * u


class Miss(AssertionError):
    """A result that is not what it should be."""

    def __init__(self, actual, expected, why: str):
        alike = shown(actual) == shown(expected)  # but for digits that are not shown usually
        self.gave, self.wanted, self.why = shown(actual, alike), shown(expected, alike), why
        super().__init__(f"{why}\n  gave   {self.gave}\n  wanted {self.wanted}")


def shown(x, every_digit: bool = False) -> str:
    """A number or an array as a person wants to see it; of a large one, its ends."""
    if isinstance(x, dict):
        return f"{len(x)} named arrays"
    if isinstance(x, np.ndarray) and x.size:
        digits: dict = {"floatmode": "unique"} if every_digit else {"precision": 8}
        text = np.array2string(x, **digits, threshold=16, edgeitems=2, max_line_width=88, separator=", ")
        plain = x.size <= 6 and x.ndim < 3 and x.dtype in USUAL
        return text if plain else f"{text}, {x.dtype} of shape {x.shape}"
    return f"an empty array of shape {x.shape}" if isinstance(x, np.ndarray) else repr(x)


def assert_same(actual, expected) -> None:
    """Equal to the last bit; but -0 equals 0, and any NaN any NaN."""
    actual, expected = _alike(actual, expected)
    equal = actual == expected
    if actual.dtype.kind in "fc":
        equal |= np.isnan(actual) & np.isnan(expected)
    if not equal.all():
        raise Miss(actual, expected, f"{_count(equal)} not the same to the last bit")


def assert_near(actual, expected, tolerance: float) -> None:
    """|actual - expected| <= tolerance * the largest |expected|: for results that are sums of many terms."""
    actual, expected = _alike(actual, expected)
    error = np.abs(_widen(actual) - expected).max(initial=0)
    allowed = tolerance * np.abs(expected).max(initial=0)
    if not error <= allowed:
        raise Miss(actual, expected, f"off by {error:.3g}, {allowed:.3g} allowed")


def assert_within(actual, expected, bound) -> None:
    """|actual - expected| <= bound, element by element. Equal infinities are equal; NaN never passes."""
    actual, expected = _alike(actual, expected)
    with np.errstate(invalid="ignore"):  # inf - inf, counted as equal by the first clause
        error = np.abs(_widen(actual) - expected)
        within = (actual == expected) | (error <= bound)
    if not within.all():
        worst = tuple(np.argwhere(~within)[0])
        allowed = np.broadcast_to(bound, within.shape)[worst]
        where = f", first at {[int(i) for i in worst]}" if worst else ""
        raise Miss(
            actual, expected, f"{_count(within)} off{where} by {error[worst]:.3g}, {allowed:.3g} allowed"
        )


def assert_close_on_average(actual, expected, tolerance: float) -> None:
    """The error's root mean square <= tolerance * the expected one's: what chance leaves of a bound."""
    actual, expected = _alike(actual, expected)
    error = np.sqrt(np.mean((_widen(actual) - expected) ** 2))
    allowed = tolerance * np.sqrt(np.mean(np.asarray(expected) ** 2))
    if not error <= allowed:
        raise Miss(actual, expected, f"off by {error:.3g} on average, {allowed:.3g} allowed")


def _count(fine) -> str:
    """ "3 of 8 numbers are", of those that are not fine; "it is" where there is but one."""
    wrong = np.size(fine) - np.count_nonzero(fine)
    return "it is" if np.size(fine) == 1 else f"{wrong} of {np.size(fine)} numbers are"


def _alike(actual, expected):
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise Miss(actual, expected, f"the shape is {actual.shape}, it should be {expected.shape}")
    return actual, expected


def _widen(x):
    return x.astype(np.promote_types(x.dtype, np.float64))
