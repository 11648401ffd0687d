"""How weights are stored (backend/formats.py has the layouts): the stored numbers, and their errors.

A quantize function takes (rows, n) float32 and gives (rows, bytes a row) uint8; dequantize goes back.
"""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import assume
from hypothesis import strategies as st

from ..backend.formats import FORMATS, MAX_F16, OURS, QK, QK_K
from ..config import Array
from .blocks import ALL_16_BITS, all_pairs_of_scales, packed_scales
from .bounds import U16, U32, assert_same, assert_within
from .laws import assert_that, law, seeds, sources

TINY_F16 = 2.0**-24  # the least number above 0, and the spacing of the subnormal ones

NAMES = {name.lower(): f for name, f in FORMATS.items()}
each_format = pytest.mark.parametrize("format", NAMES)
each_written = pytest.mark.parametrize("format", [name for name, f in NAMES.items() if f.quantize])
each_of_ggml = pytest.mark.parametrize("format", [name for name, f in NAMES.items() if f.code < OURS])
each_block = pytest.mark.parametrize(
    "format", [name for name, f in NAMES.items() if f.block == QK and f.quantize]
)
each_half = pytest.mark.parametrize("format", ["f16", "bf16"])
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


def quantize(ops, format, x):
    return getattr(ops, f"quantize_{format}")(x)


def dequantize(ops, format, rows):
    return getattr(ops, f"dequantize_{format}")(rows)


def round_trip(ops, format, x):
    return dequantize(ops, format, quantize(ops, format, x))


def blocks_of(x):
    return x.astype(np.float64).reshape(len(x), -1, QK)


@st.composite
def weights(draw, low=-30, high=12):
    """(rows, blocks * 32) float32 of any magnitude, now and then with a block of zeros or of one value."""
    rng = np.random.default_rng(draw(seeds))
    x = rng.normal(size=(draw(st.integers(1, 3)), draw(st.integers(1, 4)), QK))
    x += rng.normal(size=(*x.shape[:2], 1)) * draw(st.sampled_from([0, 3]))
    x *= 2.0 ** rng.integers(low, high, size=(*x.shape[:2], 1))
    block = draw(st.sampled_from(["random", "zero", "equal", "whole"]))
    if block == "zero":
        x[0, 0] = 0
    if block == "equal":
        x[0, 0] = x[0, 0, 0]
    if block == "whole":  # ties of the rounding
        x[0, 0] = rng.integers(-8, 9, QK) / 2
    return x.reshape(len(x), -1).astype(np.float32)


def any_bytes(rng, format, rows, blocks):
    """Random bytes: every scale, -0, subnormals, NaN and infinity among them."""
    return rng.integers(256, size=(rows, blocks * NAMES[format].block_bytes), dtype=np.uint8)


# --- every format -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales are NaN and infinite too
@each_of_ggml
@law("dequantize_{format}", seeds, st.integers(1, 3), st.integers(1, 5))
def test_any_bytes_mean_what_they_mean_to_ggml(ops, format, seed, rows, blocks):
    """Bit for bit what the gguf package makes of the same bytes."""
    data = any_bytes(np.random.default_rng(seed), format, rows, blocks)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[format.upper()])
    actual = dequantize(ops, format, data)
    assert_that(actual.dtype == np.float32, f"float32 wanted, {actual.dtype} came")
    assert_same(actual, expected)
    number = ~np.isnan(expected)
    assert_same(np.signbit(actual[number]), np.signbit(expected[number]))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@each_format
@law("dequantize_{format}", seeds, st.integers(2, 4), st.integers(2, 3))
def test_each_block_stands_for_itself(ops, format, seed, rows, blocks):
    """What a block means does not depend on where it lies."""
    data = any_bytes(np.random.default_rng(seed), format, rows, blocks)
    alone = np.ascontiguousarray(data[1:2, NAMES[format].block_bytes :])
    expected = dequantize(ops, format, data)[1:2, NAMES[format].block :]
    assert_same(dequantize(ops, format, alone), expected)


