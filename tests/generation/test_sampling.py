"""The sampler: its settings, its order and its refusals, and that the filters agree with transformers.

The filters' own laws are in numpy_llama/proof/test_sampling.py.
"""

import math
from itertools import permutations

import numpy as np
import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from numpy_llama.errors import NumericsError, ParameterError
from numpy_llama.functional import softmax
from numpy_llama.generation import sampling
from numpy_llama.generation.sampling import Sampler
from numpy_llama.proof.logits import EDGE, PROBABILITY, Fixed, all_logits

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
fractions = st.floats(0, 1)


def theirs(processor, logits, seen_ids=()):
    ids = torch.tensor([list(seen_ids)], dtype=torch.long)
    return processor(ids, torch.from_numpy(logits.copy())[None])[0].numpy()


# --- the filters ------------------------------------------------------------------------------------------


@given(all_logits(distinct=True), st.integers(1, 70))
def test_top_k_as_transformers(logits, k):
    np.testing.assert_array_equal(sampling.top_k(logits, k), theirs(TopKLogitsWarper(k), logits))


@given(all_logits(), fractions)
def test_top_p_as_transformers(logits, p):
    """Where no cumulated mass lies on p itself: there Meta keeps one more id than transformers."""
    mass = np.cumsum(np.sort(softmax(logits.astype(np.float64)))[::-1])
    out = sampling.top_p(logits, p)
    if np.abs(mass - p).min() > EDGE and len(set(logits)) == len(logits) and p > EDGE:
        np.testing.assert_array_equal(out, theirs(TopPLogitsWarper(p), logits))


@given(all_logits(), fractions)
def test_min_p_as_transformers(logits, p):
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    if np.abs(ratio - p).min() > EDGE:
        np.testing.assert_array_equal(sampling.min_p(logits, p), theirs(MinPLogitsWarper(p), logits))


# --- temperature and repetition penalty -------------------------------------------------------------------


@given(all_logits(), st.floats(0.05, 20))
def test_temperature_as_transformers(logits, temperature):
    actual = softmax(sampling.apply_temperature(logits, temperature))
    expected = softmax(theirs(TemperatureLogitsWarper(temperature), logits))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=PROBABILITY)
    assert actual.dtype == np.float32


@given(all_logits(), st.floats(0.1, 10), st.data())
def test_repetition_penalty_as_transformers(logits, penalty, data):
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9))
    before = logits.copy()
    out = sampling.repetition_penalty(logits, seen, penalty)
    assert out.dtype == logits.dtype
    np.testing.assert_allclose(
        out, theirs(RepetitionPenaltyLogitsProcessor(penalty), logits, seen), rtol=1e-6, atol=0
    )
    np.testing.assert_array_equal(logits, before)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_repetition_penalty_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(ParameterError, match=r"0\.\.2"):
        sampling.repetition_penalty(np.zeros(3, np.float32), [0, bad], 1.1)


# --- refusals ---------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("bad", [[0, np.nan, 1], [np.inf, 0, 0], [-np.inf] * 3, [np.nan] * 3, [np.inf] * 3])
def test_nothing_is_chosen_from_nan_or_infinity(bad, rng):
    logits = np.float32(bad)
    choices = [sampling.greedy, lambda x: sampling.sample(x, rng)]
    for sampler in [Sampler(), Sampler(1.0), Sampler(1.0, top_k=1, top_p=0.5, min_p=0.1)]:
        choices.append(lambda x, sampler=sampler: sampler(x, [0, 1], rng))
    for choose in choices:
        with pytest.raises(NumericsError, match=r"nan|inf"):
            choose(logits)


@pytest.mark.filterwarnings("error")
def test_a_penalty_that_overflows_is_refused(rng):
    with pytest.raises(NumericsError):
        Sampler(1.0, repetition_penalty=1e-300)(np.float32([1, 2]), [0], rng)


@pytest.mark.parametrize(
    "bad",
    [
        *({"temperature": x} for x in [-0.1, math.nan, math.inf, -math.inf, None, "1", True, 1j]),
        *({"top_k": x} for x in [0, -1, 1.0, math.nan, "4", True, [1]]),
        *({"top_p": x} for x in [-0.1, 1.1, math.nan, math.inf, "1", True]),
        *({"min_p": x} for x in [-0.1, 1.1, math.nan, math.inf, "1", False]),
        *({"repetition_penalty": x} for x in [0, -1, math.nan, math.inf, None, "1", True]),
        *({"seed": x} for x in [-1, 0.5, math.nan, "7", True]),
    ],
    ids=str,
)
def test_sampler_refuses_what_makes_no_sense(bad):
    (name, value), *_ = bad.items()
    with pytest.raises(ParameterError, match=f"{name} is .*, it must be ") as error:
        Sampler(**bad)
    assert repr(value) in str(error.value)


