"""The backends: functional.py in NumPy, and the C kernels that tests hold equal to it.

kernels.py         the C twins of `linear` and `attention`, and the weights they take
training.py        the C twins of the gradients
fused.py           neighbouring transformer blocks in one C call
quantized_cache.py a KV cache of 8 bits
interruptible.py   NumPy's `linear` and `attention` in short calls, for Ctrl-C
formats.py         the weight formats, read and written in NumPy
limits.py          the CPUs and threads that this process may use
signals.py         places where Ctrl-C and other signals wait
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import DTypeLike

from ..cache import KVCache
from ..config import ModelArgs
from ..errors import ParameterError, UnsupportedError, escape
from ..lora import LowRank, adapted
from ..model import Transformer
from ..window import WindowKVCache
from . import interruptible
from .formats import StoredTensor
from .quantized_cache import QuantizedKVCache, QuantizedWindowKVCache

Progress = Callable[[str, int, int], None]  # the step that runs, bytes done, bytes in all
Made = TypeVar("Made")


def check_options(
    dtype: DTypeLike | None, backend: str, exact: bool = False, cache_dtype: str | None = None
) -> None:
    """ParameterError for options with which no model can be built."""
    try:
        known = dtype is None or np.dtype(dtype) in (np.float32, np.float64)
    except (TypeError, ValueError):  # no dtype at all
        known = False
    if not known:
        raise ParameterError(f"dtype is {escape(dtype, 60)}, it must be None, float32 or float64")
    if not isinstance(backend, str) or backend not in ("c", "numpy"):
        raise ParameterError(f"backend is {escape(backend, 60)}, it must be 'c' or 'numpy'")
    if cache_dtype is not None and not (isinstance(cache_dtype, str) and cache_dtype == "q8"):
        raise ParameterError(f"cache_dtype is {escape(cache_dtype, 60)}, it must be None or 'q8'")
    if cache_dtype is not None and exact:
        raise ParameterError(
            "cache_dtype is 'q8', but exact keeps keys and values in float32: leave out one of them"
        )


def build(
    args: ModelArgs,
    weights: Mapping[str, StoredTensor],
    dtype: DTypeLike | None = None,
    backend: str = "c",
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
    exact: bool = False,
    activation_bits: int = 8,
    cache_dtype: str | None = None,
    adapters: Sequence[Mapping[str, LowRank]] = (),
    part_of: Callable[[Transformer, Any], Transformer] | None = None,
) -> Transformer:
    """The model on one backend: its `linear` and `attention` are functional.py's or their C twins.

    Weights are used in place, in the mapped file, if the backend can do so. The kernels pack the rows of
    block formats that are not packed yet. `progress` counts the bytes of all others.

    part_of: makes of the model and its Kernels, or None, the part of one rank: see parallel/.
    """
    check_options(dtype, backend, exact, cache_dtype)
    cache, kept = cache_of(args, backend, dtype, exact, cache_dtype)
    if backend == "numpy":
        expanded = _each(weights, lambda w: w.dequantize(dtype or np.float32), progress)
        model = Transformer(args, expanded, interruptible.linear, interruptible.attention, kept, cache)
        model = adapted(model, adapters, lambda x: x.astype(dtype or np.float32))
        return model if part_of is None else part_of(model, None)
    if dtype is not None and np.dtype(dtype) == np.float64:
        raise UnsupportedError("the C kernels compute in float32; for float64 choose backend='numpy'")

    from .fused import fuse  # imported here, because the NumPy backend runs without the C extension
    from .kernels import Kernels, KernelWeight

    kernels = Kernels(threads, exact, activation_bits)
    table = weights["tok_embeddings.weight"]  # only its rows are used, unless it is the output's weight too
    only_rows = table is not weights["output.weight"]

    def prepare(w: StoredTensor) -> np.ndarray | StoredTensor | KernelWeight:
        if len(w.shape) == 1:
            return w.dequantize()
        stored = w if dtype is None else StoredTensor.quantize(w.dequantize(), "F32")
        return stored.realize() if w is table and only_rows else KernelWeight(stored, kernels.threads)

    prepared = _each(weights, prepare, progress)
    model = Transformer(args, prepared, kernels.linear, kernels.attention, kept, cache)
    of_lora = Kernels(threads, exact=True).linear  # a token has the same bits in any number of tokens
    model = adapted(model, adapters, lambda x: KernelWeight(StoredTensor.quantize(x, "F32")), of_lora)
    return fuse(model, kernels) if part_of is None else part_of(model, kernels)


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


def cache_of(
    args: ModelArgs, backend: str, dtype: DTypeLike | None, exact: bool, cache_dtype: str | None
) -> tuple[type[KVCache], np.dtype[Any]]:
    """The class of the KV cache, and the dtype of its numbers: float16 if only the C kernels read it."""
    has_window = args.sliding_window is not None
    if cache_dtype is not None:
        return QuantizedWindowKVCache if has_window else QuantizedKVCache, np.dtype(dtype or np.float32)
    half = backend == "c" and dtype is None and not exact
    return WindowKVCache if has_window else KVCache, np.dtype(np.float16 if half else dtype or np.float32)
