"""Sampling: which ids each filter keeps, that it agrees with transformers, and that chance is fair."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import U64
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from numpy_llama import sampling
from numpy_llama.errors import NumericsError, ParameterError
from numpy_llama.functional import softmax
from numpy_llama.sampling import Sampler

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)
fractions = st.floats(0, 1)

# Probabilities of float32 logits: the rounding of x / T, at most 30 or so, goes through exp.
PROBABILITY = 1e-6

# A mass this close to the limit of top-p or min-p may fall on either side of it.
EDGE = 1e-6

# Chi-square of a fair draw: with fixed seeds the tests are repeatable, and a fair sampler passes them.
LEAST_P_VALUE = 1e-6


@st.composite
def all_logits(draw, distinct=False):
    """(V,) float32, flat or steep; with ties and ids already filtered, unless all shall be distinct."""
    rng, V = draw(seeds), draw(st.integers(1, 60))
    x = rng.normal(size=V) * draw(st.sampled_from([0.1, 1, 5]))
    if not distinct and draw(st.booleans()):
        x = np.round(x)
    x = x.astype(np.float32)
    if not distinct and draw(st.booleans()):
        x[rng.random(V) < 0.3] = -np.inf
        x[rng.integers(V)] = 1
    return x


def kept(logits):
    return set(np.flatnonzero(logits > -np.inf).tolist())


def by_rank(logits):
    """Ids from the likeliest down; of equal ones the lowest first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def theirs(processor, logits, seen_ids=()):
    ids = torch.tensor([list(seen_ids)], dtype=torch.long)
    return processor(ids, torch.from_numpy(logits.copy())[None])[0].numpy()


def assert_filtered(out, logits):
    """Shape and type stay, the input is untouched, and an id is either as it was or -inf."""
    assert out.shape == logits.shape and out.dtype == logits.dtype
    assert np.all((out == logits) | (out == -np.inf))
    assert kept(out), "at least one id stays"


# --- greedy -----------------------------------------------------------------------------------------------


@given(all_logits())
def test_greedy_is_the_likeliest_and_of_equals_the_lowest(logits):
    assert sampling.greedy(logits) == by_rank(logits)[0]
    assert type(sampling.greedy(logits)) is int


# --- the filters ------------------------------------------------------------------------------------------


@given(all_logits(), st.integers(1, 70))
def test_top_k_keeps_exactly_k(logits, k):
    before = logits.copy()
    out = sampling.top_k(logits, k)
    assert_filtered(out, logits)
    assert kept(out) == set(by_rank(logits)[:k]) & kept(logits)
    np.testing.assert_array_equal(logits, before)


@given(all_logits(distinct=True), st.integers(1, 70))
def test_top_k_as_transformers(logits, k):
    np.testing.assert_array_equal(sampling.top_k(logits, k), theirs(TopKLogitsWarper(k), logits))


@given(all_logits(), fractions)
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits, p):
    before = logits.copy()
    out = sampling.top_p(logits, p)
    assert_filtered(out, logits)
    np.testing.assert_array_equal(logits, before)
    probs, mass, expected = softmax(logits.astype(np.float64)), 0.0, set()
    edge = False
    for i in by_rank(logits):  # Meta's rule, one id at a time: what lies before it does not yet exceed p
        edge |= abs(mass - p) < EDGE and mass > 0
        if mass <= p:
            expected.add(i)
        mass += probs[i]
    assert edge or kept(out) == expected & kept(logits)
    assert probs[list(kept(out))].sum() >= p - EDGE


@given(all_logits(), fractions)
def test_top_p_as_transformers(logits, p):
    """Where no cumulated mass lies on p itself: there Meta keeps one more id than transformers."""
    mass = np.cumsum(np.sort(softmax(logits.astype(np.float64)))[::-1])
    ranks = by_rank(logits)
    out = sampling.top_p(logits, p)
    if np.abs(mass - p).min() > EDGE and len(set(logits)) == len(logits) and p > EDGE:
        np.testing.assert_array_equal(out, theirs(TopPLogitsWarper(p), logits))
    assert kept(out) == set(ranks[: len(kept(out))])


def test_top_p_at_the_limits():
    logits = np.log(np.float32([0.125, 0.5, 0.25, 0.125]))
    for p, expected in [(0, {1}), (0.49, {1}), (0.51, {1, 2}), (0.74, {1, 2}), (0.76, {0, 1, 2})]:
        assert kept(sampling.top_p(logits, p)) == expected
    equal = np.zeros(4, np.float32)  # each of exactly 1/4: at equality one more stays, as in Meta's code
    for p, count in [(0, 1), (0.2, 1), (0.25, 2), (0.5, 3), (0.75, 4), (1, 4)]:
        assert kept(sampling.top_p(equal, p)) == set(range(count))


