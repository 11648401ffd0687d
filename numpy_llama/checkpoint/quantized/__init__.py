"""Quantized folders of Hugging Face: the method that config.json names, and what is not run.

    quant_method         what is run                         file
    gptq                 2, 3, 4 and 8 bits                  gptq.py
    awq                  4 bits, gemm and gemv               awq.py
    auto-round           files in the layout of GPTQ or AWQ  the same two
    compressed-tensors   pack-quantized, 4 and 8 bits,       compressed_tensors.py
                         int-quantized, float-quantized
    bitsandbytes         int8, nf4, fp4                      bitsandbytes.py
    fp8, fbgemm_fp8      E4M3                                fp8.py

A method finds the tensors of each weight, checks them against each other, and gives the weight in one of
our formats without loss. METHODS is the table to extend.
"""

from typing import Any, NoReturn

from ...errors import UnsupportedError, escape
from ..json_file import JsonFile
from .awq import AWQ
from .base import FileTensor, Method, QuantizedWeight
from .bitsandbytes import BitsAndBytes
from .compressed_tensors import CompressedTensors
from .fp8 import FP8
from .gptq import GPTQ

__all__ = ["METHODS", "FileTensor", "Method", "QuantizedWeight", "method_of"]

METHODS: dict[str, type[Method]] = {  # by quant_method
    "gptq": GPTQ,
    "awq": AWQ,
    "compressed-tensors": CompressedTensors,
    "bitsandbytes": BitsAndBytes,
    "fp8": FP8,
    "fbgemm_fp8": FP8,
}
KEYS = ("quantization_config", "quantization", "compression_config")  # of config.json
# auto-round names the layout of its files, and may write its own name in two ways.
LAYOUTS = {"auto_round:auto_gptq": "gptq", "auto_round:auto_awq": "awq"}
# Files of settings beside an older config.json, which has no such key.
BESIDE = {"quantize_config.json": "gptq", "quant_config.json": "awq"}


def method_of(config: JsonFile) -> Method | None:
    """The method that quantized the weights; None if none did. UnsupportedError if it is not run."""
    for key in KEYS:
        if (found := config.values.get(key)) not in (None, {}):
            settings = found if isinstance(found, dict) else {"quant_method": found}
            name = settings.get("quant_method")
            if name is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
                name = "bitsandbytes"  # of 2023: transformers wrote no quant_method
            if isinstance(name, str) and name.endswith("auto-round"):
                name = LAYOUTS.get(str(settings.get("packing_format")), name)
            if not isinstance(found, dict) or not isinstance(name, str) or name not in METHODS:
                refuse(config, _called(settings), f"{key} is {escape(found, 120)}")
            return METHODS[name](JsonFile(config.path, values=settings))
    for file, method in BESIDE.items():
        if (path := config.path.with_name(file)).is_file():
            return METHODS[method](JsonFile(path))
    return None


def refuse(config: JsonFile, what: str, found: str) -> NoReturn:
    """The error for a method that is not run."""
    raise UnsupportedError(
        f"{config.path}: the weights are quantized by {what} ({found}), "
        "which is not run here; the model's GGUF or its unquantized folder is"
    )


def _called(settings: dict[str, Any]) -> str:
    """The method that quantized the weights, if the settings name it."""
    name = settings.get("quant_method")
    if name is None and settings.keys() >= {"bits", "group_size"}:
        return "MLX"  # it writes no quant_method
    return "a method without a name" if name is None else escape(name, 60)
