"""RoPE: pairs of numbers turned by an angle that grows with the position (Su et al. 2021), and its scalings.
Complex numbers of (x_2j, x_2j+1), Meta's layout."""

import cmath
import math

import numpy as np
import pytest
from hypothesis import strategies as st

from ..checkpoint.names import interleaved_rows
from ..functional import rope_freqs
from ..rope import (
    DynamicScaling,
    ExplicitScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
)
from . import torch_ops
from .bounds import EXACT_64, U32, U64, assert_same, assert_within
from .laws import assert_refused, assert_that, even_sizes, law, small_sizes, sources
from .tiny import every_scaling

thetas = st.sampled_from([1e4, 1e5, 5e5])
ORIGINAL = 64  # positions, before any scaling
kinds = st.sampled_from(range(len(every_scaling(2, ORIGINAL))))
factors = st.sampled_from([2.0, 4.0, 8.0, 32.0])
wide_heads = st.integers(4, 32).map(lambda half: 2 * half)  # so that a ramp has an inside
positions = st.integers(0, 2000)


def table(ops, head_dim, end, theta=1e4, scaling=None):
    return ops.precompute_freqs_cis(head_dim, end, theta, scaling, np.float64)


def scaling_of(kind, head_dim):
    return None if kind is None else every_scaling(head_dim, ORIGINAL)[kind]


def length_of(scaling):
    return 1.0 if scaling is None else scaling.length_factor


def divided_by(ops, scaling, head_dim, theta=1e4, context=ORIGINAL):
    """What each theta_j was divided by, read off the turn of position 1."""
    turn = table(ops, head_dim, context, theta, scaling)[1]
    return rope_freqs(head_dim, theta) / np.angle(turn)


# --- the table --------------------------------------------------------------------------------------------


