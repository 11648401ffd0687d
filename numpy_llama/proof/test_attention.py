"""Causal attention: softmax(q k^T / sqrt(Dh) + mask) v for each head (Vaswani et al. 2017, equation 1).

A key/value head serves several query heads (Ainslie et al. 2023). The T queries are the last T of S.
"""

import math

import numpy as np
from hypothesis import strategies as st

from ..config import Array
from . import torch_ops
from .bounds import U64, assert_same, assert_within, g, unit
from .laws import Source, assert_that, even_sizes, law, small_sizes, sources


class Shape:
    """How many of what: B sequences, T queries behind `older` positions, K key heads, each for n_rep."""

    def __init__(self, B, T, older, K, n_rep, Dh):
        self.B, self.T, self.S, self.K, self.H, self.Dh = B, T, T + older, K, K * n_rep, Dh

    def __repr__(self):
        return f"B={self.B} T={self.T} S={self.S} K={self.K} H={self.H} Dh={self.Dh}"


# Many positions too: a kernel walks them in blocks.
few = st.integers(1, 7)
several = st.one_of(st.integers(0, 9), st.sampled_from([62, 63, 64, 127, 128, 129, 300]))


def shapes(T=few, older=several, B=st.integers(1, 2)):  # noqa: B008  a strategy is a constant
    head_dims = st.one_of(st.integers(1, 4), st.sampled_from([7, 8, 15, 16, 17, 32, 33, 64]))
    return st.builds(Shape, B, T, older, st.integers(1, 3), st.integers(1, 3), head_dims)


def drawn(source: Source, n: Shape) -> tuple[Array, Array, Array]:
    """q (B, T, H, Dh), k and v (B, S, K, Dh)."""
    q = source.array(n.B, n.T, n.H, n.Dh)
    return q, source.array(n.B, n.S, n.K, n.Dh), source.array(n.B, n.S, n.K, n.Dh)


def bound(q, k, v):
    """A score errs by g |q| |k| / sqrt(Dh), softmax doubles that, and v is averaged over S positions."""
    u, Dh, S = unit(q.dtype), q.shape[-1], k.shape[1]
    q, k, v = (x.astype(np.float64) for x in (q, k, v))
    score = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() / math.sqrt(Dh)
    return (2 * (g(Dh, u=u) + 6 * u) * score + 2 * g(S, u=u) + 16 * u) * np.abs(v).max()


def formula(q, k, v):
    """One query, one head, one position after the other, in Python's own sums."""
    B, T, H, Dh = q.shape
    S, K = k.shape[1:3]
    out = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, H):
        seen = range(S - T + t + 1)
        kv = h // (H // K)
        scores = [math.fsum(q[b, t, h] * k[b, s, kv]) / math.sqrt(Dh) for s in seen]
        weights = [math.exp(score - max(scores)) for score in scores]
        for s, weight in zip(seen, weights, strict=True):
            out[b, t, h] += weight / math.fsum(weights) * v[b, s, kv]
    return out


@law("attention", sources, shapes(T=small_sizes, older=small_sizes, B=st.just(1)))
def test_the_formula(ops, source, n):
    """out_t = sum over s <= t of p_s v_s, with p = softmax of q_t . k_s / sqrt(Dh)."""
    q, k, v = drawn(source, n)
    assert_within(ops.attention(q, k, v), formula(*(x.astype(np.float64) for x in (q, k, v))), bound(q, k, v))


@law("attention", sources, shapes())
def test_as_pytorch(ops, source, n):
    """It gives what torch's scaled_dot_product_attention gives, with the mask of the last T of S."""
    q, k, v = drawn(source, n)
    expected = torch_ops.attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert_within(ops.attention(q, k, v), expected, 2 * bound(q, k, v))


@law("attention_scores", sources, shapes())
def test_scores_are_products_within_the_mask(ops, source, n):
    """score_ts = q_t . k_s / sqrt(Dh) for s <= S - T + t, and -inf for the later ones."""
    q, k, _ = drawn(source, n)
    found, expected = ops.attention_scores(q, k), torch_ops.attention_scores(q, k)
    seen = np.isfinite(expected)
    assert_same(found[~seen], np.full((~seen).sum(), -np.inf))
    lengths = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max()
    assert_within(found[seen], expected[seen], (g(n.Dh, u=U64) + 4 * U64) * lengths)


