"""Sampling: which ids each filter keeps, and that chance is fair. Logits are float32 (V,); a filtered id
becomes -inf."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from ..functional import softmax
from .bounds import EXACT_64, U32, assert_same, assert_within
from .laws import PROFILE, assert_refused, assert_that, law, seeds
from .logits import EDGE, PROBABILITY, Fixed, all_logits

fractions = st.floats(0, 1)


# Chi-square of a fair choice: with fixed seeds the tests are repeatable, and a fair sampler passes them.
LEAST_P_VALUE = 1e-6
# 20,000 in a run of every day, a million in a nightly one.
DRAWS = min(max(400 * PROFILE.max_examples, 20_000), 1_000_000)

# A repetition penalty is one product or quotient, perhaps by a penalty rounded to float32.
ONE_ROUNDING = 4 * U32


def kept(logits):
    return np.flatnonzero(logits > -np.inf)


def by_rank(logits):
    """Ids from the likeliest down; of equal ones the lowest first."""
    return sorted(range(len(logits)), key=lambda i: (-logits[i], i))


def probabilities(logits):
    return softmax(logits.astype(np.float64))


# --- greedy -----------------------------------------------------------------------------------------------


@law("greedy", all_logits())
def test_greedy_takes_the_likeliest(ops, logits):
    """greedy(x) = argmax x, and of equal ones the lowest id."""
    assert_same(ops.greedy(logits), by_rank(logits)[0])


@law("greedy", all_logits())
def test_greedy_gives_a_plain_int(ops, logits):
    """An id is an int of Python, which JSON and dictionaries know."""
    assert_that(type(ops.greedy(logits)) is int, f"an int wanted, {type(ops.greedy(logits))} came")


@law("greedy", all_logits(), st.integers(-20, 20))
def test_greedy_does_not_care_for_the_scale(ops, logits, k):
    """Logits times a power of two have the same argmax."""
    assert_same(ops.greedy(logits * np.float32(2.0**k)), ops.greedy(logits))


# --- what every filter does -------------------------------------------------------------------------------

FILTERS = [("top_k", 1), ("top_k", 3), ("top_k", 1000), ("top_p", 0.0), ("top_p", 0.6), ("top_p", 1.0)]
FILTERS += [("min_p", 0.0), ("min_p", 0.1), ("min_p", 1.0), ("top_n_sigma", 0.0), ("top_n_sigma", 1.0)]
FILTERS += [("mirostat", -1.0), ("mirostat", 0.5), ("mirostat", 3.0)]


def each_filter(test):
    """The law once for each filter, of those that the implementation has."""
    return pytest.mark.parametrize("name, setting", FILTERS)(test)


def each_filter_and_typical_p(test):
    """Typical-p may drop the likeliest."""
    return pytest.mark.parametrize("name, setting", [*FILTERS, ("typical_p", 0.0), ("typical_p", 0.6)])(test)


@each_filter_and_typical_p
@law("{name}", all_logits())
def test_a_filter_keeps_or_drops(ops, name, setting, logits):
    """Each logit is as it was or -inf; shape and precision stay."""
    out = getattr(ops, name)(logits, setting)
    assert_that(out.dtype == logits.dtype, f"{logits.dtype} went in, {out.dtype} came out")
    assert_same(np.where(out == -np.inf, -np.inf, logits), out)


@each_filter
@law("{name}", all_logits())
def test_a_filter_keeps_the_likeliest(ops, name, setting, logits):
    """The largest logit always stays."""
    out = getattr(ops, name)(logits, setting)
    assert_same(out.max(), logits.max())


@each_filter
@law("{name}", all_logits())
def test_a_filter_drops_from_below(ops, name, setting, logits):
    """What it drops is nowhere larger than what it keeps."""
    out = getattr(ops, name)(logits, setting)
    dropped = logits[(out == -np.inf) & (logits > -np.inf)]
    assert_that(dropped.max(initial=-np.inf) <= logits[kept(out)].min(), f"of {logits} it made {out}")


@each_filter_and_typical_p
@law("{name}", all_logits())
def test_a_filter_leaves_its_argument_alone(ops, name, setting, logits):
    """The logits are what they were."""
    before = logits.copy()
    getattr(ops, name)(logits, setting)
    assert_same(logits, before)


# --- top-k ------------------------------------------------------------------------------------------------


@law("top_k", all_logits(), st.integers(1, 70))
def test_top_k_keeps_exactly_k(ops, logits, k):
    """The k largest; of equal ones those with the lowest ids (Fan et al. 2018)."""
    expected = sorted(set(by_rank(logits)[:k]) & set(kept(logits)))
    assert_same(kept(ops.top_k(logits, k)), np.array(expected, int))


# NumPy sorts a short array completely where it is asked only for the k-th number, so some are long.
@law("top_k", seeds, st.integers(2, 12) | st.just(1000), st.integers(1, 12))
def test_top_k_among_equals(ops, seed, V, k):
    """However many are equal to the k-th, k stay: of three different logits there are many such."""
    logits = np.random.default_rng(seed).integers(3, size=V).astype(np.float32)
    assert_same(kept(ops.top_k(logits, k)), np.sort(by_rank(logits)[:k]))


@law("top_k", all_logits(distinct=True), st.integers(1, 60))
def test_top_k_as_pytorch(ops, logits, k):
    """They are those of torch.topk."""
    expected = torch.topk(torch.from_numpy(logits), min(k, len(logits))).indices.sort().values
    assert_same(kept(ops.top_k(logits, k)), expected.numpy())


@law("top_k", all_logits())
def test_all_of_them_are_no_filter(ops, logits):
    """k = V changes nothing."""
    assert_same(ops.top_k(logits, len(logits)), logits)


@law("top_k", all_logits())
def test_the_one_largest_is_greedy(ops, logits):
    """k = 1 leaves the id that greedy takes."""
    assert_same(kept(ops.top_k(logits, 1)), [by_rank(logits)[0]])


# --- top-p ------------------------------------------------------------------------------------------------


@law("top_p", all_logits(), fractions)
def test_top_p_keeps_the_smallest_set_that_reaches_p(ops, logits, p):
    """In falling order, an id stays while the mass before it does not exceed p (Meta's rule)."""
    probs, mass, expected, edge = probabilities(logits), 0.0, [], False
    for i in by_rank(logits):
        edge |= abs(mass - p) < EDGE and mass > 0
        if mass <= p and logits[i] > -np.inf:
            expected.append(i)
        mass += probs[i]
    if not edge:
        assert_same(kept(ops.top_p(logits, p)), np.sort(expected))


@law("top_p", all_logits(), fractions)
def test_top_p_leaves_at_least_p(ops, logits, p):
    """The mass of what stays reaches p (Holtzman et al. 2020, equation 2)."""
    mass = probabilities(logits)[kept(ops.top_p(logits, p))].sum()
    assert_that(mass >= p - EDGE, f"p is {p}, and a mass of {mass} is left")


@law("top_p", all_logits(), fractions)
def test_top_p_leaves_no_more_than_it_must(ops, logits, p):
    """Without the least likely of what stays, the mass would not exceed p."""
    probs, left = probabilities(logits), kept(ops.top_p(logits, p))
    assert_that(probs[left].sum() - probs[left].min() <= p + EDGE, f"p is {p}, and {len(left)} ids are left")


@law("top_p", all_logits(), fractions)
def test_top_p_prefers_low_ids(ops, logits, p):
    """The lower of equally likely ids stays: the kept ids are the beginning of the ranking."""
    left = kept(ops.top_p(logits, p))
    assert_same(left, np.sort(by_rank(logits)[: len(left)]))


@law("top_p", all_logits(), fractions, fractions)
def test_a_larger_p_keeps_no_less(ops, logits, p, q):
    """The sets of two p lie one within the other."""
    small, large = (set(kept(ops.top_p(logits, x))) for x in sorted([p, q]))
    assert_that(small <= large, f"p = {min(p, q)} keeps {small}, p = {max(p, q)} keeps {large}")


@law("top_p")
def test_top_p_at_its_limits(ops):
    """At equality one id more stays: Meta drops where cumsum - p_i > p."""
    logits = np.log(np.array([0.125, 0.5, 0.25, 0.125], np.float32))
    for p, expected in [(0, [1]), (0.49, [1]), (0.51, [1, 2]), (0.74, [1, 2]), (0.76, [0, 1, 2])]:
        assert_same(kept(ops.top_p(logits, p)), expected)
    equal = np.zeros(4, np.float32)  # each of exactly 1/4
    for p, count in [(0, 1), (0.2, 1), (0.25, 2), (0.5, 3), (0.75, 4), (1, 4)]:
        assert_same(kept(ops.top_p(equal, p)), np.arange(count))


@law("top_p", all_logits())
def test_top_p_of_1_drops_nothing_that_weighs(ops, logits):
    """p = 1 keeps all but what is lost in the rounding of 1."""
    lost = set(kept(logits)) - set(kept(ops.top_p(logits, 1)))
    mass = probabilities(logits)[list(lost)].sum()
    assert_that(mass <= len(logits) * EXACT_64, f"p is 1, and {mass} is lost")


# --- min-p ------------------------------------------------------------------------------------------------


@law("min_p", all_logits(), fractions)
def test_min_p_keeps_what_is_likely_against_the_likeliest(ops, logits, p):
    """An id stays if p_i >= p max_j p_j (Nguyen et al. 2024)."""
    ratio = np.exp(logits.astype(np.float64) - logits.max())
    clear = np.abs(ratio - p) > EDGE
    stays = ops.min_p(logits, p) > -np.inf
    assert_same(stays[clear], ((ratio > p) & (logits > -np.inf))[clear])


@law("min_p")
def test_min_p_keeps_the_limit_itself(ops):
    """p = 1 keeps all that are as likely as the likeliest."""
    assert_same(kept(ops.min_p(np.array([0, 0, -3], np.float32), 1)), [0, 1])


@law("min_p", all_logits())
def test_min_p_of_0_is_no_filter(ops, logits):
    """p = 0 changes nothing."""
    assert_same(ops.min_p(logits, 0), logits)


# --- top-n-sigma ------------------------------------------------------------------------------------------


@law("top_n_sigma", all_logits(), st.floats(0, 4))
def test_top_n_sigma_measures_from_the_largest(ops, logits, n):
    """An id stays if x_i >= max x - n sigma, the standard deviation of the logits (Tang et al. 2024)."""
    x = [float(v) for v in logits if v > -np.inf]
    mean = math.fsum(x) / len(x)
    limit = max(x) - n * math.sqrt(math.fsum((v - mean) ** 2 for v in x) / len(x))
    clear = np.abs(logits - limit) > 1e-4
    stays = ops.top_n_sigma(logits, n) > -np.inf
    assert_same(stays[clear], (logits > limit)[clear])


@law("top_n_sigma", all_logits(), st.floats(0, 4), st.integers(-9, 9))
def test_top_n_sigma_does_not_care_for_the_temperature(ops, logits, n, k):
    """Logits times a power of two keep the same ids: a hot sampler meets no more of them."""
    assert_same(kept(ops.top_n_sigma(logits * np.float32(2.0**k), n)), kept(ops.top_n_sigma(logits, n)))


# --- typical-p --------------------------------------------------------------------------------------------


@law("typical_p", all_logits(), fractions)
def test_typical_p_keeps_the_most_typical(ops, logits, p):
    """In rising order of |-log p_i - H|, an id stays while the mass before it does not exceed p (Meister et
    al. 2022)."""
    probs = {i: q for i, q in enumerate(probabilities(logits)) if q > 0}
    entropy = -math.fsum(q * math.log(q) for q in probs.values())
    distance = {i: abs(-math.log(q) - entropy) for i, q in probs.items()}
    order, mass, expected = sorted(probs, key=lambda i: (distance[i], i)), 0.0, []
    edge = any(abs(distance[i] - distance[j]) < 1e-9 and logits[i] != logits[j] for i, j in pairwise(order))
    for i in order:
        edge |= abs(mass - p) < EDGE and mass > 0
        if mass <= p:
            expected.append(i)
        mass += probs[i]
    if not edge:
        assert_same(kept(ops.typical_p(logits, p)), np.sort(expected))


@law("typical_p")
def test_typical_p_may_drop_the_likeliest(ops):
    """Of one id with p = 0.4 and twelve with 0.05, the twelve are nearer to the entropy."""
    logits = np.log(np.array([0.4, *[0.05] * 12], np.float32))
    assert_same(kept(ops.typical_p(logits, 0.5)), np.arange(1, 12))


@law("typical_p", all_logits(), fractions, fractions)
def test_a_larger_typical_p_keeps_no_less(ops, logits, p, q):
    """The sets of two p lie one within the other."""
    small, large = (set(kept(ops.typical_p(logits, x))) for x in sorted([p, q]))
    assert_that(small <= large, f"p = {min(p, q)} keeps {small}, p = {max(p, q)} keeps {large}")


# --- XTC --------------------------------------------------------------------------------------------------


@law("xtc", all_logits(), fractions, st.floats(0.01, 0.6), st.floats(0, 1, exclude_max=True))
def test_xtc_keeps_the_least_likely_of_the_top(ops, logits, probability, threshold, u):
    """If u < probability, of the ids with p_i >= threshold only the least likely stays (llama.cpp)."""
    rng, probs = Fixed(u), probabilities(logits)
    out = ops.xtc(logits, probability, threshold, rng)
    assert_that(not rng.values, "it took no random number")
    top = [i for i in by_rank(logits) if probs[i] >= threshold]
    if u < probability and top:
        least = min(i for i in top if logits[i] == logits[top[-1]])
        dropped = np.isin(np.arange(len(logits)), [i for i in top if i != least])
    else:
        dropped = np.zeros(len(logits), bool)
    if np.abs(probs - threshold).min() > EDGE:
        assert_same(out, np.where(dropped, -np.inf, logits).astype(np.float32))


# --- mirostat ---------------------------------------------------------------------------------------------


@law("surprise", all_logits())
def test_surprise_is_in_bits(ops, logits):
    """-log2 of softmax; -inf has an infinite surprise."""
    bits = ops.surprise(logits)
    assert_within(np.exp2(-bits.astype(np.float64)), probabilities(logits), 4 * PROBABILITY)


@law("mirostat", all_logits(), st.floats(-2, 20))
def test_mirostat_keeps_what_surprises_no_more_than_mu(ops, logits, mu):
    """An id stays if -log2 p_i <= mu; the likeliest always does (Basu et al. 2021)."""
    bits = [-math.log2(q) if q > 0 else math.inf for q in probabilities(logits)]
    clear = np.abs(np.array(bits) - mu) > 1e-4
    stays = ops.mirostat(logits, mu) > -np.inf
    limit = max(mu, min(bits)) + 1e-9
    assert_same(stays[clear], (np.array(bits) <= limit)[clear] | (logits == logits.max())[clear])


# --- temperature ------------------------------------------------------------------------------------------


@law("apply_temperature", all_logits(), st.floats(0.05, 20))
def test_temperature_divides(ops, logits, temperature):
    """softmax of what comes out is softmax(x / T) (Ackley et al. 1985)."""
    out = ops.apply_temperature(logits, temperature)
    assert_that(out.dtype == logits.dtype, f"{logits.dtype} went in, {out.dtype} came out")
    expected = softmax(logits.astype(np.float64) / temperature)
    assert_within(probabilities(out), expected, PROBABILITY)


@law("apply_temperature", all_logits())
def test_temperature_1_changes_no_probability(ops, logits):
    """x / 1 is x."""
    out = ops.apply_temperature(logits, 1.0)
    assert_within(probabilities(out), probabilities(logits), PROBABILITY)


@law("apply_temperature", all_logits(), st.floats(0.05, 20))
def test_temperature_keeps_the_order(ops, logits, temperature):
    """The likelier id stays no less likely."""
    out = ops.apply_temperature(logits, temperature)
    rising = out[np.argsort(logits, kind="stable")]
    assert_that(rising[1:] >= rising[:-1], f"of {logits} it made {out}")


@pytest.mark.filterwarnings("error")
@law("apply_temperature", all_logits())
def test_cold_is_greedy(ops, logits):
    """As T goes to 0 only the largest is left, without overflow."""
    for tiny in [5e-324, 1e-300, 1e-40]:
        cold = softmax(ops.apply_temperature(logits, tiny))
        assert_same(cold > 0, logits == logits.max())


@law("apply_temperature", all_logits())
def test_hot_is_uniform(ops, logits):
    """As T goes to infinity all that are left are equally likely."""
    flat = probabilities(ops.apply_temperature(logits, 1e300))
    assert_within(flat, (logits > -np.inf) / len(kept(logits)), PROBABILITY)


# --- the repetition penalty -------------------------------------------------------------------------------

penalties = st.floats(0.1, 10)


@law("repetition_penalty", all_logits(), penalties, st.data())
def test_seen_ids_become_less_likely(ops, logits, penalty, data):
    """x / penalty where x > 0, x * penalty where not (Keskar et al. 2019, section 4.1), for ids seen."""
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9), label="seen")
    expected = logits.astype(np.float64)
    for i in set(seen):
        expected[i] = expected[i] / penalty if expected[i] > 0 else expected[i] * penalty
    with np.errstate(invalid="ignore"):
        allowed = np.where(np.isfinite(expected), ONE_ROUNDING * np.abs(expected) + 1e-40, 0)
    assert_within(ops.repetition_penalty(logits, seen, penalty), expected, allowed)