@law("precompute_freqs_cis", even_sizes, thetas, st.integers(1, 50))
def test_the_formula(ops, head_dim, theta, end):
    """Entry (m, j) is e^(i m theta^(-2j / head_dim))."""
    m, j = end - 1, head_dim // 2 - 1
    expected = cmath.exp(1j * m * theta ** (-2 * j / head_dim))
    actual = table(ops, head_dim, end, theta)
    assert_that(actual.shape == (end, head_dim // 2), f"(end, head_dim / 2) wanted, {actual.shape} made")
    assert_within(actual[m, j], expected, (end + 8) * 8 * U64)


@law("precompute_freqs_cis", even_sizes, thetas, st.none() | kinds, st.integers(1, 300))
def test_as_pytorch(ops, head_dim, theta, kind, end):
    """The table is that of torch.polar. An angle is up to 2 `end` radians, and is rounded in proportion."""
    scaling = scaling_of(kind, head_dim)
    expected = torch_ops.precompute_freqs_cis(head_dim, end, theta, scaling, np.float64)
    assert_within(table(ops, head_dim, end, theta, scaling), expected, (end + 8) * 16 * U64)


@law("precompute_freqs_cis", even_sizes, thetas, st.none() | kinds, st.integers(1, 300))
def test_the_table_in_float32(ops, head_dim, theta, kind, end):
    """In float32 it is complex64, and PyTorch's within the rounding of its angles."""
    scaling = scaling_of(kind, head_dim)
    actual = ops.precompute_freqs_cis(head_dim, end, theta, scaling)
    assert_that(actual.dtype == np.complex64, f"complex64 wanted, {actual.dtype} made")
    expected = torch_ops.precompute_freqs_cis(head_dim, end, theta, scaling)
    assert_within(actual, expected, (end + 8) * 16 * U32)


@law("precompute_freqs_cis", even_sizes, thetas, st.none() | kinds)
def test_nothing_turns_at_position_0(ops, head_dim, theta, kind):
    """r e^0 = r, exactly; without a scaling r is 1."""
    scaling = scaling_of(kind, head_dim)
    expected = np.full((1, head_dim // 2), length_of(scaling))
    assert_same(table(ops, head_dim, 1, theta, scaling), expected)


@law("precompute_freqs_cis", even_sizes, thetas, st.integers(1, 300), st.none() | kinds)
def test_turns_keep_lengths(ops, head_dim, theta, end, kind):
    """|r e^(i a)| = r at every position; without a scaling r is 1."""
    scaling = scaling_of(kind, head_dim)
    expected = np.full((end, head_dim // 2), length_of(scaling))
    assert_within(np.abs(table(ops, head_dim, end, theta, scaling)), expected, EXACT_64)


@law("precompute_freqs_cis", even_sizes, thetas, st.integers(2, 300))
def test_the_first_pair_turns_by_one_radian(ops, head_dim, theta, end):
    """theta^0 = 1: whatever theta is, pair 0 turns by m at position m."""
    m = np.arange(end)
    expected = np.cos(m) + 1j * np.sin(m)
    assert_within(table(ops, head_dim, end, theta)[:, 0], expected, (end + 8) * 8 * U64)


@law("precompute_freqs_cis", st.integers(2, 32), thetas)
def test_later_pairs_turn_slower(ops, half, theta):
    """Frequencies fall by the same factor from pair to pair."""
    freqs = np.angle(table(ops, 2 * half, 2, theta)[1])
    ratios = freqs[1:] / freqs[:-1]
    assert_within(ratios, np.full(half - 1, theta ** (-1 / half)), 1e-9)


@law("precompute_freqs_cis", even_sizes, thetas, st.integers(2, 200), st.none() | kinds)
def test_a_longer_table_begins_with_a_shorter_one(ops, head_dim, theta, end, kind):
    """A position's angles do not depend on the context, or only on which side of the original it lies."""
    scaling, longer = scaling_of(kind, head_dim), end
    if isinstance(scaling, DynamicScaling | LongRopeScaling):
        end = longer = min(end, ORIGINAL)
    shorter = table(ops, head_dim, end // 2, theta, scaling)
    assert_within(table(ops, head_dim, longer, theta, scaling)[: end // 2], shorter, (end + 8) * 16 * U64)


@law("precompute_freqs_cis", even_sizes, st.integers(1, 100), kinds)
def test_scaling_is_used(ops, head_dim, m, kind):
    """Position m is r e^(i m theta_j / d_j): the scaling says d_j and r, for this context."""
    scaling, freqs = scaling_of(kind, head_dim), rope_freqs(head_dim, 1e4)
    slowed = freqs / scaling.divisors(freqs, 1e4, m + 1)
    actual = table(ops, head_dim, m + 1, 1e4, scaling)[m]
    assert_within(actual, scaling.length_factor * np.exp(1j * m * slowed), (m + 8) * 16 * U64)


@pytest.mark.parametrize("theta", [1e4, 5e5])
@pytest.mark.parametrize("head_dim", [2, 64, 128])
@law("precompute_freqs_cis")
def test_inverse_frequencies_in_float32(ops, head_dim, theta):
    """Each within an ulp of PyTorch's; read off position 1, whose cosine and sine are rounded too."""
    angles = np.angle(ops.precompute_freqs_cis(head_dim, 2, theta)[1].astype(np.complex128))
    expected = np.angle(torch_ops.precompute_freqs_cis(head_dim, 2, theta)[1].astype(np.complex128))
    assert_within(angles, expected, (2 + 2) * U32 * np.abs(expected))


@pytest.mark.parametrize("theta", [1e4, 5e5])
@law("precompute_freqs_cis")
def test_far_positions_in_float32(ops, theta):
    """At position 131,071 too an angle errs by no more than some u of itself: 8 (m theta_j + 1) u."""
    far = [4095, 8191, 131071]
    actual = ops.precompute_freqs_cis(8, 131072, theta)[far]
    angles = np.outer(far, theta ** (-np.arange(0, 8, 2) / 8))
    assert_within(actual, np.exp(1j * angles), 8 * (angles + 1) * U32)


# --- the scalings -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "llama3", "yarn", "longrope", "explicit", "dynamic"])
@law("precompute_freqs_cis", even_sizes, thetas)
def test_a_factor_of_1_changes_nothing(ops, kind, head_dim, theta):
    """By 1 nothing is divided. A dynamic scaling changes nothing up to the original context."""
    ones = (1.0,) * (head_dim // 2)
    scaling = {
        "linear": LinearScaling(1.0),
        "llama3": Llama3Scaling(1.0, original_max_seq_len=ORIGINAL),
        "yarn": YarnScaling(1.0, ORIGINAL, 1.0),
        "longrope": LongRopeScaling(ones, ones, ORIGINAL, 1.0),
        "explicit": ExplicitScaling(ones),
        "dynamic": DynamicScaling(8.0, 2 * ORIGINAL),
    }[kind]
    plain = table(ops, head_dim, 2 * ORIGINAL, theta)
    assert_within(table(ops, head_dim, 2 * ORIGINAL, theta, scaling), plain, (2 * ORIGINAL + 8) * 8 * U64)


@law("precompute_freqs_cis", even_sizes, thetas, st.integers(0, 5), st.integers(2, 300))
def test_scaling_keeps_the_order(ops, head_dim, theta, kind, context):
    """No pair turns faster than it did, and a slower pair is slowed by at least as much."""
    scaling = scaling_of(kind, head_dim)  # of those that follow a formula
    by = divided_by(ops, scaling, head_dim, theta, context)
    assert_that((by >= 1 - EXACT_64) & (np.diff(by, prepend=1) >= -EXACT_64 * by), f"it divided by {by}")


@law("precompute_freqs_cis", even_sizes, factors)
def test_linear_divides_all(ops, head_dim, factor):
    """Every theta_j by the factor (Chen et al. 2023)."""
    by = divided_by(ops, LinearScaling(factor), head_dim)
    assert_within(by, np.full(head_dim // 2, factor), EXACT_64 * factor)


@law("precompute_freqs_cis", wide_heads, thetas, factors, st.sampled_from([8.0, 32.0]))
def test_llama3_keeps_fast_turns_and_slows_slow_ones(ops, head_dim, theta, low, factor):
    """Above high_freq_factor turns in the original context a pair is kept, below low_freq_factor divided."""
    scaling = Llama3Scaling(factor, low, 4 * low, 1024)
    turns = 1024 * rope_freqs(head_dim, theta) / (2 * math.pi)
    by = divided_by(ops, scaling, head_dim, theta)
    for where, expected in ((turns > 4 * low, 1.0), (turns < low, factor)):
        assert_within(by[where], np.full(where.sum(), expected), EXACT_64 * factor)
    inside = by[(turns <= 4 * low) & (turns >= low)]
    assert_that((inside >= 1 - EXACT_64) & (inside <= factor + EXACT_64 * factor), f"it divided by {inside}")


@law("precompute_freqs_cis", wide_heads, thetas, st.integers(1, 3), st.sampled_from([8.0, 32.0]))
def test_llama3_at_its_limits(ops, head_dim, theta, j, factor):
    """With exactly high_freq_factor turns a pair is kept, with low_freq_factor divided, halfway by half."""
    turns = 1024 * rope_freqs(head_dim, theta)[j] / (2 * math.pi)
    for low, high, expected in [
        (turns / 2, turns, 1.0),
        (turns, 2 * turns, factor),
        (turns / 2, turns * 3 / 2, 2 / (1 + 1 / factor)),
    ]:
        by = divided_by(ops, Llama3Scaling(factor, low, high, 1024), head_dim, theta)
        assert_within(by[j], expected, EXACT_64 * factor)


@law("precompute_freqs_cis", wide_heads, thetas, st.integers(1, 3), st.sampled_from([8.0, 32.0]))
def test_llama3_has_no_jump(ops, head_dim, theta, j, factor):
    """Just beside a limit it changes by little."""
    turns = 1024 * rope_freqs(head_dim, theta)[j] / (2 * math.pi)
    for low, high in [(1 / 2, 1), (1, 2)]:
        beside = [
            divided_by(ops, Llama3Scaling(factor, low * near, high * near, 1024), head_dim, theta)[j]
            for near in turns * (1 + np.array([-1e-9, 1e-9]))
        ]
        assert_within(beside[0], beside[1], 1e-6 * factor)


@law("precompute_freqs_cis", wide_heads, thetas, st.data(), factors, st.booleans())
def test_yarns_ramp_is_clamped(ops, head_dim, theta, data, factor, truncate):
    """Pairs up to a are kept, from b on divided by the factor, and between them the mean is weighted.

    Pair j makes original * theta_j / (2 pi) turns; `truncate` rounds a down and b up.
    """
    n, original = head_dim // 2, 1 << 16
    a = data.draw(st.integers(0, n - 3))
    b = data.draw(st.integers(a + 2, n - 1))
    inwards = 0.3 if truncate else 0.0
    fast, slow = (original / (2 * math.pi) * theta ** (-at / n) for at in (a + inwards, b - inwards))
    scaling = YarnScaling(factor, original, 1.0, fast, slow, truncate)
    share = np.clip((np.arange(n) - a) / (b - a), 0, 1)
    by = divided_by(ops, scaling, head_dim, theta)
    assert_within(by, 1 / (1 - share + share / factor), EXACT_64 * 10 * factor)


@law("precompute_freqs_cis", wide_heads, factors)
def test_yarns_ramp_stays_within_the_pairs(ops, head_dim, factor):
    """An original context too short for beta_fast turns of any pair: the ramp begins at pair 0."""
    by = divided_by(ops, YarnScaling(factor, 32, 1.0), head_dim)
    last = math.ceil(head_dim // 2 * math.log(32 / (2 * math.pi)) / math.log(1e4))
    share = np.clip(np.arange(head_dim // 2) / last, 0, 1)
    assert_within(by, 1 / (1 - share + share / factor), EXACT_64 * 10 * factor)


@law("precompute_freqs_cis", wide_heads, thetas, factors, st.integers(2, 300))
def test_dynamic_is_another_theta(ops, head_dim, theta, factor, context):
    """It is plain RoPE with theta * s^(Dh / (Dh - 2)): the first pair is kept, the last divided by s."""
    s = 1 + factor * max(context / ORIGINAL - 1, 0)
    actual = table(ops, head_dim, context, theta, DynamicScaling(factor, ORIGINAL))
    expected = table(ops, head_dim, context, theta * s ** (head_dim / (head_dim - 2)))
    assert_within(actual, expected, (context + 8) * 16 * U64)
    by = divided_by(ops, DynamicScaling(factor, ORIGINAL), head_dim, theta, context)
    assert_within(by[[0, -1]], np.array([1, s]), EXACT_64 * 10 * s)


@law("precompute_freqs_cis", even_sizes, thetas, st.integers(2, 2 * ORIGINAL))
def test_longrope_goes_by_the_context(ops, head_dim, theta, context):
    """Up to the original context all positions are divided by the short list, above it by the long one."""
    short, long = (tuple(by + np.arange(head_dim // 2)) for by in (1.0, 3.0))
    by = divided_by(ops, LongRopeScaling(short, long, ORIGINAL, 1.19), head_dim, theta, context)
    expected = np.array(long if context > ORIGINAL else short)
    assert_within(by, expected, EXACT_64 * expected)


@law("precompute_freqs_cis", even_sizes, thetas, kinds, st.integers(2, 300))
def test_explicit_divisors_can_be_those_of_any_kind(ops, head_dim, theta, kind, context):
    """A scaling is its divisors and its length factor, and nothing else."""
    scaling = scaling_of(kind, head_dim)
    by = scaling.divisors(rope_freqs(head_dim, theta), theta, context)
    explicit = ExplicitScaling(tuple(by.tolist()), scaling.length_factor)
    actual, expected = (table(ops, head_dim, context, theta, s) for s in (explicit, scaling))
    assert_within(actual, expected, (context + 8) * 16 * U64)


@law("precompute_freqs_cis", even_sizes, thetas, st.sampled_from([0.5, 1.19, 2.0]), st.integers(1, 100))
def test_the_length_factor_multiplies_all(ops, head_dim, theta, length, end):
    """Every entry of the table is multiplied by it; no angle changes."""
    by = tuple(1.0 + np.arange(head_dim // 2))
    plain, longer = (table(ops, head_dim, end, theta, ExplicitScaling(by, r)) for r in (1.0, length))
    assert_within(longer, length * plain, EXACT_64)


# --- which rows of the table ------------------------------------------------------------------------------


@law("freqs_cis_at", sources, small_sizes, small_sizes)
def test_positions_follow_the_start(ops, source, start, T):
    """T tokens from start_pos on have the positions start_pos .. start_pos + T - 1."""
    freqs_cis = np.exp(1j * source.array(12, 2))
    assert_same(ops.freqs_cis_at(freqs_cis, start, T), freqs_cis[start : start + T])


@law("freqs_cis_at", sources, small_sizes)
def test_sequences_may_start_at_their_own_positions(ops, source, T):
    """B starts give (B, T) positions."""
    freqs_cis, starts = np.exp(1j * source.array(12, 2)), source.ids(7, 3)
    expected = np.stack([freqs_cis[start : start + T] for start in starts])
    assert_same(ops.freqs_cis_at(freqs_cis, starts, T), expected)


@pytest.mark.parametrize(
    "start, T", [(-1, 1), (0, 6), (5, 1), (4, 2), (-6, 2), (2**40, 1), ([0, -1], 1), ([0, 4], 2)]
)
@law("freqs_cis_at")
def test_positions_beyond_the_table_are_refused(ops, start, T):
    """A position below 0 or beyond the context is an error, and never counts from the end."""
    message = f"{T} positions from {start} on, of 5,"
    assert_refused(lambda: ops.freqs_cis_at(np.ones((5, 2), complex), np.array(start), T), message)


# --- the turn ---------------------------------------------------------------------------------------------


@law("apply_rotary_emb", sources, even_sizes, small_sizes, small_sizes)
def test_pairs_are_turned_as_complex_numbers(ops, source, head_dim, T, H):
    """(x_2j + i x_2j+1) e^(i a): neighbours make a pair."""
    x, angles = source.array(2, T, H, head_dim), source.normal(T, head_dim // 2)
    cos, sin = (f(angles)[None, :, None, :] for f in (np.cos, np.sin))
    expected = np.empty_like(x)
    expected[..., 0::2] = x[..., 0::2] * cos - x[..., 1::2] * sin
    expected[..., 1::2] = x[..., 0::2] * sin + x[..., 1::2] * cos
    actual = ops.apply_rotary_emb(x, np.exp(1j * angles))
    assert_within(actual, expected, EXACT_64 * (1 + np.abs(x).max()))


@law("apply_rotary_emb", sources, even_sizes, small_sizes, small_sizes)
def test_the_turn_as_pytorch(ops, source, head_dim, T, H):
    """It gives what torch.view_as_complex and a product give."""
    x, freqs_cis = source.array(2, T, H, head_dim), np.exp(1j * source.normal(T, head_dim // 2))
    expected = torch_ops.apply_rotary_emb(x, freqs_cis)
    assert_within(ops.apply_rotary_emb(x, freqs_cis), expected, EXACT_64 * (1 + np.abs(x).max()))


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_the_turn_in_float32(ops, source, head_dim, T):
    """Each number errs by 4 u of its pair's length."""
    x = source.array(1, T, 2, head_dim).astype(np.float32)
    freqs_cis = np.exp(1j * source.normal(T, head_dim // 2)).astype(np.complex64)
    y = ops.apply_rotary_emb(x, freqs_cis)
    assert_that(y.dtype == np.float32, f"float32 went in, {y.dtype} came out")
    exact = ops.apply_rotary_emb(x.astype(np.float64), freqs_cis.astype(np.complex128))
    length = np.abs(x.astype(np.float64).view(np.complex128)).repeat(2, axis=-1)
    assert_within(y, exact, 4 * U32 * length)


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_position_0_is_left_alone(ops, source, head_dim, H):
    """A turn by nothing changes no bit."""
    x = source.array(1, 1, H, head_dim)
    assert_same(ops.apply_rotary_emb(x, np.ones((1, head_dim // 2), complex)), x)


@law("apply_rotary_emb precompute_freqs_cis", sources, even_sizes, positions)
def test_lengths_of_pairs_are_kept(ops, source, head_dim, m):
    """|R(m) x| = |x|, pair by pair."""
    x = source.normal(1, 1, 2, head_dim)
    turned = ops.apply_rotary_emb(x, table(ops, head_dim, m + 1)[[m]])
    length = np.abs(x.view(np.complex128))
    assert_within(np.abs(turned.view(np.complex128)), length, EXACT_64 * length)


@law("apply_rotary_emb precompute_freqs_cis", sources, even_sizes, positions, positions)
def test_turns_add_up(ops, source, head_dim, m, n):
    """R(m) R(n) = R(m + n)."""
    x, freqs_cis = source.normal(1, 1, 2, head_dim), table(ops, head_dim, m + n + 1)
    twice = ops.apply_rotary_emb(ops.apply_rotary_emb(x, freqs_cis[[m]]), freqs_cis[[n]])
    assert_within(twice, ops.apply_rotary_emb(x, freqs_cis[[m + n]]), EXACT_64 * 10 * np.abs(x).max())


@law("apply_rotary_emb precompute_freqs_cis", sources, even_sizes, *[st.integers(0, 60)] * 3)
def test_scores_depend_on_the_distance_alone(ops, source, head_dim, m, n, moved):
    """<R(m) q, R(n) k> = <R(m + s) q, R(n + s) k>: RoFormer's reason for it all (section 3.2.2)."""
    freqs_cis = table(ops, head_dim, 121, 5e5, Llama3Scaling(8.0))
    q, k = source.normal(1, 1, 1, head_dim), source.normal(1, 1, 1, head_dim)

    def score(m, n):
        return np.sum(ops.apply_rotary_emb(q, freqs_cis[[m]]) * ops.apply_rotary_emb(k, freqs_cis[[n]]))

    bound = EXACT_64 * np.linalg.norm(q) * np.linalg.norm(k)
    assert_within(score(m + moved, n + moved), score(m, n), bound)


@law("apply_rotary_emb precompute_freqs_cis", sources, even_sizes, *[st.integers(0, 4000)] * 3)
def test_the_distance_alone_in_float32(ops, source, head_dim, m, n, moved):
    """The same in float32: the angles of position m are rounded by up to 2 m u, and scores with them."""
    freqs_cis = ops.precompute_freqs_cis(head_dim, 8001, 5e5)
    q, k = (source.normal(1, 1, 1, head_dim).astype(np.float32) for _ in "qk")

    def score(m, n):
        turned = (ops.apply_rotary_emb(x, freqs_cis[[at]]).astype(np.float64) for x, at in ((q, m), (k, n)))
        return np.sum(np.multiply(*turned))

    far = max(m, n) + moved
    bound = (8 * far + 16) * U32 * np.linalg.norm(q) * np.linalg.norm(k)
    assert_within(score(m + moved, n + moved), score(m, n), bound)


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_every_head_is_turned_alike(ops, source, head_dim, H):
    """The angle depends on the position and the pair, not on the head."""
    x, freqs_cis = source.array(1, 3, 1, head_dim), np.exp(1j * source.normal(3, head_dim // 2))
    one = ops.apply_rotary_emb(x, freqs_cis)
    many = ops.apply_rotary_emb(np.repeat(x, H, axis=2), freqs_cis)
    assert_within(many, np.repeat(one, H, axis=2), EXACT_64 * (1 + np.abs(x).max()))


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_each_position_has_its_own_angle(ops, source, head_dim, T):
    """Row t is turned by row t of the angles, as if it were alone."""
    x, freqs_cis = source.array(2, T, 2, head_dim), np.exp(1j * source.normal(T, head_dim // 2))
    whole, t = ops.apply_rotary_emb(x, freqs_cis), T - 1
    alone = ops.apply_rotary_emb(x[:, [t]], freqs_cis[[t]])
    assert_within(whole[:, [t]], alone, EXACT_64 * (1 + np.abs(x).max()))


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_each_sequence_may_have_its_own_angles(ops, source, head_dim, T):
    """With angles (B, T, Dh / 2), sequence b is turned by its own."""
    x, freqs_cis = source.array(2, T, 2, head_dim), np.exp(1j * source.normal(2, T, head_dim // 2))
    alone = [ops.apply_rotary_emb(x[[b]], freqs_cis[b])[0] for b in range(2)]
    assert_within(ops.apply_rotary_emb(x, freqs_cis), alone, EXACT_64 * (1 + np.abs(x).max()))


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_the_turn_leaves_its_arguments_alone(ops, source, head_dim, T):
    """x is what it was: q and k are turned into new arrays."""
    x, freqs_cis = source.array(1, T, 2, head_dim), np.exp(1j * source.normal(T, head_dim // 2))
    before = x.copy()
    ops.apply_rotary_emb(x, freqs_cis)
    assert_same(x, before)


# --- the two layouts --------------------------------------------------------------------------------------


def rotate_half(x, freqs_cis):
    """Hugging Face's layout: the two of a pair lie half a head apart."""
    cos, sin = (np.concatenate([f, f], axis=-1)[:, None, :] for f in (freqs_cis.real, freqs_cis.imag))
    half = x.shape[-1] // 2
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], axis=-1) * sin


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_both_layouts_are_one_turn(ops, source, head_dim, H):
    """Halves turned and then put in order are the ordered turned: rows (j, j + Dh / 2) -> (2j, 2j + 1)."""
    halves, freqs_cis = source.array(1, 3, H, head_dim), np.exp(1j * source.normal(3, head_dim // 2))
    rows = interleaved_rows(1, head_dim)
    expected = rotate_half(halves, freqs_cis)[..., rows]
    actual = ops.apply_rotary_emb(np.ascontiguousarray(halves[..., rows]), freqs_cis)
    assert_within(actual, expected, EXACT_64 * (1 + np.abs(halves).max()))


@law("apply_rotary_emb", sources, even_sizes, small_sizes)
def test_scores_are_the_same_in_both_layouts(ops, source, head_dim, H):
    """q . k does not care how pairs lie, as long as q and k agree."""
    freqs_cis = np.exp(1j * source.normal(3, head_dim // 2))
    q, k = source.array(1, 3, H, head_dim), source.array(1, 3, H, head_dim)
    rows = interleaved_rows(1, head_dim)
    turned_q, turned_k = (ops.apply_rotary_emb(np.ascontiguousarray(x[..., rows]), freqs_cis) for x in (q, k))
    expected = (rotate_half(q, freqs_cis) * rotate_half(k, freqs_cis)).sum(-1)
    bound = EXACT_64 * (1 + np.linalg.norm(q, axis=-1) * np.linalg.norm(k, axis=-1))
    assert_within((turned_q * turned_k).sum(-1), expected, bound)
