"""Folders of bitsandbytes, compressed-tensors and FP8: their weights bit for bit, and their logits."""

import base64
import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers.quantized import Variant, write_folder
from helpers.quantized_floats import VARIANTS, four_bits, int8_rows, stored_format
from safetensors.torch import load_file, save_file

from numpy_llama.backend import build
from numpy_llama.backend.formats import FORMATS
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.convert import convert
from numpy_llama.checkpoint.memory import memory_plan
from numpy_llama.errors import NumericsError, NumpyLlamaError
from numpy_llama.proof.oracle import transformers_model
from numpy_llama.proof.tiny import TINY_BLOCKS

# Rows of 96 are no whole blocks of NF4, rows of 192 are. Neither is a multiple of 128.
ARGS = replace(TINY_BLOCKS, dim=96, hidden_dim=192, n_heads=6, n_kv_heads=2, head_dim=16)
NATIVE = replace(ARGS, dim=128, n_heads=8, vocab_size=512)  # rows of whole blocks, a tokenizer of 512
IDS = np.random.default_rng(3).integers(0, ARGS.vocab_size, (2, 11))
LOGITS = 5e-6  # of the largest logit: both sides compute in float32
WIDE = "layers.0.feed_forward.w_down.weight"  # its rows have 192 weights


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_and_logits(name, tmp_path):
    """Bit for bit the weights of the file, in the format that they should have; transformers' logits."""
    wanted = write_folder(tmp_path, ARGS, VARIANTS[name])
    opened = open_checkpoint(tmp_path)
    weights = opened.weights()
    for ours, w in weights.items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)
    assert weights[WIDE].format.name == stored_format(name)
    with torch.no_grad():
        logits = transformers_model(opened.args, wanted)(torch.from_numpy(IDS)).logits.numpy()
    for backend in ("numpy", "c"):
        found = build(opened.args, weights, backend=backend, exact=True)(IDS)
        assert np.abs(found - logits).max() <= LOGITS * np.abs(logits).max(), backend


def test_the_method_is_named(tmp_path):
    names = {"nf4": "bitsandbytes, 4 bits", "int8": "bitsandbytes, 8 bits", "fbgemm_fp8": "FP8"}
    for i, (name, title) in enumerate(names.items()):
        (folder := tmp_path / str(i)).mkdir()
        write_folder(folder, ARGS, VARIANTS[name])
        assert open_checkpoint(folder).format == f"Hugging Face, {title}"


def test_settings_of_2023_have_no_method(tmp_path):
    variant = replace(VARIANTS["nf4"], settings={"load_in_4bit": True, "load_in_8bit": False})
    wanted = write_folder(tmp_path, ARGS, variant)
    np.testing.assert_array_equal(open_checkpoint(tmp_path).weights()[WIDE].dequantize(), wanted[WIDE])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["int8", "nf4, double", "fp4", "W8A8, bfloat16", "FP8, blocks"])
def test_a_native_file_holds_the_same_weights(name, packed, tmp_path):
    """`convert` without --dtype: the formats and their bytes, under types that gguf does not have."""
    (folder := tmp_path / "folder").mkdir()
    wanted = write_folder(folder, NATIVE, VARIANTS[name])
    ranks = (f"{base64.b64encode(bytes([b])).decode()} {b}" for b in range(256))
    (folder / "tokenizer.model").write_text("\n".join(ranks) + "\n")
    out = convert(open_checkpoint(folder), tmp_path / "model.gguf", None, packed=packed)
    written = open_checkpoint(out).weights()
    for ours, w in written.items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)
    assert written[WIDE].format.name == stored_format(name)
    with pytest.raises(ValueError, match="is not a valid GGMLQuantizationType"):
        gguf.GGUFReader(out)
    tokens = np.array([[1, 2, 3]])
    models = [build(NATIVE, weights) for weights in (open_checkpoint(folder).weights(), written)]
    np.testing.assert_array_equal(models[0](tokens), models[1](tokens))


