"""Folders quantized by GPTQ, AWQ and compressed-tensors: their weights bit for bit, and their logits."""

import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from helpers.generations import with_tokenizer
from helpers.quantized import VARIANTS, Variant, awq, compressed, dense, gptq, packed, write_folder
from helpers.quantized_floats import VARIANTS as FLOAT_VARIANTS
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from numpy_llama import cli, errors
from numpy_llama.backend import build
from numpy_llama.backend.formats import PackedTensor, StoredTensor
from numpy_llama.backend.fused import FusedBlock
from numpy_llama.backend.kernels import Kernels, KernelWeight
from numpy_llama.backend.training import TrainingKernels
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.convert import convert
from numpy_llama.checkpoint.gguf.file import COLUMN_ORDER
from numpy_llama.checkpoint.json_file import JsonFile
from numpy_llama.checkpoint.memory import gib, memory_plan
from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.checkpoint.quantized import FileTensor, Method
from numpy_llama.checkpoint.quantized import awq as awq_format
from numpy_llama.checkpoint.quantized import compressed_tensors as compressed_format
from numpy_llama.checkpoint.quantized import gptq as gptq_format
from numpy_llama.checkpoint.quantized.grouped import whole_numbers
from numpy_llama.checkpoint.safetensors_file import SafetensorsFile
from numpy_llama.model import TransformerBlock
from numpy_llama.proof.oracle import transformers_model
from numpy_llama.proof.tiny import TINY_BLOCKS

LOGITS = 5e-6  # of the largest logit: both sides compute in float32, over two layers
ARGS = replace(TINY_BLOCKS, dim=96, hidden_dim=192, n_heads=6, n_kv_heads=2, head_dim=16, vocab_size=512)


@pytest.fixture(scope="module", params=VARIANTS)
def written(request, tmp_path_factory):
    """-> the name of a variant, its folder, and the weights in it."""
    folder = tmp_path_factory.mktemp("folder")
    return request.param, folder, write_folder(folder, ARGS, VARIANTS[request.param])


def settled(name: str) -> str:
    """The format that the weights of a variant must have."""
    if name.endswith(("groups of 16", "groups of 48")):
        return "F32"
    if name.endswith(("float32 scales", "tiny scales")):
        return "INT8"
    narrow, wide = "2 bits" in name or "3 bits" in name, "8 bits" in name or "W8A16" in name
    plain_awq = "AWQ" in name and "symmetric" not in name
    if plain_awq or name.endswith("asymmetric") or name == "GPTQ version 2":
        return "F32" if wide else "Q4_0" if narrow else "Q4_Z"
    return "Q8_0" if wide else "Q4_0"


def test_weights_are_those_of_the_file_bit_for_bit(written):
    name, folder, wanted = written
    opened = open_checkpoint(folder)
    for ours, w in opened.weights().items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)
        if len(w.shape) == 2 and ours.startswith("layers."):
            np.testing.assert_array_equal(w[3:5], wanted[ours][3:5], ours)
            assert w.format.name == settled(name), ours
            assert (w.column_order is not None) == ("act-order" in name)


def test_logits_are_those_of_transformers(written):
    _, folder, weights = written
    tokens = np.random.default_rng(1).integers(0, ARGS.vocab_size, (2, ARGS.max_seq_len))
    with torch.no_grad():
        wanted = transformers_model(ARGS, weights)(torch.from_numpy(tokens)).logits.numpy()
    opened = open_checkpoint(folder)
    for backend in ("numpy", "c"):
        found = build(opened.args, opened.weights(), backend=backend, exact=True)(tokens)
        assert np.abs(found - wanted).max() <= LOGITS * np.abs(wanted).max(), backend