@law("repetition_penalty", all_logits(), penalties, st.data())
def test_once_is_enough(ops, logits, penalty, data):
    """An id seen five times is punished as one seen once."""
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=4), label="seen")
    expected = ops.repetition_penalty(logits, seen, penalty)
    assert_same(ops.repetition_penalty(logits, seen * 5, penalty), expected)


@law("repetition_penalty", all_logits(), st.data())
def test_a_penalty_of_1_is_none(ops, logits, data):
    """Neither quotient nor product by 1 changes a bit."""
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=9), label="seen")
    assert_same(ops.repetition_penalty(logits, seen, 1.0), logits)


@law("repetition_penalty", all_logits(), penalties)
def test_nothing_seen_changes_nothing(ops, logits, penalty):
    """And what was given is what it was."""
    before = logits.copy()
    assert_same(ops.repetition_penalty(logits, [], penalty), before)
    ops.repetition_penalty(logits, [0], penalty)
    assert_same(logits, before)


@law("repetition_penalty")
def test_both_sides_of_0(ops):
    """2 becomes 1, -2 becomes -4, 0 and -inf stay, and who was not seen is left alone."""
    logits = np.array([2, -2, 0, 2, -np.inf], np.float32)
    for seen in [[0, 1, 2, 4], np.array([4, 2, 1, 0]), (0, 0, 1, 1, 2, 4)]:
        assert_same(ops.repetition_penalty(logits, seen, 2.0), np.array([1, -4, 0, 2, -np.inf], np.float32))


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@law("repetition_penalty")
def test_seen_ids_outside_the_vocabulary_are_refused(ops, bad):
    """They are no ids, and do not count from the end."""
    assert_refused(lambda: ops.repetition_penalty(np.zeros(3, np.float32), [0, bad], 1.1), f"id {bad} of 3")


