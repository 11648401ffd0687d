"""Models that the public tools quantize, against this program: weights bit for bit, and logits.

    pip install --no-deps auto-round compressed-tensors auto-gptq autoawq loguru py-cpuinfo datasets
    python tests/robustness/instruments/public_quantisers.py                      a tiny model in each variant
    python tests/robustness/instruments/public_quantisers.py llama-3.2-1b --layers 4

A tool rounds and packs random weights, and unpacks them again. That is the reference, in float32. The logits
are those of transformers with these weights. The tools' own kernels are not needed, and neither is a GPU.
"""

import argparse
import importlib
import os
import sys
import tempfile
import types
import warnings
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))

from helpers.quantized import Variant, awq, compressed, gptq, write_folder

from numpy_llama.backend import build
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.presets import PRESETS
from numpy_llama.proof.oracle import transformers_model
from numpy_llama.proof.tiny import TINY_BLOCKS

LOGITS = 5e-6
TINY = replace(TINY_BLOCKS, dim=128, hidden_dim=256, n_heads=8, n_kv_heads=4, head_dim=16, vocab_size=512)


def tool(name: str) -> types.ModuleType:
    """A module of a tool, without the packages around it: they may need a GPU, or an older transformers."""
    package, *inner = name.split(".")[:-1]
    found = PathFinder.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise ModuleNotFoundError(package)
    root = Path(next(iter(found.submodule_search_locations)))
    for i in range(len(inner) + 1):
        bare = types.ModuleType(".".join([package, *inner[:i]]))
        bare.__path__ = [str(root.joinpath(*inner[:i]))]
        sys.modules.setdefault(bare.__name__, bare)
    return importlib.import_module(name)


def rounding(rng, N: int, K: int, bits: int, size: int, symmetric: bool, dtype=torch.float16):
    """A random matrix (N, K), with scales and zeros (N, G) that a simple tool would choose."""
    w = torch.from_numpy(rng.standard_normal((N, K), np.float32) * K**-0.5)
    groups = w.reshape(N, -1, K if size == -1 else size)
    top = (1 << bits) - 1
    if symmetric:
        scale = groups.abs().amax(-1) / (1 << bits - 1)
        zero = torch.full_like(scale, 1 << bits - 1)
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(1, top)  # version 1 cannot store the zero 0
    scale = scale.to(dtype).float()
    q = (
        w / scale.repeat_interleave(groups.shape[-1], 1) + zero.repeat_interleave(groups.shape[-1], 1)
    ).round()
    q = q.clamp(0, top)
    exact = (q - zero.repeat_interleave(groups.shape[-1], 1)) * scale.repeat_interleave(groups.shape[-1], 1)
    return exact, scale, zero


def linear(w: torch.Tensor) -> torch.nn.Linear:
    layer = torch.nn.Linear(*w.shape[::-1], bias=False)
    layer.weight.data = w.contiguous()
    return layer


def of_module(module: torch.nn.Module, K: int) -> np.ndarray:
    """The dequantized weight of a tool's layer: its product with the identity, scales in float32."""
    module.scales = module.scales.float()
    with torch.no_grad():
        return module(torch.eye(K)).T.contiguous().numpy()


def auto_round_gptq(bits: int, size: int, symmetric: bool, version: int = 1) -> Variant:
    packer = tool(f"auto_round_extension.torch.qlinear_torch{'_zp' if version == 1 else ''}").QuantLinear
    own = gptq(bits, size, symmetric, stated="gptq" if version == 1 else "gptq_v2")

    def make(rng, N, K):
        w, scale, zero = rounding(rng, N, K, bits, size, symmetric)
        module = packer(bits, size, K, N, bias=False, g_idx=False)
        module.device = torch.device("cpu")
        module.pack(linear(w), scale, zero, None, "cpu")
        parts = {n: getattr(module, n).clone() for n in ("qweight", "qzeros", "scales")}
        parts["g_idx"] = torch.arange(K, dtype=torch.int32) // (K if size == -1 else size)
        return parts, of_module(module, K)

    return Variant(own.settings, make)


