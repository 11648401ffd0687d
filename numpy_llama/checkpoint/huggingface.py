"""Hugging Face folders: config.json, the weights in one file or in shards, and the files of a tokenizer.

What this file promises: each key of config.json that changes the mathematics is computed, or refused with its
name. Weights are used in place. So the rows of q_proj and k_proj stay in the order of the file. The tensor
keeps the model's order beside them.
"""

import os
import re
from collections.abc import Mapping, Set
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..backend.formats import StoredTensor
from ..config import LIMITS, ModelArgs
from ..errors import (
    ConfigError,
    FormatError,
    MismatchError,
    TemplateError,
    TruncatedError,
    UnsupportedError,
    escape,
)
from ..text.sandbox import MAX_SOURCE
from ..text.tokenizer import Tokenizer
from .base import Checkpoint, TensorInfo, size, weight_in, within
from .files import MappedFile
from .json_file import JsonFile
from .names import PHI3, matched_names, usual, usual_names
from .other_models import other_config, other_folder
from .pytorch.file import TorchFile
from .quantized import FileTensor, QuantizedWeight, method_of
from .quantized.base import of_safetensors
from .rope_scalings import hf_rope
from .safetensors_file import SafetensorsFile
from .sampling_defaults import of_generation_config
from .tokenizers import MAX_BYTES, tokenizer_of_folder, tokenizer_path

# The files that may hold the weights, or an index of such files. The first that exists is used.
WEIGHTS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
SHARD = re.compile(r"[\w.+-]+", re.ASCII)  # a plain file name, in no other folder
# The files of chat templates. tokenizer_config.json may hold them too.
TEMPLATES = "chat_template.jinja", "chat_template.json", "additional_chat_templates/tool_use.jinja"
ANGLES = re.compile(r"\.rotary_emb\.inv_freq$")  # RoPE's frequencies, in old files; theta gives them

# Other keys of config.json that could change the mathematics, and their values that change nothing.
PLAIN: dict[str, tuple[Any, ...]] = {
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "hidden_act": ("silu", "swish"),  # two names of one function
    "partial_rotary_factor": (1,),
    "num_experts": (0, 1),
    "num_local_experts": (0, 1),
}
# The architectures of each model_type that are computed here. The second spelling is of some weeks in 2023.
LLAMA: tuple[list[str], ...] = ([], ["LlamaForCausalLM"], ["LLaMAForCausalLM"])
SPELLINGS: dict[str | None, tuple[list[str], ...]] = {
    None: LLAMA,
    "llama": LLAMA,
    "mistral": (["MistralForCausalLM"],),
    PHI3: (["Phi3ForCausalLM"],),
}
WINDOWS = ("mistral", PHI3)  # a LlamaForCausalLM does not read sliding_window
ROWS_COMPARED = 4096  # at a time: two whole matrices are never in memory


