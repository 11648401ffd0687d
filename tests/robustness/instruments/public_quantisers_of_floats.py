"""Folders that public tools quantize, read by this program: variant x result.

    python tests/robustness/instruments/public_quantisers_of_floats.py [--shape tiny|1b] [--only TEXT]

A random LLaMA is quantized by bitsandbytes, compressed-tensors or PyTorch on the CPU and saved as these tools
save it. Then each weight is compared with what the tool itself makes of it, in float32 and bit for bit, and
the logits with those of transformers holding these weights. It needs bitsandbytes, accelerate and
compressed-tensors; the tests of this project do without them.
"""

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from numpy_llama.backend import build
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.names import hf_rows, tensor_names
from numpy_llama.config import ModelArgs

SHAPES = {
    "tiny": {"hidden_size": 192, "intermediate_size": 320, "num_hidden_layers": 2, "num_attention_heads": 6,
             "num_key_value_heads": 2, "vocab_size": 256, "max_position_embeddings": 64},
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 32000, "max_position_embeddings": 64},
}  # fmt: skip
E4M3 = torch.float8_e4m3fn
Dense = dict[str, torch.Tensor]  # the weights of the matrices in the layers, in float32, by their names
Writer = Callable[[LlamaForCausalLM, Path], Dense]


def bitsandbytes(**settings) -> Writer:
    """transformers quantizes while it loads, and saves the folder."""

    def write(model: LlamaForCausalLM, folder: Path) -> Dense:
        from bitsandbytes.functional import dequantize_4bit, int8_vectorwise_dequant

        model.save_pretrained(folder / "plain")
        config = BitsAndBytesConfig(**settings)
        quantized = LlamaForCausalLM.from_pretrained(
            folder / "plain", quantization_config=config, device_map="cpu", dtype=torch.float32
        )
        quantized.save_pretrained(folder)
        dense = {}
        for name, layer in quantized.named_modules():
            if not name.startswith("model.layers.") or not hasattr(layer, "weight") or layer.weight.ndim != 2:
                continue
            if settings.get("load_in_8bit"):
                SCB = layer.weight.SCB if layer.weight.SCB is not None else layer.state.SCB
                dense[f"{name}.weight"] = int8_vectorwise_dequant(layer.weight.data, SCB)
            else:
                layer.weight.quant_state.dtype = torch.float32
                dense[f"{name}.weight"] = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        return dense

    return write


def four_bits(kind: str, double: bool = False, storage: torch.dtype = torch.uint8) -> Writer:
    return bitsandbytes(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=double,
        bnb_4bit_quant_storage=storage,
    )