def test_with_rounded_activations_only_the_columns_are_exchanged(tmp_path):
    """Act-order in the default mode of the kernels, in prefill and decode: linear of the sorted columns."""
    write_folder(tmp_path, ARGS, VARIANTS["GPTQ act-order"])
    w = open_checkpoint(tmp_path).weights()["layers.0.feed_forward.w_down.weight"].realize()
    order = np.argsort(w.column_order)
    plain, kernels = StoredTensor(w.format, w.shape, w.data), Kernels(1)
    for T in (1, 3, 40):
        x = np.random.default_rng(T).standard_normal((T, w.shape[1]), np.float32)
        np.testing.assert_array_equal(
            kernels.linear(x, KernelWeight(w)), kernels.linear(x[:, order], KernelWeight(plain))
        )


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("name", ["GPTQ act-order, one order", "GPTQ act-order", "AWQ gemm"])
def test_a_fused_block_is_its_parts(name, exact, tmp_path, rng):
    """C sorts x once for q, k and v, and once for gate and up, if these have their columns in one order."""
    write_folder(tmp_path, ARGS, VARIANTS[name])
    opened = open_checkpoint(tmp_path)
    model = build(opened.args, opened.weights(), threads=2, exact=exact)
    for T in (1, 3, 20):
        x = rng.standard_normal((1, T, ARGS.dim)).astype(np.float32)
        for block in model.layers:
            assert (type(block) is FusedBlock) == (name != "GPTQ act-order")
            found = block(x, 0, model.freqs_cis[:T], model.new_cache())
            wanted = TransformerBlock.__call__(block, x, 0, model.freqs_cis[:T], model.new_cache())
            np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("plain", [0, 1])
def test_a_layer_that_sorts_and_one_that_does_not_keep_apart(plain, exact, tmp_path, rng):
    """One layer is in float, as GPTQModel's `dynamic` can leave it. The other needs memory to sort x."""
    write_folder(tmp_path, ARGS, VARIANTS["GPTQ act-order, one order"])
    opened = open_checkpoint(tmp_path)
    weights = opened.weights() | {
        name: StoredTensor.quantize(w.dequantize(), "F32")
        for name, w in opened.weights().items()
        if name.startswith(f"layers.{plain}.") and len(w.shape) == 2
    }
    model = build(opened.args, weights, threads=2, exact=exact)
    for T in (1, 3, 20):
        wanted = x = rng.standard_normal((1, T, ARGS.dim)).astype(np.float32)
        found, cache = model.run_layers(x, 0, model.freqs_cis[:T], model.new_cache()), model.new_cache()
        for block in model.layers:
            assert type(block) is FusedBlock
            wanted = TransformerBlock.__call__(block, wanted, 0, model.freqs_cis[:T], cache)
        np.testing.assert_allclose(found, wanted, rtol=0, atol=2e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("T", [2, 40])
def test_gradients_pass_through_sorted_columns(T, tmp_path, rng):
    write_folder(tmp_path, ARGS, VARIANTS["GPTQ act-order"])
    stored = open_checkpoint(tmp_path).weights()["layers.0.attention.wq.weight"]
    w, dense_w, kernels = KernelWeight(stored), stored.dequantize(), TrainingKernels(1)
    x, dy = (rng.standard_normal((T, n)).astype(np.float32) for n in w.shape[::-1])
    np.testing.assert_allclose(kernels.linear(x, w), x @ dense_w.T, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(kernels.linear_dx(dy, w), dy @ dense_w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("names", [("k_scale", "v_scale"), ("kv_scale",), ("k_scale", "k_zero_point")])
@pytest.mark.parametrize(
    "variant", [VARIANTS["W4A16"], FLOAT_VARIANTS["FP8, one scale"]], ids=["W4A16", "FP8"]
)
def test_scales_of_an_fp8_cache_are_not_used(variant, names, tmp_path):
    """compressed-tensors has k_scale and v_scale, AutoFP8 has kv_scale: our cache is more exact than FP8."""
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    wanted = write_folder(tmp_path, ARGS, variant, {**variant.settings, "kv_cache_scheme": scheme})
    file = tmp_path / "model.safetensors"
    scales = {f"model.layers.{i}.self_attn.{name}": torch.ones(1) for i in (0, 1) for name in names}
    save_file(
        load_file(file) | scales | {"model.layers.1.self_attn.v_proj.output_scale": torch.ones(1)}, file
    )
    weights = open_checkpoint(tmp_path).weights()
    assert weights.keys() == wanted.keys()
    for ours, w in weights.items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)


@pytest.mark.parametrize("name", ["self_attn.q_scale", "mlp.k_scale", "self_attn.kv_scales"])
def test_only_the_known_names_of_its_scales_are_left_out(name, tmp_path):
    write_folder(tmp_path, ARGS, VARIANTS["W4A16"])
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | {f"model.layers.1.{name}": torch.ones(1)}, file)
    with pytest.raises(errors.MismatchError, match=f"1 unknown weights: .*{name}"):
        open_checkpoint(tmp_path).weights()


def test_names_as_torch_compile_writes_them(tmp_path):
    wanted = write_folder(tmp_path, ARGS, VARIANTS["AWQ gemm"])
    file = tmp_path / "model.safetensors"
    save_file({f"_orig_mod.{name}": tensor for name, tensor in load_file(file).items()}, file)
    for ours, w in open_checkpoint(tmp_path).weights().items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)