# --- the other penalties ----------------------------------------------------------------------------------

few = st.lists(st.integers(0, 5), max_size=40)  # of six ids, so that sequences repeat
six = all_logits().filter(lambda x: len(x) >= 6)


@law("logit_bias", six, st.dictionaries(st.integers(0, 5), st.floats(-100, 100) | st.just(-math.inf)))
def test_a_bias_is_added(ops, logits, bias):
    """x_i + bias[i], and -inf bans the id."""
    expected = logits.astype(np.float64)
    for i, value in bias.items():
        expected[i] += value
    with np.errstate(invalid="ignore"):
        allowed = np.where(np.isfinite(expected), ONE_ROUNDING * np.abs(expected) + 1e-40, 0)
    before = logits.copy()
    assert_within(ops.logit_bias(logits, bias), expected, allowed)
    assert_same(logits, before)


@law("presence_penalty frequency_penalty", six, few, st.floats(-3, 3))
def test_penalties_count(ops, logits, seen, penalty):
    """x - penalty for an id seen, and x - n penalty for one seen n times."""
    once, each = logits.astype(np.float64), logits.astype(np.float64)
    for i in range(6):
        once[i] -= penalty * (i in seen)
        each[i] -= penalty * seen.count(i)
    for name, expected in (("presence_penalty", once), ("frequency_penalty", each)):
        with np.errstate(invalid="ignore"):
            allowed = np.where(np.isfinite(expected), ONE_ROUNDING * (np.abs(expected) + 1), 0)
        assert_within(getattr(ops, name)(logits, seen, penalty), expected, allowed)


