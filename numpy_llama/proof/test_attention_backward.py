"""Attention in training: whole documents, the log-sum-exp of each row, and the gradients that come of it.

FlashAttention-2 (Dao 2023): the weights of attention are never stored. The laws of every gradient are in
test_gradients.py, such as the comparison with autograd.
"""

import functools

import numpy as np
from hypothesis import strategies as st

from . import laws, torch_ops
from .bounds import EXP_32, U32, assert_same, assert_within, g, unit
from .gradients import attention_inputs, bound, documents, saving, score_error, widened
from .laws import assert_refused, assert_that, small_sizes, sources

law = functools.partial(laws.law, share=1 / 4)  # of the examples: the laws are many


class Shape:
    """How many of what: B rows of T tokens, cut at random `cuts` times, K key heads, each for n_rep."""

    def __init__(self, B, T, K, n_rep, Dh, cuts):
        self.B, self.T, self.K, self.H, self.n_rep, self.Dh, self.cuts = B, T, K, K * n_rep, n_rep, Dh, cuts

    def __repr__(self):
        return f"B={self.B} T={self.T} K={self.K} H={self.H} Dh={self.Dh} cuts={self.cuts}"


# Many positions too: a kernel walks them in tiles.
lengths = st.one_of(st.integers(1, 9), st.sampled_from([63, 64, 65, 130]))


def shapes(T=lengths, B=st.integers(1, 2), n_rep=st.integers(1, 3), cuts=st.integers(0, 4)):  # noqa: B008
    return st.builds(Shape, B, T, st.integers(1, 2), n_rep, st.sampled_from([1, 2, 3, 8, 17]), cuts)


def drawn(source, n):
    """q, k, v, first."""
    return attention_inputs(source, n.B, n.T, n.K, n.n_rep, n.Dh, n.cuts)


def share(q, k):
    """How far a weight of attention may be off, as a share of itself, and lse as a number."""
    u = unit(q.dtype)
    q, k = widened(q), widened(k)
    most = np.linalg.norm(q, axis=-1).max() * np.linalg.norm(k, axis=-1).max() + np.log(k.shape[1])
    return 2 * score_error(u, q, k) + 4 * u * most + 2 * g(k.shape[1], u=u) + 4 * EXP_32 / U32 * u


def saving_bounds(q, k, v):
    return share(q, k) * np.abs(v).max(), share(q, k)


def assert_saving(found, wanted, q, k, v, times=1):
    for one, other, allowed in zip(found, wanted, saving_bounds(q, k, v), strict=True):
        assert_within(one, other, times * allowed)


def gradients(ops, dout, q, k, v, first):
    """dq, dk, dv and their bounds."""
    out, lse = (x.astype(q.dtype) for x in saving(widened(q), widened(k), widened(v), first))
    arguments = dout, q, k, v, out, lse, first
    return ops.attention_backward(*arguments), bound("attention_backward", arguments, q.dtype)


# --- forward ----------------------------------------------------------------------------------------------


@law("attention_saving", sources, shapes(T=st.integers(1, 9)))
def test_the_definition(ops, source, n):
    """out_t = attention of query t to the positions first[t]..t; lse_t = log sum_s exp(score_ts) of these."""
    q, k, v, first = drawn(source, n)
    wanted = saving(widened(q), widened(k), widened(v), first)
    assert_saving(ops.attention_saving(q, k, v, first), wanted, q, k, v)


@law("attention_saving", sources, shapes())
def test_saving_as_pytorch(ops, source, n):
    """It gives torch's scaled_dot_product_attention and logsumexp, with the mask of the documents."""
    q, k, v, first = drawn(source, n)
    wanted = torch_ops.attention_saving(widened(q), widened(k), widened(v), first)
    assert_saving(ops.attention_saving(q, k, v, first), wanted, q, k, v, 2)


@law("attention_saving", sources, shapes(), share=1 / 8)
def test_saving_in_float32(ops, source, n):
    """In float32, within the rounding of its scores and sums."""
    q, k, v, first = drawn(source, n)
    q, k, v = (x.astype(np.float32) for x in (q, k, v))
    found = ops.attention_saving(q, k, v, first)
    assert_that(all(x.dtype == np.float32 for x in found), "float32 went in, another precision came out")
    wanted = torch_ops.attention_saving(widened(q), widened(k), widened(v), first)
    assert_saving(found, wanted, q, k, v, 2)


