"""GGUF: one file with metadata, vocabulary and weights, used in place.

    magic "GGUF", version u32, n_tensors u64, n_kv u64             the header, little-endian
    n_kv times       key, type u32, value                          a string is u64 length + UTF-8
    n_tensors times  name, n_dims u32, dims u64..., type u32, offset u64
    padding to general.alignment, then the tensors, each padded likewise

What this file promises: nothing is used unchecked. Counts, lengths and offsets are plain Python
integers, which cannot overflow. They are compared with the limits below and with the file's size
before they are used. Opening reads only the header; weights and long arrays stay on disk until
they are used. The format is described in ggml's docs/gguf.md.

A file of `convert --packed` has weights of other types: the number of rows side by side times 65536, plus
ggml's type of a row. ggml and its readers refuse these numbers.
"""

import os
import re
import struct
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from ...backend.formats import FORMATS, PACKED, PACKED_ROWS, PackedTensor, StoredTensor
from ...errors import (
    ConfigError,
    FormatError,
    MismatchError,
    NumpyLlamaError,
    ResourceLimitError,
    UnsupportedError,
    escape,
)
from ..base import TensorInfo
from ..files import MappedFile

# Known first bytes: GGUF, and the older formats, so that the error can name them.
MAGICS = {b"GGUF": "GGUF"} | {
    spelling: old.decode()
    for old in (b"GGML", b"GGMF", b"GGJT", b"GGLA")
    for spelling in (old, old.lower(), old.lower()[::-1])
}

MAX_RECORDS = 65_536  # metadata entries, and tensors
MAX_KEY = 65_535  # bytes
MAX_NAME = 63  # bytes of a tensor's name
MAX_STRING = 16 << 20  # bytes
MAX_ARRAY = 1 << 24  # elements
MAX_TENSOR = 1 << 48  # bytes: more than a process can map
MAX_PARTS = 1024  # files of a split model
ROWS_AT_ONCE = 256  # rows expanded at a time, so that temporary arrays stay small
COLUMN_ORDER = "numpy_llama.column_order."  # and the name of a packed tensor

HEADER_BYTES = 24
MIN_KV_BYTES = 14  # key length, a key of 1 byte, type, a value of 1 byte
MIN_TENSOR_BYTES = 33  # name length, a name of 1 byte, n_dims, 1 dim, type, offset

# fmt: off
# Metadata types in the order of their numbers, each with its code in `struct` and NumPy. S and A are ours.
VALUE_TYPES = (
    ("UINT8", "B"), ("INT8", "b"), ("UINT16", "H"), ("INT16", "h"), ("UINT32", "I"), ("INT32", "i"),
    ("FLOAT32", "f"), ("BOOL", "?"), ("STRING", "S"), ("ARRAY", "A"),
    ("UINT64", "Q"), ("INT64", "q"), ("FLOAT64", "d"),
)
# Tensor types by number: name, weights in a block, bytes of a block (ggml-common.h). A file with types that
# this program cannot run is still checked and described. The gaps are types that ggml has removed.
TENSOR_TYPES = {f.code: (f.name, f.block, f.block_bytes) for f in FORMATS.values()} | {
    **{f.packed.code: (name, f.block, f.block_bytes) for name, f in PACKED.items()},  # only ours
    24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8), 28: ("F64", 1, 8),
    9: ("Q8_1", 32, 36), 20: ("IQ4_NL", 32, 18), 39: ("MXFP4", 32, 17), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74),
    18: ("IQ3_XXS", 256, 98), 19: ("IQ1_S", 256, 50), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 34: ("TQ1_0", 256, 54), 35: ("TQ2_0", 256, 66),
    40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
}
# fmt: on
# Keys, as messages spell them, whose texts describe the file to people: names, authors, licences.
ONLY_SHOWN = ("'general.", "'quantize.")
RUNNABLE = f"this program runs {', '.join(FORMATS)}"


