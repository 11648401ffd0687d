"""Packed rows: NumPy's `pack_rows` by its stated places, and C held equal to it."""

import numpy as np
import pytest
from helpers.kernels import HALVES, for_each, real_weight, seeds, sizes, unaligned
from hypothesis import example, given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import lib

from numpy_llama.backend.formats import (
    FORMATS,
    PACKED_ROWS,
    PackedTensor,
    StoredTensor,
    pack_rows,
    unpack_rows,
)
from numpy_llama.backend.kernels import Kernels, KernelWeight, packs

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")


@pytest.fixture(params=[name for name, f in FORMATS.items() if packs(f)], scope="module")
def format(request):
    return FORMATS[request.param]


def random_rows(seed, format, OUT, blocks) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (OUT, blocks * format.block_bytes), dtype=np.uint8)


def test_python_and_c_have_groups_of_the_same_size():
    assert lib.NL_PACKED_ROWS == PACKED_ROWS


@for_each
@given(OUT=sizes, blocks=st.integers(1, 5), seed=seeds)
def test_each_unit_is_at_its_place(format, OUT, blocks, seed):
    """Byte i of row r's block b is in the unit at 16 * i0, r units on; i0 is where the unit begins."""
    rows = random_rows(seed, format, OUT, blocks)
    packed = pack_rows(rows, format)
    assert packed.shape == (-(-OUT // PACKED_ROWS) * PACKED_ROWS, rows.shape[1])
    halves = HALVES.get(format.name, ())
    for r, row in enumerate(rows):
        group = packed[r // PACKED_ROWS * PACKED_ROWS :][:PACKED_ROWS].reshape(-1)
        for b in range(blocks):
            block = group[b * PACKED_ROWS * format.block_bytes :]
            at = 0
            while at < format.block_bytes:
                unit = 2 if at in halves else 4
                place = PACKED_ROWS * at + r % PACKED_ROWS * unit
                stored = row[b * format.block_bytes + at :][:unit]
                np.testing.assert_array_equal(block[place : place + unit], stored)
                at += unit
            assert at == format.block_bytes


@for_each
@given(OUT=sizes, blocks=st.integers(1, 9), threads=st.integers(1, 3), by=st.integers(0, 63), seed=seeds)
@example(OUT=0, blocks=2, threads=1, by=0, seed=0)
@example(OUT=3, blocks=0, threads=1, by=0, seed=0)
def test_c_packs_as_numpy_packs(format, OUT, blocks, threads, by, seed):
    rows = unaligned(random_rows(seed, format, OUT, blocks), by)
    weight = KernelWeight(StoredTensor(format, (OUT, blocks * format.block), rows.reshape(-1)), threads)
    np.testing.assert_array_equal(weight.rows, pack_rows(rows, format))
    assert weight.rows.ctypes.data % 64 == 0 or weight.rows.size == 0


@for_each
@given(OUT=sizes, blocks=st.integers(1, 5), seed=seeds)
def test_unpacked_rows_are_what_they_were(format, OUT, blocks, seed):
    rows = random_rows(seed, format, OUT, blocks)
    some = np.random.default_rng(seed).integers(0, OUT, (3, 4))
    packed = pack_rows(rows, format)
    for index in (np.arange(OUT), some, some[0, 0]):
        np.testing.assert_array_equal(unpack_rows(packed, format, index), rows[index])


@for_each
@given(OUT=sizes, blocks=st.integers(1, 2), seed=seeds)
def test_a_packed_tensor_has_the_numbers_of_its_rows(format, OUT, blocks, seed):
    """In every use. The kernels use its bytes in place, and what fills its last group changes nothing."""
    rng = np.random.default_rng(seed)
    plain = real_weight(rng, format, OUT, blocks * format.block)
    packed = pack_rows(plain.data, format)
    unused = pack_rows(
        np.pad(np.zeros_like(plain.data), ((0, -OUT % PACKED_ROWS), (0, 0)), constant_values=255), format
    )
    tensor = PackedTensor(format, plain.shape, packed | unused)
    assert tensor.in_place and (len(tensor), tensor.nbytes) == (OUT, plain.nbytes)
    np.testing.assert_array_equal(tensor.data, plain.data)
    for index in (..., -1, slice(OUT // 2, None), rng.integers(-OUT, OUT, (2, 3))):
        np.testing.assert_array_equal(tensor[index], plain[index])
    np.testing.assert_array_equal(tensor.dequantize(), plain.dequantize())
    with pytest.raises(IndexError):
        tensor[OUT]
    kernels, weight = Kernels(1), KernelWeight(tensor)
    assert weight.rows is tensor.packed
    np.testing.assert_array_equal(
        kernels.convert(tensor, FORMATS["F32"]), kernels.convert(plain, FORMATS["F32"])
    )
    for T in (1, 9):
        x = rng.standard_normal((T, plain.shape[1]), dtype=np.float32)
        np.testing.assert_array_equal(kernels.linear(x, weight), kernels.linear(x, KernelWeight(plain)))
