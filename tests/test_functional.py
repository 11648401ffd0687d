"""The mathematics, function by function: its laws in float64, its rounding in float32, and PyTorch's word.

Each oracle is the same expression written in PyTorch, so that the reader sees both.
"""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as tF
from hypothesis import given
from hypothesis import strategies as st
from tolerances import EXACT_64, EXP_32, U32, U64, assert_near, assert_within, g
from torch_llama import rotary_table, scaled_freq

from numpy_llama import functional as F
from numpy_llama.config import ModelArgs, RopeScaling
from numpy_llama.errors import ParameterError

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
sizes = st.integers(1, 40)
even_sizes = st.integers(1, 32).map(lambda half: 2 * half)
scalings = st.sampled_from([RopeScaling(8.0), RopeScaling(32.0), RopeScaling(4.0, 0.5, 3.0, 1024)])


def t(x):
    return torch.from_numpy(np.ascontiguousarray(x))


def normal(rng, *shape, dtype=np.float64):
    return rng.normal(size=shape).astype(dtype)


# --- embedding and linear ---------------------------------------------------------------------------------


@given(seeds, sizes, sizes, sizes)
def test_embedding_picks_rows_as_torch(rng, V, D, T):
    weight, tokens = normal(rng, V, D, dtype=np.float32), rng.integers(V, size=(2, T))
    np.testing.assert_array_equal(F.embedding(tokens, weight), tF.embedding(t(tokens), t(weight)))


@pytest.mark.parametrize("bad", [-1, 5, -(2**40), 2**40])
def test_embedding_refuses_ids_outside_the_table(rng, bad):
    weight = normal(rng, 5, 3)
    with pytest.raises(ParameterError, match=r"must lie in 0\.\.4"):
        F.embedding(np.array([[0, bad, 4]]), weight)
    assert F.embedding(np.array([[0, 4]]), weight).shape == (1, 2, 3)
    assert F.embedding(np.zeros((1, 0), int), weight).shape == (1, 0, 3)


@given(seeds, sizes, st.integers(1, 300), sizes)
def test_linear_as_torch(rng, rows, IN, OUT):
    x, w = normal(rng, 2, rows, IN), normal(rng, OUT, IN)
    assert_near(F.linear(x, w), tF.linear(t(x), t(w)), EXACT_64)
    x, w = x.astype(np.float32), w.astype(np.float32)
    exact = x.astype(np.float64) @ w.T.astype(np.float64)
    assert_within(F.linear(x, w), exact, g(IN) * (np.abs(x).astype(np.float64) @ np.abs(w).T))


@given(seeds, sizes, st.integers(1, 300))
def test_linear_of_small_whole_numbers_is_exact(rng, OUT, IN):
    x = rng.integers(-8, 9, (3, IN))
    w = rng.integers(-8, 9, (OUT, IN))
    actual = F.linear(x.astype(np.float32) / 4, w.astype(np.float32) * 2)
    np.testing.assert_array_equal(actual, x @ w.T / 2)


# --- rms_norm ---------------------------------------------------------------------------------------------

eps_values = st.sampled_from([1e-6, 1e-5, 1e-1, 10.0])  # large ones too: eps must stand inside the root


@given(seeds, sizes, eps_values, st.floats(-3, 3))
def test_rms_norm_as_torch(rng, D, eps, magnitude):
    x, weight = normal(rng, 2, 3, D) * 10**magnitude, rng.uniform(0.5, 1.5, D)
    assert_within(
        F.rms_norm(x, weight, eps),
        tF.rms_norm(t(x), (D,), t(weight), eps),
        EXACT_64 * np.abs(F.rms_norm(x, weight, eps)),
    )
    x, weight = x.astype(np.float32), weight.astype(np.float32)
    exact = F.rms_norm(x.astype(np.float64), weight.astype(np.float64), eps)
    actual = F.rms_norm(x, weight, eps)
    assert actual.dtype == np.float32
    # The sum of squares errs by (D + 3) u, halved by the root; root, quotient, product and eps: 8 u.
    assert_within(actual, exact, (D + 8) * U32 * np.abs(exact))


