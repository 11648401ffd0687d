"""Random weights in the shape and the files of a real model, for measurements.

    python benchmarks/make_weights.py llama-3-8b FOLDER                 Hugging Face, bfloat16, shards of 5 GB
    python benchmarks/make_weights.py llama-2-7b FOLDER --format meta   consolidated.00.pth and params.json
    python benchmarks/make_weights.py llama-3-8b OUT.gguf --format gguf --dtype Q4_K_M
    numpy-llama convert FOLDER OUT.gguf --dtype q4                      any other format

--layers changes the number of layers and leaves all shapes as they are. The tokenizer has a token for each of
the 256 bytes; with a folder, a reader adds Llama 3's control tokens. Memory holds only one pool of random
numbers for each width and format. Each weight is made of pieces of a pool.
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
from dataclasses import replace
from functools import cache
from itertools import count, islice, product
from pathlib import Path

import numpy as np

from numpy_llama.backend.formats import FORMATS, Format
from numpy_llama.checkpoint.convert import model_metadata
from numpy_llama.checkpoint.gguf.write import layout, write_tensor
from numpy_llama.checkpoint.names import expected_shape, tensor_names
from numpy_llama.checkpoint.presets import PRESETS
from numpy_llama.checkpoint.rope_scalings import gguf_tensors
from numpy_llama.cli.common import transfer_bar, whole_number
from numpy_llama.config import ModelArgs

SHARD_BYTES = 5_000_000_000  # the size of shards on the Hugging Face hub
POOL = 1 << 24  # random numbers
PIECE = 1 << 22  # numbers written at once

# Random bytes are a block of any format if its scales are set. This is the place of each scale in a block,
# and its value for weights with mean 0 and standard deviation 1. Uniform numbers of 4, 5, 6 and 8 bits have
# the standard deviations 4.61, 9.23, 18.5 and 73.9. That of sc q - 7.5 m, with 6, 4 and 6 bits, is 258. That
# of sc q - 15.5 m, where q has 5 bits, is 527.
SCALES = {
    "Q8_0": {0: 1 / 73.9},
    "Q4_0": {0: 1 / 4.61},
    "Q4_1": {0: 1 / 4.61, 2: -7.5 / 4.61},
    "Q4_Z": {0: 1 / 4.61},
    "Q5_0": {0: 1 / 9.23},
    "Q5_1": {0: 1 / 9.23, 2: -15.5 / 9.23},
    "Q4_K": {0: 1 / 258, 2: 7.5 / 258},
    "Q5_K": {0: 1 / 527, 2: 15.5 / 527},
    "Q6_K": {208: 1 / 18.5 / 73.9},
}
# The same for a float32 scale at the beginning. The numbers of all codes of FP8 have the standard deviation
# 108; those of NF4 have 0.517, and those of FP4 0.487.
FLOAT32_SCALES = {
    "INT8": 1 / 73.9,
    "LLM_INT8": 127 / 73.9,
    "FP8": 1 / 108,
    "NF4": 1 / 0.517,
    "FP4": 1 / 0.487,
}


@cache
def pool(format: Format, width: int) -> np.ndarray:
    """Random blocks (n, bytes), scaled so that a matrix of this `width` keeps the size of its input."""
    rng, deviation = np.random.default_rng(0), width**-0.5
    if format.block == 1:
        numbers = rng.standard_normal((1, POOL), dtype=np.float32) * np.float32(deviation)
        return format.quantize(numbers).reshape(-1, format.block_bytes)
    return random_blocks(format, POOL // format.block, deviation, rng)


def random_blocks(format: Format, n: int, deviation: float, rng: np.random.Generator) -> np.ndarray:
    """n blocks of a block format whose weights have this standard deviation: (n, bytes)."""
    blocks = rng.integers(0, 256, (n, format.block_bytes), dtype=np.uint8)
    for at, scale in SCALES.get(format.name, {}).items():
        blocks[:, at : at + 2] = np.array([scale * deviation], "<f2").view(np.uint8)
    if format.name == "Q4_Z":
        blocks[:, 2:4] = np.array([8], "<f2").view(np.uint8)  # its zero
    if format.name in FLOAT32_SCALES:
        blocks[:, :4] = np.array([FLOAT32_SCALES[format.name] * deviation], "<f4").view(np.uint8)
    return blocks


def pieces(format: Format, shape: tuple[int, ...], rng: np.random.Generator) -> Iterator[np.ndarray]:
    """The bytes of a weight: random numbers, or ones for a norm."""
    if len(shape) == 1:
        yield format.quantize(np.ones((1, *shape), np.float32))[0]
        return
    blocks = pool(format, shape[-1])
    n, at_once = int(np.prod(shape)) // format.block, PIECE // format.block
    for begin in range(0, n, at_once):
        start = int(rng.integers(len(blocks) - at_once))
        yield blocks[start : start + min(at_once, n - begin)].reshape(-1)


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
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
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


def write_gguf(path: Path, args: ModelArgs, tied: bool, dtype: str, progress) -> None:
    plan, extra = [], gguf_tensors(args)
    for ours, theirs in tensor_names(args, "gguf").items():
        shape = expected_shape(ours, args)
        if not (tied and ours == "output.weight"):
            plan.append((theirs, gguf_format(ours, args, tied, dtype), shape))
    plan += [(name, tensor.format, tensor.shape) for name, tensor in extra.items()]
    head, infos = layout(plan, model_metadata(args) | vocabulary(args.vocab_size))
    rng = np.random.default_rng(0)
    with path.open("xb") as file:
        file.write(head)
        for info, (name, format, shape) in zip(infos, plan, strict=True):
            parts = [extra[name].data] if name in extra else pieces(format, shape, rng)
            for piece in write_tensor(file, info, parts):
                progress(piece.nbytes)


def gguf_format(ours: str, args: ModelArgs, tied: bool, dtype: str) -> Format:
    """A weight's format. Q4_K_M is llama.cpp's mixture of Q6_K and Q4_K.

    Q6_K is the format of the output matrix. It is also that of wv and w_down in the first eighth of the
    layers, in the last eighth, and in every third layer between. All other matrices are Q4_K.
    """
    shape = expected_shape(ours, args)
    if len(shape) == 1:
        return FORMATS["F32"]
    if dtype == "Q4_K_M":
        dtype = "Q6_K" if ours == ("tok_embeddings.weight" if tied else "output.weight") else "Q4_K"
        if ours.endswith(("wv.weight", "w_down.weight")):
            i, eighth = int(ours.split(".")[1]), args.n_layers // 8
            if i < eighth or i >= 7 * args.n_layers // 8 or (i - eighth) % 3 == 2:
                dtype = "Q6_K"
    if shape[-1] % FORMATS[dtype].block:
        sys.exit(f"{ours} has rows of {shape[-1]}; {dtype} needs a multiple of {FORMATS[dtype].block}")
    return FORMATS[dtype]


def vocabulary(n: int) -> dict:
    """A vocabulary in sentencepiece's order: three control tokens, the 256 bytes, and invented tokens."""
    if n < 3 + 256:
        sys.exit(f"a GGUF vocabulary begins with 3 control tokens and 256 bytes; this model has {n} tokens")
    bytes_, words = [f"<0x{i:02X}>" for i in range(256)], [f"word{i}" for i in range(n - 3 - 256)]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": ["<unk>", "<s>", "</s>", *bytes_, *words],
        "tokenizer.ggml.scores": np.zeros(n, np.float32),
        "tokenizer.ggml.token_type": np.int32([2, 3, 3] + [6] * 256 + [1] * len(words)),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def write_tokenizer(folder: Path, n: int) -> None:
    """tiktoken's ranks: the bytes, and words that nobody says. 256 control tokens follow by themselves.

    The words are all strings of some characters that texts do not have, short ones first. So merges make
    each of them, as a GGUF file wants it.
    """
    strings = (bytes(one) for length in count(2) for one in product(range(14, 30), repeat=length))
    tokens = [bytes([b]) for b in range(256)] + list(islice(strings, n - 512))
    lines = (f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens))
    (folder / "tokenizer.model").write_text("".join(lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("out", type=Path, metavar="OUT", help="a new folder; for GGUF a new file")
    parser.add_argument("--format", choices=["hf", "meta", "gguf"], default="hf")
    parser.add_argument("--dtype", choices=[*FORMATS, "Q4_K_M"], help="of the matrices, in GGUF [BF16]")
    parser.add_argument("--layers", type=whole_number(1), metavar="N", help="number of layers [the model's]")
    options = parser.parse_args()
    if options.dtype and options.format != "gguf":
        parser.error("--dtype is for --format gguf; the other formats hold BF16")
    args, tied = PRESETS[options.preset].args, PRESETS[options.preset].tied
    if options.layers is not None:
        args = replace(args, n_layers=options.layers)
    names = [n for n in tensor_names(args, "ours") if not (tied and n == "output.weight")]
    dtype, bf16 = options.dtype or "BF16", FORMATS["BF16"]

    def nbytes(ours: str) -> int:
        shape = expected_shape(ours, args)
        format = gguf_format(ours, args, tied, dtype) if options.format == "gguf" else bf16
        return int(np.prod(shape[:-1])) * format.row_bytes(shape[-1])

    total = sum(map(nbytes, names))
    folder = options.out.parent if options.format == "gguf" else options.out
    folder.mkdir(parents=True, exist_ok=options.format == "gguf")
    free = shutil.disk_usage(folder).free
    if free < total + (1 << 30):
        sys.exit(f"{total:,} bytes are to be written, the disk has {free:,} left")
    with transfer_bar() as bar:
        done = 0

        def progress(nbytes: int) -> None:
            nonlocal done
            done += nbytes
            bar("writing", done, total)

        rng = np.random.default_rng(0)

        def weights(ours: str) -> Iterator[np.ndarray]:
            return pieces(bf16, expected_shape(ours, args), rng)

        if options.format == "gguf":
            write_gguf(options.out, args, tied, dtype, progress)
            return
        if options.format == "hf":
            write_huggingface(folder, args, tied, weights, progress)
        else:
            write_meta(folder, args, weights, progress)
    write_tokenizer(folder, args.vocab_size)


if __name__ == "__main__":
    main()
