"""An adapter in a folder, as Hugging Face's PEFT writes it.

    adapter_config.json         r, lora_alpha, rank_pattern, alpha_pattern, use_rslora and more
    adapter_model.safetensors   or adapter_model.bin, from older versions

    base_model.model.model.layers.N.self_attn.q_proj.lora_A.weight (r, IN), lora_B.weight (OUT, r)
    base_model.model.model.embed_tokens.lora_embedding_A (r, V), lora_embedding_B (D, r)

An adapter of Phi-3 may change qkv_proj and gate_up_proj: A is that of all their parts, and B has the rows of
the parts one below the other.

What this file promises: each key of adapter_config.json that changes the result is computed, or refused with
its name. The rows of B of q_proj and k_proj have Hugging Face's order and are put into the model's.
"""

import json
import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import regex

from ...backend.formats import FORMATS, StoredTensor
from ...config import ModelArgs
from ...errors import ConfigError, FormatError, MismatchError, UnsupportedError, escape
from ...lora import LowRank
from ..files import write_bytes
from ..json_file import JsonFile
from ..names import hf_rows, our_names, tensor_names
from ..pytorch.file import TorchFile
from ..safetensors_file import SafetensorsFile
from ..safetensors_write import write_safetensors
from .base import Adapter, Pair, paired

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that exists is used
PREFIX = "base_model.model."
ENDS = {
    ".lora_A.weight": ("a", False),
    ".lora_B.weight": ("b", False),
    ".lora_embedding_A": ("a", True),
    ".lora_embedding_B": ("b", True),
}
COPY = ".base_layer.weight"  # PEFT repeats the base's embedding when the adapter changes it
MERGE = "merge it with PEFT (merge_and_unload) and name the merged model"

# Keys that change the result, and their values that do not.
PLAIN: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": ([],),
    "use_dora": (False,),
    "use_qalora": (False,),
    "lora_bias": (False,),
    "layer_replication": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": ([], {}),
    "alora_invocation_tokens": ([],),
    "arrow_config": ({},),
    "kasa_config": ({},),
    "use_bdlora": ({}, False),
    "monteclora_config": ({},),
}
# These ways to begin change the base's weights, and the file has only A and B.
CHANGES_BASE = ("pissa", "olora", "loftq", "corda", "lora_ga")
# A crafted regular expression could run for years, or fill the memory when it is compiled: "a{1000000000}".
MAX_PATTERNS, MAX_PATTERN, PATTERN_SECONDS = 1000, 200, 0.1
NOT_IN_PATTERNS = ("{", "(?", "\\L")


class PEFTAdapter(Adapter):
    """An adapter in PEFT's folder."""

    format = "PEFT"

    def __init__(self, folder: Path):
        self.path = folder
        if not os.path.lexists(folder / CONFIG):
            raise FormatError(f"{folder} has no {CONFIG}; wanted a folder of PEFT, or an adapter in GGUF")
        self.config = JsonFile(folder / CONFIG)
        self._check_plain()
        name = next((name for name in WEIGHTS if os.path.lexists(folder / name)), None)
        if name is None:
            mlx = "; its adapters.safetensors is MLX's, which has other names and shapes"
            hint = mlx if os.path.lexists(folder / "adapters.safetensors") else ""
            raise FormatError(f"{folder} has no weights; looked for {', '.join(WEIGHTS)}{hint}")
        is_torch = name.endswith(".bin")
        self.file = TorchFile(folder / name) if is_torch else SafetensorsFile(folder / name)
        self.base = self.config.get("base_model_name_or_path", str)
        self.copies: dict[str, str] = {}
        self.pairs = {}
        found = paired(self.file, self._halves(), (".lora_A", ".lora_B"))
        weights = Counter(a for a, _ in found.values())
        for ours, (a, b) in found.items():
            table, rank = ours == "tok_embeddings.weight", self.file.tensors[a].shape[0]
            self.pairs[ours] = Pair(a, b, self._scale(a, rank), flipped=table, fused=weights[a] > 1)

    def _halves(self) -> dict[str, tuple[str | None, str | None]]:
        """The tensors of each weight, by our name of it."""
        halves: dict[str, tuple[str | None, str | None]] = {}
        for tensor in self.file.tensors:
            end = next((end for end in (*ENDS, COPY) if tensor.endswith(end)), "")
            module = tensor.removesuffix(end)
            names = our_names(f"{module.removeprefix(PREFIX)}.weight", "hf")
            known = module.startswith(PREFIX) and end and names and "norm" not in names[0]
            table = names == ["tok_embeddings.weight"]
            if not known or (end != COPY and ENDS[end][1] != table) or (end == COPY and len(names) > 1):
                raise UnsupportedError(f"{self.file.path}: {escape(tensor)} is {_kind(tensor)}; {MERGE}")
            for ours in names:
                if end == COPY:
                    self.copies[ours] = tensor
                    continue
                at, both = 0 if ENDS[end][0] == "a" else 1, list(halves.get(ours, (None, None)))
                if other := both[at]:
                    what = f"has {escape(tensor)} and {escape(other)}, which change the same weight"
                    raise MismatchError(f"{self.file.path} {what}")
                both[at] = tensor
                halves[ours] = both[0], both[1]
        return halves

    def _check_plain(self) -> None:
        for key, plain in PLAIN.items():
            value = self.config.values.get(key)
            if value is None and key == "peft_type":
                self.config.require(key, str)
            if value is not None and value not in plain:
                found = f"{key} is {escape(value, 60)}; only {plain[0]!r} is run here"
                raise UnsupportedError(f"{self.config.path}: {found}; {MERGE}")
        begin = self.config.get("init_lora_weights", (bool, str), True)
        if isinstance(begin, str) and begin.startswith(CHANGES_BASE):
            what = f"init_lora_weights is {escape(begin, 60)}: the base's weights were changed with it"
            raise UnsupportedError(
                f"{self.config.path}: {what}; PEFT's save_pretrained with "
                "path_initial_model_for_weight_conversion writes a LoRA for the unchanged base"
            )

    def _scale(self, tensor: str, rank: int) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora. MismatchError if the tensor has another rank."""
        module = tensor.removeprefix(PREFIX).rpartition(".lora_")[0]
        wanted = self._of("rank_pattern", module, int, self.config.get("r", int, 8))
        alpha = self._of("alpha_pattern", module, float, self.config.get("lora_alpha", float, 8.0))
        if rank != wanted:
            what = f"{escape(tensor)} has the rank {rank}, {CONFIG} wants {escape(wanted, 30)}"
            raise MismatchError(f"{self.file.path}: {what}")
        return alpha / (rank**0.5 if self.config.get("use_rslora", bool, False) else rank)

    def _of(self, key: str, module: str, kind: type, default: Any) -> Any:
        """The value of the first pattern of `key` that is, or ends, the module's name. It may be a regex."""
        patterns = self.config.part(key)
        if patterns is not None and len(patterns.values) > MAX_PATTERNS:
            raise FormatError(f"{self.config.path}: {key} has more than {MAX_PATTERNS} patterns")
        for pattern in patterns.values if patterns else ():
            refused = len(pattern) > MAX_PATTERN or any(part in pattern for part in NOT_IN_PATTERNS)
            try:
                name = "(" if refused else rf"(.*\.)?({pattern})$"
                found = regex.match(name, module, timeout=PATTERN_SECONDS)
            except (regex.error, TimeoutError, RecursionError):
                what = f"{key} has {escape(pattern, 60)}, which is no pattern of names that is read here"
                raise ConfigError(f"{self.config.path}: {what}") from None
            if found and patterns is not None:
                return patterns.require(pattern, kind)
        return default

    def rows(self, name: str, args: ModelArgs) -> np.ndarray | None:
        return hf_rows(name, args)


