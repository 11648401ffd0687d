"""Weights as they are stored: the formats, and their definitions in NumPy.

A block format cuts each row into blocks of 32 weights. For each block it stores a float16 scale `d` and small
whole numbers `q`; Q4_1 and Q5_1 also store a float16 minimum `m`, and Q4_Z, which ggml does not have, a zero
`z`, a whole number up to 31 as a float16:

    format   bytes a block                                             value
    Q8_0     d, 32 signed bytes                                        d * q
    Q4_0     d, 16 bytes of two 4-bit numbers                          d * (q - 8)
    Q4_1     d, m, 16 bytes of two 4-bit numbers                       d * q + m
    Q4_Z     d, z, 16 bytes of two 4-bit numbers                       d * (q - z)
    Q5_0     d, 32 fifth bits, 16 bytes of two 4-bit numbers           d * (q - 16)
    Q5_1     d, m, 32 fifth bits, 16 bytes of two 4-bit numbers        d * q + m

Byte i holds weight i in its low half and weight i + 16 in its high half; bit i of 32 belongs to weight i.

A K format has blocks of 256 weights, cut again into sub-blocks of 32 (in Q6_K of 16). A block has one pair of
float16 scales, `d` and `dmin` (in Q6_K only `d`). A sub-block has small whole numbers `sc` and `m` (Q6_K:
`sc`):

    format   bytes a block                                             value
    Q4_K     d, dmin, 12 bytes of 6-bit sc and m, 128 bytes (4 bits)   d * sc * q - dmin * m
    Q5_K     the same with 32 bytes (fifth bits) before the 128        d * sc * q - dmin * m
    Q6_K     128 bytes (low 4 bits), 64 bytes (upper 2), 16 sc, d      d * sc * (q - 32)

    Q4_K, Q5_K   32 bytes hold 64 weights: byte i weight i in its low half, weight i + 32 in its high half;
                 byte i of the 32 bytes of fifth bits holds those of weights i, i + 32, ... i + 224
    Q6_K         64 bytes hold 128 weights: byte i weight i in its low half, weight i + 64 in its high half;
                 byte i of their 32 bytes of upper bits holds those of weights i, i + 32, i + 64, i + 96
    sc and m     sub-blocks 0..3 take 6 bits of a byte each, and the other 2 belong to sub-blocks 4..7:
                     byte j          sc[j + 4] bits 54, sc[j] bits 543210          j = 0..3
                     byte j + 4       m[j + 4] bits 54,  m[j] bits 543210
                     byte j + 8       m[j + 4] bits 3210, sc[j + 4] bits 3210

The layouts are ggml's (ggml-common.h), so the weights of a GGUF file are used in place.

Quantized checkpoints of Hugging Face have float32 scales. These blocks are ours: a float32 number `d`, and
whole numbers or codes. They have 32 weights, those of NF4 and FP4 have 64:

    format     bytes a block                                           value
    INT8       d, 32 signed bytes                                      d * q
    LLM_INT8   d, 32 signed bytes                                      (d * q) * (1 / 127)
    FP8        d, 32 bytes: a sign, 4 bits e and 3 bits f              d * E4M3(q)
    NF4        d, 32 bytes of two 4-bit numbers                        d * NF4_TABLE[q]
    FP4        d, 32 bytes of two 4-bit numbers                        d * FP4_TABLE[q]

    E4M3       2^(e - 7) * (1 + f / 8), and 2^-6 * f / 8 for e = 0; no NaN, so the largest is 480
    NF4, FP4   4 bytes hold 8 weights: byte i weight i in its low half, weight i + 4 in its high half
"""

import math
import mmap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, NoReturn

import numpy as np
from numpy.typing import DTypeLike

from .. import system
from ..config import Array
from ..errors import MismatchError, ParameterError, UnsupportedError