def auto_gptq(bits: int, size: int, symmetric: bool, act_order: bool = False) -> Variant:
    name = "qlinear_cuda" if act_order else "qlinear_cuda_old"
    packer = tool(f"auto_gptq.nn_modules.qlinear.{name}").QuantLinear
    own = gptq(bits, size, symmetric, act_order=act_order, stated=None)

    def make(rng, N, K):
        w, scale, zero = rounding(rng, N, K, bits, size, symmetric)
        g_idx = torch.arange(K) // (K if size == -1 else size)
        if act_order:
            order = torch.from_numpy(rng.permutation(K))
            w, g_idx = w[:, order], g_idx[order]
        module = packer(bits, size, K, N, bias=True, weight_dtype=torch.float16)
        module.pack(linear(w).half().float(), scale.clone(), zero.clone(), g_idx.int())
        module.scales = module.scales.half()
        parts = {n: getattr(module, n).clone() for n in ("qweight", "qzeros", "scales", "bias")}
        parts["g_idx"] = g_idx.int()
        module.bias = None
        return parts, of_module(module, K)

    return Variant(own.settings, make)


def auto_round_awq(size: int, symmetric: bool) -> Variant:
    module = tool("auto_round.export.export_to_awq.utils")
    own = awq("gemm", size, symmetric)

    def make(rng, N, K):
        w, scale, zero = rounding(rng, N, K, 4, size, symmetric)
        made = module.WQLinear_GEMM.from_linear(
            linear(w), 4, size, scales=scale.T.contiguous(), zeros=zero.T.contiguous().int(), device="cpu"
        )
        parts = {n: getattr(made, n).clone() for n in ("qweight", "qzeros", "scales")}
        wide = K if size == -1 else size
        dense = module.dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, wide)
        return parts, dense.T.contiguous().numpy()

    return Variant(own.settings, make)


def auto_awq(version: str, size: int) -> Variant:
    module = tool(f"awq.modules.linear.{version}")
    own = awq(version, size)
    kind = getattr(module, f"WQLinear_{version.upper()}")

    def make(rng, N, K):
        w, scale, zero = rounding(rng, N, K, 4, size, False)
        turned = (lambda x: x) if version == "gemv" else (lambda x: x.T.contiguous())
        made = kind.from_linear(linear(w), 4, size, scales=turned(scale), zeros=turned(zero))
        return {n: getattr(made, n).clone() for n in ("qweight", "qzeros", "scales")}, w.numpy()

    return Variant(own.settings, make)


def compressed_tensors(bits: int, size: int, symmetric: bool, dtype=torch.bfloat16) -> Variant:
    from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor as Packer
    from compressed_tensors.quantization import QuantizationScheme

    own = compressed(bits, size, symmetric, dtype)
    weights = dict(own.settings["config_groups"]["group_0"]["weights"])
    if size == -1:
        weights["group_size"] = None
    scheme = QuantizationScheme(targets=["Linear"], weights=weights)

    def make(rng, N, K):
        w, scale, zero = rounding(rng, N, K, bits, size, symmetric, dtype)
        parts = {"weight": w, "weight_scale": scale.to(dtype)}
        if not symmetric:
            parts["weight_zero_point"] = (zero - (1 << bits - 1)).to(torch.int8)
        parts = Packer.compress(parts, scheme)
        whole = Packer.decompress(parts | {"weight_scale": parts["weight_scale"].float()}, scheme)["weight"]
        return parts, whole.float().numpy()

    return Variant(own.settings, make)


