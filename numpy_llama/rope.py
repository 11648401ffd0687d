"""The kinds of RoPE scaling, by which a model reads more positions than those of its training.

Each kind has the divisor of each theta_j, and a factor of the length of the turned pairs. functional.py
needs no more. The angles of a model are computed once, for its whole context. DynamicScaling and
LongRopeScaling depend on the size of that context, `ModelArgs.max_seq_len`. A short text therefore has the
same angles as the longest text of that model.

    class            type        divides theta_j by                                  multiplies lengths by
    LinearScaling    "linear"    factor                                              1
    DynamicScaling   "dynamic"   s^(j / (Dh / 2 - 1)), s from the context            1
    Llama3Scaling    "llama3"    1 for fast turns, factor for slow ones, a ramp      1
    YarnScaling      "yarn"      1 for the first pairs, factor for the last, a ramp  length_factor
    LongRopeScaling  "longrope"  one of two lists, by the context                    length_factor
    ExplicitScaling  "explicit"  a list                                              length_factor
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from .config import Array, ModelArgs, RopeScaling
from .errors import ConfigError


@dataclass(frozen=True)
class LinearScaling(RopeScaling):
    """All positions are divided by the factor (Chen et al. 2023, "position interpolation")."""

    type: ClassVar[str] = "linear"
    length_factor = 1.0
    factor: float

    def divisors(self, freqs: Array, rope_theta: float, context: int) -> Array:
        return np.full(len(freqs), self.factor)

    def describe(self, context: int) -> str:
        return f"linear, factor {self.factor:g}"


@dataclass(frozen=True)
class DynamicScaling(RopeScaling):
    """A larger rope_theta for a longer context ("dynamic NTK"): the first pair is kept, the last slowed by s.

    s = 1 + factor * (context / original_max_seq_len - 1), at least 1. Hugging Face computes s from the length
    of each text. This class computes it once, from the context.
    """

    type: ClassVar[str] = "dynamic"
    length_factor = 1.0
    factor: float
    original_max_seq_len: int

    def divisors(self, freqs: Array, rope_theta: float, context: int) -> Array:
        s = 1 + self.factor * max(context / self.original_max_seq_len - 1, 0.0)
        return s ** np.linspace(0, 1, len(freqs))

    def describe(self, context: int) -> str:
        by = "as trained, because" if context <= self.original_max_seq_len else "slowed, because"
        return f"dynamic, factor {self.factor:g}, {_compared(by, context, self.original_max_seq_len)}"


@dataclass(frozen=True)
class Llama3Scaling(RopeScaling):
    """Llama 3.1: slow turns become `factor` times slower, fast ones are kept, with a ramp in between.

    The speed of a pair is its number of full turns within the original context. Llama 3.1 has factor 8,
    Llama 3.2 1B and 3B have factor 32. Both have the same other numbers.
    """

    type: ClassVar[str] = "llama3"
    length_factor = 1.0
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self, "low_freq_factor", "high_freq_factor")

    def divisors(self, freqs: Array, rope_theta: float, context: int) -> Array:
        turns = self.original_max_seq_len * freqs.astype(np.float64) / (2 * math.pi)
        low, high = self.low_freq_factor, self.high_freq_factor
        keep = np.clip((turns - low) / (high - low), 0, 1)  # 0: slow, 1: fast
        return 1 / (keep + (1 - keep) / self.factor)

    def describe(self, context: int) -> str:
        return f"llama3, factor {self.factor:g}"


@dataclass(frozen=True)
class YarnScaling(RopeScaling):
    """YaRN (Peng et al. 2023): as Llama 3.1 with a ramp over the pairs, and longer queries and keys.

    Pair(r) makes r turns within the original context. Pairs up to Pair(beta_fast) are kept, pairs from
    Pair(beta_slow) on are slowed; `truncate` rounds both limits outwards. The paper's length_factor is
    0.1 ln(factor) + 1: `yarn_length`.
    """

    type: ClassVar[str] = "yarn"
    factor: float
    original_max_seq_len: int
    length_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_order(self, "beta_slow", "beta_fast")

    def check(self, args: ModelArgs) -> None:
        if not args.rope_theta > 1:
            raise ConfigError(f"rope_theta is {args.rope_theta}, with YaRN it must be above 1")

    def divisors(self, freqs: Array, rope_theta: float, context: int) -> Array:
        n = len(freqs)
        ends = [
            n * math.log(self.original_max_seq_len / (2 * math.pi * turns)) / math.log(rope_theta)
            for turns in (self.beta_fast, self.beta_slow)
        ]
        if self.truncate:
            ends = [math.floor(ends[0]), math.ceil(ends[1])]
        low, high = max(ends[0], 0), min(ends[1], 2 * n - 1)
        ramp: Array = (np.arange(n) - low) / max(high - low, 0.001)
        slow = np.clip(ramp, 0, 1)  # 0: kept, 1: slowed
        return 1 / (1 - slow + slow / self.factor)

    def describe(self, context: int) -> str:
        return f"yarn, factor {self.factor:g}, original context {self.original_max_seq_len:,}"


@dataclass(frozen=True)
class LongRopeScaling(RopeScaling):
    """LongRoPE (Ding et al. 2024): two lists of divisors, found by search.

    A context above the original one takes `long_factor`, any other takes `short_factor`. A model stretched
    s times has the length factor sqrt(1 + ln(s) / ln(original_max_seq_len)) in both: `longrope_length`.
    """

    type: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_seq_len: int
    length_factor: float

    def check(self, args: ModelArgs) -> None:
        _check_list("short_factor", self.short_factor, args)
        _check_list("long_factor", self.long_factor, args)

    def divisors(self, freqs: Array, rope_theta: float, context: int) -> Array:
        return np.array(self.long_factor if context > self.original_max_seq_len else self.short_factor)

    def describe(self, context: int) -> str:
        which = "long" if context > self.original_max_seq_len else "short"
        return f"longrope, {_compared(f'its {which} factors, because', context, self.original_max_seq_len)}"


@dataclass(frozen=True)
class ExplicitScaling(RopeScaling):
    """Any divisors, one for each pair, as the tensor rope_freqs.weight of a GGUF file holds them."""

    type: ClassVar[str] = "explicit"
    factors: tuple[float, ...]
    length_factor: float = 1.0

    def check(self, args: ModelArgs) -> None:
        _check_list("factors", self.factors, args)

    def divisors(self, freqs: Array, rope_theta: float, context: int) -> Array:
        return np.array(self.factors)

    def describe(self, context: int) -> str:
        return f"explicit, divisors from {min(self.factors):g} to {max(self.factors):g}"


def yarn_length(factor: float, m: float = 1.0) -> float:
    """YaRN's length factor of queries and keys: 0.1 m ln(factor) + 1 (Peng et al. 2023, section 3.4)."""
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_length(factor: float, original_max_seq_len: int) -> float:
    """LongRoPE's length factor of both: sqrt(1 + ln(factor) / ln(original)) (Ding et al. 2024)."""
    return math.sqrt(1 + math.log(factor) / math.log(original_max_seq_len)) if factor > 1 else 1.0


def _compared(what: str, context: int, original: int) -> str:
    than = "above" if context > original else "not above"
    return f"{what} the context of {context:,} is {than} {original:,}"


def _check_order(scaling: RopeScaling, less: str, more: str) -> None:
    low, high = getattr(scaling, less), getattr(scaling, more)
    if not high > low:
        raise ConfigError(f"{more} is {high}, it must be above {less} {low}")


def _check_list(name: str, factors: tuple[float, ...], args: ModelArgs) -> None:
    if len(factors) != args.head_dim // 2:
        wanted = f"with head_dim {args.head_dim} it must have {args.head_dim // 2}"
        raise ConfigError(f"{name} has {len(factors)} numbers, {wanted}")
