"""What a run begins with: a new model with its tokenizer, or the float32 copy of a model that is given."""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import sentencepiece

from ..backend.formats import StoredTensor
from ..checkpoint.names import expected_shape, tensor_names
from ..config import Array, ModelArgs
from ..errors import TokenizerError, escape
from .compute import Compute

MULTIPLE = 32  # hidden_dim is a whole number of blocks
PIECE = 4000  # bytes: sentencepiece leaves out longer lines
MOST_LINES = 1_000_000  # that a vocabulary is made from


def new_args(
    dim: int,
    n_layers: int,
    n_heads: int,
    n_kv_heads: int,
    vocab_size: int,
    max_seq_len: int,
    hidden_dim: int | None = None,
) -> ModelArgs:
    """The hyperparameters of a new model. hidden_dim is by default LLaMA's 2/3 of 4 dim, rounded up."""
    if hidden_dim is None:
        hidden_dim = -(-8 * dim // (3 * MULTIPLE)) * MULTIPLE
    head_dim = max(dim // max(n_heads, 1), 1)
    sizes = (dim, n_layers, n_heads, n_kv_heads, head_dim, hidden_dim, vocab_size)
    return ModelArgs(*sizes, norm_eps=1e-5, rope_theta=1e4, max_seq_len=max_seq_len)


def parameter_count(args: ModelArgs, tied: bool = True) -> int:
    """The number of weights; a tied output counts once."""
    names = [name for name in tensor_names(args, "ours") if not (tied and name == "output.weight")]
    return sum(math.prod(expected_shape(name, args)) for name in names)


def new_weights(args: ModelArgs, seed: int) -> dict[str, Array]:
    """Random weights in float32: matrices with a standard deviation of 0.02, norms of 1, a tied output.

    wo and w_down add to the residual stream 2 n_layers times, so theirs is 0.02 / sqrt(2 n_layers)
    (Radford et al. 2019, section 2.3).
    """
    rng, weights = np.random.default_rng(seed), dict[str, Array]()
    for name in tensor_names(args, "ours"):
        shape = expected_shape(name, args)
        if len(shape) == 1:
            weights[name] = np.ones(shape, np.float32)
        elif name != "output.weight":
            adds = name.endswith((".wo.weight", ".w_down.weight"))
            scale = 0.02 / np.sqrt(2 * args.n_layers) if adds else 0.02
            weights[name] = rng.standard_normal(shape, np.float32) * np.float32(scale)
    return weights | {"output.weight": weights["tok_embeddings.weight"]}


def float_weights(stored: Mapping[str, StoredTensor]) -> dict[str, Array]:
    """Weights that can learn: copies in float32, whatever the file has. A tied weight stays one array.

    A step is often smaller than the distance of two numbers in fewer bits, which would then not move.
    """
    copies = {id(w): np.array(w.dequantize(), np.float32) for w in stored.values()}
    return {name: copies[id(w)] for name, w in stored.items()}


def frozen_weights(stored: Mapping[str, StoredTensor], compute: Compute) -> dict[str, Any]:
    """The weights of a model that does not learn, as the backend computes with them."""
    made = {key: compute.freeze(w) for key, w in {id(w): w for w in stored.values()}.items()}
    return {name: made[id(w)] for name, w in stored.items()}


def trained_tokenizer(texts: Sequence[str], vocab_size: int) -> bytes:
    """A SentencePiece model of type BPE with the settings of LLaMA's: the content of a tokenizer.model.

    Digits stand alone, and a character without a piece is spelt in bytes. TokenizerError if the texts are
    too few for this number of pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            character_coverage=1.0,
            split_digits=True,
            allow_whitespace_only_pieces=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            input_sentence_size=MOST_LINES,
            shuffle_input_sentence=False,
            minloglevel=2,
        )
    except (RuntimeError, ValueError, OSError) as error:
        what = escape(str(error).rpartition("] ")[2] or error)
        raise TokenizerError(
            f"sentencepiece cannot make {vocab_size} pieces of the corpus: {what}; give another --vocab-size"
        ) from None
    return model.getvalue()


def _lines(texts: Sequence[str]) -> Iterator[str]:
    """Lines, as sentencepiece reads them; a long one in parts."""
    for text in texts:
        for line in text.splitlines():
            yield from (line[i : i + PIECE // 4] for i in range(0, len(line), PIECE // 4))
