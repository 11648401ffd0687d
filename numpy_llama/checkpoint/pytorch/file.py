"""A state dict written by `torch.save`, read without torch.

    zip      data.pkl describes the tensors, data/KEY holds the bytes of a storage
    legacy   (PyTorch before 1.6) five pickles: magic number, protocol, system, tensors, keys of the storages;
             then for each storage the number of its elements, int64, and its bytes

What this file promises: the restricted reader of pickle.py reads both, and there is no other reader. A
storage has exactly the size in its description, and a tensor lies within its storage. Opening reads only the
description; weights stay in the file until they are used. The format is defined by the code of
torch/serialization.py.
"""

import os
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from ...backend.formats import FORMATS, StoredTensor
from ...errors import (
    FormatError,
    MismatchError,
    NumpyLlamaError,
    ResourceLimitError,
    UnsafePickleError,
    UnsupportedError,
    escape,
)
from ..base import TensorInfo
from ..files import MappedFile
from .pickle import MAX_BYTES, Storage, Unpickler, View, kind
from .zip import Record, check_crc, zip_records

LEGACY_HEADER = (("magic number", 0x1950A86A20F9469CFC6C), ("protocol", 1001))


@dataclass(frozen=True)
class TorchTensor(TensorInfo):
    """A tensor in a file. `offset` is the byte of its first element, `nbytes` its size when dense."""

    stride: tuple[int, ...]  # in elements

    @property
    def dense(self) -> bool:
        """Whether the elements are contiguous in row-major order."""
        step = 1
        for n, stride in zip(self.shape[::-1], self.stride[::-1], strict=True):
            if n > 1 and stride != step:
                return False
            step *= n
        return True