class HuggingFaceCheckpoint(Checkpoint):
    """A model in a folder, as transformers' `save_pretrained` writes it."""

    format = "Hugging Face"

    def __init__(self, folder: Path):
        self.path = Path(folder)
        self.config = JsonFile(self.path / "config.json")
        self._args = model_args(self.config)  # a model of another kind fails here, before its weights
        self.fused = self.config.get("model_type", str) == PHI3  # some weights are rows of one tensor
        name = next((name for name in WEIGHTS if os.path.lexists(self.path / name)), None)
        if name is None:
            there = other_folder(path.name for path in self.path.iterdir())
            found = f"it holds {there}" if there else f"looked for {', '.join(WEIGHTS)}"
            raise FormatError(f"{folder} has no weights; {found}")
        if name.endswith(".index.json"):
            self._holders = self._shards(JsonFile(self.path / name))
        else:
            file = _open(self.path / name)
            self._holders = dict.fromkeys(file.tensors, file)
        self.files = [file.file for file in dict.fromkeys(self._holders.values())]
        self.tensors: Mapping[str, TensorInfo] = {
            name: file.tensors[name] for name, file in self._holders.items()
        }
        self._quantized: Mapping[str, QuantizedWeight] = {}  # "model.layers.0.mlp.up_proj.weight" and so on
        self._parts: Set[str] = frozenset()  # the tensors of which they consist
        if method := method_of(self.config):
            self.format = f"{self.format}, {method.title}"
            self._quantized, self._parts = method.weights(self.tensors, self._part)

    def _shards(self, index: JsonFile) -> dict[str, SafetensorsFile | TorchFile]:
        """The file of each tensor. Each file must hold exactly the tensors that the index gives it."""
        weight_map, wanted = index.values.get("weight_map"), dict[str, set[str]]()
        if not isinstance(weight_map, dict) or not weight_map:
            raise FormatError(f"{index.path} has no weight_map, or an empty one")
        for tensor, name in weight_map.items():
            if not isinstance(name, str) or not SHARD.fullmatch(name):
                where = f"{index.path}: weight_map has {escape(tensor, 80)}"
                raise FormatError(f"{where} in {escape(name, 80)}, which is no plain file name")
            wanted.setdefault(name, set()).add(tensor)
        missing = [name for name in sorted(wanted) if not (self.path / name).is_file()]
        if missing:
            what = f"{len(missing)} of {len(wanted)} files are missing: {escape(', '.join(missing))}"
            raise TruncatedError(f"{index.path}: {what}; incomplete copy or download?")
        holders: dict[str, SafetensorsFile | TorchFile] = {}
        for name in sorted(wanted):
            file = _open(self.path / name)
            if odd := {tensor for tensor in wanted[name] ^ file.tensors.keys() if not ANGLES.search(tensor)}:
                if other := next((one for one in sorted(wanted) if wanted[one] == file.tensors.keys()), None):
                    raise MismatchError(f"{file.path} has the tensors of {other}: is it a copy of that file?")
                what = f"{len(odd)} tensors are in only one of the two: {escape(', '.join(sorted(odd)))}"
                raise MismatchError(f"{file.path} and {index.path.name} disagree: {what}")
            holders |= dict.fromkeys(file.tensors, file)
        return holders

    @cached_property
    def args(self) -> ModelArgs:
        self._names()
        return self._args

    def _names(self) -> dict[str, str]:
        """Our name of each weight -> its name in the file."""
        tied = self.config.get("tie_word_embeddings", bool, False)
        plain = (name for name in self.tensors if name not in self._parts and not ANGLES.search(name))
        found = usual_names(self.path, [*plain, *self._quantized])
        held: dict[str, TensorInfo | QuantizedWeight] = {**self.tensors, **self._quantized}
        shapes = {name: held[theirs].shape for name, theirs in found.items()}
        if tied:
            shapes.pop("lm_head.weight", None)
        elif "lm_head.weight" not in shapes and "model.embed_tokens.weight" in shapes:
            raise MismatchError(
                f"{self.path}: 1 missing weights: 'lm_head.weight'; if the embedding is the output matrix "
                'too, write "tie_word_embeddings": true into config.json'
            )
        names = matched_names(self.path, "hf", self._args, shapes, tied, self.fused)
        return {ours: found[theirs] for ours, theirs in names.items()}

    def weights(self) -> dict[str, StoredTensor]:
        args, names = self._args, self._names()
        stored = {theirs: self._stored(theirs) for theirs in dict.fromkeys(names.values())}
        heads = [name for name in (*self.tensors, *self._quantized) if usual(name) == "lm_head.weight"]
        if names["output.weight"] not in heads:
            self._check_tied(stored[names["output.weight"]], heads)
        return {
            ours: weight_in(stored[theirs], ours, args, half_split=True, fused=self.fused)
            for ours, theirs in names.items()
        }

    def holders(self) -> dict[str, Path]:
        names = {ours: theirs for ours, theirs in self._names().items() if theirs not in self._quantized}
        return {ours: self._holders[theirs].path for ours, theirs in names.items()}

    def _stored(self, name: str) -> StoredTensor:
        if name in self._quantized:
            return self._quantized[name].stored()
        return self._holders[name].tensor(name)

    def _part(self, name: str) -> FileTensor:
        file = of_safetensors(self.path, self._holders[name])
        return FileTensor(file.tensors[name], file)

    def _check_tied(self, embedding: StoredTensor, heads: list[str]) -> None:
        """MismatchError if a tied model has another output matrix: versions of transformers then differ."""
        for head in (self._stored(name) for name in heads):
            same = (head.format, head.shape) == (embedding.format, embedding.shape)
            left, right = head.data, embedding.data
            parts = [slice(i, i + ROWS_COMPARED) for i in range(0, len(head), ROWS_COMPARED)]
            if not same or not all(np.array_equal(left[part], right[part]) for part in parts):
                what = "is true, but there is an lm_head.weight, and it is not the embedding"
                raise MismatchError(f"{self.config.path}: tie_word_embeddings {what}")

    def tokenizer_path(self) -> Path:
        return tokenizer_path(self.path)

    def read_tokenizer(self) -> Tokenizer:
        return tokenizer_of_folder(self.path)

    def chat_template(self, name: str = "default") -> str | None:
        return chat_template(self.path, name)

    def sampling_defaults(self) -> dict[str, Any]:
        path = self.path / "generation_config.json"
        return of_generation_config(JsonFile(path)) if path.is_file() else {}


