"""Inputs of samplers for laws and tests: logits of every kind, and a generator with given numbers."""

import numpy as np
from hypothesis import strategies as st

from ..config import Array
from .laws import seeds

# The error of probabilities of float32 logits: exp magnifies the rounding of x / T, which is about 30 at
# most.
PROBABILITY = 1e-6
# A probability this close to the limit of top-p or min-p may be on either side of it.
EDGE = 1e-6


@st.composite
def all_logits(draw: st.DrawFn, distinct: bool = False) -> Array:
    """(V,) float32, flat or steep. With ties and filtered ids, unless `distinct`."""
    rng, V = np.random.default_rng(draw(seeds)), draw(st.integers(1, 60))
    x = rng.normal(size=V) * draw(st.sampled_from([1, 5, 0.1]))
    if not distinct and draw(st.booleans()):
        x = np.round(x)
    x = x.astype(np.float32)
    if not distinct and draw(st.booleans()):
        x[rng.random(V) < 0.3] = -np.inf
        x[rng.integers(V)] = 1
    return x


class Fixed:
    """A generator whose next numbers are known: `sample` takes one, by `random()`."""

    def __init__(self, *values: float):
        self.values = list(values)

    def __repr__(self) -> str:
        return f"a generator whose random() is next {self.values}"

    def random(self) -> float:
        return self.values.pop(0)
