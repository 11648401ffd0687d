"""The parts of a law: `law` names its operations, a `Source` gives it numbers.

    @law("rms_norm", sources, sizes)
    def test_the_sign_goes_through(ops, source, D):
        \"\"\"rms_norm(-x) = -rms_norm(x).\"\"\"
        x, weight = source.array(3, D), source.array(D)
        assert_same(ops.rms_norm(-x, weight, 1e-5), -ops.rms_norm(x, weight, 1e-5))

plugin.py runs each law on every implementation that has those operations. Hypothesis draws shapes and a seed,
not elements. There are two kinds of numbers. With small whole numbers every product and sum is exact in any
order, so rounding cannot hide an error of indexing. The other kind is normal numbers. If a law fails on
both kinds, the report shows whole numbers.
"""

import functools
import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import ArrayLike

from .implementations import Implementation

# The number of examples for each law. HYPOTHESIS_PROFILE chooses, as it does in tests/.
PROFILES = {
    name: settings(
        max_examples=examples,
        derandomize=name == "ci",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        report_multiple_bugs=False,  # one failure at a time
    )
    for name, examples in {"dev": 50, "few": 12, "ci": 100, "nightly": 10_000}.items()
}
_profile = os.environ.get("HYPOTHESIS_PROFILE", "dev")
PROFILE = PROFILES.get(_profile) or settings.get_profile(_profile)

Law = Callable[..., None]


class NotWritten(BaseException):
    """An operation is a stub. It is no Exception, because Hypothesis would look for a smaller input."""


class Source:
    """Random numbers in the precision of the tested implementation. The same seed gives the same numbers."""

    def __init__(self, seed: int, exact: bool):
        self.seed, self.exact = seed, exact
        self.dtype: np.dtype[Any] = np.dtype(np.float64)
        self.rng = np.random.default_rng(seed)

    def __repr__(self) -> str:
        return f"Source({self.seed}, exact={self.exact})"

    def array(self, *shape: int) -> np.ndarray:
        """Whole numbers of -8..8, or normal numbers."""
        if self.exact:
            return self.rng.integers(-8, 9, shape).astype(self.dtype)
        return self.rng.standard_normal(shape).astype(self.dtype)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(self.dtype)

    def positive(self, *shape: int) -> np.ndarray:
        """Numbers well above 0: the weights of a norm."""
        if self.exact:
            return self.rng.integers(1, 9, shape).astype(self.dtype)
        return self.rng.uniform(0.5, 1.5, shape).astype(self.dtype)

    def ids(self, below: int, *shape: int) -> np.ndarray:
        return self.rng.integers(below, size=shape)

    def permutation(self, n: int) -> np.ndarray:
        return self.rng.permutation(n)


seeds = st.integers(0, 2**32 - 1)
sources = st.builds(Source, seeds, st.sampled_from([True, False]))
sizes = st.one_of(st.integers(1, 9), st.sampled_from([15, 16, 17, 31, 32, 33, 63, 64, 65]))
small_sizes = st.integers(1, 5)
even_sizes = st.integers(1, 32).map(lambda half: 2 * half)


def law(needs: str, *strategies: st.SearchStrategy[Any], share: float = 1) -> Callable[[Law], Law]:
    """A law about the operations `needs`, by name. Without strategies it runs once, else on many examples.

    A name may contain a parameter of the test, "quantize_{format}". `share`: the part of the profile's
    examples that an expensive law runs on.
    """
    profile = settings(PROFILE, max_examples=round(PROFILE.max_examples * share))

    def decorate(test: Law) -> Law:
        @functools.wraps(test)
        def example(ops: Implementation, *drawn: object, **named: object) -> None:
            ops.calls.clear()
            for source in (*drawn, *named.values()):
                if isinstance(source, Source):
                    source.dtype = ops.dtype
            try:
                test(ops, *drawn, **named)
            except NotImplementedError as error:
                raise NotWritten from error

        tried = profile(given(*strategies)(example)) if strategies else example
        return pytest.mark.numpy_llama_law(*needs.split())(tried)

    return decorate


def assert_that(holds: ArrayLike, failure: str) -> None:
    """A law that is no equation. `failure` describes how it fails."""
    if not np.all(holds):
        raise AssertionError(failure)


def assert_refused(call: Callable[[], object], what: str) -> None:
    """An error of any class must be raised."""
    try:
        call()
    except NotImplementedError:
        raise  # a stub
    except Exception:
        return
    raise AssertionError(f"{what} should be refused with an error")