@given(all_logits())
def test_top_p_1_and_min_p_0_keep_all(logits):
    np.testing.assert_array_equal(sampling.min_p(logits, 0), logits)
    lost = kept(logits) - kept(sampling.top_p(logits, 1))
    assert softmax(logits.astype(np.float64))[list(lost)].sum() <= len(logits) * 2 * U64


@given(all_logits(), fractions)
def test_min_p_keeps_what_is_likely_against_the_likeliest(logits, p):
    out = sampling.min_p(logits, p)
    assert_filtered(out, logits)
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    clear = np.abs(ratio - p) > EDGE
    np.testing.assert_array_equal((out > -np.inf)[clear], ((ratio > p) & (logits > -np.inf))[clear])
    if clear.all():
        np.testing.assert_array_equal(out, theirs(MinPLogitsWarper(p), logits))


def test_min_p_keeps_the_limit_itself():
    logits = np.float32([0, 0, -3])
    assert kept(sampling.min_p(logits, 1)) == {0, 1}


# --- temperature and repetition penalty -------------------------------------------------------------------


@given(all_logits(), st.floats(0.05, 20))
def test_temperature_as_transformers(logits, temperature):
    actual = softmax(sampling.apply_temperature(logits, temperature))
    expected = softmax(theirs(TemperatureLogitsWarper(temperature), logits))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=PROBABILITY)
    assert actual.dtype == np.float32


@pytest.mark.filterwarnings("error")
@given(all_logits())
def test_temperature_at_the_ends(logits):
    for tiny in [5e-324, 1e-300, 1e-40]:
        cold = softmax(sampling.apply_temperature(logits, tiny))
        np.testing.assert_array_equal(cold > 0, logits == logits.max())
    flat = softmax(sampling.apply_temperature(logits, 1e300))
    np.testing.assert_allclose(flat, (logits > -np.inf) / len(kept(logits)), rtol=1e-6)


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


def test_repetition_penalty_makes_seen_ids_less_likely_on_either_side_of_0():
    logits = np.float32([2, -2, 0, 2, -np.inf])
    for seen in [[0, 1, 2, 4], [0, 0, 1, 1, 1, 2, 4], np.array([4, 2, 1, 0]), (0, 1, 2, 4)]:
        np.testing.assert_array_equal(
            sampling.repetition_penalty(logits, seen, 2.0), np.float32([1, -4, 0, 2, -np.inf])
        )
    np.testing.assert_array_equal(sampling.repetition_penalty(logits, [], 2.0), logits)


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
def test_repetition_penalty_refuses_ids_outside_the_vocabulary(bad):
    with pytest.raises(ParameterError, match=r"0\.\.2"):
        sampling.repetition_penalty(np.zeros(3, np.float32), [0, bad], 1.1)


# --- draw -------------------------------------------------------------------------------------------------


class Fixed:
    """A source of chance that is none."""

    def __init__(self, *values):
        self.values = list(values)

    def random(self):
        return self.values.pop(0)


@given(all_logits(), st.floats(0, 1, exclude_max=True))
def test_draw_inverts_the_cumulated_distribution(logits, u):
    rng = Fixed(u)
    drawn = sampling.draw(logits, rng)
    assert type(drawn) is int and not rng.values, "one random number for one id"
    probs = softmax(logits.astype(np.float64))
    assert probs[:drawn].sum() <= u + EDGE
    assert probs[: drawn + 1].sum() >= u - EDGE


@given(all_logits())
def test_draw_never_takes_a_filtered_id(logits):
    for u in [0.0, 5e-324, 2.0**-53, 0.5, 1 - 2.0**-53]:
        assert sampling.draw(logits, Fixed(u)) in kept(logits)


def chi_square_p_value(observed, expected):
    """P(X >= x) of the chi-square distribution, by the regularised upper incomplete gamma function."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(statistic / 2)).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_as_likely_as_softmax_says(temperature, rng):
    logits = rng.normal(size=12).astype(np.float32)
    logits[5] = -np.inf
    n, scaled = 20_000, sampling.apply_temperature(logits, temperature)
    counts = np.bincount([sampling.draw(scaled, rng) for _ in range(n)], minlength=12)
    assert counts[5] == 0
    alive = np.arange(12) != 5
    expected = n * softmax(logits[alive].astype(np.float64) / temperature)
    assert chi_square_p_value(counts[alive], expected) > LEAST_P_VALUE
    # ... and the check can tell: draws at another temperature do not pass.
    wrong = n * softmax(logits[alive].astype(np.float64) / (temperature * 1.2))
    assert chi_square_p_value(counts[alive], wrong) < LEAST_P_VALUE


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
