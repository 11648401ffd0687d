"""The stored formats: what each may lose, and the same bits as the `gguf` package and PyTorch."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import U16, U32, assert_within

from numpy_llama.errors import MismatchError, ParameterError, UnsupportedError
from numpy_llama.quantize import FORMATS, MAX_F16, QK, QK_K, StoredTensor

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
every_format = pytest.mark.parametrize("name", FORMATS)
writable_formats = pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.quantize])
block_formats = pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.block == QK])
k_formats = pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.block == QK_K])

TINY_F16 = 2.0**-24  # the least number above 0, and the spacing of the subnormal ones


@st.composite
def weights(draw, low=-30, high=12):
    """(rows, blocks * 32) float32 of any magnitude, now and then with a block of zeros or of one value."""
    rng = draw(seeds)
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


def any_bytes(rng, name, rows, n):
    """Rows of n weights in random bytes: every scale, -0, subnormals, NaN and infinity among them."""
    return rng.integers(256, size=(rows, FORMATS[name].row_bytes(n)), dtype=np.uint8)


def bits(x):
    return np.ascontiguousarray(x).view(np.uint8)


def same_bits(x, y):
    """Bit for bit, but that any NaN equals any NaN: which one a sum returns is the processor's affair."""
    nan = np.isnan(x)
    assert x.dtype == y.dtype and x.shape == y.shape
    np.testing.assert_array_equal(nan, np.isnan(y))
    np.testing.assert_array_equal(bits(np.where(nan, 0, x)), bits(np.where(nan, 0, y)))


# --- against gguf -----------------------------------------------------------------------------------------


def test_formats_are_those_of_ggml():
    for name, format in FORMATS.items():
        theirs = gguf.GGMLQuantizationType[name]
        assert (format.name, format.code) == (name, theirs)
        assert (format.block, format.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]
        assert format.row_bytes(4 * QK_K) == 4 * QK_K // format.block * format.block_bytes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales are NaN and infinite too
@every_format
@given(seeds, st.integers(1, 3), st.integers(1, 5))
def test_dequantize_is_bit_equal_to_gguf(name, rng, rows, blocks):
    data = any_bytes(rng, name, rows, blocks * FORMATS[name].block)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    same_bits(FORMATS[name].dequantize(data), expected)


@writable_formats
@given(weights())
def test_quantize_is_bit_equal_to_gguf(name, x):
    expected = bits(gguf.quantize(x, gguf.GGMLQuantizationType[name]))
    np.testing.assert_array_equal(FORMATS[name].quantize(x), expected)


@block_formats
@given(seeds)
def test_ties_are_rounded_as_gguf(name, rng):
    """Scales that are powers of two, so that the halves between two codes are met exactly."""
    low = {"Q8_0": -127, "Q4_0": -8, "Q4_1": -7.5, "Q5_0": -16, "Q5_1": -15.5}[name]
    high = -low if name in ("Q8_0", "Q4_1", "Q5_1") else -low - 0.5
    x = rng.integers(round(2 * low), round(2 * high) + 1, (4, QK)).astype(np.float32) / 2
    x[:, 0], x[:, 1] = low, high
    expected = gguf.quantize(x, gguf.GGMLQuantizationType[name])
    np.testing.assert_array_equal(FORMATS[name].quantize(x), expected)


# --- what a round trip loses ------------------------------------------------------------------------------


def round_trip(x, name):
    return StoredTensor.quantize(x, name).dequantize()


def blocks_of(x):
    return x.astype(np.float64).reshape(len(x), -1, QK)


@given(weights())
def test_f32_loses_nothing(x):
    np.testing.assert_array_equal(round_trip(x, "F32"), x)


@given(weights(high=10))
def test_f16_and_bf16_round_to_the_nearest(x):
    assert_within(round_trip(x, "F16"), x, U16 * np.abs(x) + TINY_F16 / 2)
    assert_within(round_trip(x, "BF16"), x, 2.0**-8 * np.abs(x))


# Each weight is off by half a step, by the rounding of d to float16 (half its spacing below 2^-14) times
# the code, and in float32 by a few u of the largest.


