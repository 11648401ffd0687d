"""Writing GGUF: a header, then one tensor after another. No tensor is ever whole in memory."""

import struct
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np

from ...backend.formats import Format
from ...errors import FormatError
from ..base import TensorInfo
from .file import VALUE_TYPES

ALIGNMENT = 32  # GGUF's default
TYPE_NUMBER = {code: number for number, (_, code) in enumerate(VALUE_TYPES)}


def layout(
    tensors: Iterable[tuple[str, Format, tuple[int, ...]]], metadata: Mapping[str, Any]
) -> tuple[bytes, list[TensorInfo]]:
    """-> the header, and the place of each tensor in the file that begins with it."""
    infos, records, end = [], [], 0
    alignment = metadata.get("general.alignment", ALIGNMENT)
    for name, format, shape in tensors:
        nbytes = format.nbytes(shape)
        dims = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        records.append(_string(name) + dims + struct.pack("<IQ", format.code, end))
        infos.append(TensorInfo(name, format.name, shape, end, nbytes))
        end += nbytes + -nbytes % alignment
    entries = [_string(key) + _value(key, value) for key, value in metadata.items()]
    head = b"GGUF" + struct.pack("<IQQ", 3, len(infos), len(entries))
    head += b"".join(entries) + b"".join(records)
    head += bytes(-len(head) % alignment)
    return head, [TensorInfo(i.name, i.type_name, i.shape, len(head) + i.offset, i.nbytes) for i in infos]


def write_tensor(file: BinaryIO, info: TensorInfo, parts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Write the parts of a tensor at its place, and yield each after it is written."""
    file.write(bytes(info.offset - file.tell()))
    for part in parts:
        file.write(part.data)
        yield part


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(key: str, value: Any) -> bytes:
    """The type and the bytes: int as UINT32, list as an array of strings, float as FLOAT32.

    A float that has another decimal text as a FLOAT32 is a FLOAT64.
    """
    if isinstance(value, str):
        return struct.pack("<I", TYPE_NUMBER["S"]) + _string(value)
    if isinstance(value, list):
        head = struct.pack("<IIQ", TYPE_NUMBER["A"], TYPE_NUMBER["S"], len(value))
        return head + b"".join(map(_string, value))
    if isinstance(value, np.ndarray):
        code = {"f4": "f", "i4": "i", "u4": "I"}.get(value.dtype.str[1:])
        if code:
            head = struct.pack("<IIQ", TYPE_NUMBER["A"], TYPE_NUMBER[code], len(value))
            return head + value.astype(value.dtype.newbyteorder("<")).tobytes()
    if isinstance(value, bool):
        return struct.pack("<I?", TYPE_NUMBER["?"], value)
    if isinstance(value, int) and 0 <= value < 1 << 32:
        return struct.pack("<II", TYPE_NUMBER["I"], value)
    if isinstance(value, float):
        with np.errstate(over="ignore"):
            code = "f" if float(str(np.float32(value))) == value else "d"
        return struct.pack(f"<I{code}", TYPE_NUMBER[code], value)
    raise FormatError(f"{key} is {value!r}, which has no place in a GGUF file")
