"""Models of other kinds are refused with their own name, as a folder and as a GGUF."""

import json

import pytest
from helpers.gguf_writer import gguf_bytes

from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.other_models import ARCHITECTURES, other_architecture, other_folder
from numpy_llama.errors import FormatError, UnsupportedError

# (model_type in config.json, general.architecture in a GGUF, or None where there is no such file, the kind)
KINDS = [
    ("qwen2", "qwen2", "a Qwen"),
    ("qwen3_moe", "qwen3moe", "a Qwen"),
    ("qwen2_5_vl", "qwen2vl", "a model for pictures or sound"),
    ("gemma3_text", "gemma3", "a Gemma"),
    ("phi", "phi2", "a Phi-1 or Phi-2"),
    ("phimoe", "phimoe", "a Phi of another architecture"),
    ("gpt2", "gpt2", "a GPT-2"),
    ("gpt_bigcode", "starcoder", "a GPT-2|a language model of another kind"),
    ("gpt_neox", "gptneox", "a GPT-Neo or GPT-J"),
    ("gpt_oss", "gpt-oss", "a gpt-oss"),
    ("t5", "t5", "an encoder-decoder"),
    ("mbart", "t5encoder", "an encoder-decoder"),
    ("whisper", "whisper", "a model for speech"),
    ("bert", "bert", "an encoder of the BERT kind"),
    ("xlm-roberta", "jina-bert-v2", "an encoder of the BERT kind"),
    ("nomic_bert", "nomic-bert-moe", "an encoder of the BERT kind"),
    (None, "gemma-embedding", "an embedding model"),
    ("mllama", None, "a model for pictures"),
    ("llava", None, "a model for pictures"),
    ("clip", "clip", "a vision model"),
    ("mixtral", None, "a Mixtral, a mixture of experts"),
    ("llama4", "llama4", "a Llama 4, a mixture of experts"),
    ("deepseek_v3", "deepseek2", "a mixture of experts"),
    ("falcon_mamba", "mamba", "a recurrent model"),
    ("falcon", "falcon", "a language model of another kind"),
    ("bitnet", "bitnet-b1.58", "a BitNet"),
    ("smollm3", "smollm3", "a language model of another kind"),
    (None, "flux", "a diffusion model"),
    (None, "sd1", "a diffusion model"),
]


@pytest.mark.parametrize("model_type, architecture, words", KINDS)
def test_another_kind_is_named(tmp_path, model_type, architecture, words):
    if model_type is not None:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type, "hidden_size": 8}))
        message = rf"config\.json: model_type '{model_type}', ({words}).*: nothing here runs it$"
        with pytest.raises(UnsupportedError, match=message):
            open_checkpoint(tmp_path)
    if architecture is not None:
        path = tmp_path / "m.gguf"
        path.write_bytes(gguf_bytes({"general.architecture": architecture}, {}))
        message = rf"m\.gguf: the architecture is '{architecture}', ({words}).*: nothing here runs it$"
        with pytest.raises(UnsupportedError, match=message):
            open_checkpoint(path).args  # noqa: B018


@pytest.mark.parametrize("name", ["llama", "mistral", "phi3", "x", "", None, 3, ["qwen2"]])
def test_what_may_run_is_not_named(name):
    assert other_architecture(name) is None


def test_every_kind_is_tried():
    named = " ".join(filter(None, (other_architecture(name) for row in KINDS for name in row[:2])))
    assert [what for _, what in ARCHITECTURES if what not in named] == []


@pytest.mark.parametrize(
    "values, words",
    [
        ({"architectures": ["LlamaForSequenceClassification"]}, "a classifier or a model of rewards"),
        ({"architectures": ["LlamaForTokenClassification"]}, "a classifier or a model of rewards"),
        ({"architectures": ["LlamaModel"]}, "a model without an output matrix, for embeddings"),
        (
            {"_class_name": "FluxTransformer2DModel", "_diffusers_version": "0.30"},
            "a part of a diffusion model",
        ),
        ({"architectures": 3}, "hidden_size|architectures is 3"),
    ],
)
def test_other_classes(tmp_path, values, words):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | values))
    with pytest.raises(Exception, match=words):
        open_checkpoint(tmp_path)


LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-5}
LLAMA |= {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
LLAMA |= {"vocab_size": 300, "rope_theta": 1e4}


@pytest.mark.parametrize("method", ["exl2", "exl3", "eetq", "hqq", "aqlm"])
def test_a_method_of_quantisation_is_named(tmp_path, method):
    config = LLAMA | {"quantization_config": {"quant_method": method}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UnsupportedError, match=f"'{method}'.* which is not run here"):
        open_checkpoint(tmp_path)


def test_an_mlx_folder_is_named(tmp_path):
    bits = {"group_size": 64, "bits": 4}
    for keys in (["quantization"], ["quantization", "quantization_config"]):
        (tmp_path / "config.json").write_text(json.dumps(LLAMA | dict.fromkeys(keys, bits)))
        with pytest.raises(UnsupportedError, match="quantized by MLX "):
            open_checkpoint(tmp_path)


FOLDERS = {
    "a diffusion model": ["model_index.json", "unet"],
    "an embedding model": ["modules.json", "README.md"],
    "a CoreML model": ["model.mlpackage"],
    "an ONNX export": ["decoder_model.onnx"],
    "an OpenVINO export": ["openvino_model.xml", "openvino_model.bin"],
    "weights of TensorFlow": ["tf_model.h5"],
    "weights of Flax": ["flax_model.msgpack"],
    "weights of MLX": ["weights.npz"],
    "weights that HQQ quantized": ["qmodel.pt"],
    "weights that ExLlama quantized": ["output.safetensors"],
}


@pytest.mark.parametrize("words", FOLDERS)
def test_a_folder_of_another_kind_is_named(tmp_path, words):
    for name in FOLDERS[words]:
        (tmp_path / name).touch()
    with pytest.raises(FormatError, match=f" holds {words}"):
        open_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    with pytest.raises(FormatError, match=f" has no weights; it holds {words}"):
        open_checkpoint(tmp_path)


def test_a_folder_of_gguf_files_says_which_to_name(tmp_path):
    for name in ("m-Q8_0.gguf", "m-Q4_0.gguf"):
        (tmp_path / name).touch()
    with pytest.raises(FormatError, match=r"holds GGUF files: name one of them, such as /.*/m-Q4_0\.gguf"):
        open_checkpoint(tmp_path)


def test_other_folders_are_not_named():
    assert other_folder(["config.json", "model.safetensors", "x.txt"]) is None
