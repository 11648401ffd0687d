"""The rows of a step as arrays, in micro-batches that fit into memory."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np

from ..config import Array
from .examples import Row


@dataclass(frozen=True)
class Batch:
    """The examples of some rows, in their order. There is no padding.

    If all rows are of one length, each is a row of the arrays. Otherwise all lie one behind the other in one.
    """

    tokens: Array  # (B, T)
    targets: Array  # (B, T): the token that follows
    trained: Array  # (B, T) bool: the targets that are trained
    first: Array  # (B, T): the position in the row at which the example of a token begins
    starts: Array  # of each example, in the order of memory

    def sums(self, x: Array) -> Array:
        """The sum over the tokens of each example, in float64: (B, T) -> (examples,)."""
        return np.add.reduceat(x.reshape(-1), self.starts, dtype=np.float64)

    def spread(self, x: Array) -> Array:
        """The number of each example at all of its tokens: (examples,) -> (B, T)."""
        lengths = np.diff(self.starts, append=self.tokens.size)
        return np.repeat(x, lengths).reshape(self.tokens.shape)


def batch_of(rows: Sequence[Row]) -> Batch:
    """The arrays of these rows."""
    examples = [example for row in rows for example in row]
    lengths = np.array([len(example) for example in examples])
    starts = np.cumsum(lengths) - lengths
    widths = {sum(map(len, row)) for row in rows}
    shape = (len(rows), widths.pop()) if len(widths) == 1 else (1, lengths.sum())
    first = np.repeat(starts % shape[1], lengths)
    return Batch(
        np.concatenate([example.ids[:-1] for example in examples]).reshape(shape),
        np.concatenate([example.ids[1:] for example in examples]).reshape(shape),
        np.concatenate([example.trained for example in examples]).reshape(shape),
        first.reshape(shape),
        starts,
    )


def micro_batches(rows: Sequence[Row], most: int, n_ranks: int = 1) -> list[list[Row]]:
    """The rows in groups of at most `most` inputs each, or of one row that has more.

    They are few groups, about equally large: a whole number for each rank, unless a row would be cut.
    """
    for number in count(max(-(-inputs(rows) // (n_ranks * most)), 1)):
        groups = cut(rows, n_ranks * number)
        if all(len(group) == 1 or inputs(group) <= most for group in groups):
            break
    return groups


def cut(rows: Sequence[Row], n: int) -> list[list[Row]]:
    """The rows in n parts or fewer, about equally large. A row lies in the part that has its middle."""
    total, before, groups = inputs(rows), 0, dict[int, list[Row]]()
    for row in rows:
        size = inputs([row])
        groups.setdefault((2 * before + size) * n // (2 * total), []).append(row)
        before += size
    return [*groups.values()]


def inputs(rows: Sequence[Row]) -> int:
    return sum(len(example) for row in rows for example in row)


def targets(rows: Sequence[Row]) -> int:
    """The number of targets that are trained."""
    return sum(int(example.trained.sum()) for row in rows for example in row)