def each_matrix(quantize: Callable[[torch.Tensor], tuple[Dense, torch.Tensor]], settings: dict) -> Writer:
    """quantize(w) -> the tensors by their suffixes, and w as the tool dequantizes it."""

    def write(model: LlamaForCausalLM, folder: Path) -> Dense:
        tensors, dense = {}, {}
        for name, w in model.state_dict().items():
            if w.ndim == 1 or not name.startswith("model.layers."):
                tensors[name] = w.clone()
                continue
            parts, dense[name] = quantize(w)
            tensors |= {name.removesuffix("weight") + suffix: part for suffix, part in parts.items()}
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        model.config.save_pretrained(folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": settings}))
        return dense

    return write


def compressed(kind: str, strategy: str, dtype: torch.dtype = torch.bfloat16, **sizes) -> Writer:
    """compressed-tensors computes the scales, compresses and decompresses. kind: int or float.

    The library rounds a decompressed weight to the dtype of its scales; with the same scales in float32 it
    does not.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    arguments = QuantizationArgs(num_bits=8, type=kind, strategy=strategy, **sizes)
    activations = QuantizationArgs(num_bits=8, type=kind, strategy="token", dynamic=True)
    scheme = QuantizationScheme(targets=["Linear"], weights=arguments, input_activations=activations)
    format = f"{kind}-quantized"
    tool = BaseCompressor.get_value_from_registry(format)

    def quantize(w: torch.Tensor) -> tuple[Dense, torch.Tensor]:
        N, K = w.shape
        rows, columns = {
            "channel": (1, K), "tensor": (N, K), "group": (1, sizes.get("group_size")),
            "block": tuple(sizes.get("block_structure", (0, 0))),
        }[strategy]  # fmt: skip
        padded = torch.nn.functional.pad(w, (0, -K % columns, 0, -N % rows))
        blocks = padded.reshape(len(padded) // rows, rows, -1, columns)
        scale, _ = calculate_qparams(blocks.amin((1, 3)), blocks.amax((1, 3)), arguments)
        scale = scale.reshape(()) if strategy == "tensor" else scale
        state = {"weight": w.to(dtype), "weight_scale": scale.to(dtype)}
        parts = tool.compress(state, scheme)
        exact = tool.decompress(parts | {"weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
        rounded = tool.decompress(parts, scheme)["weight"]
        assert torch.equal(exact.to(dtype), rounded), "the library rounds a weight once, to the scale's dtype"
        return {key: value for key, value in parts.items() if value is not None}, exact

    config = QuantizationConfig(config_groups={"group_0": scheme}, format=format, ignore=["lm_head"])
    return each_matrix(quantize, config.model_dump(mode="json") | {"quant_method": "compressed-tensors"})


def fp8(rows: int | None, columns: int | None, name: str, settings: dict) -> Writer:
    """PyTorch rounds to E4M3; transformers' own dequantization, where it has one, is scale times weight."""

    def quantize(w: torch.Tensor) -> tuple[Dense, torch.Tensor]:
        N, K = w.shape
        r, c = rows or N, columns or K
        padded = torch.nn.functional.pad(w, (0, -K % c, 0, -N % r))
        scale = padded.reshape(len(padded) // r, r, -1, c).abs().amax((1, 3)) / 448
        wide = scale.repeat_interleave(r, 0)[:N].repeat_interleave(c, 1)[:, :K]
        q = (w / wide).to(E4M3)
        return {"weight": q, name: scale}, q.float() * wide

    return each_matrix(quantize, settings)


BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
VARIANTS: dict[str, Callable[[], Writer]] = {
    "bitsandbytes int8": lambda: bitsandbytes(load_in_8bit=True),
    "bitsandbytes nf4": lambda: four_bits("nf4"),
    "bitsandbytes nf4, double": lambda: four_bits("nf4", True),
    "bitsandbytes nf4, double, in bfloat16": lambda: four_bits("nf4", True, torch.bfloat16),
    "bitsandbytes nf4, in float32": lambda: four_bits("nf4", False, torch.float32),
    "bitsandbytes fp4": lambda: four_bits("fp4"),
    "bitsandbytes fp4, double": lambda: four_bits("fp4", True),
    "W8A8, rows": lambda: compressed("int", "channel"),
    "W8A8, rows, float32 scales": lambda: compressed("int", "channel", torch.float32),
    "W8A8, one scale": lambda: compressed("int", "tensor"),
    "W8A8, groups of 64": lambda: compressed("int", "group", group_size=64),
    "float-quantized, rows": lambda: compressed("float", "channel"),
    "float-quantized, one scale": lambda: compressed("float", "tensor"),
    "float-quantized, blocks": lambda: compressed("float", "block", block_structure=[128, 128]),
    "fp8, blocks of 128 x 128": lambda: fp8(128, 128, "weight_scale_inv", BLOCKS),
    "fp8, one scale": lambda: fp8(None, None, "weight_scale", {"quant_method": "fp8"}),
    "fbgemm_fp8, rows": lambda: fp8(1, None, "weight_scale", {"quant_method": "fbgemm_fp8"}),
}


def result(name: str, shape: str, folder: Path) -> str:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], attn_implementation="eager")).eval()
    dense = VARIANTS[name]()(model, folder)
    opened = open_checkpoint(folder)
    weights, theirs = opened.weights(), tensor_names(opened.args, "hf")
    compared = different = 0
    for ours in weights:
        if theirs[ours] in dense:
            found = weights[ours].dequantize()
            wanted = in_our_order(ours, dense[theirs[ours]].numpy(), opened.args)
            compared += 1
            different += int((found.view(np.uint32) != wanted.view(np.uint32)).any())
    model.load_state_dict(model.state_dict() | dense)
    ids = np.random.default_rng(1).integers(0, SHAPES[shape]["vocab_size"], (1, 9))
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    del model
    found = build(opened.args, weights, exact=True)(ids)
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    formats = dict.fromkeys(w.format.name for key, w in weights.items() if theirs[key] in dense)
    same = "bit for bit" if compared and not different else f"{different} DIFFER"
    return f"{', '.join(formats):14} {compared:4} weights {same:12} logits {error:.1e}"


def in_our_order(name: str, w: np.ndarray, args: ModelArgs) -> np.ndarray:
    rows = hf_rows(name, args)
    return np.ascontiguousarray(w if rows is None else w[rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default="tiny")
    parser.add_argument("--only", default="", metavar="TEXT", help="variants with this text in their names")
    options = parser.parse_args()
    for name in VARIANTS:
        if options.only in name:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{name:40} {result(name, options.shape, Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
