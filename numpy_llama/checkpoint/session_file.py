"""A session on disk: the ids of a conversation, and the keys and values that a model has computed of them.

    keys, values   (n_layers, K, ids - dropped, numbers or bytes of a head), as the cache stores them
    session        {"ids": [1, 403], "dropped": 0, "model": "5f0c", "tokenizer": "a31e"} as JSON, in bytes

It is a safetensors file. `model` and `tokenizer` are digests: a session of another model is refused. The
first `dropped` positions are those that a sliding window's cache has dropped.

What this file promises: a session is loaded with the same bits, or not at all. Every size, id and number is
checked before it is used.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..backend.formats import FORMATS, Format
from ..cache import KVCache
from ..config import Array
from ..errors import ContextOverflowError, FormatError, MismatchError, NumpyLlamaError, escape
from ..generation.session import Session
from ..model import Transformer
from ..text.tokenizer import Tokenizer
from ..window import WindowKVCache
from .json_file import JsonFile, parse_json
from .names import tensor_names
from .safetensors_file import NUMBERS, SafetensorsFile
from .safetensors_write import write_safetensors

DIGEST_BYTES = 16
SCALED = FORMATS["Q8_0"].block_bytes  # bytes of a block in a cache of 8 bits, which begins with its scale
STORED = {  # the numbers of a cache
    np.dtype(NUMBERS[name]): Format(name, -1, 1, np.dtype(NUMBERS[name]).itemsize, lambda rows: rows)
    for name in ("F64", "F32", "F16", "U8")
}


def save_session(path: Path, session: Session, model: Transformer, tokenizer: Tokenizer) -> None:
    """Write the positions from which `model` can continue. `path` is replaced when the new file is whole."""
    with session.alone():
        if not session.is_of(model):
            raise MismatchError("the session is another model's: save it with the model that computed it")
        n, cache = session.keep_prefix_of([*session.ids, 0], model), session.cache
        dropped = min(max(cache.dropped), n)
        about = {"ids": [*map(int, session.ids)], "dropped": dropped, **digests(model, tokenizer)}
        text = np.frombuffer(json.dumps(about).encode(), np.uint8)
        kept = {"keys": stored(cache.k, n - dropped), "values": stored(cache.v, n - dropped)}

        def pieces(name: str) -> Iterator[Array]:
            if name == "session":
                yield text
                return
            for layer in kept[name]:
                yield from map(np.ascontiguousarray, layer)  # of one head

        tensors = {name: (STORED[x.dtype], x.shape) for name, x in kept.items()}
        tensors["session"] = STORED[text.dtype], text.shape
        write_safetensors(path, tensors, pieces)


def stored(x: Array, n: int) -> Array:
    """The first n positions in an array of a cache: -> (n_layers, K, n, numbers or bytes of a head)."""
    return x[:, 0, :, :n]


def digests(model: Transformer, tokenizer: Tokenizer) -> dict[str, str]:
    """Of the hyperparameters and a row of each weight; and of the meaning of each id."""
    weights, vocabulary = (blake2b(digest_size=DIGEST_BYTES) for _ in range(2))
    args = model.args
    if args.rope_scaling is None:  # then no angle depends on the size of the context
        args = replace(args, max_seq_len=1)
    weights.update(repr(args).encode())
    for name in tensor_names(args, "ours"):
        for x in part_weights(model, name.removesuffix(".weight")):
            weights.update(np.asarray(x[:1], np.float32).tobytes())
    vocabulary.update(np.array([*map(len, tokenizer.meanings)]).tobytes() + b"".join(tokenizer.meanings))
    return {"model": weights.hexdigest(), "tokenizer": vocabulary.hexdigest()}


def part_weights(model: Transformer, name: str) -> list[Any]:
    """The arrays of a part, with those of its adapter. None if it was exchanged for a function."""
    part: Any = model
    for step in name.split("."):
        part = part[int(step)] if isinstance(part, list) else getattr(part, step, None)
    if name == "tok_embeddings":
        return [part]
    found = [getattr(part, attribute, None) for attribute in ("weight", "lora_a", "lora_b")]
    return [x for x in found if x is not None]


def load_session(path: Path, session: Session, model: Transformer, tokenizer: Tokenizer) -> None:
    """Read a file of `save_session` into a new session of the same model."""
    try:
        file, cache = SafetensorsFile(path), session.cache
    except NumpyLlamaError as error:
        raise type(error)(f"{error} (it is read as a session, which is a safetensors file)") from None
    ids, dropped = read_about(file, model, tokenizer)
    if len(ids) > cache.max_seq_len:
        raise ContextOverflowError(f"{path} has {len(ids)} ids, the session has room for {cache.max_seq_len}")
    n = len(ids) - dropped
    if n > cache.k.shape[3] or (dropped and not may_drop(cache, len(ids), dropped)):
        raise FormatError(f"{path}: of {len(ids)} positions {dropped} were dropped, as this cache cannot")
    found = [read_positions(file, name, stored(cache.k, n)) for name in ("keys", "values")]
    for x, read in zip((cache.k, cache.v), found, strict=True):
        stored(x, n)[...] = read
    cache.dropped[:] = [dropped] * len(cache.dropped)
    cache.filled[:] = [len(ids)] * len(cache.filled)
    session.ids = ids


def may_drop(cache: KVCache, n: int, dropped: int) -> bool:
    """Whether a cache of n positions may have dropped so many, and the next one sees all that it needs."""
    return isinstance(cache, WindowKVCache) and dropped + cache.window - 1 <= n


def read_about(file: SafetensorsFile, model: Transformer, tokenizer: Tokenizer) -> tuple[list[int], int]:
    """-> the ids, and the number of dropped positions. MismatchError if another model made the session."""
    path, info = file.path, file.tensors.get("session")
    if info is None or info.type_name != "U8" or file.tensors.keys() != {"session", "keys", "values"}:
        raise FormatError(f"{path} is no session: it has not the tensors session (U8), keys and values alone")
    text = file.array("session").tobytes()
    about = JsonFile(path, values=parse_json(text, f"{path}: session"))
    for name, wanted in digests(model, tokenizer).items():
        if (made := about.require(name, str)) != wanted:
            raise MismatchError(
                f"{path} was made with another {name}: its digest is {escape(made, 40)}, wanted {wanted}; "
                "save a session with this one under another name"
            )
    ids, dropped, V = about.require("ids", list), about.require("dropped", int), model.args.vocab_size
    if wrong := [token for token in ids if type(token) is not int or not 0 <= token < V]:
        raise FormatError(f"{path}: id {escape(wrong[0], 40)} is no whole number from 0 to {V - 1}")
    if not 0 <= dropped <= len(ids):
        raise FormatError(f"{path}: {dropped} positions were dropped, of {len(ids)}")
    return ids, dropped


def read_positions(file: SafetensorsFile, name: str, wanted: Array) -> Array:
    """The keys or the values, for an array of that dtype and shape. FormatError if one is not finite."""
    path, info, dtype = file.path, file.tensors[name], STORED[wanted.dtype].name
    if (info.type_name, info.shape) != (dtype, wanted.shape):
        raise MismatchError(
            f"{path}: {name} are {info.type_name} of shape {info.shape}, this model's cache has {dtype} "
            f"of shape {wanted.shape}: load the model with the same cache_dtype, backend and exact"
        )
    x = file.array(name)
    numbers = x.reshape(-1, SCALED)[:, :2].copy().view("<f2") if dtype == "U8" else x
    if not np.isfinite(numbers).all():
        raise FormatError(f"{path}: {name} has a number that is not finite")
    return x
