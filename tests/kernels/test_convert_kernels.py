"""`Kernels.convert` against formats.py, bit for bit: from every format to every format that it writes."""

import numpy as np
import pytest
from helpers.kernels import Guarded, for_each, real_weight, seeds, unaligned, whole_blocks
from hypothesis import given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama.backend import kernels
from numpy_llama.backend.formats import FORMATS, MAX_F16, QK, StoredTensor
from numpy_llama.backend.kernels import CONVERTIBLE, Kernels
from numpy_llama.errors import MismatchError, ParameterError, UnsupportedError

every_source = pytest.mark.parametrize("source", FORMATS)
every_target = pytest.mark.parametrize("target", CONVERTIBLE)
pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")


def assert_same(got: np.ndarray, tensor: StoredTensor, format, rows=slice(None)) -> None:
    """The same rows by backend/formats.py. Any float16 NaN equals any: which one is NumPy's affair."""
    expected = StoredTensor.quantize(tensor.dequantize()[rows], format).data
    assert got.dtype == np.uint8 and got.shape == expected.shape
    if format.name == "F16":
        nan = np.isnan(expected.view("<f2"))
        np.testing.assert_array_equal(np.isnan(got.view("<f2")), nan)
        got, expected = (np.where(nan, 0, x.view("<u2")) for x in (got, expected))
    np.testing.assert_array_equal(got, expected)


@every_source
@every_target
@for_each
@given(
    rows=st.integers(1, 9),
    n=st.integers(1, 800),
    threads=st.integers(1, 3),
    by=st.integers(0, 63),
    reordered=st.booleans(),
    seed=seeds,
)
def test_any_rows_of_any_format(source, target, rows, n, threads, by, reordered, seed):
    rng, source, target = np.random.default_rng(seed), FORMATS[source], FORMATS[target]
    stored = real_weight(rng, source, rows, whole_blocks(target, whole_blocks(source, n)))
    order = rng.permutation(rows) if reordered else None
    by = by // 4 * 4 if source.name == "F32" else by
    tensor = StoredTensor(source, stored.shape, unaligned(stored.data, by), order)
    begin = int(rng.integers(rows))
    end = int(rng.integers(begin, rows)) + 1
    assert_same(Kernels(threads).convert(tensor, target, begin, end), tensor, target, slice(begin, end))
    assert_same(Kernels(threads).convert(tensor, target), tensor, target)


def difficult_blocks(rng) -> np.ndarray:
    """Blocks in float32 that are hard to round: ties, zeros of both signs, equal and opposite extremes.

    They also have tiny and subnormal numbers, and all magnitudes up to the largest that a block may hold.
    """
    x = rng.normal(size=(400, QK)).astype(np.float32)
    x[:100] = rng.integers(-254, 255, (100, QK)) / 2  # with a largest of 127 a half is a tie of Q8_0
    x[:100, 7] = 127
    x[100:200] = rng.integers(-16, 16, (100, QK)) / 2  # with one of -8, of Q4_0
    x[100:200, rng.integers(QK)] = -8
    x[150:200, rng.integers(QK)] = 8  # the first of the two decides
    x[200:220] = rng.choice(np.float32([0, -0.0]), (20, QK))
    x[220:260] = rng.choice(np.float32([0, 1, -1, 0.5]), (40, QK))
    x[260:400] *= np.float32(2.0) ** rng.integers(-149, 13, (140, 1))
    x[0] = MAX_F16
    return x * np.float32(2.0) ** np.where(np.arange(400) < 220, rng.integers(-20, 8, 400), 0)[:, None]


@every_target
@given(seed=seeds)
def test_difficult_weights(target, seed):
    x = np.clip(difficult_blocks(np.random.default_rng(seed)), -MAX_F16, MAX_F16).astype(np.float32)
    tensor = StoredTensor.quantize(x.reshape(80, -1), "F32")
    assert_same(Kernels(2).convert(tensor, FORMATS[target]), tensor, FORMATS[target])


@pytest.mark.parametrize("target", ["Q8_0", "Q4_0"])
def test_the_least_scales(target):
    """Where 1 / d would be infinite, and the steps to either side of it."""
    d = np.arange(0x200000 - 70_000, 0x200000 + 70_000, 7, dtype=np.uint32).view(np.float32)
    x = np.zeros((len(d), QK), np.float32)
    x[:, 3], x[:, 5] = d * (127 if target == "Q8_0" else -8), d
    tensor = StoredTensor.quantize(x, "F32")
    assert_same(Kernels(2).convert(tensor, FORMATS[target]), tensor, FORMATS[target])


@pytest.mark.parametrize("target", ["F32", "F16", "BF16"])
def test_all_halves_all_midpoints_and_any_bits(target, rng):
    """What lies between neighbours of float16 and of bfloat16, just beside it, NaN, infinity."""
    both = []
    for name in ("F16", "BF16"):
        values = np.arange(1 << 16, dtype="<u2").view(np.uint8).reshape(1, -1)
        with np.errstate(invalid="ignore"):  # a signalling NaN
            numbers = np.unique(FORMATS[name].dequantize(values).astype(np.float64))
        numbers = numbers[np.isfinite(numbers)]
        ties = np.append((numbers[1:] + numbers[:-1]) / 2, 1.5 * numbers[-1] - 0.5 * numbers[-2])
        tie_bits = ties.astype(np.float32).view(np.uint32)
        both += [numbers.astype(np.float32).view(np.uint32), tie_bits, tie_bits - 1, tie_bits + 1]
    special = np.float32([np.nan, -np.nan, np.inf, -np.inf, 65519, 65520, -1e30]).view(np.uint32)
    any_bits = rng.integers(1 << 32, size=100_001, dtype=np.uint32)
    x = np.concatenate([*both, special, np.uint32([0x7F800001, 0xFFFFFFFF]), any_bits]).view(np.float32)[None]
    tensor = StoredTensor(FORMATS["F32"], x.shape, x.view(np.uint8))
    with np.errstate(invalid="ignore"):  # a signalling NaN
        assert_same(Kernels(1).convert(tensor, FORMATS[target]), tensor, FORMATS[target])


