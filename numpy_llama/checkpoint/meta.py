"""Meta's own files: params.json and consolidated.00.pth, or 2, 4 or 8 shards of it.

Each shard has the weights of one GPU: some rows of most matrices, some columns of those that follow them, and
the whole norms. Shards are used in place; a matrix is joined when it is needed, one at a time. params.json
leaves much out: this file has each missing value, with its reason.
"""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from ..backend.formats import StoredTensor
from ..config import LIMITS, ModelArgs
from ..errors import ConfigError, MismatchError, TruncatedError, UnsupportedError, escape
from ..rope import Llama3Scaling
from ..text.tokenizer import Tokenizer
from .base import Checkpoint, TensorInfo, size
from .json_file import JsonFile
from .names import matched_names, usual, usual_names
from .pytorch.file import TorchFile
from .tokenizers import find_tokenizer, open_tokenizer

N_SHARDS = (1, 2, 4, 8)
SAMPLED_PARTS, SAMPLED_BYTES = 8, 256  # enough to find shards that are equal
# The axis along which a matrix is cut. The shapes give that of tok_embeddings.
AXES = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1}
# Keys of params.json that other models have: quantized, adapted, of experts, with vision, Llama 4, Mistral.
OTHER_MODELS = (
    "quantization", "lora", "moe", "vision", "use_qk_norm", "nope_layer", "attention_chunk",
    "attn_temperature", "rope_high_freq_factor", "sliding_window",
)  # fmt: skip
# Llama 3.2 1B and 3B, by dim and n_layers. Their params.json has use_scaled_rope, as Llama 3.1's has, but
# they were trained with factor 32. Hugging Face's config.json has 32; Meta's code has 8 for all models.
FACTOR_32 = {(2048, 16), (3072, 28)}


