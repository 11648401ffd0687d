"""The interface of all readers of checkpoints: other rooms use it, and no reader by itself."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from ..backend.formats import InPlace, StoredTensor
from ..config import LIMITS, ModelArgs
from ..errors import BuildError, ConfigError, TokenizerError, escape
from ..text.chat import ChatFormat, ChatTemplate, format_for
from ..text.tokenizer import Tokenizer
from .files import MappedFile
from .names import hf_rows, rows_in_fused


@dataclass(frozen=True)
class TensorInfo:
    """The place of a tensor: `nbytes` bytes at `offset` of its file. `shape` is row-major, as in NumPy."""

    name: str
    type_name: str  # a key of formats.FORMATS, or another type of the file's own format
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint(InPlace, ABC):
    """A model's files. Opening them reads only the headers. Weights stay in the files until they are used."""

    format: str  # the usual name of the format, for example "GGUF"
    path: Path  # the file or folder that the user named
    files: list[MappedFile]  # all that stay mapped
    tensors: Mapping[str, TensorInfo]  # their tensors, under the names in the files

    @cached_property
    @abstractmethod
    def args(self) -> ModelArgs:
        """The hyperparameters, checked against the shapes of the weights."""

    @abstractmethod
    def weights(self) -> dict[str, StoredTensor]:
        """Every weight under our name. A missing or unknown weight, or another shape, is an error."""

    def holders(self) -> dict[str, Path]:
        """The file that holds each weight, under our name. A weight in several files is left out."""
        return {}

    @abstractmethod
    def tokenizer_path(self) -> Path:
        """The file with the vocabulary. If there is none, a TokenizerError."""

    @abstractmethod
    def read_tokenizer(self) -> Tokenizer: ...

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.read_tokenizer().within(self.args.vocab_size)

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def chat_template(self, name: str = "default") -> str | None:
        """The Jinja template that came with the model: "default", or "tool_use" if tools are given."""
        return None

    def chat_format(self) -> ChatFormat | None:
        """The format of a conversation: the model's own template, or Meta's format for its control tokens."""
        source = self.chat_template()
        return (
            format_for(self.tokenizer())
            if source is None
            else ChatTemplate(source, self.chat_template("tool_use"))
        )

    def sampling_defaults(self) -> dict[str, Any]:
        """The options of `Sampler` that the model's authors recommend. A value of no use is left out."""
        return {}

    def beside(self) -> list[Path]:
        """Further files of the model: all files of its folder, or the tokenizer of a single file."""
        if self.path.is_dir():
            return list(self.path.iterdir())
        try:
            return [self.tokenizer_path()]
        except TokenizerError:
            return []

    def check_unchanged(self) -> None:
        """FileChangedError if a file has changed since it was opened."""
        for file in self.files:
            file.check_unchanged()

    def watch(self) -> None:
        """If a mapped file is cut, end the process with a message of one line and not with a signal.

        The watch is C code: without the extension there is none.
        """
        with suppress(BuildError):
            from ..backend.kernels import watch

            for file in self.files:
                watch(file.map, str(file.path))


class Header(Protocol):
    """A file's values by key: JsonFile and GGUFFile."""

    path: Path

    def get(self, key: str, kind: type, default: Any = None) -> Any: ...

    def require(self, key: str, kind: type) -> Any: ...


def size(header: Header, key: str, ours: str | None = None, default: int | None = None) -> int:
    """The whole number under `key`, at least 1; a ConfigError otherwise, or if it is absent without default.

    `ours` is the same size in ModelArgs: its limit in LIMITS holds.
    """
    value: int = header.require(key, int) if default is None else header.get(key, int, default)
    limit = LIMITS[ours] if ours else sys.maxsize
    if not 1 <= value <= limit:
        found = f"{key} is {escape(value, 60)}"
        raise ConfigError(f"{header.path}: {found}, it must be a whole number from 1 to {limit}")
    return value


def weight_in(
    tensor: StoredTensor, name: str, args: ModelArgs, half_split: bool, fused: bool = False
) -> StoredTensor:
    """The weight `name` of the tensor that holds it: its rows, in the model's order.

    Nothing is copied, and of a tensor that is made at each use no other rows are made.

    half_split: rows of wq and wk have Hugging Face's order. fused: some weights are rows of one tensor.
    """
    order = hf_rows(name, args) if half_split else None
    place = rows_in_fused(name, args) if fused else None
    if order is None and place is None:
        return tensor
    rows = slice(0, len(tensor)) if place is None else place[0]
    return tensor.part(rows, order)


def within(window: int, context: int) -> int | None:
    """The sliding window of a model of `context` positions; None if it hides no position."""
    return window if window < context else None
