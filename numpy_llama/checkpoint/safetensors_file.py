"""safetensors: a header in JSON, then the tensors one after another, used in place.

    length u64           of the header, little-endian
    header               {"name": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}, ...}
    the tensors          without hole or overlap, up to the end of the file; offsets count from here

What this file promises: all of that is checked on opening, with exact integers, before any of it is used. The
values of "__metadata__" must be texts. This reader is stricter than the reference: it accepts no duplicate
key, no unknown key, and no shape that no weight has. Like the reference, it accepts spaces before the header,
which the written format does not. The format is described in huggingface/safetensors.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from ..backend.formats import FORMATS, StoredTensor
from ..config import Array
from ..errors import (
    FormatError,
    MismatchError,
    NumpyLlamaError,
    ResourceLimitError,
    UnsupportedError,
    escape,
)
from .base import TensorInfo
from .files import MappedFile
from .json_file import parse_json

LENGTH_BYTES = 8
MAX_HEADER = 100_000_000  # bytes: the format's own limit
MAX_MARKS = 1 << 19  # commas and opening brackets of a header: about 60,000 tensors. Each may cost 100 bytes
MAX_DIMS = 8
MAX_TENSOR = 1 << 48  # bytes: more than a process can map
RUNNABLE = ("F32", "F16", "BF16")

# Bits of one number, for each dtype of the format.
BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "C64": 64, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F8_E8M0": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}  # fmt: skip
# Their numbers in NumPy. BF16 and 8-bit floats are the whole numbers of their bits.
NUMBERS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "F8_E4M3": "u1", "F8_E5M2": "u1",
}  # fmt: skip
_HALF_PAIR = re.compile("[\ud800-\udfff]")  # JSON can spell half a surrogate pair, UTF-8 cannot


class SafetensorsFile:
    """A safetensors file, memory-mapped and checked. The weights are views of the map."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.file = MappedFile(self.path, "a safetensors file", LENGTH_BYTES)
        self.file.refuse_mistaken("a safetensors file")
        header, data_start = self._header()
        self.tensors: Mapping[str, TensorInfo] = self._tensors(header, data_start)

    def tensor(self, name: str) -> StoredTensor:
        """A weight as stored: no byte is copied."""
        if name not in self.tensors:
            raise MismatchError(f"{self.path}: there is no tensor {escape(name)}")
        info = self.tensors[name]
        if info.type_name not in RUNNABLE or not info.shape or not info.nbytes:
            found = f"{escape(name)} is stored as {info.type_name} of shape {info.shape}"
            self._fail(f"{found}; this program runs rows of {', '.join(RUNNABLE)}", UnsupportedError)
        data = self.file.bytes_at(info.offset, info.nbytes, escape(name))
        return StoredTensor(FORMATS[info.type_name], info.shape, data)

    def array(self, name: str) -> Array:
        """A tensor of any kind as a view of the map: the parts of a quantized weight."""
        info = self.tensors[name]
        if info.type_name not in NUMBERS:
            self._fail(f"{escape(name)} is stored as {info.type_name}, which is not read", UnsupportedError)
        data = self.file.bytes_at(info.offset, info.nbytes, escape(name))
        return data.view(NUMBERS[info.type_name]).reshape(info.shape)

    def _fail(self, problem: str, error: type[NumpyLlamaError] = FormatError) -> NoReturn:
        raise error(f"{self.path}: {problem}")

    def _header(self) -> tuple[dict[str, Any], int]:
        """-> the header, and the byte at which the tensors begin."""
        start = self.file.checked_end(0, LENGTH_BYTES, "the length of the header")
        length = int.from_bytes(self.file.map[:start], "little")
        if length > MAX_HEADER:
            self._fail(f"header > {MAX_HEADER:,} bytes: it would have {length}", ResourceLimitError)
        end = self.file.checked_end(start, length, "the header")
        text = self.file.map[start:end]
        if (marks := sum(text.count(mark) for mark in b",[{")) > MAX_MARKS:
            self._fail(f"the header lists {marks} things, at most {MAX_MARKS} are read", ResourceLimitError)
        header = parse_json(text, f"{self.path}: the header")
        if not isinstance(header, dict):
            self._fail(f"the header is a {type(header).__name__}, it must be an object")
        return header, end

    def _tensors(self, header: dict[str, Any], data_start: int) -> dict[str, TensorInfo]:
        metadata = header.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(map(_is_text, metadata.values()))
        ):
            self._fail("__metadata__ must be an object of texts")
        found = [self._info(name, entry) for name, entry in header.items()]
        found.sort(key=lambda info: (info.offset, info.nbytes))  # at one offset, empty tensors first
        end = 0
        for info in found:
            if info.offset != end:
                what = "overlap" if info.offset < end else "hole"
                place = f"begins at {info.offset}, the tensors before it end at {end}"
                self._fail(f"{what}: {escape(info.name)} {place}")
            end += info.nbytes
        end = self.file.checked_end(data_start, end, "the tensors")
        if end < self.file.size:
            self._fail(
                f"file not fully covered: the tensors end at byte {end}, the file has {self.file.size}"
            )
        return {info.name: replace(info, offset=data_start + info.offset) for info in found}

    def _info(self, name: str, entry: Any) -> TensorInfo:
        """One entry of the header. Its offset counts from the start of the tensors."""
        field = f"tensor {escape(name)}"
        keys = ("dtype", "shape", "data_offsets")
        if not _is_text(name) or not isinstance(entry, dict) or entry.keys() != set(keys):
            self._fail(f"{field} must have {', '.join(keys)}, and nothing else")
        dtype, shape, offsets = (entry[key] for key in keys)
        if not isinstance(dtype, str):
            self._fail(f"{field}: the dtype must be a text")
        if dtype not in BITS:
            known = ", ".join(BITS)
            self._fail(f"{field} is of unknown dtype {escape(dtype, 40)}; we know {known}", UnsupportedError)
        if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
            self._fail(f"{field}: the shape and the two offsets must be whole numbers from 0 up")
        if len(shape) > MAX_DIMS:
            self._fail(f"{field} has {len(shape)} dimensions, the limit is {MAX_DIMS}", ResourceLimitError)
        bits = BITS[dtype]
        for n in shape:
            bits *= max(n, 1)  # the other sizes are checked even if one is 0
            if bits > 8 * MAX_TENSOR:
                self._fail(f"{field}: shape {shape} is larger than {MAX_TENSOR} bytes", ResourceLimitError)
        need, given = 0 if 0 in shape else bits / 8, offsets[1] - offsets[0]
        if need != given:
            self._fail(f"{field}: shape/dtype need {need:.15g} bytes, offsets give {given}")
        return TensorInfo(name, dtype, tuple(shape), offsets[0], given)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not _HALF_PAIR.search(value)


def _are_sizes(values: object) -> bool:
    return isinstance(values, list) and all(type(n) is int and n >= 0 for n in values)
