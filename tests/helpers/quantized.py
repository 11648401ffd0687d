"""Quantized weights as GPTQ, AWQ and compressed-tensors store them, packed here one whole number at a time.

A `Variant` makes the tensors of a weight (N, K) from random numbers, with the weight in float32. This file
packs by Python's whole numbers of any size, and so by another way than the readers unpack.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from numpy_llama.checkpoint.names import hf_rows, tensor_names
from numpy_llama.config import ModelArgs
from numpy_llama.proof.oracle import rope_parameters
from numpy_llama.proof.tiny import random_weights

Tensors = dict[str, torch.Tensor]
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def packed(numbers: np.ndarray, bits: int) -> np.ndarray:
    """Rows of whole numbers as rows of int32: number i begins at bit i * bits of its row."""
    words = -(-numbers.shape[1] * bits // 32)
    rows = []
    for row in numbers.tolist():
        whole = 0
        for i, number in enumerate(row):
            whole |= number << bits * i
        rows.append(np.frombuffer(whole.to_bytes(4 * words, "little"), "<i4"))
    return np.array(rows)


def dense(q: np.ndarray, zeros: np.ndarray, scales: torch.Tensor, groups: np.ndarray) -> np.ndarray:
    """scale * (q - zero) in float64, where it is exact, then float32."""
    s = scales.double().numpy()[:, groups]
    return (s * (q.astype(int) - zeros.astype(int)[:, groups])).astype(np.float32)


@dataclass(frozen=True)
class Variant:
    """A kind of file. `settings` is the quantization_config; `make(rng, N, K)` the tensors and the weight."""

    settings: Mapping[str, Any]
    make: Callable[[np.random.Generator, int, int], tuple[Tensors, np.ndarray]]
    beside: str | None = None  # the file of the settings, if config.json does not have them


def grouped(rng, N: int, K: int, bits: int, size: int, symmetric: bool, dtype=torch.float16, order=None):
    """Random q (N, K), zeros (N, G), scales (N, G), and the group of each column."""
    groups = np.arange(K) // size
    if order is not None:
        groups = groups[order]
    G = -(-K // size)
    q = rng.integers(0, 1 << bits, (N, K))
    zeros = np.full((N, G), 1 << bits - 1) if symmetric else rng.integers(1, 1 << bits, (N, G))
    scales = torch.from_numpy(rng.uniform(0.5, 1.5, (N, G)) / (2**bits * K**0.5)).to(dtype)
    return q, zeros, scales, groups


def gptq(
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    stored_minus: int = 1,
    stated: str | None = "gptq",
    act_order: bool = False,
    one_order: bool = False,
    g_idx: bool = True,
    bias: bool = False,
    beside: str | None = None,
    dtype: torch.dtype = torch.float16,
    **settings: Any,
) -> Variant:
    """stored_minus: what is subtracted from a zero in the file. stated: its checkpoint_format.

    one_order: weights that multiply the same x have their columns in the same order, as GPTQ makes them.
    """

    def make(rng: np.random.Generator, N: int, K: int) -> tuple[Tensors, np.ndarray]:
        group = K if size == -1 else size
        order = (np.random.default_rng(K) if one_order else rng).permutation(K) if act_order else None
        q, zeros, scales, groups = grouped(rng, N, K, bits, group, symmetric, dtype, order)
        tensors = {
            "qweight": packed(q, bits).T,
            "qzeros": packed((zeros - stored_minus).T, bits),
            "g_idx": groups.astype(np.int32),
        }
        tensors = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}
        tensors["scales"] = scales.T.contiguous()
        if not g_idx:
            del tensors["g_idx"]
        if bias:
            tensors["bias"] = torch.zeros(N, dtype=dtype)
        return tensors, dense(q, zeros, scales, groups)

    stated_format = {} if stated is None else {"checkpoint_format": stated}
    common = {"quant_method": "gptq", "bits": bits, "group_size": size, "sym": symmetric}
    return Variant(common | stated_format | {"desc_act": act_order} | settings, make, beside)


def awq(version: str = "gemm", size: int = 32, symmetric: bool = False, beside: str | None = None) -> Variant:
    def make(rng: np.random.Generator, N: int, K: int) -> tuple[Tensors, np.ndarray]:
        group = K if size == -1 else size
        q, zeros, scales, groups = grouped(rng, N, K, 4, group, symmetric)
        if version == "gemm":
            columns = (np.arange(N) // 8 * 8) + np.tile(AWQ_ORDER, N // 8)
            tensors = {"qweight": packed(q.T[:, columns], 4), "qzeros": packed(zeros.T[:, columns], 4)}
            scales_of_file = scales.T.contiguous()
        else:
            wide = 8 * -(-zeros.shape[1] // 8)
            behind = ((0, 0), (0, wide - zeros.shape[1]))
            tensors = {"qweight": packed(q, 4), "qzeros": packed(np.pad(zeros, behind), 4)}
            scales_of_file = torch.from_numpy(np.pad(scales.numpy(), behind))
        found = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in tensors.items()}
        return found | {"scales": scales_of_file}, dense(q, zeros, scales, groups)

    names = ("w_bit", "q_group_size") if beside else ("bits", "group_size")
    settings = {names[0]: 4, names[1]: size, "zero_point": not symmetric, "version": version}
    return Variant({"quant_method": "awq"} | settings, make, beside)


def compressed(
    bits: int = 4,
    size: int = 32,
    symmetric: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    act_order: bool = False,
    scale: float = 1.0,
) -> Variant:
    def make(rng: np.random.Generator, N: int, K: int) -> tuple[Tensors, np.ndarray]:
        group = K if size == -1 else size
        order = rng.permutation(K) if act_order else None
        q, zeros, scales, groups = grouped(rng, N, K, bits, group, symmetric, dtype, order)
        scales = (scales.float() * scale).to(dtype)
        tensors = {
            "weight_packed": torch.from_numpy(packed(q, bits)),
            "weight_scale": scales,
            "weight_shape": torch.tensor([N, K]),
        }
        if not symmetric:
            tensors["weight_zero_point"] = torch.from_numpy(packed(zeros.T, bits).T.copy())
        if act_order:
            tensors["weight_g_idx"] = torch.from_numpy(groups.astype(np.int32))
        return tensors, dense(q, zeros, scales, groups)

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": size}
    weights |= {"strategy": "channel" if size == -1 else "group", "actorder": "group" if act_order else None}
    settings = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }
    return Variant(settings, make)


AUTO_ROUND = {"quant_method": "auto-round", "packing_format": "auto_round:auto_gptq"}
VARIANTS = {
    "GPTQ 2 bits": gptq(2),
    "GPTQ 2 bits, asymmetric": gptq(2, symmetric=False),
    "GPTQ 3 bits": gptq(3),
    "GPTQ 3 bits, asymmetric": gptq(3, symmetric=False),
    "GPTQ 4 bits": gptq(4),
    "GPTQ 4 bits, asymmetric": gptq(4, symmetric=False),
    "GPTQ 8 bits": gptq(8),
    "GPTQ 8 bits, asymmetric": gptq(8, symmetric=False),
    "GPTQ version 2": gptq(4, symmetric=False, stored_minus=0, stated="gptq_v2"),
    "GPTQ version 2, stated as 1": gptq(4, stored_minus=0, stated="gptq"),
    "GPTQ version 2, 3 bits, stated as 1": gptq(3, stored_minus=0, stated=None),
    "GPTQ version 1, stated as 2": gptq(4, stored_minus=1, stated="gptq_v2"),
    "GPTQ act-order": gptq(4, act_order=True),
    "GPTQ act-order, one order": gptq(4, act_order=True, one_order=True),
    "GPTQ act-order, asymmetric": gptq(4, symmetric=False, act_order=True),
    "GPTQ act-order, 8 bits": gptq(8, act_order=True),
    "GPTQ groups of 64": gptq(4, 64),
    "GPTQ groups of 16": gptq(4, 16),
    "GPTQ groups of 48": gptq(4, 48),
    "GPTQ one group": gptq(4, -1),
    "GPTQ with biases of zero": gptq(4, bias=True),
    "GPTQ without g_idx": gptq(4, g_idx=False, stated=None),
    "GPTQ quantize_config.json": gptq(4, beside="quantize_config.json"),
    "GPTQ of auto-round": gptq(4, **AUTO_ROUND),
    "GPTQ bfloat16 scales": gptq(4, dtype=torch.bfloat16),
    "AWQ gemm": awq(),
    "AWQ gemm, symmetric": awq(symmetric=True),
    "AWQ gemm, one group": awq(size=-1),
    "AWQ gemv": awq("gemv"),
    "AWQ quant_config.json": awq(beside="quant_config.json"),
    "W4A16": compressed(4),
    "W4A16, asymmetric": compressed(4, symmetric=False),
    "W4A16, act-order": compressed(4, act_order=True),
    "W4A16, float16 scales": compressed(4, dtype=torch.float16),
    "W4A16, float32 scales": compressed(4, dtype=torch.float32),
    "W4A16, tiny scales": compressed(4, scale=2.0**-20),
    "W4A16, asymmetric, float32 scales": compressed(4, symmetric=False, dtype=torch.float32),
    "W4A16, act-order, float32 scales": compressed(4, dtype=torch.float32, act_order=True),
    "W8A16": compressed(8),
    "W8A16, float32 scales": compressed(8, dtype=torch.float32),
    "W8A16, one group, float32 scales": compressed(8, -1, dtype=torch.float32),
    "W8A16, one group": compressed(8, -1),
    "W8A16, asymmetric": compressed(8, symmetric=False),
}


def parts_of(names: Mapping[str, str]) -> dict[str, list[str]]:
    """The weights in each tensor: theirs -> ours."""
    parts: dict[str, list[str]] = {}
    for ours, theirs in names.items():
        parts.setdefault(theirs, []).append(ours)
    return parts


def in_file_order(w: np.ndarray, ours: str, args: ModelArgs) -> np.ndarray:
    """The rows of a weight in Hugging Face's order."""
    places = hf_rows(ours, args)
    return w if places is None else w[np.argsort(places)]


