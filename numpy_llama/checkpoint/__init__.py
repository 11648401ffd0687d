"""Checkpoints: one reader a format, one table of names, one way in.

`open_checkpoint` looks at what a file holds, never at how it is called.
"""

from functools import cached_property
from pathlib import Path

import numpy as np

from ..chat import ChatTemplate
from ..config import ModelArgs
from ..errors import ParameterError, UnsupportedError
from ..model import Transformer
from ..quantize import StoredTensor
from ..tokenizer import Tokenizer, tokenizer_from_gguf
from . import gguf, gguf_model
from .base import Checkpoint


class GGUFCheckpoint(Checkpoint):
    """A model in one GGUF file."""

    format = "GGUF"

    def __init__(self, path: Path):
        self.path = path
        self.file = gguf.GGUFFile(path)
        self.files, self.tensors = [self.file.file], self.file.tensors

    @cached_property
    def args(self) -> ModelArgs:
        return gguf_model.model_args(self.file)

    def weights(self) -> dict[str, StoredTensor]:
        return gguf_model.weights(self.file, self.args)

    def tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self.file.metadata, str(self.path))

    def chat_format(self) -> ChatTemplate | None:
        source = self.file.get("tokenizer.chat_template", str)
        return None if source is None else ChatTemplate(source)


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