def _kind(tensor: str) -> str:
    """What an unknown tensor is, for messages."""
    kinds = {
        "lora_magnitude_vector": "a magnitude of DoRA",
        "modules_to_save": "a weight that was trained as a whole (modules_to_save)",
        ".embed_tokens.weight": "a whole embedding: it was trained or resized",
        ".lm_head.weight": "a whole output matrix: it was trained or resized",
        "token_adapter": "rows of the embedding (trainable_token_indices)",
        "trainable_tokens": "rows of the embedding (trainable_token_indices)",
        ".bias": "a bias, and a LLaMA has none",
        "norm": "of a norm, and only matrices have A and B",
    }
    return next((kind for part, kind in kinds.items() if part in tensor), "no A or B of a LLaMA's matrix")


def write_peft(
    folder: Path, updates: Mapping[str, LowRank], args: ModelArgs, base: str | None = None
) -> None:
    """Write the updates, by our names, as a folder that PEFT loads. Each file is replaced when it is whole.

    `base` is the name of the base model. lora_alpha is scale * r. A config of another adapter is removed
    first: whenever the process is killed, no config stands beside the weights of another adapter.
    """
    theirs = tensor_names(args, "hf")
    modules = {name: theirs[name].removesuffix(".weight") for name in updates}
    ranks = {modules[name]: len(one.a) for name, one in updates.items()}
    alphas = {modules[name]: one.scale * len(one.a) for name, one in updates.items()}
    r, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": _whole(alpha),
        "rank_pattern": {name: n for name, n in ranks.items() if n != r},
        "alpha_pattern": {name: _whole(x) for name, x in alphas.items() if x != alpha},
        "use_rslora": False,
        "target_modules": _targets(updates, modules, args),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    tensors: dict[str, np.ndarray] = {}
    for name, (a, b, _) in updates.items():
        if (rows := hf_rows(name, args)) is not None:
            b = b[np.argsort(rows)]
        module = PREFIX + modules[name]
        if name == "tok_embeddings.weight":
            tensors |= {f"{module}.lora_embedding_A": b.T, f"{module}.lora_embedding_B": a.T}
        else:
            tensors |= {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2).encode()
    if (folder / CONFIG).is_file() and (folder / CONFIG).read_bytes() != text:
        (folder / CONFIG).unlink()
    f32 = FORMATS["F32"]
    write_safetensors(
        folder / WEIGHTS[0],
        {name: (f32, x.shape) for name, x in tensors.items()},
        lambda name: [StoredTensor.quantize(tensors[name], f32).data],
    )
    write_bytes(folder / CONFIG, text)


def _whole(x: float) -> float:
    """A whole number as an int, as PEFT writes it."""
    return int(x) if x == int(x) else x


def _targets(updates: Mapping[str, LowRank], modules: Mapping[str, str], args: ModelArgs) -> list[str]:
    """The last steps of the modules' names if all layers have the same ones, or else the whole names."""
    last = {name.rpartition(".")[2] for name in modules.values()}
    whole = [name for name in tensor_names(args, "hf").items() if name[1].split(".")[-2] in last]
    if {ours for ours, _ in whole} == updates.keys():
        return sorted(last)
    return sorted(modules.values())
