"""One table of tensor names: ours, Meta's, Hugging Face's and GGUF's, with the shape of each.

Ours are Meta's, except w_gate, w_up and w_down for w1, w3 and w2. The letters of the shapes are
explained in config.py. A matrix is (OUT, IN) in all four schemes.
"""

import re
from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np

from ..config import ModelArgs
from ..errors import MismatchError, ParameterError, escape

SCHEMES = ("ours", "meta", "hf", "gguf")

# In all four schemes ".weight" follows each name.
# fmt: off
MODEL = (
    # ours             Meta's            Hugging Face's        GGUF's         shape
    ("tok_embeddings", "tok_embeddings", "model.embed_tokens", "token_embd",  ("V", "D")),
    ("norm",           "norm",           "model.norm",         "output_norm", ("D",)),
    ("output",         "output",         "lm_head",            "output",      ("V", "D")),
)
LAYER_PREFIX = ("layers.{i}.", "layers.{i}.", "model.layers.{i}.", "blk.{i}.")
LAYER = (
    ("attention_norm",      "attention_norm",  "input_layernorm",          "attn_norm",   ("D",)),
    ("attention.wq",        "attention.wq",    "self_attn.q_proj",         "attn_q",      ("HDh", "D")),
    ("attention.wk",        "attention.wk",    "self_attn.k_proj",         "attn_k",      ("KDh", "D")),
    ("attention.wv",        "attention.wv",    "self_attn.v_proj",         "attn_v",      ("KDh", "D")),
    ("attention.wo",        "attention.wo",    "self_attn.o_proj",         "attn_output", ("D", "HDh")),
    ("ffn_norm",            "ffn_norm",        "post_attention_layernorm", "ffn_norm",    ("D",)),
    ("feed_forward.w_gate", "feed_forward.w1", "mlp.gate_proj",            "ffn_gate",    ("F", "D")),
    ("feed_forward.w_up",   "feed_forward.w3", "mlp.up_proj",              "ffn_up",      ("F", "D")),
    ("feed_forward.w_down", "feed_forward.w2", "mlp.down_proj",            "ffn_down",    ("D", "F")),
)
PHI3 = "phi3"  # the model_type of Hugging Face, and the architecture of GGUF
# Phi-3 has these matrices one below the other in one tensor.
FUSED = (
    # Hugging Face          GGUF        its parts, from the first row on
    ("self_attn.qkv_proj", "attn_qkv", ("attention.wq", "attention.wk", "attention.wv")),
    ("mlp.gate_up_proj",   "ffn_up",   ("feed_forward.w_gate", "feed_forward.w_up")),
)
# fmt: on

_SHAPES = {f"{row[0]}.weight": row[-1] for row in MODEL} | {
    f"{LAYER_PREFIX[0]}{row[0]}.weight": row[-1] for row in LAYER
}


def tensor_names(args: ModelArgs, scheme: str, fused: bool = False) -> dict[str, str]:
    """Our name of every weight of the model -> its name in `scheme`: "ours", "meta", "hf" or "gguf".

    fused: the names in a Phi-3 of "hf" or "gguf", where several weights share a tensor.
    """
    if scheme not in SCHEMES:
        raise ParameterError(f"no naming scheme {scheme!r}; there are {', '.join(SCHEMES)}")
    theirs = SCHEMES.index(scheme)
    names = {f"{row[0]}.weight": f"{row[theirs]}.weight" for row in MODEL}
    for i in range(args.n_layers):
        ours_prefix, prefix = LAYER_PREFIX[0].format(i=i), LAYER_PREFIX[theirs].format(i=i)
        names |= {f"{ours_prefix}{row[0]}.weight": f"{prefix}{row[theirs]}.weight" for row in LAYER}
        for *theirs_fused, parts in FUSED if fused else ():
            tensor = f"{prefix}{theirs_fused[('hf', 'gguf').index(scheme)]}.weight"
            names |= {f"{ours_prefix}{part}.weight": tensor for part in parts}
    return names


def rows_in_fused(our_name: str, args: ModelArgs) -> tuple[slice, int] | None:
    """The rows of a weight in Phi-3's fused tensor, and the number of rows of that tensor.

    None for a weight that has a tensor of its own.
    """
    for *_, parts in FUSED:
        if stem := next((part for part in parts if our_name.endswith(f".{part}.weight")), None):
            sizes = [expected_shape(our_name.replace(stem, part), args)[0] for part in parts]
            ends = list(accumulate(sizes, initial=0))
            at = parts.index(stem)
            return slice(ends[at], ends[at + 1]), ends[-1]
    return None


