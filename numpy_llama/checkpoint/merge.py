"""Adapters merged into their base: W + scale * B A in the place of W, as a new model.

The result is rounded to the format of the new file. A weight of a block format lies on the grid of that
format. If an update is smaller than the steps of the grid, rounding gives the old weight back. So the share
of the update that is left is measured before anything is written:

    M = W + delta        R = M, rounded        kept = sum (R - W) delta / sum delta^2

It is 1 if the update is there, whatever noise lies upon it, and 0 if the old weight is back. In float32 it
is 1. An update of 1% has 0 left in 4 bits. A weight that was not on the grid before keeps its update.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..backend import Progress
from ..backend.formats import FORMATS, Format, StoredTensor
from ..config import Array
from ..errors import FormatError, MismatchError, ParameterError, ResourceLimitError
from ..lora import LowRank
from .base import Checkpoint
from .convert import BYTES_AT_ONCE, DTYPES, convert, finite, target_format
from .files import part_beside, write_bytes
from .huggingface import TEMPLATES, HuggingFaceCheckpoint
from .names import tensor_names
from .safetensors_file import RUNNABLE
from .safetensors_write import write_safetensors

LEAST_KEPT = 0.5  # of an update
WELL_KEPT = 0.9
ROWS_MEASURED = 256  # of a weight: each has thousands of numbers
WIDER = ("q8", "bf16", "f16", "f32")  # the ways out, small files first
# The files of a folder that are not weights.
BESIDE = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model"),
    *("special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"),
    *(*TEMPLATES, "LICENSE", "LICENSE.txt"),
)


@dataclass(frozen=True)
class Rounding:
    """What rounding to a format does to the update of one weight."""

    name: str
    format: Format
    update: float  # its size, relative to the weight's
    rounding: float  # the difference that rounding makes, relative to the weight's size
    kept: float  # the share of the update that is left; 0 if the format cannot be written

    def __str__(self) -> str:
        size = f"the update is {100 * self.update:.2g}% of the weight"
        if self.format.quantize is None:
            return f"{self.name}: {size}, and {self.format.name} can be read but not written"
        left = f"rounding to {self.format.name} changes it by {100 * self.rounding:.2g}%"
        return f"{self.name}: {size}, {left}, and {max(self.kept, 0):.0%} of the update would be left"


def measured(name: str, w: StoredTensor, update: LowRank, format: Format) -> Rounding:
    """The rounding of some rows of W + delta to `format`."""
    rows = np.linspace(0, len(w) - 1, min(len(w), ROWS_MEASURED)).astype(int)
    old, delta = w[rows], update.delta(rows)
    new, size = old + delta, float(np.linalg.norm(old)) + 1e-30
    if format.quantize is None:
        return Rounding(name, format, float(np.linalg.norm(delta)) / size, 0.0, 0.0)
    stored = StoredTensor.quantize(new, format).dequantize()
    squares = float((delta * delta).sum())
    kept = float(((stored - old) * delta).sum()) / squares if squares else 1.0
    rounding = float(np.linalg.norm(stored - new)) / size
    return Rounding(name, format, squares**0.5 / size, rounding, kept)


def merge(
    source: Checkpoint,
    updates: Mapping[str, LowRank],
    out: Path,
    dtype: str | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> list[Rounding]:
    """Write the model with these updates to `out`: a GGUF file, or a folder of Hugging Face.

    dtype: one of DTYPES. None: every weight keeps its format. `updates` are by our names of the weights.
    ParameterError if rounding would erase an update.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ParameterError(f"dtype is {dtype!r}, it must be one of {', '.join(DTYPES)}")
    as_folder = out.suffix != ".gguf"
    if as_folder:
        _check_folder(source, out, dtype)
    weights = source.weights()
    formats = {
        name: w.format if dtype is None and len(w.shape) > 1 else target_format(name, w.shape, dtype or "f32")
        for name, w in weights.items()
    }
    found = list[Rounding]()
    for name, update in updates.items():
        progress("measuring", len(found), len(updates))
        found.append(measured(name, weights[name], update, formats[name]))
    if erased := [one for one in found if one.kept < LEAST_KEPT]:
        raise ParameterError(_refusal(out, as_folder, erased, len(found), weights, updates))
    if as_folder and isinstance(source, HuggingFaceCheckpoint):
        _write_folder(source, weights, updates, formats, out, dtype, progress)
        return found
    new = {name: _merged(w, updates[name]) if name in updates else w for name, w in weights.items()}
    if dtype is None:
        new = {name: _rounded(w, formats[name]) if name in updates else w for name, w in new.items()}
    convert(source, out, dtype, threads, progress, weights=new)
    return found


def _refusal(
    out: Path,
    as_folder: bool,
    erased: list[Rounding],
    n: int,
    weights: Mapping[str, StoredTensor],
    updates: Mapping[str, LowRank],
) -> str:
    """The message, with the worst weight and the smallest dtype that keeps all updates."""
    worst, ways = min(erased, key=lambda one: one.kept), []
    for dtype in [one for one in WIDER if not as_folder or DTYPES[one] in RUNNABLE]:
        kept = min(
            measured(
                one.name,
                weights[one.name],
                updates[one.name],
                target_format(one.name, weights[one.name].shape, dtype),
            ).kept
            for one in erased
        )
        if kept >= LEAST_KEPT:
            ways.append(f"--dtype {dtype} keeps {min(kept, 1):.0%}")
        if kept >= WELL_KEPT:
            break
    count = f"rounding would erase the update of {len(erased)} of {n} weights"
    return f"{out} was not written: {count}; {worst}; {', '.join(ways)}"