class GGUFFile:
    """A GGUF file of version 2 or 3, memory-mapped and checked. The weights are views of the map."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        reader = _Reader(self.path)
        self.version, n_tensors, n_kv = reader.header()
        self.metadata: Mapping[str, Any] = reader.metadata(n_kv)
        alignment = self.get("general.alignment", int, 32)
        self.tensors: Mapping[str, TensorInfo] = reader.tensors(n_tensors, alignment)
        self.file = reader.file

    @property
    def files(self) -> list[MappedFile]:
        return [self.file]

    def tensor(self, name: str) -> StoredTensor:
        """A weight as stored, without a copy. A format without kernels is expanded to float32 at each use."""
        if name not in self.tensors:
            raise MismatchError(f"{self.path}: there is no tensor {escape(name)}")
        info = self.tensors[name]
        data = self.file.bytes_at(info.offset, info.nbytes, escape(name))
        if info.type_name in FORMATS:
            return StoredTensor(FORMATS[info.type_name], info.shape, data)
        if info.type_name in PACKED:
            format = PACKED[info.type_name]
            packed = data.reshape(-1, format.row_bytes(info.shape[-1]))
            return PackedTensor(format, info.shape, packed, column_order=self._column_order(info))
        dequantize = _dequantizer(info.type_name, f"{self.path}: {escape(name)}")
        rows = data.reshape(prod(info.shape[:-1]), -1)

        def expanded(some: slice) -> np.ndarray:
            wanted = rows[some]
            out = np.empty((len(wanted), info.shape[-1]), np.float32)
            for begin in range(0, len(wanted), ROWS_AT_ONCE):
                out[begin : begin + ROWS_AT_ONCE] = dequantize(wanted[begin : begin + ROWS_AT_ONCE])
            self.file.forget(info.offset, info.nbytes)
            return out.view(np.uint8)

        return StoredTensor(FORMATS["F32"], info.shape, expanded)

    def _column_order(self, info: TensorInfo) -> np.ndarray | None:
        """The place of each column of a packed tensor, if `convert` left the columns in another order."""
        if (order := self.get(f"{COLUMN_ORDER}{info.name}", np.uint32)) is None:
            return None
        if not np.array_equal(np.sort(order), np.arange(info.shape[-1])):
            what = f"wanted each number below {info.shape[-1]} once"
            raise MismatchError(f"{self.path}: {escape(COLUMN_ORDER + info.name)} has {len(order)}, {what}")
        places: np.ndarray = order.astype(np.int64)
        return places

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The metadata value under `key`, or `default` if there is none.

        kind is int, float, bool or str. For an array it is list (of strings) or the type of its numbers,
        np.float32 for example. A value of another kind is a FormatError.
        """
        if key not in self.metadata:
            return default
        value = self.metadata[key]
        is_array = isinstance(value, list | np.ndarray)
        found = value.dtype.type if isinstance(value, np.ndarray) else type(value)
        if found is not kind:
            shown = f"an array of {len(value)}" if is_array else escape(value, 60)
            raise FormatError(f"{self.path}: {key} is {shown} ({found.__name__}), wanted {kind.__name__}")
        return value

    def decimal(self, key: str, default: float | None = None) -> float:
        """A number as it was meant: a file holds 1e-5 as a float32, which as a float64 is 9.99999974e-06."""
        x = self.require(key, float) if default is None else self.get(key, float, default)
        with np.errstate(over="ignore"):
            short = float(str(np.float32(x)))
        return short if float(np.float32(short)) == x else x

    def require(self, key: str, kind: type) -> Any:
        """Like `get`, but a missing key is a ConfigError."""
        if key not in self.metadata:
            raise ConfigError(f"{self.path}: the metadata has no {key}")
        return self.get(key, kind)


class SplitGGUFFile(GGUFFile):
    """A model in several files, NAME-00001-of-00003.gguf and so on. The first has the metadata."""

    def __init__(self, parts: list[GGUFFile]):
        self.path, self.version, self.metadata = parts[0].path, parts[0].version, parts[0].metadata
        self.parts = parts
        self._part_of = {name: part for part in parts for name in part.tensors}
        self.tensors = {name: part.tensors[name] for name, part in self._part_of.items()}

    @property
    def files(self) -> list[MappedFile]:
        return [part.file for part in self.parts]

    def tensor(self, name: str) -> StoredTensor:
        return self._part_of.get(name, self.parts[0]).tensor(name)