def our_names(theirs: str, scheme: str) -> list[str]:
    """Our name of the weight that `scheme` calls `theirs`, of any model. Several in a fused tensor of "hf".

    The list is empty if no weight is called so.
    """
    at, prefix, (stem, _, last) = SCHEMES.index(scheme), "", theirs.rpartition(".")
    rows: tuple[tuple[Any, ...], ...] = MODEL
    layers = re.escape(LAYER_PREFIX[at].removesuffix("{i}."))
    if layer := re.fullmatch(rf"{layers}(0|[1-9]\d{{0,5}})\.(.+)", stem, re.ASCII):
        rows, prefix, stem = LAYER, LAYER_PREFIX[0].format(i=layer[1]), layer[2]
    ours = [row[0] for row in rows if row[at] == stem]
    if scheme == "hf" and rows is LAYER:
        ours += [part for fused, _, parts in FUSED if fused == stem for part in parts]
    return [f"{prefix}{one}.weight" for one in ours if last == "weight"]


def expected_shape(our_name: str, args: ModelArgs) -> tuple[int, ...]:
    """The shape that a weight must have, for example "layers.0.attention.wk.weight" -> (K * Dh, D)."""
    template = re.sub(r"^layers\.\d+\.", LAYER_PREFIX[0], our_name)
    if template not in _SHAPES:
        raise ParameterError(f"no weight is called {our_name!r}")
    sizes = {
        "V": args.vocab_size,
        "D": args.dim,
        "F": args.hidden_dim,
        "HDh": args.n_heads * args.head_dim,
        "KDh": args.n_kv_heads * args.head_dim,
    }
    return tuple(sizes[letter] for letter in _SHAPES[template])


def matched_names(
    source: object,
    scheme: str,
    args: ModelArgs,
    shapes: Mapping[str, tuple[int, ...]],
    tied: bool | None = None,
    fused: bool = False,
) -> dict[str, str]:
    """Our name of every weight -> its name in a file that holds tensors of these `shapes`.

    A weight that is missing, unknown or of another shape is a MismatchError: an unknown one would change the
    model. `tied`: the output matrix is the embedding. None: it is tied if the file has no output matrix.
    """
    names = tensor_names(args, scheme, fused)
    ours_in, ours_out = "tok_embeddings.weight", "output.weight"
    if tied or (tied is None and names[ours_out] not in shapes):
        names[ours_out] = names[ours_in]
    for what, odd in [
        ("missing", set(names.values()) - shapes.keys()),
        ("unknown", shapes.keys() - names.values()),
    ]:
        if odd:
            raise MismatchError(f"{source}: {len(odd)} {what} weights: {escape(', '.join(sorted(odd)))}")
    for ours, theirs in names.items():
        found, wanted = tuple(shapes[theirs]), expected_shape(ours, args)
        if fused and (place := rows_in_fused(ours, args)):
            wanted = place[1], wanted[1]
        if found != wanted:
            raise MismatchError(f"{source}: {theirs} has the shape {found}, the arguments want {wanted}")
    return names


def usual(name: str) -> str:
    """The name of a weight without that of torch.compile's wrapper."""
    return name.replace("_orig_mod.", "")


def usual_names(source: object, names: Iterable[str]) -> dict[str, str]:
    """The usual name of each weight -> its name in the file. MismatchError if one is there twice."""
    names = list(names)
    found = {usual(name): name for name in names}
    if hidden := set(names) - set(found.values()):
        name = min(hidden)
        other = found[usual(name)]
        raise MismatchError(f"{source} has {escape(name)} and {escape(other)}; wanted one of them")
    return found


def interleaved_rows(n_heads: int, head_dim: int) -> np.ndarray:
    """The place of each row of Meta's wq or wk in Hugging Face's q_proj or k_proj: -> (n_heads * Dh,).

    RoPE turns pairs of rows. Meta stores a pair in neighbouring rows, (2j, 2j + 1). Hugging Face cuts a head
    into halves, (j, j + Dh / 2). For k_proj, n_heads is the number of key/value heads.
    """
    places = np.arange(n_heads * head_dim).reshape(n_heads, 2, head_dim // 2)
    return places.swapaxes(1, 2).reshape(-1)


def hf_rows(name: str, args: ModelArgs) -> np.ndarray | None:
    """The place of each row of this weight in Hugging Face's order; None if the order is ours."""
    heads = {"wq": args.n_heads, "wk": args.n_kv_heads}.get(name.split(".")[-2])
    return None if heads is None else interleaved_rows(heads, args.head_dim)
