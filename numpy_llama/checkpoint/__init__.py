"""Checkpoints: one reader for each format, one table of names, one function that opens them.

`open_checkpoint` chooses the reader by a file's content, never by its name.
"""

from fnmatch import fnmatch
from pathlib import Path

from ..errors import FormatError, escape
from ..text.tokenizer import Tokenizer
from . import not_models
from .base import Checkpoint
from .files import MappedFile
from .gguf.file import HEADER_BYTES, MAGICS
from .gguf.model import GGUFCheckpoint
from .huggingface import HuggingFaceCheckpoint
from .llama2c import Llama2cCheckpoint, looks_like_llama2c
from .meta import MetaCheckpoint
from .other_models import other_folder
from .tokenizers import find_tokenizer, open_tokenizer, tokenizer_of_folder


def open_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint at `path`. A folder is recognized by its files, a file by its first bytes."""
    if path.is_dir():
        return MetaCheckpoint(path) if is_meta(path) else HuggingFaceCheckpoint(path)
    file = MappedFile(path, "a model", HEADER_BYTES)
    head, size = bytes(file.map[: not_models.HEAD_BYTES]), file.size
    file.refuse_mistaken(not_models.WANTED)
    del file  # the reader maps it again, and address space may be scarce (ulimit -v)
    if head[:4] in MAGICS or b"GGUF".startswith(head):
        return GGUFCheckpoint(path)
    if looks_like_llama2c(head[:256], size):
        return Llama2cCheckpoint(path)
    if known := not_models.described(head):
        raise FormatError(f"{path} holds {known}")
    if looks_like_llama2c(head[:256], None):
        return Llama2cCheckpoint(path)  # it raises an error with both sizes
    raise FormatError(f"{path} begins with {escape(head[:16])}, as no model does; {not_models.OTHER}")


def is_meta(folder: Path, must_be_model: bool = True) -> bool:
    """Whether a folder is Meta's and not Hugging Face's, by its file of hyperparameters."""
    try:
        names = {entry.name for entry in folder.iterdir()}
    except OSError as error:
        raise FormatError(f"{folder} cannot be read: {error.strerror}") from None
    if must_be_model and not names & {"params.json", "config.json"}:
        if "adapter_config.json" in names:
            raise FormatError(f"{folder} holds an adapter (LoRA): {not_models.ADAPTER}")
        if known := other_folder(names):
            raise FormatError(f"{folder} holds {known}")
        if ggufs := sorted(name for name in names if name.lower().endswith(".gguf")):
            raise FormatError(f"{folder} holds GGUF files: name one of them, such as {folder / ggufs[0]}")
        found = ", ".join(escape(name, 40) for name in sorted(names)[:5]) or "nothing"
        wanted = "a folder with params.json (Meta) or config.json (Hugging Face)"
        raise FormatError(f"{folder} is a folder that holds {found}; wanted {wanted}, or a file's name")
    has_weights = any(fnmatch(name, "consolidated.*.pth") for name in names)
    return "params.json" in names and ("config.json" not in names or has_weights)


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a model, or of a file or folder without weights."""
    if path.is_dir():
        return open_tokenizer(find_tokenizer(path)) if is_meta(path, False) else tokenizer_of_folder(path)
    if path.is_file() and path.stat().st_size:
        file = MappedFile(path, "a tokenizer or a model")
        if looks_like_llama2c(bytes(file.map[:256]), file.size):
            return Llama2cCheckpoint(path).tokenizer()
    return open_tokenizer(path)