def _merged(w: StoredTensor, update: LowRank) -> StoredTensor:
    """W + delta in float32. It is computed at each use."""

    def data(rows: slice) -> Array:
        new = w.dequantize() + update.delta()
        return new[rows].view(np.uint8)

    return StoredTensor(FORMATS["F32"], w.shape, data)


def _rounded(w: StoredTensor, format: Format) -> StoredTensor:
    """The same weight in another format. It is computed at each use."""
    return StoredTensor(
        format, w.shape, lambda rows: StoredTensor.quantize(w.dequantize(), format).data[rows]
    )


# ---------------------------------------------------------------- a folder of Hugging Face


def _check_folder(source: Checkpoint, out: Path, dtype: str | None) -> None:
    if not isinstance(source, HuggingFaceCheckpoint):
        what = f"a folder is written only from a folder of Hugging Face, and {source.path} is {source.format}"
        raise ParameterError(f"{out}: {what}; wanted a name that ends in .gguf")
    if source.fused:
        what = "the updates are of separate tensors, and a folder of Phi-3 has fused ones"
        raise ParameterError(f"{out}: {what}; wanted a name that ends in .gguf")
    if dtype is not None and DTYPES[dtype] not in RUNNABLE:
        raise ParameterError(f"{out}: safetensors have no {DTYPES[dtype]}; wanted a name that ends in .gguf")
    if os.path.lexists(out) and not (out.is_dir() and not any(out.iterdir())):
        raise ParameterError(f"{out} is there already; wanted the name of a new folder, or of a .gguf file")


def _write_folder(
    source: HuggingFaceCheckpoint,
    weights: Mapping[str, StoredTensor],
    updates: Mapping[str, LowRank],
    formats: Mapping[str, Format],
    out: Path,
    dtype: str | None,
    progress: Progress,
) -> None:
    """Fill a folder beside `out`, and rename it when it is whole and has been read back."""
    names, config = tensor_names(source.args, "hf"), dict(source.config.values)
    if weights["output.weight"] is weights["tok_embeddings.weight"]:
        if updates.keys() & {"output.weight", "tok_embeddings.weight"}:
            config["tie_word_embeddings"] = False
        else:
            del names["output.weight"]
    for key in ("dtype", "torch_dtype"):
        if dtype is not None and key in config:
            config[key] = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[dtype]
    total, done = sum(formats[name].nbytes(weights[name].shape) for name in names), 0
    ours, digests = {theirs: name for name, theirs in names.items()}, dict[str, bytes]()

    def pieces(theirs: str) -> Iterator[np.ndarray]:
        nonlocal done
        name, digest = ours[theirs], hashlib.blake2b()
        for piece in _in_file_order(weights[name], updates.get(name), formats[name]):
            digest.update(finite(f"{source.path}: {theirs}", piece, formats[name].name).data)
            yield piece
            progress("merging", done := done + piece.nbytes, total)
        digests[theirs] = digest.digest()
        source.check_unchanged()

    try:
        part = part_beside(out)
        try:
            part.mkdir()
            for name in BESIDE:
                if (source.path / name).is_file():
                    (part / name).parent.mkdir(exist_ok=True)
                    shutil.copyfile(source.path / name, part / name)
            write_bytes(part / "config.json", (json.dumps(config, indent=2) + "\n").encode())
            plan = {theirs: (formats[name], weights[name].shape) for name, theirs in names.items()}
            write_safetensors(part / "model.safetensors", plan, pieces)
            _read_back(HuggingFaceCheckpoint(part), digests)
            with suppress(FileNotFoundError):
                out.rmdir()  # it is empty; Windows replaces no folder
            os.replace(part, out)
        except BaseException:
            shutil.rmtree(part, ignore_errors=True)
            raise
    except (FormatError, ResourceLimitError) as error:  # it names a file in the part
        raise type(error)(str(error).replace(part.name, out.name)) from None
    except OSError as error:
        raise FormatError(f"{out} cannot be written: {error.strerror}") from None


def _in_file_order(w: StoredTensor, update: LowRank | None, format: Format) -> Iterator[np.ndarray]:
    """The bytes of a weight with its update, some rows at a time, in Hugging Face's order of rows."""
    if len(w.shape) == 1 or (update is None and format is w.format):
        yield w.data if format is w.format else StoredTensor.quantize(w.dequantize(), format).data
        return
    places = np.arange(len(w)) if w.row_order is None else np.argsort(w.row_order)
    step = max(1, BYTES_AT_ONCE // (4 * w.shape[-1]))
    for begin in range(0, len(w), step):
        rows = places[begin : begin + step]
        new = w[rows] if update is None else w[rows] + update.delta(rows)
        yield StoredTensor.quantize(new, format).data


def _read_back(written: HuggingFaceCheckpoint, digests: Mapping[str, bytes]) -> None:
    """MismatchError unless the new folder has the tensors that were written to it."""
    written.weights()
    for file in written.files:
        for name, info in written.tensors.items():
            data = file.bytes_at(info.offset, info.nbytes, name)
            if hashlib.blake2b(data.data).digest() != digests[name]:
                raise MismatchError(f"{written.path} was written wrongly: {name} reads back differently")
