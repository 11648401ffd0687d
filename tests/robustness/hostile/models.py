"""A tiny model in every format, each written here by hand: what the cases break.

It is a LLaMA of one layer, its weights random; only that it can be loaded and makes a token matters.
"""

import contextlib
import json
import random
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .case import ACCEPTED, Variant, case, model, tokenizer

D, H, K, DH, F, N_LAYERS = 32, 2, 1, 16, 96, 1
EPS, THETA, CONTEXT = 1e-5, 10000.0, 128

# ---------------------------------------------------------------- vocabularies

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
LETTERS = "abcdefghijklmnopqrstuvwxyz^-"
DOUBLED = [c * 2**n for n in (1, 2, 3) for c in ("a", "^", "-", "\u2581")]


def sentencepieces() -> list[tuple[str, float, int]]:
    """(piece, score, type): the three usual ones, the 256 bytes, letters, and runs of 2, 4, 8 of some."""
    pieces = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
    pieces += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
    return pieces + [(text, -1.0 - i, NORMAL) for i, text in enumerate([*DOUBLED, "\u2581", *LETTERS])]


V = len(sentencepieces())


def varint(n: int) -> bytes:
    out = bytearray()
    while n > 0x7F:
        out.append(n & 0x7F | 0x80)
        n >>= 7
    return bytes([*out, n])


def field(number: int, value: int | float | bytes) -> bytes:
    """A field of a protobuf message."""
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def sentencepiece_model(pieces: list[tuple[str, float, int]] | None = None) -> bytes:
    """tokenizer.model of Llama 1 and 2: a ModelProto with model_type BPE and byte_fallback."""
    out = b""
    for text, score, kind in sentencepieces() if pieces is None else pieces:
        out += field(1, field(1, text.encode()) + field(2, score) + field(3, kind))
    trainer = field(3, 2) + field(4, V) + field(35, 1) + field(40, 0) + field(41, 1) + field(42, 2)
    normalizer = field(1, b"identity") + field(3, 1) + field(4, 0) + field(5, 1)
    return out + field(2, trainer) + field(3, normalizer)


def byte_ranks() -> list[bytes]:
    """A byte-level vocabulary in the order of its ranks: the bytes, then runs of 2, 4, 8 of some."""
    runs = [c.replace("\u2581", " ").encode() for c in DOUBLED]
    return [bytes([byte]) for byte in range(256)] + runs