def repeats(seen, i, breakers):
    """The most ids before an earlier `i` that are also the last ids seen, none of them a breaker."""
    longest = 0
    for at in (at for at, one in enumerate(seen) if one == i and i not in breakers):
        n = 0
        while n < at and seen[at - 1 - n] == seen[-1 - n] and seen[-1 - n] not in breakers:
            n += 1
        longest = max(longest, n)
    return longest


@law("dry", six, few, st.integers(1, 4), st.floats(1, 2), st.sets(st.integers(0, 5), max_size=2))
def test_dry_counts_what_an_id_would_repeat(ops, logits, seen, allowed_length, base, breakers):
    """x - multiplier base^(n - allowed_length) where the id would repeat n >= allowed_length ids."""
    expected = logits.astype(np.float64)
    for i in range(6):
        n = repeats(seen, i, breakers)
        expected[i] -= 0.8 * base ** (n - allowed_length) if n >= allowed_length else 0
    with np.errstate(invalid="ignore"):
        allowed = np.where(np.isfinite(expected), ONE_ROUNDING * (np.abs(expected) + 1), 0)
    assert_within(ops.dry(logits, seen, 0.8, base, allowed_length, breakers), expected, allowed)


@law("dry")
def test_dry_by_example(ops):
    """After 1 2 3 4 1 2 3 the id 4 would repeat three ids; a breaker at 2 leaves only one."""
    logits, seen = np.zeros(6, np.float32), [1, 2, 3, 4, 1, 2, 3]
    assert_same(ops.dry(logits, seen, 1.0, 2.0, 2, set()), np.array([0, 0, 0, 0, -2, 0], np.float32))
    assert_same(ops.dry(logits, seen, 1.0, 2.0, 2, {2}), logits)
    assert_same(ops.dry(logits, seen, 1.0, 2.0, 1, {2}), np.array([0, 0, 0, 0, -1, 0], np.float32))


