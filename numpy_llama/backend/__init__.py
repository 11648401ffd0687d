"""The backends: functional.py in NumPy, and the C kernels that tests hold equal to it.

kernels.py         the C twins of `linear` and `attention`, and the weights they take
fused.py           a whole transformer block in one C call
interruptible.py   NumPy's `linear` and `attention` in short calls, for Ctrl-C
formats.py         the weight formats, read and written in NumPy
limits.py          the CPUs and threads that this process may use
"""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from ..config import ModelArgs
from ..errors import ParameterError, UnsupportedError, escape
from ..model import Transformer
from . import interruptible
from .formats import StoredTensor

Progress = Callable[[str, int, int], None]  # the step that runs, bytes done, bytes in all
Made = TypeVar("Made")


def check_options(dtype: DTypeLike | None, backend: str) -> None:
    """ParameterError for options with which no model can be built."""
    try:
        known = dtype is None or np.dtype(dtype) in (np.float32, np.float64)
    except (TypeError, ValueError):  # no dtype at all
        known = False
    if not known:
        raise ParameterError(f"dtype is {escape(dtype, 60)}, it must be None, float32 or float64")
    if not isinstance(backend, str) or backend not in ("c", "numpy"):
        raise ParameterError(f"backend is {escape(backend, 60)}, it must be 'c' or 'numpy'")


def build(
    args: ModelArgs,
    weights: Mapping[str, StoredTensor],
    dtype: DTypeLike | None = None,
    backend: str = "c",
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
    exact: bool = False,
    activation_bits: int = 8,
) -> Transformer:
    """The model on one backend: its `linear` and `attention` are functional.py's or their C twins.

    Weights are used in place, in the mapped file, if the backend can do so. The kernels pack the rows of
    block formats that are not packed yet. `progress` counts the bytes of all others.
    """
    check_options(dtype, backend)
    if backend == "numpy":
        expanded = _each(weights, lambda w: w.dequantize(dtype or np.float32), progress)
        return Transformer(args, expanded, interruptible.linear, interruptible.attention)
    if dtype is not None and np.dtype(dtype) == np.float64:
        raise UnsupportedError("the C kernels compute in float32; for float64 choose backend='numpy'")

    from .fused import fuse  # imported here, because the NumPy backend runs without the C extension
    from .kernels import Kernels, KernelWeight

    kernels, kept = Kernels(threads, exact, activation_bits), cache_dtype(backend, dtype, exact)
    table = weights["tok_embeddings.weight"]  # only its rows are used, unless it is the output's weight too
    only_rows = table is not weights["output.weight"]

    def prepare(w: StoredTensor) -> np.ndarray | StoredTensor | KernelWeight:
        if len(w.shape) == 1:
            return w.dequantize()
        stored = w if dtype is None else StoredTensor.quantize(w.dequantize(), "F32")
        return stored.realize() if w is table and only_rows else KernelWeight(stored, kernels.threads)

    model = Transformer(args, _each(weights, prepare, progress), kernels.linear, kernels.attention, kept)
    return fuse(model, kernels)


def _each(
    weights: Mapping[str, StoredTensor], make: Callable[[StoredTensor], Made], progress: Progress
) -> dict[str, Made]:
    """Apply `make` to every weight, once to a weight with two names: a tied embedding."""
    different = {id(w): w for w in weights.values()}
    total, done, made = sum(w.nbytes for w in different.values()), 0, dict[int, Made]()
    for key, w in different.items():
        if not w.in_place or w.format.block > 1:  # the others are used as they lie in the file
            progress("loading", done, total)
        made[key] = make(w)
        done += w.nbytes
    return {name: made[id(w)] for name, w in weights.items()}


def cache_dtype(backend: str, dtype: DTypeLike | None, exact: bool) -> np.dtype[Any]:
    """The dtype of the KV cache: float16 if only the C kernels read it."""
    return np.dtype(np.float16 if backend == "c" and dtype is None and not exact else dtype or np.float32)
