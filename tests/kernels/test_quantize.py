"""StoredTensor and the table of formats; what those mean is in numpy_llama/proof/test_quantisation.py."""

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.backend.formats import FORMATS, MAX_F16, OURS, QK, QK_K, StoredTensor
from numpy_llama.backend.kernels import Kernels
from numpy_llama.errors import MismatchError, ParameterError, UnsupportedError
from numpy_llama.proof.blocks import ALL_16_BITS, packed_scales
from numpy_llama.proof.bounds import assert_same

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
every_format = pytest.mark.parametrize("name", FORMATS)
writable_formats = pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.quantize])
block_formats = pytest.mark.parametrize(
    "name", [name for name, f in FORMATS.items() if f.block == QK and f.quantize]
)
k_formats = pytest.mark.parametrize("name", [name for name, f in FORMATS.items() if f.block == QK_K])


def any_bytes(rng, name, rows, n):
    """Rows of n weights in random bytes: every scale, -0, subnormals, NaN and infinity among them."""
    return rng.integers(256, size=(rows, FORMATS[name].row_bytes(n)), dtype=np.uint8)


# --- the table -----------------------------------------------------------------------------------------


def test_formats_are_those_of_ggml():
    """And our own have numbers beyond all of ggml's."""
    assert 8 * max(gguf.GGMLQuantizationType) < OURS
    for name, format in FORMATS.items():
        if format.code > OURS:
            continue
        theirs = gguf.GGMLQuantizationType[name]
        assert (format.name, format.code) == (name, theirs)
        assert (format.block, format.block_bytes) == gguf.GGML_QUANT_SIZES[theirs]
        assert format.row_bytes(4 * QK_K) == 4 * QK_K // format.block * format.block_bytes


def round_trip(x, name):
    return StoredTensor.quantize(x, name).dequantize()


# --- every scale with every number ------------------------------------------------------------------------


def as_gguf(name, blocks_of):
    """`blocks_of` some scales, asked for all 65,536, in parts that fit the cache; (scales, blocks, bytes)."""
    for scales in np.split(ALL_16_BITS, 128):
        blocks = blocks_of(scales)
        blocks = blocks.reshape(-1, blocks.shape[-1])
        with np.errstate(invalid="ignore", over="ignore"):  # infinite scales
            expected = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[name])
            assert_same(FORMATS[name].dequantize(blocks), expected)


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


@pytest.mark.parametrize(
    "x, bf16",
    [
        (0x7F800001, 0x7FC0),
        (0xFF800001, 0xFFC0),
        (0x7FFFFFFF, 0x7FFF),
        (0xFFFFFFFF, 0xFFFF),
        (0x7FA10000, 0x7FE1),
    ],
)
def test_a_nan_is_quieted_and_else_cut_as_by_ggml(x, bf16):
    """It keeps its sign and its upper bits: only so do both paths write the same file."""
    nan = np.uint32([[x]]).view(np.float32)
    assert FORMATS["BF16"].quantize(nan).view(np.uint16)[0, 0] == bf16
    stored = StoredTensor(FORMATS["F32"], (1, 1), nan.view(np.uint8))
    assert Kernels(1).convert(stored, FORMATS["BF16"]).view(np.uint16)[0, 0] == bf16


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
