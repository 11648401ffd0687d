"""linear with quantized activations, on every instruction set that this machine has.

x is rounded as NumPy rounds it. y = linear(x rounded, w) within the rounding of its float32 sums.
"""

import numpy as np
import pytest
from helpers.kernels import (
    FLOAT32_D,
    HALVES,
    Guarded,
    bits,
    exact_weight,
    for_each,
    real_weight,
    seeds,
    sizes,
    unaligned,
    whole_blocks,
)
from hypothesis import example, given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama.backend import kernels
from numpy_llama.backend.formats import (
    FORMATS,
    FP4_TABLE,
    NF4_TABLE,
    QK,
    ROUNDED_TABLES,
    X_MAX,
    StoredTensor,
    quantize_activations,
    rounded_weights,
)
from numpy_llama.backend.kernels import Kernels, KernelWeight
from numpy_llama.proof.bounds import U32, assert_within

GEMV_TOKENS = lib.NL_GEMV_TOKENS
pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")


@pytest.fixture(params=[name for name in FORMATS if name != "F32"], scope="module")
def format(request):
    return FORMATS[request.param]


@pytest.fixture(params=[8, 15], scope="module")
def bits_of_x(request):
    return request.param


def x_block(format) -> int:
    return max(format.block, QK)


def rounded(x, format, bits):
    """What is multiplied. A GEMV leaves x as it is if the weights are floats."""
    if format.in_floats:
        return x if len(x) <= GEMV_TOKENS else quantize_activations(x, 14)
    return quantize_activations(x, bits)


def expected_and_bound(x, w: StoredTensor, isa, bits=15):
    """linear(x rounded, w rounded) in float64, and how far float32 sums may lie from it.

    Every block takes at most four roundings, and joining the lanes a few. A block's d * q and m are each up
    to three times as large as its largest weight. For many tokens weights that are floats too are rounded to
    14 bits.
    """
    format, dense = w.format, rounded_weights(w, np.float64)
    x = rounded(x, format, bits).astype(np.float64)
    blocks = np.abs(dense).reshape(len(dense), -1, QK).max(axis=-1)
    size = np.abs(x) @ np.repeat(blocks, QK, axis=-1).T
    terms = x.shape[-1] if format.in_floats or isa == "scalar" else 4 * x.shape[-1] / QK
    bound = (terms + 16) * U32 * 3 * size
    if format.in_floats and len(x) > GEMV_TOKENS:
        bound += size / (2 * float(X_MAX[14])) * 1.01
    return x @ dense.T, bound


def assert_linear(x, w: StoredTensor, isa, threads=1, bits=15):
    expected, bound = expected_and_bound(x, w, isa, bits)
    assert_within(Kernels(threads, activation_bits=bits).linear(x, KernelWeight(w)), expected, bound)