class TorchFile:
    """A file of torch.save, memory-mapped and checked. The weights are views of the map."""

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self.file = MappedFile(path, "a file of torch.save", 22)
        self.file.refuse_mistaken("a file of torch.save")
        self.records: dict[str, Record] = {}  # of a zip
        begins = self.file.map[:4]
        if b"PK\3\4".startswith(begins):
            self.records = zip_records(self.file)
            state, places = self._read_zip()
        elif self.file.map[257:262] == b"ustar":
            # PyTorch itself loads it only if the pickle may call any function.
            self._fail("a .tar, as PyTorch wrote until 2017: its pickles are not read", UnsafePickleError)
        elif begins.startswith(b"\x80"):
            state, places = self._read_legacy()
        else:
            self._fail(f"begins with {begins!r}, no file of torch.save does")
        self.tensors: dict[str, TorchTensor] = {}
        for name, view in self._views(state).items():
            type, start = view.storage.type, places[view.storage.key]
            nbytes = prod(view.shape) * type.itemsize
            offset = start + view.offset * type.itemsize
            self.tensors[name] = TorchTensor(name, type.name, view.shape, offset, nbytes, view.stride)

    def tensor(self, name: str) -> StoredTensor:
        """A weight as stored. A transposed weight is copied at each use."""
        if name not in self.tensors:
            self._fail(f"there is no tensor {escape(name)}", MismatchError)
        info = self.tensors[name]
        if info.type_name not in FORMATS:
            formats = ", ".join(FORMATS)
            self._fail(
                f"{escape(name)} is stored as {info.type_name}; this program runs {formats}", UnsupportedError
            )
        if not info.shape or not info.nbytes:
            self._fail(f"{escape(name)} has the shape {info.shape}, no weight has", UnsupportedError)
        format, map = FORMATS[info.type_name], self.file.map
        item = format.block_bytes
        if info.dense:
            return StoredTensor(
                format, info.shape, self.file.bytes_at(info.offset, info.nbytes, escape(name))
            )
        steps = [n * item for n in info.stride]

        def copy(rows: slice) -> np.ndarray:
            whole = np.ndarray(info.shape, f"<u{item}", map, info.offset, steps)
            return whole.reshape(-1, info.shape[-1])[rows].copy().view(np.uint8)

        return StoredTensor(format, info.shape, copy)

    def verify(self) -> None:
        """Read all of a zip and check its CRCs. The legacy container has none."""
        for record in self.records.values():
            check_crc(self.file, record)

    def _fail(self, problem: str, error: type[NumpyLlamaError] = FormatError) -> NoReturn:
        raise error(f"{self.path}: {problem}")

    def _read_zip(self) -> tuple[Any, dict[str, int]]:
        """-> the saved object, and the byte at which each storage begins."""
        if "constants.pkl" in self.records or any(name.startswith("code/") for name in self.records):
            self._fail("a TorchScript program; wanted a state dict, the weights alone", UnsupportedError)
        if "data.pkl" not in self.records:
            self._fail("a zip without data.pkl is no file of torch.save")
        pickle, order = self.records["data.pkl"], self.records.get("byteorder")
        if pickle.nbytes > MAX_BYTES:
            self._fail(f"data.pkl has {pickle.nbytes} bytes, the limit is {MAX_BYTES}", ResourceLimitError)
        check_crc(self.file, pickle)
        if order is not None:  # absent before PyTorch 2.1
            check_crc(self.file, order)
            found = self.file.map[order.start : order.end]
            if found != b"little":
                error = UnsupportedError if found == b"big" else FormatError
                self._fail(f"byteorder is {escape(found)}, it must be b'little'", error)

        unpickler = Unpickler(self.file, pickle.start, pickle.end)
        state = unpickler.load()
        if unpickler.at != pickle.end:
            self._fail(f"data.pkl goes on after its pickle (at byte {unpickler.at})")
        places = {}
        for key, storage in unpickler.storages.items():
            record = self.records.get(f"data/{key}")
            if record is None:
                self._fail(f"there is no record {escape(f'data/{key}')}")
            self._check_size(storage, record.nbytes)
            places[key] = record.start
        return state, places

    def _read_legacy(self) -> tuple[Any, dict[str, int]]:
        unpickler = Unpickler(self.file, 0, self.file.size)
        for what, wanted in LEGACY_HEADER:
            found = unpickler.load()
            if type(found) is not int or found != wanted:
                shown = f"{found:#x}"[:60] if type(found) is int else f"a {kind(found)}"
                self._fail(f"the {what} of a legacy file is {shown}, it must be {wanted:#x}")
        system = unpickler.load()
        if type(system) is not dict or system.get("little_endian") is not True:
            self._fail("a legacy file of a machine that is not little-endian")
        state, keys, at = unpickler.load(), unpickler.load(), unpickler.at
        if type(keys) is not list:
            self._fail(f"the keys of the storages are a {kind(keys)}, wanted a list")
        unplaced, places = dict(unpickler.storages), {}
        for key in keys:
            storage = unplaced.pop(key, None) if type(key) is str else None
            if storage is None:
                self._fail(f"a storage is listed twice, or for no tensor (before byte {unpickler.at})")
            start = self.file.checked_end(at, 8, "the size of a storage")
            (numel,) = struct.unpack_from("<Q", self.file.map, at)  # a negative number reads as a huge one
            nbytes = numel * storage.type.itemsize
            at = self.file.checked_end(start, nbytes, f"storage {escape(key)}")
            self._check_size(storage, nbytes)
            places[key] = start
        if unplaced:
            self._fail(f"there is no storage {escape(min(unplaced))}")
        if at != self.file.size:
            self._fail(f"the last storage ends at byte {at}, the file has {self.file.size}")
        return state, places

    def _check_size(self, storage: Storage, nbytes: int) -> None:
        if nbytes != storage.nbytes:
            wanted = f"{storage.numel} {storage.type.name}, that is {storage.nbytes} bytes"
            self._fail(f"storage size mismatch: {escape(storage.key)} has {nbytes} bytes, wanted {wanted}")

    def _views(self, state: Any) -> dict[str, View]:
        """The dict of tensors: the saved object or, as in {"model": {...}, "step": 3}, one of its values."""
        if type(state) is not dict:
            self._fail(f"holds a {kind(state)}, wanted a state dict")
        dicts = [state, *(value for value in state.values() if type(value) is dict)]
        found = [
            views for d in dicts if (views := {key: view for key, view in d.items() if type(view) is View})
        ]
        if len(found) != 1:
            self._fail(f"holds {len(found)} dicts of tensors, wanted one state dict", UnsupportedError)
        if numbers := [key for key in found[0] if type(key) is not str]:
            self._fail(f"the name of a weight is the number {escape(numbers[0], 60)}, wanted a text")
        return found[0]