@given(seeds, sizes, st.integers(-20, 20))
def test_rms_norm_laws(rng, D, k):
    x, weight = normal(rng, 4, D, dtype=np.float32), rng.uniform(0.5, 1.5, D).astype(np.float32)
    y, perm = F.rms_norm(x, weight, 1e-5), rng.permutation(4)
    np.testing.assert_array_equal(F.rms_norm(x * 2.0**k, weight, 0.0), F.rms_norm(x, weight, 0.0))
    np.testing.assert_array_equal(F.rms_norm(-x, weight, 1e-5), -y)
    np.testing.assert_array_equal(F.rms_norm(x[perm], weight, 1e-5), y[perm])
    np.testing.assert_array_equal(F.rms_norm(0 * x, weight, 1e-5), 0 * x)
    x64 = x.astype(np.float64)
    unit = F.rms_norm(x64, np.full(D, 2.0), 0.0)
    np.testing.assert_allclose(np.mean(unit**2, -1), 4, rtol=EXACT_64)
    permuted = rng.permutation(D)
    np.testing.assert_allclose(
        F.rms_norm(x64[:, permuted], weight[permuted], 1e-5),
        F.rms_norm(x64, weight, 1e-5)[:, permuted],
        rtol=EXACT_64,
    )


@pytest.mark.parametrize("size", [1e20, 1e-30])
def test_rms_norm_beyond_the_range_of_a_square_as_torch(size):
    x, weight = np.float32([size, -size, size / 2]), np.float32([0.5, 2, 3])
    with np.errstate(over="ignore"):
        actual = F.rms_norm(x, weight, 1e-5)
    assert_within(actual, tF.rms_norm(t(x), (3,), t(weight), 1e-5), 8 * U32 * np.abs(actual))


# --- softmax ----------------------------------------------------------------------------------------------


@given(seeds, sizes, st.floats(0, 50))
def test_softmax_as_torch(rng, n, scale):
    x = normal(rng, 2, 3, n) * scale
    np.testing.assert_allclose(F.softmax(x), torch.softmax(t(x), -1), rtol=EXACT_64)
    np.testing.assert_allclose(F.softmax(x).sum(-1), 1, rtol=EXACT_64)
    x = x.astype(np.float32)
    exact, below = F.softmax(x.astype(np.float64)), x.max(-1, keepdims=True) - x
    # x - max is rounded, and exp multiplies that error by |x - max|; the sum has n terms.
    assert_within(F.softmax(x), exact, (below + n + 8) * U32 * exact + np.finfo(np.float32).tiny)
    assert_within(F.softmax(x).sum(-1), np.ones((2, 3)), (2 * n + 8) * U32)


@given(seeds, sizes, st.integers(-1000, 1000))
def test_softmax_laws(rng, n, shift):
    x = rng.integers(-400, 400, n).astype(np.float32) / 16  # a grid on which shifting is exact
    p = F.softmax(x)
    np.testing.assert_array_equal(F.softmax(x + np.float32(shift)), p)
    assert (np.diff(p[np.argsort(x)]) >= 0).all()
    perm = rng.permutation(n)
    np.testing.assert_allclose(F.softmax(x[perm].astype(np.float64)), F.softmax(x.astype(np.float64))[perm])
    np.testing.assert_array_equal(F.softmax(np.append(x, np.float32(-np.inf))) > 0, np.append(p > 0, False))


def test_softmax_at_the_ends():
    largest = np.finfo(np.float32).max
    np.testing.assert_array_equal(F.softmax(np.float32([0, 1000, -1000])), [0, 1, 0])
    np.testing.assert_array_equal(F.softmax(np.float32([largest, 0, largest])), [0.5, 0, 0.5])
    np.testing.assert_array_equal(F.softmax(np.float32([-np.inf, 3, -np.inf, 3])), [0, 0.5, 0, 0.5])


# --- silu and swiglu --------------------------------------------------------------------------------------


@given(seeds, st.floats(-2, 2))
def test_silu_as_torch(rng, magnitude):
    x = normal(rng, 100) * 10**magnitude
    np.testing.assert_allclose(F.silu(x), tF.silu(t(x)), rtol=EXACT_64, atol=0)
    x = x.astype(np.float32)
    exact = F.silu(x.astype(np.float64))
    # exp, 1 + exp, quotient. Below -88 exp(-x) is infinite and the result 0, not a subnormal.
    assert_within(F.silu(x), exact, (EXP_32 + 2 * U32) * np.abs(exact) + 100 * np.finfo(np.float32).tiny)


@pytest.mark.filterwarnings("error")
def test_silu_at_the_ends():
    x = np.float32([-np.inf, -3e38, -1e4, -104, -88.8, -0.0, 0, 88.8, 1e4, 3e38, np.inf, np.nan])
    y = F.silu(x[1:])
    np.testing.assert_array_equal(y[:3], [-0.0, -0.0, -0.0])
    assert np.signbit(y[:5]).all() and not np.signbit(y[5:10]).any()
    np.testing.assert_array_equal(y[6:], x[7:])
    rising = F.silu(np.linspace(-1.27, 20, 1000))
    assert (np.diff(rising) > 0).all()


