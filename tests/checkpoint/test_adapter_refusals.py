"""What is no adapter of this model is refused by name: damaged, foreign and malicious files."""

import json
from dataclasses import replace

import numpy as np
import pytest
import safetensors.numpy
from helpers.gguf_writer import gguf_bytes
from helpers.tiny_models import stored
from helpers.updates import ARGS, base, every_matrix, random_updates

from numpy_llama.backend.formats import StoredTensor
from numpy_llama.checkpoint.adapters import open_adapter, write_peft
from numpy_llama.errors import (
    ConfigError,
    FormatError,
    MismatchError,
    NumericsError,
    NumpyLlamaError,
    UnsafePickleError,
    UnsupportedError,
)

LAYER = "base_model.model.model.layers.1.self_attn"
Q_A, Q_B = f"{LAYER}.q_proj.lora_A.weight", f"{LAYER}.q_proj.lora_B.weight"
HEAD, TABLE = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
OTHER = "is it the adapter of another base model"
MERGE = r"merge it with PEFT \(merge_and_unload\)"


def key(name, value):
    return lambda config, tensors: config.update({name: value})


def without(*names):
    return lambda config, tensors: [tensors.pop(name) for name in names]


def tensor(name, value):
    return lambda config, tensors: tensors.update({name: np.asarray(value, np.float32)})


def renamed(old, new):
    return lambda config, tensors: tensors.update({new: tensors.pop(old)})


def spoilt(name, value):
    def change(config, tensors):
        tensors[name] = tensors[name].copy()
        tensors[name].flat[-1] = value

    return change


