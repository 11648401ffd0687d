"""Random tiny models, with all differences between the generations of LLaMA."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st
from numpy.typing import DTypeLike

from ..config import Array, ModelArgs, RopeScaling
from ..rope import (
    DynamicScaling,
    ExplicitScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    longrope_length,
    yarn_length,
)

CONTEXT = 24

TINY = ModelArgs(
    dim=24,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=6,
    hidden_dim=40,
    vocab_size=53,
    norm_eps=1e-5,
    rope_theta=1e4,
    max_seq_len=CONTEXT,
)
# Each row is a whole number of blocks of 32, as quantized formats need.
TINY_BLOCKS = replace(TINY, dim=64, head_dim=16, hidden_dim=96)

# The scaled RoPE has an original context of 16, so that slow, fast and ramped turns all occur in CONTEXT.
GENERATIONS = {
    "llama1": replace(TINY, n_kv_heads=4, norm_eps=1e-6),
    "llama2": replace(TINY, n_kv_heads=4),
    "llama2-70b": TINY,
    "llama3": replace(TINY, rope_theta=5e5, vocab_size=97),
    "llama3.1": replace(TINY, rope_theta=5e5, rope_scaling=Llama3Scaling(8.0, original_max_seq_len=16)),
    "llama3.2": replace(TINY, rope_theta=5e5, rope_scaling=Llama3Scaling(32.0, original_max_seq_len=16)),
    "mqa": replace(TINY, n_kv_heads=1, head_dim=10, n_layers=1),
}


def every_scaling(head_dim: int, original: int) -> list[RopeScaling]:
    """Each kind of RoPE scaling, some with numbers of their own, over a context of `original`."""
    pairs = np.arange(head_dim // 2)
    short, long = (tuple((1 + by * (pairs + 1) ** 0.5).tolist()) for by in (0.02, 1.5))
    return [
        LinearScaling(4.0),
        DynamicScaling(4.0, original),
        Llama3Scaling(8.0, original_max_seq_len=original),
        Llama3Scaling(4.0, 0.5, 3.0, original),
        YarnScaling(4.0, original, yarn_length(4.0)),
        YarnScaling(8.0, original, 1.25, beta_fast=3.0, beta_slow=0.5, truncate=False),
        LongRopeScaling(short, long, original, longrope_length(8.0, original)),
        ExplicitScaling(tuple((0.5 + pairs % 3).tolist())),
        ExplicitScaling(long[::-1], 0.9),
    ]


@st.composite
def configurations(draw: st.DrawFn) -> ModelArgs:
    """Small models whose sizes are independent: head_dim * n_heads need not be dim.

    Below 16 dimensions the residual stream is sometimes nearly 0, and RMSNorm magnifies its rounding errors.
    """
    generation = draw(st.sampled_from(sorted(GENERATIONS)))
    n_kv_heads, head_dim = draw(st.integers(1, 3)), 2 * draw(st.integers(1, 32))
    scaling = draw(st.none() | st.sampled_from(every_scaling(head_dim, 16)))
    return replace(
        GENERATIONS[generation],
        dim=draw(st.integers(16, 64)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_kv_heads * draw(st.integers(1, 3)),
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        hidden_dim=draw(st.integers(3, 64)),
        vocab_size=draw(st.integers(5, 101)),
        rope_scaling=GENERATIONS[generation].rope_scaling or scaling,
    )


@st.composite
def longer_configurations(draw: st.DrawFn) -> ModelArgs:
    """Heads as wide as real ones, up to four layers, 256 tokens.

    dim is a multiple of n_heads, because transformers requires that.
    """
    args = draw(configurations())
    n_heads, n_kv_heads = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1), (4, 2), (3, 3), (4, 4)]))
    head_dim = draw(st.sampled_from([32, 48, 64, 80, 96, 112, 128]))
    scaling = draw(st.none() | st.sampled_from(every_scaling(head_dim, 64)))
    return replace(
        args,
        dim=-(-args.dim // n_heads) * n_heads,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        n_layers=draw(st.integers(1, 4)),
        head_dim=head_dim,
        max_seq_len=256,
        rope_scaling=scaling,
    )


def random_weights(
    rng: np.random.Generator, args: ModelArgs, dtype: DTypeLike = np.float64, tied: bool = False
) -> dict[str, Array]:
    """Matrices that nearly keep a vector's length; norm weights that differ from 1, so that each matters."""

    def matrix(OUT: int, IN: int) -> Array:
        return rng.normal(size=(OUT, IN), scale=IN**-0.5)

    def norm() -> Array:
        return rng.uniform(0.5, 1.5, args.dim)

    w = {"tok_embeddings.weight": rng.normal(size=(args.vocab_size, args.dim)), "norm.weight": norm()}
    w["output.weight"] = w["tok_embeddings.weight"] if tied else matrix(args.vocab_size, args.dim)
    for i in range(args.n_layers):
        w |= {
            f"layers.{i}.attention.wq.weight": matrix(args.n_heads * args.head_dim, args.dim),
            f"layers.{i}.attention.wk.weight": matrix(args.n_kv_heads * args.head_dim, args.dim),
            f"layers.{i}.attention.wv.weight": matrix(args.n_kv_heads * args.head_dim, args.dim),
            f"layers.{i}.attention.wo.weight": matrix(args.dim, args.n_heads * args.head_dim),
            f"layers.{i}.feed_forward.w_gate.weight": matrix(args.hidden_dim, args.dim),
            f"layers.{i}.feed_forward.w_up.weight": matrix(args.hidden_dim, args.dim),
            f"layers.{i}.feed_forward.w_down.weight": matrix(args.dim, args.hidden_dim),
            f"layers.{i}.attention_norm.weight": norm(),
            f"layers.{i}.ffn_norm.weight": norm(),
        }
    return {name: x.astype(dtype) for name, x in w.items()}


def random_tokens(rng: np.random.Generator, args: ModelArgs, B: int = 2, T: int | None = None) -> Array:
    return rng.integers(args.vocab_size, size=(B, T or rng.integers(1, CONTEXT + 1)))