QK = 32  # weights in a block
QK_K = 256  # weights in a block of a K format
QK_TABLE = 64  # weights in a block of NF4 and FP4
PACKED_ROWS = 16  # rows that lie side by side for the kernels
CACHE_LINE = 64  # bytes: packed rows begin on a cache line
X_MAX = {8: np.float32(127 * 128), 14: np.float32(8191), 15: np.float32(127 * 128)}  # quantized activations
BLOCKS_ABOVE = 3  # times the mean of a token's blocks: from there on 8 bits are too few
WEIGHTS_AT_ONCE = 1 << 20  # weights that `dequantize` unpacks at a time
MAX_F16 = 65504  # if no weight is larger, d and m are finite in every format
ONE_127TH = np.float32(7.874015718698502e-3)

# The numbers of the codes 0..15: bitsandbytes' quant_map. NF4 (Dettmers et al. 2023, QLoRA, appendix E) has
# quantiles of the normal distribution; FP4 has a sign, 2 bits of exponent and 1 of fraction.
NF4_TABLE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)
_FP4 = np.array([0, 0.005208333333, 0.66666667, 1, 0.33333333, 0.5, 0.16666667, 0.25], np.float32)
FP4_TABLE = np.concatenate([_FP4, 0 - _FP4])  # code 8 is 0 as well, not -0
# Those numbers as bytes times a unit, which the kernels multiply by rounded activations. Each unit has the
# least square error, by the codes of normal weights: 0.47% of their size in NF4, 0.33% in FP4.
_NF4_BYTES = [-124, -86, -65, -49, -35, -23, -11, 0, 10, 20, 31, 42, 55, 70, 90, 124]
_FP4_BYTES = [0, 1, 80, 120, 40, 60, 20, 30, 0, -1, -80, -120, -40, -60, -20, -30]
ROUNDED_TABLES = {
    "NF4": np.array(_NF4_BYTES, np.float32) / np.float32(124.115),
    "FP4": np.array(_FP4_BYTES, np.float32) / np.float32(120),
}


def dequantize_f32(rows: Array) -> Array:
    return rows.view("<f4")


def dequantize_f16(rows: Array) -> Array:
    return _float16(rows)


def dequantize_bf16(rows: Array) -> Array:
    """bfloat16 is the upper half of a float32."""
    return (rows.view("<u2").astype(np.uint32) << 16).view(np.float32)


def dequantize_q8_0(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 2 + QK)
    d = _float16(blocks[..., :2])
    return (d * blocks[..., 2:].view(np.int8)).reshape(len(rows), -1)