def open_gguf(path: Path) -> GGUFFile:
    """The file at `path`. If it is one part of a split model, all parts, whichever was named."""
    file = GGUFFile(path)
    count = file.get("split.count", int, 1)
    if count < 2:
        return file
    name = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not name or int(name[3]) != count or count > MAX_PARTS:
        wanted = f"such a file is called NAME-00001-of-{min(count, 99999):05}.gguf"
        raise FormatError(f"{path} is one of {count} parts by split.count; {wanted}")

    def part_name(i: int) -> str:
        return f"{name[1]}-{i + 1:05}-of-{count:05}.gguf"

    parts: list[GGUFFile] = []
    holders: dict[str, str] = {}  # the name of each tensor's part
    for i in range(count):
        part_path = path.with_name(part_name(i))
        if not part_path.exists():
            raise MismatchError(f"{path} is one of {count} parts, and {part_path.name} is not beside it")
        part = file if part_path == path else GGUFFile(part_path)
        for key, by_name in (("split.no", i), ("split.count", count)):
            if (found := part.get(key, int)) != by_name:
                is_copy = key == "split.no" and found in range(count)
                of = f"; is it a copy of {part_name(found)}?" if is_copy else ""
                raise MismatchError(f"{part_path}: {key} is {found}, by its name it must be {by_name}{of}")
        for tensor in part.tensors:
            if (other := holders.setdefault(tensor, part_path.name)) != part_path.name:
                raise MismatchError(f"{part_path} has {escape(tensor)}, and so has {other}")
        parts.append(part)
    total = len(holders)
    for part in parts:
        if (declared := part.get("split.tensors.count", int, total)) != total:
            what = f"split.tensors.count is {declared}, the parts have {total} tensors"
            raise MismatchError(f"{part.path}: {what}")
    return SplitGGUFFile(parts)


def _dequantizer(type_name: str, source: str) -> Callable[[np.ndarray], np.ndarray]:
    """A function from rows of blocks to float32, for a format that only the package gguf can read."""
    try:
        import gguf
    except ImportError:
        how = "read through the package gguf, which is not installed: pip install gguf"
        raise UnsupportedError(f"{source} is stored as {type_name}; {RUNNABLE}; others are {how}") from None
    try:
        type = gguf.GGMLQuantizationType[type_name]
        block_bytes = gguf.GGML_QUANT_SIZES[type][1]
        gguf.dequantize(np.zeros((1, block_bytes), np.uint8), type)
    except (KeyError, NotImplementedError):
        raise UnsupportedError(f"{source} is stored as {type_name}; {RUNNABLE}") from None
    return lambda rows: gguf.dequantize(rows, type)


@dataclass(frozen=True)
class _Array:
    """An array in the metadata that is not decoded yet."""

    code: str
    count: int
    start: int


class _Metadata(UserDict[str, Any]):
    """Keys and values in the order of the file. An array is decoded at its first use."""

    def __init__(self, decode: Callable[[_Array, str], list[str] | np.ndarray]):
        super().__init__()
        self.decode = decode

    def __getitem__(self, key: str) -> Any:
        value = super().__getitem__(key)
        if isinstance(value, _Array):
            value = self[key] = self.decode(value, escape(key))
        return value