@each_written
@law("quantize_{format}", weights())
def test_weights_become_the_bytes_of_ggml(ops, format, x):
    """Bit for bit what the gguf package stores."""
    expected = gguf.quantize(x, gguf.GGMLQuantizationType[format.upper()]).view(np.uint8)
    assert_same(quantize(ops, format, x).view(np.uint8), expected.reshape(len(x), -1))


@each_block
@law("quantize_{format}", seeds)
def test_ties_go_where_ggml_lets_them_go(ops, format, seed):
    """Halves between two codes, met exactly because scales are powers of two."""
    rng = np.random.default_rng(seed)
    low = {"q8_0": -127, "q4_0": -8, "q4_1": -7.5, "q5_0": -16, "q5_1": -15.5}[format]
    high = -low if format in ("q8_0", "q4_1", "q5_1") else -low - 0.5
    x = rng.integers(round(2 * low), round(2 * high) + 1, (4, QK)).astype(np.float32) / 2
    x[:, 0], x[:, 1] = low, high
    expected = gguf.quantize(x, gguf.GGMLQuantizationType[format.upper()])
    assert_same(quantize(ops, format, x), expected)


@each_block
@law("quantize_{format} dequantize_{format}", seeds, st.sampled_from([-149, -60, *range(-132, -118)]))
def test_what_is_too_small_becomes_0(ops, format, seed, magnitude):
    """Where the scale is 0 as a float16, so is every weight; its inverse may be infinite."""
    x = np.random.default_rng(seed).uniform(-1, 1, (2, QK)) * 2.0**magnitude
    assert_same(round_trip(ops, format, x.astype(np.float32)), np.zeros((2, QK)))


@each_written
@law("quantize_{format}", weights(), st.integers(0, 100))
def test_each_row_is_stored_for_itself(ops, format, x, seed):
    """Exchanging rows exchanges their bytes."""
    order = np.random.default_rng(seed).permutation(len(x))
    assert_same(quantize(ops, format, x[order]), quantize(ops, format, x)[order])


@each_written
@law("quantize_{format}", weights())
def test_storing_leaves_the_weights_alone(ops, format, x):
    """x is what it was."""
    before = x.copy()
    quantize(ops, format, x)
    assert_same(x, before)


# --- what a round trip costs ------------------------------------------------------------------------------


@law("quantize_f32 dequantize_f32", weights())
def test_f32_costs_nothing(ops, x):
    """The same bits come back."""
    assert_same(round_trip(ops, "f32", x), x)


@each_half
@law("quantize_{format} dequantize_{format}", weights(high=10))
def test_halves_cost_half_a_step(ops, format, x):
    """float16 keeps 11 bits, bfloat16 8: x is off by 2^-11 or 2^-8 of itself at most."""
    allowed = U16 * np.abs(x) + TINY_F16 / 2 if format == "f16" else 2.0**-8 * np.abs(x)
    assert_within(round_trip(ops, format, x), x, allowed)


# Three errors add up in a weight. One is half a step. The next is the rounding of d to float16, times the
# code; below 2^-14 it is half the spacing. The last is a few u of the largest weight.


@law("quantize_q8_0 dequantize_q8_0", weights())
def test_what_q8_0_costs(ops, x):
    """Half a step of max|x| / 127, and the rounding of the scale."""
    d = np.abs(blocks_of(x)).max(-1, keepdims=True) / 127
    bound = 0.5 * d + 127 * np.maximum(U16 * d, TINY_F16 / 2) + 4 * U32 * 127 * d
    assert_within(blocks_of(round_trip(ops, "q8_0", x)), blocks_of(x), bound)


