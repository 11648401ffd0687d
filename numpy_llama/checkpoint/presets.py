"""Every published size of LLaMA and of its nearest relatives, as data.

A checkpoint has its own hyperparameters. These are for readers, for `verify`, and for models of a real shape
with random weights. The sources are the params.json and config.json that were published with the weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from ..config import ModelArgs, RopeScaling
from ..rope import Llama3Scaling


@dataclass(frozen=True)
class Preset:
    """One published size. `tied`: the output matrix is the embedding, and is stored once."""

    args: ModelArgs
    tied: bool = False

    @property
    def n_parameters(self) -> int:
        return n_parameters(self.args, self.tied)


def n_parameters(args: ModelArgs, tied: bool = False) -> int:
    """The number of weights: 2VD + D + L(2D + 2(H + K)Dh D + 3DF), and VD less if the output is tied."""
    attention = 2 * (args.n_heads + args.n_kv_heads) * args.head_dim * args.dim  # wq and wo, wk and wv
    layer = 2 * args.dim + attention + 3 * args.dim * args.hidden_dim
    embedding = args.vocab_size * args.dim
    return embedding + args.n_layers * layer + args.dim + (0 if tied else embedding)


def _row(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    hidden_dim: int,
    vocab_size: int,
    norm_eps: float,
    rope_theta: float,
    max_seq_len: int,
    rope_scaling: RopeScaling | None = None,
    tied: bool = False,
    window: int | None = None,
) -> Preset:
    head_dim = dim // n_heads  # true for all of them
    sizes = (dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size)
    return Preset(ModelArgs(*sizes, norm_eps, rope_theta, max_seq_len, rope_scaling, window), tied)


# Llama 3.1 was trained on 8192 positions, and its context was then extended: by 8, in 3.2 1B and 3B by 32.
_BY_8, _BY_32 = Llama3Scaling(8.0), Llama3Scaling(32.0)

# Code Llama 70B Instruct and Python were not trained on long texts, unlike their base model, so they have
# another row. Mistral 7B v0.1 attends to the last 4096 positions only. From v0.2 on there is no such window.
PRESETS: Mapping[str, Preset] = MappingProxyType({
    #                                  D    L    H   K      F       V   eps  theta context  scaled, tied
    "llama-7b":               _row( 4096,  32,  32, 32, 11008,  32000, 1e-6,   1e4,   2048),
    "llama-13b":              _row( 5120,  40,  40, 40, 13824,  32000, 1e-6,   1e4,   2048),
    "llama-30b":              _row( 6656,  60,  52, 52, 17920,  32000, 1e-6,   1e4,   2048),
    "llama-65b":              _row( 8192,  80,  64, 64, 22016,  32000, 1e-5,   1e4,   2048),

    "llama-2-7b":             _row( 4096,  32,  32, 32, 11008,  32000, 1e-5,   1e4,   4096),
    "llama-2-13b":            _row( 5120,  40,  40, 40, 13824,  32000, 1e-5,   1e4,   4096),
    "llama-2-70b":            _row( 8192,  80,  64,  8, 28672,  32000, 1e-5,   1e4,   4096),

    "codellama-7b":           _row( 4096,  32,  32, 32, 11008,  32016, 1e-5,   1e6,  16384),
    "codellama-13b":          _row( 5120,  40,  40, 40, 13824,  32016, 1e-5,   1e6,  16384),
    "codellama-34b":          _row( 8192,  48,  64,  8, 22016,  32000, 1e-5,   1e6,  16384),
    "codellama-70b":          _row( 8192,  80,  64,  8, 28672,  32016, 1e-5,   1e6,  16384),
    "codellama-70b-instruct": _row( 8192,  80,  64,  8, 28672,  32016, 1e-5,   1e4,   4096),

    "llama-3-8b":             _row( 4096,  32,  32,  8, 14336, 128256, 1e-5,   5e5,   8192),
    "llama-3-70b":            _row( 8192,  80,  64,  8, 28672, 128256, 1e-5,   5e5,   8192),
    "llama-3.1-8b":           _row( 4096,  32,  32,  8, 14336, 128256, 1e-5,   5e5, 131072, _BY_8),
    "llama-3.1-70b":          _row( 8192,  80,  64,  8, 28672, 128256, 1e-5,   5e5, 131072, _BY_8),
    "llama-3.1-405b":         _row(16384, 126, 128,  8, 53248, 128256, 1e-5,   5e5, 131072, _BY_8),
    "llama-3.2-1b":           _row( 2048,  16,  32,  8,  8192, 128256, 1e-5,   5e5, 131072, _BY_32, True),
    "llama-3.2-3b":           _row( 3072,  28,  24,  8,  8192, 128256, 1e-5,   5e5, 131072, _BY_32, True),
    "llama-3.3-70b":          _row( 8192,  80,  64,  8, 28672, 128256, 1e-5,   5e5, 131072, _BY_8),

    "tinyllama-1.1b":         _row( 2048,  22,  32,  4,  5632,  32000, 1e-5,   1e4,   2048),
    "smollm2-135m":           _row(  576,  30,   9,  3,  1536,  49152, 1e-5,   1e5,   8192, None, True),
    "smollm2-360m":           _row(  960,  32,  15,  5,  2560,  49152, 1e-5,   1e5,   8192, None, True),
    "smollm2-1.7b":           _row( 2048,  24,  32, 32,  8192,  49152, 1e-5, 1.3e5,   8192, None, True),
    "mistral-7b-v0.1":        _row( 4096,  32,  32,  8, 14336,  32000, 1e-5,   1e4,  32768, window=4096),
    "mistral-7b-v0.2":        _row( 4096,  32,  32,  8, 14336,  32000, 1e-5,   1e6,  32768),
    "mistral-7b-v0.3":        _row( 4096,  32,  32,  8, 14336,  32768, 1e-5,   1e6,  32768),
})  # fmt: skip
