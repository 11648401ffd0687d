"""PyTorch's own functions under our names, with arrays as arguments and results.

They must keep the same laws as NumPy, which tests the laws themselves.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as tF

from ..config import Array, ModelArgs, RopeScaling
from . import torch_llama
from .torch_llama import rotate
from .torch_rope import rotary_table

torch.set_num_threads(1)  # faster for tiny arrays; and two pools of OpenMP threads slow each other down


def tensor(x: Any) -> torch.Tensor:
    """x as a tensor in the same memory; a copy if x is read-only or has negative strides."""
    x = np.asarray(x)
    shared = x.flags.writeable and min(x.strides, default=0) >= 0
    return torch.from_numpy(x if shared else x.copy())


def embedding(tokens: Array, weight: Array) -> Array:
    return tF.embedding(tensor(tokens), tensor(weight)).numpy()


def linear(x: Array, w: Array) -> Array:
    return tF.linear(tensor(x), tensor(w)).numpy()


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    return tF.rms_norm(tensor(x), (x.shape[-1],), tensor(weight), eps).numpy()


def softmax(x: Array) -> Array:
    return torch.softmax(tensor(x), -1).numpy()


def silu(x: Array) -> Array:
    return tF.silu(tensor(x)).numpy()


def swiglu(gate: Array, up: Array) -> Array:
    return (tF.silu(tensor(gate)) * tensor(up)).numpy()


def precompute_freqs_cis(
    head_dim: int, end: int, rope_theta: float, scaling: RopeScaling | None = None, dtype: type = np.float32
) -> Array:
    args = ModelArgs(8, 1, 1, 1, head_dim, 8, 8, 1e-5, rope_theta, end, scaling)
    return rotary_table(args, end, tensor(np.zeros(0, dtype)).dtype).numpy()


def freqs_cis_at(freqs_cis: Array, start_pos: int | Array, T: int) -> Array:
    starts = np.atleast_1d(start_pos).tolist()
    table = tensor(freqs_cis)
    if min(starts) < 0 or max(starts) + T > len(table):
        raise IndexError("beyond the table")  # slices of a tensor would be cut short
    rows = torch.stack([table[start : start + T] for start in starts]).numpy()
    return rows if np.ndim(start_pos) else rows[0]


def apply_rotary_emb(x: Array, freqs_cis: Array) -> Array:
    return rotate(tensor(x), tensor(freqs_cis)).numpy()


def causal_mask(T: int, S: int, dtype: type = np.float32) -> Array:
    visible = torch.ones(T, S, dtype=torch.bool).tril(diagonal=S - T)
    return torch.zeros(T, S).masked_fill(~visible, -torch.inf).numpy().astype(dtype)


def repeat_kv(x: Array, n_rep: int) -> Array:
    return tensor(x).repeat_interleave(n_rep, dim=2).numpy()


def attention_scores(q: Array, k: Array) -> Array:
    shared = tensor(k.astype(q.dtype)).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores: torch.Tensor = torch.einsum("bthd,bshd->bhts", tensor(q), shared) / q.shape[3] ** 0.5
    return (scores + tensor(causal_mask(scores.shape[2], scores.shape[3], q.dtype.type))).numpy()


def weighted_values(weights: Array, v: Array) -> Array:
    shared = tensor(v.astype(weights.dtype)).repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshd->bthd", tensor(weights), shared).numpy()


def attention(q: Array, k: Array, v: Array) -> Array:
    def heads_first(x: Array) -> torch.Tensor:
        return tensor(x.astype(q.dtype, copy=False)).transpose(1, 2)

    T, S = q.shape[1], k.shape[1]
    visible = torch.ones(T, S, dtype=torch.bool).tril(diagonal=S - T)
    heads = heads_first(q), heads_first(k), heads_first(v)
    out = tF.scaled_dot_product_attention(*heads, visible, enable_gqa=True)
    return out.transpose(1, 2).numpy()


def greedy(logits: Array) -> int:
    highest = torch.max(tensor(logits))
    if not torch.isfinite(highest):
        raise FloatingPointError("no choice among NaN and infinity")
    return int(torch.nonzero(tensor(logits) == highest)[0, 0])


def apply_temperature(logits: Array, temperature: float) -> Array:
    x = tensor(logits).double()
    return ((x - x.max()) / temperature).to(tensor(logits).dtype).numpy()


def dequantize_f32(rows: Array) -> Array:
    return tensor(rows).view(torch.float32).numpy()


def dequantize_f16(rows: Array) -> Array:
    return tensor(rows).view(torch.float16).float().numpy()


def dequantize_bf16(rows: Array) -> Array:
    return tensor(rows).view(torch.bfloat16).float().numpy()


def quantize_f32(x: Array) -> Array:
    return tensor(np.ascontiguousarray(x)).view(torch.uint8).numpy()


def quantize_f16(x: Array) -> Array:
    return tensor(np.ascontiguousarray(x)).half().view(torch.uint8).numpy()


def quantize_bf16(x: Array) -> Array:
    return tensor(np.ascontiguousarray(x)).bfloat16().view(torch.uint8).numpy()


class Transformer:
    """torch_llama.Transformer with these weights; it has no cache."""

    def __init__(self, args: ModelArgs, weights: Mapping[str, Array]):
        self.model = torch_llama.Transformer(args, tensor(weights["norm.weight"]).dtype)
        self.model.load_state_dict({name: tensor(w) for name, w in weights.items()})

    def __call__(self, tokens: Array) -> Array:
        logits: torch.Tensor = self.model(tensor(tokens))
        return logits.numpy()
