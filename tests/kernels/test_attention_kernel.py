"""The C attention against the NumPy function, on every instruction set that this machine has.

They agree within the rounding of the sums. Cuts of queries, positions or threads change no bit.
"""

import mmap

import numpy as np
import pytest
from helpers.kernels import Guarded, bits, for_each, seeds
from hypothesis import example, given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama import functional as F
from numpy_llama.backend import kernels
from numpy_llama.backend.formats import FORMATS, QK, dequantize_q8_0, quantize_q8_0
from numpy_llama.backend.kernels import Kernels
from numpy_llama.cache import KVCache
from numpy_llama.errors import MismatchError, NumericsError, ParameterError, UnsupportedError
from numpy_llama.model import Transformer
from numpy_llama.proof.bounds import MODEL_32, U32, assert_near, assert_within, g
from numpy_llama.proof.tiny import TINY, random_tokens, random_weights

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")

SPAN = 1024  # KV_SPAN of csrc/attention.c: positions that are walked from an empty softmax state


# Keys and values as a cache has them. uint8: the bytes of blocks of Q8_0, so Dh is a multiple of 32.
CACHED = [np.float32, np.float16, np.uint8]


def draw_attention(rng, B, T, S, K, n_rep, Dh, dtype=np.float32):
    Dh = -(-Dh // QK) * QK if dtype == np.uint8 else Dh
    q = rng.standard_normal((B, T, K * n_rep, Dh), dtype=np.float32)
    k, v = (as_cached(rng.standard_normal((B, S, K, Dh), dtype=np.float32), dtype) for _ in "kv")
    return q, k, v


def as_cached(x: np.ndarray, dtype) -> np.ndarray:
    if dtype != np.uint8:
        return x.astype(dtype)
    return quantize_q8_0(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


def in_float64(x: np.ndarray) -> np.ndarray:
    """The numbers that are stored."""
    if x.dtype != np.uint8:
        return x.astype(np.float64)
    rows = np.ascontiguousarray(x).reshape(-1, x.shape[-1])
    return dequantize_q8_0(rows).reshape(*x.shape[:-1], -1).astype(np.float64)


def c_attention(
    threads: int, q: np.ndarray, k: np.ndarray, v: np.ndarray, window: int | None = None, dropped: int = 0
) -> np.ndarray:
    """Kernels.attention, and the same for Q8_0 and dropped positions, which only a whole layer gives to C."""
    if k.dtype != np.uint8 and not dropped:
        return Kernels(threads).attention(q, k, v, window)
    kernels.team(threads)
    q, out, (B, T, H, Dh) = np.ascontiguousarray(q), np.empty(q.shape, np.float32), q.shape
    pointers = (ffi.cast("void *", a.ctypes.data) for a in (out, q, k, v))
    units = {np.dtype(np.uint8): ("Q8_0", 34, QK), np.dtype(np.float16): ("F16", 2, 1)}
    name, nbytes, numbers = units.get(k.dtype, ("F32", 4, 1))
    strides = [[stride // nbytes * numbers for stride in a.strides[:3]] for a in (k, v)]
    sizes = B, T, dropped + k.shape[1], H, k.shape[2], Dh
    more = *strides, 0, T, ffi.NULL, window or 0, dropped
    arguments = ffi.new("nl_attention_args *", [*pointers, FORMATS[name].code, *sizes, *more])
    assert lib.nl_attention(arguments, threads) == 0
    return out


def in_cache_layout(x: np.ndarray) -> np.ndarray:
    """The same (B, S, K, Dh), a view of a longer cache whose unused slots are NaN."""
    B, S, K, Dh = x.shape
    cache = np.full((B, K, S + 5, Dh), 255 if x.dtype == np.uint8 else np.nan, x.dtype)
    view = cache.swapaxes(1, 2)[:, :S]
    view[...] = x
    return view


shapes = st.fixed_dictionaries(
    {
        "B": st.integers(1, 3),
        "T": st.integers(1, 20),
        "K": st.integers(1, 3),
        "n_rep": st.integers(1, 5),
        "Dh": st.one_of(st.integers(1, 20), st.sampled_from([24, 31, 32, 33, 64, 80, 96, 128, 256])),
    }
)
older = st.one_of(st.integers(0, 10), st.integers(55, 75), st.integers(120, 135))


def attention_bound(q, k, v) -> np.ndarray:
    """How far one output may err: the error of a score moves its probability, and the sums are rounded.

    A score errs by delta <= (g(Dh) + 3 u) |q| . |k| / sqrt(Dh). So exp(score - max) errs by 2 delta, and by
    the exp's own 4 u + |score - max| u. Numerator and denominator are sums of S terms, rescaled once a block.
    """
    q, k, v = map(in_float64, (q, k, v))
    H, K, Dh, S = q.shape[2], k.shape[2], q.shape[3], k.shape[1]
    k, v = F.repeat_kv(k, H // K), F.repeat_kv(v, H // K)
    products = np.einsum("bthd,bshd->bhts", np.abs(q), np.abs(k)) / np.sqrt(Dh)
    delta = (g(Dh) + 3 * U32) * products.max(axis=(-2, -1), keepdims=True)
    spread = 2 * products.max(axis=(-2, -1), keepdims=True)
    relative = 2 * (2 * delta + (4 + spread) * U32) + 2 * g(S) + 4 * (S / 64 + 2) * U32
    weights = np.ones_like(products)  # each |v| counts at most once; its share is at most 1
    reach = np.minimum(np.einsum("bhts,bshd->bhtd", weights, np.abs(v)), np.abs(v).max(axis=1)[:, :, None])
    return (relative * reach).swapaxes(1, 2)


@given(
    shape=shapes,
    older=older,
    dtype=st.sampled_from(CACHED),
    threads=st.integers(1, 3),
    seed=seeds,
)
def test_attention_is_within_the_rounding_of_its_sums(isa, shape, older, dtype, threads, seed):
    rng = np.random.default_rng(seed)
    q, k, v = draw_attention(rng, S=shape["T"] + older, dtype=dtype, **shape)
    expected = F.attention(*map(in_float64, (q, k, v)))
    got = c_attention(threads, q, in_cache_layout(k), in_cache_layout(v))
    assert_within(got, expected, attention_bound(q, k, v))


@given(shape=shapes, older=older, seed=seeds)
def test_attention_finds_the_one_position_exactly(isa, shape, older, seed):
    """Scores so far apart that one probability is 1, all others 0: the output is that value, bit for bit."""
    rng = np.random.default_rng(seed)
    T, S, K, Dh = shape["T"], shape["T"] + older, shape["K"], shape["Dh"]
    q, k, v = draw_attention(rng, S=S, **shape)
    q[...] = 1
    height = rng.permuted(np.tile(np.arange(S), (shape["B"], K, 1)), axis=-1).swapaxes(1, 2)  # (B, S, K)
    k[...] = 1024 * height[..., None] / np.float32(np.sqrt(Dh))
    got = Kernels(2).attention(q, k, v)
    for t in range(T):
        best = height[:, : older + t + 1].argmax(axis=1)  # (B, K)
        expected = np.take_along_axis(v, best[:, None, :, None], axis=1)[:, 0]
        np.testing.assert_array_equal(got[:, t], np.repeat(expected, shape["n_rep"], axis=1))


GEMV_TOKENS = lib.NL_GEMV_TOKENS


def beside_it(dtype) -> int:
    """How many tokens must be computed with one, for it to be summed as it is among many."""
    return 0 if dtype == np.float32 else GEMV_TOKENS


@given(
    shape=shapes,
    older=older,
    cut=st.integers(0, 20),
    dtype=st.sampled_from(CACHED),
    seed=seeds,
)
@example(shape={"B": 2, "T": 4, "K": 2, "n_rep": 3, "Dh": 64}, older=67, cut=1, dtype=np.float16, seed=0)
@example(shape={"B": 2, "T": 4, "K": 2, "n_rep": 3, "Dh": 64}, older=67, cut=1, dtype=np.uint8, seed=0)
@example(shape={"B": 1, "T": 12, "K": 1, "n_rep": 1, "Dh": 64}, older=3, cut=6, dtype=np.float16, seed=0)
def test_attention_gives_the_same_bits_however_it_is_split(isa, shape, older, cut, dtype, seed):
    """In float16 and Q8_0 the whole and its pieces all have up to GEMV_TOKENS tokens, or all more."""
    rng = np.random.default_rng(seed)
    T, S = shape["T"], shape["T"] + older
    q, k, v = draw_attention(rng, S=S, dtype=dtype, **shape)
    whole = c_attention(1, q, k, v)
    for threads in (2, 3):
        np.testing.assert_array_equal(bits(c_attention(threads, q, k, v)), bits(whole))
    np.testing.assert_array_equal(
        bits(c_attention(2, q, in_cache_layout(k), in_cache_layout(v))), bits(whole)
    )
    ends = [min(cut, T), T]
    if T <= GEMV_TOKENS or min(ends[0], T - ends[0]) > beside_it(dtype):
        parts = [
            c_attention(2, q[:, begin:end], k[:, : older + end], v[:, : older + end])
            for begin, end in zip([0, ends[0]], ends, strict=True)
        ]
        np.testing.assert_array_equal(bits(np.concatenate(parts, axis=1)), bits(whole))
    if T > GEMV_TOKENS and beside_it(dtype):
        return
    one_by_one = [
        c_attention(1, q[b : b + 1, t : t + 1], k[b : b + 1, : older + t + 1], v[b : b + 1, : older + t + 1])[
            0
        ]
        for b in range(shape["B"])
        for t in range(T)
    ]
    np.testing.assert_array_equal(bits(np.concatenate(one_by_one)), bits(whole.reshape(-1, *whole.shape[2:])))


@given(shape=shapes, older=older, seed=seeds)
def test_attention_never_reads_the_future(isa, shape, older, seed):
    """NaN in every position that query t may not see leaves its bits as they are."""
    rng = np.random.default_rng(seed)
    T, S = shape["T"], shape["T"] + older
    q, k, v = draw_attention(rng, S=S, **shape)
    whole = Kernels(1).attention(q, k, v)
    t = int(rng.integers(0, T))
    k[:, older + t + 1 :], v[:, older + t + 1 :] = np.nan, np.nan
    poisoned = Kernels(1).attention(q, k, v)
    np.testing.assert_array_equal(bits(poisoned[:, : t + 1]), bits(whole[:, : t + 1]))
    assert np.isnan(poisoned[:, t + 1 :]).all()


long = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        "T": st.integers(1, 6),
        "K": st.integers(1, 2),
        "n_rep": st.integers(1, 9),
        "Dh": st.sampled_from([3, 8, 32, 48, 64]),
    }
)


@for_each
@given(
    shape=long,
    spans=st.integers(1, 2),
    beside=st.integers(-7, 3),
    dtype=st.sampled_from(CACHED),
    seed=seeds,
)
@example(shape={"B": 1, "T": 1, "K": 1, "n_rep": 4, "Dh": 64}, spans=2, beside=0, dtype=np.float16, seed=0)
def test_spans_of_positions_merge_to_the_same_bits(isa, shape, spans, beside, dtype, seed):
    """Cut between threads, or walked in turn; for queries that end before, at and behind a span's end."""
    rng = np.random.default_rng(seed)
    older, T = spans * SPAN + beside, shape["T"]
    q, k, v = draw_attention(rng, S=older + T, dtype=dtype, **shape)
    whole = c_attention(1, q, k, v)
    assert_within(whole, F.attention(*map(in_float64, (q, k, v))), attention_bound(q, k, v))
    for threads in (2, 3):
        np.testing.assert_array_equal(bits(c_attention(threads, q, k, v)), bits(whole))
    for t in range(0 if T <= GEMV_TOKENS else beside_it(dtype), T):
        first = t if T <= GEMV_TOKENS else t - beside_it(dtype)
        some = c_attention(2, q[:, first : t + 1], k[:, : older + t + 1], v[:, : older + t + 1])
        np.testing.assert_array_equal(bits(some[:, -1]), bits(whole[:, t]))


many_spans = st.fixed_dictionaries(
    {
        "B": st.integers(1, 2),
        # Up to 6 queries: each span is a task. From 121 on: two query blocks, each of which walks all spans.
        "T": st.one_of(st.integers(1, 6), st.integers(121, 123)),
        "K": st.integers(1, 2),
        "n_rep": st.just(2),
        "Dh": st.sampled_from([10, 32, 64]),
    }
)


@for_each
@given(
    shape=many_spans,
    spans=st.integers(3, 9),
    beside=st.integers(-7, 3),
    dtype=st.sampled_from(CACHED),
    threads=st.integers(1, 3),
    seed=seeds,
)
@example({"B": 2, "T": 1, "K": 2, "n_rep": 2, "Dh": 64}, 9, 3, np.float16, 2, 0)  # decode_block
@example({"B": 1, "T": 3, "K": 2, "n_rep": 2, "Dh": 32}, 7, 3, np.float32, 2, 0)
@example({"B": 1, "T": 121, "K": 1, "n_rep": 2, "Dh": 32}, 8, 0, np.float16, 2, 0)  # two query blocks
def test_each_of_many_spans_counts_by_its_probability(isa, shape, spans, beside, dtype, threads, seed):
    """Values that are the number of their span, one-hot: output d is the probability of all of span d."""
    rng = np.random.default_rng(seed)
    older = spans * SPAN + beside
    q, k, v = draw_attention(rng, S=older + shape["T"], dtype=dtype, **shape)
    one_hot = np.eye(q.shape[-1], dtype=np.float32)[np.arange(v.shape[1]) // SPAN][None, :, None]
    v[...] = as_cached(one_hot, dtype)
    got = c_attention(threads, q, in_cache_layout(k), in_cache_layout(v))
    bound = attention_bound(q, k, v)
    assert bound[..., : spans - 1].max() < 0.5 / spans  # so a lost or doubled span cannot hide in it
    assert_within(got, F.attention(*map(in_float64, (q, k, v))), bound)


def test_a_span_that_a_query_does_not_see_leaves_it_alone(isa):
    """Even the sign of a sum that vanished: the second query sees one position of the second span."""
    q, k = np.ones((1, 2, 1, 32), np.float32), np.zeros((1, SPAN + 1, 1, 32), np.float32)
    v = np.full_like(k, -1e-45)  # times a probability it is -0
    k[:, 0], v[:, 0] = 1, 0
    alone = Kernels(1).attention(q[:, :1], k[:, :SPAN], v[:, :SPAN])
    assert isa == "scalar" or np.signbit(alone).all()
    np.testing.assert_array_equal(bits(Kernels(1).attention(q, k, v)[:, :1]), bits(alone))


@for_each
@given(
    T=st.integers(20, 140),
    n_rep=st.integers(1, 8),
    older=st.sampled_from([0, 1, 64, SPAN - 70]),
    Dh=st.sampled_from([5, 32, 40]),
    dtype=st.sampled_from(CACHED),
    seed=seeds,
)
@example(T=130, n_rep=8, older=SPAN - 129, Dh=32, dtype=np.float32, seed=0)  # one position in a second span
@example(T=130, n_rep=8, older=SPAN - 64, Dh=32, dtype=np.float16, seed=0)  # items and a span end inside
def test_many_queries_give_the_bits_of_some(isa, T, n_rep, older, Dh, dtype, seed):
    """Whole items, what is left of one, tiles and what is left of them; and NaN where nobody may look yet."""
    rng = np.random.default_rng(seed)
    q, k, v = draw_attention(rng, 1, T, older + T, 1, n_rep, Dh, dtype)
    whole = c_attention(2, q, k, v)
    assert_within(whole, F.attention(*map(in_float64, (q, k, v))), attention_bound(q, k, v))
    np.testing.assert_array_equal(bits(c_attention(1, q, k, v)), bits(whole))
    for t in rng.integers(beside_it(dtype), T, 3):
        seen = older + t + 1
        some = c_attention(1, q[:, t - beside_it(dtype) : t + 1], k[:, :seen], v[:, :seen])
        np.testing.assert_array_equal(bits(some[:, -1]), bits(whole[:, t]))
        k_poisoned, v_poisoned = k.copy(), v.copy()
        poison = 255 if dtype == np.uint8 else np.nan
        k_poisoned[:, seen:], v_poisoned[:, seen:] = poison, poison
        poisoned = c_attention(2, q, k_poisoned, v_poisoned)
        np.testing.assert_array_equal(bits(poisoned[:, : t + 1]), bits(whole[:, : t + 1]))


def test_attention_gives_the_same_bits_in_short_calls(isa, rng, monkeypatch):
    q, k, v = draw_attention(rng, B=2, T=23, S=70, K=2, n_rep=3, Dh=16)
    whole = Kernels(2).attention(q, k, v)
    monkeypatch.setattr(kernels, "ATTENTION_WORK", 1)
    for rows in (3, 15, 240):  # a call takes whole blocks of them, if it is long enough
        monkeypatch.setattr(kernels, "ATTENTION_ROWS", rows)
        for work in (1, 2 * 70 * 6 * 16 * 4):  # so short that a call computes 1 or 4 queries a thread
            monkeypatch.setattr(kernels, "WORK_PER_CALL", work)
            np.testing.assert_array_equal(bits(Kernels(2).attention(q, k, v)), bits(whole))


def test_heads_2_to_the_31_numbers_apart_are_found(isa, rng):
    """Strides are 64 bits wide. The cache is nearly all hole."""
    apart, S, Dh = (1 << 31) + 64, 9, 32
    q, k, v = draw_attention(rng, 1, 5, S, 2, 2, Dh, np.float16)
    area = np.frombuffer(mmap.mmap(-1, 2 * (apart + 2 * S * Dh)), np.float16)
    views = []
    for x, at in ((k, 0), (v, S * Dh)):
        strides = [2 * n for n in (2 * apart, Dh, apart, 1)]
        view = np.lib.stride_tricks.as_strided(area[at:], x.shape, strides)
        view[...] = x
        views.append(view)
    np.testing.assert_array_equal(Kernels(2).attention(q, *views), Kernels(2).attention(q, k, v))


def test_attention_of_nothing(isa):
    q, k = np.ones((1, 0, 4, 8), np.float32), np.ones((1, 5, 2, 8), np.float32)
    assert Kernels(2).attention(q, k, k).shape == (1, 0, 4, 8)
    assert Kernels(2).attention(q, k[:, :0], k[:, :0]).shape == (1, 0, 4, 8)


def test_attention_takes_any_array(isa, rng):
    q, k, v = draw_attention(rng, B=2, T=4, S=9, K=2, n_rep=2, Dh=8)
    expected = Kernels(1).attention(q, k, v)
    for same in (
        lambda a: a[:, ::-1][:, ::-1],
        np.asfortranarray,
        lambda a: a.astype(">f4"),
        lambda a: np.repeat(a, 2, -1)[..., ::2],
    ):
        np.testing.assert_array_equal(Kernels(1).attention(same(q), same(k), same(v)), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda q, k, v: (q, k[:, 1:], v),
        lambda q, k, v: (q, k[..., 1:], v[..., 1:]),
        lambda q, k, v: (q[:, :, 1:], k, v),
        lambda q, k, v: (q, k[:, :3], v[:, :3]),
        lambda q, k, v: (q[:1], k, v),
        lambda q, k, v: (q, k[:1], v[:1]),
        lambda q, k, v: (q, k, v[:1]),
        lambda q, k, v: (q, k, v[..., 1:]),
        lambda q, k, v: (q[:, :, :2], k, v[:, :, :1]),
        lambda q, k, v: (q[:, :, :1], k, v),
    ],
)
@pytest.mark.parametrize("attention", [F.attention, Kernels(1).attention], ids=["numpy", "c"])
def test_attention_refuses_what_does_not_fit(rng, attention, change):
    q, k, v = draw_attention(rng, B=2, T=4, S=9, K=2, n_rep=2, Dh=8)
    with pytest.raises(MismatchError):
        attention(*change(q, k, v))


def test_keys_and_values_may_differ_in_precision(isa, rng):
    q, k, v = draw_attention(rng, B=2, T=4, S=9, K=2, n_rep=2, Dh=8)
    half = v.astype(np.float16)
    expected = Kernels(1).attention(q, k, half.astype(np.float32))
    np.testing.assert_array_equal(Kernels(1).attention(q, k, half), expected)


def test_attention_refuses_heads_that_are_too_wide(rng):
    with pytest.raises(UnsupportedError, match="head_dim is 257, the C kernel goes up to 256"):
        Kernels(1).attention(*draw_attention(rng, B=1, T=1, S=1, K=1, n_rep=1, Dh=257))


def test_scores_of_minus_infinity_count_nothing(isa):
    """Also when they come first: -inf - -inf would be NaN."""
    q = np.full((1, 1, 1, 2), 1e20, np.float32)
    k = np.zeros((1, 200, 1, 2), np.float32)
    k[:, :100] = -1e20  # their scores overflow
    v = np.arange(400, dtype=np.float32).reshape(k.shape)
    with np.errstate(over="ignore"):
        expected = F.attention(q, k, v)
    np.testing.assert_allclose(Kernels(1).attention(q, k, v), expected, rtol=1e-5)


def test_exp(isa, rng):
    """Within 1.1 ulp (scalar: half of one), 0 below -87, exactly 1 at 0, NaN for NaN."""
    x = np.concatenate(
        [-(2.0 ** rng.uniform(-30, np.log2(87), 1 << 20)), np.linspace(-87, 0, 1 << 20), [0.0, -0.0, -87.0]]
    )
    x = x.astype(np.float32)
    y = np.empty_like(x)
    lib.nl_exp(ffi.from_buffer("float[]", y), ffi.from_buffer("float[]", x), len(x))
    exact = np.exp(x.astype(np.float64))
    assert np.max(np.abs(y - exact) / np.spacing(exact.astype(np.float32))) <= (
        0.5001 if isa == "scalar" else 1.1
    )
    assert (y[x == 0] == 1).all()
    special = np.array([np.nan, -np.inf, -87.1, -1e30], np.float32)
    y = np.empty_like(special)
    lib.nl_exp(ffi.from_buffer("float[]", y), ffi.from_buffer("float[]", special), len(special))
    assert np.isnan(y[0]) and (y[1:] == 0).all()


@pytest.mark.parametrize("dtype, code", [(np.float32, "F32"), (np.float16, "F16"), (np.uint8, "Q8_0")])
@pytest.mark.parametrize("at_end", [True, False])
def test_attention_touches_nothing_beside_its_arrays(isa, dtype, code, at_end, rng):
    for T, S, K, n_rep, Dh in [
        (1, 1, 1, 1, 1),
        (3, 7, 1, 2, 5),
        (17, 80, 2, 3, 12),
        (2, 66, 1, 4, 64),
        (5, 65, 1, 1, 9),
        (1, SPAN + 3, 1, 2, 32),
        (90, 90, 1, 3, 20),
    ]:
        guarded = Guarded()
        q, k, v = (guarded.copy(a, at_end) for a in draw_attention(rng, 1, T, S, K, n_rep, Dh, dtype))
        out = guarded.copy(np.full_like(q, np.nan), at_end)
        Dh = q.shape[-1]
        strides = [S * K * Dh, K * Dh, Dh]
        pointers = (ffi.cast("void *", a.ctypes.data) for a in (out, q, k, v))
        sizes = FORMATS[code].code, 1, T, S, K * n_rep, K, Dh
        arguments = ffi.new("nl_attention_args *", [*pointers, *sizes, strides, strides, 0, T])
        failed = lib.nl_attention(arguments, 2)
        assert failed == 0
        np.testing.assert_array_equal(bits(out), bits(c_attention(1, q, k, v)))


@pytest.mark.parametrize("at_end", [True, False])
def test_exp_touches_nothing_beside_its_arrays(isa, at_end, rng):
    for n in range(40):
        guarded, plain = Guarded(), -rng.random(n, np.float32)
        x, y = guarded.copy(plain, at_end), guarded.copy(np.full_like(plain, np.nan), at_end)
        lib.nl_exp(ffi.cast("float *", y.ctypes.data), ffi.cast("float *", x.ctypes.data), n)
        np.testing.assert_allclose(y, np.exp(plain), 1e-6)


# ---------------------------------------------------------------- a cache of float16, or of Q8_0


@pytest.mark.parametrize("T", [1, GEMV_TOKENS + 1])
def test_every_scale_and_every_byte_is_read_rightly(isa, T):
    """As above: the 63,488 finite scales, with all bytes among the numbers of the 8 blocks of a head."""
    d = np.arange(1 << 16, dtype=np.uint16)
    d = d[np.isfinite(d.view(np.float16))].reshape(1, 1, 248, 8 * 32)
    blocks = np.empty((1, 1, 248, 256, 34), np.uint8)
    blocks[..., :2] = d[..., None].view(np.uint8)
    blocks[..., 2:] = np.arange(256, dtype=np.uint8).reshape(8, 32)[np.arange(256) % 8]
    v = np.repeat(blocks.reshape(1, 1, 248 * 32, 8 * 34), T, axis=1)
    q = np.zeros((1, T, 248 * 32, 256), np.float32)
    got = c_attention(2, q, np.zeros_like(v), v)
    np.testing.assert_array_equal(got[:, 0], in_float64(v[:, 0]).astype(np.float32))


@pytest.mark.parametrize("T", [1, GEMV_TOKENS + 1])
def test_every_half_is_read_rightly(isa, T):
    """The first query sees one position, whose value it gets; all 65,536 of them, in heads of 256."""
    v = np.repeat(np.arange(1 << 16, dtype=np.uint16).view(np.float16).reshape(1, 1, 256, 256), T, axis=1)
    k = np.zeros_like(v)
    got = Kernels(2).attention(k.astype(np.float32), k, v)
    with np.errstate(invalid="ignore"):  # ARM reports that a signaling NaN becomes a quiet one
        wanted = v[0, 0].astype(np.float32)
    np.testing.assert_array_equal(got[0, 0], wanted)


def test_a_cache_of_float16_holds_what_was_rounded(rng):
    cache = KVCache(TINY, 1, 7, np.float16)
    xk, xv = rng.standard_normal((2, 1, 5, TINY.n_kv_heads, TINY.head_dim), dtype=np.float32)
    cache.update(0, 0, xk[:, :4], xv[:, :4])
    keys, values = cache.update(0, 4, xk[:, 4:], xv[:, 4:])
    np.testing.assert_array_equal(keys, xk.astype(np.float16))
    np.testing.assert_array_equal(values, xv.astype(np.float16))


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("large", [65520.0, -7e4, 1e38])
def test_what_float16_cannot_hold_is_refused(rng, which, large):
    """Not stored as an infinity, whose score of minus infinity would silently count nothing."""
    new = rng.standard_normal((2, 1, 3, TINY.n_kv_heads, TINY.head_dim), dtype=np.float32)
    cache = KVCache(TINY, 1, 7, np.float16)
    new[which, 0, 1, 0, 0] = 65519  # is rounded to 65504
    cache.update(1, 0, *new)
    new[which, 0, 1, 0, 0] = large
    with pytest.raises(NumericsError, match=r"layer 1, positions 3\.\.5: a key or value.* beyond 65504"):
        cache.update(1, 3, *new)
    with pytest.raises(NumericsError):
        cache.update(1, 1, *new)
    assert cache.filled[1] == 1  # what lay behind may be half overwritten
    KVCache(TINY, 1, 7, np.float32).update(1, 0, *new)


def test_a_model_gets_the_dtype_of_its_cache(rng):
    """The C twin reads the same rounded numbers as NumPy, and they are not those of float32."""
    weights, tokens = random_weights(rng, TINY, np.float32), random_tokens(rng, TINY, 2, 9)
    assert Transformer(TINY, weights).new_cache().k.dtype == np.float32
    small = [
        Transformer(TINY, weights, attention=attention, cache_dtype=np.float16)
        for attention in (F.attention, Kernels(1).attention)
    ]
    assert small[0].new_cache().k.dtype == np.float16
    expected = small[0](tokens)
    assert_near(small[1](tokens), expected, MODEL_32)
    assert np.abs(Transformer(TINY, weights)(tokens) - expected).max() > MODEL_32 * np.abs(expected).max()


# --- sliding windows --------------------------------------------------------------------------------------

windows = st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(120, 140), st.just(SPAN))


@for_each
@given(
    shape=shapes,
    older=st.one_of(older, st.sampled_from([300, SPAN - 9, 2 * SPAN + 5])),
    window=windows,
    dtype=st.sampled_from(CACHED),
    threads=st.integers(1, 3),
    seed=seeds,
)
@example({"B": 1, "T": 1, "K": 2, "n_rep": 2, "Dh": 64}, 3 * SPAN, SPAN, np.float16, 2, 0)  # decode
@example({"B": 1, "T": 20, "K": 1, "n_rep": 5, "Dh": 33}, 2 * SPAN - 9, 120, np.float32, 2, 0)
def test_a_window_hides_what_is_before_it(isa, shape, older, window, dtype, threads, seed):
    """As in NumPy. No number before the first query's window is read, and a later query reads no more."""
    rng = np.random.default_rng(seed)
    T, S = shape["T"], shape["T"] + older
    q, k, v = draw_attention(rng, S=S, dtype=dtype, **shape)
    expected = F.attention(*map(in_float64, (q, k, v)), window)
    whole = c_attention(threads, q, in_cache_layout(k), in_cache_layout(v), window)
    assert_within(whole, expected, attention_bound(q, k, v))
    t = int(rng.integers(0, T))
    hidden = max(older + t + 1 - window, 0)  # from query t
    k[:, :hidden], v[:, :hidden] = (255, 255) if dtype == np.uint8 else (np.nan, np.nan)
    np.testing.assert_array_equal(bits(c_attention(1, q, k, v, window)[:, t:]), bits(whole[:, t:]))


@for_each
@given(
    T=st.one_of(st.integers(1, 8), st.sampled_from([20, 130])),
    n_rep=st.integers(1, 4),
    window=st.sampled_from([1, 100, 128, 900, SPAN + 30]),
    blocks=st.integers(0, 20),
    beside=st.integers(0, 140),
    Dh=st.sampled_from([5, 32, 96]),
    dtype=st.sampled_from(CACHED),
    seed=seeds,
)
def test_dropped_positions_change_no_bit(isa, T, n_rep, window, blocks, beside, Dh, dtype, seed):
    """Whole blocks that no query sees need not be there: their places are never read."""
    rng = np.random.default_rng(seed)
    dropped = blocks * 128
    q, k, v = draw_attention(rng, 1, T, dropped + window - 1 + T + beside, 1, n_rep, Dh, dtype)
    whole = c_attention(1, q, k, v, window)
    guarded = Guarded()
    kept = [guarded.copy(x[:, dropped:], at_end=False) for x in (k, v)]
    for threads in (1, 2):
        found = c_attention(threads, q, *kept, window, dropped)
        np.testing.assert_array_equal(bits(found), bits(whole))
    for t in rng.integers(0, T, 2):
        if T <= GEMV_TOKENS or beside_it(dtype) <= t:
            first = 0 if T <= GEMV_TOKENS else t - beside_it(dtype)
            cut = k.shape[1] - T + t + 1
            some = c_attention(1, q[:, first : t + 1], k[:, :cut], v[:, :cut], window)
            np.testing.assert_array_equal(bits(some[:, -1]), bits(whole[:, t]))


@for_each
@given(
    T=st.one_of(st.integers(1, 8), st.sampled_from([20, 130])),
    window=st.sampled_from([1, 100, 900]),
    dropped=st.integers(0, 1500),
    dtype=st.sampled_from(CACHED),
    seed=seeds,
)
def test_positions_that_were_dropped_are_never_read(isa, T, window, dropped, dtype, seed):
    """Nor are they where the first stored position does not begin a block."""
    q, k, v = draw_attention(np.random.default_rng(seed), 1, T, dropped + window - 1 + T, 1, 2, 32, dtype)
    whole, guarded = c_attention(1, q, k, v, window), Guarded()
    kept = [guarded.copy(x[:, dropped:], at_end=False) for x in (k, v)]
    np.testing.assert_allclose(c_attention(1, q, *kept, window, dropped), whole, rtol=0, atol=1e-5)


def test_a_window_gives_the_same_bits_in_short_calls(isa, rng, monkeypatch):
    q, k, v = draw_attention(rng, B=2, T=23, S=70, K=2, n_rep=3, Dh=16)
    whole = Kernels(2).attention(q, k, v, 9)
    monkeypatch.setattr(kernels, "ATTENTION_WORK", 1)
    monkeypatch.setattr(kernels, "ATTENTION_ROWS", 3)
    monkeypatch.setattr(kernels, "WORK_PER_CALL", 1)
    np.testing.assert_array_equal(bits(Kernels(2).attention(q, k, v, 9)), bits(whole))


@pytest.mark.parametrize("window", [0, -1, 2.5, "9"])
def test_a_window_is_a_whole_number_from_1_on(rng, window):
    with pytest.raises(ParameterError, match=r"window is .*, it must be a whole number from 1"):
        Kernels(1).attention(*draw_attention(rng, 1, 1, 4, 1, 1, 8), window)
