"""S: safetensors files, as the only weights of a Hugging Face folder that is otherwise in order."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .case import MiB, Variant, case, model
from .models import hf_folder, hf_weights

CODES = {
    np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.float64): "F64",
    np.dtype(np.int32): "I32", np.dtype(np.int64): "I64", np.dtype(np.uint8): "U8",
    np.dtype(np.uint16): "BF16",  # its bits
}  # fmt: skip
LARGEST_HEADER = 100_000_000


def safetensors_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    """A file in order: u64 length of the header, the header in JSON, the data without holes."""
    header, data = {}, b""
    for name, value in tensors.items():
        offsets = [len(data), len(data) + value.nbytes]
        header[name] = {"dtype": CODES[value.dtype], "shape": list(value.shape), "data_offsets": offsets}
        data += value.tobytes()
    return with_header(json.dumps(header).encode(), data)


def with_header(header: bytes, data: bytes = b"") -> bytes:
    return struct.pack("<Q", len(header)) + header + data


def file(folder: Path, name: str, data: bytes, *expected: str, **options) -> Variant:
    path = hf_folder(folder / f"{sum(1 for _ in folder.iterdir())}", tensors=data)
    return model(name, path, *expected, reference=("safetensors", path / "model.safetensors"), **options)


def entry(name: str, dtype: str, shape: str, offsets: str) -> str:
    return f'"{name}":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'


def of_entries(folder: Path, name: str, entries: list[str], n_bytes: int, *expected: str, **options):
    """A file whose header holds these entries, before `n_bytes` bytes of data."""
    header = "{" + ",".join(entries) + "}"
    return file(folder, name, with_header(header.encode(), bytes(n_bytes)), *expected, **options)


@case("S01", "too short for a length")
def no_length(folder: Path) -> Iterator[Variant]:
    yield file(folder, "empty", b"", "TruncatedError")
    yield file(folder, "7 bytes", bytes(7), "TruncatedError")


@case("S02", "a header of 2^64 bytes")
def header_too_large(folder: Path) -> Iterator[Variant]:
    data = struct.pack("<Q", 0xFFFFFF000000003C) + b"{}" + bytes(100)
    yield file(folder, "far too large", data, "ResourceLimitError")


@case("S03", "a header of 100 MB")
def header_of_100_mb(folder: Path) -> Iterator[Variant]:
    n = LARGEST_HEADER + 1
    header = b'{"__metadata__":{"a":"' + b"x" * (n - 25) + b'"}}'
    assert len(header) == n
    yield file(folder, "one byte too many", with_header(header), "ResourceLimitError", says=("100000001",))
    room = 64 * MiB + 4 * LARGEST_HEADER
    sparse = file(folder, "sparse", struct.pack("<Q", LARGEST_HEADER), "FormatError", room=room)
    with open(sparse.reference[1], "r+b") as weights:
        weights.truncate(8 + LARGEST_HEADER)
    yield sparse


@case("S04", "the header is missing")
def header_missing(folder: Path) -> Iterator[Variant]:
    yield file(folder, "60 bytes promised", struct.pack("<Q", 60), "TruncatedError")


@case("S05", "a header that is not UTF-8")
def not_utf8(folder: Path) -> Iterator[Variant]:
    yield file(folder, "0xFF", with_header(b"\xff"), "FormatError")


@case("S06", "a header that is no JSON object")
def not_json(folder: Path) -> Iterator[Variant]:
    for header in ("{", "[]", "null", '"x"', " " * 100):
        yield file(folder, header[:4], with_header(header.encode()), "FormatError")


@case("S07", "ten tensors in one place")
def overlap(folder: Path) -> Iterator[Variant]:
    entries = [entry(f"t{i}", "F32", "[2,2]", "[0,16]") for i in range(10)]
    yield of_entries(folder, "ten", entries, 16, "FormatError", says=("overlap",))


@case("S08", "a hole between tensors")
def hole(folder: Path) -> Iterator[Variant]:
    entries = [entry("a", "F32", "[4]", "[0,16]"), entry("b", "F32", "[4]", "[32,48]")]
    yield of_entries(folder, "16 bytes", entries, 48, "FormatError", says=("hole",))


@case("S09", "something after the last tensor")
def trailing(folder: Path) -> Iterator[Variant]:
    data = safetensors_bytes(hf_weights()) + b"extra_bogus_data_for_polyglot_file"
    yield file(folder, "a polyglot", data, "FormatError", says=("covered",))


@case("S10", "two bytes missing at the end")
def cut_short(folder: Path) -> Iterator[Variant]:
    yield file(folder, "cut", safetensors_bytes(hf_weights())[:-2], "TruncatedError")


@case("S11", "shapes whose product wraps")
def product_wraps(folder: Path) -> Iterator[Variant]:
    for name, shape in [("elements", "[2,18446744073709551614]"), ("bytes", "[2,9223372036854775807]")]:
        entries = [entry("a", "I32", shape, "[0,16]")]
        yield of_entries(folder, name, entries, 16, "ResourceLimitError")


@case("S12", "offsets for half of the tensor")
def half_the_bytes(folder: Path) -> Iterator[Variant]:
    entries = [entry("a", "F64", "[4]", "[0,16]")]
    yield of_entries(folder, "16 of 32", entries, 16, "FormatError", says=("32", "16"))


@case("S13", "offsets for one number of a million")
def one_of_a_million(folder: Path) -> Iterator[Variant]:
    entries = [entry("a", "F32", "[1000,1000]", "[0,4]")]
    yield of_entries(folder, "4 bytes", entries, 4, "FormatError", says=("4000000",))


@case("S14", "offsets that are none")
def bad_offsets(folder: Path) -> Iterator[Variant]:
    for offsets in ("[16,0]", "[-16,0]", "[0,-16]", "[0,8,16]", "[0.0,16.0]", '["0","16"]', "[0,1e3]"):
        yield of_entries(folder, offsets, [entry("a", "F32", "[4]", offsets)], 16, "FormatError")


@case("S15", "an unknown type, far away")
def unknown_type(folder: Path) -> Iterator[Variant]:
    entries = [entry("a", "F13", "[4]", f"[{(1 << 64) - 8},{(1 << 64) - 4}]")]
    yield of_entries(folder, "F13", entries, 16, "UnsupportedError", says=("F13",))


@case("S16", "one tensor twice")
def duplicate(folder: Path) -> Iterator[Variant]:
    entries = [entry("a", "F32", "[4]", "[0,16]"), entry("a", "F32", "[4]", "[16,32]")]
    yield of_entries(folder, "twice", entries, 32, "FormatError", says=("duplicate key",))


@case("S17", "metadata that is no text")
def metadata(folder: Path) -> Iterator[Variant]:
    whole = safetensors_bytes(hf_weights())
    length = int.from_bytes(whole[:8], "little")
    rest = whole[9 : 8 + length]
    for value in ('{"b":"c"}', "1", '["b"]'):
        header = b'{"__metadata__":{"a":' + value.encode() + b"}," + rest
        yield file(folder, value, with_header(header, whole[8 + length :]), "FormatError")


@case("S18", "JSON nested 100,000 deep")
def nested(folder: Path) -> Iterator[Variant]:
    for name, header in [("a list", b"[" * 100_000), ("inside", b'{"a":' * 100_000)]:
        yield file(folder, name, with_header(header), "FormatError")
