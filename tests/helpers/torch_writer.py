"""Writes what torch.save does not: broken pickles and zips. And, with torch, Meta's folders.

path.write_bytes(saved(state_dict({"x": tensor(storage("0", 4), (4,), (1,))}), {"0": bytes(16)}))
write_meta(folder, args, weights, n_shards=4)
"""

import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.config import ModelArgs

# A pickle, opcode by opcode

PROTO, STOP, MARK, REDUCE, BUILD = b"\x80\x02", b".", b"(", b"R", b"b"
NONE, TRUE, FALSE = b"N", b"\x88", b"\x89"
EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE = b"}", b"]", b")"
TUPLE, TUPLE1, APPEND, APPENDS, SETITEM, SETITEMS = b"t", b"\x85", b"a", b"e", b"s", b"u"
BINPERSID, POP, POP_MARK = b"Q", b"0", b"1"


def pickled(body: bytes) -> bytes:
    return PROTO + body + STOP


def named(module: str, name: str) -> bytes:
    """GLOBAL"""
    return f"c{module}\n{name}\n".encode()


def text(value: str) -> bytes:
    """BINUNICODE"""
    return b"X" + struct.pack("<I", len(value.encode())) + value.encode()


def number(value: int) -> bytes:
    """LONG1"""
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def group(*values: bytes) -> bytes:
    """A tuple."""
    return MARK + b"".join(values) + TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + group(*arguments) + REDUCE


ORDERED_DICT = call(named("collections", "OrderedDict"))


def storage(key: str, numel: int, type: str = "FloatStorage", *more: bytes) -> bytes:
    """A persistent id. The legacy container adds NONE."""
    return (
        group(text("storage"), named("torch", type), text(key), text("cpu"), number(numel), *more) + BINPERSID
    )


def tensor(stored: bytes, shape, stride, offset: int = 0) -> bytes:
    sizes = [group(*map(number, values)) for values in (shape, stride)]
    return call(
        named("torch._utils", "_rebuild_tensor_v2"), stored, number(offset), *sizes, FALSE, ORDERED_DICT
    )


def state_dict(items: dict[str, bytes]) -> bytes:
    """A dict of names and of what makes each value."""
    return EMPTY_DICT + b"".join(text(key) + value + SETITEM for key, value in items.items())


# The zip


@dataclass
class Record:
    """A record. What is None is as it should be."""

    name: str | bytes
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None
    name_here: bytes | None = None  # in the header
    flags_here: int | None = None
    size_here: int | None = None
    header: int | None = None  # where the directory says it begins; then nothing else is written


def zip_bytes(
    records: list[Record], long: tuple[int, ...] = (), comment: bytes = b"", count: int | None = None
) -> bytes:
    """Records, aligned as torch does it, and their directory.

    `long`: which of 0 size, 1 packed size and 2 place are numbers of 64 bits there.
    """
    body, directory = b"", b""
    for r in records:
        name = r.name.encode() if isinstance(r.name, str) else r.name
        name_here = name if r.name_here is None else r.name_here
        crc = zlib.crc32(r.data) if r.crc is None else r.crc
        size = len(r.data) if r.size is None else r.size
        size_here = size if r.size_here is None else r.size_here
        flags_here = r.flags if r.flags_here is None else r.flags_here
        header = len(body) if r.header is None else r.header
        if r.header is None:
            pad = -(len(body) + 30 + len(name_here) + 4) % 64
            numbers = crc, len(r.data), size_here, len(name_here), pad + 4
            body += struct.pack("<4s5H3I2H", b"PK\3\4", 0, flags_here, r.method, 0, 0, *numbers)
            body += name_here + b"FB" + struct.pack("<H", pad) + b"Z" * pad + r.data
        values = [size, len(r.data), header]
        extra = b"FB\0\0" + struct.pack(f"<2H{len(long)}Q", 1, 8 * len(long), *(values[k] for k in long))
        size, packed, header = (0xFFFFFFFF if k in long else n for k, n in enumerate(values))
        numbers = crc, packed, size, len(name), len(extra), 0, 0, 0, 0, header
        directory += struct.pack("<4s6H3I5H2I", b"PK\1\2", 0, 0, r.flags, r.method, 0, 0, *numbers)
        directory += name + extra
    n, at = len(records) if count is None else count, len(body) + len(directory)
    few = min(n, 0xFFFF)
    end = (
        struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, few, few, len(directory), len(body), len(comment)) + comment
    )
    if long:
        end64 = struct.pack("<4sQ2H2I4Q", b"PK\6\6", 44, 0, 0, 0, 0, n, n, len(directory), len(body))
        end = end64 + struct.pack("<4sIQI", b"PK\6\7", 0, at, 1) + end
    return body + directory + end


