"""Continuations: how likely given ids are, the best next ids of several beams, and drafts by lookup."""

import numpy as np
from hypothesis import strategies as st

from .bounds import assert_same, assert_within
from .laws import assert_that, law, seeds, sizes
from .logits import PROBABILITY

lengths = st.integers(1, 6)
# Few different ids, so that the same ones come again.
texts = st.lists(st.integers(0, 2), max_size=12)


def some(seed, n, V):
    """Logits (n, V), and n ids."""
    rng = np.random.default_rng(seed)
    return rng.normal(0, 3, (n, V)).astype(np.float32), rng.integers(V, size=n).tolist()


# --- the log-likelihood of given ids ----------------------------------------------------------------------


@law("log_likelihood", seeds, lengths, sizes)
def test_the_likelihood_is_the_product_of_the_probabilities(ops, seed, n, V):
    """exp(log_likelihood) = prod_i softmax(logits_i)[id_i]."""
    logits, ids = some(seed, n, V)
    e = np.exp(logits.astype(np.float64))
    product = np.prod([row[i] / row.sum() for row, i in zip(e, ids, strict=True)])
    assert_within(np.exp(ops.log_likelihood(logits, ids)[0]), product, PROBABILITY * product)


@law("log_likelihood", seeds, lengths, lengths, sizes)
def test_the_parts_of_a_continuation_add_up(ops, seed, m, n, V):
    """log p(a b) = log p(a) + log p(b after a)."""
    logits, ids = some(seed, m + n, V)
    whole = ops.log_likelihood(logits, ids)[0]
    parts = ops.log_likelihood(logits[:m], ids[:m])[0] + ops.log_likelihood(logits[m:], ids[m:])[0]
    assert_within(parts, whole, PROBABILITY * max(1, -whole))


@law("log_likelihood", seeds, lengths, sizes)
def test_only_the_likeliest_ids_are_greedy(ops, seed, n, V):
    """is_greedy: each id is the argmax of its logits."""
    logits, ids = some(seed, n, V)
    greedy = logits.argmax(axis=-1).tolist()
    assert_same(bool(ops.log_likelihood(logits, greedy)[1]), True)
    assert_same(bool(ops.log_likelihood(logits, ids)[1]), ids == greedy)


@law("log_likelihood", seeds, sizes, st.sampled_from([1e4, -1e4]))
def test_large_logits_do_not_overflow(ops, seed, V, shift):
    """Logits plus a constant have the same softmax."""
    logits, ids = some(seed, 3, V)
    logits = np.round(logits)  # a sum with the constant is exact
    assert_within(
        ops.log_likelihood(logits + np.float32(shift), ids)[0],
        ops.log_likelihood(logits, ids)[0],
        PROBABILITY,
    )


@law("log_likelihood", sizes)
def test_no_ids_are_certain(ops, V):
    """The empty continuation has the log-likelihood 0, and greedy decoding writes it."""
    found = ops.log_likelihood(np.zeros((0, V), np.float32), [])
    assert_same((float(found[0]), bool(found[1])), (0.0, True))


# --- the best next ids of several beams -------------------------------------------------------------------


@law("best_continuations", seeds, lengths, sizes, lengths)
def test_the_best_continuations_are_those_of_a_sort(ops, seed, B, V, k):
    """The k highest scores[b] + log_p[b, id]; of equal ones the lowest beam, then the lowest id."""
    rng = np.random.default_rng(seed)
    scores, log_p = rng.integers(-9, 0, B).astype(float), rng.integers(-9, 0, (B, V)).astype(float)
    every = sorted((-(scores[b] + log_p[b, i]), b, i) for b in range(B) for i in range(V))
    wanted = [(b, i, -total) for total, b, i in every[:k]]
    found = [(int(b), int(i), float(total)) for b, i, total in ops.best_continuations(scores, log_p, k)]
    assert_same(found, wanted)


@law("best_continuations", seeds, sizes)
def test_one_beam_is_greedy(ops, seed, V):
    """With one beam, the best continuation is the argmax."""
    log_p = np.random.default_rng(seed).normal(size=(1, V))
    ((beam, token, _),) = ops.best_continuations(np.zeros(1), log_p, 1)
    assert_same((int(beam), int(token)), (0, int(log_p.argmax())))


# --- drafts by lookup -------------------------------------------------------------------------------------


def followed(ids, n, k):
    """What followed the last n ids at their newest earlier place; None if there is none."""
    for begin in range(len(ids) - n - 1, -1, -1):
        if ids[begin : begin + n] == ids[-n:]:
            return ids[begin + n : begin + n + k]
    return None


@law("lookup", texts, st.integers(1, 9))
def test_a_draft_is_what_followed_before(ops, ids, k):
    """The last three ids are looked for, and if they are new, the last two. No place: no draft."""
    found = [followed(ids, n, k) for n in (3, 2) if len(ids) > n]
    wanted = next((draft for draft in found if draft is not None), list[int]())
    assert_same([int(i) for i in ops.lookup(ids, k)], wanted)


@law("lookup", texts, st.integers(1, 9))
def test_a_draft_has_no_more_ids_than_asked_for(ops, ids, k):
    """len(lookup(ids, k)) <= k."""
    assert_that(len(ops.lookup(ids, k)) <= k, f"more than {k} ids came")