def write_folder(
    folder: Path,
    args: ModelArgs,
    variant: Variant | Callable[[str], Variant | None],
    settings: Mapping[str, Any] | None = None,
    seed: int = 0,
    fused: bool = False,
) -> dict[str, np.ndarray]:
    """A model whose matrices in the layers are quantized: -> its weights in float32, under our names.

    A function in the place of the variant chooses one for each weight by our name, or None for a plain one.
    fused: a Phi-3, which has q, k and v in one tensor, and gate and up in another.
    """
    rng = np.random.default_rng(seed)
    kind = variant if callable(variant) else lambda name: variant if name.startswith("layers.") else None
    weights, tensors = random_weights(rng, args, np.float32, False), Tensors()
    for theirs, parts in parts_of(tensor_names(args, "hf", fused)).items():
        whole = np.concatenate([in_file_order(weights[ours], ours, args) for ours in parts])
        chosen = kind(parts[0]) if whole.ndim == 2 else None
        if chosen is None:
            tensors[theirs] = torch.from_numpy(whole)
            continue
        made, whole = chosen.make(rng, *whole.shape)
        for ours in parts:
            rows, whole = np.split(whole, [len(weights[ours])])
            weights[ours] = rows if (places := hf_rows(ours, args)) is None else rows[places]
        tensors |= {f"{theirs.removesuffix('weight')}{suffix}": part for suffix, part in made.items()}
    found = settings if settings is not None else variant.settings
    beside = None if callable(variant) else variant.beside
    config = {
        "architectures": ["Phi3ForCausalLM" if fused else "LlamaForCausalLM"],
        "model_type": "phi3" if fused else "llama",
        "hidden_size": args.dim,
        "intermediate_size": args.hidden_dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "vocab_size": args.vocab_size,
        "max_position_embeddings": args.max_seq_len,
        "rms_norm_eps": args.norm_eps,
        "rope_parameters": rope_parameters(args),
        "tie_word_embeddings": False,
    }
    if beside is None:
        config["quantization_config"] = dict(found)
    else:
        (folder / beside).write_text(json.dumps(dict(found)))
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return weights
