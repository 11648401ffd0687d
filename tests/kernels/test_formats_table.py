"""The weight formats that C computes with (csrc/formats.h) against numpy_llama/backend/formats.py: the same
formats, and each part of a block in the same bytes. A format that C lacks is an error.
"""

import dataclasses

import numpy as np
import pytest
from helpers.tiny_models import float_weights, stored
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama.backend.formats import FORMATS, QK, StoredTensor
from numpy_llama.backend.fused import fused_weights
from numpy_llama.backend.kernels import CACHED, Kernels, KernelWeight
from numpy_llama.errors import UnsupportedError
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import TINY_BLOCKS

NONE = -1
PARTS = ("d", "d32", "m", "scales", "high", "quants")


def c_formats() -> dict:
    rows, table = 0, {}
    while (row := lib.nl_format_at(rows)) != ffi.NULL:
        table[ffi.string(row.name).decode()] = row
        rows += 1
    assert lib.nl_format_at(NONE) == ffi.NULL
    return table


BLOCK_FORMATS = [name for name, f in FORMATS.items() if f.block > 1]


def parts_of(row) -> dict[str, slice]:
    """The bytes of each part of a block: from where it begins to where the next one does."""
    begins = sorted((getattr(row, part), part) for part in PARTS if getattr(row, part) != NONE)
    ends = [begin for begin, _ in begins[1:]] + [row.bytes]
    return {part: slice(begin, end) for (begin, part), end in zip(begins, ends, strict=True)}


def test_both_tables_have_the_same_formats():
    found = {name: (row.code, row.weights, row.bytes) for name, row in c_formats().items()}
    assert found == {name: (f.code, f.block, f.block_bytes) for name, f in FORMATS.items()}


def test_the_parts_fill_a_block():
    for name in BLOCK_FORMATS:
        sizes = {part: at.stop - at.start for part, at in parts_of(c_formats()[name]).items()}
        assert sum(sizes.values()) == FORMATS[name].block_bytes
        assert all(sizes.get(part, 2) == 2 for part in "dm") and sizes.get("d32", 4) == 4


def a_block(name: str, fill: int, m: float) -> np.ndarray:
    """One block whose bytes are `fill`, with d = 1 and this m."""
    row = c_formats()[name]
    block = np.full((1, row.bytes), fill, np.uint8)
    for part, value in (("d", 1), ("m", m)):
        if (at := getattr(row, part)) != NONE:
            block[0, at : at + 2] = np.float16([value]).view(np.uint8)
    if row.d32 != NONE:
        block[0, row.d32 : row.d32 + 4] = np.float32([1]).view(np.uint8)
    return block


def weights_changed_by(name: str, byte: int) -> int:
    """How many weights of a block change, by backend/formats.py, when all bits of one byte do."""
    block = a_block(name, 0b01010101, m=1)
    before = FORMATS[name].dequantize(block).copy()
    block[0, byte] ^= 0xFF
    return int((FORMATS[name].dequantize(block) != before).sum())


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_each_part_lies_where_python_reads_it(name):
    """A byte of d or m changes all weights, a byte of the other parts those that have bits in it."""
    row, block = c_formats()[name], FORMATS[name].block
    in_a_byte = {
        "d": {block},
        "d32": {block},
        "m": {block},
        "scales": {16} if name == "Q6_K" else {32, 64},
        "high": {4} if name == "Q6_K" else {8},
        "quants": {1} if name in ("Q8_0", "INT8", "LLM_INT8", "FP8") else {2},
    }
    for part, at in parts_of(row).items():
        for byte in range(at.start, at.stop):
            assert weights_changed_by(name, byte) in in_a_byte[part], (part, byte)


@pytest.mark.parametrize("name", [name for name in BLOCK_FORMATS if name != "NF4"])  # its number 0 is -1
def test_d_m_and_zero_mean_what_python_says(name):
    """Where q = 0 a weight is -zero times d; where d = 0 it is m, or in a K format minus its minimum.

    In Q4_Z m is a zero, and so a weight with d = 1 and q = 0 is -m.
    """
    row, parts = c_formats()[name], parts_of(c_formats()[name])
    block = a_block(name, 0, m=0)
    if row.scales != NONE:
        block[0, parts["scales"]] = 1
    np.testing.assert_array_equal(FORMATS[name].dequantize(block), np.full((1, row.weights), -row.zero))
    if row.m == NONE:
        return
    block[0, parts["m"]] = np.float16([3]).view(np.uint8)
    if name != "Q4_Z":
        block[0, parts["d"]] = 0
    expected = -3 if row.scales != NONE or name == "Q4_Z" else 3
    assert expected in FORMATS[name].dequantize(block)


# ---------------------------------------------------------------- a format that C lacks


UNKNOWN = dataclasses.replace(FORMATS["Q8_0"], name="Q9_9", code=99)