def test_sampler_takes_what_makes_sense():
    Sampler(np.float32(0.5), np.int64(4), 1, 0, np.float64(1.1), np.uint32(7))
    Sampler(0, 10**9, 0.0, 1.0, 0.5, 2**70)
    with pytest.raises(AttributeError):
        Sampler().temperature = 1.0


# --- the sampler ------------------------------------------------------------------------------------------


@given(all_logits(), st.data())
def test_temperature_0_is_greedy_after_the_penalty(logits, data):
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9))
    sampler = Sampler(0.0, top_k=3, top_p=0.1, repetition_penalty=3.0)
    expected = sampling.greedy(sampling.repetition_penalty(logits, seen, 3.0))
    assert sampler(logits, seen, Fixed()) == expected
    assert Sampler()(logits, seen, Fixed()) == sampling.greedy(logits)


@given(all_logits(), seeds, st.data())
def test_the_steps_are_those_of_transformers(logits, rng, data):
    """We sample from what the processors of transformers leave, in llama.cpp's order."""
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9))
    sampler = Sampler(0.3, top_k=7, top_p=0.85, min_p=0.02, repetition_penalty=1.7)
    scores = logits
    for processor in [
        RepetitionPenaltyLogitsProcessor(1.7),
        TopKLogitsWarper(7),
        TopPLogitsWarper(0.85),
        MinPLogitsWarper(0.02),
        TemperatureLogitsWarper(0.3),
    ]:
        scores = theirs(processor, scores, seen)
    if len(set(logits)) == len(logits):  # transformers keeps every tie of top-k, and any of top-p
        for u in rng.random(5):
            drawn = sampler(logits, seen, Fixed(u))
            if min(abs(np.cumsum(softmax(scores.astype(np.float64))) - u)) > EDGE:
                assert drawn == sampling.sample(scores, Fixed(u))


def test_each_filter_counts(rng):
    """Every setting changes what is drawn: with the same random numbers, a different run of ids."""
    logits = rng.normal(size=(60, 40)).astype(np.float32) * 2
    settings = [{}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"repetition_penalty": 3.0}]
    runs = []
    for setting in settings:
        sampler = Sampler(1.0, seed=5, **setting)
        chance = sampler.new_rng()
        runs.append(tuple(sampler(row, range(20), chance) for row in logits))
    assert len(set(runs)) == len(settings)


# The chain once more, written from the papers: each step takes and gives {id: logit}.


class OnTheEdge(Exception):
    """A mass so near to a limit that rounding decides."""


def penalty_step(x, r, seen):
    return {i: float(np.float32((v / r if v > 0 else v * r) if i in seen else v)) for i, v in x.items()}


def temperature_step(x, t, seen):
    """Less the maximum; in float32, where a temperature may make logits equal."""
    return {i: float(np.float32((v - max(x.values())) / t)) for i, v in x.items()}


def ranked(x):
    return sorted(x, key=lambda i: (-x[i], i))


def weights(x):
    return {i: math.exp(v - max(x.values())) for i, v in x.items()}


def top_k_step(x, k, seen):
    return {i: x[i] for i in ranked(x)[:k]}


def top_p_step(x, p, seen):
    w = weights(x)
    before = {i: sum(w[j] for j in ranked(x)[:n]) / sum(w.values()) for n, i in enumerate(ranked(x))}
    if any(mass > 0 and abs(mass - p) < EDGE for mass in before.values()):
        raise OnTheEdge
    return {i: x[i] for i in x if before[i] <= p}


def min_p_step(x, p, seen):
    w = weights(x)
    if any(share < 1 and abs(share - p) < EDGE for share in w.values()):
        raise OnTheEdge
    return {i: x[i] for i in x if w[i] >= p}


STEPS = {
    "repetition_penalty": penalty_step,
    "top_k": top_k_step,
    "top_p": top_p_step,
    "min_p": min_p_step,
    "temperature": temperature_step,
}


def chain(logits, seen, settings, order=tuple(STEPS)):
    """What is left: {id: probability}."""
    x = {i: float(v) for i, v in enumerate(logits) if v > -np.inf}
    for name in order:
        if name in settings:
            x = STEPS[name](x, settings[name], seen)
    w = weights(x)
    return {i: w[i] / sum(w.values()) for i in sorted(x)}


