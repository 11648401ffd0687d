"""What the metadata and the tensors of a GGUF file say about a LLaMA.

The keys are those of llama.cpp's converter (gguf.md, "llama"). GGUF keeps wq and wk in Meta's order of rows,
so nothing is permuted here.
"""

from dataclasses import replace

import numpy as np

from ..config import ModelArgs, RopeScaling
from ..errors import ConfigError, MismatchError, UnsupportedError, escape
from ..functional import scale_freqs
from ..quantize import StoredTensor
from .gguf import GGUFFile
from .names import matched_names

MAX_LAYERS = 512
MAX_HEAD_DIM = 1024  # real ones have 64 to 256
MAX_SIZE = 1 << 31  # any other of the model's sizes
MAX_CONTEXT = 1 << 20  # positions: the angles of all of them are computed on loading
ROPE_TOLERANCE = 1e-4  # relative: the divisors were computed and stored in float32


def model_args(file: GGUFFile) -> ModelArgs:
    """The hyperparameters from the llama.* keys. Where one is absent: ggml's default, or an error."""
    architecture = file.require("general.architecture", str)
    if architecture != "llama":
        raise UnsupportedError(f"{file.path}: the architecture is {escape(architecture)}, not 'llama'")
    if n_experts := file.get("llama.expert_count", int, 0):
        raise UnsupportedError(f"{file.path}: a mixture of {n_experts} experts, only dense models can be run")

    dim = _size(file, "llama.embedding_length")
    n_heads = _size(file, "llama.attention.head_count")
    if "llama.attention.key_length" not in file.metadata and dim % n_heads:
        raise ConfigError(f"{file.path}: dim {dim} cannot be divided among {n_heads} heads")
    head_dim = _size(file, "llama.attention.key_length", dim // n_heads, limit=MAX_HEAD_DIM)
    for key in ("llama.attention.value_length", "llama.rope.dimension_count"):
        if (found := _size(file, key, head_dim)) != head_dim:
            raise UnsupportedError(f"{file.path}: {key} is {found}, only head_dim {head_dim} can be run")
    values = {
        "dim": dim,
        "n_layers": _size(file, "llama.block_count", limit=MAX_LAYERS),
        "n_heads": n_heads,
        "n_kv_heads": _size(file, "llama.attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "hidden_dim": _size(file, "llama.feed_forward_length"),
        "vocab_size": _vocab_size(file),
        "norm_eps": file.require("llama.attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.get("llama.rope.freq_base", float, 10000.0),
        "max_seq_len": _size(file, "llama.context_length", limit=MAX_CONTEXT),
    }
    try:
        args = ModelArgs(**values)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from None
    return replace(args, rope_scaling=_rope_scaling(file, args))


def _size(file: GGUFFile, key: str, default: int | None = None, limit: int = MAX_SIZE) -> int:
    value = file.require(key, int) if default is None else file.get(key, int, default)
    if not 0 < value <= limit:
        raise ConfigError(f"{file.path}: {key} is {value}, it must lie in 1..{limit}")
    return value


def _vocab_size(file: GGUFFile) -> int:
    """The rows of the embedding: what the logits really are. Whoever else names a number must agree."""
    if "token_embd.weight" not in file.tensors:
        raise MismatchError(f"{file.path}: there is no token_embd.weight; a vocabulary without a model?")
    rows = file.tensors["token_embd.weight"].shape[0]
    declared = file.get("llama.vocab_size", int, rows)
    tokens = file.get("tokenizer.ggml.tokens", list, range(rows))
    for what, n in (("llama.vocab_size", declared), ("the number of tokens", len(tokens))):
        if n != rows:
            raise MismatchError(f"{file.path}: {what} is {n}, but token_embd.weight has {rows} rows")
    return rows


def _rope_scaling(file: GGUFFile, args: ModelArgs) -> RopeScaling | None:
    """Llama 3.1's scaling, which GGUF stores as what each frequency was divided by: 1 to `factor`."""
    kind = file.get("llama.rope.scaling.type", str, "linear")
    linear = file.get("llama.rope.scale_linear", float, 1.0)
    if kind != "none" and (by := file.get("llama.rope.scaling.factor", float, linear)) != 1:
        raise UnsupportedError(f"{file.path}: RoPE scaling {escape(kind)} by {by}, only Llama 3.1's is known")
    if "rope_freqs.weight" not in file.tensors:
        return None
    stored = file.tensor("rope_freqs.weight")
    if stored.shape != (args.head_dim // 2,):
        raise MismatchError(f"{file.path}: rope_freqs.weight is {stored.shape}, head_dim is {args.head_dim}")
    with np.errstate(all="ignore"):  # hostile numbers become inf or NaN, which equal nothing
        divisors = stored.dequantize(np.float64)
        factor = float(divisors.max())
        freqs = args.rope_theta ** -(np.arange(0, args.head_dim, 2) / args.head_dim)
        if 1 <= factor < np.inf:
            wanted = freqs / scale_freqs(freqs, RopeScaling(factor))
            if np.allclose(divisors, wanted, rtol=ROPE_TOLERANCE, atol=0):
                return RopeScaling(factor) if factor > 1 else None
    raise UnsupportedError(f"{file.path}: rope_freqs.weight is not Llama 3.1's scaling by {factor}")


def weights(file: GGUFFile, args: ModelArgs) -> dict[str, StoredTensor]:
    """Every weight under our name."""
    shapes = {name: info.shape for name, info in file.tensors.items() if name != "rope_freqs.weight"}
    names = matched_names(file.path, "gguf", args, shapes)
    stored = {theirs: file.tensor(theirs) for theirs in names.values()}
    return {ours: stored[theirs] for ours, theirs in names.items()}
