"""What every method of quantization gives: the tensors of each weight, and the weight in our formats."""

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

import numpy as np

from ...backend.formats import FORMATS, StoredTensor
from ...config import Array
from ...errors import MismatchError, NumpyLlamaError, UnsupportedError, escape
from ..base import TensorInfo
from ..json_file import JsonFile
from ..safetensors_file import SafetensorsFile

# Scales of activations, which are not used: activations are not rounded to 8 bits here.
OF_ACTIVATIONS = (
    *("input_scale", "input_scale_ub", "input_zero_point"),
    *("activation_scale", "output_scale", "output_zero_point"),
)
# Scales of a KV cache of 8 bits, which are not used: keys and values are not rounded so here. The names are
# those of compressed-tensors (KVCacheScaleType) and AutoFP8.
OF_CACHE = re.compile(r"\.self_attn\.(kv_scale|[kv]_scale|[kv]_zero_point)$")


@dataclass(frozen=True)
class FileTensor:
    """One tensor of a safetensors file."""

    info: TensorInfo
    file: SafetensorsFile

    @property
    def array(self) -> Array:
        """A view of the mapped file. BF16 and 8-bit floats are whole numbers here."""
        return self.file.array(self.info.name)

    def float32(self) -> Array:
        """F32, F16 or BF16 -> float32, in the tensor's shape."""
        data = np.ascontiguousarray(self.array).reshape(1, -1).view(np.uint8)
        return FORMATS[self.info.type_name].dequantize(data).reshape(self.info.shape)

    def floats(self) -> Array:
        """F16 as it is, F32 and BF16 in float32."""
        return self.array if self.info.type_name == "F16" else self.float32()

    def matrix(self) -> tuple[int, int]:
        """The shape of a matrix; MismatchError if it is none."""
        if len(self.info.shape) != 2 or 0 in self.info.shape:
            self.fail(f"has the shape {self.info.shape}, wanted two sizes above 0")
        return self.info.shape[0], self.info.shape[1]

    def forget(self) -> None:
        """Release the pages of the file."""
        self.file.file.forget(self.info.offset, self.info.nbytes)

    def fail(self, problem: str, error: type[NumpyLlamaError] = MismatchError) -> NoReturn:
        raise error(f"{self.file.path}: {escape(self.info.name)} {problem}")

    def check(self, dtypes: Iterable[str], shape: tuple[int, ...]) -> None:
        """MismatchError unless the tensor has one of these dtypes and this shape."""
        if self.info.type_name not in (dtypes := tuple(dtypes)) or self.info.shape != shape:
            wanted = f"{' or '.join(dtypes)} of shape {shape}"
            self.fail(f"is {self.info.type_name} of shape {self.info.shape}, wanted {wanted}")


class QuantizedWeight(ABC):
    """A weight (OUT, IN) in several tensors. Building one reads and checks their headers alone."""

    shape: tuple[int, int]

    @abstractmethod
    def stored(self) -> StoredTensor:
        """The weight in one of our formats, without loss. This may read the small tensors, but not q.

        The bytes of a row are made without other rows: fused weights are made one after the other.
        """


class Method(ABC):
    """A method, with the settings of one model."""

    title: str  # for `info`, for example "GPTQ, 4 bits"
    markers: tuple[str, ...]  # X is quantized if there is a tensor X.MARKER

    @abstractmethod
    def __init__(self, settings: JsonFile): ...

    @abstractmethod
    def weight(self, name: str, parts: Mapping[str, FileTensor]) -> QuantizedWeight:
        """The weight `name`.weight. parts: "qweight", for example, -> the tensor `name`.qweight."""

    def weights(
        self, tensors: Mapping[str, TensorInfo], tensor: Callable[[str], FileTensor]
    ) -> tuple[dict[str, QuantizedWeight], set[str]]:
        """-> X.weight of each quantized X, and the names of all tensors that are no weights themselves."""
        names = {
            name.removesuffix(f".{marker}")
            for name in tensors
            for marker in self.markers
            if name.endswith(f".{marker}")
        }
        parts: dict[str, dict[str, FileTensor]] = {name: {} for name in sorted(names)}
        for name in tensors:
            for end in (i for i, letter in enumerate(name) if letter == "."):
                if name[:end] in names:
                    parts[name[:end]][name[end + 1 :]] = tensor(name)
        found = {f"{name}.weight": self.weight(name, of) for name, of in parts.items()}
        of_weights = {part.info.name for of in parts.values() for part in of.values()}
        return found, of_weights | {name for name in tensors if OF_CACHE.search(name)}


def check_parts(
    name: str, parts: Mapping[str, FileTensor], needed: Iterable[str], optional: Iterable[str] = ()
) -> None:
    """MismatchError unless the weight has all needed tensors, and none but those and the optional ones."""
    needed = set(needed)
    path = next(iter(parts.values())).file.path
    for what, odd in [("no", needed - parts.keys()), ("an unknown", parts.keys() - needed - set(optional))]:
        if odd:
            raise MismatchError(f"{path}: {escape(name)} has {what} tensor {escape(', '.join(sorted(odd)))}")


def of_safetensors(path: Path, file: object) -> SafetensorsFile:
    """`file`, or an UnsupportedError: quantized weights in a pickle are not read."""
    if not isinstance(file, SafetensorsFile):
        raise UnsupportedError(f"{path}: quantized weights are read from .safetensors, not from .bin")
    return file