@given(weights())
def test_q8_0_error(x):
    d = np.abs(blocks_of(x)).max(-1, keepdims=True) / 127
    bound = 0.5 * d + 127 * np.maximum(U16 * d, TINY_F16 / 2) + 4 * U32 * 127 * d
    assert_within(blocks_of(round_trip(x, "Q8_0")), blocks_of(x), bound)


@pytest.mark.parametrize("name, top", [("Q4_0", 8), ("Q5_0", 16)])
@given(weights())
def test_q4_0_and_q5_0_error(name, top, x):
    """Away from the largest weight the codes end at top - 1: what lies there at top loses a whole step."""
    b = blocks_of(x)
    extreme = np.take_along_axis(b, np.abs(b).argmax(-1)[..., None], -1)
    d = extreme / -top
    q = b / np.where(d == 0, 1, d)
    step = np.where(q > top - 0.5, q - (top - 1), 0.5)
    bound = step * np.abs(d) + top * np.maximum(U16 * np.abs(d), TINY_F16 / 2) + 8 * top * U32 * np.abs(d)
    assert_within(blocks_of(round_trip(x, name)), b, bound)
    assert (step <= 1).all()


@pytest.mark.parametrize("name, top", [("Q4_1", 15), ("Q5_1", 31)])
@given(weights())
def test_q4_1_and_q5_1_error(name, top, x):
    b = blocks_of(x)
    low, high = b.min(-1, keepdims=True), b.max(-1, keepdims=True)
    d = (high - low) / top
    bound = 0.5 * d + top * np.maximum(U16 * d, TINY_F16 / 2) + np.maximum(U16 * np.abs(low), TINY_F16 / 2)
    bound += 4 * (top + 1) * U32 * (d + np.abs(low))
    assert_within(blocks_of(round_trip(x, name)), b, bound)


@block_formats
def test_blocks_of_zeros_and_of_tiny_weights(name):
    tiny = np.float32([0, -0.0, 1e-45, -1e-45, 1e-40, 2e-39, 3e-39, -1e-38, 1e-12])
    x = np.repeat(tiny[:, None], QK, axis=1)
    x[:, 1::2] *= -1
    np.testing.assert_array_equal(round_trip(x, name), 0 * x)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", "Q8_0"])
@given(weights(low=-8))
def test_a_second_round_trip_changes_nothing(name, x):
    once = StoredTensor.quantize(x, name)
    again = StoredTensor.quantize(once.dequantize(), name)
    if name == "Q8_0":  # its d is computed anew, and may round to the neighbouring float16
        assert_within(again.dequantize(), once.dequantize(), 2 * U16 * np.abs(once.dequantize()))
    else:
        np.testing.assert_array_equal(again.data, once.data)


# --- K formats, by hand -----------------------------------------------------------------------------------


def packed_scales(sc, m):
    """(blocks, 8) numbers of 6 bits each -> (blocks, 12) bytes, bit by bit as quantize.py draws them."""
    place = {}  # (array, sub-block, bit): (byte, bit)
    for j in range(4):
        for bit in range(6):
            place["sc", j, bit] = (j, bit)
            place["m", j, bit] = (j + 4, bit)
        for bit in range(4):
            place["sc", j + 4, bit] = (j + 8, bit)
            place["m", j + 4, bit] = (j + 8, bit + 4)
        for bit in range(4, 6):
            place["sc", j + 4, bit] = (j, bit + 2)
            place["m", j + 4, bit] = (j + 4, bit + 2)
    assert len(set(place.values())) == 12 * 8
    packed = np.zeros((len(sc), 12), np.uint8)
    for (name, j, bit), (byte, to) in place.items():
        packed[:, byte] |= (({"sc": sc, "m": m}[name][:, j] >> bit & 1) << to).astype(np.uint8)
    return packed


def all_pairs_of_scales():
    """(4096, 8) each: at every place of a block, every pair of two 6-bit numbers."""
    pair = (np.arange(4096)[:, None] + 509 * np.arange(8)) % 4096
    return pair // 64, pair % 64


