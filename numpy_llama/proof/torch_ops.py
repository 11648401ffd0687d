"""PyTorch's own functions under our names, with arrays as arguments and results.

They must keep the same laws as NumPy, which tests the laws themselves.
"""

from collections.abc import Callable, Mapping
from itertools import pairwise
from operator import attrgetter
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
    return windowed_attention(q, k, v, k.shape[1])


def windowed_attention(q: Array, k: Array, v: Array, window: int) -> Array:
    def heads_first(x: Array) -> torch.Tensor:
        return tensor(x.astype(q.dtype, copy=False)).transpose(1, 2)

    T, S = q.shape[1], k.shape[1]
    visible = torch.ones(T, S, dtype=torch.bool).tril(diagonal=S - T).triu(diagonal=S - T - window + 1)
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


# The gradients are those of autograd.


def pulled_back(f: Callable[..., torch.Tensor], dy: Array, *inputs: Array) -> tuple[Array, ...]:
    """The gradients of f(*inputs) by each input, where dy is the gradient by its result."""
    leaves = [tensor(x).detach().clone().requires_grad_() for x in inputs]
    return tuple(g.numpy() for g in torch.autograd.grad(f(*leaves), leaves, tensor(dy)))


def linear_dx(dy: Array, w: Array) -> Array:
    x = np.zeros((*dy.shape[:-1], w.shape[1]), dy.dtype)
    return pulled_back(lambda x: tF.linear(x, tensor(w)), dy, x)[0]


def linear_dw(dy: Array, x: Array) -> Array:
    w = np.zeros((dy.shape[-1], x.shape[-1]), x.dtype)
    return pulled_back(lambda w: tF.linear(tensor(x), w), dy, w)[0]


def embedding_backward(dx: Array, tokens: Array, vocab_size: int) -> Array:
    weight = np.zeros((vocab_size, dx.shape[-1]), dx.dtype)
    return pulled_back(lambda weight: tF.embedding(tensor(tokens), weight), dx, weight)[0]


def rms_norm_backward(dy: Array, x: Array, weight: Array, eps: float) -> tuple[Array, ...]:
    return pulled_back(lambda x, weight: tF.rms_norm(x, (x.shape[-1],), weight, eps), dy, x, weight)


def apply_rotary_emb_backward(dy: Array, freqs_cis: Array) -> Array:
    return pulled_back(lambda x: rotate(x, tensor(freqs_cis)), dy, np.zeros_like(dy))[0]


def swiglu_backward(ds: Array, gate: Array, up: Array) -> tuple[Array, ...]:
    return pulled_back(lambda gate, up: tF.silu(gate) * up, ds, gate, up)


def documents(first: Array) -> list[tuple[slice, slice]]:
    """(row, positions) of each document, in the order of the rows."""
    starts = [np.flatnonzero(row == np.arange(len(row))).tolist() for row in first]
    T = first.shape[1]
    return [(slice(b, b + 1), slice(*ends)) for b, row in enumerate(starts) for ends in pairwise([*row, T])]


def within_documents(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, first: Array) -> torch.Tensor:
    out = torch.zeros_like(q)
    for at in documents(first):
        heads = q[at].transpose(1, 2), k[at].transpose(1, 2), v[at].transpose(1, 2)
        out[at] = tF.scaled_dot_product_attention(*heads, is_causal=True, enable_gqa=True).transpose(1, 2)
    return out


def attention_saving(q: Array, k: Array, v: Array, first: Array) -> tuple[Array, Array]:
    lse = np.empty((q.shape[0], q.shape[2], q.shape[1]), q.dtype)
    for row, at in documents(first):
        lse[row, :, at] = torch.logsumexp(tensor(attention_scores(q[row, at], k[row, at])), -1).numpy()
    return within_documents(tensor(q), tensor(k), tensor(v), first).numpy(), lse


def attention_backward(
    dout: Array, q: Array, k: Array, v: Array, out: Array, lse: Array, first: Array
) -> tuple[Array, ...]:
    return pulled_back(lambda q, k, v: within_documents(q, k, v, first), dout, q, k, v)


