"""How far two right results may differ, each bound with its reason. u is the unit roundoff: half an ulp of 1.

A sum has a sure bound, `g`, and a smaller probable one, `g_probable`. The laws use the sure bound, because
their sums are short. `verify` uses the probable one: at K = 14336 the sure bound is a tenth of a usual
result, and a real fault would pass.

A result beyond its bound is a `Miss`. It keeps both sides for the report.
"""

import math
from dataclasses import is_dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike

from ..config import Array

U32 = 2.0**-24
U64 = 2.0**-53

# Two ways to compute one formula in float64: rounding is far below this, and every real fault far above it.
EXACT_64 = 1e-12

# A whole tiny model in float64: the rounding of EXACT_64 grows through the layers and the output's sums.
MODEL_64 = 1e-11

# A whole tiny model in float32, relative to the largest logit: the bounds of its sums, added over layers.
MODEL_32 = 5e-6

# The gradients of a whole tiny model, relative to the largest of each weight: rounding of the forward pass,
# and again on the way back. Measured on the models of tiny.GENERATIONS: 4e-15 and 2.4e-6.
GRADIENT_64 = 1e-12
GRADIENT_32 = 2e-5

# A prompt in chunks against the prompt at once: BLAS sums in another order for another shape.
CHUNKS_64 = 1e-12
CHUNKS_32 = 1e-5

# exp of a float32. Measured: NumPy errs by 3.6 u at most.
EXP_32 = 4 * U32

# Rounding to float16 changes a number by 2^-11 of it at most.
U16 = 2.0**-11

# K roundings exceed LAMBDA sqrt(K) u with a chance of 2 exp(-LAMBDA^2 / 2): 4e-22.
LAMBDA = 10.0

# NumPy's default dtypes: the report names any other.
USUAL = (np.float64, np.int64, np.complex128, np.bool_)


def unit(dtype: DTypeLike) -> float:
    """The unit roundoff of a dtype."""
    return float(np.finfo(dtype).eps) / 2


def g(K: int, L: int = 1, u: float = U32) -> float:
    """The sure bound: a dot product of length K in L partial sums errs by at most g * sum |a_i b_i|.

    Each partial sum takes ceil(K / L) roundings, joining them log2 L, the products and slack three.
    """
    return (math.ceil(K / L) + math.log2(L) + 3) * u


def g_probable(K: int, u: float = U32) -> float:
    """The probable bound: two dot products of length K differ by at most g_probable * |a| |b|, in any order.

    Roundings go up and down, so K of them seldom add up to more than LAMBDA sqrt(K) u (Higham & Mary 2019).
    Sixteen more are slack.
    """
    return (LAMBDA * math.sqrt(K) + 16) * u


class Miss(AssertionError):
    """A result that is beyond its bound."""

    def __init__(self, actual: object, expected: object, why: str):
        alike = shown(actual) == shown(expected)  # they differ in later digits only
        self.gave, self.wanted, self.why = shown(actual, alike), shown(expected, alike), why
        super().__init__(f"{why}\n  gave   {self.gave}\n  wanted {self.wanted}")


def shown(x: object, every_digit: bool = False) -> str:
    """A number or an array as text. A large array is cut to its ends."""
    if isinstance(x, dict):
        return f"{len(x)} named arrays"
    if type(x) is tuple:
        return ",\n".join(shown(part, every_digit) for part in x)
    if is_dataclass(x):
        return f"a {type(x).__name__}"
    if isinstance(x, np.ndarray) and x.size:
        digits: dict[str, Any] = {"floatmode": "unique"} if every_digit else {"precision": 8}
        text = np.array2string(x, **digits, threshold=16, edgeitems=2, max_line_width=88, separator=", ")
        plain = x.size <= 6 and x.ndim < 3 and x.dtype in USUAL
        return text if plain else f"{text}, {x.dtype} of shape {x.shape}"
    return f"an empty array of shape {x.shape}" if isinstance(x, np.ndarray) else repr(x)


def assert_same(actual: ArrayLike, expected: ArrayLike) -> None:
    """Equal to the last bit. But -0 equals 0, and any NaN equals any NaN."""
    actual, expected = _alike(actual, expected)
    equal = actual == expected
    if actual.dtype.kind in "fc":
        equal |= np.isnan(actual) & np.isnan(expected)
    if not equal.all():
        raise Miss(actual, expected, f"{_count(equal)} not the same to the last bit")


def assert_near(actual: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    """|actual - expected| <= tolerance * the largest |expected|. For results that are sums of many terms."""
    actual, expected = _alike(actual, expected)
    error = np.abs(_widen(actual) - expected).max(initial=0)
    allowed = tolerance * np.abs(expected).max(initial=0)
    if not error <= allowed:
        raise Miss(actual, expected, f"off by {error:.3g}, {allowed:.3g} allowed")


def assert_within(actual: ArrayLike, expected: ArrayLike, bound: ArrayLike) -> None:
    """|actual - expected| <= bound, element by element. Equal infinities are equal; NaN never passes."""
    actual, expected = _alike(actual, expected)
    with np.errstate(invalid="ignore"):  # inf - inf; the first clause counts them as equal
        error = np.abs(_widen(actual) - expected)
        within = (actual == expected) | (error <= bound)
    if not within.all():
        worst = tuple(np.argwhere(~within)[0])
        allowed = np.broadcast_to(bound, within.shape)[worst]
        where = f", first at {[int(i) for i in worst]}" if worst else ""
        raise Miss(
            actual, expected, f"{_count(within)} off{where} by {error[worst]:.3g}, {allowed:.3g} allowed"
        )


def assert_close_on_average(actual: ArrayLike, expected: ArrayLike, tolerance: float) -> None:
    """The error's root mean square <= tolerance * the root mean square of `expected`.

    Roundings go up and down, so their mean stays far below a bound for the worst case.
    """
    actual, expected = _alike(actual, expected)
    error = np.sqrt(np.mean((_widen(actual) - expected) ** 2))
    allowed = tolerance * np.sqrt(np.mean(np.asarray(expected) ** 2))
    if not error <= allowed:
        raise Miss(actual, expected, f"off by {error:.3g} on average, {allowed:.3g} allowed")


def _count(fine: Array) -> str:
    """The subject of a sentence on the wrong numbers: "3 of 8 numbers are", for a single number "it is"."""
    wrong = np.size(fine) - np.count_nonzero(fine)
    return "it is" if np.size(fine) == 1 else f"{wrong} of {np.size(fine)} numbers are"


def _alike(actual: ArrayLike, expected: ArrayLike) -> tuple[Array, Array]:
    actual, expected = np.asarray(actual), np.asarray(expected)
    if actual.shape != expected.shape:
        raise Miss(actual, expected, f"the shape is {actual.shape}, it should be {expected.shape}")
    return actual, expected


def _widen(x: Array) -> Array:
    return x.astype(np.promote_types(x.dtype, np.float64))
