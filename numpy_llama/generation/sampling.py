"""From logits to one token id.

Each step is a pure function: float32 (V,) in, the same shape out. A filter gives an id that it drops -inf.
All chance comes from the `rng` of the caller. NaN and infinity raise an error: they never give an id.
"""

import math
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import KW_ONLY, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from ..config import Array
from ..errors import NumericsError, ParameterError, escape, is_whole
from ..functional import softmax


def greedy(logits: Array) -> int:
    """argmax; the lowest id on ties."""
    _require_finite(logits)
    return int(logits.argmax())


def logit_bias(logits: Array, bias: Mapping[int, float]) -> Array:
    """x_i + bias[i]; a bias of -inf bans an id (OpenAI's API)."""
    ids = _as_ids([*bias], len(logits))
    return _replaced(logits, ids, logits[ids] + np.array([*bias.values()], np.float64))


def repetition_penalty(logits: Array, seen_ids: Sequence[int] | Array, penalty: float) -> Array:
    """x / penalty where x > 0, x * penalty elsewhere: once for every id seen (Keskar et al. 2019, 4.1)."""
    ids = _as_ids(seen_ids, len(logits))
    x, penalty = logits[ids], np.float64(penalty)
    with np.errstate(over="ignore"):
        return _replaced(logits, ids, np.where(x > 0, x / penalty, x * penalty))


def presence_penalty(logits: Array, seen_ids: Sequence[int] | Array, penalty: float) -> Array:
    """x - penalty, once for every id seen (OpenAI's API)."""
    ids = _as_ids(seen_ids, len(logits))
    return _replaced(logits, ids, logits[ids] - np.float64(penalty))


def frequency_penalty(logits: Array, seen_ids: Sequence[int] | Array, penalty: float) -> Array:
    """x - n * penalty for an id that is seen n times (OpenAI's API)."""
    ids, n = np.unique(_as_ids(seen_ids, len(logits)), return_counts=True)
    return _replaced(logits, ids, logits[ids] - n * np.float64(penalty))


def dry(
    logits: Array,
    seen_ids: Sequence[int] | Array,
    multiplier: float,
    base: float = 1.75,
    allowed_length: int = 2,
    breakers: Set[int] = frozenset(),
) -> Array:
    """x - multiplier * base^(n - allowed_length) for an id that would repeat n >= allowed_length ids seen.

    n is the largest for which the last n ids occur earlier with this id behind them. They never contain an id
    of `breakers`, and no breaker gets a penalty. DRY, "don't repeat yourself", by p-e-w, as in llama.cpp.
    """
    seen, repeats = _as_ids(seen_ids, len(logits)), np.zeros(len(logits), np.int64)
    allowed_length = min(allowed_length, len(seen) + 1)  # no repeat has more ids, and an int64 holds it
    # A longer repeat would give a penalty above the largest float32.
    most = allowed_length + (int(np.log(np.finfo(np.float32).max) / np.log(base)) if base > 1 else 0)
    n, at = 0, np.arange(1, len(seen))  # the places of the ids behind the last n ids
    while n < most and seen[n:].size and seen[-1 - n] not in breakers:
        at = at[at > n]
        at = at[seen[at - 1 - n] == seen[-1 - n]]
        if not at.size:
            break
        n += 1
        repeats[seen[at]] = n
    repeats[_as_ids([*breakers], len(logits))] = 0
    ids = np.flatnonzero(repeats >= allowed_length)
    penalties = multiplier * np.float64(base) ** (repeats[ids] - allowed_length)
    return _replaced(logits, ids, logits[ids] - penalties)


def _as_ids(ids: Sequence[int] | Array, V: int) -> Array:
    out = np.asarray(ids, np.int64)
    if out.size and (out.min() < 0 or out.max() >= V):
        raise ParameterError(f"there are ids from {out.min()} to {out.max()}, they must lie in 0..{V - 1}")
    return out