def cross_entropy(logits: Array, targets: Array) -> tuple[Array, Array]:
    nll = tF.cross_entropy(tensor(logits), tensor(targets), reduction="none")
    return nll.numpy(), torch.logsumexp(tensor(logits), -1).numpy()


def cross_entropy_backward(dnll: Array, logits: Array, targets: Array, lse: Array) -> Array:
    def nll(logits: torch.Tensor) -> torch.Tensor:
        return tF.cross_entropy(logits, tensor(targets), reduction="none")

    return pulled_back(nll, dnll, logits)[0]


def head_loss(
    h: Array, output: Any, targets: Array, weights: Array, chunk: int = 0
) -> tuple[float, Array, dict[str, Array]]:
    """For an output that is y = x W^T. It computes all rows at once."""

    def loss(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        known = np.where(weights != 0, targets, 0)
        nll = tF.cross_entropy(tF.linear(h, w).flatten(0, -2), tensor(known).flatten(), reduction="none")
        return torch.where(tensor(weights != 0), nll.view(weights.shape) * tensor(weights), 0).sum()

    dh, dw = pulled_back(loss, np.ones((), h.dtype), h, output.weight)
    return loss(tensor(h), tensor(output.weight)).item(), dh, {"weight": dw}


def log_probs(h: Array, output: Any, targets: Array, mask: Array, chunk: int = 0) -> Array:
    log_p = torch.log_softmax(tF.linear(tensor(h), tensor(output.weight)), -1)
    known = tensor(np.where(mask != 0, targets, 0))
    found = torch.gather(log_p, -1, known[..., None])[..., 0]
    return torch.where(tensor(mask != 0), found, 0).numpy()


def block_backward(
    block: Any, dy: Array, saved: Any, freqs_cis: Array, first: Array
) -> tuple[Array, dict[str, Array]]:
    """Of `saved` it uses x alone."""
    a, D, hidden = block.attention, dy.shape[-1], len(block.feed_forward.w_up.weight)
    sizes = D, 1, a.n_heads, a.n_kv_heads, a.head_dim, hidden
    layer = torch_llama.TransformerBlock(ModelArgs(*sizes, 1, block.ffn_norm.eps, 1e4, 1))
    layer.to(tensor(dy).dtype)
    names = [name for name, _ in layer.named_parameters()]
    layer.load_state_dict({name: tensor(attrgetter(name)(block)) for name in names})
    x = tensor(saved.x).detach().clone().requires_grad_()
    ys = [layer(x[at], tensor(freqs_cis[at][0])) for at in documents(first)]
    y = torch.cat([part.flatten(0, 1) for part in ys]).view(x.shape)
    dx, *found = torch.autograd.grad(y, [x, *layer.parameters()], tensor(dy))
    return dx.numpy(), {name: g.numpy() for name, g in zip(names, found, strict=True)}


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


class Learner:
    """The loss and the gradients of torch_llama.Transformer, a document at a time."""

    def __init__(self, args: ModelArgs, weights: Mapping[str, Array]):
        self.model = Transformer(args, weights).model
        if weights["output.weight"] is weights["tok_embeddings.weight"]:
            self.model.output.weight = self.model.tok_embeddings.weight

    def loss_and_gradients(
        self, tokens: Array, targets: Array, weights: Array, first: Array | None = None
    ) -> tuple[float, dict[str, Array]]:
        first = np.zeros_like(tokens) if first is None else first
        losses = [self.loss(*(x[at] for x in (tokens, targets, weights))) for at in documents(first)]
        loss, learned = torch.stack(losses).sum(), dict(self.model.named_parameters())
        found = torch.autograd.grad(loss, list(learned.values()))
        return loss.item(), {name: g.numpy() for name, g in zip(learned, found, strict=True)}

    def loss(self, tokens: Array, targets: Array, weights: Array) -> torch.Tensor:
        """sum weights nll of one document: (1, T), (1, T), (1, T)."""
        logits, trained = self.model.with_graph(tensor(tokens)), weights != 0
        nll = tF.cross_entropy(logits[tensor(trained)], tensor(targets[trained]), reduction="none")
        return nll @ tensor(weights[trained])
