"""Whole numbers with a scale and a zero for each group of columns, mapped onto our formats without loss.

    w[n, k] = scale[n, g] * (q[n, k] - zero[n, g])          g: the group of column k

A block of ours is 32 weights with one scale. So a weight whose groups are whole blocks takes the smallest
format that holds all of its q - zero, with d = scale:

    Q4_0     -8 .. 7              4 bits with one zero in the middle, 2 and 3 bits
    Q4_Z      0 .. 15, less z     4 bits with other zeros
    Q8_0   -128 .. 127            8 bits with one zero in the middle
    INT8   -128 .. 127            any bits, if float16 cannot hold a scale

Everything else is expanded to float32: groups of another size, 8 bits with other zeros. Where groups are no
runs of columns (act-order), the columns are stored sorted by group.
"""

from abc import abstractmethod
from collections.abc import Callable, Mapping

import numpy as np

from ...backend.formats import FORMATS, QK, Format, StoredTensor, whole_q4_0, whole_q4_z, whole_signed_bytes
from ...config import Array
from ...errors import ConfigError, NumericsError, escape
from ..json_file import JsonFile
from .base import FileTensor, QuantizedWeight
from .parts import made_rows

FLOATS = ("F16", "BF16", "F32")  # the types of a scale


def whole_numbers(words: Array, bits: int) -> Array:
    """Whole numbers of `bits` bits out of 32-bit words, the lowest bits first: (..., W) -> (..., n) uint8.

    2, 4 and 8 bits: a word holds 32 / bits of them. 3 bits: three words hold 32, and number i begins at bit
    3 i of the 96.
    """
    if bits == 3:
        low, middle, high = np.moveaxis(words.view(np.uint32).reshape(*words.shape[:-1], -1, 3), -1, 0)
        parts = [
            *(low >> 3 * i for i in range(10)),
            low >> 30 | middle << 2,
            *(middle >> 3 * i + 1 for i in range(10)),
            middle >> 31 | high << 1,
            *(high >> 3 * i + 2 for i in range(10)),
        ]
        q = np.stack([(part & 7).astype(np.uint8) for part in parts], axis=-1)
        return q.reshape(*words.shape[:-1], -1)
    a_byte = np.ascontiguousarray(words).view(np.uint8)
    if bits == 8:
        return a_byte
    q = np.empty((*a_byte.shape, 8 // bits), np.uint8)
    for i in range(8 // bits):
        np.bitwise_and(a_byte >> np.uint8(bits * i), (1 << bits) - 1, out=q[..., i])
    return q.reshape(*words.shape[:-1], -1)


class GroupedWeight(QuantizedWeight):
    """A weight of whole numbers. A method says how they lie in the file."""

    bits: int
    parts: Mapping[str, FileTensor]
    scales_part: FileTensor

    @abstractmethod
    def numbers(self, rows: slice) -> Array:
        """q of some rows: -> (rows, K) uint8, columns as in the file."""

    @abstractmethod
    def zeros(self) -> Array:
        """-> (N, G) uint8, or (1, 1) if all are equal."""

    @abstractmethod
    def scales(self) -> Array:
        """-> (N, G) in float16 or float32."""

    @abstractmethod
    def groups(self) -> Array:
        """The group of each column: -> (K,), from 0 to G - 1."""

    def stored(self) -> StoredTensor:
        groups, order = self.groups(), None
        if (np.diff(groups) < 0).any():
            order = np.argsort(groups, kind="stable")
            groups = groups[order]
        format = self.format(groups)
        if format.block == 1:
            return StoredTensor(format, self.shape, lambda rows: self._made(rows, format, self._floats))
        places = None if order is None else np.argsort(order)
        return StoredTensor(
            format, self.shape, lambda rows: self._made(rows, format, self._blocks, order), None, places
        )

    def format(self, sorted_groups: Array) -> Format:
        """The smallest of our formats that holds the weight exactly, if its columns are sorted by group."""
        K, zeros = self.shape[1], self.zeros()
        least, most = -int(zeros.max()), (1 << self.bits) - 1 - int(zeros.min())
        whole = K % QK == 0 and (sorted_groups.reshape(-1, QK) == sorted_groups[::QK, None]).all()
        if not whole or least < -128 or most > 127:
            return FORMATS["F32"]
        if not self._fits_float16():
            return FORMATS["INT8"]
        if least >= -8 and most <= 7:
            return FORMATS["Q4_0"]
        return FORMATS["Q4_Z" if self.bits <= 4 else "Q8_0"]

    def _fits_float16(self) -> bool:
        if self.scales_part.info.type_name == "F16":
            return True
        scales = self.scales()
        with np.errstate(over="ignore"):
            return bool((scales.astype(np.float16) == scales).all())

    def _made(
        self, rows: slice, format: Format, make: Callable[..., Array], order: Array | None = None
    ) -> Array:
        """The bytes of some rows: `make` computes those of a part."""
        groups, scales, zeros = self.groups(), self.scales(), self.zeros()
        with np.errstate(over="ignore"):
            largest = np.abs(scales).max().astype(np.float32) * np.float32(1 << self.bits)
        if not np.isfinite(largest):
            self.scales_part.fail("has a scale that is NaN or infinite, or makes such weights", NumericsError)
        if order is not None:
            groups = groups[order]

        def fill(part: slice, out: Array) -> None:
            q, z = self.numbers(part), zeros if zeros.size == 1 else zeros[part]
            made = make(format, q if order is None else q[:, order], scales[part], z, groups)
            out[...] = made.reshape(out.shape)

        out = made_rows(rows, self.shape[1], format, fill)
        for part in self.parts.values():
            part.forget()
        return out

    @staticmethod
    def _blocks(format: Format, q: Array, scales: Array, zeros: Array, groups: Array) -> Array:
        of_block = groups[::QK]
        kind = "<f4" if format.name == "INT8" else "<f2"
        d, q = scales[:, of_block].astype(kind), q.reshape(len(q), -1, QK)
        z = np.broadcast_to(zeros if zeros.size == 1 else zeros[:, of_block], d.shape)
        if format.name == "Q4_Z":
            return whole_q4_z(d, z.astype("<f2"), q)
        difference = (q - z[..., None]).view(np.int8)  # modulo 256: the bits of an int8
        return whole_q4_0(d, difference) if format.name == "Q4_0" else whole_signed_bytes(d, difference)

    @staticmethod
    def _floats(format: Format, q: Array, scales: Array, zeros: Array, groups: Array) -> Array:
        z = zeros if zeros.size == 1 else zeros[:, groups]
        difference = q.astype(np.int16) - z
        return (scales.astype(np.float32)[:, groups] * difference).astype("<f4").view(np.uint8)


def group_size(settings: JsonFile, default: int = -1) -> int:
    """The columns of a group; -1: all columns are one."""
    size: int = settings.get("group_size", int, default)
    if size != -1 and size < 1:
        raise ConfigError(f"{settings.path}: group_size is {escape(size, 40)}, it must be -1 or at least 1")
    return size


def groups_of(K: int, size: int) -> Array:
    """Runs of `size` columns, the last of which may be shorter: -> (K,)."""
    return np.arange(K) // size


def checked_groups(g_idx: FileTensor, G: int) -> Array:
    """The group of each column, as the file lists them; MismatchError if one is not from 0 to G - 1."""
    found = np.asarray(g_idx.array, np.int64)
    if (odd := (found < 0) | (found >= G)).any():
        at = int(odd.argmax())
        g_idx.fail(f"has the group {found[at]} at {at}, it must be from 0 to {G - 1}")
    return found
