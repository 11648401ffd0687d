"""Random weights as files store them, and the tiny model that `verify` and `trace` look into."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from numpy_llama.backend.formats import StoredTensor
from numpy_llama.config import ModelArgs
from numpy_llama.proof.tiny import TINY_BLOCKS, random_weights
from numpy_llama.text.tokenizer import spelled

from .gguf_writer import byte_vocabulary, write_llama

# Three layers, so that one lies between two; an id for each byte; heads of whole blocks.
LOOKED_INTO = replace(TINY_BLOCKS, n_layers=3, head_dim=32, vocab_size=300, max_seq_len=512)


def float_weights(args: ModelArgs, seed: int = 0, tied: bool = False) -> dict[str, np.ndarray]:
    """The same weights for the same seed, in float32."""
    return random_weights(np.random.default_rng(seed), args, np.float32, tied)


def stored(weights: dict[str, np.ndarray], format: str = "Q8_0") -> dict[str, StoredTensor]:
    """Matrices in `format`, vectors in F32."""
    return {name: StoredTensor.quantize(w, format if w.ndim == 2 else "F32") for name, w in weights.items()}


def write_tiny(
    path: Path, format: str = "Q8_0", change=lambda weights: None, args: ModelArgs = LOOKED_INTO
) -> Path:
    """A GGUF file; `change` may spoil its weights first."""
    weights = float_weights(args)
    change(weights)
    return write_llama(path, args, weights, format, **byte_vocabulary(args.vocab_size))


SPEAKER = replace(TINY_BLOCKS, vocab_size=259, max_seq_len=64)


def write_speaker(path: Path, args: ModelArgs = SPEAKER, format: str = "F32") -> Path:
    """A small model with random weights whose tokens are the bytes, and <|begin|>, <|user|>, <|end|>."""
    tokens = [spelled(bytes([b])) for b in range(256)] + ["<|begin|>", "<|user|>", "<|end|>"]
    vocabulary = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [], "add_bos_token": True}
    vocabulary |= {"token_type": np.array([1] * 256 + [3] * 3, np.int32)}
    vocabulary |= {"bos_token_id": 256, "eos_token_id": 258}
    return write_llama(path, args, float_weights(args), format, **vocabulary)