@pytest.mark.parametrize("format, top", [("q4_0", 8), ("q5_0", 16)])
@law("quantize_{format} dequantize_{format}", weights())
def test_what_q4_0_and_q5_0_cost(ops, format, top, x):
    """Half a step of the largest / -top; opposite to it the codes end at top - 1, and a step is lost."""
    b = blocks_of(x)
    extreme = np.take_along_axis(b, np.abs(b).argmax(-1)[..., None], -1)
    d = extreme / -top
    q = b / np.where(d == 0, 1, d)
    step = np.where(q > top - 0.5, q - (top - 1), 0.5)
    bound = step * np.abs(d) + top * np.maximum(U16 * np.abs(d), TINY_F16 / 2) + 8 * top * U32 * np.abs(d)
    assert_within(blocks_of(round_trip(ops, format, x)), b, bound)


@pytest.mark.parametrize("format, top", [("q4_1", 15), ("q5_1", 31)])
@law("quantize_{format} dequantize_{format}", weights())
def test_what_q4_1_and_q5_1_cost(ops, format, top, x):
    """Half a step of (max - min) / top, and the rounding of scale and minimum."""
    b = blocks_of(x)
    low, high = b.min(-1, keepdims=True), b.max(-1, keepdims=True)
    d = (high - low) / top
    bound = 0.5 * d + top * np.maximum(U16 * d, TINY_F16 / 2) + np.maximum(U16 * np.abs(low), TINY_F16 / 2)
    bound += 4 * (top + 1) * U32 * (d + np.abs(low))
    assert_within(blocks_of(round_trip(ops, format, x)), b, bound)


@each_block
@law("quantize_{format} dequantize_{format}")
def test_zeros_and_next_to_nothing_become_zeros(ops, format):
    """Where the scale is no float16 any more, all is 0: no NaN of 0 / 0."""
    tiny = np.array([0, -0.0, 1e-45, -1e-45, 1e-40, 2e-39, 3e-39, -1e-38, 1e-12], np.float32)
    x = np.repeat(tiny[:, None], QK, axis=1)
    x[:, 1::2] *= -1
    assert_same(round_trip(ops, format, x), 0 * x)


@each_block
@law("quantize_{format} dequantize_{format}", seeds)
def test_the_extreme_weight_is_kept_best(ops, format, seed):
    """The largest of a block comes back within the rounding of its scale."""
    x = np.random.default_rng(seed).normal(size=(1, QK)).astype(np.float32)
    i = np.abs(x).argmax()
    there = round_trip(ops, format, x)[0, i]
    steps = {"q4_1": 15, "q5_1": 31}.get(format, 1)
    assert_within(there, x[0, i], (2 + steps / 8) * U16 * 2 * np.abs(x[0, i]))


@pytest.mark.parametrize("format", ["f32", "f16", "bf16", "q8_0"])
@law("quantize_{format} dequantize_{format}", weights(low=-8))
def test_a_second_round_trip_changes_nothing(ops, format, x):
    """What was rounded once is a number of the format; Q8_0's scale may move to the neighbouring float16."""
    once = round_trip(ops, format, x)
    again = round_trip(ops, format, once)
    if format == "q8_0":
        assert_within(again, once, 2 * U16 * np.abs(once))
    else:
        assert_same(again, once)


