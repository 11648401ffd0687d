"""One tiny model of each generation, and the files that it can come in.

The files are written by the programs that write them in life: torch.save, transformers, gguf. The weights are
numbers that float16 and bfloat16 both hold exactly.
"""

import base64
import json
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM
from transformers.utils import logging

from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.config import ModelArgs
from numpy_llama.functional import rope_freqs
from numpy_llama.proof.oracle import transformers_model
from numpy_llama.proof.tiny import random_weights
from numpy_llama.rope import Llama3Scaling

logging.disable_progress_bar()

SMALLEST = 2.0**-14  # the smallest normal float16
IDS = np.random.default_rng(1).integers(0, 576, (2, 24))


@dataclass(frozen=True)
class Generation:
    args: ModelArgs
    tied: bool = False
    shards: tuple[int, ...] = (1, 2, 4, 8)  # into how many files Meta could cut it
    embedding_by_rows: bool = False  # as Llama 3 cuts it
    params: tuple = ()  # what else params.json says


LLAMA_1 = ModelArgs(
    dim=128,
    n_layers=2,
    n_heads=8,
    n_kv_heads=8,
    head_dim=16,
    hidden_dim=352,  # int(2 * 4 * 128 / 3) = 341, rounded up to a multiple of 32
    vocab_size=576,  # more than the 512 of the smallest tokenizer that Meta's format can have
    norm_eps=1e-6,
    rope_theta=10000.0,
    max_seq_len=2048,
)
LLAMA_2 = replace(LLAMA_1, n_heads=16, n_kv_heads=8, head_dim=8, norm_eps=1e-5, max_seq_len=4096)
LLAMA_3 = replace(LLAMA_2, rope_theta=500000.0, max_seq_len=8192)
LLAMA_31 = replace(LLAMA_3, rope_scaling=Llama3Scaling(8.0), max_seq_len=131072)
GENERATIONS = {
    "LLaMA 1 (MHA)": Generation(LLAMA_1),
    "Llama 2 (GQA)": Generation(LLAMA_2),
    "MQA": Generation(replace(LLAMA_2, n_kv_heads=1), shards=(1,)),
    "Llama 3": Generation(LLAMA_3, embedding_by_rows=True),
    "Llama 3.1 (scaled)": Generation(LLAMA_31, embedding_by_rows=True, params=(("use_scaled_rope", True),)),
    "tied": Generation(LLAMA_3, tied=True, shards=()),
    "explicit head_dim": Generation(replace(LLAMA_3, head_dim=32), shards=()),
}


@cache
def weights_of(name: str) -> dict[str, np.ndarray]:
    """Under our names; every number has 8 significant bits and is no smaller than float16's normal ones."""
    generation, rng = GENERATIONS[name], np.random.default_rng(7)
    weights = random_weights(rng, generation.args, np.float32)
    for key, w in weights.items():
        w = torch.from_numpy(w).bfloat16().float().numpy()
        weights[key] = np.where(np.abs(w) < SMALLEST, 0, w)
    if generation.tied:
        weights["output.weight"] = weights["tok_embeddings.weight"]
    return weights


@cache
def hugging_face(name: str) -> LlamaForCausalLM:
    return transformers_model(GENERATIONS[name].args, weights_of(name))


def write_meta(name: str, folder: Path, shards: int, dtype: torch.dtype) -> Path:
    """Meta's own files: each matrix cut along the axis along which fairscale cuts it."""
    generation = GENERATIONS[name]
    args, names = generation.args, tensor_names(generation.args, "meta")
    for i in range(shards):
        state = {}
        for ours, w in weights_of(name).items():
            kind = ours.split(".")[-2]
            by_columns = kind in ("wo", "w_down") or (
                kind == "tok_embeddings" and not generation.embedding_by_rows
            )
            axis = None if w.ndim == 1 else int(by_columns)
            part = w if axis is None else np.split(w, shards, axis)[i]
            state[names[ours]] = torch.from_numpy(part.copy()).to(dtype)
        state["rope.freqs"] = torch.ones(args.head_dim // 2)
        torch.save(state, folder / f"consolidated.{i:02}.pth")
    params = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "multiple_of": 32,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
    }
    (folder / "params.json").write_text(json.dumps(params | dict(generation.params)))
    return folder


def write_hf(name: str, folder: Path, dtype: torch.dtype, **options) -> Path:
    # A copy: a model that was bfloat16 for a moment has lost the last bits of its RoPE frequencies.
    deepcopy(hugging_face(name)).to(dtype).save_pretrained(folder, **options)
    return folder


def write_hf_bin(name: str, folder: Path, dtype: torch.dtype) -> Path:
    write_hf(name, folder, dtype)
    (folder / "model.safetensors").unlink()
    state = {key: w.to(dtype) for key, w in hugging_face(name).state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin")
    return folder


def write_gguf(name: str, folder: Path, type: str) -> Path:
    generation = GENERATIONS[name]
    args, names, path = generation.args, tensor_names(generation.args, "gguf"), folder / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(args.n_layers)
    writer.add_context_length(args.max_seq_len)
    writer.add_embedding_length(args.dim)
    writer.add_feed_forward_length(args.hidden_dim)
    writer.add_head_count(args.n_heads)
    writer.add_head_count_kv(args.n_kv_heads)
    writer.add_key_length(args.head_dim)
    writer.add_value_length(args.head_dim)
    writer.add_rope_dimension_count(args.head_dim)
    writer.add_layer_norm_rms_eps(args.norm_eps)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_vocab_size(args.vocab_size)
    type = gguf.GGMLQuantizationType[type]
    for ours, w in weights_of(name).items():
        if w.ndim == 1:
            writer.add_tensor(names[ours], w)
        elif not (generation.tied and ours == "output.weight"):
            writer.add_tensor(names[ours], gguf.quantize(w, type), raw_dtype=type)
    if args.rope_scaling:
        freqs = rope_freqs(args.head_dim, args.rope_theta)
        divisors = args.rope_scaling.divisors(freqs, args.rope_theta, args.max_seq_len)
        writer.add_tensor("rope_freqs.weight", divisors.astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


FORMATS = {
    **{
        f"Meta, {n} file{'s' * (n > 1)}, {dtype}": (lambda g, f, n=n, d=d: write_meta(g, f, n, d))
        for n in (1, 2, 4, 8)
        for dtype, d in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16))
    },
    **{
        f"HF, safetensors, {dtype}": (lambda g, f, d=d: write_hf(g, f, d))
        for dtype, d in (("F32", torch.float32), ("BF16", torch.bfloat16), ("F16", torch.float16))
    },
    "HF, sharded": lambda g, f: write_hf(g, f, torch.float32, max_shard_size="500KB"),
    "HF, .bin": lambda g, f: write_hf_bin(g, f, torch.float32),
    "HF, .bin, BF16": lambda g, f: write_hf_bin(g, f, torch.bfloat16),
    **{f"GGUF {t}": (lambda g, f, t=t: write_gguf(g, f, t)) for t in ("F32", "F16", "BF16")},
}


def write_source(name: str, format: str, folder: Path) -> Path:
    """A model with the smallest of Meta's tokenizers: the 256 bytes and Llama 3's control tokens."""
    FORMATS[format](name, folder)
    return with_tokenizer(folder)


def with_tokenizer(folder: Path) -> Path:
    """The folder with the smallest of Meta's tokenizers."""
    lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (folder / "tokenizer.model").write_text("".join(lines))
    return folder