def _open(path: Path) -> SafetensorsFile | TorchFile:
    # The name chooses the reader. The reader checks the content, and no other reader is tried.
    return SafetensorsFile(path) if path.name.endswith(".safetensors") else TorchFile(path)


def model_args(config: JsonFile) -> ModelArgs:
    """The hyperparameters. An absent key takes transformers' default, or is an error."""
    if known := other_config(config.values):
        raise UnsupportedError(f"{config.path}: {known}")
    context = _context(config)
    method_of(config)  # a method that is not run is an error
    _check_plain(config)
    dim, n_heads = size(config, "hidden_size", "dim"), size(config, "num_attention_heads", "n_heads")
    if config.get("head_dim", int) is None and dim % n_heads:
        raise ConfigError(f"{config.path}: hidden_size {dim} cannot be divided among {n_heads} heads")
    theta, scaling = hf_rope(config)
    values: dict[str, Any] = {
        "dim": dim,
        "n_layers": size(config, "num_hidden_layers", "n_layers"),
        "n_heads": n_heads,
        "n_kv_heads": size(config, "num_key_value_heads", "n_kv_heads", n_heads),
        "head_dim": size(config, "head_dim", "head_dim", dim // n_heads),
        "hidden_dim": size(config, "intermediate_size", "hidden_dim"),
        "vocab_size": size(config, "vocab_size", "vocab_size"),
        "norm_eps": config.require("rms_norm_eps", float),
        "rope_theta": theta,
        "max_seq_len": min(context, LIMITS["max_seq_len"]),
    }
    if config.get("model_type", str) in WINDOWS and config.values.get("sliding_window") is not None:
        values["sliding_window"] = within(size(config, "sliding_window"), values["max_seq_len"])
    try:
        return ModelArgs(**values, rope_scaling=scaling)
    except ConfigError as error:
        raise ConfigError(f"{config.path}: {error}") from None


def _context(config: JsonFile) -> int:
    """The number of positions; UnsupportedError for a model of another kind."""
    kind, names = config.get("model_type", str), config.get("architectures", list, [])
    context = size(config, "max_position_embeddings", default=4096 if kind == PHI3 else 2048)
    stated = kind != "mistral" or "sliding_window" in config.values  # its default has changed
    if stated and (kind or names) and names in SPELLINGS.get(kind, ()):
        return context
    known = (
        "LlamaForCausalLM (llama), Phi3ForCausalLM (phi3), "
        "and MistralForCausalLM (mistral) that states its sliding_window"
    )
    found = f"architectures {escape(names)}, model_type {escape(kind)}"
    raise UnsupportedError(f"{config.path}: {found}; this program runs {known}")


def _check_plain(config: JsonFile) -> None:
    for key, plain in PLAIN.items():
        if (value := config.values.get(key)) is not None and value not in plain:
            raise UnsupportedError(
                f"{config.path}: {key} is {escape(value, 60)}; only {plain[0]!r} is run here"
            )


def chat_template(folder: Path, name: str = "default") -> str | None:
    """The Jinja source. Versions of transformers store it in different places; the newest comes first."""
    path = folder / "chat_template.jinja"
    only = os.path.lexists(path)  # what tokenizer_config.json has does not count then
    path = path if name == "default" else folder / "additional_chat_templates" / f"{name}.jinja"
    if os.path.lexists(path):
        return template_file(path)
    for file in () if only else ("tokenizer_config.json", "chat_template.json"):
        path = folder / file
        found = None
        if os.path.lexists(path):
            found = JsonFile(path, MAX_BYTES).get("chat_template", (str, list))
        if isinstance(found, list):  # several, by name
            parts = [part for part in found if isinstance(part, dict) and part.get("name") == name]
            found = parts[0].get("template") if parts else None
            if not isinstance(found, str | None):
                raise TemplateError(f"{path}: the chat template {name} is no text")
        elif name != "default":
            found = None
        if found is not None:
            return found
    return None


def template_file(path: Path) -> str:
    """The Jinja source in a file, without a byte order mark."""
    file = MappedFile(path, "a chat template")
    if file.size > 4 * MAX_SOURCE:
        raise TemplateError(f"{path} has {file.size} bytes, at most {4 * MAX_SOURCE} are read")
    try:
        return str(file.map[:], "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise TemplateError(f"{path}: byte {error.start} is not UTF-8") from None
