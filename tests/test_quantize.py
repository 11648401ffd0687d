"""The stored formats: what each may lose, and the same bits as the `gguf` package and PyTorch."""

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import U16, U32, assert_within

from numpy_llama.errors import MismatchError, ParameterError, UnsupportedError
from numpy_llama.quantize import FORMATS, MAX_F16, QK, StoredTensor

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
every_format = pytest.mark.parametrize("name", FORMATS)
block_formats = pytest.mark.parametrize("name", ["Q8_0", "Q4_0", "Q4_1"])

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
        assert format.row_bytes(4 * QK) == 4 * QK // format.block * format.block_bytes


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # random scales are NaN and infinite too
@every_format
@given(seeds, st.integers(1, 3), st.integers(1, 5))
def test_dequantize_is_bit_equal_to_gguf(name, rng, rows, blocks):
    data = any_bytes(rng, name, rows, blocks * QK)
    expected = gguf.dequantize(data, gguf.GGMLQuantizationType[name])
    same_bits(FORMATS[name].dequantize(data), expected)


@every_format
@given(weights())
def test_quantize_is_bit_equal_to_gguf(name, x):
    expected = bits(gguf.quantize(x, gguf.GGMLQuantizationType[name]))
    np.testing.assert_array_equal(FORMATS[name].quantize(x), expected)


@block_formats
@given(seeds)
def test_ties_are_rounded_as_gguf(name, rng):
    """Scales that are powers of two, so that the halves between two codes are met exactly."""
    top = {"Q8_0": 127, "Q4_0": 8, "Q4_1": 15}[name]
    x = rng.integers(-2 * top, 2 * top + 1, (4, QK)).astype(np.float32) / 2
    x[:, 0] = {"Q8_0": 127, "Q4_0": -8, "Q4_1": -7.5}[name]
    x[:, 1] = {"Q8_0": -127, "Q4_0": 7.5, "Q4_1": 7.5}[name]
    x = np.clip(x, x[:, 1:2].min() if name == "Q8_0" else x[0, 0], x[:, :2].max())
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


@given(weights())
def test_q4_0_error(x):
    """Away from the largest weight the codes end at 7: what lies there at 8 loses a whole step."""
    b = blocks_of(x)
    extreme = np.take_along_axis(b, np.abs(b).argmax(-1)[..., None], -1)
    d = extreme / -8
    q = b / np.where(d == 0, 1, d)
    step = np.where(q > 7.5, q - 7, 0.5)
    bound = step * np.abs(d) + 8 * np.maximum(U16 * np.abs(d), TINY_F16 / 2) + 64 * U32 * np.abs(d)
    assert_within(blocks_of(round_trip(x, "Q4_0")), b, bound)
    assert (step <= 1).all()


@given(weights())
def test_q4_1_error(x):
    b = blocks_of(x)
    low, high = b.min(-1, keepdims=True), b.max(-1, keepdims=True)
    d = (high - low) / 15
    bound = 0.5 * d + 15 * np.maximum(U16 * d, TINY_F16 / 2) + np.maximum(U16 * np.abs(low), TINY_F16 / 2)
    bound += 64 * U32 * (d + np.abs(low))
    assert_within(blocks_of(round_trip(x, "Q4_1")), b, bound)


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


@every_format
@given(weights(), seeds)
def test_indexing_is_indexing_of_the_dequantized(name, x, rng):
    stored = StoredTensor.quantize(x, name)
    whole = stored.dequantize()
    assert stored.shape == whole.shape == x.shape and len(stored) == len(x) and whole.dtype == np.float32
    ids = rng.integers(len(x), size=(2, 3))
    for index in [0, -1, slice(0, 1), slice(None, None, -1), [0], ids, ...]:
        np.testing.assert_array_equal(stored[index], whole[index])
        assert stored[index].dtype == np.float32
    assert stored.dequantize(np.float64).dtype == np.float64


@every_format
def test_a_vector_is_stored_as_one_row(name, rng):
    x = rng.normal(size=2 * QK).astype(np.float32)
    stored = StoredTensor.quantize(x, name)
    assert stored.shape == (2 * QK,)
    np.testing.assert_array_equal(stored.dequantize(), StoredTensor.quantize(x[None], name).dequantize()[0])


@every_format
def test_quantize_takes_any_layout(name, rng):
    x = rng.normal(size=(2 * QK, 2 * QK))
    expected = StoredTensor.quantize(x.astype(np.float32), name).data
    np.testing.assert_array_equal(StoredTensor.quantize(np.asfortranarray(x), name).data, expected)
    np.testing.assert_array_equal(
        StoredTensor.quantize(x[:, ::-1][:, ::-1].astype(">f8"), name).data, expected
    )