@given(
    all_logits(),
    st.data(),
    st.fixed_dictionaries(
        {"temperature": st.sampled_from([0.3, 1.0, 3.0, 1e300])},
        optional={
            "repetition_penalty": st.sampled_from([0.5, 1.3, 4.0]),
            "top_k": st.integers(1, 12),
            "top_p": fractions,
            "min_p": fractions,
        },
    ),
)
def test_the_sampler_is_the_chain(logits, data, settings):
    """Any settings together, ties included: each id that is left is drawn in its share, and no other."""
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9))
    try:
        left = chain(logits, seen, settings)
    except OnTheEdge:
        reject()
    sampler, end = Sampler(**settings), 0.0
    for i, share in left.items():
        if share > 4 * EDGE:
            for u in (end + 2 * EDGE, end + share / 2, end + share - 2 * EDGE):
                assert sampler(logits, seen, Fixed(min(u, 1 - EDGE))) == i
        end += share


# Where the order shows: settings, logits, ids seen, and what is left. If the first began with temperature, it
# would take the maximum away, and then the penalty would find no number above 0. If the second began with it,
# all would be equal, and then top-k would keep the lowest id.
FOUR, THREE = np.log([0.4, 0.3, 0.2, 0.1]), np.log([0.6, 0.3, 0.1])
ORDER_SHOWS = [
    ({"repetition_penalty": 4.0, "temperature": 0.01}, [2, 1], [0], {1}),
    ({"temperature": 1e300, "top_k": 1}, [0, 1], [], {1}),
    ({"temperature": 1.0, "top_k": 2, "top_p": 0.5}, FOUR, [], {0}),  # 0.57 and 0.43: the first reaches 0.5
    ({"temperature": 1.0, "top_p": 0.75, "min_p": 0.4}, FOUR, [], {0, 1, 2}),
    ({"temperature": 2.0, "min_p": 0.4}, THREE, [], {0, 1}),  # 1/6 before, 0.41 after
    ({"temperature": 2.0, "top_p": 0.5}, THREE, [], {0}),  # 0.6 before, 0.47 after
    ({"repetition_penalty": 2.0, "temperature": 1.0, "top_k": 1}, [3, 2], [0], {1}),
    ({"repetition_penalty": 2.0, "temperature": 1.0, "top_p": 0.7}, [3, 1], [0], {0, 1}),
    ({"repetition_penalty": 2.0, "temperature": 1.0, "min_p": 0.3}, [3, 1], [0], {0, 1}),
]


@pytest.mark.parametrize("settings, logits, seen, left", ORDER_SHOWS)
def test_what_is_left_where_the_order_shows(settings, logits, seen, left):
    logits, sampler = np.float32(logits), Sampler(**settings)
    assert {i for i, share in chain(logits, seen, settings).items() if share > EDGE} == left
    assert {sampler(logits, seen, Fixed(u)) for u in np.linspace(0.001, 0.999, 100)} == left


def test_no_other_order_leaves_the_same():
    """Each of the 119 other orders leaves something else in one of these examples."""

    def all_left(order):
        for settings, x, seen, _ in ORDER_SHOWS:
            yield {i for i, p in chain(np.float32(x), seen, settings, order).items() if p > EDGE}

    right = [left for *_, left in ORDER_SHOWS]
    assert [order for order in permutations(STEPS) if [*all_left(order)] == right] == [tuple(STEPS)]


@given(st.integers(0, 2**64))
def test_the_same_seed_gives_the_same_ids(seed):
    logits = np.random.default_rng(1).normal(size=(20, 50)).astype(np.float32)

    def run(sampler):
        rng = sampler.new_rng()
        return [sampler(row, [], rng) for row in logits]

    assert run(Sampler(1.0, seed=seed)) == run(Sampler(1.0, seed=seed))
    assert run(Sampler(1.0, seed=seed)) != run(Sampler(1.0, seed=seed + 1))
    assert run(Sampler(1.0)) != run(Sampler(1.0))


def test_what_a_seed_draws():
    """Pinned: another release or another machine must sample the same ids."""
    logits = np.float32([0, 1, 2, 3, 2, 1, 0, -np.inf])
    sampler = Sampler(1.0, top_p=0.95, seed=7)
    rng = sampler.new_rng()
    assert [sampler(logits, [], rng) for _ in range(12)] == [3, 4, 4, 2, 3, 4, 1, 4, 4, 3, 3, 3]
