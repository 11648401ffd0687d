"""Weights with float32 scales as files of bitsandbytes, compressed-tensors and FP8 store them.

The `Variant` of helpers/quantized.py: random codes and scales, with the weight in float32. Codes are put into
bytes by Python, and PyTorch computes the weight.
"""

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from numpy_llama.backend.formats import FP4_TABLE, NF4_TABLE

from .quantized import Tensors, Variant

TABLES = {"nf4": NF4_TABLE, "fp4": FP4_TABLE}
DTYPES = {torch.bfloat16: "bfloat16", torch.float16: "float16", torch.float32: "float32"}


def int8_rows() -> Variant:
    """LLM.int8(): q SCB / 127, rounded as bitsandbytes rounds it."""

    def make(rng: np.random.Generator, N: int, K: int) -> tuple[Tensors, np.ndarray]:
        q = torch.from_numpy(rng.integers(-127, 128, (N, K)).astype(np.int8))
        largest = torch.from_numpy((rng.uniform(1, 4, N) / K**0.5).astype(np.float32))
        tensors = {"weight": q, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return tensors, (q * largest[:, None] * 7.874015718698502e-3).numpy()

    return Variant({"quant_method": "bitsandbytes", "load_in_8bit": True}, make)


def four_bits(
    kind: str = "nf4",
    blocksize: int = 64,
    double: bool = False,
    storage: torch.dtype = torch.uint8,
    change: Callable[[dict[str, Any]], Any] = lambda state: None,
) -> Variant:
    """change: may spoil the JSON of each weight."""

    def make(rng: np.random.Generator, N: int, K: int) -> tuple[Tensors, np.ndarray]:
        q = rng.integers(0, 16, N * K)
        codes = np.array([q[i] << 4 | q[i + 1] for i in range(0, len(q), 2)], np.uint8)
        blocks = -(-N * K // blocksize)
        state: dict[str, Any] = {
            "quant_type": kind,
            "blocksize": blocksize,
            "dtype": "bfloat16",
            "shape": [N, K],
        }
        absmax = torch.from_numpy(rng.uniform(1, 3, blocks) / K**0.5).float()
        tensors = {"weight": torch.from_numpy(codes).view(storage)[:, None]}
        tensors["weight.quant_map"] = torch.from_numpy(TABLES[kind].copy())
        tensors["weight.absmax"] = absmax
        if double:
            table = torch.linspace(-1, 1, 256)
            of_256 = torch.from_numpy(rng.uniform(0.1, 0.2, -(-blocks // 256))).float()
            short = torch.from_numpy(rng.integers(0, 256, blocks).astype(np.uint8))
            state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.3}
            tensors |= {
                "weight.absmax": short,
                "weight.nested_absmax": of_256,
                "weight.nested_quant_map": table,
            }
            absmax = table[short.int()] * of_256.repeat_interleave(256)[:blocks] + torch.tensor(0.3)
        change(state)
        text = torch.from_numpy(np.frombuffer(json.dumps(state).encode(), np.uint8).copy())
        tensors[f"weight.quant_state.bitsandbytes__{kind}"] = text
        values = torch.from_numpy(TABLES[kind])[torch.from_numpy(q)]
        dense = values * absmax.repeat_interleave(blocksize)[: N * K]
        return tensors, dense.reshape(N, K).numpy()

    settings = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": kind}
    skipped = {"llm_int8_skip_modules": ["lm_head"], "bnb_4bit_use_double_quant": double}
    return Variant(settings | skipped, make)


def scaled(
    settings: dict[str, Any],
    dtype: torch.dtype,
    of_block: Callable[[int, int], tuple[int, int]],
    name: str = "weight_scale",
    scale_dtype: torch.dtype = torch.float32,
    shape: Callable[[int, int], tuple[int, ...]] | None = None,
    more: Callable[[], Tensors] = dict,
) -> Variant:
    """A scale for each block; of_block(N, K) is its rows and columns, shape(N, K) is that of the tensor."""

    def make(rng: np.random.Generator, N: int, K: int) -> tuple[Tensors, np.ndarray]:
        rows, columns = of_block(N, K)
        grid = -(-N // rows), -(-K // columns)
        codes = torch.from_numpy(rng.integers(0, 256, (N, K), dtype=np.uint8))
        if dtype == torch.float8_e4m3fn:
            codes[(codes & 0x7F) == 0x7F] = 0  # NaN
        q = codes.view(dtype)
        mean = 74 if dtype == torch.int8 else 100
        scales = torch.from_numpy(rng.uniform(0.5, 1.5, grid) / (mean * K**0.5)).to(scale_dtype)
        wide = scales.float().repeat_interleave(rows, 0)[:N].repeat_interleave(columns, 1)[:, :K]
        tensors = {"weight": q, name: scales.reshape(shape(N, K) if shape else grid)}
        return tensors | more(), (q.float() * wide).numpy()

    return Variant(settings, make)


def compressed(format: str, weights: dict[str, Any]) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": {"num_bits": 8, "dynamic": True}}
    return {
        "quant_method": "compressed-tensors",
        "format": format,
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
    }


BYTES = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
FLOATS = BYTES | {"type": "float"}
BLOCKS = FLOATS | {"strategy": "block", "block_structure": [128, 128]}
W8A8, FLOAT8, BLOCK8 = (
    compressed("int-quantized", BYTES),
    compressed("float-quantized", FLOATS),
    compressed("float-quantized", BLOCKS),
)
E4M3 = torch.float8_e4m3fn
FP8_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
FP8_ONE = {"quant_method": "fp8", "activation_scheme": "static"}
FBGEMM = {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0, "modules_to_not_convert": ["lm_head"]}


def a_row(N: int, K: int) -> tuple[int, int]:
    return 1, K


def a_square(N: int, K: int) -> tuple[int, int]:
    return 128, 128


def all_of_it(N: int, K: int) -> tuple[int, int]:
    return N, K


def one(N: int, K: int) -> tuple[int, ...]:
    return ()


def input_scale() -> Tensors:
    return {"input_scale": torch.tensor(0.5)}


VARIANTS = {
    "int8": int8_rows(),
    "nf4": four_bits(),
    "nf4, double": four_bits(double=True),
    "nf4, double, bfloat16": four_bits(double=True, storage=torch.bfloat16),
    "nf4, float32": four_bits(storage=torch.float32),
    "nf4, blocks of 128": four_bits(blocksize=128),
    "nf4, blocks of 32": four_bits(blocksize=32),
    "nf4, blocks of 4096": four_bits(blocksize=4096),
    "fp4": four_bits("fp4"),
    "fp4, double, float16": four_bits("fp4", double=True, storage=torch.float16),
    "W8A8, bfloat16": scaled(W8A8, torch.int8, a_row, scale_dtype=torch.bfloat16),
    "W8A8, float32": scaled(W8A8, torch.int8, a_row),
    "W8A8, one scale": scaled(W8A8, torch.int8, all_of_it, shape=one, more=input_scale),
    "W8A8, groups of 32": scaled(
        compressed("int-quantized", BYTES | {"strategy": "group", "group_size": 32}),
        torch.int8,
        lambda N, K: (1, 32),
    ),
    "W8A8, groups of 48": scaled(
        compressed("naive-quantized", BYTES | {"strategy": "group", "group_size": 48}),
        torch.int8,
        lambda N, K: (1, 48),
    ),
    "float-quantized, rows": scaled(FLOAT8, E4M3, a_row, scale_dtype=torch.bfloat16),
    "float-quantized, one scale": scaled(FLOAT8, E4M3, all_of_it, shape=lambda N, K: (1,), more=input_scale),
    "float-quantized, blocks": scaled(BLOCK8, E4M3, a_square, scale_dtype=torch.bfloat16),
    "FP8, blocks": scaled(FP8_BLOCKS, E4M3, a_square, "weight_scale_inv"),
    "FP8, bfloat16 blocks": scaled(FP8_BLOCKS, E4M3, a_square, "weight_scale_inv", torch.bfloat16),
    "FP8, one scale": scaled(FP8_ONE, E4M3, all_of_it, shape=one, more=input_scale),
    "fbgemm_fp8": scaled(FBGEMM, E4M3, a_row),
}
# The format of a weight with rows of 192, which are whole blocks of every format, if it is no other one.
STORED = {"nf4, blocks of 32": "F32", "W8A8, groups of 48": "F32"}


def stored_format(name: str) -> str:
    if name in STORED:
        return STORED[name]
    by_start = {"int8": "LLM_INT8", "nf4": "NF4", "fp4": "FP4", "W8A8": "INT8"}
    return next((format for start, format in by_start.items() if name.startswith(start)), "FP8")
