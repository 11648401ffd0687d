"""Checkpoints: one reader a format, one table of names, one way in.

`open_checkpoint` looks at what a file holds, never at how it is called.
"""

from pathlib import Path

import numpy as np

from ..config import ModelArgs
from ..errors import ParameterError, UnsupportedError
from ..model import Transformer
from ..quantize import StoredTensor
from .base import Checkpoint
from .gguf_model import GGUFCheckpoint


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`, by what its first bytes say."""
    return GGUFCheckpoint(path)


def build(
    args: ModelArgs,
    weights: dict[str, StoredTensor],
    dtype=None,
    backend: str = "c",
    threads: int | None = None,
) -> Transformer:
    """Choose, once and from outside, what the model computes with: functional.py or its C twins."""
    if dtype is not None and np.dtype(dtype) not in (np.float32, np.float64):
        raise ParameterError(f"dtype is {dtype!r}, it must be None, float32 or float64")
    if backend == "numpy":
        return Transformer(args, {name: w.dequantize(dtype or np.float32) for name, w in weights.items()})
    if backend != "c":
        raise ParameterError(f"backend is {backend!r}, it must be 'c' or 'numpy'")
    if dtype is not None and np.dtype(dtype) == np.float64:
        raise UnsupportedError("the C kernels compute in float32; for float64 choose backend='numpy'")

    from ..kernels import Kernels, PackedWeight  # only here: the readable path runs without a compiler

    kernels = Kernels(threads)
    if dtype is not None:
        weights = {name: StoredTensor.quantize(w.dequantize(), "F32") for name, w in weights.items()}
    packed: dict[str, np.ndarray | PackedWeight] = {
        name: w.dequantize() if len(w.shape) == 1 else PackedWeight(w) for name, w in weights.items()
    }
    return Transformer(args, packed, kernels.linear, kernels.attention)