@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("T", [1, 9])
@pytest.mark.parametrize("known", ["Q8_0", "F16"])
def test_linear_refuses_a_format_that_c_does_not_know(isa, known, T, exact, rng):
    """Rows of blocks are refused when they are packed, rows of single numbers when they are multiplied."""
    unknown = dataclasses.replace(FORMATS[known], name="Q9_9", code=99)
    data = unknown.quantize(rng.standard_normal((3, QK)).astype(np.float32))
    with pytest.raises(UnsupportedError, match="cannot compute with weights in Q9_9; choose"):
        w = KernelWeight(StoredTensor(unknown, (3, QK), data))
        Kernels(1, exact=exact).linear(np.ones((T, QK), np.float32), w)


def test_a_layer_refuses_a_format_that_c_does_not_know(isa):
    kernels, args = Kernels(1), TINY_BLOCKS
    weights = {
        key: KernelWeight(w) if len(w.shape) == 2 else w.dequantize()
        for key, w in stored(float_weights(args)).items()
    }
    model = Transformer(args, weights, kernels.linear, kernels.attention)
    layer = fused_weights(model.layers[0], kernels)
    layer.struct.weight[3].format = UNKNOWN.code
    cache = [np.zeros((1, args.n_kv_heads, 4, args.head_dim), np.float32)]
    with pytest.raises(UnsupportedError, match="the C kernels cannot compute with weights in"):
        kernels.layers([layer], np.ones((1, 1, args.dim), np.float32), [0], model.freqs_cis[:1], cache, cache)


def test_keys_and_values_are_in_a_format_of_the_cache(isa):
    """nl_attention and nl_layers refuse a cache in any other format, before they touch an array."""
    kernels, args = Kernels(1), TINY_BLOCKS
    weights = {
        key: KernelWeight(w) if len(w.shape) == 2 else w.dequantize()
        for key, w in stored(float_weights(args)).items()
    }
    layer = fused_weights(Transformer(args, weights, kernels.linear, kernels.attention).layers[0], kernels)
    structs = ffi.new("nl_layer_weights *[]", [layer.struct])
    for code in (-1, *(f.code for name, f in FORMATS.items() if name not in CACHED.values()), UNKNOWN.code):
        attention = ffi.new(
            "nl_attention_args *", {"format": code, "H": 1, "K": 1, "Dh": 2, "T": 1, "S": 1, "end": 1}
        )
        assert lib.nl_attention(attention, 1) == lib.NL_UNKNOWN_FORMAT, code
        arguments = ffi.new("nl_layers_args *", {"weights": structs, "T": 1})
        arguments.cache.format = code
        assert lib.nl_layers(arguments, 0, lib.NL_STEPS, 0, 1, 1) == lib.NL_UNKNOWN_FORMAT, code


def test_every_entry_point_refuses_an_unknown_format(isa):
    x, y, w = (ffi.new("float[]", 4096) for _ in range(3))
    for code in (-1, 4, 5, 15, 29, 31, 99):
        matrix = ffi.new("nl_matrix *", (w, code, 1, QK))
        statuses = [
            lib.nl_linear(y, x, 1, matrix, 0, 1, 1),
            lib.nl_linear_exact(y, x, 1, matrix, 0, 1, 1),
            lib.nl_linear_quantized(y, x, 1, matrix, 0, 1, 1),
            lib.nl_linear_scalar_micro_kernel(y, x, 9, matrix, 1),
            lib.nl_quantize_activations(y, x, code, 8, 1, QK, 1),
            lib.nl_pack(y, w, code, 1, QK, 1),
            lib.nl_convert(y, FORMATS["F32"].code, w, code, 1, QK, 1),
            lib.nl_convert(y, code, w, FORMATS["F32"].code, 1, QK, 1),
        ]
        assert statuses == [lib.NL_UNKNOWN_FORMAT] * len(statuses), code
        assert lib.nl_quantizes_activations(code, 9) == 0
    f32, q4_1 = FORMATS["F32"].code, FORMATS["Q4_1"].code  # one is never quantized, the other never written
    matrix = ffi.new("nl_matrix *", (w, f32, 1, QK))
    assert lib.nl_linear_quantized(y, x, 9, matrix, 0, 1, 1) == lib.NL_UNKNOWN_FORMAT
    bf16 = ffi.new("nl_matrix *", (w, FORMATS["BF16"].code, 1, QK))  # quantized from nine tokens on
    assert lib.nl_linear_quantized(y, x, lib.NL_GEMV_TOKENS, bf16, 0, 1, 1) == lib.NL_UNKNOWN_FORMAT
    assert lib.nl_pack(y, w, f32, 1, QK, 1) == lib.NL_UNKNOWN_FORMAT
    assert lib.nl_convert(y, q4_1, w, f32, 1, QK, 1) == lib.NL_UNKNOWN_FORMAT
    assert not any(y)