def _replaced(logits: Array, ids: Array, values: Array) -> Array:
    out = logits.copy()
    with np.errstate(over="ignore"):  # the sampler refuses an infinite result
        out[ids] = values
    return out


def apply_temperature(logits: Array, temperature: float) -> Array:
    """(x - max x) / temperature (Ackley et al. 1985): no temperature above 0 overflows."""
    with np.errstate(over="ignore"):
        x: Array = (logits - logits.max()) / np.float64(temperature)
        return x.astype(logits.dtype)


def top_n_sigma(logits: Array, n: float) -> Array:
    """Keep x_i >= max x - n sigma, the standard deviation of the logits (Tang et al. 2024)."""
    sigma = logits[logits > -np.inf].std(dtype=np.float64)
    with np.errstate(over="ignore"):  # a very large n keeps all
        return np.where(logits >= logits.max() - n * sigma, logits, -np.inf)


def top_k(logits: Array, k: int) -> Array:
    """The k largest and no more; among equals the lowest ids (Fan et al. 2018)."""
    k = int(k)  # -k of an unsigned NumPy integer is a large number
    left = logits[logits > -np.inf]  # partition is slow with many equal numbers
    if k >= len(left):
        return logits
    kth = np.partition(left, -k)[-k]
    keep = logits > kth
    keep[np.flatnonzero(logits == kth)[: k - keep.sum()]] = True
    return np.where(keep, logits, -np.inf)


def typical_p(logits: Array, p: float) -> Array:
    """The ids of the most typical surprise -log p_i, until their probabilities have the sum p.

    In rising order of |-log p_i - H|, H the entropy, drop where cumsum - p_i > p (Meister et al. 2022).
    """
    logp = log_softmax(logits)
    probs = np.exp(logp)
    entropy = -(probs[probs > 0] * logp[probs > 0]).sum()
    # Ids of a surprise above 2 H come last, and all below (1 - p) / V together have less than 1 - p. So ids
    # for which both is true come after the sum p: they need no sort.
    likely = np.flatnonzero(probs >= min(np.exp(-2 * entropy), (1 - p) / len(probs)))
    order = likely[np.argsort(np.abs(logp[likely] + entropy), kind="stable")]
    kept = order[np.cumsum(probs[order]) - probs[order] <= p]
    return _replaced(np.full_like(logits, -np.inf), kept, logits[kept])


def top_p(logits: Array, p: float) -> Array:
    """The smallest set with probabilities of sum p: in falling order, drop where cumsum - p_i > p.

    Nucleus sampling (Holtzman et al. 2020, eq. 2) by the rule of Meta's code. The largest always stays.
    """
    probs = softmax(logits.astype(np.float64))
    # All ids below (1 - p) / V together have less than 1 - p. The sum p comes before them: they need no sort.
    falling = -np.sort(-probs[probs >= (1 - p) / len(probs)])
    return top_k(logits, int(np.count_nonzero(np.cumsum(falling) - falling <= p)))


def min_p(logits: Array, p: float) -> Array:
    """Keep p_i >= p * max p: a likelier first choice leaves fewer others (Nguyen et al. 2024)."""
    probs = softmax(logits)
    return np.where(probs >= p * probs.max(), logits, -np.inf)


def xtc(logits: Array, probability: float, threshold: float, rng: np.random.Generator) -> Array:
    """Exclude top choices: with this probability, of the ids with p_i >= threshold keep the least likely.

    By p-e-w, as in llama.cpp. It takes one random number. Among equals the lowest id stays.
    """
    if rng.random() >= probability:
        return logits
    probs = softmax(logits)
    top = (probs >= threshold) & (logits > -np.inf)  # at threshold 0 not the ids that are filtered already
    out = np.where(top, -np.inf, logits)
    least = np.where(top, probs, np.inf).argmin()
    out[least] = logits[least]
    return out


def mirostat(logits: Array, mu: float) -> Array:
    """Keep -log2 p_i <= mu, and always the likeliest (mirostat 2 of Basu et al. 2021)."""
    bits = surprise(logits)
    with np.errstate(over="ignore"):  # a very large mu keeps all
        return np.where(bits <= max(mu, bits.min()), logits, -np.inf)