@law("dry")
def test_a_long_repeat_stays_finite(ops):
    """The penalty of a text of one id does not overflow a float32."""
    out = ops.dry(np.zeros(2, np.float32), [1] * 3000, 0.8, 1.75, 2, set())
    assert_that(np.isfinite(out) & (out[::-1] != out), f"it made {out}")


@pytest.mark.parametrize("bad", [-1, 3, 2**40])
@law("logit_bias presence_penalty frequency_penalty dry")
def test_other_penalties_refuse_ids_outside_the_vocabulary(ops, bad):
    """They are no ids, and do not count from the end."""
    x = np.zeros(3, np.float32)
    assert_refused(lambda: ops.logit_bias(x, {bad: 1.0}), f"id {bad} of 3")
    assert_refused(lambda: ops.presence_penalty(x, [0, bad], 1.0), f"id {bad} of 3")
    assert_refused(lambda: ops.frequency_penalty(x, [0, bad], 1.0), f"id {bad} of 3")
    assert_refused(lambda: ops.dry(x, [0, bad], 1.0, 2.0, 2, set()), f"id {bad} of 3")


# --- log probabilities ------------------------------------------------------------------------------------


@law("log_softmax", all_logits())
def test_log_softmax_as_pytorch(ops, logits):
    """x_i - log sum_j exp(x_j), as torch.log_softmax of doubles."""
    expected = torch.log_softmax(torch.from_numpy(logits.astype(np.float64)), -1).numpy()
    found = ops.log_softmax(logits)
    assert_same(found == -np.inf, logits == -np.inf)
    left = kept(logits)
    assert_within(found[left], expected[left], 64 * EXACT_64)


