"""A tiny model with shared key/value heads, and random updates of its weights."""

from dataclasses import replace

import numpy as np

from numpy_llama.checkpoint.names import expected_shape, tensor_names
from numpy_llama.config import ModelArgs
from numpy_llama.lora import LowRank
from numpy_llama.proof.tiny import TINY_BLOCKS

from .tiny_models import float_weights

ARGS = replace(TINY_BLOCKS, vocab_size=512)  # 4 query heads, 2 key/value heads
IDS = np.random.default_rng(1).integers(0, 256, (2, 12))
SOME = {"layers.1.attention.wq.weight": 3, "layers.0.attention.wk.weight": 5, "output.weight": 2}


def base(tied: bool = False) -> dict[str, np.ndarray]:
    return float_weights(ARGS, seed=3, tied=tied)


def random_updates(
    seed: int, names: dict[str, int], scale: float = 0.5, args: ModelArgs = ARGS
) -> dict[str, LowRank]:
    """Updates of these weights with these ranks; each has another scale."""
    rng, found = np.random.default_rng(seed), {}
    for i, (name, r) in enumerate(names.items()):
        OUT, IN = expected_shape(name, args)
        a, b = rng.normal(size=(r, IN), scale=IN**-0.5), rng.normal(size=(OUT, r), scale=r**-0.5)
        found[name] = LowRank(a.astype(np.float32), b.astype(np.float32), scale * (1 + i))
    return found


def every_matrix(r: int, args: ModelArgs = ARGS) -> dict[str, int]:
    return {name: r for name in tensor_names(args, "ours") if "norm" not in name}