@given(seeds, sizes)
def test_swiglu_as_torch(rng, n):
    gate, up = normal(rng, 3, n), normal(rng, 3, n)
    np.testing.assert_allclose(F.swiglu(gate, up), tF.silu(t(gate)) * t(up), rtol=EXACT_64)


# --- RoPE: the table --------------------------------------------------------------------------------------


def rope_args(head_dim, theta, scaling=None):
    return ModelArgs(8, 1, 1, 1, head_dim, 8, 8, 1e-5, theta, 8, scaling)


@given(even_sizes, st.sampled_from([1e4, 1e5, 5e5]), st.none() | scalings, st.integers(1, 300))
def test_freqs_cis_as_torch(head_dim, theta, scaling, end):
    args = rope_args(head_dim, theta, scaling)
    actual = F.precompute_freqs_cis(head_dim, end, theta, scaling, np.float64)
    assert actual.shape == (end, head_dim // 2) and actual.dtype == np.complex128
    # The angle is up to `end` radians, so its own rounding counts that many times.
    assert_within(actual, rotary_table(args, end, torch.float64), (end + 8) * 8 * U64)

    actual = F.precompute_freqs_cis(head_dim, end, theta, scaling)
    assert actual.dtype == np.complex64
    assert_within(actual, rotary_table(args, end, torch.float32), (end + 8) * 8 * U32)
    np.testing.assert_array_equal(actual[0], 1)
    np.testing.assert_allclose(np.abs(actual), 1, rtol=4 * U32)


@pytest.mark.parametrize("head_dim", [2, 64, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_inverse_frequencies_as_torch(head_dim, theta):
    """Each within an ulp (2 u) of PyTorch's; read off position 1, whose cosine and sine are rounded too."""
    angles = np.angle(F.precompute_freqs_cis(head_dim, 2, theta)[1].astype(np.complex128))
    torch_freqs = 1.0 / (theta ** (torch.arange(0, head_dim, 2).float() / head_dim))
    assert_within(angles, torch_freqs, (2 + 2) * U32 * np.abs(angles))


@given(scalings, st.floats(-6, 0))
def test_scaled_frequencies_as_published(scaling, magnitude):
    freq = 10**magnitude
    expected = scaled_freq(freq, scaling)
    np.testing.assert_allclose(F.scale_freqs(np.array([freq]), scaling)[0], expected, rtol=EXACT_64)
    assert_within(F.scale_freqs(np.float32([freq]), scaling)[0], expected, 16 * U32 * freq)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_frequencies_at_the_limits(factor):
    """At a limit both branches say the same: the rule is continuous, and just beside it changes by little."""
    s = RopeScaling(factor)
    slow, fast = 2 * math.pi * s.low_freq_factor / 8192, 2 * math.pi * s.high_freq_factor / 8192
    actual = F.scale_freqs(np.array([slow / 2, slow, fast, fast * 2]), s)
    np.testing.assert_allclose(actual, [slow / 2 / factor, slow / factor, fast, 2 * fast], rtol=EXACT_64)
    middle = (slow + fast) / 2
    np.testing.assert_allclose(
        F.scale_freqs(np.array([middle]), s), [middle * (1 + 1 / factor) / 2], rtol=EXACT_64
    )
    around = np.array([slow, fast])[:, None] * (1 + np.array([-1e-9, 0, 1e-9]))
    np.testing.assert_allclose(
        F.scale_freqs(around, s), np.vectorize(lambda f: scaled_freq(f, s))(around), rtol=EXACT_64
    )


# --- RoPE: the turn ---------------------------------------------------------------------------------------


@given(seeds, even_sizes, sizes, st.integers(1, 4))
def test_apply_rotary_emb_as_torch(rng, head_dim, T, H):
    x, angles = normal(rng, 2, T, H, head_dim), rng.uniform(-100, 100, (T, head_dim // 2))
    torch_cis = torch.polar(torch.ones(angles.shape, dtype=torch.float64), t(angles))
    pairs = torch.view_as_complex(t(x).reshape(2, T, H, head_dim // 2, 2))
    expected = torch.view_as_real(pairs * torch_cis[:, None, :]).flatten(3)
    freqs_cis = np.exp(1j * angles)
    assert_within(F.apply_rotary_emb(x, freqs_cis), expected, EXACT_64)

    x32, cis32 = x.astype(np.float32), freqs_cis.astype(np.complex64)
    exact = F.apply_rotary_emb(x32.astype(np.float64), cis32.astype(np.complex128))
    length = np.abs(x32.astype(np.float64).view(np.complex128)).repeat(2, axis=-1)
    actual = F.apply_rotary_emb(x32, cis32)
    assert actual.dtype == np.float32
    assert_within(actual, exact, 4 * U32 * length)


@given(seeds, even_sizes, st.integers(0, 2000), st.integers(0, 2000))
def test_rotations_add_up_and_keep_lengths(rng, head_dim, m, n):
    freqs_cis = F.precompute_freqs_cis(head_dim, m + n + 1, 1e4, None, np.float64)
    x = normal(rng, 1, 1, 2, head_dim)

    def turn(x, position):
        return F.apply_rotary_emb(x, freqs_cis[position : position + 1])

    np.testing.assert_array_equal(turn(x, 0), x)
    assert_within(turn(turn(x, m), n), turn(x, m + n), EXACT_64 * 10 * np.abs(x).max())
    pairs = np.abs(x.view(np.complex128))
    np.testing.assert_allclose(np.abs(turn(x, m).view(np.complex128)), pairs, rtol=EXACT_64)


@given(seeds, even_sizes, st.integers(0, 60), st.integers(0, 60), st.integers(0, 60))
def test_scores_depend_on_the_distance_alone(rng, head_dim, m, n, moved):
    freqs_cis = F.precompute_freqs_cis(head_dim, 121, 5e5, RopeScaling(8.0), np.float64)
    q, k = normal(rng, 1, 1, 1, head_dim), normal(rng, 1, 1, 1, head_dim)

    def score(m, n):
        return np.sum(F.apply_rotary_emb(q, freqs_cis[[m]]) * F.apply_rotary_emb(k, freqs_cis[[n]]))

    bound = EXACT_64 * np.linalg.norm(q) * np.linalg.norm(k)
    assert_within(score(m + moved, n + moved), score(m, n), bound)


# --- attention --------------------------------------------------------------------------------------------


@given(st.integers(1, 12), st.integers(0, 12))
def test_causal_mask(T, cached):
    S = T + cached
    visible = torch.ones(T, S, dtype=torch.bool).tril(diagonal=S - T)
    mask = F.causal_mask(T, S)
    np.testing.assert_array_equal(mask, torch.zeros(T, S).masked_fill(~visible, -torch.inf))
    assert mask.dtype == np.float32 and F.causal_mask(T, S, np.float64).dtype == np.float64


def test_causal_mask_of_the_docstring():
    np.testing.assert_array_equal(F.causal_mask(2, 5), [[0, 0, 0, 0, -np.inf], [0, 0, 0, 0, 0]])


@given(seeds, st.integers(1, 4), st.integers(1, 4))
def test_repeat_kv_as_torch(rng, K, n_rep):
    x = normal(rng, 2, 3, K, 4)
    np.testing.assert_array_equal(F.repeat_kv(x, n_rep), t(x).repeat_interleave(n_rep, dim=2))


@st.composite
def qkv(draw, dtype=np.float64, **fixed):
    """Random q (B, T, H, Dh) and k, v (B, S, K, Dh)."""
    rng = draw(seeds)
    B, T, K, n_rep = (draw(st.integers(1, high)) for high in (2, 7, 3, 3))
    T = fixed.get("T", T)
    S = T + fixed.get("cached", draw(st.integers(0, 9)))
    Dh = draw(even_sizes)
    q = normal(rng, B, T, K * n_rep, Dh, dtype=dtype)
    return q, normal(rng, B, S, K, Dh, dtype=dtype), normal(rng, B, S, K, Dh, dtype=dtype)


def torch_attention(q, k, v, **mask):
    q, k, v = (t(x).transpose(1, 2) for x in (q, k, v))
    return tF.scaled_dot_product_attention(q, k, v, **mask, enable_gqa=True).transpose(1, 2)


@given(qkv())
def test_attention_as_torch_with_a_mask(arrays):
    q, k, v = arrays
    T, S = q.shape[1], k.shape[1]
    mask = torch.ones(T, S, dtype=torch.bool).tril(diagonal=S - T)
    assert_within(F.attention(q, k, v), torch_attention(q, k, v, attn_mask=mask), EXACT_64)


@given(qkv(cached=0))
def test_attention_as_torch_is_causal(arrays):
    assert_within(F.attention(*arrays), torch_attention(*arrays, is_causal=True), EXACT_64)


@given(qkv(np.float32))
def test_attention_in_float32(arrays):
    q, k, v = arrays
    exact = F.attention(*(x.astype(np.float64) for x in arrays))
    actual = F.attention(q, k, v)
    assert actual.dtype == np.float32 and actual.shape == q.shape
    # A score errs by g |q| |k| / sqrt(Dh); softmax doubles that relatively; v is averaged over S positions.
    Dh, S = q.shape[-1], k.shape[1]
    largest = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / math.sqrt(Dh)
    bound = (2 * (g(Dh) + 4 * U32) * largest + 2 * g(S) + 8 * U32) * np.abs(v).max()
    assert_within(actual, exact, bound)


@given(qkv(), st.data())
def test_the_future_does_not_matter(arrays, data):
    q, k, v = arrays
    T, S = q.shape[1], k.shape[1]
    query = data.draw(st.integers(0, T - 1))
    future = S - T + query + 1
    k2, v2 = k.copy(), v.copy()
    k2[:, future:], v2[:, future:] = 99, -1e9
    np.testing.assert_array_equal(
        F.attention(q, k2, v2)[:, : query + 1], F.attention(q, k, v)[:, : query + 1]
    )
    # ... and the present does: the last position that the query may see changes what it gathers.
    v2 = v.copy()
    v2[:, future - 1] += 1
    assert (F.attention(q, k, v2)[:, query] > F.attention(q, k, v)[:, query]).all()


@given(qkv())
def test_attention_laws(arrays):
    q, k, v = arrays
    H, K = q.shape[2], k.shape[2]
    out = F.attention(q, k, v)

    as_mha = F.attention(q, np.repeat(k, H // K, axis=2), np.repeat(v, H // K, axis=2))
    np.testing.assert_array_equal(out, as_mha)

    by_head = [F.attention(q[:, :, [h]], k[:, :, [h * K // H]], v[:, :, [h * K // H]]) for h in range(H)]
    assert_within(np.concatenate(by_head, axis=2), out, EXACT_64)

    last = F.repeat_kv(v, H // K)  # what the last query sees: all of it
    assert (out[:, -1] <= last.max(axis=1) + EXACT_64).all()
    assert (out[:, -1] >= last.min(axis=1) - EXACT_64).all()

    equal_keys = F.attention(q, np.broadcast_to(k[:, :1], k.shape), v)
    assert_within(equal_keys[:, -1], last.mean(axis=1), EXACT_64)

    batch = F.attention(q[::-1], k[::-1], v[::-1])[::-1]
    np.testing.assert_array_equal(batch, out)


@given(qkv(), st.data())
def test_permuting_heads_permutes_the_result(arrays, data):
    q, k, v = arrays
    B, T, H, Dh = q.shape
    K = k.shape[2]
    perm = data.draw(st.permutations(range(K)))
    groups = q.reshape(B, T, K, H // K, Dh)[:, :, perm].reshape(q.shape)
    expected = F.attention(q, k, v).reshape(B, T, K, H // K, Dh)[:, :, perm].reshape(q.shape)
    np.testing.assert_array_equal(F.attention(groups, k[:, :, perm], v[:, :, perm]), expected)


@given(qkv(cached=0, T=1))
def test_the_first_token_sees_itself_alone(arrays):
    q, k, v = arrays
    np.testing.assert_array_equal(F.attention(q, k, v), np.repeat(v, q.shape[2] // k.shape[2], axis=2))


@given(qkv(T=1))
def test_one_query_at_a_time_is_all_at_once(arrays):
    """Decoding: the last row of the whole equals a single query over the same keys."""
    _, k, v = arrays
    whole = F.attention(k, k, v)
    for i in range(k.shape[1]):
        one = F.attention(k[:, [i]], k[:, : i + 1], v[:, : i + 1])
        assert_within(one[:, 0], whole[:, i], EXACT_64)


@given(qkv(np.float32))
def test_attention_takes_a_half_precision_cache(arrays):
    q, k, v = arrays
    k, v = k.astype(np.float16), v.astype(np.float16)
    actual = F.attention(q, k, v)
    assert actual.dtype == np.float32
    np.testing.assert_array_equal(actual, F.attention(q, k.astype(np.float32), v.astype(np.float32)))


@given(qkv())
def test_attention_takes_strided_views(arrays):
    """The cache hands out views with the heads before the positions."""
    q, k, v = arrays
    k2, v2 = (np.ascontiguousarray(x.swapaxes(1, 2)).swapaxes(1, 2) for x in (k, v))
    np.testing.assert_array_equal(F.attention(q, k2, v2), F.attention(q, k, v))
