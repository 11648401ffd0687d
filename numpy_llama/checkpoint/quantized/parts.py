"""The rows of a weight in parts, on all CPUs: blocks of our formats from the tensors of a checkpoint."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ...backend.formats import WEIGHTS_AT_ONCE
from ...backend.limits import available_cpus


def each_part(shape: tuple[int, int], make: Callable[[slice], None], multiple: int = 2) -> None:
    """Call `make` with slices of the rows, until all are made. NumPy's copies run side by side.

    A part has a multiple of rows and about WEIGHTS_AT_ONCE weights, so temporary arrays stay small.
    """
    N, K = shape
    rows = max(1, WEIGHTS_AT_ONCE // max(K, 1) // multiple) * multiple
    parts = [slice(begin, min(begin + rows, N)) for begin in range(0, N, rows)]
    if len(parts) < 2:
        for part in parts:
            make(part)
        return
    with ThreadPoolExecutor(min(available_cpus(), len(parts))) as threads:
        try:
            list(threads.map(make, parts))
        except BaseException:  # Ctrl-C too
            threads.shutdown(cancel_futures=True)
            raise