def two_halves(d, m):
    return np.stack([d, m], axis=-1).astype("<f2").view(np.uint8)


@pytest.mark.parametrize("name, top", [("Q4_K", 16), ("Q5_K", 32)])
def test_q4_k_and_q5_k_by_hand(name, top, rng):
    """The value of every weight from numbers that were packed here: d sc q - dmin m, rounded once."""
    sc, m = all_pairs_of_scales()
    d, dmin = rng.normal(size=(2, len(sc))).astype(np.float16)
    q = rng.integers(top, size=(len(sc), QK_K))
    pairs = q.reshape(-1, 4, 2, 32) & 15
    parts = [two_halves(d, dmin), packed_scales(sc, m)]
    if name == "Q5_K":
        fifth = q.reshape(-1, 8, 32) >> 4
        parts.append((fifth << np.arange(8)[:, None]).sum(axis=1))
    parts.append((pairs[:, :, 0] | pairs[:, :, 1] << 4).reshape(-1, 128))
    rows = np.concatenate([part.astype(np.uint8) for part in parts], axis=-1)
    d, dmin = d.astype(np.float64)[:, None], dmin.astype(np.float64)[:, None]
    expected = d * np.repeat(sc, 32, axis=1) * q - dmin * np.repeat(m, 32, axis=1)
    np.testing.assert_array_equal(FORMATS[name].dequantize(rows), expected.astype(np.float32))


def test_q6_k_by_hand(rng):
    sc = rng.integers(-128, 128, (512, 16))
    sc[:256] = np.arange(-128, 128)[:, None]
    d = rng.normal(size=(512, 1)).astype(np.float16)
    q = rng.integers(64, size=(512, 2, 4, 32))  # four times 32 weights share the bytes of the upper bits
    low = q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4
    upper = (q >> 4 << np.int64([[0], [2], [4], [6]])).sum(axis=2)
    parts = [low.reshape(512, 128), upper.reshape(512, 64), sc, d.astype("<f2").view(np.uint8)]
    rows = np.concatenate([part.astype(np.uint8) for part in parts], axis=-1)
    expected = d.astype(np.float64) * np.repeat(sc, 16, axis=1) * (q.reshape(512, QK_K) - 32)
    np.testing.assert_array_equal(FORMATS["Q6_K"].dequantize(rows), expected)


# --- float16 and bfloat16, exhaustively -------------------------------------------------------------------