def surprise(logits: Array) -> Array:
    """-log2 p_i: how unexpected each id is, in bits."""
    with np.errstate(divide="ignore"):
        return -np.log2(softmax(logits))


def sample(logits: Array, rng: np.random.Generator) -> int:
    """One id with probability softmax(logits): the first with a cumulated probability above u ~ U[0, 1)."""
    _require_finite(logits)
    x = logits.astype(np.float64)
    x -= x.max()  # in place: new arrays of this size cost more than the arithmetic
    cdf = np.cumsum(np.exp(x, out=x), out=x)  # times the sum, which softmax would divide by
    return int(np.searchsorted(cdf, rng.random() * cdf[-1], side="right"))


class Logprobs(NamedTuple):
    """The log probability of a chosen id, and the likeliest ids with theirs, in falling order."""

    chosen: float
    top: list[tuple[int, float]]


def logprobs(logits: Array, chosen: int, n: int) -> Logprobs:
    """`log_softmax` of the chosen id and of the n likeliest; among equals the lowest ids."""
    logp = log_softmax(logits)
    likeliest = np.flatnonzero(top_k(logits, n) > -np.inf) if n else np.empty(0, np.int64)
    order = likeliest[np.argsort(-logits[likeliest], kind="stable")]
    return Logprobs(float(logp[chosen]), list(zip(order.tolist(), logp[order].tolist(), strict=True)))


def log_softmax(logits: Array) -> Array:
    """x_i - log sum_j exp(x_j), in float64."""
    x = logits.astype(np.float64) - logits.max()
    out: Array = x - np.log(np.exp(x).sum())
    return out


def _require_finite(logits: Array) -> None:
    # The maximum is NaN or +inf if any logit is, and -inf if all are. Some logits may be -inf.
    highest = logits.max()
    if not np.isfinite(highest):
        raise NumericsError(f"the largest logit is {highest}, it must be a finite number")


_FINITE = (Real, lambda x: -math.inf < x < math.inf, "a finite number")
_NOT_NEGATIVE = (Real, lambda x: 0 <= x < math.inf, "a finite number, 0 or above")
_FRACTION = (Real, lambda x: 0 <= x <= 1, "a number from 0 to 1")
_COUNT = (Integral, lambda x: x > 0, "a whole number above 0")
_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": _NOT_NEGATIVE,
    "top_k": _COUNT,
    "top_p": _FRACTION,
    "min_p": _FRACTION,
    "repetition_penalty": (Real, lambda x: 0 < x < math.inf, "a finite number above 0"),
    "seed": (Integral, lambda x: x >= 0, "a whole number, 0 or above"),
    "logit_bias": (
        Mapping,
        lambda x: all(map(_is_id, x)) and all(map(_is_bias, x.values())),
        "a mapping from ids to numbers, each finite or -inf",
    ),
    "presence_penalty": _FINITE,
    "frequency_penalty": _FINITE,
    "penalty_window": _COUNT,
    "dry_multiplier": _NOT_NEGATIVE,
    "dry_base": (Real, lambda x: 1 <= x < math.inf, "a finite number, 1 or above"),
    "dry_allowed_length": _COUNT,
    "dry_breakers": (Set, lambda x: all(map(_is_id, x)), "a set of ids"),
    "top_n_sigma": _NOT_NEGATIVE,
    "typical_p": _FRACTION,
    "xtc_probability": _FRACTION,
    "xtc_threshold": _FRACTION,
    "mirostat_tau": _NOT_NEGATIVE,
    "mirostat_eta": _NOT_NEGATIVE,
}


def _is_id(x: Any) -> bool:
    return is_whole(x) and x >= 0


def _is_bias(x: Any) -> bool:
    return isinstance(x, Real) and not isinstance(x, bool) and -math.inf <= float(x) < math.inf


