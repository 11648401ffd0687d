"""Checkpoints: one reader a format, one table of names, one way in.

`open_checkpoint` looks at what a file holds, never at how it is called.
"""

from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from pathlib import Path

import numpy as np

from ..backend import interruptible
from ..backend.formats import StoredTensor
from ..backend.fused import fuse
from ..config import ModelArgs
from ..errors import FormatError, ParameterError, UnsupportedError, escape
from ..model import Transformer
from ..text.tokenizer import Tokenizer
from .base import Checkpoint, cache_dtype
from .files import MappedFile
from .gguf.file import HEADER_BYTES
from .gguf.model import GGUFCheckpoint
from .huggingface import HuggingFaceCheckpoint
from .llama2c import Llama2cCheckpoint, looks_like_llama2c
from .meta import MetaCheckpoint
from .tokenizers import find_tokenizer, open_tokenizer, tokenizer_of_folder

Progress = Callable[[str, int, int], None]  # what is being done, bytes done, bytes in all


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`: a folder by the files in it, a file by what it begins with."""
    if path.is_dir():
        return MetaCheckpoint(path) if is_meta(path) else HuggingFaceCheckpoint(path)
    file = MappedFile(path, "a model", HEADER_BYTES)
    head, size = bytes(file.map[:256]), file.size
    del file  # its reader will map it too, and address space may be scarce (ulimit -v)
    if looks_like_llama2c(head, size):
        return Llama2cCheckpoint(path)
    for looks_so, what in [
        (head.startswith(b"PK\x03\x04") or head.startswith(b"\x80\x02"), "PyTorch's weights"),
        (head[8:9] == b"{" and int.from_bytes(head[:8], "little") < size, "safetensors"),
        (head.startswith(b"{"), "JSON"),
    ]:
        if looks_so:
            wanted = "name its folder, with params.json (Meta) or config.json (Hugging Face) in it"
            raise FormatError(f"{path} holds {what}: {wanted}")
    return GGUFCheckpoint(path)


def is_meta(folder: Path, must_be_model: bool = True) -> bool:
    """Whether a folder is Meta's, not Hugging Face's, by the file that holds the hyperparameters."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise FormatError(f"{folder} cannot be read: {error.strerror}") from None
    if must_be_model and not names & {"params.json", "config.json"}:
        found = ", ".join(escape(name, 40) for name in sorted(names)[:5]) or "nothing"
        wanted = "a folder with params.json (Meta) or config.json (Hugging Face)"
        raise FormatError(f"{folder} is a folder that holds {found}; wanted {wanted}, or a file's name")
    has_weights = any(fnmatch(name, "consolidated.*.pth") for name in names)
    return "params.json" in names and ("config.json" not in names or has_weights)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model, or of a file or folder that holds nothing else; no weights are needed."""
    if path.is_dir():
        return open_tokenizer(find_tokenizer(path)) if is_meta(path, False) else tokenizer_of_folder(path)
    if path.is_file() and path.stat().st_size:
        file = MappedFile(path, "a tokenizer or a model")
        if looks_like_llama2c(bytes(file.map[:256]), file.size):
            return Llama2cCheckpoint(path).tokenizer()
    return open_tokenizer(path)


def build(
    args: ModelArgs,
    weights: Mapping[str, StoredTensor],
    dtype=None,
    backend: str = "c",
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
    exact: bool = False,
) -> Transformer:
    """Choose, once and from outside, what the model computes with: functional.py or its C twins.

    What need not be made anew stays where it lies; `progress` hears of the bytes of what must.
    """
    if dtype is not None and np.dtype(dtype) not in (np.float32, np.float64):
        raise ParameterError(f"dtype is {dtype!r}, it must be None, float32 or float64")
    if backend not in ("c", "numpy"):
        raise ParameterError(f"backend is {backend!r}, it must be 'c' or 'numpy'")
    if backend == "numpy":
        expanded = _each(weights, lambda w: w.dequantize(dtype or np.float32), progress)
        return Transformer(args, expanded, interruptible.linear, interruptible.attention)
    if dtype is not None and np.dtype(dtype) == np.float64:
        raise UnsupportedError("the C kernels compute in float32; for float64 choose backend='numpy'")

    from ..backend.kernels import (  # only here: the readable path runs without a compiler
        Kernels,
        KernelWeight,
    )

    def pack(w: StoredTensor) -> np.ndarray | KernelWeight:
        if len(w.shape) == 1:
            return w.dequantize()
        return KernelWeight(w if dtype is None else StoredTensor.quantize(w.dequantize(), "F32"))

    kernels, kept = Kernels(threads, exact), cache_dtype(backend, dtype, exact)
    model = Transformer(args, _each(weights, pack, progress), kernels.linear, kernels.attention, kept)
    return fuse(model, kernels)


def _each(weights: Mapping[str, StoredTensor], make: Callable, progress: Progress) -> dict:
    """Make something of every weight, and of one that has two names only once: a tied embedding."""
    different = {id(w): w for w in weights.values()}
    total, done, made = sum(w.nbytes for w in different.values()), 0, {}
    for key, w in different.items():
        if not w.in_place:
            progress("loading", done, total)
        made[key] = make(w)
        done += w.nbytes
    return {name: made[id(w)] for name, w in weights.items()}