class _Reader:
    """Reads the header from front to back. `at` is the next byte."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0
        self.file = MappedFile(path, "a GGUF file", HEADER_BYTES)
        self.file.refuse_mistaken("a GGUF file")
        self.map, self.size, self.checked_end = self.file.map, self.file.size, self.file.checked_end

    def check(self, holds: object, problem: str, error: type[NumpyLlamaError] = FormatError) -> None:
        if not holds:
            raise error(f"{self.path}: {problem} (before byte {self.at})")

    def number(self, code: str, field: str) -> Any:
        start, self.at = self.at, self.checked_end(self.at, struct.calcsize(code), field)
        if code == "?":
            self.check(self.map[start] <= 1, f"{field} is {self.map[start]}, a BOOL must be 0 or 1")
        return struct.unpack_from(f"<{code}", self.map, start)[0]

    def count(self, field: str, limit: int, min_bytes: int) -> int:
        """A number of records that follow, each of at least `min_bytes` bytes."""
        count = self.number("Q", f"the count of {field}")
        self.check(count <= limit, f"{field}: {count} of them, the limit is {limit}", ResourceLimitError)
        self.checked_end(self.at, count * min_bytes, field)
        return count

    def string(self, field: str, limit: int = MAX_STRING) -> str:
        length = self.number("Q", f"the length of {field}")
        start, self.at = self.at, self.checked_end(self.at, length, field)
        self.check(length <= limit, f"{field} has {length} bytes, the limit is {limit}", ResourceLimitError)
        return self.utf8(start, self.at, field)

    def utf8(self, start: int, end: int, field: str) -> str:
        if field.startswith(ONLY_SHOWN):  # it is only shown, so bytes that are not UTF-8 become escapes
            return str(self.map[start:end], "utf-8", "backslashreplace")
        try:
            return str(self.map[start:end], "utf-8")
        except UnicodeDecodeError as error:
            raise FormatError(f"{self.path}: {field} at byte {start} is not UTF-8: {error.reason}") from None

    def header(self) -> tuple[int, int, int]:
        """-> version, n_tensors, n_kv."""
        magic = bytes(self.map[:4])
        kind = f", the {MAGICS[magic]} format that GGUF replaced" if magic in MAGICS else ""
        self.check(b"GGUF".startswith(magic), f"begins with {magic!r}{kind}; wanted b'GGUF'")
        self.checked_end(0, HEADER_BYTES, "the header")
        self.at = 4
        version = self.number("I", "version")
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        kind = " (a big-endian file)" if swapped in (1, 2, 3) else ""
        self.check(version in (2, 3), f"version {version}{kind}; this program reads 2, 3", UnsupportedError)
        n_tensors = self.count("tensors", MAX_RECORDS, MIN_TENSOR_BYTES)
        return version, n_tensors, self.count("keys", MAX_RECORDS, MIN_KV_BYTES)

    def metadata(self, n_kv: int) -> _Metadata:
        values = _Metadata(self.decode)
        for i in range(n_kv):
            key = self.string(f"kv[{i}].key", MAX_KEY)
            self.check(key, f"kv[{i}] has an empty key")
            self.check(key not in values, f"duplicate key {escape(key)}")
            name, code = self.value_type(escape(key))
            if key == "general.alignment":
                self.check(name == "UINT32", f"alignment must be UINT32, {key} is {name}")
            values[key] = self.value(code, escape(key))
        return values

    def value_type(self, field: str) -> tuple[str, str]:
        number = self.number("I", f"the type of {field}")
        self.check(number < len(VALUE_TYPES), f"bad value type {number} of {field}")
        return VALUE_TYPES[number]

    def value(self, code: str, field: str) -> Any:
        """One value. An array is skipped, and only its place is kept."""
        if code == "S":
            return self.string(field)
        if code != "A":
            return self.number(code, field)
        _, code = self.value_type(field)
        self.check(code != "A", f"{field}: nested arrays are not allowed")
        item_bytes = 8 if code == "S" else struct.calcsize(code)
        array = _Array(code, self.count(field, MAX_ARRAY, item_bytes), self.at)
        if code == "S":
            for _, end in self.strings(array, field):
                self.at = end
        else:
            self.at += array.count * item_bytes
        return array

    def strings(self, array: _Array, field: str) -> Iterator[tuple[int, int]]:
        """Start and end of each string. There may be 10^5, so the checks are called only to raise errors."""
        unpack, buffer, size, end = struct.Struct("<Q").unpack_from, self.map, self.size, array.start
        for _ in range(array.count):
            start = end + 8
            if start > size:
                self.checked_end(end, 8, field)
            (length,) = unpack(buffer, end)
            end = start + length
            if end > size or length > MAX_STRING:
                self.checked_end(start, length, field)
                self.check(False, f"a string of {length} bytes in {field}", ResourceLimitError)
            yield start, end

    def decode(self, array: _Array, field: str) -> list[str] | np.ndarray:
        if array.code == "S":
            return [self.utf8(start, end, field) for start, end in self.strings(array, field)]
        if array.code == "?":
            flags = np.frombuffer(self.map, np.uint8, array.count, array.start)
            self.check((flags <= 1).all(), f"{field} holds a BOOL that is neither 0 nor 1")
        type = np.dtype(f"<{array.code}").str  # by size: on Windows the C type int is not NumPy's int32
        return np.frombuffer(self.map, type, array.count, array.start)

    def tensors(self, n_tensors: int, alignment: int) -> dict[str, TensorInfo]:
        # GGUF's description forbids an alignment below 8, and numbers would not be aligned in memory.
        power_of_two = alignment >= 8 and not alignment & (alignment - 1)
        self.check(power_of_two, f"alignment must be a power of two from 8 up, not {alignment}")
        found: dict[str, TensorInfo] = {}
        end = 0  # of the tensors so far: the next one must begin here, without hole or overlap
        for i in range(n_tensors):
            info = self.tensor_info(f"tensor[{i}]")
            self.check(info.name not in found, f"duplicate tensor name {escape(info.name)}")
            self.check(
                info.offset == end,
                f"tensor offset of {escape(info.name)} is {info.offset}, the tensor before it ends at {end}",
            )
            end += _padded(info.nbytes, alignment)
            found[info.name] = info
        data_start = _padded(self.at, alignment)
        for name, info in found.items():
            found[name] = replace(info, offset=data_start + info.offset)
            self.checked_end(found[name].offset, info.nbytes, f"tensor {escape(name)}")
        return found

    def tensor_info(self, field: str) -> TensorInfo:
        """One record of the list of tensors. Its offset counts from the start of the tensors' data."""
        name = self.string(f"{field}.name", MAX_NAME)
        self.check(name, f"{field} has an empty name")
        field = f"tensor {escape(name)}"
        n_dims = self.number("I", f"n_dims of {field}")
        self.check(n_dims > 0, f"n_dims of {field} is 0")
        self.check(n_dims <= 4, f"n_dims > 4: {field} has {n_dims}")
        dims = [self.number("Q", f"a dimension of {field}") for _ in range(n_dims)]
        self.check(all(0 < n < 1 << 63 for n in dims), f"{field}: dimensions {dims} not in 1..2^63-1")
        type = self.number("I", f"the type of {field}")
        packed_rows, of_row = divmod(type, 1 << 16)
        self.check(
            packed_rows in (0, PACKED_ROWS) or of_row not in TENSOR_TYPES,
            f"{field} has groups of {packed_rows} packed rows, this program reads groups of {PACKED_ROWS}; "
            "convert the original model again",
            UnsupportedError,
        )
        self.check(type in TENSOR_TYPES, f"{field} is of unknown type {type}; {RUNNABLE}", UnsupportedError)
        type_name, block, block_bytes = TENSOR_TYPES[type]
        self.check(
            dims[0] % block == 0, f"{field}: row not a multiple of block: {dims[0]}, {type_name} {block}"
        )
        self.check(packed_rows == 0 or n_dims == 2, f"{field} is {type_name} and has {n_dims} axes, wanted 2")
        nbytes = prod(dims) // block * block_bytes
        if packed_rows:  # the file holds whole groups
            nbytes = PACKED[type_name].packed.nbytes((dims[1], dims[0]))
        self.check(nbytes <= MAX_TENSOR, f"{field}: {nbytes} bytes, at most {MAX_TENSOR}", ResourceLimitError)
        offset = self.number("Q", f"the offset of {field}")
        return TensorInfo(name, type_name, tuple(reversed(dims)), offset, nbytes)


def _padded(n: int, alignment: int) -> int:
    return -(-n // alignment) * alignment