def test_any_weight_may_be_plain_and_any_may_be_quantised(tmp_path):
    """lm_head too; the embedding never is. One folder may hold weights of 4 and of 8 bits."""

    def kind(name: str) -> Variant | None:
        if name == "output.weight":
            return int8_rows()
        return four_bits() if name.endswith("w_down.weight") else None

    wanted = write_folder(tmp_path, ARGS, kind, four_bits().settings)
    weights = open_checkpoint(tmp_path).weights()
    for ours, w in weights.items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)
    assert {weights[ours].format.name for ours in ("output.weight", WIDE)} == {"LLM_INT8", "NF4"}


def test_the_memory_plan_is_made_from_headers(tmp_path, monkeypatch):
    """It counts the packed blocks, and reads neither numbers nor scales."""
    write_folder(tmp_path, ARGS, VARIANTS["nf4, double"])
    opened = open_checkpoint(tmp_path)
    weights = opened.weights()

    def read(tensor):
        raise AssertionError(f"{tensor.shape} was read")

    monkeypatch.setattr("numpy_llama.backend.formats.StoredTensor.data", property(read))
    plan = memory_plan(opened.args, weights, "c")
    n = 96 * 192 * ARGS.n_layers
    assert plan.made >= n // 64 * 36
    assert weights[WIDE].nbytes == FORMATS["NF4"].nbytes((96, 192))


# --- refusals ---------------------------------------------------------------------------------------------


def spoiled(folder: Path, variant: Variant, change) -> Path:
    """A folder whose tensors `change` has spoiled; it may return other settings."""
    write_folder(folder, ARGS, variant)
    path = folder / "model.safetensors"
    tensors = load_file(path)
    settings = change(tensors)
    save_file(tensors, path)
    if isinstance(settings, dict):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return folder


DOWN = "model.layers.0.mlp.down_proj"


def sets(part: str, value):
    def change(tensors):
        tensors[f"{DOWN}.{part}"] = value

    return change


def drops(part: str):
    def change(tensors):
        del tensors[f"{DOWN}.{part}"]

    return change


def at(part: str, index, value):
    def change(tensors):
        tensors[f"{DOWN}.{part}"][index] = value

    return change


def json_with(**values):
    def change(state):
        state.update(values)

    return four_bits(double=True, change=change)


def text(data: bytes):
    return sets("weight.quant_state.bitsandbytes__nf4", torch.frombuffer(bytearray(data), dtype=torch.uint8))


def nothing(tensors):
    return None


