"""What is no model is refused with its own name and a way out, whatever its file is called."""

import io
import json
import zipfile

import numpy as np
import pytest
import safetensors.numpy
import torch
from helpers.gguf_writer import gguf_bytes
from helpers.tokenizers import byte_level_metadata, hugging_face, trained_sentencepiece

from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.errors import FormatError, TruncatedError, UnsupportedError

LORA = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


def written(write) -> bytes:
    """The bytes that write(file) leaves."""
    file = io.BytesIO()
    write(file)
    return file.getvalue()


def zipped(*names: str) -> bytes:
    def write(file):
        with zipfile.ZipFile(file, "w") as archive:
            for name in names:
                archive.writestr(name, "x" * 500)

    return written(write)


def drawn(kind: str) -> bytes:
    plt = pytest.importorskip("matplotlib.figure")
    return written(lambda file: plt.Figure().savefig(file, format=kind))


LLAMA2C = np.array([7], "<i4").tobytes() + b"\0\0\0\0\x05\0\0\0<unk>\0\0\0\0\x05\0\0\0\n<s>\n"
FILES = {
    "llama2.c": (lambda: LLAMA2C, "a tokenizer of llama2.c: it has no weights; name the model"),
    "SentencePiece": (
        lambda: trained_sentencepiece().serialized_model_proto(),
        "a tokenizer of SentencePiece: it has no weights",
    ),
    "tiktoken": (lambda: b"IQ== 0\nIg== 1\n", "a tokenizer of tiktoken: it has no weights"),
    "tokenizer.json": (
        lambda: hugging_face(byte_level_metadata()).to_str(pretty=True).encode(),
        "a tokenizer of Hugging Face: it has no weights",
    ),
    "params.json": (lambda: b'{"dim": 64}', "JSON: name its folder, with params.json"),
    "config.json": (lambda: b'{\n  "architectures": ["LlamaForCausalLM"]\n}', "JSON: name its folder"),
    "a list": (lambda: b"[1, 2]", "JSON: name its folder"),
    "adapter_config.json": (
        lambda: json.dumps({"base_model_name_or_path": "x", "peft_type": "LORA"}, indent=2).encode(),
        r"an adapter's settings \(LoRA\): name its base",
    ),
    "adapter": (
        lambda: safetensors.numpy.save({LORA: np.ones((2, 2))}),
        r"an adapter \(LoRA\): name its base",
    ),
    "old adapter": (
        lambda: written(lambda file: torch.save({LORA: torch.ones(2, 2)}, file)),
        r"an adapter \(LoRA\): name its base model, and this with --adapter",
    ),
    "safetensors": (lambda: safetensors.numpy.save({"w": np.ones(2)}), "safetensors: name its folder"),
    "torch": (
        lambda: written(lambda file: torch.save({"w": torch.ones(2)}, file)),
        "PyTorch's weights: name its folder",
    ),
    "old torch": (
        lambda: written(
            lambda file: torch.save({"w": torch.ones(2)}, file, _use_new_zipfile_serialization=False)
        ),
        "PyTorch's weights: name its folder",
    ),
    "npz": (
        lambda: written(lambda file: np.savez(file, w=np.ones(2))),
        "arrays of numpy.savez: wanted a GGUF",
    ),
    "npy": (lambda: written(lambda file: np.save(file, np.ones(2))), "an array of numpy.save: wanted a GGUF"),
    "zip": (lambda: zipped("model/config.json", "model/pytorch_model.bin"), "a zip archive: unpack it"),
    "empty zip": (zipped, "a zip archive: unpack it"),
    "gzip": (lambda: b"\x1f\x8b\x08\0" + b"x" * 300, "a compressed archive: unpack it"),
    "tar": (lambda: b"x".ljust(257, b"\0") + b"ustar\0", "a tar archive: unpack it"),
    "png": (lambda: drawn("png"), "a picture: wanted a GGUF"),
    "jpeg": (lambda: b"\xff\xd8\xff\xe0" + b"x" * 30, "a picture: wanted a GGUF"),
    "pdf": (lambda: drawn("pdf"), "a PDF document: wanted a GGUF"),
    "ONNX": (lambda: b"\x08\x08\x12\x07pytorch\x1a\x052.1.0" + b"x" * 99, "an ONNX export: if it is a LLaMA"),
    "ONNX without a producer": (lambda: b"\x08\x09:\x80\x01" + b"x" * 99, "an ONNX export"),
    "CoreML": (lambda: b"\x08\x04\x12\xd2\x01\n\x10\n" + b"x" * 99, "a CoreML model: if it is a LLaMA"),
    "TensorFlow": (lambda: b"\x08\x01\x12\xff\x10" + b"x" * 99, "a saved model of TensorFlow"),
    "TensorFlow Lite": (lambda: b"\x1c\0\0\0TFL3" + b"x" * 99, "a model of TensorFlow Lite"),
    "diffusion": (
        lambda: safetensors.numpy.save({"model.diffusion_model.out.0.bias": np.ones(2)}),
        "a diffusion model, or a part of one: nothing here runs it",
    ),
    "HDF5": (lambda: b"\x89HDF\r\n\x1a\n", "HDF5, perhaps of Keras: wanted a GGUF"),
}


@pytest.mark.parametrize("name", FILES)
def test_what_is_no_model_is_named(name, tmp_path):
    make, message = FILES[name]
    path = tmp_path / "model.gguf"
    path.write_bytes(make())
    with pytest.raises(FormatError, match=rf"model\.gguf holds {message}"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "data", [b"First Citizen:\n", b"\nOnce upon a time\n", b"\xff" * 100, b"# A model card\n", b"\0" * 40]
)
def test_what_nobody_can_name_is_shown(data, tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(data)
    with pytest.raises(
        FormatError, match=r"m\.gguf begins with b'.*', as no model does; wanted a GGUF, a ll"
    ):
        open_checkpoint(path)


def test_half_a_model_of_llama2c_is_one(tmp_path):
    """Version 0 has no magic, but its 7 numbers are those of a model."""
    (tmp_path / "m.bin").write_bytes(np.array([64, 96, 2, 4, 2, 300, 32], "<i4").tobytes() + b"\0" * 1000)
    with pytest.raises(
        TruncatedError, match=r"needs \d+ bytes, the file has 1028; incomplete copy or download"
    ):
        open_checkpoint(tmp_path / "m.bin")


def test_an_adapter_is_named_in_a_folder_and_in_gguf(tmp_path):
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(FormatError, match=r"holds an adapter \(LoRA\): name its base"):
        open_checkpoint(tmp_path)
    path = tmp_path / "lora.gguf"
    path.write_bytes(gguf_bytes({"general.architecture": "llama", "general.type": "adapter"}, {}))
    with pytest.raises(UnsupportedError, match=r"lora\.gguf holds an adapter \(LoRA\): name its base"):
        open_checkpoint(path).weights()
