"""The micro-kernel of csrc/linear_gemm.c and its scalar form: the same bits, on every instruction set.

The same loop nest calls both, with the same panels. Sums of whole numbers are exact, and both add floats in
the stated order, so nothing may differ.
"""

import numpy as np
import pytest
from helpers.kernels import bits, for_each, real_weight, seeds, whole_blocks
from hypothesis import example, given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama.backend.formats import FORMATS, QK
from numpy_llama.backend.kernels import Kernels, KernelWeight, quantizes_activations

MANY = lib.NL_GEMV_TOKENS + 1


@pytest.fixture(params=FORMATS, scope="module")
def format(request):
    return FORMATS[request.param]


def by_scalar_micro_kernel(x: np.ndarray, w: KernelWeight, exact: bool) -> np.ndarray:
    y, T = np.full((len(x), len(w)), np.nan, np.float32), len(x)
    operand = ffi.from_buffer("float[]", x)
    if not exact:
        operand = Kernels(1)._quantize_activations(operand, w, T, 1)
    y_ = ffi.from_buffer("float[]", y, require_writable=True)
    assert lib.nl_linear_scalar_micro_kernel(y_, operand, T, w.matrix, exact) == 0
    return y


@for_each
@given(
    T=st.integers(MANY, 20),
    OUT=st.integers(1, 70),
    blocks=st.integers(1, 20),
    exact=st.booleans(),
    seed=seeds,
)
@example(T=MANY, OUT=1, blocks=1, exact=False, seed=0)
@example(T=MANY, OUT=1, blocks=1, exact=True, seed=0)
@example(T=8, OUT=32, blocks=8, exact=False, seed=0)  # one whole panel, one whole group of tokens
@example(T=8, OUT=32, blocks=8, exact=True, seed=0)
@example(
    T=515, OUT=33, blocks=9, exact=False, seed=0
)  # MC tokens and three, a panel and a row, KC and a block
def test_both_micro_kernels_give_the_same_bits(isa, format, T, OUT, blocks, exact, seed):
    exact = exact or not quantizes_activations(format, T)
    rng = np.random.default_rng(seed)
    IN = whole_blocks(format, blocks * QK)
    w = KernelWeight(real_weight(rng, format, OUT, IN))
    x = rng.standard_normal((T, IN), dtype=np.float32) * 10.0 ** rng.integers(-6, 6, (T, IN))
    x = x.astype(np.float32)
    expected = by_scalar_micro_kernel(x, w, exact)
    np.testing.assert_array_equal(bits(Kernels(1, exact=exact).linear(x, w)), bits(expected))