NF4, DOUBLE, INT8 = VARIANTS["nf4"], VARIANTS["nf4, double"], VARIANTS["int8"]
BLOCKS, ROWS, ACTIVE = VARIANTS["FP8, blocks"], VARIANTS["fbgemm_fp8"], VARIANTS["W8A8, float32"]
NAN = torch.tensor(float("nan"))
REFUSED = {
    "4 bits: too few bytes": (NF4, sets("weight", torch.zeros(9, 1, dtype=torch.uint8)), "has 9 bytes"),
    "4 bits: too many bytes": (NF4, sets("weight", torch.zeros(9999, 2, dtype=torch.uint8)), "19998 bytes"),
    "4 bits: no scales for some": (NF4, sets("weight.absmax", torch.zeros(287)), "wanted F32 of shape"),
    "4 bits: scales in float16": (NF4, sets("weight.absmax", torch.zeros(288).half()), "is F16 of shape"),
    "4 bits: a scale is NaN": (NF4, at("weight.absmax", 3, NAN), "NaN or infinite"),
    "4 bits: a scale is infinite": (NF4, at("weight.absmax", 287, NAN + float("inf")), "NaN or infinite"),
    "4 bits: another table": (NF4, at("weight.quant_map", 3, 0.5), "not the table of NF4"),
    "4 bits: a short table": (NF4, sets("weight.quant_map", torch.zeros(15)), "wanted F32 of shape"),
    "4 bits: no table": (NF4, drops("weight.quant_map"), "has no tensor 'weight.quant_map'"),
    "4 bits: no state": (NF4, drops("weight.quant_state.bitsandbytes__nf4"), "has 0 of the tensors"),
    "4 bits: two states": (
        NF4,
        sets("weight.quant_state.bitsandbytes__fp4", torch.zeros(3, dtype=torch.uint8)),
        "has 2 of the tensors",
    ),
    "4 bits: an unknown tensor": (NF4, sets("weight.zero", torch.zeros(3)), "unknown tensor 'weight.zero'"),
    "state: no JSON": (NF4, text(b"quant_type: nf4"), "is no JSON"),
    "state: not UTF-8": (NF4, text(b"\xff\xfe{}"), "is no JSON"),
    "state: NaN": (NF4, text(b'{"blocksize": NaN}'), "it has NaN"),
    "state: a list": (NF4, text(b"[1, 2]"), "holds"),
    "state: nested deeply": (NF4, text(b"[" * 4000), "nested too deeply|no JSON"),
    "state: too long": (NF4, text(b" " * 5000), "at most 4096 bytes"),
    "state: float32": (NF4, sets("weight.quant_state.bitsandbytes__nf4", torch.zeros(9)), "bytes of JSON"),
    "state: a missing key": (DOUBLE, text(b'{"quant_type": "nf4"}'), "wanted blocksize, dtype"),
    "state: an unknown key": (json_with(rotation=1), nothing, "rotation"),
    "state: another type": (json_with(quant_type="fp4"), nothing, "of quant_type 'fp4'"),
    "state: another shape": (json_with(shape=[96, 96]), nothing, "needs 4608"),
    "state: a negative shape": (json_with(shape=[-96, -192]), nothing, "wanted 2 whole numbers"),
    "state: three sizes": (json_with(shape=[96, 96, 2]), nothing, "wanted 2 whole numbers"),
    "state: a shape of texts": (json_with(shape=["96", 192]), nothing, "wanted 2 whole numbers"),
    "state: a huge shape": (json_with(shape=[1 << 31, 1 << 31]), nothing, "4 bits needs"),
    "state: true as a size": (json_with(shape=[True, 18432]), nothing, "wanted 2 whole numbers"),
    "state: blocks of 0": (json_with(blocksize=0), nothing, "the blocksize 0"),
    "state: blocks of 100": (json_with(blocksize=100), nothing, "the blocksize 100"),
    "state: blocks of 64.0": (json_with(blocksize=64.0), nothing, "the blocksize 64.0"),
    "state: nested blocks of 0": (json_with(nested_blocksize=0), nothing, "nested_blocksize 0"),
    "state: nested blocks of 2^70": (json_with(nested_blocksize=1 << 70), nothing, "nested_blocksize"),
    "state: other nested blocks": (json_with(nested_blocksize=128), nothing, "wanted F32 of shape"),
    "state: an infinite offset": (json_with(nested_offset=1e39), nothing, "nested_offset"),
    "state: an offset of 400 digits": (json_with(nested_offset=10**400), nothing, "nested_offset"),
    "state: a text as offset": (json_with(nested_offset="0"), nothing, "nested_offset"),
    "double: scales in float32": (DOUBLE, sets("weight.absmax", torch.zeros(288)), "wanted U8 of shape"),
    "double: a short table": (
        DOUBLE,
        sets("weight.nested_quant_map", torch.zeros(255)),
        "wanted F32 of shape",
    ),
    "double: NaN in the table": (DOUBLE, sets("weight.nested_quant_map", NAN.expand(256).clone()), "NaN or"),
    "double: no table": (DOUBLE, drops("weight.nested_quant_map"), "has no tensor 'weight.nested_quant_map'"),
    "double: infinite scales": (DOUBLE, at("weight.nested_absmax", 0, float("inf")), "NaN or infinite"),
    "double: overflow": (
        json_with(nested_offset=3e38),
        at("weight.nested_absmax", 0, 3e38),
        "NaN or infinite",
    ),
    "int8: too few scales": (INT8, sets("SCB", torch.zeros(95)), r"SCB' is F32 of shape \(95,\)"),
    "int8: one scale": (INT8, sets("SCB", torch.ones(())), "wanted F32 of shape"),
    "int8: scales in float16": (INT8, sets("SCB", torch.zeros(96).half()), "is F16"),
    "int8: a scale is NaN": (INT8, at("SCB", 5, NAN), "NaN, infinite or too large"),
    "int8: a scale that overflows": (INT8, at("SCB", 5, 1e37), "NaN, infinite or too large"),
    "int8: unsigned": (INT8, sets("weight", torch.zeros(96, 192, dtype=torch.uint8)), "is U8"),
    "int8: three axes": (INT8, sets("weight", torch.zeros(96, 192, 1, dtype=torch.int8)), "has the shape"),
    "int8: no weight": (INT8, drops("weight"), "has no tensor 'weight'"),
    "int8: for a GPU's order": (
        INT8,
        sets("weight_format", torch.tensor(2, dtype=torch.uint8)),
        "is 2: only",
    ),
    "FP8: a weight is NaN": (
        BLOCKS,
        sets("weight", torch.full((96, 192), 0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn)),
        "a weight that is NaN",
    ),
    "FP8: another grid": (BLOCKS, sets("weight_scale_inv", torch.zeros(2, 1)), "wanted F32 or|wanted F16 or"),
    "FP8: a transposed grid": (BLOCKS, sets("weight_scale_inv", torch.zeros(2, 1).T.clone().T), "wanted F"),
    "FP8: E5M2": (ROWS, sets("weight", torch.zeros(96, 192).to(torch.float8_e5m2)), "is F8_E5M2"),
    "FP8: scales that are powers of two": (
        BLOCKS,
        sets("weight_scale_inv", torch.zeros(1, 2).to(torch.float8_e8m0fnu)),
        "is F8_E8M0",
    ),
    "FP8: an infinite scale": (ROWS, at("weight_scale", 0, float("-inf")), "NaN, infinite or too"),
    "FP8: a scale that overflows": (ROWS, at("weight_scale", 0, -1e36), "NaN, infinite or too large"),
    "FP8: both scales": (ROWS, sets("weight_scale_inv", torch.zeros(1, 2)), "unknown tensor 'weight_scale'"),
    "FP8: blocks of 0": (BLOCKS, lambda t: BLOCKS.settings | {"weight_block_size": [0, 128]}, "block_size"),
    "FP8: blocks of three": (
        BLOCKS,
        lambda t: BLOCKS.settings | {"weight_block_size": [1, 1, 1]},
        "two whole",
    ),
    "FP8: huge blocks": (
        BLOCKS,
        lambda t: BLOCKS.settings | {"weight_block_size": [1, 1 << 90]},
        "two whole",
    ),
    "W8A8: a zero point": (ACTIVE, sets("weight_zero_point", torch.zeros(96, 1)), "zero point"),
    "W8A8: scales of a group": (ACTIVE, sets("weight_scale", torch.zeros(96, 6)), "wanted F"),
    "W8A8: float16 weights": (ACTIVE, sets("weight", torch.zeros(96, 192).half()), "is F16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused(name, tmp_path):
    """Never a traceback: an error of ours in the right words, on opening or when the weight is made."""
    variant, change, message = REFUSED[name]
    folder = spoiled(tmp_path, variant, change)
    with pytest.raises(NumpyLlamaError, match=message):
        open_checkpoint(folder).weights()[WIDE].dequantize()


def test_a_scale_that_is_not_finite_names_its_tensor(tmp_path):
    folder = spoiled(tmp_path, NF4, at("weight.absmax", 3, NAN))
    with pytest.raises(
        NumericsError, match=rf"model.safetensors: '{DOWN}.weight.absmax' has a scale that is"
    ):
        open_checkpoint(folder).weights()[WIDE].dequantize()
