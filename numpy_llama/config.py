"""The numbers that make one LLaMA different from another. They come from the checkpoint.

Letters used in every shape comment of this package, in Python and in C:

    B batch            D dim: the width of the residual stream      K n_kv_heads: key/value heads
    T new tokens       H n_heads: query heads                       F hidden_dim: width of the FFN
    S all positions    Dh head_dim: the width of one head           V vocab_size
"""

import sys
from dataclasses import dataclass, fields

from .errors import ConfigError


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of RoPE beyond the trained context (model card of Llama 3.1).

    Llama 3.1 has factor 8, Llama 3.2 1B and 3B have factor 32; the rest is the same in both.
    """

    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_seq_len: int = 8192

    def __post_init__(self) -> None:
        _require_positive(self)
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
        _require_positive(self)
        if self.n_heads % self.n_kv_heads:
            raise ConfigError(
                f"n_heads is {self.n_heads}, it must be a multiple of n_kv_heads {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim is {self.head_dim}, RoPE turns pairs: it must be even")


def _require_positive(args: RopeScaling | ModelArgs) -> None:
    for field in fields(args):
        value = getattr(args, field.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if field.type is int and not (number and isinstance(value, int) and value > 0):
            raise ConfigError(f"{field.name} is {value!r}, it must be a whole number above 0")
        if field.type is float and not (number and 0 < value <= sys.float_info.max):
            raise ConfigError(f"{field.name} is {value!r}, it must be a finite number above 0")
