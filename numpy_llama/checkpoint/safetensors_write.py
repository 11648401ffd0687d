"""Writing safetensors: a header, then one tensor after another. No tensor is ever whole in memory."""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np

from ..backend.formats import Format
from .files import sync, write_file
from .safetensors_file import LENGTH_BYTES

ALIGNMENT = 8  # of the first tensor


def write_safetensors(
    path: Path,
    tensors: Mapping[str, tuple[Format, tuple[int, ...]]],
    pieces: Callable[[str], Iterable[np.ndarray]],
) -> None:
    """Write tensors of these formats and shapes. pieces(name) -> the bytes of a tensor, in parts.

    `path` is replaced when the new file is whole.
    """
    entries, end = dict[str, object](), 0
    for name, (format, shape) in tensors.items():
        place = [end, end := end + format.nbytes(shape)]
        entries[name] = {"dtype": format.name, "shape": list(shape), "data_offsets": place}
    header = json.dumps({"__metadata__": {"format": "pt"}} | entries).encode()  # transformers asks for it
    header += b" " * (-(LENGTH_BYTES + len(header)) % ALIGNMENT)

    def write(part: Path) -> None:
        with part.open("xb") as file:
            file.write(len(header).to_bytes(LENGTH_BYTES, "little") + header)
            for name in tensors:
                for piece in pieces(name):
                    file.write(piece.data)
            sync(file)

    write_file(path, LENGTH_BYTES + len(header) + end, write)
