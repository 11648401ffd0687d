"""The rows that a step takes, computed from (seed, epoch, position): a resumed run needs nothing saved.

Step s takes the rows at the positions s * B ... s * B + B - 1 of an endless sequence. Epoch e of it is a
permutation of all rows, drawn from the seed (seed, e).
"""

from functools import lru_cache

import numpy as np

from ..config import Array
from ..errors import check_whole


class Order:
    """The order of `n_rows` rows in steps of `batch_size` rows, or of all rows if there are fewer."""

    def __init__(self, n_rows: int, batch_size: int, seed: int = 0):
        check_whole("the number of rows", n_rows, 1, 1 << 40)
        check_whole("batch_size", batch_size, 1, 1 << 40)
        check_whole("seed", seed, 0, (1 << 63) - 1)
        self.n_rows, self.batch_size, self.seed = n_rows, min(batch_size, n_rows), seed
        self._epoch = lru_cache(2)(self._permutation)

    def _permutation(self, epoch: int) -> Array:
        return np.random.default_rng((self.seed, epoch)).permutation(self.n_rows)

    def __call__(self, step: int) -> list[int]:
        """The numbers of the rows of one step."""
        first = step * self.batch_size
        places = (divmod(first + i, self.n_rows) for i in range(self.batch_size))
        return [int(self._epoch(epoch)[position]) for epoch, position in places]