@law("attention_saving attention", sources, shapes(cuts=st.just(0)))
def test_one_document_is_attention(ops, source, n):
    """Where first is 0 it is `attention`, which the model predicts with."""
    q, k, v, first = drawn(source, n)
    out, _ = ops.attention_saving(q, k, v, first)
    assert_within(out, ops.attention(q, k, v), 2 * saving_bounds(q, k, v)[0])


@law("attention_saving", sources, shapes(T=st.integers(1, 70)))
def test_saving_leaves_its_arguments_alone(ops, source, n):
    """q, k, v and first are what they were, and the same call gives the same bits."""
    arguments = drawn(source, n)
    before = [x.copy() for x in arguments]
    found = [x.copy() for x in ops.attention_saving(*arguments)]
    for x, was in zip((*arguments, *ops.attention_saving(*arguments)), (*before, *found), strict=True):
        assert_same(x, was)


@law("attention_saving", sources, small_sizes)
def test_every_query_head_has_a_key_head(ops, source, T):
    """3 key heads for 4 query heads are refused."""
    q, k, first = source.array(1, T, 4, 2), source.array(1, T, 3, 2), np.zeros((1, T), int)
    assert_refused(lambda: ops.attention_saving(q, k, k, first), "H = 4 and K = 3")


# --- what is seen -----------------------------------------------------------------------------------------


@law("attention_saving attention_backward", sources, shapes(T=st.integers(2, 70)))
def test_packed_documents_are_separate_ones(ops, source, n):
    """Documents in one row give what each gives alone, forward and backward."""
    n.B = 1
    q, k, v, first = drawn(source, n)
    dout = source.array(*q.shape)
    packed, (grads, allowed) = ops.attention_saving(q, k, v, first), gradients(ops, dout, q, k, v, first)
    for begin in np.unique(first):
        at = np.flatnonzero(first[0] == begin)
        alone = [x[:, at] for x in (q, k, v)]
        zeros = np.zeros((1, len(at)), int)
        out, lse = ops.attention_saving(*alone, zeros)
        assert_saving((packed[0][:, at], packed[1][:, :, at]), (out, lse), q, k, v, 2)
        found, _ = gradients(ops, dout[:, at], q[:, at], k[:, at], v[:, at], zeros)
        for one, other, slack in zip(grads, found, allowed, strict=True):
            assert_within(one[:, at], other, 2 * slack[:, at])


@law(
    "attention_saving attention_backward",
    sources,
    shapes(T=st.integers(2, 70), cuts=st.integers(1, 4)),
    share=1 / 4,
)
def test_documents_do_not_see_each_other(ops, source, n):
    """NaN in a document comes out in it, and in its gradients, and nowhere else."""
    n.B = 1
    q, k, v, first = drawn(source, n)
    dout = source.array(*q.shape)
    bad = first[0] == first[0, source.ids(n.T)]
    for x in (q, k, v, dout):
        x[:, bad] = np.nan
    with np.errstate(invalid="ignore"):
        found, sums = ops.attention_saving(q, k, v, first)
        grads = ops.attention_backward(dout, q, k, v, found, sums, first)
    assert_same(np.isnan(found[0, :, 0, 0]), bad)
    assert_same(np.isnan(sums[0, 0]), bad)
    for x in grads:
        assert_same(np.isnan(x[0, :, 0, 0]), bad)


@law("attention_backward", sources, shapes(T=st.integers(2, 70), cuts=st.just(0)), st.data())
def test_no_gradient_comes_from_before(ops, source, n, data):
    """dk and dv of a position have nothing from earlier queries: with dout only there, they are 0."""
    q, k, v, first = drawn(source, n)
    t = data.draw(st.integers(1, n.T - 1), label="position")
    dout = source.array(*q.shape)
    dout[:, t:] = 0
    (dq, dk, dv), _ = gradients(ops, dout, q, k, v, first)
    for x in (dq, dk, dv):
        assert_same(x[:, t:], np.zeros_like(x[:, t:]))