@dataclass
class SamplerState:
    """What changes from one id to the next. A generation owns it, as it owns the cache."""

    rng: np.random.Generator
    mu: float = math.inf  # mirostat's limit of the surprise, in bits


@dataclass(frozen=True)
class Sampler:
    """The choice of the next id. Temperature 0 takes the likeliest; None leaves a filter out.

    The order is that of llama.cpp: logit bias, penalties (repetition, presence, frequency), DRY, top-n-sigma,
    top-k, typical-p, top-p, min-p, XTC, temperature, mirostat, sample. At temperature 0 the choice follows
    DRY. The penalties count the last `penalty_window` ids of prompt and text; None: all. DRY counts all.
    A sampler keeps no state, so several threads can use one: see `new_state`.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None
    _: KW_ONLY
    logit_bias: Mapping[int, float] | None = field(default=None, hash=False)
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    penalty_window: int | None = None
    dry_multiplier: float = 0.0
    dry_base: float = 1.75
    dry_allowed_length: int = 2
    dry_breakers: Set[int] = field(default=frozenset(), hash=False)
    top_n_sigma: float | None = None
    typical_p: float | None = None
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.1
    mirostat_tau: float | None = None
    mirostat_eta: float = 0.1

    def __post_init__(self) -> None:
        for one in fields(self):
            value = getattr(self, one.name)
            kind, in_range, wanted = _RULES[one.name]
            if value is None and one.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not in_range(value):
                raise ParameterError(f"{one.name} is {escape(value, 60)}, it must be {wanted}")

    def new_state(self) -> SamplerState:
        """The state of one generation. It begins the same each time if there is a seed."""
        mu = math.inf if self.mirostat_tau is None else 2 * float(self.mirostat_tau)
        return SamplerState(np.random.default_rng(self.seed), mu)

    @property
    def penalizes(self) -> bool:
        """Whether the ids so far change the logits."""
        penalties = self.presence_penalty, self.frequency_penalty, self.dry_multiplier
        return self.repetition_penalty != 1 or any(penalties)

    def penalized(self, logits: Array, seen_ids: Sequence[int]) -> Array:
        """The logits after the steps that temperature 0 has too."""
        if self.logit_bias:
            logits = logit_bias(logits, self.logit_bias)
        if self.penalizes:
            seen = np.asarray(seen_ids, np.int64)
            seen = seen[seen < len(logits)]  # a prompt may have an id that only pads the embedding
            recent = seen if self.penalty_window is None else seen[-int(self.penalty_window) :]
            if self.repetition_penalty != 1:
                logits = repetition_penalty(logits, recent, self.repetition_penalty)
            if self.presence_penalty:
                logits = presence_penalty(logits, recent, self.presence_penalty)
            if self.frequency_penalty:
                logits = frequency_penalty(logits, recent, self.frequency_penalty)
            if self.dry_multiplier:
                how = self.dry_multiplier, self.dry_base, self.dry_allowed_length, self.dry_breakers
                logits = dry(logits, seen, *how)
        _require_finite(logits)
        return logits

    def __call__(self, logits: Array, seen_ids: Sequence[int], state: SamplerState) -> int:
        logits = self.penalized(logits, seen_ids)
        if self.temperature == 0:
            return greedy(logits)
        if self.top_n_sigma is not None:
            logits = top_n_sigma(logits, self.top_n_sigma)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        left = np.flatnonzero(logits > -np.inf)  # the following steps compute these only
        logits = logits[left]
        if self.typical_p is not None:
            logits = typical_p(logits, self.typical_p)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        if self.xtc_probability:
            logits = xtc(logits, self.xtc_probability, self.xtc_threshold, state.rng)
        logits = apply_temperature(logits, self.temperature)
        if self.mirostat_tau is not None:
            bits, logits = surprise(logits), mirostat(logits, state.mu)
        token = sample(logits, state.rng)
        if self.mirostat_tau is not None:  # by the surprise before the cut, as in the paper
            state.mu -= self.mirostat_eta * (float(bits[token]) - self.mirostat_tau)
        return int(left[token])
