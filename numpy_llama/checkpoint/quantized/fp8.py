"""Weights of 8-bit floats, E4M3: fp8 (blocks of DeepSeek, AutoFP8) and fbgemm_fp8 (Meta's 405B).

    X.weight              float8_e4m3 (N, K)
    X.weight_scale_inv    one scale for each block of weight_block_size, 128 x 128; it multiplies too
    X.weight_scale        one scale for all, or with fbgemm_fp8 (N, 1), one scale a row

    w[r, c] = weight[r, c] * scale[r // 128, c // 128]

Scales of activations are not used here: activations are not rounded to 8 bits.
"""

from collections.abc import Mapping

from ..json_file import JsonFile
from .base import OF_ACTIVATIONS, FileTensor, Method, QuantizedWeight, check_parts
from .scaled import block_sizes, scaled_weight

SCALES = ("weight_scale_inv", "weight_scale")


class FP8(Method):
    title = "FP8"
    markers = SCALES

    def __init__(self, settings: JsonFile):
        self.block = block_sizes(settings, "weight_block_size")

    def weight(self, name: str, parts: Mapping[str, FileTensor]) -> QuantizedWeight:
        scale = next(key for key in SCALES if key in parts)
        check_parts(name, parts, ("weight", scale), OF_ACTIVATIONS)
        return scaled_weight(parts["weight"], parts[scale], "FP8", self.block)
