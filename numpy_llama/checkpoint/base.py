"""What every reader of checkpoints offers, so that nobody else need know which one it is."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ..backend.formats import InPlace, StoredTensor
from ..config import ModelArgs
from ..errors import TokenizerError
from ..text.chat import ChatFormat, ChatTemplate, format_for
from ..text.tokenizer import Tokenizer
from .files import MappedFile


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `nbytes` bytes at `offset` of its file. `shape` is row-major, as NumPy's."""

    name: str
    type_name: str  # of quantize.FORMATS, or of a format that only its own file knows
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class Checkpoint(InPlace, ABC):
    """A model as it is handed around. Opening one reads headers; weights stay where they lie until used."""

    format: str  # what people call it, "GGUF" for example
    path: Path  # what the user named
    files: list[MappedFile]  # all that stay mapped
    tensors: Mapping[str, TensorInfo]  # what is in them, under their own names

    @cached_property
    @abstractmethod
    def args(self) -> ModelArgs:
        """The hyperparameters, held against the shapes of the weights."""

    @abstractmethod
    def weights(self) -> dict[str, StoredTensor]:
        """Every weight under our name; nothing is missing, too many, or of another shape."""

    def holders(self) -> dict[str, Path]:
        """The file that holds each weight, under our name; of a weight in several files there is none."""
        return {}

    @abstractmethod
    def tokenizer_path(self) -> Path:
        """The file that holds the vocabulary; a TokenizerError where there is none."""

    @abstractmethod
    def read_tokenizer(self) -> Tokenizer: ...

    @cached_property
    def _tokenizer(self) -> Tokenizer:
        return self.read_tokenizer()

    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    def chat_template(self) -> str | None:
        """The Jinja template that came with the model."""
        return None

    def chat_format(self) -> ChatFormat | None:
        """How a conversation is written: by the model's own template, or as Meta does with such tokens."""
        source = self.chat_template()
        return format_for(self.tokenizer()) if source is None else ChatTemplate(source)

    def beside(self) -> list[Path]:
        """Whatever else belongs to the model: of a folder all that is in it, of a file its tokenizer."""
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
        """A file that is cut while it is mapped will end the process with one line, not by a signal."""
        from ..backend.kernels import watch

        for file in self.files:
            watch(file.map, str(file.path))