@law("weighted_values", sources, shapes())
def test_each_head_gathers_the_values_of_its_group(ops, source, n):
    """out_th = sum_s p_hts v_sg, with g = h // n_rep."""
    weights, (_, _, v) = np.abs(source.array(n.B, n.H, n.T, n.S)), drawn(source, n)
    expected = torch_ops.weighted_values(weights, v)
    most = torch_ops.weighted_values(weights, np.abs(v))
    assert_within(ops.weighted_values(weights, v), expected, 2 * g(n.S, u=U64) * most)


@law("attention softmax attention_scores weighted_values", sources, shapes())
def test_attention_is_its_three_steps(ops, source, n):
    """attention(q, k, v) = weighted_values(softmax(attention_scores(q, k)), v)."""
    q, k, v = drawn(source, n)
    steps = ops.weighted_values(ops.softmax(ops.attention_scores(q, k)), v)
    assert_within(ops.attention(q, k, v), steps, 2 * bound(q, k, v))


@law("attention", sources, shapes())
def test_in_float32(ops, source, n):
    """In float32, within the rounding of its scores and sums."""
    q, k, v = (x.astype(np.float32) for x in drawn(source, n))
    out = ops.attention(q, k, v)
    assert_that(out.dtype == np.float32, f"float32 went in, {out.dtype} came out")
    expected = torch_ops.attention(*(x.astype(np.float64) for x in (q, k, v)))
    assert_within(out, expected, bound(q, k, v))


# --- what is seen -----------------------------------------------------------------------------------------


@law("attention", sources, shapes(), st.data())
def test_the_future_does_not_matter(ops, source, n, data):
    """What query t gives depends on positions up to its own: others may be anything."""
    q, k, v = drawn(source, n)
    t = data.draw(st.integers(0, n.T - 1), label="query")
    future = n.S - n.T + t + 1
    cut = ops.attention(q[:, : t + 1], k[:, :future], v[:, :future])
    k2, v2 = k.copy(), v.copy()
    k2[:, future:], v2[:, future:] = 99, -1000
    assert_within(ops.attention(q, k2, v2)[:, : t + 1], cut, 2 * bound(q, k, v))


@law("attention", sources, shapes(), st.data())
def test_the_present_matters(ops, source, n, data):
    """The last position that a query may see counts: more of its value gives more."""
    q, k, v = drawn(source, n)
    t = data.draw(st.integers(0, n.T - 1), label="query")
    own = n.S - n.T + t
    q, k = q / 8, k / 8  # no share may vanish in rounding
    before = ops.attention(q, k, v)[:, t]
    v[:, own] += 8
    assert_that(ops.attention(q, k, v)[:, t] > before, f"query {t} does not see position {own}")


@law("attention", sources, shapes(older=st.integers(1, 9)))
def test_the_past_matters(ops, source, n):
    """Every query sees the first position."""
    q, k, v = drawn(source, n)
    q, k = q / 8, k / 8
    before = ops.attention(q, k, v)
    v[:, 0] += 8
    assert_that(ops.attention(q, k, v) > before, "some query does not see position 0")