D, NAN = ARGS.dim, float("nan")
# what was changed -> (the change of a sound adapter, the error, words of its message)
PEFT = {
    "no peft_type": (key("peft_type", None), ConfigError, "has no peft_type"),
    "another method": (
        key("peft_type", "IA3"),
        UnsupportedError,
        "peft_type is 'IA3'; only 'LORA' is run here",
    ),
    "DoRA": (key("use_dora", True), UnsupportedError, f"use_dora is True; only False is run here; {MERGE}"),
    "bias": (key("bias", "lora_only"), UnsupportedError, "bias is 'lora_only'; only 'none'"),
    "transposed": (key("fan_in_fan_out", True), UnsupportedError, "fan_in_fan_out is True; only False"),
    "modules_to_save": (
        key("modules_to_save", ["lm_head"]),
        UnsupportedError,
        r"modules_to_save is \['lm_head'\]",
    ),
    "layers twice": (key("layer_replication", [[0, 2], [1, 2]]), UnsupportedError, "layer_replication is"),
    "activated": (key("alora_invocation_tokens", [1, 2]), UnsupportedError, "alora_invocation_tokens is"),
    "PiSSA": (
        key("init_lora_weights", "pissa_niter_4"),
        UnsupportedError,
        "base's weights were changed.*path_init",
    ),
    "init is no text": (
        key("init_lora_weights", 3),
        ConfigError,
        "init_lora_weights is 3, wanted bool or str",
    ),
    "r is a text": (key("r", "8"), ConfigError, "r is '8', wanted int"),
    "alpha is a list": (key("lora_alpha", [1]), ConfigError, r"lora_alpha is \[1\], wanted float"),
    "another rank": (
        key("r", 5),
        MismatchError,
        r"lora_A.weight' has the rank 4, adapter_config.json wants 5",
    ),
    "a rank in a pattern": (
        key("rank_pattern", {"k_proj": 2}),
        MismatchError,
        "k_proj.*has the rank 4.*wants 2",
    ),
    "a pattern of a text": (
        key("alpha_pattern", {"k_proj": "x"}),
        ConfigError,
        "k_proj is 'x', wanted float",
    ),
    "no pattern": (
        key("alpha_pattern", {"(": 1}),
        ConfigError,
        r"alpha_pattern has '\(', which is no pattern",
    ),
    "endless": (
        key("alpha_pattern", {r"(.*)" * 12 + r"\12\11\10[^a-z]": 1}),
        ConfigError,
        "which is no pattern of names",
    ),
    "large": (key("rank_pattern", {"a{1000000000}": 1}), ConfigError, "which is no pattern of names"),
    "long": (key("rank_pattern", {"a" * 999: 1}), ConfigError, "which is no pattern of names"),
    "patterns in a list": (key("rank_pattern", [3]), ConfigError, r"rank_pattern is \[3\], wanted dict"),
    "many patterns": (
        key("rank_pattern", dict.fromkeys(map(str, range(2000)), 1)),
        FormatError,
        "more than 1000",
    ),
    "no A": (
        without(Q_A),
        MismatchError,
        "has 'base_model.*q_proj.lora_B.weight', and its .lora_A is missing",
    ),
    "no B": (without(Q_B), MismatchError, "its .lora_B is missing"),
    "nothing": (lambda c, t: t.clear(), FormatError, "has no pairs of .lora_A and .lora_B: it is no LoRA"),
    "A is longer": (
        tensor(Q_A, np.ones((4, D + 32))),
        MismatchError,
        rf"\(4, {D + 32}\), .*\(4, {D}\); {OTHER}",
    ),
    "B is shorter": (
        tensor(Q_B, np.ones((D - 1, 4))),
        MismatchError,
        rf"\({D - 1}, 4\), .*\({D}, 4\); {OTHER}",
    ),
    "B of another rank": (
        tensor(Q_B, np.ones((D, 5))),
        MismatchError,
        rf"\({D}, 5\), the model wants \({D}, 4\)",
    ),
    "A is a vector": (tensor(Q_A, np.ones(D)), MismatchError, rf"the shape \({D},\), wanted a matrix"),
    "A is a number": (tensor(Q_A, 1), MismatchError, r"the shape \(\), wanted a matrix"),
    "A is empty": (tensor(Q_A, np.ones((0, D))), MismatchError, rf"the shape \(0, {D}\), wanted a matrix"),
    "NaN": (spoilt(Q_A, NAN), NumericsError, "q_proj.lora_A.weight' has numbers that are NaN or infinite"),
    "infinite": (spoilt(Q_B, np.inf), NumericsError, "q_proj.lora_B.weight' has numbers that are NaN"),
    "a layer too many": (
        lambda c, t: [t.update({n.replace("s.1.", "s.7."): t.pop(n)}) for n in (Q_A, Q_B)],
        MismatchError,
        f"layers.7.* is of layer 7, the model has 2 layers; {OTHER}",
    ),
    "a layer spelled twice": (
        lambda c, t: [t.update({n.replace("s.1.", "s.01."): t[n]}) for n in (Q_A, Q_B)],
        UnsupportedError,
        "layers.01.* is no A or B of a LLaMA's matrix",
    ),
    "an unknown name": (
        renamed(Q_A, "x.lora_A.weight"),
        UnsupportedError,
        "is no A or B of a LLaMA's matrix",
    ),
    "a magnitude": (
        tensor(f"{LAYER}.q_proj.lora_magnitude_vector", np.ones(D)),
        UnsupportedError,
        f"is a magnitude of DoRA; {MERGE}",
    ),
    "a bias": (
        tensor(f"{LAYER}.q_proj.lora_B.bias", np.ones(D)),
        UnsupportedError,
        "is a bias, and a LLaMA has",
    ),
    "a norm": (
        tensor("base_model.model.model.norm.lora_A.weight", np.ones((4, D))),
        UnsupportedError,
        "is of a norm, and only matrices have A and B",
    ),
    "a whole head": (
        tensor(f"{HEAD}.weight", np.ones((512, D))),
        UnsupportedError,
        "is a whole output matrix",
    ),
    "a table as a matrix": (
        tensor(f"{TABLE}.lora_A.weight", np.ones((4, D))),
        UnsupportedError,
        "is no A or B",
    ),
    "another base": (
        tensor(f"{HEAD}.base_layer.weight", np.ones((512, D))),
        MismatchError,
        f"away from.*{OTHER}",
    ),
    "a larger base": (
        tensor(f"{HEAD}.base_layer.weight", np.ones((600, D))),
        MismatchError,
        rf"has the shape \(600, {D}\), the model's weight has \(512, {D}\)",
    ),
    "a base of NaN": (
        tensor(f"{HEAD}.base_layer.weight", np.full((512, D), NAN)),
        MismatchError,
        "nan away from",
    ),
}


