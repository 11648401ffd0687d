"""Random weights in the shape of a real model, in the files that such a model comes in: for measuring.

    python benchmarks/make_weights.py llama-3-8b FOLDER                 Hugging Face, bfloat16, shards of 5 GB
    python benchmarks/make_weights.py llama-2-7b FOLDER --format meta   consolidated.00.pth and params.json
    numpy-llama convert FOLDER OUT.gguf --dtype q4                      and from there any other

The tokenizer that comes with them knows the 256 bytes and Llama 3's control tokens. Nothing is held in memory
but one pool of random numbers, of which each weight takes a stretch of its own.
"""

import argparse
import base64
import json
import pickle
import shutil
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np

from numpy_llama.checkpoint.names import expected_shape, tensor_names
from numpy_llama.cli.common import transfer_bar
from numpy_llama.config import ModelArgs
from numpy_llama.presets import PRESETS
from numpy_llama.quantize import quantize_bf16

SHARD_BYTES = 5_000_000_000  # as the Hugging Face hub cuts them
POOL = 1 << 24  # random numbers
PIECE = 1 << 22  # numbers written at once


@cache
def pool(width: int) -> np.ndarray:
    """Normal numbers in bfloat16, so scaled that a row of `width` of them keeps the size of its input."""
    numbers = np.random.default_rng(0).standard_normal(POOL, dtype=np.float32)
    return quantize_bf16(numbers * np.float32(width**-0.5)).view(np.uint16)


def pieces(shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[bytes]:
    """The bytes of a weight; those of a norm are ones."""
    n = int(np.prod(shape))
    if len(shape) == 1:
        yield quantize_bf16(np.ones(n, np.float32)).tobytes()
        return
    scaled = pool(shape[-1])
    for begin in range(0, n, PIECE):
        start = int(rng.integers(POOL - PIECE))
        yield scaled[start : start + min(PIECE, n - begin)].tobytes()


def write_huggingface(folder: Path, args: ModelArgs, tied: bool, weights, progress) -> None:
    names = tensor_names(args, "hf")
    shards: list[list[str]] = [[]]
    size = 0
    for ours, theirs in names.items():
        if tied and ours == "output.weight":
            continue
        nbytes = 2 * int(np.prod(expected_shape(ours, args)))
        if size + nbytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(theirs)
        size += nbytes
    ours_of = {theirs: ours for ours, theirs in names.items()}
    index = {}
    for i, shard in enumerate(shards):
        name = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        header, end = {}, 0
        for theirs in shard:
            shape = expected_shape(ours_of[theirs], args)
            nbytes = 2 * int(np.prod(shape))
            header[theirs] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + nbytes]}
            index[theirs], end = name, end + nbytes
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (folder / name).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for theirs in shard:
                for piece in weights(ours_of[theirs]):
                    file.write(piece)
                    progress(len(piece))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    scaling = args.rope_scaling
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.dim,
        "num_hidden_layers": args.n_layers,
        "num_attention_heads": args.n_heads,
        "num_key_value_heads": args.n_kv_heads,
        "head_dim": args.head_dim,
        "intermediate_size": args.hidden_dim,
        "vocab_size": args.vocab_size,
        "rms_norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "max_position_embeddings": args.max_seq_len,
        "tie_word_embeddings": tied,
        "rope_scaling": scaling
        and {
            "rope_type": scaling.type,
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_max_seq_len,
        },
    }
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def write_meta(folder: Path, args: ModelArgs, weights, progress) -> None:
    """A zip of stored records, as torch.save writes it: data.pkl, and the bytes of each storage."""
    names = tensor_names(args, "meta")
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    storage = type("BFloat16Storage", (), {"__module__": "torch"})
    torch.BFloat16Storage = storage  # type: ignore[attr-defined]

    def rebuild(*a):
        raise AssertionError

    rebuild.__module__, rebuild.__name__, rebuild.__qualname__ = ("torch._utils", *["_rebuild_tensor_v2"] * 2)
    utils._rebuild_tensor_v2 = rebuild  # type: ignore[attr-defined]

    class Weight:
        def __init__(self, key: int, shape: tuple[int, ...]):
            self.key, self.shape = str(key), shape

        def __reduce__(self):
            strides = tuple(int(np.prod(self.shape[i + 1 :])) for i in range(len(self.shape)))
            return rebuild, (Storage(self), 0, self.shape, strides, False, OrderedDict())

    class Storage:
        def __init__(self, weight: Weight):
            self.weight = weight

    class Pickler(pickle.Pickler):
        def persistent_id(self, item):
            if isinstance(item, Storage):
                return ("storage", storage, item.weight.key, "cpu", int(np.prod(item.weight.shape)))
            return None

    real = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}  # the pickler looks the two names up
    try:
        state = {
            theirs: Weight(i, expected_shape(ours, args)) for i, (ours, theirs) in enumerate(names.items())
        }
        with zipfile.ZipFile(folder / "consolidated.00.pth", "w", zipfile.ZIP_STORED) as archive:
            with archive.open("consolidated.00/data.pkl", "w") as file:
                Pickler(file, 2).dump(state)
            archive.writestr("consolidated.00/byteorder", "little")
            for i, ours in enumerate(names):
                record = zipfile.ZipInfo(f"consolidated.00/data/{i}")
                record.file_size = 2 * int(np.prod(expected_shape(ours, args)))
                begin = archive.fp.tell() + 30 + len(record.filename) + 4
                padding = -begin % 64  # PyTorch's, so that every storage is aligned
                record.extra = b"FB" + padding.to_bytes(2, "little") + b"Z" * padding
                with archive.open(record, "w") as file:
                    for piece in weights(ours):
                        file.write(piece)
                        progress(len(piece))
            archive.writestr("consolidated.00/version", "3\n")
    finally:
        for name, module in real.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
    params = {
        "dim": args.dim,
        "n_layers": args.n_layers,
        "n_heads": args.n_heads,
        "n_kv_heads": args.n_kv_heads,
        "vocab_size": args.vocab_size,
        "norm_eps": args.norm_eps,
        "rope_theta": args.rope_theta,
        "use_scaled_rope": args.rope_scaling is not None,
    }
    (folder / "params.json").write_text(json.dumps(params))


def write_tokenizer(folder: Path) -> None:
    lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (folder / "tokenizer.model").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--format", choices=["hf", "meta"], default="hf")
    options = parser.parse_args()
    preset = PRESETS[options.preset]
    options.folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    args, tied = preset.args, preset.tied
    names = [n for n in tensor_names(args, "ours") if not (tied and n == "output.weight")]
    total = sum(2 * int(np.prod(expected_shape(n, args))) for n in names)
    free = shutil.disk_usage(options.folder).free
    if free < total + (1 << 30):
        sys.exit(f"{total:,} bytes are to be written, the disk has {free:,} left")
    with transfer_bar() as bar:
        done = 0

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar("writing", done, total)

        def weights(ours: str) -> Iterator[bytes]:
            return pieces(expected_shape(ours, args), rng)

        if options.format == "hf":
            write_huggingface(options.folder, args, tied, weights, progress)
        else:
            write_meta(options.folder, args, weights, progress)
    write_tokenizer(options.folder)


if __name__ == "__main__":
    main()