@law("log_softmax", all_logits(), st.floats(-9, 9))
def test_log_softmax_of_shifted_logits(ops, logits, shift):
    """A number added to all logits changes nothing but rounding."""
    left = kept(logits)
    found, shifted = ops.log_softmax(logits), ops.log_softmax(logits + np.float32(shift))
    assert_within(shifted[left], found[left], PROBABILITY * 10)


# --- sample --------------------------------------------------------------------------------------------


@law("sample", all_logits(), st.floats(0, 1, exclude_max=True))
def test_sample_inverts_the_cumulated_distribution(ops, logits, u):
    """It takes the first id whose cumulated probability exceeds u, one random number for one id."""
    rng = Fixed(u)
    chosen, probs = ops.sample(logits, rng), probabilities(logits)
    assert_that(not rng.values, "it took no random number")
    below, up_to = probs[:chosen].sum(), probs[: chosen + 1].sum()
    assert_that(below <= u + EDGE and up_to >= u - EDGE, f"u is {u}: id {chosen} is from {below} to {up_to}")


@law("sample", all_logits())
def test_sample_never_takes_a_filtered_id(ops, logits):
    """-inf has no share, not even at the ends of [0, 1)."""
    for u in [0.0, 5e-324, 2.0**-53, 0.5, 1 - 2.0**-53]:
        chosen = ops.sample(logits, Fixed(u))
        assert_that(logits[chosen] > -np.inf, f"u = {u} chose id {chosen}, which was filtered out")


