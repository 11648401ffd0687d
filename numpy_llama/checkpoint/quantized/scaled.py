"""Weights of one byte each, with scales in another tensor: int8, and 8-bit floats (E4M3).

    w[r, c] = scale[r // rows, c // columns] * q[r, c]           LLM_INT8: times 1 / 127

A scale belongs to `rows` rows and `columns` columns: (1, K) is one scale a row, (N, K) one for all, (1, 128)
one for a group of 128 columns, (128, 128) one for a square. Squares at the edges may be smaller.

In our blocks the scale of 32 weights is a float32 number in front of them (backend/formats.py). Where the
rows, or the columns of a scale, are not whole blocks, the weight becomes F32, which is exact too.
"""

from collections.abc import Collection

import numpy as np

from ...backend.formats import FORMATS, ONE_127TH, StoredTensor, e4m3
from ...config import Array
from ...errors import ConfigError, NumericsError, escape
from ..json_file import JsonFile
from .base import FileTensor, QuantizedWeight
from .grouped import FLOATS
from .parts import made_rows

NAN = 0x7F  # of E4M3, without the sign
LARGEST = {"INT8": 128, "LLM_INT8": 128, "FP8": 448}  # |q|
CODES = {"INT8": "I8", "LLM_INT8": "I8", "FP8": "F8_E4M3"}  # the dtypes of q
MAX_BLOCK = 1 << 20


class ScaledWeight(QuantizedWeight):
    """q (N, K) in one of the formats INT8, LLM_INT8 and FP8, and a scale for each block of q."""

    def __init__(self, q: FileTensor, scale: FileTensor, block: tuple[int, int], format: str):
        self.q, self.scale, self.format, self.shape = q, scale, format, q.matrix()
        self.rows, self.columns = block

    def stored(self) -> StoredTensor:
        format, K = FORMATS[self.format], self.shape[1]
        if K % format.block or (self.columns % format.block and self.columns < K):
            return StoredTensor(FORMATS["F32"], self.shape, self._expanded)
        return StoredTensor(format, self.shape, self._blocks)

    def _blocks(self, rows: slice) -> Array:
        K, format = self.shape[1], FORMATS[self.format]
        scales, column = self._scales(), np.arange(0, K, format.block) // self.columns

        def make(part: slice, blocks: Array) -> None:
            row = np.arange(part.start, part.stop) // self.rows
            blocks[..., :4] = scales[row[:, None], column][..., None].view(np.uint8)
            blocks[..., 4:] = self._codes(part).reshape(len(row), len(column), format.block)

        made = made_rows(rows, K, format, make)
        self.q.forget()
        return made

    def _expanded(self, rows: slice) -> Array:
        scales = self._scales()

        def make(part: slice, weights: Array) -> None:
            row = np.arange(part.start, part.stop) // self.rows
            w = dequantized(self._codes(part), scales[row], self.columns, self.format)
            weights.view(np.float32)[..., 0] = w

        made = made_rows(rows, self.shape[1], FORMATS["F32"], make)
        self.q.forget()
        return made

    def _scales(self) -> Array:
        """(N / rows, K / columns), so that every weight is finite."""
        N, K = self.shape
        scales = self.scale.float32().reshape(-(-N // self.rows), -(-K // self.columns))
        limit = np.finfo(np.float32).max / np.float32(LARGEST[self.format])
        if not (np.abs(scales) <= limit).all():  # a NaN fails too
            self.scale.fail("has a scale that is NaN, infinite or too large", NumericsError)
        return scales

    def _codes(self, part: slice) -> Array:
        """Rows of q as bytes. NumericsError if one is the NaN of E4M3."""
        codes = self.q.array[part].view(np.uint8)
        if self.format == "FP8" and ((codes & NAN) == NAN).any():
            self.q.fail("has a weight that is NaN", NumericsError)
        return codes


def dequantized(codes: Array, scales: Array, columns: int, format: str) -> Array:
    """The formula above: bytes (N, K), scales of each row (N, K / columns) -> (N, K) in float32."""
    q = e4m3(codes) if format == "FP8" else codes.view(np.int8)
    w = scales[:, np.arange(codes.shape[1]) // columns] * q
    return w * ONE_127TH if format == "LLM_INT8" else w


def scaled_weight(
    q: FileTensor, scale: FileTensor, format: str, blocks: Collection[tuple[int, int]] = ()
) -> ScaledWeight:
    """One scale for all, one a row, or one for each block: the shape of `scale` chooses among `blocks`."""
    N, K = q.matrix()
    q.check([CODES[format]], (N, K))
    shapes: dict[tuple[int, ...], tuple[int, int]] = {
        (-(-N // rows), -(-K // columns)): (rows, columns) for rows, columns in blocks
    }
    shapes |= {(N,): (1, K), (N, 1): (1, K), (): (N, K), (1,): (N, K), (1, 1): (N, K)}
    found = scale.info
    if found.type_name not in FLOATS or found.shape not in shapes:
        wanted = f"{' or '.join(FLOATS)} of shape {' or '.join(str(shape) for shape in shapes)}"
        scale.fail(f"is {found.type_name} of shape {found.shape}, wanted {wanted}")
    return ScaledWeight(q, scale, shapes[found.shape], format)


def block_sizes(settings: JsonFile, key: str) -> list[tuple[int, int]]:
    """The rows and columns under `key` in a list, which is empty if they are absent. ConfigError if wrong."""
    sizes = settings.get(key, list)
    if sizes is None:
        return []
    if len(sizes) != 2 or any(type(n) is not int or not 1 <= n <= MAX_BLOCK for n in sizes):
        found = f"{key} is {escape(sizes, 60)}"
        raise ConfigError(f"{settings.path}: {found}, wanted two whole numbers from 1 to {MAX_BLOCK}")
    return [(sizes[0], sizes[1])]
