"""The numbers that make one LLaMA different from another. They come from the checkpoint.

Letters used in every shape comment of this package, in Python and in C:

    B batch            D dim: the width of the residual stream      K n_kv_heads: key/value heads
    T new tokens       H n_heads: query heads                       F hidden_dim: width of the FFN
    S all positions    Dh head_dim: the width of one head           V vocab_size
"""

import sys
from dataclasses import dataclass, fields

from .errors import ConfigError

# The largest sizes that anyone could mean. They are checked before anything is computed from them.
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


@dataclass(frozen=True)
class RopeScaling:
    """A stretching of RoPE beyond the trained context.

    "llama3": Llama 3.1 slows the slow turns only (its model card); it has factor 8, Llama 3.2 1B and 3B
    have factor 32, the rest is the same in both. "linear": all positions are divided by the factor (Chen et
    al. 2023), the other fields mean nothing.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192
    type: str = "llama3"

    def __post_init__(self) -> None:
        _check(self)
        if self.type not in ("llama3", "linear"):
            raise ConfigError(f"the RoPE scaling is {self.type!r}, it must be 'llama3' or 'linear'")
        if not self.high_freq_factor > self.low_freq_factor:
            raise ConfigError(
                f"high_freq_factor is {self.high_freq_factor}, "
                f"it must be above low_freq_factor {self.low_freq_factor}"
            )


@dataclass(frozen=True)
class ModelArgs:
    """Hyperparameters, under the names of Meta's params.json.

    `norm_eps` and `rope_theta` have no default, for the generations differ: LLaMA 1 has 1e-6 and
    1e4, Llama 2 has 1e-5 and 1e4, Llama 3 has 1e-5 and 5e5. `rope_theta` is the base of the
    rotary angles; what the papers call theta_i is the angle itself.
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

    def __post_init__(self) -> None:
        _check(self)
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


def _check(args: RopeScaling | ModelArgs) -> None:
    for field in fields(args):
        value, limit = getattr(args, field.name), LIMITS.get(field.name, sys.maxsize)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.type is int and not (number and isinstance(value, int) and 0 < value <= limit):
            raise ConfigError(f"{field.name} is {value!r}, it must be a whole number from 1 to {limit}")
        if field.type is float and not (number and 0 < value <= sys.float_info.max):
            raise ConfigError(f"{field.name} is {value!r}, it must be a finite number above 0")