@law("attention", sources, shapes(T=st.just(1), older=st.just(0)))
def test_the_first_token_sees_itself_alone(ops, source, n):
    """One score has the share 1: out is v, to the last bit."""
    q, k, v = drawn(source, n)
    assert_same(ops.attention(q, k, v), np.repeat(v, n.H // n.K, axis=2))


@law("attention", sources, shapes(older=st.just(0)))
def test_the_first_of_many_too(ops, source, n):
    """Without a cache, the first query sees its own position and no other."""
    q, k, v = drawn(source, n)
    first = np.repeat(v[:, 0], n.H // n.K, axis=1)
    assert_within(ops.attention(q, k, v)[:, 0], first, bound(q, k, v))


@law("attention", sources, shapes())
def test_some_queries_are_the_last_of_all(ops, source, n):
    """The last T queries of S give what they give among all S: a cache changes nothing."""
    _, k, v = drawn(source, n)
    q = source.array(n.B, n.S, n.H, n.Dh)
    whole = ops.attention(q, k, v)
    assert_within(ops.attention(q[:, n.S - n.T :], k, v), whole[:, n.S - n.T :], 2 * bound(q, k, v))


@law("attention", sources, shapes(T=st.integers(1, 4), older=st.integers(0, 4)))
def test_one_query_at_a_time_is_all_at_once(ops, source, n):
    """Decoding: query t alone, over the positions so far, is row t of the whole."""
    q, k, v = drawn(source, n)
    whole = ops.attention(q, k, v)
    for t in range(n.T):
        seen = n.S - n.T + t + 1
        one = ops.attention(q[:, [t]], k[:, :seen], v[:, :seen])
        assert_within(one[:, 0], whole[:, t], 2 * bound(q, k, v))


# --- what is made of it -----------------------------------------------------------------------------------


def seen_values(v, n):
    """(B, S, H, Dh): what query heads see."""
    return np.repeat(v, n.H // n.K, axis=2)


@law("attention", sources, shapes())
def test_it_is_an_average(ops, source, n):
    """Each number lies between the least and the largest of the values seen."""
    q, k, v = drawn(source, n)
    last, values, slack = ops.attention(q, k, v)[:, -1], seen_values(v, n), bound(q, k, v)
    low, high = values.min(axis=1) - slack, values.max(axis=1) + slack
    assert_that((last >= low) & (last <= high), "an average lies outside of what it averages")


@law("attention", sources, shapes())
def test_equal_values_come_out_as_they_are(ops, source, n):
    """Shares sum to 1: if all values are the same, so is what comes out."""
    q, k, v = drawn(source, n)
    v = np.broadcast_to(v[:, :1], v.shape)
    expected = np.broadcast_to(seen_values(v, n)[:, :1], q.shape)
    assert_within(ops.attention(q, k, v), expected, bound(q, k, v))


@law("attention", sources, shapes())
def test_equal_keys_share_equally(ops, source, n):
    """Equal scores: the last query gets the mean of all values."""
    q, k, v = drawn(source, n)
    k = np.broadcast_to(k[:, :1], k.shape)
    mean = seen_values(v, n).astype(np.float64).mean(axis=1)
    assert_within(ops.attention(q, k, v)[:, -1], mean, bound(q, k, v))


@law("attention", sources, shapes(older=st.integers(1, 9)))
def test_the_best_key_takes_all(ops, source, n):
    """With scores far apart out is the value of the highest, to the last bit."""
    q, k, v = drawn(source, n)
    q = np.ones_like(q)
    order = source.permutation(n.S)
    k[...] = (1024 * order[:, None, None] / math.sqrt(n.Dh)).astype(k.dtype)
    for t in range(n.T):
        best = order[: n.S - n.T + t + 1].argmax()
        assert_same(ops.attention(q, k, v)[:, t], seen_values(v, n)[:, best])


@law("attention", sources, shapes())
def test_scores_are_divided_by_the_root_of_the_width(ops, source, n):
    """Each number twice, in q and k: q . k doubles, the root grows by sqrt 2, and so do the scores."""
    q, k, v = drawn(source, n)
    wide_q, wide_k, wide_v = (np.concatenate([x, x], axis=-1) for x in (q, k, v))
    expected = ops.attention(q * q.dtype.type(math.sqrt(2)), k, v)
    actual = ops.attention(wide_q, wide_k, wide_v)[..., : n.Dh]
    assert_within(actual, expected, 4 * bound(q, k, v))


@law("attention", sources, shapes())
def test_it_is_linear_in_the_values(ops, source, n):
    """Twice the values give just twice the result: they take no part in the scores."""
    q, k, v = drawn(source, n)
    tiny = np.finfo(q.dtype).tiny  # below it halves are rounded
    assert_within(ops.attention(q, k, 2 * v), 2 * ops.attention(q, k, v), tiny)


@law("attention", sources, shapes())
def test_a_vector_added_to_all_keys_changes_nothing(ops, source, n):
    """It adds the same to every score of a query, and softmax takes it away."""
    q, k, v = drawn(source, n)
    moved = k + source.array(1, 1, n.K, n.Dh)
    assert_within(ops.attention(q, moved, v), ops.attention(q, k, v), bound(q, k, v) + bound(q, moved, v))


@law("attention", sources, shapes(T=st.just(1)))
def test_the_order_of_what_was_seen_does_not_matter(ops, source, n):
    """Attention has no positions of its own: keys and values may be permuted together."""
    q, k, v = drawn(source, n)
    order = source.permutation(n.S)
    assert_within(ops.attention(q, k[:, order], v[:, order]), ops.attention(q, k, v), 2 * bound(q, k, v))


# --- heads and sequences ----------------------------------------------------------------------------------


@law("attention", sources, shapes())
def test_grouped_heads_are_repeated_ones(ops, source, n):
    """K key heads for H query heads are H of them, each repeated H / K times side by side."""
    q, k, v = drawn(source, n)
    n_rep = n.H // n.K
    as_mha = ops.attention(q, np.repeat(k, n_rep, axis=2), np.repeat(v, n_rep, axis=2))
    assert_within(ops.attention(q, k, v), as_mha, 2 * bound(q, k, v))


@law("attention", sources, shapes())
def test_heads_do_not_see_each_other(ops, source, n):
    """Each head gives what it gives alone."""
    q, k, v = drawn(source, n)
    whole, h = ops.attention(q, k, v), n.H - 1
    kv = h // (n.H // n.K)
    alone = ops.attention(q[:, :, [h]], k[:, :, [kv]], v[:, :, [kv]])
    assert_within(whole[:, :, [h]], alone, 2 * bound(q, k, v))


@law("attention", sources, shapes())
def test_permuting_groups_permutes_the_result(ops, source, n):
    """Heads that share a key head move together."""
    q, k, v = drawn(source, n)
    order = source.permutation(n.K)
    heads = np.arange(n.H).reshape(n.K, -1)[order].reshape(-1)
    moved = ops.attention(q[:, :, heads], k[:, :, order], v[:, :, order])
    assert_within(moved, ops.attention(q, k, v)[:, :, heads], 2 * bound(q, k, v))


@law("attention", sources, shapes(B=st.integers(2, 3)))
def test_sequences_do_not_see_each_other(ops, source, n):
    """Each sequence of a batch gives what it gives alone; NaN in another changes nothing."""
    q, k, v = drawn(source, n)
    alone = ops.attention(q[:1], k[:1], v[:1])
    for x in (q, k, v):
        x[1:] = np.nan
    assert_within(ops.attention(q, k, v)[:1], alone, 2 * bound(q[:1], k[:1], v[:1]))


@law("attention", sources, shapes(B=st.integers(2, 3)))
def test_the_order_of_sequences_is_kept(ops, source, n):
    """A batch turned round gives the result turned round."""
    q, k, v = drawn(source, n)
    turned = ops.attention(q[::-1], k[::-1], v[::-1])[::-1]
    assert_within(turned, ops.attention(q, k, v), 2 * bound(q, k, v))


# --- what it takes ----------------------------------------------------------------------------------------


@law("attention", sources, shapes())
def test_it_takes_a_half_precision_cache(ops, source, n):
    """Keys and values in float16 are widened to the precision of q, not q narrowed."""
    q, k, v = (x.astype(np.float32) for x in drawn(source, n))
    k, v = k.astype(np.float16), v.astype(np.float16)
    out = ops.attention(q, k, v)
    assert_that(out.dtype == np.float32, f"q is float32, {out.dtype} came out")
    expected = ops.attention(q, k.astype(np.float32), v.astype(np.float32))
    assert_within(out, expected, 2 * bound(q, k, v))


@law("attention", sources, shapes())
def test_it_takes_views_of_a_cache(ops, source, n):
    """Heads may lie before positions, and unused slots behind: NaN there changes nothing."""
    q, k, v = drawn(source, n)
    views = []
    for x in (k, v):
        room = np.full((n.B, n.K, n.S + 3, n.Dh), np.nan, x.dtype)
        room[:, :, : n.S] = x.swapaxes(1, 2)
        views.append(room[:, :, : n.S].swapaxes(1, 2))
    assert_within(ops.attention(q, *views), ops.attention(q, k, v), 2 * bound(q, k, v))


@law("attention", sources, shapes())
def test_it_leaves_its_arguments_alone(ops, source, n):
    """q, k and v are what they were."""
    arrays = drawn(source, n)
    before = [x.copy() for x in arrays]
    ops.attention(*arrays)
    for x, was in zip(arrays, before, strict=True):
        assert_same(x, was)


# --- the mask and the repeated heads, where they are functions of their own --------------------------------


@law("causal_mask", st.integers(1, 12), st.integers(0, 12))
def test_the_mask(ops, T, older):
    """0 where s <= t + S - T, else -inf."""
    S = T + older
    expected = [[0.0 if s <= t + S - T else -np.inf for s in range(S)] for t in range(T)]
    assert_same(ops.causal_mask(T, S), expected)


@law("causal_mask", st.integers(1, 12), st.integers(0, 12))
def test_the_mask_as_pytorch(ops, T, older):
    """It is torch.tril's, drawn at the diagonal S - T."""
    assert_same(ops.causal_mask(T, T + older), torch_ops.causal_mask(T, T + older))


@law("causal_mask")
def test_two_new_tokens_after_three(ops):
    """The one before last does not see the last, and no more is hidden."""
    assert_same(ops.causal_mask(2, 5), np.array([[0, 0, 0, 0, -np.inf], [0, 0, 0, 0, 0]]))


@law("attention", sources, st.integers(0, 3), small_sizes)
def test_a_query_that_may_see_nothing_is_no_nan(ops, source, S, more):
    """If T > S, the first queries have no key. They are an error, or their result is 0 as in PyTorch."""
    q, k, v = source.array(1, S + more, 2, 4), source.array(1, S, 2, 4), source.array(1, S, 2, 4)
    try:
        blind = ops.attention(q, k, v)[:, :more]
    except NotImplementedError:
        raise
    except Exception:
        return
    assert_same(blind, np.zeros(blind.shape))


@law("causal_mask", st.integers(1, 12))
def test_one_new_token_sees_all(ops, S):
    """In decoding nothing is masked."""
    assert_same(ops.causal_mask(1, S), np.zeros((1, S)))


@law("causal_mask")
def test_the_mask_has_the_precision_asked_for(ops):
    """float32 unless another is asked for: a mask of float64 would make all scores so."""
    for dtype in (np.float32, np.float64):
        found = ops.causal_mask(2, 3, dtype).dtype
        assert_that(found == dtype, f"{np.dtype(dtype)} wanted, {found} made")
    assert_that(ops.causal_mask(2, 3).dtype == np.float32, "float32 is what it makes unasked")


@law("repeat_kv", sources, small_sizes, small_sizes, small_sizes)
def test_each_head_is_repeated_side_by_side(ops, source, S, K, n_rep):
    """Query head h gets key head h // n_rep: a a b b, not a b a b."""
    x = source.array(1, S, K, 1)
    expected = np.stack([x[:, :, h // n_rep] for h in range(K * n_rep)], axis=2)
    assert_same(ops.repeat_kv(x, n_rep), expected)


@law("repeat_kv", sources, small_sizes, small_sizes)
def test_repeat_kv_as_pytorch(ops, source, K, n_rep):
    """It is torch.repeat_interleave over the heads."""
    x = source.array(2, 1, K, 2)
    assert_same(ops.repeat_kv(x, n_rep), torch_ops.repeat_kv(x, n_rep))


@law("attention softmax", sources, even_sizes, small_sizes)
def test_attention_is_made_of_softmax(ops, source, Dh, S):
    """One query, one head: softmax(q k^T / sqrt(Dh)) v."""
    q, k, v = source.array(1, 1, 1, Dh), source.array(1, S, 1, Dh), source.array(1, S, 1, Dh)
    scores = (q[0, :, 0] @ k[0, :, 0].T) / math.sqrt(Dh)
    expected = (ops.softmax(scores) @ v[0, :, 0])[None, :, None]
    assert_within(ops.attention(q, k, v), expected, 2 * bound(q, k, v))