ALL_16_BITS = np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("name, dtype", [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_all_half_precision_numbers_as_torch(name, dtype):
    stored = StoredTensor(FORMATS[name], (256, 256), ALL_16_BITS.view(np.uint8))
    values = stored.dequantize()
    expected = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(dtype).to(torch.float32).numpy()
    same_bits(values, expected.reshape(256, 256))

    back = StoredTensor.quantize(values, name).data.view(np.uint16).reshape(-1)
    number = ~np.isnan(values).reshape(-1)
    np.testing.assert_array_equal(back[number], ALL_16_BITS[number])
    assert np.isnan(StoredTensor.quantize(values, name).dequantize()).reshape(-1)[~number].all()


@pytest.mark.parametrize("name, dtype", [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_rounding_to_half_precision_as_torch(name, dtype, rng):
    """Midpoints of all neighbours, the one before overflow, what lies just beside them, and random bits."""
    numbers = torch.from_numpy(ALL_16_BITS.view(np.int16)).view(dtype).to(torch.float64).numpy()
    numbers = np.unique(numbers[np.isfinite(numbers)])
    ties = np.append((numbers[1:] + numbers[:-1]) / 2, 1.5 * numbers[-1] - 0.5 * numbers[-2])
    tie_bits = ties.astype(np.float32).view(np.uint32)
    any_bits = rng.integers(2**32, size=10_000, dtype=np.uint32)
    x = np.concatenate([tie_bits, tie_bits - 1, tie_bits + 1, any_bits]).view(np.float32)
    expected = torch.from_numpy(x).to(dtype).view(torch.int16).numpy().view(np.uint16)
    actual = FORMATS[name].quantize(x[None]).view(np.uint16)[0]
    number = ~np.isnan(x)
    np.testing.assert_array_equal(actual[number], expected[number])
    assert np.isnan(FORMATS[name].dequantize(actual[None].view(np.uint8))[0][~number]).all()


# --- every scale with every number ------------------------------------------------------------------------


def as_gguf(name, blocks_of):
    """`blocks_of` some scales, asked for all 65,536, in parts that fit the cache; (scales, blocks, bytes)."""
    for scales in np.split(ALL_16_BITS, 128):
        blocks = blocks_of(scales)
        blocks = blocks.reshape(-1, blocks.shape[-1])
        with np.errstate(invalid="ignore", over="ignore"):  # infinite scales
            expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
            same_bits(FORMATS[name].dequantize(blocks), expected)


def put_half(blocks, at, halves):
    blocks[..., at : at + 2] = halves.view(np.uint8).reshape(-1, 1, 2)


def mixed(scales):
    """All of all again, but in another order."""
    return scales * np.uint16(40503)


@pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_every_scale_times_every_number_as_gguf(name):
    """All 65,536 float16 as d, with all numbers that a weight can be; and all as m, where there is one."""
    numbers = np.arange(256).reshape(8, 32) if name == "Q8_0" else np.arange(0, 256, 17)[None]
    fifth = {"Q5_0": [[0], [255]], "Q5_1": [[0], [255]]}.get(name, [[]])
    bytes_ = [np.concatenate([f, q]) for f in (np.repeat(bits, 4) for bits in fifth) for q in numbers]

    def blocks_of(scales):
        blocks = np.empty((len(scales), len(bytes_), FORMATS[name].block_bytes), np.uint8)
        blocks[..., -len(bytes_[0]) :] = bytes_
        put_half(blocks, 0, scales)
        if name in ("Q4_1", "Q5_1"):
            put_half(blocks, 2, mixed(scales))
        return blocks

    as_gguf(name, blocks_of)


def test_every_scale_of_q4_k_as_gguf():
    """d x sc x q, all 2^16 x 64 x 16, and dmin x m, all 2^16 x 64."""
    sc = np.arange(64).reshape(8, 8)

    def blocks_of(scales):
        blocks = np.empty((len(scales), 8, FORMATS["Q4_K"].block_bytes), np.uint8)
        put_half(blocks, 0, scales)
        put_half(blocks, 2, mixed(scales))
        blocks[..., 4:16] = packed_scales(sc, sc[::-1])
        blocks[..., 16:] = np.tile(np.arange(16) * 17, 8)  # each of the sixteen twice in every sub-block
        return blocks

    as_gguf("Q4_K", blocks_of)


def test_every_scale_of_q6_k_as_gguf(rng):
    """d x sc, all 2^16 x 128, each with some q, which has both signs, as d has."""
    quants = rng.integers(256, size=(512, 8, 192), dtype=np.uint8)

    def blocks_of(scales):
        blocks = np.empty((len(scales), 8, FORMATS["Q6_K"].block_bytes), np.uint8)
        blocks[..., :192] = quants
        blocks[..., 192:208] = np.arange(128, 256).reshape(8, 16)  # -128 .. -1
        put_half(blocks, 208, scales)
        return blocks

    as_gguf("Q6_K", blocks_of)


@pytest.mark.parametrize(
    "x, bf16",
    [
        (0x3F808000, 0x3F80),  # a tie: down to the even one
        (0x3F818000, 0x3F82),  # a tie: up to the even one
        (0x3F808001, 0x3F81),
        (0x3F807FFF, 0x3F80),
        (0x7F7FFFFF, 0x7F80),  # the largest float32 becomes infinite
        (0x7F800000, 0x7F80),
        (0xFF800000, 0xFF80),
        (0x7F800001, 0x7FC0),  # a NaN whose upper half would be infinity stays a NaN
        (0xFFFFFFFF, 0xFFFF),
        (0x80000000, 0x8000),
        (0x00008001, 0x0001),  # subnormal
    ],
)
def test_bf16_by_hand(x, bf16):
    actual = FORMATS["BF16"].quantize(np.uint32([[x]]).view(np.float32)).view(np.uint16)
    assert actual[0, 0] == bf16


# --- refusals ---------------------------------------------------------------------------------------------


@block_formats
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 65505.0, -1e30])
def test_block_formats_refuse_what_they_cannot_scale(name, bad, rng):
    x = rng.normal(size=(3, 2 * QK)).astype(np.float64)
    x[1, 40] = bad
    with pytest.raises(ParameterError, match=name):
        StoredTensor.quantize(x, name)


@block_formats
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weights_are_stored(name, sign):
    x = np.float32([[sign * MAX_F16, -sign * MAX_F16] * (QK // 2)])
    assert np.isfinite(round_trip(x, name)).all()


@pytest.mark.parametrize("name", ["F32", "F16", "BF16"])
def test_float_formats_keep_nan_and_infinity(name):
    x = np.float32([[np.nan, np.inf, -np.inf, 1]])
    np.testing.assert_array_equal(round_trip(x, name), x)


@k_formats
def test_k_formats_are_read_only(name):
    with pytest.raises(UnsupportedError, match=f"{name} can be read but not written; there are F32, F16"):
        StoredTensor.quantize(np.ones((1, QK_K)), name)


@k_formats
@pytest.mark.parametrize("n", [1, 32, 255, 288])
def test_rows_of_k_formats_must_be_whole_blocks(name, n):
    with pytest.raises(MismatchError, match=f"rows of {n} weights, {name} needs a multiple of 256"):
        StoredTensor(FORMATS[name], (2, n), np.zeros(2 * 210, np.uint8))


@block_formats
@pytest.mark.parametrize("n", [1, 31, 33, 63])
def test_rows_must_be_whole_blocks(name, n, rng):
    with pytest.raises(MismatchError, match=f"rows of {n} weights, {name} needs a multiple of 32"):
        StoredTensor.quantize(rng.normal(size=(2, n)), name)
    with pytest.raises(MismatchError, match=f"rows of {n} weights"):
        StoredTensor(FORMATS[name], (2, n), np.zeros(2 * 34, np.uint8))


def test_unknown_formats_are_refused():
    with pytest.raises(UnsupportedError, match="Q9_9"):
        StoredTensor.quantize(np.ones((1, QK)), "Q9_9")


# --- StoredTensor -----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@every_format
@given(seeds, st.integers(1, 3), st.integers(1, 4))
def test_indexing_is_indexing_of_the_dequantized(name, rng, rows, blocks):
    shape = (rows, blocks * QK_K)
    stored = StoredTensor(FORMATS[name], shape, any_bytes(rng, name, *shape))
    whole = stored.dequantize()
    assert stored.shape == whole.shape == shape and len(stored) == rows and whole.dtype == np.float32
    ids = rng.integers(rows, size=(2, 3))
    for index in [0, -1, slice(0, 1), slice(None, None, -1), [0], ids, ...]:
        np.testing.assert_array_equal(stored[index], whole[index])
        assert stored[index].dtype == np.float32
    assert stored.dequantize(np.float64).dtype == np.float64


@writable_formats
def test_a_vector_is_stored_as_one_row(name, rng):
    x = rng.normal(size=2 * QK).astype(np.float32)
    stored = StoredTensor.quantize(x, name)
    assert stored.shape == (2 * QK,)
    np.testing.assert_array_equal(stored.dequantize(), StoredTensor.quantize(x[None], name).dequantize()[0])


@writable_formats
def test_quantize_takes_any_layout(name, rng):
    x = rng.normal(size=(2 * QK, 2 * QK))
    expected = StoredTensor.quantize(x.astype(np.float32), name).data
    np.testing.assert_array_equal(StoredTensor.quantize(np.asfortranarray(x), name).data, expected)
    np.testing.assert_array_equal(
        StoredTensor.quantize(x[:, ::-1][:, ::-1].astype(">f8"), name).data, expected
    )