@pytest.fixture
def folder(tmp_path):
    write_peft(tmp_path / "adapter", random_updates(0, every_matrix(4)), ARGS)
    return tmp_path / "adapter"


def use(path) -> None:
    """Everything that `load` does with an adapter."""
    adapter = open_adapter(path)
    adapter.check_copies(stored(base(), "F32"))
    adapter.low_ranks(ARGS)


def rewrite(folder, change) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(folder / "adapter_model.safetensors")
    change(config, tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    safetensors.numpy.save_file(tensors, folder / "adapter_model.safetensors")


def test_the_sound_adapter_is_accepted(folder):
    use(folder)
    rewrite(folder, tensor(f"{HEAD}.base_layer.weight", base()["output.weight"]))
    use(folder)


@pytest.mark.parametrize("name", PEFT)
def test_a_folder_is_refused(name, folder):
    change, error, words = PEFT[name]
    rewrite(folder, change)
    with pytest.raises(error, match=words) as refused:
        use(folder)
    assert type(refused.value) is error and str(folder) in str(refused.value)
    assert len(str(refused.value).replace(str(folder), "")) < 400


# what was changed -> (metadata, tensors by name, the error, words of its message)
SOUND = {"general.type": "adapter", "general.architecture": "llama", "adapter.type": "lora"}
A, B = (np.ones((4, D), np.float32), np.ones((D, 4), np.float32))
QA, QB = "blk.1.attn_q.weight.lora_a", "blk.1.attn_q.weight.lora_b"
Q = {QA: A, QB: B}
NORM = {"blk.0.attn_norm.weight": np.ones(D, np.float32)}
GGUF = {
    "a model": ({"general.type": "model"}, Q, FormatError, "general.type is 'model'"),
    "another architecture": ({"general.architecture": "gemma"}, Q, UnsupportedError, "is 'gemma'"),
    "a control vector": ({"adapter.type": "cvec"}, Q, UnsupportedError, "adapter.type is 'cvec'"),
    "activated": (
        {"adapter.alora.invocation_tokens": np.array([1], np.uint32)},
        Q,
        UnsupportedError,
        "an activated LoRA",
    ),
    "alpha is NaN": ({"adapter.lora.alpha": NAN}, Q, NumericsError, "adapter.lora.alpha is nan"),
    "alpha is a text": ({"adapter.lora.alpha": "4"}, Q, FormatError, "adapter.lora.alpha is '4'"),
    "no pairs": ({}, {}, FormatError, "has no pairs of .lora_a and .lora_b"),
    "no B": ({}, {QA: A}, MismatchError, "its .lora_b is missing"),
    "a norm": ({}, Q | NORM, MismatchError, "'blk.0.attn_norm.weight' is no"),
    "an unknown name": (
        {},
        {"x.weight.lora_a": A, "x.weight.lora_b": B},
        MismatchError,
        "'x.weight.lora_a' is no",
    ),
    "transposed": ({}, {QA: B, QB: A}, MismatchError, OTHER),
    "a layer too many": (
        {},
        {name.replace("1", "2"): x for name, x in Q.items()},
        MismatchError,
        "layer 2, the model has 2 layers",
    ),
    "a table of another size": (
        {},
        {"token_embd.weight.lora_a": np.ones((500, 4), np.float32), "token_embd.weight.lora_b": B},
        MismatchError,
        rf"lora_a' has the shape \(500, 4\), the model wants \(512, 4\); {OTHER}",
    ),
    "NaN": ({}, Q | {QB: B * NAN}, NumericsError, "lora_b' has numbers that are NaN"),
}


@pytest.mark.parametrize("name", GGUF)
def test_a_gguf_is_refused(name, tmp_path):
    metadata, tensors, error, words = GGUF[name]
    path = tmp_path / "lora.gguf"
    path.write_bytes(
        gguf_bytes(SOUND | metadata, {n: StoredTensor.quantize(x, "F32") for n, x in tensors.items()})
    )
    with pytest.raises(error, match=words) as refused:
        use(path)
    assert type(refused.value) is error and str(path) in str(refused.value)


def test_other_files_are_refused(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no_weights").mkdir()
    (tmp_path / "no_weights" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "mlx").mkdir()
    (tmp_path / "mlx" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "mlx" / "adapters.safetensors").touch()
    (tmp_path / "page.gguf").write_bytes(b"<!DOCTYPE html>")
    (tmp_path / "picture").write_bytes(b"\x89PNG\r\n")
    (tmp_path / "pickle").mkdir()
    (tmp_path / "pickle" / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x02cos\nsystem\n(S'x'\ntR.")
    for name, error, words in [
        ("no/such", FormatError, "is not there; wanted a folder of PEFT"),
        ("empty", FormatError, "has no adapter_config.json; wanted a folder of PEFT"),
        (
            "no_weights",
            FormatError,
            "has no weights; looked for adapter_model.safetensors, adapter_model.bin$",
        ),
        ("mlx", FormatError, "its adapters.safetensors is MLX's"),
        ("page.gguf", FormatError, "is an HTML page; wanted a folder of PEFT"),
        ("picture", FormatError, "holds a picture"),
        ("pickle", UnsafePickleError, "os.system"),
        ("adapter/adapter_model.safetensors", FormatError, "is a file of an adapter: name its folder"),
        ("adapter/adapter_config.json", FormatError, "is a file of an adapter: name its folder"),
    ]:
        with pytest.raises(error, match=words):
            open_adapter(tmp_path / name)


@pytest.mark.parametrize("keep", [0, 1, 7, 8, 100, 1000, -1])
def test_a_cut_file_is_refused(keep, folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(NumpyLlamaError, match=r"adapter_model\.safetensors"):
        use(folder)


def test_an_adapter_of_another_model_names_the_first_difference(folder):
    for other, words in [
        (
            replace(ARGS, dim=32),
            rf"lora_embedding_B' has the shape \({D}, 4\), the model wants \(32, 4\); {OTHER}",
        ),
        (replace(ARGS, n_kv_heads=4), rf"k_proj.lora_B.weight' has the shape \(32, 4\), .* \({D}, 4\)"),
        (replace(ARGS, n_layers=1), "of layer 1, the model has 1 layers"),
        (replace(ARGS, vocab_size=600), r"lora_embedding_A' has the shape \(4, 512\), .* \(4, 600\)"),
    ]:
        with pytest.raises(MismatchError, match=words):
            open_adapter(folder).low_ranks(other)


def test_a_model_is_no_adapter_and_the_way_out_is_named(main, folder, capsys):
    assert main(["generate", "-m", str(folder), "x"]) == 1
    assert "holds an adapter (LoRA): name its base model, and this with --adapter" in capsys.readouterr().err


def test_info_describes_an_adapter(main, folder, tmp_path, capsys):
    assert main(["info", str(folder)]) == 0
    out = capsys.readouterr().out
    for line in (
        "(LoRA)",
        "PEFT, ",
        "not named",
        "rank             4\n",
        "scale            0.5 to 8\n",
        "16 weights",
    ):
        assert line in out
    assert "layers.N.attention.wk.weight" in out and "A 4 x 64" in out