def records(pickle: bytes, storages: dict[str, bytes]) -> list[Record]:
    """What torch.save writes, in its order."""
    parts = {"data.pkl": pickle, "byteorder": b"little"}
    parts |= {f"data/{key}": data for key, data in storages.items()} | {"version": b"3\n"}
    return [Record(f"archive/{name}", data) for name, data in parts.items()]


def saved(body: bytes, storages: dict[str, bytes]) -> bytes:
    """A zip that holds what `body` makes."""
    return zip_bytes(records(pickled(body), storages))


# The legacy container


def legacy_bytes(
    body: bytes,
    storages: dict[str, bytes],
    magic: bytes = number(0x1950A86A20F9469CFC6C),
    protocol: int = 1001,
    little_endian: bytes = TRUE,
    counts: dict[str, int] | None = None,
    keys: list[str] | None = None,
) -> bytes:
    """Storages of float32; `counts` says other numbers of elements than there are."""
    listed = EMPTY_LIST + b"".join(text(key) + APPEND for key in (storages if keys is None else keys))
    parts = [magic, number(protocol), state_dict({"little_endian": little_endian}), body, listed]
    out = b"".join(map(pickled, parts))
    for key, data in storages.items():
        out += struct.pack("<q", (counts or {}).get(key, len(data) // 4)) + data
    return out


# Meta's folders

COLUMNS = ("wo", "w2")


def shard(name: str, value: torch.Tensor, i: int, n: int, embedding_axis: int = 1) -> torch.Tensor:
    """What GPU i of n holds of a weight, by Meta's name."""
    if value.ndim == 1:
        return value
    stem = name.split(".")[-2]
    axis = embedding_axis if stem == "tok_embeddings" else int(stem in COLUMNS)
    return value.chunk(n, axis)[i].clone()


def meta_params(args: ModelArgs) -> dict:
    """params.json, without what follows from the weights."""
    values = {key: getattr(args, key) for key in ("dim", "n_layers", "n_heads", "n_kv_heads", "norm_eps")}
    return values | {"rope_theta": args.rope_theta, "vocab_size": -1, "max_seq_len": args.max_seq_len}


def write_meta(
    folder: Path,
    args: ModelArgs,
    weights: dict[str, np.ndarray],
    n_shards: int = 1,
    dtype: torch.dtype = torch.float32,
    embedding_axis: int = 1,
    zip: bool = True,
    **params,
) -> Path:
    """Weights under our names, as Meta's folder, by torch.save. `params` change params.json; None removes."""
    folder.mkdir(parents=True, exist_ok=True)
    names = tensor_names(args, "meta")
    values = {names[ours]: torch.from_numpy(np.ascontiguousarray(w)).to(dtype) for ours, w in weights.items()}
    for i in range(n_shards):
        part = {name: shard(name, value, i, n_shards, embedding_axis) for name, value in values.items()}
        part["rope.freqs"] = torch.rand(args.head_dim // 2)
        torch.save(part, folder / f"consolidated.{i:02}.pth", _use_new_zipfile_serialization=zip)
    written = {key: value for key, value in (meta_params(args) | params).items() if value is not None}
    (folder / "params.json").write_text(json.dumps(written))
    return folder
