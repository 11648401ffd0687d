"""The interface of the readers of adapters, and the checks that hold for every format."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import numpy as np

from ...backend.formats import StoredTensor
from ...config import Array, ModelArgs
from ...errors import FormatError, MismatchError, NumericsError, escape
from ...lora import LowRank
from ..base import TensorInfo
from ..files import MappedFile
from ..names import expected_shape, rows_in_fused

OTHER_BASE = "is it the adapter of another base model?"
ROWS_COMPARED = 256  # of a copy of the base's weight
NEAR = 0.25  # relative: 4 bits round a weight by up to 0.1, and another model's weight is 1.4 away


class TensorFile(Protocol):
    """SafetensorsFile, TorchFile and GGUFFile."""

    path: Path
    file: MappedFile

    @property
    def tensors(self) -> Mapping[str, TensorInfo]: ...

    def tensor(self, name: str) -> StoredTensor: ...


@dataclass(frozen=True)
class Pair:
    """The two tensors of one weight's update, by their names in the file."""

    a: str
    b: str
    scale: float
    flipped: bool = False  # an embedding: the tensors are (r, V) and (D, r), and B A is transposed
    transposed: bool = False  # the first tensor is stored as (V, r)
    fused: bool = False  # B has the rows of a fused tensor, and the weight's are some of them


class Adapter:
    """A LoRA adapter's file. Opening reads only the headers."""

    format: str  # "PEFT" or "GGUF"
    path: Path  # the file or folder that the user named
    file: TensorFile
    base: str | None  # the name of the base model, for people
    pairs: Mapping[str, Pair]  # by our name of the weight
    copies: Mapping[str, str]  # our name of a weight -> the tensor that repeats the base's weight

    def tensor(self, name: str) -> Array:
        """A tensor in float32, copied: the file may change later. NumericsError if a number is not finite."""
        x = np.array(self.file.tensor(name).dequantize())
        if not np.isfinite(x).all():
            raise NumericsError(f"{self.file.path}: {escape(name)} has numbers that are NaN or infinite")
        return x

    def shapes(self, pair: Pair) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of the two tensors as (r, IN) and (OUT, r), whatever their places in the file."""
        a, b = (self.file.tensors[name].shape for name in (pair.a, pair.b))
        return a[::-1] if pair.transposed else a, b

    def rank(self, name: str) -> int:
        return self.shapes(self.pairs[name])[0][0]

    def rows(self, name: str, args: ModelArgs) -> np.ndarray | None:
        """The place in the file of each row of B; None: the rows have the model's order."""
        return None

    def low_ranks(self, args: ModelArgs) -> dict[str, LowRank]:
        """The updates, by our name of the weight, for a model of these arguments.

        MismatchError if a layer or a shape is not the model's. NumericsError if a number is not finite.
        """
        for name, pair in self.pairs.items():
            self._check(name, pair, args)
        found: dict[str, LowRank] = {}
        read = lru_cache(2)(self.tensor)  # the weights of a fused tensor follow each other, and share A
        for name, pair in self.pairs.items():
            a, b = read(pair.a), read(pair.b)
            if pair.fused and (place := rows_in_fused(name, args)):
                b = b[place[0]].copy()  # a view would keep the other rows
            a = np.ascontiguousarray(a.T) if pair.transposed else a
            if pair.flipped:
                a, b = np.ascontiguousarray(b.T), np.ascontiguousarray(a.T)
            rows = self.rows(name, args)
            found[name] = LowRank(a, b if rows is None else b[rows], pair.scale)
        return found

    def _check(self, name: str, pair: Pair, args: ModelArgs) -> None:
        layer = re.match(r"layers\.(\d+)\.", name)
        if layer and int(layer[1]) >= args.n_layers:
            what = f"{escape(pair.a)} is of layer {layer[1]}, the model has {args.n_layers} layers"
            raise MismatchError(f"{self.file.path}: {what}; {OTHER_BASE}")
        a, b = self.shapes(pair)
        OUT, IN = expected_shape(name, args)
        if pair.fused and (place := rows_in_fused(name, args)):
            OUT = place[1]
        OUT, IN = (IN, OUT) if pair.flipped else (OUT, IN)
        wanted_a, wanted_b = (a[0], IN), (OUT, a[0])
        for tensor, found, wanted in ((pair.a, a, wanted_a), (pair.b, b, wanted_b)):
            if found != wanted:
                if pair.transposed and tensor == pair.a:
                    found, wanted = found[::-1], wanted[::-1]
                what = f"{escape(tensor)} has the shape {found}, the model wants {wanted}"
                raise MismatchError(f"{self.file.path}: {what}; {OTHER_BASE}")

    def check_copies(self, weights: Mapping[str, StoredTensor]) -> None:
        """MismatchError if a weight of the base that the adapter repeats is not near the base's own.

        The two may be rounded to different formats. So the check finds another model, not another rounding.
        """
        for name, tensor in self.copies.items():
            copy, own = self.file.tensor(tensor), weights[name]
            where = f"{self.file.path}: {escape(tensor)}"
            if copy.shape != own.shape:
                what = f"has the shape {copy.shape}, the model's weight has {own.shape}"
                raise MismatchError(f"{where} {what}; {OTHER_BASE}")
            rows = np.linspace(0, len(own) - 1, min(len(own), ROWS_COMPARED)).astype(int)
            left, right = copy[rows].astype(np.float64), own[rows].astype(np.float64)
            distance = np.linalg.norm(left - right) / (np.linalg.norm(right) + 1e-30)
            if not distance < NEAR:
                what = f"repeats the base's weight, but it is {distance:.2g} away from this model's"
                raise MismatchError(f"{where} {what}; {OTHER_BASE}")


def paired(
    file: TensorFile, halves: Mapping[str, tuple[str | None, str | None]], ends: tuple[str, str]
) -> dict[str, tuple[str, str]]:
    """The two tensors of each weight. MismatchError if one is missing, or is no matrix.

    `ends` is how the names of the two end, for messages.
    """
    found = {}
    for weight, (a, b) in halves.items():
        if a is None or b is None:
            missing, other = (ends[0], b) if a is None else (ends[1], a)
            raise MismatchError(f"{file.path} has {escape(other)}, and its {missing} is missing")
        for name in (a, b):
            if len(shape := file.tensors[name].shape) != 2 or 0 in shape:
                raise MismatchError(f"{file.path}: {escape(name)} has the shape {shape}, wanted a matrix")
        found[weight] = (a, b)
    if not found:
        raise FormatError(f"{file.path} has no pairs of {ends[0]} and {ends[1]}: it is no LoRA adapter")
    return found
