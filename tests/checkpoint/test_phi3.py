"""Phi-3: fused tensors, LongRoPE and its names, as transformers and llama.cpp's converter write them.

`pytest -s` prints the largest differences of the logits from transformers'.
"""

import json
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import adapters
from safetensors.torch import load_file, save_file
from transformers import Phi3Config, Phi3ForCausalLM

from numpy_llama import errors, lora
from numpy_llama.backend import build
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.adapters import open_adapter
from numpy_llama.checkpoint.convert import convert
from numpy_llama.checkpoint.huggingface import HuggingFaceCheckpoint
from numpy_llama.checkpoint.merge import merge
from numpy_llama.checkpoint.names import FUSED, hf_rows
from numpy_llama.functional import rope_freqs
from numpy_llama.proof.bounds import assert_near
from numpy_llama.rope import LongRopeScaling, longrope_length
from numpy_llama.text.tokenizer import tokenizer_from_gguf
from tests.helpers.gguf_writer import byte_vocabulary

HEAD_DIM, ORIGINAL, LONGER = 96, 32, 96
CLOSE = 5e-6  # of the largest logit, in exact arithmetic
LISTS = {
    "short_factor": [1 + 0.01 * j for j in range(HEAD_DIM // 2)],
    "long_factor": [1 + 0.5 * j for j in range(HEAD_DIM // 2)],
}
SIZES = {
    "vocab_size": 259,
    "hidden_size": 2 * HEAD_DIM,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "pad_token_id": 0,
}
LONG = {
    "max_position_embeddings": LONGER,
    "original_max_position_embeddings": ORIGINAL,
    "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4} | LISTS,
}
BACKENDS = "numpy", "c"


def model_of(**changes) -> Phi3ForCausalLM:
    torch.manual_seed(0)
    config = Phi3Config(**SIZES | changes, initializer_range=0.08, attn_implementation="eager")
    model = Phi3ForCausalLM(config).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def folder_of(model: Phi3ForCausalLM, folder: Path, **changes) -> Path:
    """The model as transformers saves it; `changes` to config.json, None removes a key."""
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text()) | changes
    config = {key: value for key, value in config.items() if value is not None or key not in changes}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def tokens_of(T: int) -> np.ndarray:
    return np.random.default_rng(T).integers(SIZES["vocab_size"], size=(2, T))


def expected(model: Phi3ForCausalLM, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def logits(checkpoint, tokens: np.ndarray, backend: str, context: int | None = None) -> np.ndarray:
    args = replace(checkpoint.args, max_seq_len=context or checkpoint.args.max_seq_len)
    return build(args, checkpoint.weights(), backend=backend, threads=1, exact=True)(tokens)


def gguf_of(model: Phi3ForCausalLM, path: Path, window: int = 0, dtype=np.float32) -> Path:
    """The file that llama.cpp's converter makes of a Phi-3 with LongRoPE: no type is written."""
    config = model.config
    writer = gguf.GGUFWriter(path, "phi3")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_rope_scaling_orig_ctx_len(config.original_max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(HEAD_DIM)
    writer.add_rope_freq_base(1e4)
    writer.add_sliding_window(window)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.PHI3, config.num_hidden_layers)
    for name, x in model.state_dict().items():
        kept = x.numpy().astype(dtype if x.ndim == 2 else np.float32)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), kept)
    if config.rope_parameters["rope_type"] == "longrope":
        writer.add_rope_scaling_attn_factors(longrope_length(LONGER / ORIGINAL, ORIGINAL))
        writer.add_tensor("rope_factors_long.weight", np.array(LISTS["long_factor"], np.float32))
        writer.add_tensor("rope_factors_short.weight", np.array(LISTS["short_factor"], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("T", [ORIGINAL, ORIGINAL + 1, LONGER])
def test_logits_as_transformers_on_both_sides_of_the_original_context(T, backend, tmp_path):
    """transformers chooses the list by the length of the text, and this model by its context."""
    model = model_of(**LONG)
    checkpoint = HuggingFaceCheckpoint(folder_of(model, tmp_path))
    assert checkpoint.args.head_dim == HEAD_DIM and isinstance(checkpoint.args.rope_scaling, LongRopeScaling)
    tokens = tokens_of(T)
    found, wanted = logits(checkpoint, tokens, backend, T), expected(model, tokens)
    difference = np.abs(found - wanted).max() / np.abs(wanted).max()
    print(f"\nPhi-3, {T} tokens, {backend}: {difference:.1e} of the largest logit")
    assert difference < CLOSE
    other = ORIGINAL if T > ORIGINAL else LONGER  # the other list shows
    if other >= T:
        assert np.abs(logits(checkpoint, tokens, backend, other) - wanted).max() > 1e-2


@pytest.mark.parametrize("T", [4096, 4200])
def test_logits_as_transformers_at_thousands_of_positions(T, tmp_path):
    """Position 4,096 multiplies an error of theta_j. PyTorch's own powers may have one, of 1 ulp."""
    rng = np.random.default_rng(0)
    lists = {
        name: rng.uniform(1, most, HEAD_DIM // 2).tolist() for name, most in zip(LISTS, (3, 64), strict=True)
    }
    rope = {"rope_type": "longrope", "rope_theta": 1e4} | lists
    contexts = {"max_position_embeddings": 131072, "original_max_position_embeddings": 4096}
    model = model_of(**contexts, rope_parameters=rope)
    checkpoint = HuggingFaceCheckpoint(folder_of(model, tmp_path))
    tokens = tokens_of(T)[:1]
    expected(model, tokens)  # transformers chooses its list
    theirs = model.model.rotary_emb.inv_freq.numpy()
    ours = rope_freqs(
        HEAD_DIM, 1e4, np.float32, np.array(lists["long_factor" if T > 4096 else "short_factor"])
    )
    np.testing.assert_array_max_ulp(ours, theirs, 2)
    assert (ours == theirs).mean() > 0.9
    model.model.rotary_emb.original_inv_freq = model.model.rotary_emb.long_inv_freq = torch.from_numpy(ours)
    wanted = expected(model, tokens)
    difference = np.abs(logits(checkpoint, tokens, "c", T) - wanted).max() / np.abs(wanted).max()
    print(f"\nPhi-3, {T} tokens: {difference:.1e} of the largest logit")
    assert difference < CLOSE


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_a_gguf_has_the_logits_of_the_folder(dtype, backend, tmp_path):
    model = model_of(**LONG)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    folder = HuggingFaceCheckpoint(folder_of(model, tmp_path))
    file = open_checkpoint(gguf_of(model, tmp_path / "phi3.gguf", dtype=dtype))
    assert file.args == folder.args
    tokens = tokens_of(LONGER)
    wanted = expected(model, tokens)
    assert_near(logits(file, tokens, backend), wanted, CLOSE * np.abs(wanted).max())


def test_nothing_is_copied(tmp_path):
    """Each part of a fused tensor is a view of the mapped file, in both formats."""
    model = model_of(**LONG)
    folder = open_checkpoint(folder_of(model, tmp_path))
    file = open_checkpoint(gguf_of(model, tmp_path / "phi3.gguf"))
    for checkpoint in (folder, file):
        weights = checkpoint.weights()
        for *_, parts in FUSED:
            views = [weights[f"layers.1.{part}.weight"] for part in parts]
            ends = [view.data.ctypes.data + view.data.nbytes for view in views]
            assert [view.data.ctypes.data for view in views[1:]] == ends[:-1]  # one behind the other
            assert all(view.in_place and not view.data.flags.owndata for view in views)


def test_convert_writes_separate_tensors_in_metas_order(tmp_path):
    """A native file of "llama" with the same logits: nothing of Phi-3 is left but its numbers."""
    source = HuggingFaceCheckpoint(folder_of(model_of(**LONG), tmp_path))
    weights, tokens = source.weights(), tokens_of(LONGER)
    source._tokenizer = tokenizer()
    source.chat_template = lambda: None
    file = open_checkpoint(convert(source, tmp_path / "native.gguf", "f32"))
    assert file.args == source.args
    for name, w in file.weights().items():
        np.testing.assert_array_equal(w.dequantize(), weights[name].dequantize())
    np.testing.assert_array_equal(logits(file, tokens, "numpy"), logits(source, tokens, "numpy"))


def tokenizer():
    entries = byte_vocabulary(SIZES["vocab_size"])
    return tokenizer_from_gguf({f"tokenizer.ggml.{key}": value for key, value in entries.items()}, "")


def test_the_window_of_phi3_mini_4k(tmp_path):
    """Read from both formats, and written into a native file."""
    model = model_of(max_position_embeddings=64, sliding_window=20)
    folder = HuggingFaceCheckpoint(folder_of(model, tmp_path))
    file = open_checkpoint(gguf_of(model, tmp_path / "phi3.gguf", window=20))
    assert folder.args == file.args and file.args.sliding_window == 20
    file._tokenizer = tokenizer()
    native = open_checkpoint(convert(file, tmp_path / "native.gguf", "f32"))
    assert native.args == file.args
    tokens = tokens_of(64)
    wanted = expected(model, tokens)
    for checkpoint in (folder, file, native):
        assert_near(logits(checkpoint, tokens, "c"), wanted, CLOSE * np.abs(wanted).max())


def test_an_adapter_is_merged_into_a_native_file_only(tmp_path):
    source = HuggingFaceCheckpoint(folder_of(model_of(**LONG), tmp_path))
    with pytest.raises(errors.ParameterError, match="Phi-3 has fused ones; wanted a name"):
        merge(source, {}, tmp_path / "merged")


@pytest.mark.parametrize("targets", [["qkv_proj", "gate_up_proj"], ["qkv_proj", "o_proj"], "all-linear"])
def test_an_adapter_of_fused_tensors_as_in_peft(targets, tmp_path, monkeypatch):
    """B has the rows of q, k and v one below the other, or of gate and up. A is theirs together."""
    model = model_of(**LONG)
    base = open_checkpoint(folder_of(model, tmp_path / "base"))
    both = adapters.adapted(model, target_modules=targets, r=4, alpha_pattern={"qkv_proj": 3})
    adapter = open_adapter(adapters.write(both, tmp_path / "adapter"))
    updates, tensors = (
        adapter.low_ranks(base.args),
        load_file(tmp_path / "adapter" / "adapter_model.safetensors"),
    )
    for (_, _, parts), module, alpha in zip(
        FUSED, ("self_attn.qkv_proj", "mlp.gate_up_proj"), (3, 8), strict=True
    ):
        names = [f"layers.1.{part}.weight" for part in parts if f"layers.1.{part}.weight" in updates]
        if names:  # numbers of NumPy alone: W + scale B A, and the rows of each part
            a, b = (
                tensors[f"base_model.model.model.layers.1.{module}.lora_{x}.weight"].numpy() for x in "AB"
            )
            rows = np.split(
                np.float32(alpha / 4) * b @ a, np.cumsum([len(updates[name].b) for name in names])[:-1]
            )
            for name, wanted in zip(names, rows, strict=True):
                order = hf_rows(name, base.args)
                np.testing.assert_allclose(
                    updates[name].delta(), wanted if order is None else wanted[order], 1e-5
                )
            assert all(updates[name].a is updates[names[0]].a for name in names)
    tokens = tokens_of(ORIGINAL)
    wanted = adapters.logits(both, tokens)
    args = replace(base.args, max_seq_len=ORIGINAL)
    for backend in BACKENDS:
        plain = build(args, base.weights(), backend=backend, threads=1, exact=True)
        found = lora.adapted(plain, [updates])(tokens)
        assert np.abs(found - wanted).max() < CLOSE * np.abs(wanted).max()
    assert np.abs(plain(tokens) - wanted).max() > 1e-2


@pytest.mark.parametrize("part", ["q_proj", "v_proj"])
def test_an_adapter_of_a_tensor_and_its_part_is_refused(part, tmp_path):
    folder = adapters.write(adapters.adapted(model_of(**LONG), target_modules=["qkv_proj"]), tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    tensors |= {name.replace("qkv_proj", part): x.clone() for name, x in tensors.items()}
    save_file(tensors, file)
    with pytest.raises(errors.MismatchError, match=r"has .* and .*, which change the same weight"):
        open_adapter(folder)


@pytest.mark.parametrize("spelling", ["su", "yarn", "longrope"])
@pytest.mark.parametrize("key", ["rope_type", "type"])
def test_every_name_of_phi3s_longrope(spelling, key, tmp_path):
    """Phi-3's own files have "su" or "yarn", and the original context beside the scaling."""
    old = {key: spelling} | LISTS
    folder = folder_of(model_of(**LONG), tmp_path, rope_parameters=None, rope_scaling=old, rope_theta=1e4)
    if spelling != "su":  # which transformers 5 checks before it renames it
        assert Phi3Config.from_pretrained(folder).rope_parameters["rope_type"] == "longrope"
    scaling = HuggingFaceCheckpoint(folder).args.rope_scaling
    assert scaling.length_factor == pytest.approx(longrope_length(LONGER / ORIGINAL, ORIGINAL))
    assert scaling.original_max_seq_len == ORIGINAL and len(scaling.long_factor) == HEAD_DIM // 2


def test_without_a_scaling_as_phi3_mini_4k_has_none(tmp_path):
    model = model_of(max_position_embeddings=64)
    folder, file = folder_of(model, tmp_path), gguf_of(model, tmp_path / "phi3.gguf")
    tokens = tokens_of(64)
    wanted = expected(model, tokens)
    for checkpoint in map(open_checkpoint, (folder, file)):
        assert checkpoint.args.rope_scaling is None
        assert_near(logits(checkpoint, tokens, "c"), wanted, CLOSE * np.abs(wanted).max())


REFUSED = {
    "partial_rotary_factor": (0.75, "partial_rotary_factor is 0.75"),
    "attention_bias": (True, "attention_bias is True"),
    "mlp_bias": (True, "mlp_bias is True"),
    "hidden_act": ("gelu", "hidden_act is 'gelu'"),
    "architectures": (["Phi3SmallForCausalLM"], "Phi3ForCausalLM"),
    "model_type": ("phi3small", "a Phi of another architecture than Phi-3"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_is_not_computed_is_refused_by_its_name(key, tmp_path):
    value, message = REFUSED[key]
    folder = folder_of(model_of(**LONG), tmp_path, **{key: value})
    with pytest.raises(errors.UnsupportedError, match=message):
        HuggingFaceCheckpoint(folder)


@pytest.mark.parametrize("changes", [{"num_attention_heads": 1}, {"intermediate_size": 96}])
def test_a_fused_tensor_of_another_size_is_refused(changes, tmp_path):
    folder = folder_of(model_of(**LONG), tmp_path, head_dim=HEAD_DIM, **changes)
    with pytest.raises(errors.MismatchError, match=r"(qkv|gate_up)_proj.weight has the shape"):
        HuggingFaceCheckpoint(folder).weights()


def test_a_missing_fused_tensor_is_named(tmp_path):
    model = model_of(**LONG)
    state = {name: x for name, x in model.state_dict().items() if "layers.1.self_attn.qkv" not in name}
    (folder_of(model, tmp_path) / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(errors.MismatchError, match=r"missing weights.*\.1\.self_attn\.qkv_proj\.weight"):
        HuggingFaceCheckpoint(tmp_path).weights()