@for_each
@given(
    T=sizes,
    OUT=sizes,
    blocks=st.integers(1, 40),
    threads=st.integers(1, 3),
    by=st.integers(0, 63),
    seed=seeds,
)
@example(T=1, OUT=4, blocks=17, threads=1, by=0, seed=0)  # an odd number of blocks
@example(T=2, OUT=9, blocks=17, threads=2, by=3, seed=0)
@example(T=3, OUT=5, blocks=9, threads=1, by=0, seed=0)
@example(T=4, OUT=67, blocks=16, threads=3, by=7, seed=0)  # the most that go by rows
@example(T=6, OUT=32, blocks=8, threads=2, by=1, seed=0)  # one whole panel, one whole tile
@example(T=517, OUT=33, blocks=9, threads=2, by=0, seed=0)  # all tokens at once and one, a panel and a row
def test_it_is_linear_of_x_rounded(isa, format, bits_of_x, T, OUT, blocks, threads, by, seed):
    rng = np.random.default_rng(seed)
    IN = whole_blocks(format, blocks * QK)
    w = real_weight(rng, format, OUT, IN)
    w = StoredTensor(format, w.shape, unaligned(w.data, by))
    scale = 10.0 ** rng.uniform(-12, 12, (T, IN // QK, 1))  # of each block its own
    x = (rng.standard_normal((T, IN // QK, QK)) * scale).astype(np.float32).reshape(T, IN)
    assert_linear(unaligned(x, by // 4 * 4), w, isa, threads, bits_of_x)


def test_every_weight_is_read_rightly(isa, format, rng):
    """x has one number that is not 0, so each output is one weight."""
    IN = 3 * x_block(format)
    w = real_weight(rng, format, 37, IN)
    one = np.eye(IN, dtype=np.float32) * X_MAX[15]
    assert_linear(one, w, isa)
    for row in one[:: 1 if isa != "scalar" else 7]:
        assert_linear(row[None], w, isa)


def test_x_is_rounded_as_numpy_rounds(rng):
    """Bit for bit; the scalar form keeps x as floats."""
    before = kernels.isa()
    kernels.use_isa("scalar")
    x = (rng.standard_normal((9, 512)) * 10.0 ** rng.integers(-40, 38, (9, 512))).astype(np.float32)
    x[0], x[1, 3] = 0, 1e-35
    for format, bits_ in ((FORMATS["Q4_0"], 8), (FORMATS["Q4_K"], 15), (FORMATS["F16"], 14)):
        out = np.zeros(lib.nl_activations_bytes(*x.shape) // 4, np.float32)
        x_, out_ = ffi.from_buffer("float[]", x), ffi.from_buffer(out)
        lib.nl_quantize_activations(out_, x_, format.code, bits_, *x.shape, 1)
        np.testing.assert_array_equal(out[: x.size].reshape(x.shape), quantize_activations(x, bits_))
    kernels.use_isa(before)


@pytest.mark.parametrize("sign", [1, -1])
def test_the_largest_sums_do_not_overflow(isa, format, sign):
    """Every number as large as it can be, and of one sign."""
    for byte in (0xFF, 0x7F, 0x80, 0x00):
        OUT, IN = 5, 1024
        blocks = np.full((OUT * IN // x_block(format), format.row_bytes(x_block(format))), byte, np.uint8)
        if format.block == 1:
            blocks = np.full((OUT, IN), 60000, np.float32)
            blocks = StoredTensor.quantize(blocks, format).data.copy()
        for at in HALVES.get(format.name, ()):
            blocks[:, at : at + 2] = np.float16([1]).view(np.uint8)
        if format.name in FLOAT32_D:
            blocks[:, :4] = np.float32([1]).view(np.uint8)
        w = StoredTensor(format, (OUT, IN), blocks.reshape(-1))
        for x in (np.full((9, IN), sign, np.float32), np.full((1, IN), sign, np.float32)):
            assert_linear(x, w, isa)
            assert_linear(x * np.sign(w.dequantize()[0]), w, isa)


@for_each
@given(
    T=st.integers(GEMV_TOKENS + 1, 40),
    OUT=st.integers(1, 70),
    blocks=st.integers(1, 40),
    cut=st.integers(1, 38),
    seed=seeds,
)
@example(T=525, OUT=33, blocks=3, cut=517, seed=0)
def test_the_same_bits_however_it_is_split(isa, format, T, OUT, blocks, cut, seed):
    """Any number of threads, and any parts of the tokens. Many tokens round weights that are floats."""
    rng = np.random.default_rng(seed)
    IN = whole_blocks(format, blocks * QK)
    w, x = KernelWeight(real_weight(rng, format, OUT, IN)), rng.standard_normal((T, IN), dtype=np.float32)
    x[rng.random(x.shape) < 0.01] *= 30  # some blocks get a second byte
    whole, few = Kernels(1).linear(x, w), Kernels(1).linear(x[:GEMV_TOKENS], w)
    for threads in (2, 3):
        np.testing.assert_array_equal(bits(Kernels(threads).linear(x, w)), bits(whole))
        np.testing.assert_array_equal(bits(Kernels(threads).linear(x[:GEMV_TOKENS], w)), bits(few))
    if not format.in_floats and 0 < cut < T:
        parts = [Kernels(2).linear(part, w) for part in (x[:cut], x[cut:])]
        np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(whole))
        np.testing.assert_array_equal(bits(Kernels(1).linear(x[:1], w)), bits(whole[:1]))
    elif GEMV_TOKENS < cut < T - GEMV_TOKENS:
        parts = [Kernels(2).linear(part, w) for part in (x[:cut], x[cut:])]
        np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(whole))
    if cut < GEMV_TOKENS:
        parts = [Kernels(2).linear(part, w) for part in (x[:cut], x[cut:GEMV_TOKENS])]
        np.testing.assert_array_equal(bits(np.concatenate(parts)), bits(few))


@pytest.mark.parametrize("name, table, unit", [("NF4", NF4_TABLE, 124.115), ("FP4", FP4_TABLE, 120)])
def test_the_bytes_of_a_table_are_the_nearest(name, table, unit):
    """C and NumPy list the same bytes: no comparison of the two finds a wrong one."""
    np.testing.assert_allclose(ROUNDED_TABLES[name] * unit, np.rint(table * unit), rtol=1e-6)


@pytest.mark.skipif("avx_vnni" not in kernels.available_isas(), reason="this CPU has no AVX_VNNI")
@for_each
@given(T=sizes, OUT=sizes, blocks=st.integers(1, 40), seed=seeds)
@example(T=517, OUT=33, blocks=9, seed=0)
def test_avx_vnni_gives_the_bits_of_avx2(format, bits_of_x, T, OUT, blocks, seed):
    """Both sum whole numbers exactly, and floats in the same lanes and order."""
    rng, before = np.random.default_rng(seed), kernels.isa()
    IN = whole_blocks(format, blocks * QK)
    w, x = KernelWeight(real_weight(rng, format, OUT, IN)), rng.standard_normal((T, IN), dtype=np.float32)
    x[rng.random(x.shape) < 0.01] *= 30  # some blocks get a second byte
    results = []
    try:
        for name in ("avx_vnni", "avx2"):
            kernels.use_isa(name)
            results.append(bits(Kernels(1, activation_bits=bits_of_x).linear(x, w)))
    finally:
        kernels.use_isa(before)
    np.testing.assert_array_equal(*results)


def test_the_same_bits_in_short_calls(isa, format, rng, monkeypatch):
    IN = whole_blocks(format, 96)
    w = KernelWeight(real_weight(rng, format, 133, IN))
    for T in (1, 3, 5):
        x = rng.standard_normal((T, IN), dtype=np.float32)
        whole = Kernels(2).linear(x, w)
        monkeypatch.setattr(kernels, "WORK_PER_CALL", 1)  # one panel a thread
        np.testing.assert_array_equal(bits(Kernels(2).linear(x, w)), bits(whole))
        monkeypatch.undo()
        monkeypatch.setattr(kernels, "WORK_FOR_THREADS", 0)


@pytest.mark.parametrize("T", [1, 2, 4, 9])
def test_what_is_not_finite_stays_with_its_token(isa, format, T, rng):
    IN = 2 * x_block(format)
    w, x = real_weight(rng, format, 35, IN), rng.standard_normal((T, IN), dtype=np.float32)
    clean = Kernels(1).linear(x, w)
    for wrong in (np.nan, np.inf, -np.inf):
        x[T - 1, IN - 3] = wrong
        y = Kernels(1).linear(x, w)
        assert not np.isfinite(y[T - 1]).any()
        np.testing.assert_array_equal(bits(y[: T - 1]), bits(clean[: T - 1]))


@pytest.mark.parametrize("T", [1, 7])
def test_a_weight_that_is_not_finite_stays_with_its_row(isa, format, T, rng):
    w, x = real_weight(rng, format, 35, 512), rng.standard_normal((T, 512), dtype=np.float32)
    at = HALVES.get(format.name, (6,))[0]
    for wrong in (np.nan, np.inf):
        if format.name in FLOAT32_D:
            w.data[33, :4] = np.float32([wrong]).view(np.uint8)
        else:
            half = FORMATS["BF16" if format.name == "BF16" else "F16"].quantize(np.float32([[wrong]]))
            w.data[33, at : at + 2] = half
        y = Kernels(1).linear(x, w)
        np.testing.assert_array_equal(~np.isfinite(y), (np.arange(35) == 33) & np.ones((T, 1), bool))


@pytest.mark.parametrize("T", [1, 5])
def test_next_to_nothing_is_nothing(isa, format, T, rng):
    if not kernels.quantizes_activations(format, T):
        return  # not rounded
    w = real_weight(rng, format, 4, 512)
    assert not Kernels(1).linear(np.full((T, 512), 9e-31, np.float32), w).any()
    assert not Kernels(1).linear(np.zeros((T, 512), np.float32), w).any()


@pytest.mark.parametrize("at_end", [True, False])
def test_it_touches_nothing_beside_its_arrays(isa, format, at_end, rng):
    for T, OUT, blocks in [(1, 1, 1), (1, 5, 17), (2, 3, 16), (4, 17, 1), (7, 33, 33), (9, 4, 2)]:
        if not kernels.quantizes_activations(format, T):
            continue  # nl_linear's
        guarded, IN = Guarded(), whole_blocks(format, blocks * QK)
        w = exact_weight(rng, format, OUT, IN)
        packed = guarded.copy(KernelWeight(w).rows, at_end)
        x = guarded.copy(rng.standard_normal((T, IN), dtype=np.float32), at_end)
        y = guarded.copy(np.full((T, OUT), np.nan, np.float32), at_end)
        room = guarded.copy(np.zeros(lib.nl_activations_bytes(T, IN), np.uint8), at_end)
        y_, x_, w_, room_ = (ffi.cast("void *", a.ctypes.data) for a in (y, x, packed, room))
        matrix = ffi.new("nl_matrix *", (w_, format.code, OUT, IN))
        assert lib.nl_quantize_activations(room_, x_, format.code, 15, T, IN, 2) == 0
        assert lib.nl_linear_quantized(y_, room_, T, matrix, 0, OUT, 2) == 0
        expected, bound = expected_and_bound(x, w, isa)
        assert_within(y, expected, bound)


def sent(x: np.ndarray, format) -> np.ndarray:
    """x as other ranks restore it, from memory that begins anywhere and ends with it."""
    memory = unaligned(np.zeros(x.size // QK * lib.NL_ROUNDED_BYTES, np.uint8), 1)
    restored = unaligned(np.full_like(x, np.nan), 4)
    on_the_way = ffi.from_buffer(memory, require_writable=True)
    lib.nl_round_activations(on_the_way, ffi.from_buffer("float[]", x), format.code, x.size)
    back = ffi.from_buffer("float[]", restored, require_writable=True)
    lib.nl_restore_activations(back, on_the_way, format.code, x.size)
    return restored


# The scales of a block: its numbers are of the same size, or each of another; next to nothing, or nothing.
sizes_of_x = st.sampled_from([1.0, 1e-3, 3e4, 1e-29, 1e-31, 1e-38, 1e-44, 0.0, 3e37])


@for_each
@given(
    st.integers(1, 13), st.integers(1, 5), st.lists(sizes_of_x, min_size=1, max_size=4), st.booleans(), seeds
)
@example(1, 1, [1.0], False, 0)
@example(9, 2, [1e-31, 1.0], True, 0)
def test_what_was_sent_is_rounded_to_the_same(isa, format, bits_of_x, T, blocks, sizes, heavy, seed):
    """A rank rounds the numbers of the others once more. Every bit of the product is that of x itself."""
    rng = np.random.default_rng(seed)
    if not lib.nl_quantizes_activations(format.code, T):
        T = GEMV_TOKENS + 1
    IN = blocks * x_block(format)
    x = rng.standard_normal((T, IN // QK, QK), dtype=np.float32)
    x = x * (np.float32(10) ** rng.integers(-9, 1, x.shape).astype(np.float32) if heavy else np.float32(1))
    x *= rng.choice(np.array(sizes, np.float32), (T, IN // QK, 1))
    x[rng.random(x.shape) < 0.1] = 0
    x = np.ascontiguousarray(x.reshape(T, IN), np.float32)
    w = KernelWeight(real_weight(rng, format, 5, IN))
    k = Kernels(1, activation_bits=bits_of_x)
    np.testing.assert_array_equal(bits(k.linear(sent(x, format), w)), bits(k.linear(x, w)))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_sent_as_such(isa, format, bad, rng):
    x = rng.standard_normal(3 * QK).astype(np.float32)
    x[QK + 7] = bad
    finite = np.isfinite(sent(x, format)).reshape(3, QK)
    assert finite[[0, 2]].all() and not finite[1].all()


@pytest.mark.parametrize("at_end", [True, False])
def test_sending_touches_nothing_beside_its_arrays(isa, format, at_end, rng):
    guarded, x = Guarded(), rng.standard_normal(3 * QK).astype(np.float32)
    expected = sent(x, format)
    arrays = x, np.zeros(3 * lib.NL_ROUNDED_BYTES, np.uint8), np.zeros_like(x)
    x, on_the_way, restored = (guarded.copy(a, at_end) for a in arrays)
    pointers = [ffi.cast("void *", a.ctypes.data) for a in (x, on_the_way, restored)]
    lib.nl_round_activations(pointers[1], pointers[0], format.code, x.size)
    lib.nl_restore_activations(pointers[2], pointers[1], format.code, x.size)
    np.testing.assert_array_equal(bits(restored), bits(expected))