class MetaCheckpoint(Checkpoint):
    """A model in a folder, as Meta's download.sh leaves it."""

    format = "Meta"

    def __init__(self, folder: Path):
        self.path = Path(folder)
        self.params = JsonFile(self.path / "params.json", nonfinite=True)
        model_args(self.params)  # refused before gigabytes are opened
        self.shards = [TorchFile(path) for path in shard_paths(self.path)]
        self.files = [shard.file for shard in self.shards]
        for shard in self.shards[1:]:
            if odd := shard.tensors.keys() ^ self.shards[0].tensors.keys():
                raise MismatchError(f"{shard.path} and the first shard differ in having {escape(min(odd))}")
        self.tensors = {name: self._joined(name) for name in self.shards[0].tensors}
        self._refuse_copies()

    @cached_property
    def args(self) -> ModelArgs:
        rows = {usual(name): info.shape[0] for name, info in self.tensors.items() if info.shape}
        args = model_args(
            self.params, rows.get("tok_embeddings.weight"), rows.get("layers.0.feed_forward.w1.weight")
        )
        self._names(args)
        return args

    def weights(self) -> dict[str, StoredTensor]:
        return {ours: self._weight(theirs) for ours, theirs in self._names(self.args).items()}

    def tokenizer_path(self) -> Path:
        return find_tokenizer(self.path)

    def read_tokenizer(self) -> Tokenizer:
        return open_tokenizer(self.tokenizer_path())

    def _names(self, args: ModelArgs) -> dict[str, str]:
        # RoPE's frequencies follow from the arguments.
        names = (name for name in self.tensors if not name.endswith("rope.freqs"))
        theirs = usual_names(self.path, names)
        shapes = {name: self.tensors[there].shape for name, there in theirs.items()}
        found = matched_names(self.path, "meta", args, shapes, tied=False)
        return {ours: theirs[name] for ours, name in found.items()}

    def _axis(self, name: str) -> int | None:
        """The axis along which the shards of a tensor are joined; None if each has the whole tensor."""
        stem, shape = usual(name).split(".")[-2:][0], self.shards[0].tensors[name].shape
        if len(self.shards) == 1 or len(shape) != 2:
            return None
        if stem == "tok_embeddings":  # cut by columns in LLaMA 1 and 2, by rows in Llama 3
            return 0 if shape[1] == self.params.values["dim"] else 1
        return AXES.get(stem)

    def _refuse_copies(self) -> None:
        """MismatchError if two shards hold the same parts of all matrices.

        A sample is the first bytes of a few parts. Only shards with equal samples are compared in full.
        """
        held = {name: [shard.tensors[name] for shard in self.shards] for name in self.tensors}
        cut = [
            name
            for name, each in held.items()
            if self._axis(name) is not None and all(t.nbytes and t.dense for t in each)
        ]

        def parts(shard: TorchFile, names: list[str]) -> Iterator[np.ndarray]:
            infos = (shard.tensors[name] for name in names)
            return (shard.file.bytes_at(t.offset, t.nbytes, escape(t.name)) for t in infos)

        seen: dict[bytes, list[TorchFile]] = {}
        for shard in self.shards if cut else []:
            few = cut[:: -(-len(cut) // SAMPLED_PARTS)]
            sample = b"".join(part[:SAMPLED_BYTES].tobytes() for part in parts(shard, few))
            for other in seen.setdefault(sample, []):
                if all(map(np.array_equal, parts(shard, cut), parts(other, cut))):
                    raise MismatchError(
                        f"{shard.path} is a copy of {other.path.name}: its own part is missing"
                    )
            seen[sample].append(shard)

    def _joined(self, name: str) -> TensorInfo:
        parts = [shard.tensors[name] for shard in self.shards]
        first, axis = parts[0], self._axis(name)
        if odd := [p for p in parts if (p.type_name, p.shape) != (first.type_name, first.shape)]:
            found, wanted = ((p.type_name, p.shape) for p in (odd[0], first))
            raise MismatchError(f"{self.path}: {escape(name)} is {wanted} in one shard, {found} in another")
        if axis is None:
            return first
        shape = tuple(n * len(parts) if i == axis else n for i, n in enumerate(first.shape))
        return TensorInfo(name, first.type_name, shape, first.offset, first.nbytes * len(parts))

    def _weight(self, name: str) -> StoredTensor:
        parts = [shard.tensor(name) for shard in self.shards]
        first, axis = parts[0], self._axis(name)
        if axis is None:
            for shard, part in zip(self.shards, parts, strict=True):
                if not np.array_equal(part.data, first.data):
                    what = f"{escape(name)} must be the same in all shards"
                    raise MismatchError(f"{self.path}: {what}, it is another in {shard.path.name}")
            return first
        info = self.tensors[name]

        def join(rows: slice) -> np.ndarray:
            joined = np.empty((info.shape[0], first.format.row_bytes(info.shape[1])), np.uint8)
            places = np.split(joined, len(parts), axis)
            for shard, part, place in zip(self.shards, parts, places, strict=True):
                place[...] = part.data
                shard.file.forget(shard.tensors[name].offset, shard.tensors[name].nbytes)
            return joined[rows]

        return StoredTensor(first.format, info.shape, join)


def shard_paths(folder: Path) -> list[Path]:
    """consolidated.00.pth and the files after it; TruncatedError if one is missing."""
    found = {path.name for path in folder.glob("consolidated.*.pth")}
    n = next((n for n in N_SHARDS if n >= len(found)), len(found))
    wanted = [f"consolidated.{i:02}.pth" for i in range(max(n, 1))]
    if missing := [name for name in wanted if name not in found]:
        what = f"{len(found)} files consolidated.NN.pth; {missing[0]} is missing"
        raise TruncatedError(f"{folder} has {what}; incomplete copy or download?")
    if n not in N_SHARDS:
        raise UnsupportedError(f"{folder} has {n} shards; Meta's models have 1, 2, 4 or 8")
    return [folder / name for name in wanted]


def model_args(params: JsonFile, vocab_rows: int | None = None, hidden_rows: int | None = None) -> ModelArgs:
    """The hyperparameters. Sizes that only the weights have are 1 until the weights are open."""
    for key, value in params.values.items():
        if key.startswith(OTHER_MODELS) and value not in (None, False, 0, -1):
            raise UnsupportedError(
                f"{params.path}: {escape(key)} is {escape(value, 60)}, which cannot be run"
            )
    dim, n_layers, n_heads = (size(params, key, key) for key in ("dim", "n_layers", "n_heads"))
    head_dim, rest = divmod(dim, n_heads)
    if rest and params.values.get("head_dim") is None:
        raise ConfigError(f"{params.path}: dim is {dim}, it must be a multiple of n_heads {n_heads}")
    hidden_dim = _hidden_dim(params, dim) or hidden_rows or 1
    # LLaMA 1 and 2 have -1: Meta's code takes the size from the tokenizer, which may be missing.
    from_weights = params.get("vocab_size", int, -1) == -1
    values: dict[str, Any] = {
        "dim": dim,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": size(params, "n_kv_heads", "n_kv_heads", n_heads),
        "head_dim": size(params, "head_dim", "head_dim", head_dim),
        "hidden_dim": size(params, "hidden_dim", "hidden_dim", hidden_dim),
        "vocab_size": (vocab_rows or 1) if from_weights else size(params, "vocab_size", "vocab_size"),
        "norm_eps": _number(params, "norm_eps"),
        "rope_theta": _number(params, "rope_theta", 10000.0),
        "max_seq_len": size(params, "max_seq_len", "max_seq_len", 1),
    }
    factor = _number(params, "rope_scaling_factor", 32.0 if (dim, n_layers) in FACTOR_32 else 8.0)
    try:
        args = ModelArgs(**values)
        if params.get("use_scaled_rope", bool, False):
            args = replace(args, rope_scaling=Llama3Scaling(factor))
    except ConfigError as error:
        raise ConfigError(f"{params.path}: {error}") from None
    if params.values.get("max_seq_len") is None:
        args = replace(args, max_seq_len=_context(args))
    return args


def _hidden_dim(params: JsonFile, dim: int) -> int | None:
    """Meta's rule: two thirds of 4 dim, times ffn_dim_multiplier, up to a multiple of multiple_of.

    None if there is no multiple_of. For example dim 4096, multiple_of 256 -> 11008.
    """
    multiplier, limit = _number(params, "ffn_dim_multiplier", 1.0), LIMITS["hidden_dim"]
    if multiplier * 3 * dim > limit:
        raise ConfigError(
            f"{params.path}: ffn_dim_multiplier is {multiplier}, it must not make hidden_dim exceed {limit}"
        )
    if params.values.get("multiple_of") is None:
        return None
    multiple_of = size(params, "multiple_of", "hidden_dim")
    return -(-int(multiplier * int(2 * 4 * dim / 3)) // multiple_of) * multiple_of


def _context(args: ModelArgs) -> int:
    """The number of positions of the training. No params.json has it, but each generation has its own."""
    if args.rope_scaling:
        return 131072  # Llama 3.1, 3.2, 3.3
    if args.rope_theta == 5e5:
        return 8192  # Llama 3
    if args.rope_theta == 1e6:
        return 16384  # Code Llama
    # LLaMA 1 has norm_eps 1e-6, except 65B, which has the 80 layers of Llama 2 70B without grouped heads.
    if args.norm_eps < 1e-5 or (args.n_layers == 80 and args.n_kv_heads == args.n_heads):
        return 2048
    return 4096  # Llama 2


def _number(params: JsonFile, key: str, default: float | None = None) -> float:
    value: float = params.require(key, float) if default is None else params.get(key, float, default)
    if not 0 < value < math.inf:
        found = json.dumps(value)  # in JSON's spelling: NaN, Infinity
        raise ConfigError(f"{params.path}: {key} is {found}, it must be a finite number above 0")
    return value
