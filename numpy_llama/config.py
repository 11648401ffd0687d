"""The numbers that make one LLaMA different from another. They come from the checkpoint.

Letters used in every shape comment of this package, in Python and in C:

    B batch            D dim: the width of the residual stream      K n_kv_heads: key/value heads
    T new tokens       H n_heads: query heads                       F hidden_dim: width of the FFN
    S all positions    Dh head_dim: the width of one head           V vocab_size
"""

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from numpy.typing import NDArray

from .errors import ConfigError

Array = NDArray[Any]

# The largest sizes that a model may have. They are checked before anything is computed from them.
LIMITS = {
    "dim": 1 << 20,
    "n_layers": 512,
    "n_heads": 1 << 16,
    "n_kv_heads": 1 << 16,
    "head_dim": 1024,
    "hidden_dim": 1 << 24,
    "vocab_size": 1 << 24,
    "max_seq_len": 1 << 20,  # the angles of all positions are computed on loading
    "original_max_seq_len": 1 << 20,
}


class RopeScaling(ABC):
    """RoPE stretched beyond the context of the training. rope.py has the kinds.

    Pair j turns by theta_j / divisors[j] a position, and its length is multiplied by `length_factor`.
    """

    type: ClassVar[str]
    length_factor: float

    def __post_init__(self) -> None:
        _check(self, 1e-30, 1e38, "a number from 1e-30 to 1e38")  # a divisor of 1e30 stops a pair

    @abstractmethod
    def divisors(self, freqs: Array, rope_theta: float, context: int) -> Array:
        """The divisor of each theta_j, in a model of `context` positions -> (Dh / 2,) float64."""

    @abstractmethod
    def describe(self, context: int) -> str:
        """The kind and its numbers in a few words, and the effect of the size of the context."""

    def check(self, args: "ModelArgs") -> None:  # noqa: B027  # most kinds fit all models
        """ConfigError if this does not fit a model of these arguments."""


@dataclass(frozen=True)
class ModelArgs:
    """Hyperparameters, under the names of Meta's params.json.

    `norm_eps` and `rope_theta` have no default, for the generations differ. LLaMA 1 has 1e-6 and 1e4,
    Llama 2 has 1e-5 and 1e4, Llama 3 has 1e-5 and 5e5. `rope_theta` is the base; theta_j is an angle.
    """

    dim: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    hidden_dim: int
    vocab_size: int
    norm_eps: float
    rope_theta: float
    max_seq_len: int
    rope_scaling: RopeScaling | None = None
    sliding_window: int | None = None  # Mistral 7B v0.1: a token sees this many positions, its own included

    def __post_init__(self) -> None:
        _check(self)
        if not isinstance(self.rope_scaling, RopeScaling | None):
            raise ConfigError(f"rope_scaling is {self.rope_scaling!r}, it must be a RopeScaling or None")
        if not self.norm_eps < 1 <= self.rope_theta < 1e15:
            raise ConfigError(
                f"norm_eps is {self.norm_eps} and rope_theta {self.rope_theta}, "
                "they must be below 1, and from 1 to 1e15"
            )
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads is {self.n_heads}, it must be a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, RoPE turns pairs: it must be even")
        if self.rope_scaling is not None:
            self.rope_scaling.check(self)


def _check(
    args: RopeScaling | ModelArgs,
    least: float = 5e-324,
    most: float = sys.float_info.max,
    wanted: str = "a finite number above 0",
) -> None:
    for field in fields(args):  # type: ignore[arg-type]  # every kind of RopeScaling is a dataclass
        value, limit = getattr(args, field.name), LIMITS.get(field.name, sys.maxsize)
        whole = field.type is int or (field.type == int | None and value is not None)
        if whole and not (type(value) is int and 0 < value <= limit):
            raise ConfigError(f"{field.name} is {value!r}, it must be a whole number from 1 to {limit}")
        numbers = {field.name: value} if field.type is float else {}
        if isinstance(value, tuple):
            numbers = {f"{field.name}[{i}]": x for i, x in enumerate(value)}
        for name, x in numbers.items():
            if isinstance(x, bool) or not isinstance(x, int | float) or not least <= x <= most:
                raise ConfigError(f"{name} is {x!r}, it must be {wanted}")