@law("sample", all_logits())
def test_sample_gives_a_plain_int(ops, logits):
    """As greedy does."""
    chosen = ops.sample(logits, Fixed(0.5))
    assert_that(type(chosen) is int, f"it is a {type(chosen)}, an int is wanted")


def chi_square_p_value(observed, expected):
    """P(X >= x) of the chi-square distribution, by the regularised upper incomplete gamma function."""
    statistic = ((observed - expected) ** 2 / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(expected) - 1) / 2), torch.tensor(statistic / 2)).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@law("sample apply_temperature")
def test_samples_are_as_likely_as_softmax_says(ops, temperature):
    """Chi-square of many samples. Samples of another temperature do not pass."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=12).astype(np.float32)
    logits[5] = -np.inf
    n, scaled = DRAWS, ops.apply_temperature(logits, temperature)
    counts = np.bincount([ops.sample(scaled, rng) for _ in range(n)], minlength=12)
    alive = np.arange(12) != 5
    fair, wrong = (n * softmax(logits[alive] / (temperature * by)) for by in (1, 1.2))
    p, p_wrong = (chi_square_p_value(counts[alive], expected) for expected in (fair, wrong))
    assert_that(counts[5] == 0 and p > LEAST_P_VALUE, f"a fair sampler does so with probability {p}")
    assert_that(p_wrong < LEAST_P_VALUE, "samples of another temperature pass too")


@law("sample", seeds)
def test_the_same_seed_samples_the_same_ids(ops, seed):
    """Chance comes from the generator that is handed in, and from nowhere else."""
    logits = np.random.default_rng(1).normal(size=50).astype(np.float32)
    runs = []
    for _ in "ab":
        rng = np.random.default_rng(seed)
        runs.append([ops.sample(logits, rng) for _ in range(8)])
    assert_same(*runs)


@pytest.mark.parametrize("bad", [[0, math.nan, 1], [math.inf, 0, 0], [-math.inf] * 3, [math.nan] * 3])
@law("greedy")
def test_greedy_takes_nothing_from_nan_or_infinity(ops, bad):
    """Garbage is an error, not id 0."""
    assert_refused(lambda: ops.greedy(np.float32(bad)), f"a choice among {bad}")


@pytest.mark.parametrize("bad", [[0, math.nan, 1], [math.inf, 0, 0], [-math.inf] * 3, [math.nan] * 3])
@law("sample")
def test_sample_takes_nothing_from_nan_or_infinity(ops, bad):
    """Garbage is an error, not id 0."""
    assert_refused(lambda: ops.sample(np.float32(bad), Fixed(0.5)), f"a choice among {bad}")
