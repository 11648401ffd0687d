"""What a law is made of: `law` names the operations it is about, a `Source` gives it numbers.

    @law("rms_norm", sources, sizes)
    def test_the_sign_goes_through(ops, source, D):
        \"\"\"rms_norm(-x) = -rms_norm(x).\"\"\"
        x, weight = source.array(3, D), source.array(D)
        assert_same(ops.rms_norm(-x, weight, 1e-5), -ops.rms_norm(x, weight, 1e-5))

plugin.py runs each law on every implementation that has those operations. Shapes and a seed are drawn, not
elements, and numbers come in two kinds: small whole ones, with which a product or a sum is exact in whatever
order it is taken, so that an error of indexing has no rounding to hide in; and normal ones. Where both fail
you are shown the whole ones.
"""

import functools
import os
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

# How many examples a law is tried on: HYPOTHESIS_PROFILE chooses, as it does in tests/.
PROFILES = {
    name: settings(
        max_examples=examples,
        derandomize=name == "ci",
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
        report_multiple_bugs=False,  # one thing at a time
    )
    for name, examples in {"dev": 50, "few": 12, "ci": 300, "nightly": 10_000}.items()
}
_profile = os.environ.get("HYPOTHESIS_PROFILE", "dev")
PROFILE = PROFILES.get(_profile) or settings.get_profile(_profile)

Law = Callable[..., None]


class NotWritten(BaseException):
    """An operation is a stub. No Exception: of that Hypothesis would look for a smaller input."""


class Source:
    """Random numbers in the precision of the implementation on trial: the same ones for the same seed."""

    def __init__(self, seed: int, exact: bool):
        self.seed, self.exact, self.dtype = seed, exact, np.dtype(np.float64)
        self.rng = np.random.default_rng(seed)

    def __repr__(self) -> str:
        return f"Source({self.seed}, exact={self.exact})"

    def array(self, *shape: int) -> np.ndarray:
        """Whole numbers of -8..8, or normal ones; the same array each time it is asked for first."""
        if self.exact:
            return self.rng.integers(-8, 9, shape).astype(self.dtype)
        return self.rng.standard_normal(shape).astype(self.dtype)

    def normal(self, *shape: int) -> np.ndarray:
        return self.rng.standard_normal(shape).astype(self.dtype)

    def positive(self, *shape: int) -> np.ndarray:
        """Away from 0: the weights of a norm."""
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


def law(needs: str, *strategies: st.SearchStrategy, share: float = 1) -> Callable[[Law], Law]:
    """A law about the operations `needs`, by name, tried on whoever has them all: once, or on what is drawn.

    A name may hold a parameter of the test, "quantize_{format}". `share`: of the profile's number of
    examples, for what costs more than most.
    """
    so_many = settings(PROFILE, max_examples=round(PROFILE.max_examples * share))

    def decorate(test: Law) -> Law:
        @functools.wraps(test)
        def example(ops, *drawn, **named):
            ops.calls.clear()
            for source in (*drawn, *named.values()):
                if isinstance(source, Source):
                    source.dtype = ops.dtype
            try:
                test(ops, *drawn, **named)
            except NotImplementedError as error:
                raise NotWritten from error

        tried = so_many(given(*strategies)(example)) if strategies else example
        return pytest.mark.numpy_llama_law(*needs.split())(tried)

    return decorate


def assert_that(holds, words: str) -> None:
    """A law that is no equation; `words` say what does not hold."""
    if not np.all(holds):
        raise AssertionError(words)


def assert_refused(call: Callable[[], object], what: str) -> None:
    """That some error is raised, whatever its class."""
    try:
        call()
    except NotImplementedError:
        raise  # what is not written yet refuses nothing
    except Exception:
        return
    raise AssertionError(f"{what} should be refused with an error")