def test_each_weight_may_have_settings_of_its_own(tmp_path):
    """`dynamic`: other bits and groups for some weights, none for others; a quantized lm_head."""
    kinds = {
        "wq": gptq(8, 96),
        "wk": gptq(3, 48),
        "w_down": gptq(2, symmetric=False, act_order=True),
        "w_up": None,
        "output": gptq(4),
    }
    dynamic = {
        r"+:.*\.q_proj$": {"bits": 8, "group_size": 96},
        r"+:.*\.k_proj$": {"bits": 3, "group_size": 48},
        r"+:.*\.down_proj$": {"bits": 2, "sym": False, "desc_act": True},
        r"-:.*\.up_proj$": {},
    }
    usual = gptq(4, dynamic=dynamic)

    def kind(ours: str) -> Variant | None:
        return None if ours == "tok_embeddings.weight" else kinds.get(ours.split(".")[-2], usual)

    wanted = write_folder(tmp_path, ARGS, kind, usual.settings)
    found = open_checkpoint(tmp_path).weights()
    for ours, w in found.items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)
    assert found["output.weight"].format.name == "Q4_0"
    assert found["layers.1.feed_forward.w_up.weight"].in_place


SIZES = st.integers(1, 4).map(lambda n: 32 * n)


def read(
    method: type[Method], settings: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]
) -> np.ndarray:
    """The weight in a file that has these tensors of it."""
    with TemporaryDirectory() as folder:
        path = Path(folder, "x.safetensors")
        save_file({f"x.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path)
        file = SafetensorsFile(path)
        parts = {name: FileTensor(file.tensors[f"x.{name}"], file) for name in tensors}
        return method(JsonFile(path, values=dict(settings))).weight("x", parts).stored().dequantize()


@given(SIZES, SIZES, st.sampled_from([2, 3, 4, 8]), st.booleans(), st.integers(0, 1), st.integers(0, 2**32))
def test_gptq_is_its_formula(N, K, bits, act_order, minus, seed):
    """Any zeros, also the zero 0 that version 1 stores as the largest number."""
    rng = np.random.default_rng(seed)
    q, zeros = rng.integers(0, 1 << bits, (N, K)), rng.integers(0, 1 << bits, (N, K // 32))
    scales = torch.from_numpy(rng.standard_normal(zeros.shape).astype(np.float16))
    g_idx = np.arange(K) // 32
    if act_order:
        rng.shuffle(g_idx)
    words = packed(q, bits).T, packed(((zeros - minus) % (1 << bits)).T, bits), g_idx.astype(np.int32)
    names = "qweight", "qzeros", "g_idx"
    tensors = {name: torch.from_numpy(x.copy()) for name, x in zip(names, words, strict=True)}
    settings = {"bits": bits, "sym": False, "checkpoint_format": "gptq" if minus else "gptq_v2"}
    found = read(gptq_format.GPTQ, settings, tensors | {"scales": scales.T})
    np.testing.assert_array_equal(found, dense(q, zeros, scales, g_idx))


@given(SIZES, SIZES, st.sampled_from(["gemm", "gemv"]), st.integers(0, 2**32))
def test_awq_is_its_formula(N, K, version, seed):
    variant = awq(version, 32)
    tensors, wanted = variant.make(np.random.default_rng(seed), N, K)
    np.testing.assert_array_equal(read(awq_format.AWQ, variant.settings, tensors), wanted)


@given(st.integers(1, 70), st.integers(1, 4), st.sampled_from([4, 8]), st.booleans(), st.integers(0, 2**32))
def test_compressed_tensors_is_its_formula(N, G, bits, symmetric, seed):
    """Rows may end in part of a word, and so may the zeros."""
    rng = np.random.default_rng(seed)
    size = int(rng.integers(1, 40))
    variant = compressed(bits, size, symmetric, torch.float16)
    tensors, wanted = variant.make(rng, N, G * size)
    found = read(compressed_format.CompressedTensors, variant.settings, tensors)
    np.testing.assert_array_equal(found, wanted)


@given(st.sampled_from([2, 3, 4, 8]), st.integers(1, 4), st.integers(0, 2**32))
def test_whole_numbers_are_a_stream_of_bits(bits, n, seed):
    q = np.random.default_rng(seed).integers(0, 1 << bits, (n, 32 * n))
    np.testing.assert_array_equal(whole_numbers(packed(q, bits), bits), q)


def test_a_native_file_keeps_every_weight(written, tmp_path):
    """`convert` without a dtype. Columns in another order stay so, in a packed weight beside their order."""
    name, folder, weights = written
    opened, out = open_checkpoint(with_tokenizer(folder)), tmp_path / "m.gguf"
    if settled(name) == "F32":
        with pytest.raises(errors.ParameterError, match="--dtype is missing"):
            convert(opened, out, None)
        convert(opened, out, "f32")
    else:
        convert(opened, out, None)
    theirs = tensor_names(opened.args, "gguf")
    for ours, w in (file := open_checkpoint(out)).weights().items():
        np.testing.assert_array_equal(w.dequantize(), weights[ours], ours)
        assert w.format.name in ("F32", settled(name))
        is_packed = file.tensors[theirs[ours]].type_name.endswith("packed")
        assert is_packed == ("act-order" in name and w.format.name != "F32")
    tokens = np.arange(9)[None]
    found, wanted = (build(one.args, one.weights(), threads=1)(tokens) for one in (file, opened))
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("order", [range(1, 97), [0] * 96, range(95), range(97)])
def test_an_order_of_columns_is_checked(order, tmp_path, monkeypatch):
    write_folder(tmp_path, ARGS, VARIANTS["GPTQ act-order"])
    file = open_checkpoint(convert(open_checkpoint(with_tokenizer(tmp_path)), tmp_path / "m.gguf", None))
    key = next(key for key in file.file.metadata if key.startswith(COLUMN_ORDER))
    assert file.tensors[key.removeprefix(COLUMN_ORDER)].shape[1] == 96
    monkeypatch.setitem(file.file.metadata, key, np.array(order, np.uint32))
    with pytest.raises(errors.MismatchError, match=rf"{key}' has {len(order)}, wanted each number below 96"):
        file.weights()


@pytest.mark.parametrize("name", ["GPTQ act-order", "AWQ gemm"])
def test_a_quantised_folder_in_other_formats(name, tmp_path):
    weights = write_folder(tmp_path, ARGS, VARIANTS[name])
    opened = open_checkpoint(with_tokenizer(tmp_path))
    for dtype, format in (("q8", "Q8_0"), ("q4", "Q4_0"), ("bf16", "BF16")):
        found = open_checkpoint(convert(opened, tmp_path / f"{dtype}.gguf", dtype)).weights()
        ours = "layers.1.attention.wk.weight"
        np.testing.assert_array_equal(found[ours].data, StoredTensor.quantize(weights[ours], format).data)
        both = (
            convert(opened, tmp_path / f"packed-{dtype}.gguf", dtype, packed=True)
            if dtype != "bf16"
            else None
        )
        for other, w in open_checkpoint(both).weights().items() if both else ():
            np.testing.assert_array_equal(w.dequantize(), found[other].dequantize(), other)
    packed_file = convert(opened, tmp_path / "packed.gguf", None, packed=True)
    for ours, w in open_checkpoint(packed_file).weights().items():
        np.testing.assert_array_equal(w.dequantize(), weights[ours], ours)


@pytest.mark.parametrize("name", ["GPTQ 4 bits", "GPTQ act-order", "AWQ gemm", "W8A16, asymmetric"])
def test_the_command_line(name, tmp_path, capsys):
    write_folder(tmp_path, ARGS, VARIANTS[name])
    folder, out = str(with_tokenizer(tmp_path)), str(tmp_path / "m.gguf")
    assert cli.main(["generate", "--prompt-ids", "1,2,3", "-n", "2", "--temperature", "0", "-m", folder]) == 0
    assert cli.main(["info", folder]) == 0
    shown = capsys.readouterr().out
    opened = open_checkpoint(tmp_path)
    plan = memory_plan(opened.args, opened.weights(), "c")
    assert opened.format in shown and f"{gib(plan.made)}, joined, expanded or packed on loading" in shown
    n = sum(math.prod(w.shape) for w in opened.weights().values())
    assert re.search(rf"parameters +{n:,}\n", shown)
    if name != "W8A16, asymmetric":
        assert cli.main(["convert", folder, out]) == 0
        assert cli.main(["verify", "-m", out, "--against", folder]) == 0
    assert cli.main(["verify", "-m", folder]) == 0


def test_the_memory_plan_is_what_the_kernels_hold(written):
    _, folder, _ = written
    opened = open_checkpoint(folder)
    plan, held = memory_plan(opened.args, opened.weights(), "c"), 0
    for ours, w in opened.weights().items():
        if ours.startswith("layers.") and len(w.shape) == 2:
            weight = KernelWeight(w)
            held += weight.rows.nbytes
            assert isinstance(weight.tensor, PackedTensor) == (w.format.block > 1)  # only once in memory
            np.testing.assert_array_equal(weight[:], w.dequantize())
    assert plan.made == held


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"quant_method": "gptq", "bits": 5}, "GPTQ of 5 bits"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*": {"bits": 6}}}, "GPTQ of 6 bits"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "stored as 'marlin'"),
        ({"quant_method": "gptq", "bits": 4, "is_marlin_format": True}, "stored as 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv_fast"}, "stored for 'gemv_fast'"),
        ({"quant_method": "awq", "bits": 4, "version": "marlin"}, "stored for 'marlin'"),
        ({"quant_method": "awq", "bits": 4, "backend": "llm-awq"}, "stored by llm-awq"),
        ({"quant_method": "awq", "bits": 3}, "AWQ of 3 bits"),
        (compressed().settings | {"format": "nvfp4-pack-quantized"}, "format 'nvfp4-pack-quantized'"),
        (compressed().settings | {"format": "mxfp4-pack-quantized"}, "format 'mxfp4-pack-quantized'"),
        (compressed().settings | {"format": "marlin-24"}, "format 'marlin-24'"),
        (compressed().settings | {"transform_config": {"a": 1}}, "transform_config"),
        (compressed().settings | {"sparsity_config": {"format": "sparse-24-bitmask"}}, "sparsity_config"),
        (compressed(3).settings, "of 3 bits"),
        ({"quant_method": "exl2", "bits": 4.25}, "quantized by 'exl2'"),
    ],
)
def test_what_is_not_run_is_refused_by_name(settings, message, tmp_path):
    write_folder(tmp_path, ARGS, gptq(), settings)
    with pytest.raises(errors.UnsupportedError, match=message) as caught:
        open_checkpoint(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("key", ["dynamic", "extra_config"])
def test_a_weight_that_stays_plain_is_no_other_number_of_bits(key, tmp_path):
    settings = {"bits": 4, "group_size": 32, key: {"lm_head": {"bits": 16}, "layers.0": {"bits": 8}}}
    assert gptq_format.GPTQ(JsonFile(tmp_path / "config.json", values=settings)).bits == {4, 8}
