"""G: GGUF files. What is wrong stands where the reader meets it, in a file that is otherwise in order."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from helpers.gguf_writer import SCALARS, Raw, array, header, kv, padding, string, tensor_info, u32, u64

from .case import Variant, case, model
from .models import (
    CONTEXT,
    EPS,
    GGUF_NAMES,
    N_LAYERS,
    THETA,
    D,
    F,
    H,
    K,
    byte_ranks,
    merges,
    printable,
    renamed,
    sentencepieces,
    weights,
)

MAX64 = (1 << 64) - 1
F32, Q4_0, Q4_K, I8, I64 = 0, 2, 12, 24, 27
STRING, ARRAY = 8, 9


def metadata(byte_level: bool = False, **changes) -> dict:
    """A model and its vocabulary; a change of value None leaves the key out. `__` stands for a dot."""
    pieces = sentencepieces()
    values = {
        "general.architecture": "llama",
        "llama.block_count": N_LAYERS,
        "llama.context_length": CONTEXT,
        "llama.embedding_length": D,
        "llama.feed_forward_length": F,
        "llama.attention.head_count": H,
        "llama.attention.head_count_kv": K,
        "llama.attention.layer_norm_rms_epsilon": EPS,
        "llama.rope.freq_base": THETA,
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [text for text, _, _ in pieces],
        "tokenizer.ggml.scores": np.array([score for _, score, _ in pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([kind for _, _, kind in pieces], np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }
    if byte_level:
        tokens = [*map(printable, byte_ranks()), "<|begin|>", "<|end|>"]
        values |= {
            "tokenizer.ggml.model": "gpt2",
            "tokenizer.ggml.pre": "llama-bpe",
            "tokenizer.ggml.tokens": tokens,
            "tokenizer.ggml.merges": [f"{printable(a)} {printable(b)}" for a, b in merges()],
            "tokenizer.ggml.token_type": np.array([1] * (len(tokens) - 2) + [3, 3], np.int32),
            "tokenizer.ggml.bos_token_id": len(tokens) - 2,
            "tokenizer.ggml.eos_token_id": len(tokens) - 1,
        }
        del values["tokenizer.ggml.scores"]
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return {key: value for key, value in values.items() if value is not None}


def file_bytes(values: dict | list, records: list[bytes], data: bytes = b"") -> bytes:
    """A file of these keys, these records of tensors, and this data; pairs in a list may repeat a key."""
    pairs = list(values.items()) if isinstance(values, dict) else values
    head = header(len(records), len(pairs)) + b"".join(kv(key, value) for key, value in pairs)
    head += b"".join(records)
    return head + padding(len(head), 32) + data


def llama_records(tensors: dict[str, np.ndarray]) -> tuple[list[bytes], bytes]:
    """The records and the data of float32 tensors."""
    records, data = [], b""
    for name, value in tensors.items():
        records.append(tensor_info(name, value.shape[::-1], F32, len(data)))
        data += value.tobytes() + padding(value.nbytes, 32)
    return records, data


def llama_bytes(values: dict | None = None, byte_level: bool = False, tensors: dict | None = None) -> bytes:
    """A whole model that can be run, unless `values` says otherwise."""
    values = metadata(byte_level) if values is None else values
    rows = len(values["tokenizer.ggml.tokens"])
    if tensors is None:
        tensors = renamed(weights(rows), GGUF_NAMES, "blk")
    return file_bytes(values, *llama_records(tensors))


def file(folder: Path, name: str, data: bytes, *expected: str, **options) -> Variant:
    path = folder / f"{name.replace('/', '_')}.gguf"
    path.write_bytes(data)
    return model(name, path, *expected, **{"reference": ("gguf", path)} | options)


def with_records(folder: Path, name: str, records: list[bytes], *expected: str, **options) -> Variant:
    """A file whose list of tensors is wrong; some bytes follow it."""
    return file(folder, name, file_bytes(metadata(), records, bytes(4096)), *expected, **options)


def with_metadata(folder: Path, name: str, *expected: str, says=(), byte_level=False, **changes) -> Variant:
    """A whole model, but for some values of its metadata."""
    return file(folder, name, llama_bytes(metadata(byte_level, **changes)), *expected, says=says)


def beginning(folder: Path, name: str, data: bytes, *expected: str, **options) -> Variant:
    """A file that goes wrong at its beginning; enough follows for small counts to be believable."""
    return file(folder, name, data + bytes(4096), *expected, **options)


# ---------------------------------------------------------------- the header


@case("G01", "an empty file")
def empty(folder: Path) -> Iterator[Variant]:
    yield file(folder, "empty", b"", "TruncatedError", says=("0 bytes, need 24",))


@case("G02", "another magic")
def magic(folder: Path) -> Iterator[Variant]:
    for word, old in [("FUGG", ""), ("GGML", "GGML"), ("ggjt", "GGJT"), ("lmgg", "GGML"), ("tjgg", "GGJT")]:
        data = header(0, 0, magic=word.encode())
        yield beginning(folder, word, data, "FormatError", says=(old, word))


@case("G03", "a version nobody knows, or big-endian")
def version(folder: Path) -> Iterator[Variant]:
    for number in (0, 1, 4):
        yield beginning(folder, f"version {number}", header(0, 0, number), "UnsupportedError")
    data = header(0, 0, 0x03000000)
    yield beginning(folder, "big-endian", data, "UnsupportedError", says=("big-endian file",))


@case("G04", "2^64 - 1 tensors")
def tensor_count(folder: Path) -> Iterator[Variant]:
    yield beginning(folder, "n_tensors", header(MAX64, 0), "ResourceLimitError")


@case("G05", "2^64 - 1 keys")
def key_count(folder: Path) -> Iterator[Variant]:
    yield beginning(folder, "n_kv", header(0, MAX64), "ResourceLimitError")


# ---------------------------------------------------------------- the metadata


@case("G06", "a key that is longer than the file")
def key_length(folder: Path) -> Iterator[Variant]:
    for name, length in [("2^64-1", MAX64), ("2^63", 1 << 63), ("one too many", 4097)]:
        data = header(0, 1) + u64(length)
        yield beginning(folder, name, data, "TruncatedError", says=("kv[0].key",))


@case("G07", "an empty key")
def empty_key(folder: Path) -> Iterator[Variant]:
    for type in [*SCALARS.values(), STRING]:
        value = string("x") if type == STRING else bytes(8)
        data = (header(0, 1) + string("") + u32(type) + value).ljust(45, b"\0")
        yield file(folder, f"type {type}", data, "FormatError", says=("empty key",))


@case("G08", "a value of no type")
def value_type(folder: Path) -> Iterator[Variant]:
    for type in (13, 255, 0xFFFFFFFF):
        data = header(0, 1) + string("key") + u32(type)
        yield beginning(folder, f"type {type}", data, "FormatError", says=("bad value type",))


@case("G09", "an array of 2^61 numbers of 8 bytes")
def array_wraps(folder: Path) -> Iterator[Variant]:
    data = header(0, 1) + kv("key", array(SCALARS["Q"], 1 << 61, b""))
    yield beginning(folder, "2^64 bytes", data, "ResourceLimitError")


@case("G10", "arrays nested 10,000 deep")
def nested(folder: Path) -> Iterator[Variant]:
    inner = (u32(ARRAY) + u64(1)) * 10_000 + u32(0) + u64(0)
    data = header(0, 1) + kv("key", Raw(ARRAY, inner))
    yield beginning(folder, "nested", data, "FormatError", says=("nested arrays",))


@case("G11", "one key twice")
def duplicate_key(folder: Path) -> Iterator[Variant]:
    pairs = [*metadata().items(), ("llama.block_count", 2)]
    data = file_bytes(pairs, *llama_records(renamed(weights(), GGUF_NAMES, "blk")))
    yield file(folder, "twice", data, "FormatError", says=("duplicate key", "llama.block_count"))


@case("G12", "an alignment that is no power of two")
def alignment(folder: Path) -> Iterator[Variant]:
    for number in (0, 13, (1 << 31) + 1):
        values = {"general__alignment": number}
        yield with_metadata(folder, str(number), "FormatError", says=("power of two",), **values)


@case("G13", "an alignment of another type")
def alignment_type(folder: Path) -> Iterator[Variant]:
    for name, value in [("INT32", np.int32(32)), ("ARRAY", np.array([32], np.uint32)), ("STRING", "32")]:
        values = {"general__alignment": value}
        yield with_metadata(folder, name, "FormatError", says=("alignment must be uint32",), **values)


# ---------------------------------------------------------------- the list of tensors


@case("G14", "too many dimensions")
def n_dims(folder: Path) -> Iterator[Variant]:
    for number in (5, 1_000_000, 0xFFFFFFFF):
        record = string("token_embd.weight") + u32(number) + u64(1) * 5 + u32(F32) + u64(0)
        yield with_records(folder, str(number), [record], "FormatError", says=("n_dims > 4",))


@case("G15", "dimensions whose product wraps to 4")
def product_wraps(folder: Path) -> Iterator[Variant]:
    dims = [4194305, 4194305, 211106198978564]
    assert dims[0] * dims[1] * dims[2] % (1 << 64) == 4
    record = tensor_info("token_embd.weight", dims, F32, 0)
    yield with_records(folder, "wraps", [record], "FormatError", "ResourceLimitError")


@case("G16", "a dimension of 2^63")
def negative_dimension(folder: Path) -> Iterator[Variant]:
    yield with_records(folder, "2^63", [tensor_info("token_embd.weight", [1 << 63], F32, 0)], "FormatError")


@case("G17", "a tensor whose bytes wrap")
def bytes_wrap(folder: Path) -> Iterator[Variant]:
    record = tensor_info("token_embd.weight", [1 << 62], I64, 0)
    yield with_records(folder, "2^65 bytes", [record], "ResourceLimitError")


@case("G18", "two tensors whose sum wraps")
def sum_wraps(folder: Path) -> Iterator[Variant]:
    half = 0x7FFFFFFFFFFFFFC0
    records = [tensor_info("a", [half], I8, 0), tensor_info("b", [half], I8, half)]
    yield with_records(folder, "two halves", records, "ResourceLimitError")


@case("G19", "a tensor whose padding wraps")
def padding_wraps(folder: Path) -> Iterator[Variant]:
    record = tensor_info("token_embd.weight", [(1 << 62) - 1], F32, 0)
    yield with_records(folder, "2^64-4 bytes", [record], "ResourceLimitError")


@case("G20", "a tensor of no type")
def tensor_type(folder: Path) -> Iterator[Variant]:
    for type in (4, 5, 31, 36, 42, 255, 0xFFFFFFFF):  # 39 to 41 have become types since the rule was made
        record = tensor_info("token_embd.weight", [256], type, 0)
        yield with_records(folder, f"type {type}", [record], "UnsupportedError", says=("Q4_0", "Q8_0"))


@case("G21", "rows that are not whole blocks")
def row_of_blocks(folder: Path) -> Iterator[Variant]:
    for name, type, row in [("Q4_0", Q4_0, 33), ("Q4_K", Q4_K, 255)]:
        record = tensor_info("token_embd.weight", [row, 2], type, 0)
        says = ("row not a multiple of block",)
        yield with_records(folder, name, [record], "FormatError", says=says)


@case("G22", "a tensor that lies elsewhere")
def tensor_offset(folder: Path) -> Iterator[Variant]:
    for name, offset in [("unaligned", 4), ("a hole before it", 64), ("2^64-32", (1 << 64) - 32)]:
        record = tensor_info("token_embd.weight", [8], F32, offset)
        yield with_records(folder, name, [record], "FormatError", says=("tensor offset",))


@case("G23", "the file ends too early")
def cut_short(folder: Path) -> Iterator[Variant]:
    whole = llama_bytes()
    for name, missing in [("by a byte", 1), ("by a page", 4096)]:
        says = (
            "needs",
            "file has",
            "incomplete copy or download?",
            str(len(whole)),
            str(len(whole) - missing),
        )
        yield file(folder, name, whole[:-missing], "TruncatedError", says=says)


@case("G24", "one tensor twice")
def duplicate_tensor(folder: Path) -> Iterator[Variant]:
    records = [tensor_info("token_embd.weight", [8], F32, offset) for offset in (0, 32)]
    yield with_records(folder, "twice", records, "FormatError", says=("token_embd.weight",))


# ---------------------------------------------------------------- the vocabulary


@case("G25", "scores of another type")
def scores_type(folder: Path) -> Iterator[Variant]:
    scores = np.zeros(len(sentencepieces()), np.uint8)
    says = ("tokenizer.ggml.scores", "float32")
    yield with_metadata(folder, "UINT8", "FormatError", says=says, tokenizer__ggml__scores=scores)


@case("G26", "columns shorter than the vocabulary")
def short_columns(folder: Path) -> Iterator[Variant]:
    values = metadata()
    for name in ("scores", "token_type"):
        change = {f"tokenizer__ggml__{name}": values[f"tokenizer.ggml.{name}"][:-1]}
        yield with_metadata(folder, name, "MismatchError", says=(name,), **change)


@case("G27", "BOS beyond the vocabulary")
def bos_id(folder: Path) -> Iterator[Variant]:
    change = {"tokenizer__ggml__bos_token_id": (1 << 31) - 1}
    yield with_metadata(folder, "2^31-1", "MismatchError", says=("bos_token_id", "2147483647"), **change)


@case("G28", "a vocabulary of two tokens")
def tiny_vocabulary(folder: Path) -> Iterator[Variant]:
    changes = {
        "tokenizer__ggml__tokens": ["a", "b"],
        "tokenizer__ggml__scores": np.zeros(2, np.float32),
        "tokenizer__ggml__token_type": np.array([1, 1], np.int32),
        "tokenizer__ggml__bos_token_id": 0,
        "tokenizer__ggml__eos_token_id": 1,
    }
    yield with_metadata(folder, "SentencePiece", "TokenizerError", **changes)


# ---------------------------------------------------------------- the model


@case("G29", "an impossible number of layers")
def block_count(folder: Path) -> Iterator[Variant]:
    for n in (0, 513, 0xFFFFFFFF):
        says = ("llama.block_count", str(n))
        yield with_metadata(folder, str(n), "ConfigError", says=says, llama__block_count=n)


@case("G30", "heads that do not divide the width")
def head_count(folder: Path) -> Iterator[Variant]:
    for n in (0, 3):
        says = (str(n), "head")
        yield with_metadata(folder, f"{n} heads", "ConfigError", says=says, llama__attention__head_count=n)
