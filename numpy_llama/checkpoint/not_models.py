"""Files that are given as a model and are none, by their first bytes: for messages only."""

import re

from .other_models import NOTHING, SAME

WANTED = "a GGUF, a llama2.c .bin, or a folder with params.json (Meta) or config.json (Hugging Face)"
FOLDER = "name its folder, with params.json (Meta) or config.json (Hugging Face) in it"
TOKENIZER = "it has no weights; name the model, which finds its tokenizer by itself"
ADAPTER = "name its base model, and this with --adapter, in Python load(base, adapter=...)"
UNPACK = "unpack it and name the model in it"
OTHER = f"wanted {WANTED}"

HEAD_BYTES = 4096
# Names of tensors that only diffusion models and their adapters have.
DIFFUSION = rb'(model\.diffusion_model\.|first_stage_model\.|"double_blocks\.|"down_blocks\.|"lora_unet_)'
ZIP = rb"PK\x03\x04.{26}"  # the name of the first member follows
# (how the file begins, what it is, the way out); the first that matches counts.
KINDS = [
    (rb".{8}\x05\0\0\0<unk>", "a tokenizer of llama2.c", TOKENIZER),
    (rb"\n.\n.[^\0]{1,99}?\x15.{4}", "a tokenizer of SentencePiece", TOKENIZER),
    (rb"[A-Za-z0-9+/]+=* \d+\r?\n", "a tokenizer of tiktoken", TOKENIZER),
    (rb'\s*\{.*"(added_tokens|truncation)"', "a tokenizer of Hugging Face", TOKENIZER),
    (rb'\s*\{.*"(peft_type|lora_alpha)"', "an adapter's settings (LoRA)", ADAPTER),
    (rb"\s*[{[]", "JSON", FOLDER),
    (rb".{4}\0{4}\{.*\.lora_A\.", "an adapter (LoRA)", ADAPTER),
    (rb".{4}\0{4}\{.*" + DIFFUSION, "a diffusion model, or a part of one", NOTHING),
    (rb".{4}\0{4}\{", "safetensors", FOLDER),
    (ZIP + rb"[^\0]{1,99}?\.pkl.*\.lora_A\.", "an adapter (LoRA)", ADAPTER),
    (ZIP + rb"[^\0]{1,99}?\.pkl|\x80\x02", "PyTorch's weights", FOLDER),
    (ZIP + rb"[^\0]{1,99}?\.npy", "arrays of numpy.savez", OTHER),
    (rb"\x93NUMPY", "an array of numpy.save", OTHER),
    (rb"PK\x03\x04|PK\x05\x06", "a zip archive", UNPACK),
    (rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf", "a compressed archive", UNPACK),
    (rb".{257}ustar", "a tar archive", UNPACK),
    (rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP", "a picture", OTHER),
    (rb"%PDF", "a PDF document", OTHER),
    (rb"\x89HDF", "HDF5, perhaps of Keras", OTHER),
    (rb".{4}TFL3", "a model of TensorFlow Lite", SAME),
    (rb"\x08\x01\x12", "a saved model of TensorFlow", SAME),
    (rb"\x08[\x02-\x0f]\x12[\x80-\xff]?.\n", "a CoreML model", SAME),
    (rb"\x08[\x02-\x1f](\x12.[ -~]{4}|:)", "an ONNX export", SAME),
]


def described(head: bytes) -> str | None:
    """What a file is that begins with `head`, and the way out; None if it is nothing known."""
    for begins, what, way_out in KINDS:
        if re.match(begins, head[:HEAD_BYTES], re.DOTALL):
            return f"{what}: {way_out}"
    return None