def printable(data: bytes) -> str:
    """GPT-2's way to write bytes as characters."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return "".join(chr(byte if byte in plain else 256 + others.index(byte)) for byte in data)


def merges() -> list[tuple[bytes, bytes]]:
    """The pair that each run is made of: two of the half."""
    return [(run[: len(run) // 2],) * 2 for run in byte_ranks()[256:]]


# ---------------------------------------------------------------- weights


def weights(n_vocab: int = V) -> dict[str, np.ndarray]:
    """Under Meta's names."""
    shapes = {"tok_embeddings": (n_vocab, D), "norm": (D,), "output": (n_vocab, D)}
    for i in range(N_LAYERS):
        shapes |= {
            f"layers.{i}.attention_norm": (D,),
            f"layers.{i}.attention.wq": (H * DH, D),
            f"layers.{i}.attention.wk": (K * DH, D),
            f"layers.{i}.attention.wv": (K * DH, D),
            f"layers.{i}.attention.wo": (D, H * DH),
            f"layers.{i}.ffn_norm": (D,),
            f"layers.{i}.feed_forward.w1": (F, D),
            f"layers.{i}.feed_forward.w2": (D, F),
            f"layers.{i}.feed_forward.w3": (F, D),
        }
    rng = np.random.default_rng(0)
    return {
        f"{name}.weight": rng.normal(len(shape) == 1, shape[-1] ** -0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


HF_NAMES = {
    "tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head",
    "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj",
    "attention.wv": "self_attn.v_proj", "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj", "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
}  # fmt: skip
GGUF_NAMES = {
    "tok_embeddings": "token_embd", "norm": "output_norm", "output": "output",
    "attention_norm": "attn_norm", "ffn_norm": "ffn_norm", "attention.wq": "attn_q",
    "attention.wk": "attn_k", "attention.wv": "attn_v", "attention.wo": "attn_output",
    "feed_forward.w1": "ffn_gate", "feed_forward.w2": "ffn_down", "feed_forward.w3": "ffn_up",
}  # fmt: skip


def renamed(values: dict[str, np.ndarray], names: dict[str, str], layers: str) -> dict[str, np.ndarray]:
    """The same weights under other names; of the order of rows in q and k nobody here cares."""
    out = {}
    for name, value in values.items():
        stem = name.removesuffix(".weight")
        if stem.startswith("layers."):
            _, i, stem = stem.split(".", 2)
            out[f"{layers}.{i}.{names[stem]}.weight"] = value
        else:
            out[f"{names[stem]}.weight"] = value
    return out


# ---------------------------------------------------------------- folders

PARAMS = {
    "dim": D, "n_layers": N_LAYERS, "n_heads": H, "n_kv_heads": K, "multiple_of": 32, "norm_eps": EPS,
    "rope_theta": THETA, "vocab_size": V,
}  # fmt: skip

CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "hidden_size": D,
    "intermediate_size": F, "num_hidden_layers": N_LAYERS, "num_attention_heads": H,
    "num_key_value_heads": K, "vocab_size": V, "rms_norm_eps": EPS, "rope_theta": THETA,
    "max_position_embeddings": CONTEXT, "tie_word_embeddings": False, "torch_dtype": "float32",
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def meta_folder(folder: Path, params: bytes | dict | None = None, pth: bytes | None = None) -> Path:
    """params.json, consolidated.00.pth, tokenizer.model."""
    from .torch import pth_bytes

    folder.mkdir()
    text = params if isinstance(params, bytes) else json.dumps(PARAMS if params is None else params).encode()
    (folder / "params.json").write_bytes(text)
    (folder / "consolidated.00.pth").write_bytes(pth_bytes(weights()) if pth is None else pth)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def hf_folder(folder: Path, config: bytes | dict | None = None, tensors: bytes | dict | None = None) -> Path:
    """config.json, model.safetensors, tokenizer.model."""
    from .safetensors import safetensors_bytes

    folder.mkdir()
    text = config if isinstance(config, bytes) else json.dumps(CONFIG if config is None else config).encode()
    (folder / "config.json").write_bytes(text)
    if not isinstance(tensors, bytes):
        tensors = safetensors_bytes(hf_weights() if tensors is None else tensors)
    (folder / "model.safetensors").write_bytes(tensors)
    (folder / "tokenizer.model").write_bytes(sentencepiece_model())
    return folder


def hf_weights() -> dict[str, np.ndarray]:
    return renamed(weights(), HF_NAMES, "model.layers")


# ---------------------------------------------------------------- files that are in order


@case("OK1", "a GGUF file in order")
def gguf_in_order(folder: Path) -> Iterator[Variant]:
    from .gguf import llama_bytes

    path = folder / "model.gguf"
    path.write_bytes(llama_bytes())
    yield model("SentencePiece", path, ACCEPTED, reference=("gguf", path))
    path = folder / "bytes.gguf"
    path.write_bytes(llama_bytes(byte_level=True))
    yield model("byte-level BPE", path, ACCEPTED, reference=("gguf", path))


@case("OK2", "a Hugging Face folder in order")
def hf_in_order(folder: Path) -> Iterator[Variant]:
    path = hf_folder(folder / "hf")
    yield model("safetensors", path, ACCEPTED, reference=("safetensors", path / "model.safetensors"))


@case("OK3", "a folder of Meta's in order")
def meta_in_order(folder: Path) -> Iterator[Variant]:
    from .torch import legacy_bytes

    path = meta_folder(folder / "zip")
    yield model("a zip", path, ACCEPTED, reference=("torch", path / "consolidated.00.pth"))
    path = meta_folder(folder / "legacy", pth=legacy_bytes(weights()))
    yield model("from before the zip", path, ACCEPTED, reference=("torch", path / "consolidated.00.pth"))


@case("OK4", "tokenizers in order")
def tokenizers_in_order(folder: Path) -> Iterator[Variant]:
    from .tokenizers import encodes, tiktoken_model, tokenizer_json, written

    for name, data, reference in [
        ("SentencePiece", sentencepiece_model(), "sentencepiece"),
        ("tiktoken", tiktoken_model(), "tiktoken"),
        ("tokenizer.json", tokenizer_json(), "tokenizers"),
    ]:
        path = written(folder / name, data, "tokenizer.json" if "json" in name else "tokenizer.model")
        yield tokenizer(name, path, ACCEPTED, use=encodes, reference=(reference, path))


@case("OK5", "a chat template in order, and one with a mistake")
def templates_in_order(folder: Path) -> Iterator[Variant]:
    from .templates import Templates

    template = Templates(folder)
    turns = (
        "{{ bos_token }}{% for m in messages %}{% if loop.first %}{{ m.content|trim }}{% endif %}{% endfor %}"
    )
    yield template("in order", turns, expected=(ACCEPTED,))
    yield template("with a mistake", "{{ raise_exception('\x1b' ~ messages[0]['nothing']['at all']) }}")


def warm_up(root: Path) -> None:
    """Have everything imported that a load imports: an audit hook would take it for the file's doing."""
    builders = gguf_in_order, hf_in_order, meta_in_order, tokenizers_in_order, templates_in_order
    for build in builders:
        folder = root / f"warm-{random.randrange(1 << 30)}"
        folder.mkdir()
        for variant in build(folder):
            with contextlib.suppress(Exception):  # the same files are judged later
                variant.run()
