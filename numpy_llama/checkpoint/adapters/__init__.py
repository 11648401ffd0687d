"""LoRA adapters in files: PEFT's folder and llama.cpp's GGUF, read and written.

`open_adapter` chooses the reader by the content, as `open_checkpoint` does for models.
"""

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...backend import Progress
from ...backend.formats import StoredTensor
from ...config import ModelArgs
from ...errors import FormatError, ParameterError, escape
from ...lora import LowRank
from .. import hub, not_models
from ..files import MappedFile
from ..gguf.file import GGUFFile
from .base import Adapter as Adapter
from .gguf import GGUFAdapter
from .gguf import write_gguf as write_gguf
from .peft import CONFIG, PEFTAdapter
from .peft import write_peft as write_peft

WANTED = f"a folder of PEFT, with {CONFIG} in it, an adapter in GGUF, or hf:OWNER/REPO"


def open_adapter(path: Path) -> Adapter:
    """The adapter at `path`: a folder of PEFT, or a GGUF file."""
    if path.is_dir():
        return PEFTAdapter(path)
    file = MappedFile(path, WANTED)
    file.refuse_mistaken(WANTED)
    head = bytes(file.map[: not_models.HEAD_BYTES])
    if head[:4] == b"GGUF":
        return GGUFAdapter(path)
    if "adapter" in (known := not_models.described(head) or ""):
        raise FormatError(f"{path} is a file of an adapter: name its folder")
    raise FormatError(f"{path} holds {known or escape(head[:16])}; wanted {WANTED}")


def is_adapter(path: Path) -> bool:
    """Whether a folder or a GGUF file holds an adapter, and not a model."""
    if path.is_dir():
        return os.path.lexists(path / CONFIG) and not os.path.lexists(path / "config.json")
    if not path.is_file() or MappedFile(path, WANTED).map[:4] != b"GGUF":
        return False
    return GGUFFile(path).metadata.get("general.type") == "adapter"


def scaled(text: str | os.PathLike[str]) -> tuple[Path, float]:
    """PATH, or PATH:FACTOR as llama.cpp's --lora-scaled takes it: -> the path and the factor."""
    path = os.fspath(text)
    before, _, number = path.rpartition(":")
    try:
        is_path = not before or Path(path).expanduser().exists()
        factor = 1.0 if is_path else float(number)
        found = Path(path if is_path else before).expanduser()
    except ValueError:  # no number behind the colon
        return Path(path), 1.0
    except (OSError, RuntimeError) as error:  # a name too long, a user who does not exist
        reason = error.strerror if isinstance(error, OSError) else error
        raise FormatError(f"{escape(path)} cannot be looked at: {reason}") from None
    if not math.isfinite(factor):
        raise ParameterError(f"{escape(path)}: the factor is {factor}, it must be a finite number")
    return found, factor


def _is_path(value: object) -> bool:
    return isinstance(value, str | os.PathLike) and isinstance(os.fspath(value), str)


def locate_adapters(
    given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None, progress: Progress
) -> list[tuple[Path, float]]:
    """The path and the factor of each adapter that was given. One of the Hub is fetched if it is missing."""
    paths = [] if given is None else [given] if isinstance(given, str | os.PathLike) else given
    if not isinstance(paths, list | tuple) or not all(map(_is_path, paths)):
        raise ParameterError(f"adapter is {escape(given, 60)}, it must be a path or a list of paths")
    found = []
    for path, factor in map(scaled, paths):
        on_the_hub = (name := os.fspath(path)).startswith(hub.PREFIX)
        found.append((hub.fetch(name, progress, "adapter") if on_the_hub else path, factor))
    return found


def updates_of(
    adapter: Adapter, factor: float, args: ModelArgs, weights: Mapping[str, StoredTensor]
) -> dict[str, LowRank]:
    """An adapter's updates times a factor, for a model of these arguments and weights."""
    adapter.check_copies(weights)
    updates = adapter.low_ranks(args)
    return {name: one._replace(scale=factor * one.scale) for name, one in updates.items()}


def read_adapters(
    given: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None,
    args: ModelArgs,
    weights: Mapping[str, StoredTensor],
    progress: Progress,
) -> list[dict[str, LowRank]]:
    """The updates of each adapter that was given, for a model of these arguments and weights."""
    located = locate_adapters(given, progress)
    return [updates_of(open_adapter(path), factor, args, weights) for path, factor in located]
