"""compressed-tensors, as llm-compressor stores it: a format for each kind of quantized weight.

pack-quantized:

    X.weight_packed      I32             (N, K bits / 32)   q + 2^(bits - 1), along K, low bits first
    X.weight_scale       F16, BF16, F32  (N, G)
    X.weight_zero_point  I32             (N bits / 32, G)   if asymmetric: zero + 2^(bits - 1), along N
    X.weight_shape       I64             (2,)               N and K: rows may end in part of a word
    X.weight_g_idx       I32             (K,)               the group of each column, if act-order

int-quantized (W8A8), float-quantized and naive-quantized, a byte a weight:

    X.weight             I8 or F8_E4M3   (N, K)
    X.weight_scale       F16, BF16, F32  one for all, (N, 1), (N, G), or one for each block_structure

    w[n, k] = scale * q[n, k]

The library rounds w to the dtype of the scales. Here w is float32, and activations are not rounded to 8 bits.
"""

from collections.abc import Mapping

import numpy as np

from ...config import Array
from ...errors import ConfigError, UnsupportedError, escape
from ..json_file import JsonFile
from .base import OF_ACTIVATIONS, FileTensor, Method, QuantizedWeight, check_parts
from .grouped import FLOATS, GroupedWeight, checked_groups, groups_of, whole_numbers
from .scaled import MAX_BLOCK, block_sizes, scaled_weight

BITS = (4, 8)
OF_BYTES = ("int-quantized", "float-quantized", "naive-quantized")
RUN = ("pack-quantized", *OF_BYTES)


class CompressedTensors(Method):
    """The settings: the formats, and the bits of each group of weights (config_groups)."""

    markers = ("weight_packed", "weight_scale")

    def __init__(self, settings: JsonFile):
        self.path = settings.path
        for key in ("sparsity_config", "transform_config"):
            part = settings.get(key, dict, {})
            if part and part.get("format") != "dense":
                raise UnsupportedError(f"{self.path}: {key} is {escape(part, 80)}, which is not run")
        groups = settings.require("config_groups", dict)
        parts = [JsonFile(self.path, values={} if group is None else group) for group in groups.values()]
        formats = {settings.get("format", str), *(part.get("format", str) for part in parts)}
        if odd := formats - {None, "mixed-precision", *RUN}:
            found = escape(", ".join(sorted(map(str, odd))), 60)
            known = ", ".join(RUN)
            raise UnsupportedError(f"{self.path}: compressed-tensors of the format {found}; run are {known}")
        self.bits: set[int] = set()
        self.blocks: list[tuple[int, int]] = []  # the rows and columns of one scale
        for part in parts:
            weights = part.part("weights")
            if weights is None or weights.get("type", str, "int") not in ("int", "float"):
                found = escape(part.values.get("weights"), 80)
                raise UnsupportedError(f"{self.path}: config_groups has weights {found}, which are not run")
            self.bits.add(bits := weights.require("num_bits", int))
            if weights.get("type", str, "int") == "float" and bits != 8:
                raise UnsupportedError(
                    f"{self.path}: floats of {escape(bits, 40)} bits; run are those of 8 bits"
                )
            self.blocks += block_sizes(weights, "block_structure")
            size = weights.get("group_size", int, -1)
            if not -1 <= size <= MAX_BLOCK:
                raise ConfigError(f"{self.path}: group_size is {size}, wanted at most {MAX_BLOCK}")
            self.blocks += [(1, size)] if size > 0 else []
        if odd_bits := self.bits - set(BITS):
            found = f"compressed-tensors of {escape(min(odd_bits), 40)} bits"
            raise UnsupportedError(f"{self.path}: {found}; run are {' and '.join(map(str, BITS))}")
        self.title = f"compressed-tensors, {' and '.join(map(str, sorted(self.bits)))} bits"

    def weight(self, name: str, parts: Mapping[str, FileTensor]) -> QuantizedWeight:
        if "weight_packed" not in parts:
            return self.weight_of_bytes(name, parts)
        needed = ("weight_packed", "weight_scale", "weight_shape")
        check_parts(name, parts, needed, ("weight_zero_point", "weight_g_idx", *OF_ACTIVATIONS))
        return PackedWeight(self, parts)

    def weight_of_bytes(self, name: str, parts: Mapping[str, FileTensor]) -> QuantizedWeight:
        check_parts(name, parts, ("weight", "weight_scale"), (*OF_ACTIVATIONS, "weight_zero_point"))
        if zero := parts.get("weight_zero_point"):
            zero.fail("is there: bytes with a zero point are not run", UnsupportedError)
        q = parts["weight"]
        kind = "FP8" if q.info.type_name == "F8_E4M3" else "INT8"
        return scaled_weight(q, parts["weight_scale"], kind, self.blocks)


class PackedWeight(GroupedWeight):
    """X.weight of pack-quantized, checked from the headers of its tensors and from weight_shape."""

    def __init__(self, method: CompressedTensors, parts: Mapping[str, FileTensor]):
        self.parts, self.scales_part, self.packed = parts, parts["weight_scale"], parts["weight_packed"]
        rows, words = self.packed.matrix()
        shape = parts["weight_shape"]
        shape.check(["I64", "I32"], (2,))
        N, K = shape.array.tolist()
        fitting = [bits for bits in method.bits if K > 0 and -(-K * bits // 32) == words]
        if rows != N or len(fitting) != 1:
            found = f"is {[N, K]}, weight_packed has {rows} rows of {words} words"
            shape.fail(f"{found} of {' or '.join(map(str, sorted(method.bits)))} bits")
        self.shape, self.bits = (N, K), fitting[0]
        self.packed.check(["I32"], (rows, words))
        G = self.scales_part.matrix()[1]
        self.scales_part.check(FLOATS, (N, G))
        if "weight_zero_point" in parts:
            parts["weight_zero_point"].check(["I32"], (-(-N * self.bits // 32), G))
        if "weight_g_idx" in parts:
            parts["weight_g_idx"].check(["I32"], (K,))
        elif K % G:
            self.scales_part.fail(f"has {G} groups, {K} columns are no multiple of that")

    def groups(self) -> Array:
        K, G = self.shape[1], self.scales_part.info.shape[1]
        if "weight_g_idx" not in self.parts:
            return groups_of(K, K // G)
        return checked_groups(self.parts["weight_g_idx"], G)

    def numbers(self, rows: slice) -> Array:
        return whole_numbers(self.packed.array[rows], self.bits)[:, : self.shape[1]]

    def zeros(self) -> Array:
        if "weight_zero_point" not in self.parts:
            return np.array([[1 << self.bits - 1]], np.uint8)
        words = np.ascontiguousarray(self.parts["weight_zero_point"].array.T)
        return np.ascontiguousarray(whole_numbers(words, self.bits).T[: self.shape[0]])

    def scales(self) -> Array:
        return self.scales_part.floats()