@pytest.mark.parametrize("name", ["F16", "BF16"])
def test_all_halves_are_read_rightly(name):
    values = np.arange(1 << 16, dtype="<u2").view(np.uint8)
    tensor = StoredTensor(FORMATS[name], (1, 1 << 16), values)
    assert_same(Kernels(1).convert(tensor, FORMATS["F16"]), tensor, FORMATS["F16"])
    number = ~np.isnan(tensor.dequantize())
    got = Kernels(1).convert(tensor, FORMATS["F32"]).view("<f4")
    np.testing.assert_array_equal(got[number].view("<u4"), tensor.dequantize()[number].view("<u4"))
    assert np.isnan(got[~number]).all()


@pytest.mark.parametrize("target", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf, 65505, -1e30])
@pytest.mark.parametrize("threads", [1, 3])
def test_what_a_block_cannot_hold_is_refused(target, bad, threads, rng):
    """With the first row that has it, whoever comes upon it first."""
    x = rng.normal(size=(50, 20 * QK)).astype(np.float32)
    x[[17, 18, 40], [3, 300, 639]] = bad
    for order, row in [(None, 17), (np.arange(50)[::-1], 9)]:
        tensor = StoredTensor(FORMATS["F32"], x.shape, x.view(np.uint8), order)
        with pytest.raises(ParameterError, match=f"row {row}: NaN or a weight beyond 65504 .* in {target}"):
            Kernels(threads).convert(tensor, FORMATS[target])
        with pytest.raises(ParameterError, match=r"row (18|31): "):
            Kernels(threads).convert(tensor, FORMATS[target], 18 if order is None else 10)


@pytest.mark.parametrize("target", ["Q8_0", "Q4_0"])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_weights_are_stored(target, sign):
    tensor = StoredTensor.quantize(np.float32([[sign * MAX_F16, -sign * MAX_F16] * QK]), "F32")
    assert_same(Kernels(1).convert(tensor, FORMATS[target]), tensor, FORMATS[target])


def test_short_calls_change_nothing(rng, monkeypatch):
    x = rng.normal(size=(37, 3 * QK)).astype(np.float32)
    x[30, 5] = np.nan
    tensor, whole = StoredTensor.quantize(x, "F32"), Kernels(2).convert
    good = whole(tensor, FORMATS["Q8_0"], 0, 30)
    for work in (1, 96 * 3, 96 * 5):
        monkeypatch.setattr(kernels, "WEIGHTS_PER_CALL", work)
        np.testing.assert_array_equal(Kernels(2).convert(tensor, FORMATS["Q8_0"], 0, 30), good)
        with pytest.raises(ParameterError, match="row 30: "):
            Kernels(2).convert(tensor, FORMATS["Q8_0"])


def test_a_tensor_whose_bytes_are_made_when_asked_for(rng):
    stored = real_weight(rng, FORMATS["BF16"], 5, 64)
    made = StoredTensor(stored.format, stored.shape, lambda rows: stored.data[rows])
    assert_same(Kernels(1).convert(made, FORMATS["Q4_0"], 1, 4), stored, FORMATS["Q4_0"], slice(1, 4))


@pytest.mark.parametrize("shape", [(0, 64), (3, 0)])
@every_target
def test_nothing(target, shape):
    got = Kernels(2).convert(StoredTensor.quantize(np.ones(shape), "F32"), FORMATS[target])
    assert got.shape == (shape[0], FORMATS[target].row_bytes(shape[1]))


def test_what_does_not_fit_is_refused(rng):
    with pytest.raises(UnsupportedError, match="cannot convert to Q6_K, only to F32, F16, BF16, Q8_0, Q4_0"):
        Kernels(1).convert(real_weight(rng, FORMATS["F32"], 1, 256), FORMATS["Q6_K"])
    with pytest.raises(MismatchError, match=r"shape \(2, 33\) cannot be stored in Q8_0"):
        Kernels(1).convert(real_weight(rng, FORMATS["F16"], 2, 33), FORMATS["Q8_0"])
    with pytest.raises(MismatchError, match=r"shape \(32,\) cannot be stored in Q8_0"):
        Kernels(1).convert(StoredTensor.quantize(np.ones(32), "F32"), FORMATS["Q8_0"])


@every_source
@every_target
@pytest.mark.parametrize("at_end", [True, False])
def test_nothing_is_touched_beside_the_arrays(source, target, at_end, rng):
    source, target = FORMATS[source], FORMATS[target]
    for rows, n in [(1, 1), (3, 17), (2, 256), (5, 290), (4, 800)]:
        guarded, IN = Guarded(), whole_blocks(target, whole_blocks(source, n))
        w = real_weight(rng, source, rows, IN)
        src = guarded.copy(w.data, at_end)
        dst = guarded.copy(np.zeros((rows, target.row_bytes(IN)), np.uint8), at_end)
        pointers = (ffi.cast("void *", a.ctypes.data) for a in (dst, src))
        dst_pointer, src_pointer = pointers
        assert lib.nl_convert(dst_pointer, target.code, src_pointer, source.code, rows, IN, 2) == 0
        assert_same(dst, w, target)
