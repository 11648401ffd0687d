"""From logits to one token id.

Each step is a pure function: float32 (V,) in, the same shape out. A filter gives an id that it drops -inf.
All chance comes from the `rng` of the caller. NaN and infinity raise an error: they never give an id.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from ..config import Array
from ..errors import NumericsError, ParameterError
from ..functional import softmax


def greedy(logits: Array) -> int:
    """argmax; the lowest id on ties."""
    _require_finite(logits)
    return int(logits.argmax())


def repetition_penalty(logits: Array, seen_ids: Sequence[int] | Array, penalty: float) -> Array:
    """x / penalty where x > 0, x * penalty elsewhere: once for every id seen (Keskar et al. 2019, 4.1)."""
    ids = np.asarray(seen_ids, np.int64)
    if ids.size and (ids.min() < 0 or ids.max() >= len(logits)):
        raise ParameterError(
            f"seen ids from {ids.min()} to {ids.max()}, they must lie in 0..{len(logits) - 1}"
        )
    x, out, penalty = logits[ids], logits.copy(), np.float64(penalty)
    with np.errstate(over="ignore"):  # the sampler refuses an infinite result
        out[ids] = np.where(x > 0, x / penalty, x * penalty)
    return out


def apply_temperature(logits: Array, temperature: float) -> Array:
    """(x - max x) / temperature (Ackley et al. 1985): no temperature above 0 overflows."""
    with np.errstate(over="ignore"):
        x: Array = (logits - logits.max()) / np.float64(temperature)
        return x.astype(logits.dtype)


def top_k(logits: Array, k: int) -> Array:
    """The k largest and no more; among equals the lowest ids (Fan et al. 2018)."""
    k = int(k)  # -k of an unsigned NumPy integer is a large number
    if k >= len(logits):
        return logits
    kth = np.partition(logits, -k)[-k]
    keep = logits > kth
    keep[np.flatnonzero(logits == kth)[: k - keep.sum()]] = True
    return np.where(keep, logits, -np.inf)


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


def sample(logits: Array, rng: np.random.Generator) -> int:
    """One id with probability softmax(logits): the first with a cumulated probability above u ~ U[0, 1)."""
    _require_finite(logits)
    left = np.flatnonzero(logits > -np.inf)
    cdf = np.cumsum(softmax(logits[left].astype(np.float64)))
    return int(left[np.searchsorted(cdf, rng.random() * cdf[-1], side="right")])


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


_RULES: dict[str, tuple[type, Callable[[Any], bool], str]] = {
    "temperature": (Real, lambda x: 0 <= x < math.inf, "a finite number, 0 or above"),
    "top_k": (Integral, lambda x: x > 0, "a whole number above 0"),
    "top_p": (Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "min_p": (Real, lambda x: 0 <= x <= 1, "a number from 0 to 1"),
    "repetition_penalty": (Real, lambda x: 0 < x < math.inf, "a finite number above 0"),
    "seed": (Integral, lambda x: x >= 0, "a whole number, 0 or above"),
}


@dataclass(frozen=True)
class Sampler:
    """The choice of the next id. Temperature 0 takes the likeliest; None leaves a filter out.

    The order is llama.cpp's: repetition penalty, top-k, top-p, min-p, temperature, sample. A sampler keeps
    no state: several threads can use one. The caller owns the `rng`, as it owns the cache.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            kind, in_range, wanted = _RULES[field.name]
            if value is None and field.default is None:
                continue
            if isinstance(value, bool) or not isinstance(value, kind) or not in_range(value):
                raise ParameterError(f"{field.name} is {value!r}, it must be {wanted}")

    def new_rng(self) -> np.random.Generator:
        """The source of chance for one generation: the same each time if there is a seed."""
        return np.random.default_rng(self.seed)

    def __call__(self, logits: Array, seen_ids: Sequence[int], rng: np.random.Generator) -> int:
        if self.repetition_penalty != 1:
            logits = repetition_penalty(logits, seen_ids, self.repetition_penalty)
        _require_finite(logits)
        if self.temperature == 0:
            return greedy(logits)
        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
        logits = apply_temperature(logits, self.temperature)
        return sample(logits, rng)
