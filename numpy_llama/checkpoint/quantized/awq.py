"""AWQ (Lin et al. 2023), as AutoAWQ stores it: 4 bits, in the order of one of its two kernels.

    gemm                                                 gemv
    X.qweight  I32  (K, N / 8)                           (N, K / 8), in plain order
    X.qzeros   I32  (G, N / 8)                           (N, W), in plain order
    X.scales   F16  (G, N)                               (N, 8 W), behind the G groups are zeros

K = IN, N = OUT. In gemm, bits 4 i .. 4 i + 3 of word c belong to row 8 c + [0, 2, 4, 6, 1, 3, 5, 7][i].
"""

from abc import abstractmethod
from collections.abc import Mapping

import numpy as np

from ...config import Array
from ...errors import UnsupportedError, escape
from ..json_file import JsonFile
from .base import FileTensor, Method, check_parts
from .grouped import FLOATS, GroupedWeight, group_size, groups_of, whole_numbers

GEMM_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
MIDDLE = 8
VERSIONS = ("gemm", "gemv")


def gemm_numbers(words: Array) -> Array:
    """(K, N / 8) words in the order of gemm -> (N, K) uint8."""
    a_byte = np.ascontiguousarray(words.T).view(np.uint8).reshape(words.shape[1], len(words), 4)
    q = np.empty((words.shape[1], 8, len(words)), np.uint8)
    for i, row in enumerate(GEMM_ORDER):
        q[:, row] = a_byte[..., i // 2] >> np.uint8(i % 2 * 4) & 15
    return q.reshape(-1, len(words))


class AWQ(Method):
    """The settings: bits, group_size, version, zero_point. Files of their own have older names for two."""

    markers = ("qweight",)

    def __init__(self, settings: JsonFile):
        path = settings.path
        bits = settings.get("bits", int, settings.get("w_bit", int))
        if bits != 4:
            raise UnsupportedError(f"{path}: AWQ of {escape(bits, 60)} bits; 4 are run")
        self.version = settings.get("version", str, "gemm").lower()
        if self.version not in VERSIONS:
            found = escape(settings.get("version", str), 60)
            raise UnsupportedError(f"{path}: AWQ weights stored for {found}; run are {', '.join(VERSIONS)}")
        if (backend := settings.get("backend", str, "autoawq")) == "llm-awq":
            raise UnsupportedError(f"{path}: AWQ weights stored by {backend}; those of AutoAWQ are run")
        self.group_size = group_size(settings, settings.get("q_group_size", int, 128))
        self.symmetric = not settings.get("zero_point", bool, True)
        self.title = f"AWQ ({self.version}), 4 bits"

    def weight(self, name: str, parts: Mapping[str, FileTensor]) -> "AWQWeight":
        check_parts(name, parts, ("qweight", "qzeros", "scales"))
        return (GemmWeight if self.version == "gemm" else GemvWeight)(self, parts)


class AWQWeight(GroupedWeight):
    """X.weight, checked from the headers of its tensors."""

    bits = 4

    def __init__(self, method: AWQ, parts: Mapping[str, FileTensor]):
        self.method, self.parts, self.scales_part = method, parts, parts["scales"]
        self.qweight, self.qzeros = parts["qweight"], parts["qzeros"]
        self.shape = self._shape(*self.qweight.matrix())
        K = self.shape[1]
        self.size = K if method.group_size == -1 else method.group_size
        if K % self.size:
            self.qweight.fail(f"has {K} columns, no multiple of the group size {escape(self.size, 40)}")
        self.qweight.check(["I32"], self.qweight.info.shape)
        self._check(*self.shape, K // self.size)

    @abstractmethod
    def _shape(self, rows: int, words: int) -> tuple[int, int]:
        """(N, K) of a qweight of this shape."""

    @abstractmethod
    def _check(self, N: int, K: int, G: int) -> None:
        """The shapes of qzeros and scales."""

    def groups(self) -> Array:
        return groups_of(self.shape[1], self.size)

    def zeros(self) -> Array:
        zeros = self.stored_zeros()
        if not (zeros == MIDDLE).all():
            if self.method.symmetric:
                self.qzeros.fail(f"has other zeros than {MIDDLE}, and zero_point is false")
            return zeros
        return np.array([[MIDDLE]], np.uint8)

    @abstractmethod
    def stored_zeros(self) -> Array:
        """-> (N, G)."""


class GemmWeight(AWQWeight):
    def _shape(self, rows: int, words: int) -> tuple[int, int]:
        return 8 * words, rows

    def _check(self, N: int, K: int, G: int) -> None:
        self.qzeros.check(["I32"], (G, N // 8))
        self.scales_part.check(FLOATS, (G, N))

    def numbers(self, rows: slice) -> Array:
        first = rows.start // 8  # a word has eight rows
        q = gemm_numbers(self.qweight.array[:, first : -(-rows.stop // 8)])
        return q[rows.start - 8 * first : rows.stop - 8 * first]

    def stored_zeros(self) -> Array:
        return gemm_numbers(self.qzeros.array)

    def scales(self) -> Array:
        return np.ascontiguousarray(self.scales_part.floats().T)


class GemvWeight(AWQWeight):
    def _shape(self, rows: int, words: int) -> tuple[int, int]:
        return rows, 8 * words

    def _check(self, N: int, K: int, G: int) -> None:
        wide = self.qzeros.matrix()[1]
        if 8 * wide < G:
            self.qzeros.fail(f"has {wide} words a row, {G} groups need {-(-G // 8)}")
        self.qzeros.check(["I32"], (N, wide))
        self.scales_part.check(FLOATS, (N, 8 * wide))
        self.n_groups = G

    def numbers(self, rows: slice) -> Array:
        return whole_numbers(self.qweight.array[rows], 4)

    def stored_zeros(self) -> Array:
        return whole_numbers(self.qzeros.array, 4)[:, : self.n_groups]

    def scales(self) -> Array:
        return self.scales_part.floats()[:, : self.n_groups]
