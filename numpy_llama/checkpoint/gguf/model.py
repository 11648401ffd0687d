"""A LLaMA in a GGUF file, or in the parts of a split one: hyperparameters, weights, tokenizer.

The keys are those of llama.cpp's converter (gguf.md, "llama"). The rows of wq and wk have Meta's order in
GGUF, so nothing is permuted here.
"""

from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from ...backend.formats import StoredTensor
from ...config import ModelArgs
from ...errors import ConfigError, MismatchError, UnsupportedError, escape
from ...text.chat import CHAT_FORMATS, ChatFormat
from ...text.tokenizer import Tokenizer, tokenizer_from_gguf
from .. import not_models
from ..base import Checkpoint, size
from ..names import matched_names
from ..other_models import other_architecture
from ..rope_scalings import TENSORS, gguf_scaling
from .file import GGUFFile, open_gguf

# Other keys that could change the mathematics, and their values for a LLaMA.
PLAIN = {
    "llama.attention.scale": 0.0,
    "llama.attention.clamp_kqv": 0.0,
    "llama.attention.causal": True,
    "llama.logit_scale": 0.0,
    "llama.use_parallel_residual": False,
}


class GGUFCheckpoint(Checkpoint):
    """A model in GGUF."""

    format = "GGUF"

    def __init__(self, path: Path):
        self.path, self.file = path, open_gguf(path)
        self.files, self.tensors = self.file.files, self.file.tensors

    @cached_property
    def args(self) -> ModelArgs:
        return model_args(self.file)

    def weights(self) -> dict[str, StoredTensor]:
        return weights(self.file, self.args)

    def tokenizer_path(self) -> Path:
        return self.file.path

    def read_tokenizer(self) -> Tokenizer:
        return tokenizer_from_gguf(self.file.metadata, str(self.path))

    def chat_template(self) -> str | None:
        template: str | None = self.file.get("tokenizer.chat_template", str)
        return template

    def chat_format(self) -> ChatFormat | None:
        """The format of the template, or the one that `convert` noted. Without both, there is no chat."""
        known = self.file.get("numpy_llama.chat_format", str)
        return super().chat_format() if self.chat_template() is not None else CHAT_FORMATS.get(known)


def model_args(file: GGUFFile) -> ModelArgs:
    """The hyperparameters from the llama.* keys. An absent key takes ggml's default, or is an error."""
    if file.metadata.get("general.type") == "adapter":
        raise UnsupportedError(f"{file.path} holds an adapter (LoRA): {not_models.ADAPTER}")
    if known := other_architecture(file.metadata.get("general.architecture")):
        raise UnsupportedError(f"{file.path}: the architecture is {known}")
    architecture = file.require("general.architecture", str)
    if architecture != "llama":
        raise UnsupportedError(f"{file.path}: the architecture is {escape(architecture)}, not 'llama'")
    if n_experts := file.get("llama.expert_count", int, 0):
        raise UnsupportedError(f"{file.path}: a mixture of {n_experts} experts, only dense models can be run")

    for key, plain in PLAIN.items():
        if file.metadata.get(key, plain) != plain:
            raise UnsupportedError(f"{file.path}: {key} is {escape(file.metadata[key], 60)}, not {plain}")
    dim = size(file, "llama.embedding_length", "dim")
    n_heads = size(file, "llama.attention.head_count", "n_heads")
    if "llama.attention.key_length" not in file.metadata and dim % n_heads:
        raise ConfigError(f"{file.path}: dim {dim} cannot be divided among {n_heads} heads")
    head_dim = size(file, "llama.attention.key_length", "head_dim", dim // n_heads)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (found := size(file, key, "head_dim", head_dim)) != head_dim:
            raise UnsupportedError(f"{file.path}: {key} is {found}, only head_dim {head_dim} can be run")
    values: dict[str, Any] = {
        "dim": dim,
        "n_layers": size(file, "llama.block_count", "n_layers"),
        "n_heads": n_heads,
        "n_kv_heads": size(file, "llama.attention.head_count_kv", "n_kv_heads", n_heads),
        "head_dim": head_dim,
        "hidden_dim": size(file, "llama.feed_forward_length", "hidden_dim"),
        "vocab_size": _vocab_size(file),
        "norm_eps": file.decimal("llama.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.decimal("llama.rope.freq_base", 10000.0),
        "max_seq_len": size(file, "llama.context_length", "max_seq_len"),
    }
    # A sliding window changes nothing within its length, so that is the longest context.
    window = size(file, "llama.attention.sliding_window", "max_seq_len", values["max_seq_len"])
    values["max_seq_len"] = min(values["max_seq_len"], window)
    try:
        args = ModelArgs(**values)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None
    return replace(args, rope_scaling=gguf_scaling(file, args))


def _vocab_size(file: GGUFFile) -> int:
    """The rows of the embedding, which is the number of logits. MismatchError if another count differs."""
    if "token_embd.weight" not in file.tensors:
        raise MismatchError(f"{file.path}: there is no token_embd.weight; a vocabulary without a model?")
    rows: int = file.tensors["token_embd.weight"].shape[0]
    declared = file.get("llama.vocab_size", int, rows)
    tokens = file.get("tokenizer.ggml.tokens", list, range(rows))
    for what, n in (("llama.vocab_size", declared), ("the number of tokens", len(tokens))):
        if n != rows:
            raise MismatchError(f"{file.path}: {what} is {n}, but token_embd.weight has {rows} rows")
    return rows


def weights(file: GGUFFile, args: ModelArgs) -> dict[str, StoredTensor]:
    """Every weight under our name."""
    shapes = {name: info.shape for name, info in file.tensors.items() if name not in TENSORS}
    names = matched_names(file.path, "gguf", args, shapes)
    stored = {theirs: file.tensor(theirs) for theirs in names.values()}
    return {ours: stored[theirs] for ours, theirs in names.items()}