@law("attention_backward", sources, shapes(T=st.integers(1, 9), cuts=st.just(0)))
def test_every_key_learns_from_the_last_query(ops, source, n):
    """dout of the last query reaches the value of each position: dv_s = p_s dout, and p_s is above 0."""
    q, k, v, first = drawn(source, n)
    q, k = q / 16, k / 16  # no share may vanish in rounding
    dout = np.zeros_like(q)
    dout[:, -1] = 1
    (_, _, dv), _ = gradients(ops, dout, q, k, v, first)
    assert_that(dv > 0, "the last query does not reach some value")
    shares = np.full((n.B, n.K, n.Dh), float(n.n_rep))
    assert_within(dv.sum(axis=1), shares, 4 * share(q, k) * n.n_rep)


@law("attention_backward", sources, shapes(T=st.just(1)))
def test_a_token_that_sees_itself_alone(ops, source, n):
    """A single weight is 1 whatever q and k are: dq = dk = 0, and dv is the sum of dout over the group."""
    q, k, v, first = drawn(source, n)
    dout = source.array(*q.shape)
    (dq, dk, dv), allowed = gradients(ops, dout, q, k, v, first)
    assert_within(dq, np.zeros_like(q), allowed[0])
    assert_within(dk, np.zeros_like(k), allowed[1])
    assert_within(dv, widened(dout).reshape(n.B, 1, n.K, n.n_rep, n.Dh).sum(axis=3), allowed[2])


# --- heads and rows ---------------------------------------------------------------------------------------


@law("attention_backward", sources, shapes(n_rep=st.integers(2, 3)))
def test_shared_heads_sum(ops, source, n):
    """dk and dv of a key head are the sums over the query heads that share it, as if each had its own."""
    q, k, v, first = drawn(source, n)
    dout = source.array(*q.shape)
    (dq, dk, dv), allowed = gradients(ops, dout, q, k, v, first)
    own_k, own_v = np.repeat(k, n.n_rep, axis=2), np.repeat(v, n.n_rep, axis=2)
    (dq_own, dk_own, dv_own), _ = gradients(ops, dout, q, own_k, own_v, first)
    assert_within(dq, dq_own, 2 * allowed[0])
    for found, each, slack in ((dk, dk_own, allowed[1]), (dv, dv_own, allowed[2])):
        assert_within(found, widened(each).reshape(n.B, n.T, n.K, n.n_rep, n.Dh).sum(axis=3), 2 * slack)


@law("attention_backward", sources, shapes(B=st.just(2)))
def test_rows_do_not_see_each_other(ops, source, n):
    """Each row of a batch gives what it gives alone, with documents of its own."""
    q, k, v, first = drawn(source, n)
    dout = source.array(*q.shape)
    found, allowed = gradients(ops, dout, q, k, v, first)
    alone, _ = gradients(ops, dout[1:], q[1:], k[1:], v[1:], first[1:])
    for one, other, slack in zip(found, alone, allowed, strict=True):
        assert_within(one[1:], other, 2 * slack[1:])


# --- what softmax forgets ---------------------------------------------------------------------------------


@law("attention_backward", sources, shapes())
def test_a_vector_added_to_all_keys_would_change_nothing(ops, source, n):
    """So the dk of a document sum to 0, for each key head."""
    q, k, v, first = drawn(source, n)
    (_, dk, _), (_, allowed, _) = gradients(ops, source.array(*q.shape), q, k, v, first)
    assert_within(widened(dk).sum(axis=1), np.zeros((n.B, n.K, n.Dh)), 2 * allowed.sum(axis=1))


@law("attention_backward", sources, shapes())
def test_equal_values_leave_nothing_to_choose(ops, source, n):
    """If all values are the same, no weight matters: dq = dk = 0."""
    q, k, v, _ = drawn(source, n)
    v[...] = v[:, :1]
    first = documents(source, n.B, n.T, n.cuts)
    (dq, dk, _), allowed = gradients(ops, source.array(*q.shape), q, k, v, first)
    assert_within(dq, np.zeros_like(q), 2 * allowed[0])
    assert_within(dk, np.zeros_like(k), 2 * allowed[1])
