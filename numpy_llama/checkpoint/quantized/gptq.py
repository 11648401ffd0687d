"""GPTQ (Frantar et al. 2022), as AutoGPTQ and GPTQModel store it: 2, 3, 4 or 8 bits.

    X.qweight  I32  (K bits / 32, N)     K = IN, N = OUT; whole numbers of `bits` bits along K, low bits first
    X.qzeros   I32  (G, N bits / 32)     the zeros, along N in the same way
    X.scales   F16  (G, N)
    X.g_idx    I32  (K,)                 the group of each column; absent in old files: k // group_size
    X.bias     F16  (N,)                 of zeros, in old files

Version 1 stores zero - 1, version 2 stores the zero. Files state the wrong one, so a symmetric weight, whose
zeros are all in the middle, is recognised by its numbers. `dynamic` gives some weights other bits or
groups; their shapes state these too, so its regular expressions are not run.
"""

from collections.abc import Mapping

import numpy as np

from ...backend.formats import StoredTensor
from ...config import Array
from ...errors import UnsupportedError, escape
from ..json_file import JsonFile
from .base import FileTensor, Method, check_parts
from .grouped import FLOATS, GroupedWeight, checked_groups, group_size, groups_of, whole_numbers

BITS = (2, 3, 4, 8)
PLAIN = (16, 32)  # bits of a weight that is not quantized
ZERO_MINUS = {"gptq": 1, "gptq_v2": 0}  # checkpoint_format -> zero - stored zero


class GPTQ(Method):
    """The settings: bits, group_size, sym, checkpoint_format."""

    markers = ("qweight",)

    def __init__(self, settings: JsonFile):
        self.path = settings.path
        kind = settings.get("checkpoint_format", str, "gptq")
        if settings.get("is_marlin_format", bool, False):
            kind = "marlin"
        if kind not in ZERO_MINUS:
            known = " and ".join(ZERO_MINUS)
            raise UnsupportedError(f"{self.path}: GPTQ weights stored as {escape(kind, 60)}; run are {known}")
        self.zero_minus = ZERO_MINUS[kind]
        bits = settings.require("bits", int)
        others = settings.get("dynamic", dict, {}) | settings.get("extra_config", dict, {})  # of auto-round
        overrides = [JsonFile(self.path, values=value) for value in others.values() if value]
        overrides = [other for other in overrides if other.get("bits", int, bits) not in PLAIN]
        self.bits = {bits, *(other.get("bits", int, bits) for other in overrides)}
        if odd := self.bits - set(BITS):
            found, run = escape(min(odd), 40), ", ".join(map(str, BITS))
            raise UnsupportedError(f"{self.path}: GPTQ of {found} bits; run are {run}")
        self.group_size = group_size(settings)
        self.one_size = not any("group_size" in other.values for other in overrides)
        self.asymmetric = not settings.get("sym", bool, True) and not any(
            "sym" in other.values for other in overrides
        )
        self.sorted = settings.get("desc_act", bool, False)
        self.title = f"GPTQ, {' and '.join(map(str, sorted(self.bits)))} bits"

    def weight(self, name: str, parts: Mapping[str, FileTensor]) -> "GPTQWeight":
        check_parts(name, parts, ("qweight", "qzeros", "scales"), ("g_idx", "bias"))
        return GPTQWeight(self, parts)


class GPTQWeight(GroupedWeight):
    """X.weight, checked from the headers of its tensors."""

    def __init__(self, method: GPTQ, parts: Mapping[str, FileTensor]):
        self.method, self.parts, self.scales_part = method, parts, parts["scales"]
        qweight, qzeros, scales = (parts[name] for name in ("qweight", "qzeros", "scales"))
        (words, N), (G, zero_words) = qweight.matrix(), qzeros.matrix()
        self.bits, rest = divmod(32 * zero_words, N)
        if rest or self.bits not in method.bits:
            found = f"has {zero_words} words for {N} rows, that is {32 * zero_words / N:g} bits"
            qzeros.fail(f"{found}; {method.path.name} states {' or '.join(map(str, sorted(method.bits)))}")
        if (words * 32) % self.bits or (self.bits == 3 and words % 3):
            qweight.fail(f"has {words} words a row, which are no whole numbers of {self.bits} bits")
        K = words * 32 // self.bits
        self.shape = N, K
        qweight.check(["I32"], (words, N))
        qzeros.check(["I32"], (G, zero_words))
        scales.check(FLOATS, (G, N))
        if "bias" in parts:
            parts["bias"].check(FLOATS, (N,))
        if "g_idx" in parts:
            parts["g_idx"].check(["I32"], (K,))
            return
        if method.sorted:
            qweight.fail("has no g_idx. With desc_act it must have one: the group of each column")
        self.size = method.group_size if method.one_size else -(-K // G)
        self.size = K if self.size == -1 else min(self.size, K)
        if -(-K // self.size) != G:
            scales.fail(f"has {G} groups, {K} columns in groups of {self.size} have {-(-K // self.size)}")

    def groups(self) -> Array:
        if "g_idx" not in self.parts:
            return groups_of(self.shape[1], self.size)
        return checked_groups(self.parts["g_idx"], self.scales_part.info.shape[0])

    def numbers(self, rows: slice) -> Array:
        return whole_numbers(np.ascontiguousarray(self.parts["qweight"].array[:, rows].T), self.bits)

    def scales(self) -> Array:
        return np.ascontiguousarray(self.scales_part.floats().T)

    def zeros(self) -> Array:
        """One zero if all stored ones are in the middle, in either version."""
        words, middle = self.parts["qzeros"].array, 1 << self.bits - 1
        stored = whole_numbers(words[:1], self.bits)
        first = int(stored[0, 0])
        equal = (stored == first).all() and (words == words[:1]).all()
        if not self.method.asymmetric and first in (middle, middle - 1) and equal:
            return np.array([[middle]], np.uint8)
        # AutoGPTQ stores the zero 0 of version 1 as 2^bits - 1.
        zeros = whole_numbers(words, self.bits) + np.uint8(self.method.zero_minus)
        return np.ascontiguousarray((zeros & np.uint8((1 << self.bits) - 1)).T)

    def stored(self) -> StoredTensor:
        if "bias" in self.parts and self.parts["bias"].float32().any():
            self.parts["bias"].fail("is not zero; LLaMA has no biases", UnsupportedError)
        return super().stored()
