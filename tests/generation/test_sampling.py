"""The sampler: its settings, its order and its refusals, and that the filters agree with transformers.

The filters' own laws are in numpy_llama/proof/test_sampling.py.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
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


def kept(logits):
    return set(np.flatnonzero(logits > -np.inf).tolist())


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
    choices = [sampling.greedy, lambda x: sampling.draw(x, rng)]
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
def test_the_order_is_that_of_transformers(logits, rng, data):
    """We draw from what the chain of transformers leaves."""
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9))
    sampler = Sampler(0.3, top_k=7, top_p=0.85, min_p=0.02, repetition_penalty=1.7)
    scores = logits
    for processor in [
        RepetitionPenaltyLogitsProcessor(1.7),
        TemperatureLogitsWarper(0.3),
        TopKLogitsWarper(7),
        TopPLogitsWarper(0.85),
        MinPLogitsWarper(0.02),
    ]:
        scores = theirs(processor, scores, seen)
    if len(set(logits)) == len(logits):  # transformers keeps every tie of top-k, and any of top-p
        for u in rng.random(5):
            drawn = sampler(logits, seen, Fixed(u))
            if min(abs(np.cumsum(softmax(scores.astype(np.float64))) - u)) > EDGE:
                assert drawn == sampling.draw(scores, Fixed(u))


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


def test_penalty_comes_before_temperature_and_top_k_before_top_p():
    """Where the order shows: the same settings in another order would leave other ids."""
    probs = np.float32([0.4, 0.3, 0.2, 0.1])
    sampler = Sampler(1.0, top_k=2, top_p=0.5)  # of two, 0.57 and 0.43: the first reaches 0.5
    assert {sampler(np.log(probs), [], Fixed(u)) for u in np.linspace(0, 0.99, 50)} == {0}
    assert kept(sampling.top_k(sampling.top_p(np.log(probs), 0.5), 2)) == {0, 1}


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
    """Pinned: another release or another machine must draw the same ids."""
    logits = np.float32([0, 1, 2, 3, 2, 1, 0, -np.inf])
    sampler = Sampler(1.0, top_p=0.95, seed=7)
    rng = sampler.new_rng()
    assert [sampler(logits, [], rng) for _ in range(12)] == [3, 4, 4, 2, 3, 4, 1, 4, 4, 3, 3, 3]