def variants() -> dict[str, Variant]:
    return {
        **{
            f"auto-round: GPTQ, {bits} bits, {'sym' if sym else 'asym'}": auto_round_gptq(bits, 32, sym)
            for bits in (2, 3, 4, 8)
            for sym in (True, False)
        },
        "auto-round: GPTQ version 2, 4 bits, asym": auto_round_gptq(4, 32, False, 2),
        "auto-round: GPTQ version 2, 3 bits, sym": auto_round_gptq(3, 32, True, 2),
        "auto-round: GPTQ, groups of 128": auto_round_gptq(4, 128, True),
        "auto-round: GPTQ, one group": auto_round_gptq(4, -1, True),
        "auto-round: GPTQ, groups of 16": auto_round_gptq(4, 16, True),
        **{f"AutoGPTQ: {bits} bits, sym": auto_gptq(bits, 32, True) for bits in (2, 3, 4, 8)},
        "AutoGPTQ: 4 bits, asym": auto_gptq(4, 32, False),
        "AutoGPTQ: 4 bits, act-order": auto_gptq(4, 32, True, True),
        "AutoGPTQ: 4 bits, asym, act-order": auto_gptq(4, 32, False, True),
        "AutoGPTQ: 3 bits, act-order": auto_gptq(3, 32, True, True),
        "auto-round: AWQ gemm": auto_round_awq(32, False),
        "auto-round: AWQ gemm, sym": auto_round_awq(128, True),
        "AutoAWQ: gemm": auto_awq("gemm", 32),
        "AutoAWQ: gemv": auto_awq("gemv", 32),
        "AutoAWQ: gemv, groups of 64": auto_awq("gemv", 64),
        "compressed-tensors: W4A16": compressed_tensors(4, 128, True),
        "compressed-tensors: W4A16, float16 scales": compressed_tensors(4, 32, True, torch.float16),
        "compressed-tensors: W4A16, asym": compressed_tensors(4, 32, False),
        "compressed-tensors: W8A16, one group": compressed_tensors(8, -1, True),
        "compressed-tensors: W8A16, asym": compressed_tensors(8, 32, False),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", nargs="?", choices=list(PRESETS), help="the shape [a tiny model]")
    parser.add_argument("--layers", type=int, help="number of layers [the model's]")
    parser.add_argument("--only", default="", help="variants whose name contains this text")
    options = parser.parse_args()
    args = TINY if options.preset is None else replace(PRESETS[options.preset].args, max_seq_len=64)
    args = replace(args, n_layers=options.layers or args.n_layers, rope_scaling=None)
    tokens = np.random.default_rng(1).integers(0, args.vocab_size, (1, 24))
    failed = 0
    warnings.simplefilter("ignore")  # of the tools
    print(f"{'variant':<44} {'stored as':<10} {'weights':<14} {'numpy':>8} {'c':>8}   logits, 1e-6")
    for name, variant in variants().items():
        if options.only not in name:
            continue
        with tempfile.TemporaryDirectory() as folder:
            weights = write_folder(Path(folder), args, variant)
            opened = open_checkpoint(Path(folder))
            found = opened.weights()
            equal = all(np.array_equal(w.dequantize(), weights[ours]) for ours, w in found.items())
            with torch.no_grad():
                wanted = transformers_model(args, weights)(torch.from_numpy(tokens)).logits.numpy()
            errors = []
            for backend in ("numpy", "c"):
                logits = build(args, found, backend=backend, exact=True)(tokens)
                errors.append(float(np.abs(logits - wanted).max() / np.abs(wanted).max()))
        formats = {w.format.name for ours, w in found.items() if ours.endswith("w_down.weight")}
        verdict = "bit for bit" if equal else "DIFFERENT"
        failed += not equal or max(errors) > LOGITS
        shown = " ".join(f"{1e6 * error:8.2f}" for error in errors)
        print(f"{name:<44} {', '.join(formats):<10} {verdict:<14} {shown}", flush=True)
    os._exit(failed > 0)  # some tools leave threads behind


if __name__ == "__main__":
    main()
