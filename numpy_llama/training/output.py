"""The result of a run: a Hugging Face folder for a new model, a GGUF file for a model that was fine-tuned.

Files are written beside their names and renamed, the weights last. An adapter is written by
checkpoint/adapters.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend.formats import FORMATS, StoredTensor
from ..checkpoint.base import Checkpoint
from ..checkpoint.convert import convert
from ..checkpoint.files import write_bytes
from ..checkpoint.names import hf_rows, tensor_names
from ..checkpoint.safetensors_write import write_safetensors
from ..config import Array, ModelArgs
from ..text.tokenizer import Tokenizer

F32 = FORMATS["F32"]


def write_hugging_face(
    folder: Path, args: ModelArgs, weights: Mapping[str, Array], tokenizer: Tokenizer
) -> None:
    """config.json and model.safetensors of a model without a RoPE scaling. The tokenizer's file is there."""
    names = tensor_names(args, "hf")
    tied = weights["output.weight"] is weights["tok_embeddings.weight"]
    if tied:
        del names["output.weight"]
    config: dict[str, Any] = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.eos_ids[0] if tokenizer.eos_ids else None,
        "dtype": "float32",
    }
    write_bytes(folder / "config.json", (json.dumps(config, indent=2) + "\n").encode())
    by_name = {theirs: (ours, weights[ours]) for ours, theirs in names.items()}

    def pieces(name: str) -> Iterator[Array]:
        ours, w = by_name[name]
        if (rows := hf_rows(ours, args)) is not None:
            w = w[np.argsort(rows)]
        yield np.ascontiguousarray(w, "<f4").reshape(-1).view(np.uint8)

    write_safetensors(
        folder / "model.safetensors", {name: (F32, w.shape) for name, (_, w) in by_name.items()}, pieces
    )


def write_gguf(out: Path, source: Checkpoint, weights: Mapping[str, Array]) -> None:
    """A model that was fine-tuned, with the tokenizer and the chat template of its source, in float32."""
    stored = {
        key: StoredTensor(F32, w.shape, np.ascontiguousarray(w, "<f4").reshape(-1).view(np.uint8))
        for key, w in {id(w): w for w in weights.values()}.items()  # a tied weight has two names
    }
    convert(source, out, None, weights={name: stored[id(w)] for name, w in weights.items()})
