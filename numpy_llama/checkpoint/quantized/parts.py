"""The rows of a weight in parts, on all CPUs: blocks of our formats from the tensors of a checkpoint."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from ...backend.formats import WEIGHTS_AT_ONCE, Format
from ...backend.limits import available_cpus
from ...config import Array


def made_rows(rows: slice, K: int, format: Format, make: Callable[[slice, Array], None]) -> Array:
    """The bytes of these rows of K weights: -> (rows, bytes a row). NumPy's copies run side by side.

    `make` gets parts of the rows and writes their bytes into an array (part, blocks, bytes a block). A part
    has about WEIGHTS_AT_ONCE weights, so temporary arrays stay small.
    """
    blocks = np.empty((rows.stop - rows.start, K // format.block, format.block_bytes), np.uint8)
    n = max(1, WEIGHTS_AT_ONCE // max(K, 1))
    parts = [slice(begin, min(begin + n, rows.stop)) for begin in range(rows.start, rows.stop, n)]

    def fill(part: slice) -> None:
        make(part, blocks[part.start - rows.start : part.stop - rows.start])

    if len(parts) < 2:
        for part in parts:
            fill(part)
    else:
        with ThreadPoolExecutor(min(available_cpus(), len(parts))) as threads:
            try:
                list(threads.map(fill, parts))
            except BaseException:  # Ctrl-C too
                threads.shutdown(cancel_futures=True)
                raise
    return blocks.reshape(len(blocks), -1)
