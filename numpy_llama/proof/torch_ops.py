"""PyTorch's own functions under our names, with arrays as arguments and results.

They must keep the same laws as NumPy, which tests the laws themselves.
"""

import numpy as np
import torch
import torch.nn.functional as tF

from ..config import ModelArgs
from . import torch_llama
from .torch_llama import rotary_table, rotate

torch.set_num_threads(1)  # arrays are tiny here: waking a second thread takes longer than the whole call


def tensor(x) -> torch.Tensor:
    return torch.from_numpy(np.array(x))  # a copy: PyTorch needs writable arrays without negative strides


def embedding(tokens, weight):
    return tF.embedding(tensor(tokens), tensor(weight)).numpy()


def linear(x, w):
    return tF.linear(tensor(x), tensor(w)).numpy()


def rms_norm(x, weight, eps):
    return tF.rms_norm(tensor(x), (x.shape[-1],), tensor(weight), eps).numpy()


def softmax(x):
    return torch.softmax(tensor(x), -1).numpy()


def silu(x):
    return tF.silu(tensor(x)).numpy()


def swiglu(gate, up):
    return (tF.silu(tensor(gate)) * tensor(up)).numpy()


def precompute_freqs_cis(head_dim, end, rope_theta, scaling=None, dtype=np.float32):
    args = ModelArgs(8, 1, 1, 1, head_dim, 8, 8, 1e-5, rope_theta, end, scaling)
    return rotary_table(args, end, tensor(np.zeros(0, dtype)).dtype).numpy()


def freqs_cis_at(freqs_cis, start_pos, T):
    starts = np.atleast_1d(start_pos).tolist()
    table = tensor(freqs_cis)
    if min(starts) < 0 or max(starts) + T > len(table):
        raise IndexError("beyond the table")  # slices of a tensor would be cut short
    rows = torch.stack([table[start : start + T] for start in starts]).numpy()
    return rows if np.ndim(start_pos) else rows[0]


def apply_rotary_emb(x, freqs_cis):
    return rotate(tensor(x), tensor(freqs_cis)).numpy()


def causal_mask(T, S, dtype=np.float32):
    visible = torch.ones(T, S, dtype=torch.bool).tril(diagonal=S - T)
    return torch.zeros(T, S).masked_fill(~visible, -torch.inf).numpy().astype(dtype)


def repeat_kv(x, n_rep):
    return tensor(x).repeat_interleave(n_rep, dim=2).numpy()


def attention_scores(q, k):
    shared = tensor(k.astype(q.dtype)).repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    scores = torch.einsum("bthd,bshd->bhts", tensor(q), shared) / q.shape[3] ** 0.5
    return (scores + tensor(causal_mask(*scores.shape[2:], q.dtype))).numpy()


def weighted_values(weights, v):
    shared = tensor(v.astype(weights.dtype)).repeat_interleave(weights.shape[1] // v.shape[2], dim=2)
    return torch.einsum("bhts,bshd->bthd", tensor(weights), shared).numpy()


def attention(q, k, v):
    q, k, v = (tensor(x.astype(q.dtype)).transpose(1, 2) for x in (q, k, v))
    T, S = q.shape[2], k.shape[2]
    visible = torch.ones(T, S, dtype=torch.bool).tril(diagonal=S - T)
    out = tF.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out.transpose(1, 2).numpy()


def greedy(logits):
    highest = torch.max(tensor(logits))
    if not torch.isfinite(highest):
        raise FloatingPointError("no choice among NaN and infinity")
    return int(torch.nonzero(tensor(logits) == highest)[0, 0])


def apply_temperature(logits, temperature):
    x = tensor(logits).double()
    return ((x - x.max()) / temperature).to(tensor(logits).dtype).numpy()


def dequantize_f32(rows):
    return tensor(rows).view(torch.float32).numpy()


def dequantize_f16(rows):
    return tensor(rows).view(torch.float16).float().numpy()


def dequantize_bf16(rows):
    return tensor(rows).view(torch.bfloat16).float().numpy()


def quantize_f32(x):
    return tensor(np.ascontiguousarray(x)).view(torch.uint8).numpy()


def quantize_f16(x):
    return tensor(np.ascontiguousarray(x)).half().view(torch.uint8).numpy()


def quantize_bf16(x):
    return tensor(np.ascontiguousarray(x)).bfloat16().view(torch.uint8).numpy()


class Transformer:
    """torch_llama.Transformer with these weights; it has no cache."""

    def __init__(self, args, weights):
        self.model = torch_llama.Transformer(args, tensor(weights["norm.weight"]).dtype)
        self.model.load_state_dict({name: tensor(w) for name, w in weights.items()})

    def __call__(self, tokens):
        return self.model(tensor(tokens)).numpy()
