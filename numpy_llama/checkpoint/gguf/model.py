"""A LLaMA in a GGUF file, or in the parts of a split one: hyperparameters, weights, tokenizer.

The keys are those of llama.cpp's converter (gguf.md), behind the name of the architecture. The rows of wq and
wk have Meta's order in "llama". "phi3" has Hugging Face's order, and some weights are rows of one tensor.
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
from ..base import Checkpoint, size, weight_in, within
from ..names import PHI3, matched_names
from ..other_models import other_architecture
from ..rope_scalings import TENSORS, gguf_scaling
from ..sampling_defaults import of_gguf
from .file import GGUFFile, open_gguf

TEMPLATE = "tokenizer.chat_template"  # and behind it the name of another one: .tool_use
# Other keys that could change the mathematics, and their values for a LLaMA.
PLAIN = {
    "attention.scale": 0.0,
    "attention.clamp_kqv": 0.0,
    "attention.causal": True,
    "logit_scale": 0.0,
    "use_parallel_residual": False,
}
ARCHITECTURES = ("llama", PHI3)


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

    def chat_template(self, name: str = "default") -> str | None:
        key = TEMPLATE if name == "default" else f"{TEMPLATE}.{name}"
        template: str | None = self.file.get(key, str)
        return template

    def chat_format(self) -> ChatFormat | None:
        """The format of the template, or the one that `convert` noted. Without both, there is no chat."""
        known = self.file.get("numpy_llama.chat_format", str)
        return super().chat_format() if self.chat_template() is not None else CHAT_FORMATS.get(known)

    def sampling_defaults(self) -> dict[str, Any]:
        return of_gguf(self.file)


def model_args(file: GGUFFile) -> ModelArgs:
    """The hyperparameters from the keys. An absent key takes ggml's default, or is an error."""
    if file.metadata.get("general.type") == "adapter":
        raise UnsupportedError(f"{file.path} holds an adapter (LoRA): {not_models.ADAPTER}")
    if other := other_architecture(file.metadata.get("general.architecture")):
        raise UnsupportedError(f"{file.path}: the architecture is {other}")
    arch = file.require("general.architecture", str)
    if arch not in ARCHITECTURES:
        known = " or ".join(map(repr, ARCHITECTURES))
        raise UnsupportedError(f"{file.path}: the architecture is {escape(arch)}, not {known}")
    if n_experts := file.get(f"{arch}.expert_count", int, 0):
        raise UnsupportedError(f"{file.path}: a mixture of {n_experts} experts, only dense models can be run")

    for key, plain in ((f"{arch}.{key}", plain) for key, plain in PLAIN.items()):
        if file.metadata.get(key, plain) != plain:
            raise UnsupportedError(f"{file.path}: {key} is {escape(file.metadata[key], 60)}, not {plain}")
    dim = size(file, f"{arch}.embedding_length", "dim")
    n_heads = size(file, f"{arch}.attention.head_count", "n_heads")
    if f"{arch}.attention.key_length" not in file.metadata and dim % n_heads:
        raise ConfigError(f"{file.path}: dim {dim} cannot be divided among {n_heads} heads")
    head_dim = size(file, f"{arch}.attention.key_length", "head_dim", dim // n_heads)
    for key in (f"{arch}.attention.value_length", f"{arch}.rope.dimension_count"):
        if (found := size(file, key, "head_dim", head_dim)) != head_dim:
            raise UnsupportedError(f"{file.path}: {key} is {found}, only head_dim {head_dim} can be run")
    values: dict[str, Any] = {
        "dim": dim,
        "n_layers": size(file, f"{arch}.block_count", "n_layers"),
        "n_heads": n_heads,
        "n_kv_heads": size(file, f"{arch}.attention.head_count_kv", "n_kv_heads", n_heads),
        "head_dim": head_dim,
        "hidden_dim": size(file, f"{arch}.feed_forward_length", "hidden_dim"),
        "vocab_size": _vocab_size(file, arch),
        "norm_eps": file.decimal(f"{arch}.attention.layer_norm_rms_epsilon"),
        "rope_theta": file.decimal(f"{arch}.rope.freq_base", 10000.0),
        "max_seq_len": size(file, f"{arch}.context_length", "max_seq_len"),
    }
    if file.get(key := f"{arch}.attention.sliding_window", int, 0):  # 0: there is none
        values["sliding_window"] = within(size(file, key), values["max_seq_len"])
    try:
        args = ModelArgs(**values)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None
    return replace(args, rope_scaling=gguf_scaling(file, args))


def _vocab_size(file: GGUFFile, arch: str) -> int:
    """The rows of the embedding, which is the number of logits. MismatchError if another count differs."""
    if "token_embd.weight" not in file.tensors:
        raise MismatchError(f"{file.path}: there is no token_embd.weight; a vocabulary without a model?")
    rows: int = file.tensors["token_embd.weight"].shape[0]
    declared = file.get(f"{arch}.vocab_size", int, rows)
    tokens = file.get("tokenizer.ggml.tokens", list, range(rows))
    for what, n in ((f"{arch}.vocab_size", declared), ("the number of tokens", len(tokens))):
        if n != rows:
            raise MismatchError(f"{file.path}: {what} is {n}, but token_embd.weight has {rows} rows")
    return rows


def weights(file: GGUFFile, args: ModelArgs) -> dict[str, StoredTensor]:
    """Every weight under our name."""
    shapes = {name: info.shape for name, info in file.tensors.items() if name not in TENSORS}
    phi3 = file.metadata["general.architecture"] == PHI3
    names = matched_names(file.path, "gguf", args, shapes, fused=phi3)
    stored = {theirs: file.tensor(theirs) for theirs in names.values()}
    return {ours: weight_in(stored[theirs], ours, args, phi3, phi3) for ours, theirs in names.items()}
