"""bitsandbytes: weights of 8 bits with one scale a row, and of 4 bits with a table.

8 bits, LLM.int8() (Dettmers et al. 2022). Activations are not rounded as bitsandbytes rounds them.

    X.weight          int8 (N, K)
    X.SCB             float32 (N): the largest |w| of each row
    X.weight_format   0: rows one after another

    w[r, c] = (weight[r, c] * SCB[r]) * (1 / 127)

4 bits, QLoRA (Dettmers et al. 2023): the weight as one row of n = N * K numbers, in blocks of 64 or so.

    X.weight               N * K / 2 bytes, in any dtype; the first of two is the high half
    X.weight.quant_map     float32 (16): the numbers of NF4 or FP4
    X.weight.absmax        float32 (blocks), or with double quantization uint8 (blocks) and two more:
    X.weight.nested_absmax       float32 (blocks / 256)
    X.weight.nested_quant_map    float32 (256)
    X.weight.quant_state.bitsandbytes__nf4, or __fp4: JSON as bytes, with blocksize, shape, nested_offset

    w[i] = quant_map[q[i]] * absmax[i // blocksize]
    absmax[j] = nested_quant_map[absmax[j]] * nested_absmax[j // 256] + nested_offset

bitsandbytes rounds w to the dtype of the JSON when it computes; here w is float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...backend.formats import FORMATS, FP4_TABLE, NF4_TABLE, QK_TABLE, StoredTensor
from ...config import Array
from ...errors import FormatError, NumericsError, UnsupportedError, escape
from ..json_file import JsonFile, parse_json
from .base import FileTensor, Method, QuantizedWeight, check_parts
from .parts import made_rows
from .scaled import ScaledWeight, scaled_weight

TABLES = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}  # also our formats, in capitals
STATES = {f"weight.quant_state.bitsandbytes__{kind}": kind for kind in TABLES}
NESTED = ("weight.nested_absmax", "weight.nested_quant_map")
MAX_STATE = 4096  # bytes of JSON; real ones have about 200
STATE_KEYS = {"quant_type", "blocksize", "dtype", "shape"}
NESTED_KEYS = {"nested_blocksize", "nested_dtype", "nested_offset"}
BLOCK_SIZES = tuple(1 << n for n in range(5, 13))  # 32 .. 4096
MAX_NESTED = 1 << 24  # weights in a nested block
MAX_FLOAT32 = float(np.finfo(np.float32).max)


class BitsAndBytes(Method):
    """The tensors of a weight say how it is quantized; config.json says only how it was done."""

    markers = ("SCB", "weight.absmax")

    def __init__(self, settings: JsonFile):
        self.title = f"bitsandbytes, {4 if settings.get('load_in_4bit', bool, False) else 8} bits"

    def weight(self, name: str, parts: Mapping[str, FileTensor]) -> QuantizedWeight:
        if "SCB" in parts:
            return eight_bits(name, parts)
        return four_bits(name, parts)


# ---------------------------------------------------------------- 8 bits


def eight_bits(name: str, parts: Mapping[str, FileTensor]) -> ScaledWeight:
    check_parts(name, parts, ("weight", "SCB"), ("weight_format",))
    weight = scaled_weight(parts["weight"], parts["SCB"], "LLM_INT8")
    parts["SCB"].check(["F32"], weight.shape[:1])
    if order := parts.get("weight_format"):
        order.check(["U8"], ())
        if order.array != 0:
            order.fail(f"is {order.array}: only rows one after another, 0, are read", UnsupportedError)
    return weight


# ---------------------------------------------------------------- 4 bits


@dataclass(frozen=True)
class FourBitWeight(QuantizedWeight):
    """q (N * K / 2 bytes), and the scales of blocks."""

    parts: Mapping[str, FileTensor]
    kind: str
    shape: tuple[int, int]
    blocksize: int
    nested_blocksize: int
    nested_offset: float

    def stored(self) -> StoredTensor:
        if self.shape[1] % QK_TABLE or self.blocksize % QK_TABLE:  # a row ends within a block
            return StoredTensor(FORMATS["F32"], self.shape, self._expanded)
        return StoredTensor(FORMATS[self.kind.upper()], self.shape, self._blocks)

    def _blocks(self, rows: slice) -> Array:
        N, K = self.shape
        absmax, codes = self._absmax(), self._codes().reshape(N, K // QK_TABLE, QK_TABLE // 8, 4)

        def make(part: slice, blocks: Array) -> None:
            first = np.arange(part.start * K, part.stop * K, QK_TABLE)  # weights of our blocks
            d = absmax[first // self.blocksize].reshape(-1, K // QK_TABLE, 1)
            blocks[..., :4] = d.view(np.uint8)
            blocks[..., 4:] = low_halves_first(codes[part]).reshape(*d.shape[:2], -1)

        made = made_rows(rows, K, FORMATS[self.kind.upper()], make)
        self.parts["weight"].forget()
        return made

    def _expanded(self, rows: slice) -> Array:
        K, absmax, codes = self.shape[1], self._absmax(), self._codes()

        def make(part: slice, weights: Array) -> None:
            begin, end = part.start * K, part.stop * K
            q = halves(codes[begin // 2 : -(-end // 2)])[begin % 2 :][: end - begin]  # rows may share a byte
            w = dequantized(q, absmax[np.arange(begin, end) // self.blocksize], TABLES[self.kind])
            weights.view(np.float32)[..., 0] = w.reshape(-1, K)

        made = made_rows(rows, K, FORMATS["F32"], make)
        self.parts["weight"].forget()
        return made

    def _codes(self) -> Array:
        return self.parts["weight"].array.reshape(-1).view(np.uint8)

    def _absmax(self) -> Array:
        """(blocks,) in float32, all finite."""
        stored = self.parts["weight.absmax"]
        absmax = stored.array
        if self.nested_blocksize:
            nested, table = (self.parts[name].array for name in NESTED)
            of_block = nested[np.arange(len(absmax)) // self.nested_blocksize]
            with np.errstate(over="ignore", invalid="ignore"):
                absmax = table[absmax] * of_block + np.float32(self.nested_offset)
        if not np.isfinite(absmax).all():
            stored.fail("has a scale that is NaN or infinite", NumericsError)
        return np.ascontiguousarray(absmax, np.float32)


def low_halves_first(codes: Array) -> Array:
    """(..., 4) bytes: 01 23 45 67, high half first -> 40 51 62 73, the order of our NF4 and FP4."""
    left, right = codes[..., :2], codes[..., 2:]
    even, odd = left >> 4 | right & 0xF0, left & 15 | right << 4
    return np.stack([even, odd], axis=-1).reshape(codes.shape)


def halves(codes: Array) -> Array:
    """(n,) bytes -> (2 n,) numbers of 0..15, the high half of each first."""
    return np.stack([codes >> 4, codes & 15], axis=-1).reshape(-1)


def dequantized(q: Array, absmax: Array, table: Array) -> Array:
    """w[i] = table[q[i]] * absmax[i], with the absmax of each weight: (n,) -> (n,)."""
    return table[q] * absmax


def four_bits(name: str, parts: Mapping[str, FileTensor]) -> FourBitWeight:
    states = [state for state in STATES if state in parts]
    if len(states) != 1:
        wanted = " or ".join(STATES)
        parts["weight.absmax"].fail(f"has {len(states)} of the tensors {wanted}, it must have one")
    nested = NESTED if any(part in parts for part in NESTED) else ()
    check_parts(name, parts, ("weight", "weight.absmax", "weight.quant_map", states[0], *nested))
    state, kind = _state(parts[states[0]], bool(nested)), STATES[states[0]]
    where = parts[states[0]]
    if state["quant_type"] != kind:
        where.fail(f"is of quant_type {escape(state['quant_type'], 20)}, wanted {kind}")
    N, K = _sizes(where, state["shape"])
    blocksize = state["blocksize"]
    if type(blocksize) is not int or blocksize not in BLOCK_SIZES:
        where.fail(f"has the blocksize {escape(blocksize, 20)}, wanted one of {BLOCK_SIZES}", FormatError)
    q = parts["weight"]
    if N * K % 2 or q.info.nbytes != N * K // 2:
        q.fail(f"has {q.info.nbytes} bytes, a weight {N} x {K} of 4 bits needs {N * K / 2:.15g}")
    blocks = -(-N * K // blocksize)
    parts["weight.absmax"].check(["U8" if nested else "F32"], (blocks,))
    _check_table(parts["weight.quant_map"], kind)
    if not nested:
        return FourBitWeight(parts, kind, (N, K), blocksize, 0, 0.0)
    size, offset = state["nested_blocksize"], state["nested_offset"]
    if type(size) is not int or not 1 <= size <= MAX_NESTED:
        where.fail(f"has the nested_blocksize {escape(size, 20)}, wanted a whole number from 1", FormatError)
    if type(offset) not in (int, float) or not -MAX_FLOAT32 <= offset <= MAX_FLOAT32:
        where.fail(f"has the nested_offset {escape(offset, 20)}, wanted a float32 number", FormatError)
    parts[NESTED[0]].check(["F32"], (-(-blocks // size),))
    parts[NESTED[1]].check(["F32"], (256,))
    return FourBitWeight(parts, kind, (N, K), blocksize, size, float(offset))


def _state(tensor: FileTensor, nested: bool) -> dict[str, Any]:
    """The JSON of a quant_state, with exactly the keys that it must have."""
    info = tensor.info
    if info.type_name != "U8" or len(info.shape) != 1 or info.nbytes > MAX_STATE:
        tensor.fail(f"is {info.type_name} of shape {info.shape}, wanted at most {MAX_STATE} bytes of JSON")
    source = f"{tensor.file.path}: {escape(info.name)}"
    state = parse_json(tensor.array.tobytes(), source)
    wanted = STATE_KEYS | (NESTED_KEYS if nested else set())
    if not isinstance(state, dict) or state.keys() != wanted:
        found = sorted(state) if isinstance(state, dict) else state
        raise FormatError(f"{source} holds {escape(found, 120)}, wanted {', '.join(sorted(wanted))}")
    return state


def _sizes(where: FileTensor, sizes: Any) -> tuple[int, int]:
    whole = isinstance(sizes, list) and all(type(n) is int and 0 < n < 1 << 32 for n in sizes)
    if not whole or len(sizes) != 2:
        where.fail(f"has the shape {escape(sizes, 60)}, wanted 2 whole numbers from 1", FormatError)
    return sizes[0], sizes[1]


def _check_table(tensor: FileTensor, kind: str) -> None:
    """UnsupportedError for another table than that of the kernels."""
    tensor.check(["F32"], (16,))
    if not np.array_equal(tensor.array, TABLES[kind]):
        tensor.fail(f"is not the table of {kind.upper()}; other tables are not run", UnsupportedError)