def dequantize_q4_0(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 2 + QK // 2)
    d = _float16(blocks[..., :2])
    q = _nibbles(blocks[..., 2:])
    return (d * (q.view(np.int8) - 8)).reshape(len(rows), -1)


def dequantize_q4_1(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 4 + QK // 2)
    d, m = _float16(blocks[..., 0:2]), _float16(blocks[..., 2:4])
    return (d * _nibbles(blocks[..., 4:]) + m).reshape(len(rows), -1)


def dequantize_q4_z(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 4 + QK // 2)
    d, z = _float16(blocks[..., 0:2]), _float16(blocks[..., 2:4])
    return (d * (_nibbles(blocks[..., 4:]) - z)).reshape(len(rows), -1)


def dequantize_q5_0(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 6 + QK // 2)
    d = _float16(blocks[..., :2])
    q = _nibbles(blocks[..., 6:]) | _bits(blocks[..., 2:6]) << 4
    return (d * (q.view(np.int8) - 16)).reshape(len(rows), -1)


def dequantize_q5_1(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 8 + QK // 2)
    d, m = _float16(blocks[..., 0:2]), _float16(blocks[..., 2:4])
    q = _nibbles(blocks[..., 8:]) | _bits(blocks[..., 4:8]) << 4
    return (d * q + m).reshape(len(rows), -1)


def dequantize_q4_k(rows: Array) -> Array:
    blocks = rows.reshape(-1, 16 + QK_K // 2)
    q = _nibbles(blocks[:, 16:].reshape(-1, 4, 32))
    return _scaled(blocks, q).reshape(len(rows), -1)


def dequantize_q5_k(rows: Array) -> Array:
    blocks = rows.reshape(-1, 16 + QK_K // 8 + QK_K // 2)
    fifth = blocks[:, None, 16:48] >> np.arange(8, dtype=np.uint8)[:, None] & 1  # (blocks, 8, 32)
    q = _nibbles(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 8, 32) | fifth << 4
    return _scaled(blocks, q).reshape(len(rows), -1)


def dequantize_q6_k(rows: Array) -> Array:
    blocks = rows.reshape(-1, QK_K // 2 + QK_K // 4 + 16 + 2)
    upper = blocks[:, 128:192].reshape(-1, 2, 1, 32) >> np.array([[0], [2], [4], [6]], np.uint8) & 3
    q = _nibbles(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 2, 4, 32) | upper << 4
    d = _float16(blocks[:, 208:]) * blocks[:, 192:208].view(np.int8)
    return (d[..., None] * (q.view(np.int8) - 32).reshape(-1, 16, 16)).reshape(len(rows), -1)


def dequantize_int8(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 4 + QK)
    return (_float32(blocks[..., :4]) * blocks[..., 4:].view(np.int8)).reshape(len(rows), -1)


def dequantize_llm_int8(rows: Array) -> Array:
    """Rounded twice, as bitsandbytes' int8_vectorwise_dequant does (Dettmers et al. 2022, LLM.int8())."""
    return dequantize_int8(rows) * ONE_127TH


def dequantize_fp8(rows: Array) -> Array:
    blocks = rows.reshape(len(rows), -1, 4 + QK)
    return (_float32(blocks[..., :4]) * e4m3(blocks[..., 4:])).reshape(len(rows), -1)


def e4m3(codes: Array) -> Array:
    """A float16 with the same bits is 256 times too small: the bias of its exponent is 15, not 7."""
    codes = codes.astype(np.uint16)
    return ((codes & 0x80) << 8 | (codes & 0x7F) << 7).view(np.float16).astype(np.float32) * np.float32(256)


def dequantize_nf4(rows: Array) -> Array:
    return _from_table(rows, NF4_TABLE)


def dequantize_fp4(rows: Array) -> Array:
    return _from_table(rows, FP4_TABLE)


def _from_table(rows: Array, table: Array) -> Array:
    """d * table[q]."""
    blocks = rows.reshape(len(rows), -1, 4 + QK_TABLE // 2)
    q = _nibbles(blocks[..., 4:].reshape(*blocks.shape[:-1], -1, 4)).reshape(*blocks.shape[:-1], QK_TABLE)
    return (_float32(blocks[..., :4]) * table[q]).reshape(len(rows), -1)


def _scaled(blocks: Array, q: Array) -> Array:
    """(d * sc) * q - dmin * m: Q4_K or Q5_K blocks and their numbers q -> (blocks, 8, 32)."""
    low, middle, high = np.split(blocks[:, 4:16], 3, axis=-1)
    sc = np.concatenate([low & 63, high & 15 | low >> 6 << 4], axis=-1)
    m = np.concatenate([middle & 63, high >> 4 | middle >> 6 << 4], axis=-1)
    d, minimum = _float16(blocks[:, 0:2]) * sc, _float16(blocks[:, 2:4]) * m
    return d[..., None] * q.reshape(-1, 8, 32) - minimum[..., None]


def _float16(pair: Array) -> Array:
    with np.errstate(invalid="ignore"):  # ARM reports that a signaling NaN becomes a quiet one
        return pair.view("<f2").astype(np.float32)


def _float32(four: Array) -> Array:
    return np.ascontiguousarray(four).view("<f4")


def _nibbles(q: Array) -> Array:
    """(..., n) bytes -> (..., 2 n) numbers of 0..15: the low halves, then the high ones."""
    return np.concatenate([q & 0x0F, q >> 4], axis=-1)


def _bits(q: Array) -> Array:
    """(..., 4) bytes -> (..., 32) numbers of 0 or 1."""
    return np.unpackbits(q, axis=-1, bitorder="little")


def quantize_f32(x: Array) -> Array:
    return np.ascontiguousarray(x, "<f4").view(np.uint8)


def quantize_f16(x: Array) -> Array:
    # Beyond 65504 a float16 is infinite, as in every converter. NaN: as in _float16.
    with np.errstate(over="ignore", invalid="ignore"):
        return np.ascontiguousarray(x.astype("<f2")).view(np.uint8)


def quantize_bf16(x: Array) -> Array:
    """Round to nearest, ties to even; a NaN stays a NaN."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet_nan = (bits >> 16) | 64
    return np.where(np.isnan(x), quiet_nan, rounded).astype("<u2").view(np.uint8)


def quantize_q8_0(x: Array) -> Array:
    """d = max|x| / 127; q = x / d, rounded half away from zero."""
    x = x.reshape(len(x), -1, QK)
    d = np.abs(x).max(axis=-1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    q = np.trunc(scaled + np.copysign(np.float32(0.5), scaled)).astype(np.int8)
    return _blocks([d.astype("<f2"), q])


def quantize_q4_0(x: Array) -> Array:
    """d = x_max / -8 where |x_max| is largest: that weight becomes q = 0, its exact value."""
    x = x.reshape(len(x), -1, QK)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    d = extreme / np.float32(-8)
    q = np.minimum(np.trunc(x * _inverse(d) + np.float32(8.5)), 15).astype(np.uint8)
    return _blocks([d.astype("<f2"), _pairs(q)])


def quantize_q4_1(x: Array) -> Array:
    """d = (max - min) / 15, m = min."""
    x = x.reshape(len(x), -1, QK)
    m = x.min(axis=-1, keepdims=True)
    d = (x.max(axis=-1, keepdims=True) - m) / np.float32(15)
    q = np.minimum(np.trunc((x - m) * _inverse(d) + np.float32(0.5)), 15).astype(np.uint8)
    return _blocks([d.astype("<f2"), m.astype("<f2"), _pairs(q)])


def quantize_q5_0(x: Array) -> Array:
    """Q4_0 with twice as many steps: d = x_max / -16."""
    x = x.reshape(len(x), -1, QK)
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=-1)[..., None], axis=-1)
    d = extreme / np.float32(-16)
    q = np.minimum(np.trunc(x * _inverse(d) + np.float32(16.5)), 31).astype(np.uint8)
    return _blocks([d.astype("<f2"), _fifth_bits(q), _pairs(q)])


def quantize_q5_1(x: Array) -> Array:
    """Q4_1 with twice as many steps: d = (max - min) / 31, m = min."""
    x = x.reshape(len(x), -1, QK)
    m = x.min(axis=-1, keepdims=True)
    d = (x.max(axis=-1, keepdims=True) - m) / np.float32(31)
    q = np.minimum(np.trunc((x - m) * _inverse(d) + np.float32(0.5)), 31).astype(np.uint8)
    return _blocks([d.astype("<f2"), m.astype("<f2"), _fifth_bits(q), _pairs(q)])


def rounded_weights(w: "StoredTensor", dtype: DTypeLike = np.float32) -> Array:
    """w as the kernels multiply it by rounded activations: with the bytes of ROUNDED_TABLES."""
    table = ROUNDED_TABLES.get(w.format.name)
    if table is None:
        return w.dequantize(dtype)
    format = replace(w.format, dequantize=lambda rows: _from_table(rows, table))
    return StoredTensor(format, w.shape, w.data, w.row_order, w.column_order).dequantize(dtype)


def quantize_activations(x: Array, bits: int) -> Array:
    """x rounded to 8, 14 or 15 bits: whole numbers q, with one scale for each 32 of a row.

    csrc/quantized_activations.c rounds in this way: 15 bits are q = 128 first + second, two bytes. 8 bits are
    the first byte, but both in the few blocks whose largest number is beyond BLOCKS_ABOVE times the mean of
    those of the row. 14 bits are one whole number.
    """
    x = np.asarray(x, np.float32)
    blocks = x.reshape(*x.shape[:-1], -1, QK)
    largest = np.abs(blocks).max(axis=-1, keepdims=True)
    nothing = largest < np.float32(1e-30)
    inverse = np.divide(X_MAX[bits], largest, out=np.zeros_like(largest), where=~nothing)
    q = np.rint(blocks * inverse)
    if bits == 8:
        sums = largest.cumsum(axis=-2)[..., -1:, :]  # one after the other, as in C
        limit = sums * np.float32(BLOCKS_ABOVE) / np.float32(largest.shape[-2])
        q = np.where(largest > limit, q, np.floor((q + 64) / 128) * 128)
    return (q * (largest / X_MAX[bits])).reshape(x.shape)


def pack_rows(data: Array, format: "Format") -> Array:
    """Rows of blocks, (OUT, bytes a row), as the kernels read them: PACKED_ROWS of them side by side.

    A block is cut into units: 2 bytes of `d` and `m`, 4 bytes elsewhere. Each unit of the first row is
    followed by the same unit of the other rows. The last row is repeated until the groups are whole.
    """
    rows = np.pad(data, ((0, -len(data) % PACKED_ROWS), (0, 0)), "edge")
    groups, blocks = len(rows) // PACKED_ROWS, rows.shape[1] // format.block_bytes
    stored = rows.reshape(groups, PACKED_ROWS, blocks, format.block_bytes)
    units = np.split(stored, np.cumsum(format.units)[:-1], axis=-1)
    packed = [unit.swapaxes(1, 2).reshape(groups, blocks, PACKED_ROWS * unit.shape[-1]) for unit in units]
    return np.concatenate(packed, axis=-1).reshape(rows.shape)


def unpack_rows(packed: Array, format: "Format", rows: Array) -> Array:
    """The way back from `pack_rows`, for the rows with these numbers: (...) -> (..., bytes a row)."""
    blocks = packed.reshape(-1, packed.shape[1] // format.block_bytes, PACKED_ROWS * format.block_bytes)
    out = np.empty((*rows.shape, blocks.shape[1], format.block_bytes), np.uint8)
    group, place = np.divmod(rows, PACKED_ROWS)
    at = 0
    for size, run in groupby(format.units):
        end = at + size * len(list(run))
        units = blocks[..., PACKED_ROWS * at : PACKED_ROWS * end].view(f"u{size}")
        units = units.reshape(*blocks.shape[:2], -1, PACKED_ROWS)  # (groups, blocks, units, rows)
        out[..., at:end].view(f"u{size}")[...] = units[group, ..., place]
        at = end
    return out.reshape(*rows.shape, packed.shape[1])


def whole_signed_bytes(d: Array, q: Array) -> Array:
    """Blocks of the weights d * q: (rows, blocks), int8 (rows, blocks, 32) -> (rows, bytes a row).

    Q8_0 if d is float16, INT8 if it is float32.
    """
    return _blocks([d[..., None], q])


def whole_q4_0(d: Array, q: Array) -> Array:
    """The same for float16 d, and q of -8..7."""
    return _blocks([d[..., None], _pairs((q + np.int8(8)).view(np.uint8))])


def whole_q4_z(d: Array, z: Array, q: Array) -> Array:
    """Blocks of d * (q - z): float16 (rows, blocks) twice, q of 0..15 (rows, blocks, 32)."""
    return _blocks([d[..., None], z[..., None], _pairs(q)])


def _inverse(d: Array) -> Array:
    """1 / d, or 0 if that is infinite. Such a d is 0 as a float16, and so is every weight."""
    return np.divide(1, d, out=np.zeros_like(d), where=np.abs(d) > 2.0**-128)


def _pairs(q: Array) -> Array:
    """(..., 32) numbers -> (..., 16) bytes: the lower four bits of i and of i + 16."""
    eights = np.ascontiguousarray(q & 15).view(np.uint64)  # eight numbers at a time
    out = np.empty((*q.shape[:-1], 2), np.uint64)
    for i in range(2):
        out[..., i] = eights[..., i] | eights[..., i + 2] << np.uint64(4)
    return out.view(np.uint8)


def _fifth_bits(q: Array) -> Array:
    """(..., 32) numbers -> (..., 4) bytes."""
    return np.packbits((q >> 4).reshape(-1), bitorder="little").reshape(*q.shape[:-1], 4)


def _blocks(parts: Sequence[Array]) -> Array:
    """The parts of each block, side by side as bytes: -> (rows, bytes a row)."""
    pieces = [np.ascontiguousarray(part).view(np.uint8) for part in parts]
    # Each piece is one item of a record, which NumPy copies at once.
    kinds = [f"V{piece.shape[-1]}" for piece in pieces]
    out = np.empty(pieces[0].shape[:-1], [(f"{i}", kind) for i, kind in enumerate(kinds)])
    for i, (piece, kind) in enumerate(zip(pieces, kinds, strict=True)):
        out[f"{i}"] = piece.view(kind)[..., 0]
    return out.view(np.uint8).reshape(len(out), -1)


WITH_MINIMA = ("Q4_1", "Q4_Z", "Q5_1", "Q4_K", "Q5_K")  # two float16 numbers in a block
OURS = 0x4E00  # the first of our own numbers of types, above all of ggml's and of its forks


@dataclass(frozen=True)
class Format:
    """The storage of a row of weights: `block_bytes` bytes hold `block` weights."""

    name: str
    code: int  # ggml's number of the type, or our own, in GGUF files and in csrc/kernels.h
    block: int
    block_bytes: int
    dequantize: Callable[[Array], Array]  # (rows, bytes a row) uint8 -> (rows, weights a row) float32
    quantize: Callable[[Array], Array] | None = None  # the way back; None for a format that is only read
    rows: int = 1  # rows that lie side by side

    @property
    def units(self) -> list[int]:
        """The bytes of each unit of a block, for `pack_rows`: a float16 has 2, all others 4."""
        halves = [2] * (self.block_bytes // 2 % 2) if self.name not in WITH_MINIMA else [2, 2]
        fours = [4] * ((self.block_bytes - sum(halves)) // 4)
        return fours + halves if self.name == "Q6_K" else halves + fours

    @property
    def in_floats(self) -> bool:
        """Whether its weights are floats: rounded activations meet rounded weights."""
        return self.block == 1 or self.name == "FP8"

    def row_bytes(self, n: int) -> int:
        """Bytes that a row of n weights takes."""
        return n // self.block * self.block_bytes

    def nbytes(self, shape: tuple[int, ...]) -> int:
        """Bytes that a weight takes: its rows are rounded up to whole groups."""
        rows = math.prod(shape[:-1])
        return (rows + -rows % self.rows) * self.row_bytes(shape[-1])

    @property
    def packed(self) -> "Format":
        """The format of the same rows after `pack_rows`. ggml has no type of its number: others refuse it."""
        name, code = f"{self.name} packed", PACKED_ROWS << 16 | self.code
        return replace(self, name=name, code=code, rows=PACKED_ROWS)


FORMATS = {
    f.name: f
    for f in [
        Format("F32", 0, 1, 4, dequantize_f32, quantize_f32),
        Format("F16", 1, 1, 2, dequantize_f16, quantize_f16),
        Format("Q4_0", 2, QK, 18, dequantize_q4_0, quantize_q4_0),
        Format("Q4_1", 3, QK, 20, dequantize_q4_1, quantize_q4_1),
        Format("Q5_0", 6, QK, 22, dequantize_q5_0, quantize_q5_0),
        Format("Q5_1", 7, QK, 24, dequantize_q5_1, quantize_q5_1),
        Format("Q8_0", 8, QK, 34, dequantize_q8_0, quantize_q8_0),
        Format("Q4_K", 12, QK_K, 144, dequantize_q4_k),
        Format("Q5_K", 13, QK_K, 176, dequantize_q5_k),
        Format("Q6_K", 14, QK_K, 210, dequantize_q6_k),
        Format("BF16", 30, 1, 2, dequantize_bf16, quantize_bf16),
        Format("INT8", OURS + 1, QK, 36, dequantize_int8),
        Format("LLM_INT8", OURS + 2, QK, 36, dequantize_llm_int8),
        Format("FP8", OURS + 3, QK, 36, dequantize_fp8),
        Format("NF4", OURS + 4, QK_TABLE, 36, dequantize_nf4),
        Format("FP4", OURS + 5, QK_TABLE, 36, dequantize_fp4),
        Format("Q4_Z", OURS + 6, QK, 20, dequantize_q4_z),
    ]
}
PACKED = {f.packed.name: f for f in FORMATS.values() if f.block > 1}  # the format of the rows, unpacked


class InPlace:
    """An object that uses memory of a file or of C in place. Its copy is itself, and a pickle is an error."""

    def __copy__(self) -> "InPlace":
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> "InPlace":
        return self

    def __reduce__(self) -> NoReturn:
        raise UnsupportedError(
            "a model cannot be pickled, because its weights are used in place, in the mapped file; "
            "load it in each process"
        )


def forget_pages(file_map: mmap.mmap, start: int, nbytes: int) -> None:
    """Release pages of a mapped file, so that they no longer count as memory of this process."""
    first = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (start + nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE
    if length > 0:
        system.forget_pages(file_map, first, length)


class StoredTensor(InPlace):
    """A weight (OUT, IN), or a vector (IN,), in the bytes in which it was stored.

    `data` is those bytes, or a function that makes those of some rows, a slice, at each use. A function is
    needed for a weight in several tensors, or in a format without kernels. `row_order[i]` is the place of
    row i, and `column_order[j]` that of column j, if they are stored in another order. Indexing gives rows in
    float32 and in the model's order, so an embedding table is used in place.
    """

    def __init__(
        self,
        format: Format,
        shape: tuple[int, ...],
        data: np.ndarray | Callable[[slice], np.ndarray],
        row_order: np.ndarray | None = None,
        column_order: np.ndarray | None = None,
    ):
        *outer, n = shape
        if n % format.block:
            raise MismatchError(f"rows of {n} weights, {format.name} needs a multiple of {format.block}")
        self.format, self.shape = format, tuple(shape)
        self.row_order, self.column_order = row_order, column_order
        self._data = data if callable(data) else data.reshape(*outer, format.row_bytes(n))

    @property
    def data(self) -> np.ndarray:
        """The bytes, (OUT, bytes a row), with the rows in their stored order."""
        if not callable(self._data):
            return self._data
        rows = slice(0, math.prod(self.shape[:-1]))
        return self._data(rows).reshape(*self.shape[:-1], self.format.row_bytes(self.shape[-1]))

    @property
    def nbytes(self) -> int:
        return self.format.nbytes(self.shape)

    @property
    def in_place(self) -> bool:
        """Whether the bytes exist already, in a mapped file or an array. Their use needs no more memory."""
        return not callable(self._data)

    def forget(self) -> None:
        """Release the pages of a mapped file, whose content was copied. A later use reads them again."""
        owner: Any = self._data
        while isinstance(owner, np.ndarray | memoryview):
            owner = owner.base if isinstance(owner, np.ndarray) else owner.obj
        if isinstance(owner, mmap.mmap) and isinstance(self._data, np.ndarray):
            begin = np.frombuffer(owner, np.uint8, 1).ctypes.data
            forget_pages(owner, self._data.ctypes.data - begin, self._data.nbytes)

    def realize(self) -> "StoredTensor":
        """The same tensor with its bytes in memory: itself, if it is in place."""
        if self.in_place:
            return self
        return StoredTensor(self.format, self.shape, self.data, self.row_order, self.column_order)

    def with_row_order(self, row_order: np.ndarray | None) -> "StoredTensor":
        """The same bytes, with the rows in another order."""
        return self.part(slice(0, len(self)), row_order)

    def part(self, rows: slice, row_order: np.ndarray | None) -> "StoredTensor":
        """Some rows of a matrix, in their stored order, as a tensor of its own. Other rows are not made."""
        made, shape = self._data, (rows.stop - rows.start, *self.shape[1:])
        data = (
            partial(_shifted, made, rows.start) if callable(made) and not self.in_place else self.data[rows]
        )
        return StoredTensor(self.format, shape, data, row_order, self.column_order)

    def stored_rows(self, index: Any) -> np.ndarray:
        """The bytes of rows in the model's order: an index or an array (...) -> (..., bytes a row).

        The columns of each row are in their stored order.
        """
        return self.data[index if self.row_order is None else self.row_order[index]]

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Array:
        """Rows in float32: an index or an array of them (...) -> (..., IN)."""
        picked = self.stored_rows(index)
        rows = np.ascontiguousarray(picked).reshape(-1, picked.shape[-1])
        x = self.format.dequantize(rows).reshape(*picked.shape[:-1], self.shape[-1])
        return x if self.column_order is None else x.take(self.column_order, axis=-1)

    def dequantize(self, dtype: DTypeLike = np.float32) -> Array:
        """The whole tensor as an ordinary array. A float32 tensor is not copied."""
        as_stored = self.format.name == "F32" and self.row_order is None and self.column_order is None
        if len(self.shape) == 1 or as_stored:
            return self[...].astype(dtype, copy=False)
        # Some rows at a time: Ctrl-C can act between two calls of NumPy, and temporary arrays stay small.
        whole, out = self.realize(), np.empty(self.shape, dtype)
        rows = max(1, WEIGHTS_AT_ONCE // math.prod(self.shape[1:]))
        for begin in range(0, len(self), rows):
            out[begin : begin + rows] = whole[begin : begin + rows]
        return out

    @classmethod
    def quantize(cls, x: np.ndarray, format: Format | str) -> "StoredTensor":
        """Store x (OUT, IN) in `format`, rounded to the numbers that it can hold."""
        if isinstance(format, str):
            if format not in FORMATS:
                raise UnsupportedError(f"no format {format!r}; there are {', '.join(FORMATS)}")
            format = FORMATS[format]
        if format.quantize is None:
            writable = ", ".join(name for name, f in FORMATS.items() if f.quantize)
            raise UnsupportedError(f"{format.name} can be read but not written; there are {writable}")
        if format.block > 1 and not (np.abs(x) <= MAX_F16).all():  # a NaN fails too
            raise ParameterError(f"NaN or a weight beyond {MAX_F16} cannot be stored in {format.name}")
        x = np.ascontiguousarray(x, np.float32)
        if x.shape[-1] % format.block:
            raise MismatchError(
                f"rows of {x.shape[-1]} weights, {format.name} needs a multiple of {format.block}"
            )
        return cls(format, x.shape, format.quantize(x.reshape(math.prod(x.shape[:-1]), x.shape[-1])))


def _shifted(make: Callable[[slice], np.ndarray], by: int, rows: slice) -> np.ndarray:
    return make(slice(rows.start + by, rows.stop + by))


class PackedTensor(StoredTensor):
    """A weight (OUT, IN) whose bytes are those of `pack_rows`, in a mapped file or made on loading.

    The kernels use `packed` in place. Every other use unpacks the rows that it takes.
    """

    def __init__(
        self,
        format: Format,
        shape: tuple[int, ...],
        packed: np.ndarray,
        row_order: np.ndarray | None = None,
        column_order: np.ndarray | None = None,
    ):
        def data(rows: slice) -> np.ndarray:
            return unpack_rows(packed, format, np.arange(shape[0])[rows])

        super().__init__(format, shape, data, row_order, column_order)
        self.packed = packed  # (OUT rounded up to whole groups, bytes a row)

    @property
    def in_place(self) -> bool:
        return True

    @cached_property
    def _numbers(self) -> np.ndarray:
        return np.arange(len(self))

    def stored_rows(self, index: Any) -> np.ndarray:
        rows = self._numbers[index if self.row_order is None else self.row_order[index]]
        return unpack_rows(self.packed, self.format, rows)
