"""The operations of a matrix that is cut for several ranks, as chapter 21 of the course asks for them.

`cut` is in parallel/cut.py. `linear` is an argument, because its order of sums decides the bits.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from ..config import Array
from ..parallel.cut import Cuts, Plan
from .tiny import TINY

Linear = Callable[[Array, Array], Array]


def cut_heads(n_heads: int, n_kv_heads: int, shares: Sequence[float]) -> tuple[Cuts, Cuts]:
    """The query heads and the key heads of each rank, as the model is cut."""
    plan = Plan.of(replace(TINY, n_heads=n_heads, n_kv_heads=n_kv_heads), shares)
    return plan.heads, plan.kv_heads


def linear_by_rows(x: Array, w: Array, cuts: Cuts, linear: Linear) -> Array:
    """The union of the row parts: (..., IN), (OUT, IN) -> (..., OUT). `cuts` are of OUT."""
    return np.concatenate([linear(x, w[part]) for part in cuts], axis=-1)


def linear_by_columns(x: Array, w: Array, cuts: Cuts, linear: Linear) -> Array:
    """The sum of the column parts, in the order of the ranks. `cuts` are of IN."""
    first, *others = [linear(x[..., part], w[:, part]) for part in cuts]
    return sum(others, first)