@each_block
@pytest.mark.parametrize("sign", [1, -1])
@law("quantize_{format} dequantize_{format}")
def test_the_largest_weights_are_finite(ops, format, sign):
    """Up to 65,504 every scale is a float16."""
    x = np.array([[sign * MAX_F16, -sign * MAX_F16] * (QK // 2)], np.float32)
    assert_that(np.isfinite(round_trip(ops, format, x)), "it came back infinite or NaN")


# --- exhaustively -----------------------------------------------------------------------------------------


@each_half
@law("dequantize_{format}")
def test_all_65536_halves_as_pytorch(ops, format):
    """Every float16 and every bfloat16, NaN and subnormals too."""
    expected = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(HALVES[format]).to(torch.float32).numpy()
    assert_same(dequantize(ops, format, ALL_16_BITS.view(np.uint8)[None])[0], expected)


@each_half
@law("quantize_{format} dequantize_{format}")
def test_all_65536_halves_come_back(ops, format):
    """Storing what was read gives the same 16 bits; NaN stays some NaN."""
    values = dequantize(ops, format, ALL_16_BITS.view(np.uint8)[None])
    back, number = quantize(ops, format, values).view(np.uint16)[0], ~np.isnan(values[0])
    assert_same(back[number], ALL_16_BITS[number])
    stored = dequantize(ops, format, np.ascontiguousarray(back[~number])[None].view(np.uint8))
    assert_that(np.isnan(stored), "a NaN became a number")


@each_half
@law("quantize_{format} dequantize_{format}", seeds)
def test_halves_are_rounded_as_pytorch_rounds(ops, format, seed):
    """To nearest, ties to even: midpoints of all neighbours, what lies just beside them, and any bits."""
    numbers = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(HALVES[format]).to(torch.float64).numpy()
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = np.append((numbers[1:] + numbers[:-1]) / 2, 1.5 * numbers[-1] - 0.5 * numbers[-2])
    rng = np.random.default_rng(seed)
    tie_bits = rng.choice(ties.astype(np.float32).view(np.uint32), 4000)
    any_bits = rng.integers(2**32, size=1000, dtype=np.uint32)
    x = np.concatenate([tie_bits, tie_bits - 1, tie_bits + 1, any_bits]).view(np.float32)
    expected = torch.from_numpy(x).to(HALVES[format]).view(torch.int16).numpy().view(np.uint16)
    actual, number = quantize(ops, format, x[None]).view(np.uint16)[0], ~np.isnan(x)
    assert_same(actual[number], expected[number])


BF16_BY_HAND = {
    0x3F808000: 0x3F80,  # a tie: down to the even one
    0x3F818000: 0x3F82,  # a tie: up to the even one
    0x3F808001: 0x3F81,
    0x3F807FFF: 0x3F80,
    0x7F7FFFFF: 0x7F80,  # the largest float32 becomes infinite
    0x7F800000: 0x7F80,
    0xFF800000: 0xFF80,
    0x7F800001: 0x7FC0,  # a NaN whose upper half would be infinity stays a NaN
    0xFFFFFFFF: 0xFFFF,
    0x80000000: 0x8000,
    0x00008001: 0x0001,  # subnormal
}


@law("quantize_bf16")
def test_bf16_by_hand(ops):
    """Round to nearest, ties to even, and no NaN becomes infinite; PyTorch's own quiet NaN may differ."""
    x = np.array([*BF16_BY_HAND], np.uint32).view(np.float32)
    actual = ops.quantize_bf16(x[None]).view(np.uint16)[0]
    nan = np.isnan(x)
    assert_same(actual[~nan], np.array([*BF16_BY_HAND.values()], np.uint16)[~nan])
    assert_that((actual[nan] & 0x7FFF) > 0x7F80, f"a NaN became {[hex(i) for i in actual[nan]]}")


FACTORS = {"q8_0": 256, "q4_0": 16, "q4_1": 16, "q5_0": 32, "q5_1": 32}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("format", FACTORS)
@law("dequantize_{format}")
def test_every_scale_times_every_code(ops, format):
    """All 65,536 scales with all codes: d * q, d * (q - 8), d * q + m, in float32, once rounded."""
    codes, f = FACTORS[format], NAMES[format]
    scales = ALL_16_BITS.view(np.float16)
    for first in range(0, codes, QK):
        q = (first + np.arange(QK)) % codes
        rows = np.zeros((2**16, f.block_bytes), np.uint8)
        rows[:, :2] = scales.astype("<f2")[:, None].view(np.uint8)
        if format == "q8_0":
            rows[:, 2:] = q
            value: Array = q.astype(np.uint8).view(np.int8)
        else:
            rows[:, -16:] = q[:16] & 15 | (q[16:] & 15) << 4
            if format.startswith("q5"):
                rows[:, -20:-16] = np.packbits(q >> 4, bitorder="little")
            value = q - {"q4_0": 8, "q5_0": 16}.get(format, 0)
        expected = scales.astype(np.float32)[:, None] * value.astype(np.float32)
        if format.endswith("_1"):
            m = np.roll(scales, 1)
            rows[:, 2:4] = m.astype("<f2")[:, None].view(np.uint8)
            expected = expected + m.astype(np.float32)[:, None]
        assert_same(dequantize(ops, format, rows), expected)


# --- float32 scales ---------------------------------------------------------------------------------------


def nf4() -> Array:
    """Quantiles of the normal distribution: 7 steps below 0 and 8 above, divided by the largest."""
    low, high = (torch.special.ndtri(torch.linspace(0.9677083, 0.5, n, dtype=torch.float64)) for n in (8, 9))
    values = np.sort(np.concatenate([-low[:-1].numpy(), [0], high[:-1].numpy()]))
    return values / np.abs(values).max()


def fp4() -> Array:
    """A sign, two bits of exponent and one of fraction, divided by the largest, 12; code 1 is 1/16."""
    values = np.array([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
    return np.concatenate([values, -values])


def codes_with_scales(codes, d):
    """Blocks with a float32 scale each: codes (n, bytes), d (n,) -> one row."""
    return np.concatenate([d.astype("<f4")[:, None].view(np.uint8), codes], axis=1).reshape(1, -1)


@pytest.mark.parametrize("format, table", [("nf4", nf4()), ("fp4", fp4())])
@law("dequantize_{format}")
def test_a_table_of_16(ops, format, table):
    """The paper's formula, within its rounding. 4 bytes: four weights in low halves, then four more."""
    codes = np.arange(256, dtype=np.uint8).reshape(8, 32)
    d = 2.0 ** np.arange(-4, 4)
    fours = codes.reshape(8, 8, 4)
    q = np.stack([fours & 15, fours >> 4], axis=-2).reshape(8, 64)
    assert_within(
        dequantize(ops, format, codes_with_scales(codes, d))[0], (d[:, None] * table[q]).ravel(), 2e-6
    )


@law("dequantize_fp8", seeds)
def test_e4m3_as_pytorch(ops, seed):
    """d times every code, rounded once. PyTorch's two NaN are the next numbers, 480, here."""
    codes = np.arange(256, dtype=np.uint8)
    numbers = torch.from_numpy(codes).view(torch.float8_e4m3fn).float().numpy().copy()
    numbers[np.isnan(numbers)] = 480, -480
    d = np.random.default_rng(seed).normal(size=8).astype(np.float32)
    expected = (d[:, None] * numbers.reshape(8, QK)).ravel()
    assert_same(dequantize(ops, "fp8", codes_with_scales(codes.reshape(8, QK), d))[0], expected)


@pytest.mark.parametrize("format", ["int8", "llm_int8"])
@law("dequantize_{format}", seeds)
def test_bytes_with_a_sign(ops, format, seed):
    """d q, and in LLM_INT8 that times 1 / 127: rounded twice, in this order."""
    q = torch.arange(256, dtype=torch.int32).to(torch.int8)
    d = torch.from_numpy(np.random.default_rng(seed).normal(size=8).astype(np.float32))
    expected = d[:, None] * q.reshape(8, QK)
    if format == "llm_int8":
        expected = expected * 7.874015718698502e-3
    rows = codes_with_scales(q.numpy().view(np.uint8).reshape(8, QK), d.numpy())
    assert_same(dequantize(ops, format, rows)[0], expected.numpy().ravel())


# --- the K formats, by hand -------------------------------------------------------------------------------


def two_halves(d, m):
    return np.stack([d, m], axis=-1).astype("<f2").view(np.uint8)


def k_blocks(format, d, dmin, sc, m, q):
    """Blocks of Q4_K or Q5_K from their numbers."""
    pairs = q.reshape(-1, 4, 2, 32) & 15
    parts = [two_halves(d, dmin), packed_scales(sc, m)]
    if format == "q5_k":
        fifth = q.reshape(-1, 8, 32) >> 4
        parts.append((fifth << np.arange(8)[:, None]).sum(axis=1))
    parts.append((pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128))
    return np.concatenate([part.astype(np.uint8) for part in parts], axis=-1)


@pytest.mark.parametrize("format, top", [("q4_k", 16), ("q5_k", 32)])
@law("dequantize_{format}", seeds, share=0.1)  # 4,096 blocks each
def test_q4_k_and_q5_k_by_hand(ops, format, top, seed):
    """d sc q - dmin m, all 4,096 pairs of sc and m at every place: with d of few bits once rounded."""
    rng = np.random.default_rng(seed)
    sc, m = all_pairs_of_scales()
    d, dmin = rng.normal(size=(2, len(sc))).astype(np.float16)
    q = rng.integers(top, size=(len(sc), QK_K))
    exact_d, exact_dmin = d.astype(np.float64)[:, None], dmin.astype(np.float64)[:, None]
    expected = exact_d * np.repeat(sc, 32, axis=1) * q - exact_dmin * np.repeat(m, 32, axis=1)
    actual = dequantize(ops, format, k_blocks(format, d, dmin, sc, m, q))
    assert_same(actual, expected.astype(np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("format, top", [("q4_k", 16), ("q5_k", 32)])
@law("dequantize_{format}")
def test_every_scale_of_a_k_block(ops, format, top):
    """All 65,536 d, and all dmin, with codes and 6-bit scales that go round: (d sc) q - dmin m."""
    i = np.arange(2**16)
    d, dmin = ALL_16_BITS.view(np.float16), ALL_16_BITS[::-1].view(np.float16)
    sc, m = ((i[:, None] * by + np.arange(8)) % 64 for by in (1, 5))
    q = (i[:, None] + np.arange(QK_K)) % top
    scale = d.astype(np.float32)[:, None] * sc.astype(np.float32)
    minimum = dmin.astype(np.float32)[:, None] * m.astype(np.float32)
    expected = np.repeat(scale, 32, axis=1) * q.astype(np.float32) - np.repeat(minimum, 32, axis=1)
    assert_same(dequantize(ops, format, k_blocks(format, d, dmin, sc, m, q)), expected)


def q6_k_blocks(d, sc, q):
    q = q.reshape(-1, 2, 4, 32)  # four times 32 weights share the bytes of the upper bits
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    upper = (q >> 4 << np.array([[0], [2], [4], [6]], np.int64)).sum(axis=2)
    parts = [low.reshape(-1, 128), upper.reshape(-1, 64), sc, d[:, None].astype("<f2").view(np.uint8)]
    return np.concatenate([part.astype(np.uint8) for part in parts], axis=-1)


@law("dequantize_q6_k", seeds)
def test_q6_k_by_hand(ops, seed):
    """d sc (q - 32), all 256 signed sc at every place."""
    rng = np.random.default_rng(seed)
    sc = (np.arange(256)[:, None] + 16 * np.arange(16)) % 256 - 128
    d, q = rng.normal(size=256).astype(np.float16), rng.integers(64, size=(256, QK_K))
    expected = d.astype(np.float64)[:, None] * np.repeat(sc, 16, axis=1) * (q - 32)
    assert_same(ops.dequantize_q6_k(q6_k_blocks(d, sc, q)), expected.astype(np.float32))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@law("dequantize_q6_k")
def test_every_scale_of_a_q6_k_block(ops):
    """All 65,536 d with codes and scales that go round: (d sc) (q - 32)."""
    i = np.arange(2**16)
    d = ALL_16_BITS.view(np.float16)
    sc, q = (i[:, None] * 3 + np.arange(16)) % 256 - 128, (i[:, None] + np.arange(QK_K)) % 64
    scale = d.astype(np.float32)[:, None] * sc.astype(np.float32)
    expected = np.repeat(scale, 16, axis=1) * (q - 32).astype(np.float32)
    assert_same(ops.dequantize_q6_k(q6_k_blocks(d, sc, q)), expected)


# --- quantized activations --------------------------------------------------------------------------------

STEPS = {8: 127, 14: 8191, 15: 16256}  # from 0 to the largest number of a block
each_number_of_bits = pytest.mark.parametrize("bits", STEPS)


@each_number_of_bits
@law("quantize_activations", sources, st.integers(1, 3), st.integers(1, 12))
def test_what_quantized_activations_cost(ops, bits, source, rows, blocks):
    """At most half a step of the largest of its block."""
    x = source.normal(rows, blocks * QK).astype(np.float32)
    half_step = block_maxima(x) / (2 * STEPS[bits])
    assert_within(ops.quantize_activations(x, bits), x, half_step.repeat(QK, axis=1) * 1.01)


@law("quantize_activations", sources, st.integers(1, 12), st.integers(0, 11), st.integers(1, 1000))
def test_large_blocks_have_15_bits(ops, source, blocks, large, times):
    """With 8 bits, a block whose largest is more than 3 times the mean of the row's blocks keeps 15."""
    x = source.normal(1, blocks * QK).astype(np.float32)
    x[:, large * QK : (large + 1) * QK] *= times
    maxima = block_maxima(x)
    above = maxima / maxima.mean(axis=1, dtype=np.float64, keepdims=True)
    assume(not np.any(np.abs(above - 3) < 1e-5))
    eight, fifteen = (ops.quantize_activations(x, bits) for bits in (8, 15))
    fine = (above > 3).repeat(QK, axis=1)
    assert_same(eight[fine], fifteen[fine])
    steps = eight / np.maximum(maxima, 1e-30).repeat(QK, axis=1) * 127
    assert_within(steps[~fine], np.round(steps[~fine]), 1e-4)


@each_number_of_bits
@law("quantize_activations", sources, st.integers(2, 4), st.integers(1, 12))
def test_each_token_is_quantized_by_itself(ops, bits, source, rows, blocks):
    x = source.normal(rows, blocks * QK).astype(np.float32) * 10.0 ** np.arange(rows)[:, None]
    x = x.astype(np.float32)
    alone = np.concatenate([ops.quantize_activations(x[i : i + 1], bits) for i in range(rows)])
    assert_same(ops.quantize_activations(x, bits), alone)


@each_number_of_bits
@law("quantize_activations", sources)
def test_the_largest_activation_is_kept(ops, bits, source):
    """It is the last of all steps."""
    x = source.normal(1, QK).astype(np.float32)
    i = np.abs(x).argmax()
    assert_within(ops.quantize_activations(x, bits)[0, i], x[0, i], 4 * U32 * np.abs(x[0, i]))


@each_number_of_bits
@law("quantize_activations")
def test_quantized_zeros_are_zeros(ops, bits):
    """A block of zeros, or of next to nothing, is zeros."""
    assert_same(ops.quantize_activations(np.zeros((2, QK), np.float32), bits), np.zeros((2, QK)))
    assert_same(ops.quantize_activations(np.full((2, QK), 1e-31, np.float32), bits), np.zeros((2, QK)))


def block_maxima(x: np.ndarray) -> np.ndarray:
    return np.abs(x).reshape(len(x), -1, QK).max(-1)


@law("quantize_q8_0 dequantize_q8_0 linear", weights(low=-3, high=3), seeds)
def test_a_stored_weight_multiplies_as_what_it_means(ops, x, seed):
    """linear(x, stored) = linear(x, dequantized): the product errs by what the weights lost, and no more."""
    rng = np.random.default_rng(seed)
    activations = rng.standard_normal((2, x.shape[1])).astype(np.float32)
    lost = np.abs(round_trip(ops, "q8_0", x).astype(np.float64) - x)
    exact = activations.astype(np.float64) @ x.astype(np.float64).T
    stored = ops.linear(activations, round_trip(ops, "q8_0", x))
    rounding = (x.shape[1] + 3) * U32 * (np.abs(activations).astype(np.float64) @ np.abs(x).T * 1.01 + 1)
    assert_within(stored, exact, np.abs(activations) @ lost.T + rounding)
