"""A GGUF writer for tests. `gguf_bytes` writes valid files; from its parts one puts together broken ones.

path.write_bytes(gguf_bytes({"general.architecture": "llama"}, {"x": StoredTensor.quantize(x, "Q8_0")}))
write_llama(path, args, random_weights(rng, args), "Q4_0")
"""

import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from numpy_llama.backend.formats import StoredTensor
from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.config import ModelArgs
from numpy_llama.text.tokenizer import spelled

STRING, ARRAY = 8, 9
SCALARS = dict(zip("BbHhIif?Qqd", [0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12], strict=True))


@dataclass
class Raw:
    """A metadata value of any type number and any bytes."""

    type: int
    payload: bytes


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def string(text: str | bytes) -> bytes:
    data = text.encode() if isinstance(text, str) else text
    return u64(len(data)) + data


def header(n_tensors: int, n_kv: int, version: int = 3, magic: bytes = b"GGUF") -> bytes:
    return magic + u32(version) + u64(n_tensors) + u64(n_kv)


def kv(key: str | bytes, value) -> bytes:
    """int is written as UINT32, float as FLOAT32, a list as strings; NumPy's types as what they are."""
    raw = _raw(value)
    return string(key) + u32(raw.type) + raw.payload


def _raw(value) -> Raw:
    if isinstance(value, Raw):
        return value
    if isinstance(value, str):
        return Raw(STRING, string(value))
    if isinstance(value, list):
        return array(STRING, len(value), b"".join(map(string, value)))
    if isinstance(value, np.ndarray):
        return array(SCALARS[_code(value.dtype)], len(value), value.tobytes())
    scalar = {bool: np.bool_, int: np.uint32, float: np.float32}.get(type(value), type(value))(value)
    return Raw(SCALARS[_code(scalar.dtype)], scalar.tobytes())


def array(element_type: int, count: int, payload: bytes) -> Raw:
    return Raw(ARRAY, u32(element_type) + u64(count) + payload)


def _code(dtype: np.dtype) -> str:
    return next(code for code in SCALARS if np.dtype(code) == dtype)


def tensor_info(name: str | bytes, dims, type: int, offset: int) -> bytes:
    """dims in ggml's order, the row length first."""
    return string(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(type) + u64(offset)


def padding(n: int, alignment: int) -> bytes:
    return bytes(-n % alignment)


def gguf_bytes(metadata: dict, tensors: dict[str, StoredTensor], version: int = 3) -> bytes:
    """A whole file; `general.alignment` in the metadata is obeyed."""
    alignment = int(metadata.get("general.alignment", 32))
    head = header(len(tensors), len(metadata), version)
    head += b"".join(kv(key, value) for key, value in metadata.items())
    body = b""
    for name, tensor in tensors.items():
        head += tensor_info(name, tensor.shape[::-1], tensor.format.code, len(body))
        data = tensor.data.tobytes()
        body += data + padding(len(data), alignment)
    return head + padding(len(head), alignment) + body


def llama_metadata(args: ModelArgs) -> dict:
    """The metadata of a model without a vocabulary."""
    return {
        "general.architecture": "llama",
        "llama.block_count": args.n_layers,
        "llama.context_length": args.max_seq_len,
        "llama.embedding_length": args.dim,
        "llama.feed_forward_length": args.hidden_dim,
        "llama.attention.head_count": args.n_heads,
        "llama.attention.head_count_kv": args.n_kv_heads,
        "llama.attention.key_length": args.head_dim,
        "llama.attention.value_length": args.head_dim,
        "llama.attention.layer_norm_rms_epsilon": np.float64(args.norm_eps),
        "llama.rope.freq_base": np.float64(args.rope_theta),
        "llama.rope.dimension_count": args.head_dim,
        "llama.vocab_size": args.vocab_size,
    } | ({} if args.sliding_window is None else {"llama.attention.sliding_window": args.sliding_window})


def llama_tensors(args: ModelArgs, weights: dict[str, np.ndarray], format: str = "F32"):
    """Weights under our names -> tensors under GGUF's; matrices in `format`, vectors in F32."""
    names = tensor_names(args, "gguf")
    return {
        names[ours]: StoredTensor.quantize(w, format if w.ndim == 2 else "F32") for ours, w in weights.items()
    }


def byte_vocabulary(n: int) -> dict:
    """256 tokens of a byte each, and unused ones."""
    tokens = [spelled(bytes([b])) for b in range(256)] + [f"[{i}]" for i in range(256, n)]
    kinds = np.where(np.arange(n) < 256, 1, 5).astype(np.int32)
    return {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "token_type": kinds, "merges": []}


def write_llama(path: Path, args: ModelArgs, weights, format: str = "F32", **vocabulary) -> Path:
    """A small model as a GGUF file; `vocabulary` gives the tokenizer.ggml.* entries without that prefix."""
    metadata = llama_metadata(args) | {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    path.write_bytes(gguf_bytes(metadata, llama_tensors(args, weights, format)))
    return path
