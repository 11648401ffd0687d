"""Weights as they are stored: the formats, and what each one means in NumPy.

A block format cuts each row into blocks of 32 weights and stores for each block a float16 scale
`d` (and, in Q4_1, a float16 minimum `m`) and small whole numbers `q`:

    format   bytes a block                        value
    Q8_0     d, 32 signed bytes                   d * q
    Q4_0     d, 16 bytes of two 4-bit numbers     d * (q - 8)
    Q4_1     d, m, 16 bytes of two 4-bit numbers  d * q + m

Byte i of a 4-bit block holds weight i in its low half and weight i + 16 in its high half.
The layouts are ggml's (ggml-common.h), so that a GGUF file is used where it lies.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .errors import MismatchError, ParameterError, UnsupportedError

QK = 32  # weights in a block
MAX_F16 = 65504  # with weights up to here, every format's d and m are finite


def dequantize_f32(rows):
    return rows.view("<f4")


def dequantize_f16(rows):
    return rows.view("<f2").astype(np.float32)


def dequantize_bf16(rows):
    """bfloat16 is the upper half of a float32."""
    return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)


def dequantize_q8_0(rows):
    blocks = rows.reshape(len(rows), -1, 2 + QK)
    d = blocks[..., :2].view("<f2").astype(np.float32)
    return (d * blocks[..., 2:].view(np.int8)).reshape(len(rows), -1)


def dequantize_q4_0(rows):
    blocks = rows.reshape(len(rows), -1, 2 + QK // 2)
    d = blocks[..., :2].view("<f2").astype(np.float32)
    return (d * (_nibbles(blocks[..., 2:]) - np.int8(8))).reshape(len(rows), -1)


def dequantize_q4_1(rows):
    blocks = rows.reshape(len(rows), -1, 4 + QK // 2)
    d = blocks[..., 0:2].view("<f2").astype(np.float32)
    m = blocks[..., 2:4].view("<f2").astype(np.float32)
    return (d * _nibbles(blocks[..., 4:]) + m).reshape(len(rows), -1)


def _nibbles(q):
    """(..., 16) bytes -> (..., 32) numbers of 0..15."""
    return np.concatenate([q & 0x0F, q >> 4], axis=-1).view(np.int8)


def quantize_f32(x):
    return np.ascontiguousarray(x, "<f4").view(np.uint8)


def quantize_f16(x):
    with np.errstate(over="ignore"):  # beyond 65504 a float16 is infinite, as in every converter
        return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def quantize_bf16(x):
    """Round to nearest, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 64
    return np.where(np.isnan(x), quiet_nan, rounded).astype("<u2").view(np.uint8)


def quantize_q8_0(x):
    """d = max|x| / 127; q = x / d, rounded half away from zero."""
    x = x.reshape(len(x), -1, QK)
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return _blocks([d.astype("<f2"), q])


def quantize_q4_0(x):
    """d = x_max / -8 where |x_max| is largest: that weight becomes q = 0, its exact value."""
    x = x.reshape(len(x), -1, QK)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    d = extreme / np.float32(-8)
    q = np.minimum(np.trunc(x * _inverse(d) + np.float32(8.5)), 15).astype(np.uint8)
    return _blocks([d.astype("<f2"), q[..., :16] | q[..., 16:] << 4])


def quantize_q4_1(x):
    """d = (max - min) / 15, m = min."""
    x = x.reshape(len(x), -1, QK)
    m = x.min(axis=-1, keepdims=True)
    d = (x.max(axis=-1, keepdims=True) - m) / np.float32(15)
    q = np.minimum(np.trunc((x - m) * _inverse(d) + np.float32(0.5)), 15).astype(np.uint8)
    return _blocks([d.astype("<f2"), m.astype("<f2"), q[..., :16] | q[..., 16:] << 4])


def _inverse(d):
    """1 / d, or 0 where that is infinite: there d is 0 as a float16, and so is every weight."""
    return np.divide(1, d, out=np.zeros_like(d), where=np.abs(d) > 2.0**-128)


def _blocks(parts):
    """The parts of each block, side by side as bytes: -> (rows, bytes a row)."""
    blocks = np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in parts], axis=-1)
    return blocks.reshape(len(blocks), -1)


@dataclass(frozen=True)
class Format:
    """How a row of weights is stored: `block_bytes` bytes hold `block` weights."""

    name: str
    code: int  # ggml's number of the type, in GGUF files and in csrc/kernels.h
    block: int
    block_bytes: int
    dequantize: Callable  # (rows, bytes a row) uint8 -> (rows, weights a row) float32
    quantize: Callable  # and back

    def row_bytes(self, n: int) -> int:
        """Bytes that a row of n weights takes."""
        return n // self.block * self.block_bytes


FORMATS = {
    f.name: f
    for f in [
        Format("F32", 0, 1, 4, dequantize_f32, quantize_f32),
        Format("F16", 1, 1, 2, dequantize_f16, quantize_f16),
        Format("Q4_0", 2, QK, 18, dequantize_q4_0, quantize_q4_0),
        Format("Q4_1", 3, QK, 20, dequantize_q4_1, quantize_q4_1),
        Format("Q8_0", 8, QK, 34, dequantize_q8_0, quantize_q8_0),
        Format("BF16", 30, 1, 2, dequantize_bf16, quantize_bf16),
    ]
}


class StoredTensor:
    """A weight (OUT, IN), or a vector (IN,), in the bytes in which it was stored.

    `data` holds those bytes, or is a function that makes them whenever they are asked for: of a weight whose
    parts lie in several files, or in a format that nobody here computes with. `row_order` tells where row i
    lies, when that is not place i. Indexing gives rows in float32, so that an embedding table is used where
    it lies.
    """

    def __init__(
        self,
        format: Format,
        shape: tuple[int, ...],
        data: np.ndarray | Callable[[], np.ndarray],
        row_order: np.ndarray | None = None,
    ):
        *outer, n = shape
        if n % format.block:
            raise MismatchError(f"rows of {n} weights, {format.name} needs a multiple of {format.block}")
        self.format, self.shape, self.row_order = format, tuple(shape), row_order
        self._data = data if callable(data) else data.reshape(*outer, format.row_bytes(n))

    @property
    def data(self) -> np.ndarray:
        """The bytes, (OUT, bytes a row), rows in the order in which they lie."""
        if not callable(self._data):
            return self._data
        return self._data().reshape(*self.shape[:-1], self.format.row_bytes(self.shape[-1]))

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.format.row_bytes(self.shape[-1])

    @property
    def in_place(self) -> bool:
        """Whether the bytes lie somewhere already, so that using them takes no memory of its own."""
        return not callable(self._data)

    def realize(self) -> "StoredTensor":
        """The same tensor with its bytes in memory: itself, if it is in place."""
        if self.in_place:
            return self
        return StoredTensor(self.format, self.shape, self.data, self.row_order)

    def __len__(self):
        return self.shape[0]

    def __getitem__(self, index):
        """Rows in float32: an index or an array of them (...) -> (..., IN)."""
        picked = self.data[index if self.row_order is None else self.row_order[index]]
        rows = np.ascontiguousarray(picked).reshape(-1, picked.shape[-1])
        return self.format.dequantize(rows).reshape(*picked.shape[:-1], self.shape[-1])

    def dequantize(self, dtype=np.float32):
        """The whole tensor as an ordinary array."""
        return self[...].astype(dtype, copy=False)

    @classmethod
    def quantize(cls, x: np.ndarray, format: Format | str) -> "StoredTensor":
        """Store x (OUT, IN) in `format`; what is lost is what the format cannot hold."""
        if isinstance(format, str):
            if format not in FORMATS:
                raise UnsupportedError(f"no format {format!r}; there are {', '.join(FORMATS)}")
            format = FORMATS[format]
        if format.block > 1 and not (np.abs(x) <= MAX_F16).all():  # nor is a NaN
            raise ParameterError(f"NaN or a weight beyond {MAX_F16} cannot be stored in {format.name}")
        x = np.ascontiguousarray(x, np.float32)
        if x.shape[-1] % format.block:
            raise MismatchError(
                f"rows of {x.shape[-1]} weights, {format.name} needs a multiple of {format.block}"
            )
        return cls(format, x.shape, format.quantize(x.reshape(math.prod(x.shape[:-1]), x.shape[-1])))
