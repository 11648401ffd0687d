"""Every operation of every layer of a model: C against NumPy, and against PyTorch where it is installed.

Each implementation gets NumPy's inputs, so an error comes from the operation that shows it. The C kernels
multiply a prompt and a single token in different ways, and both are checked. With quantized activations the
right result is linear(x rounded, w). The float32 copy of one layer is in memory at a time.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import functional as F
from ..backend.formats import ROUNDED_TABLES, StoredTensor, rounded_weights
from ..backend.fused import FusedBlock, fused_weights
from ..backend.kernels import Kernels, KernelWeight, rounded_activations
from ..cache import KVCache
from ..checkpoint.base import Checkpoint
from ..config import Array, ModelArgs
from ..model import TransformerBlock
from . import bounds

LAYER = (
    "attention_norm", "wq", "wk", "wv", "rope", "attention", "wo",
    "ffn_norm", "w_gate", "w_up", "swiglu", "w_down", "layer",
)  # fmt: skip
MATRICES = {f"attention.{name}" for name in ("wq", "wk", "wv", "wo")}
MATRICES |= {f"feed_forward.{name}" for name in ("w_gate", "w_up", "w_down")}
NORMS = ("attention_norm", "ffn_norm")
OUTPUT_ROWS = 8192  # of the output matrix at a time: the matrix may be larger than a layer
Look = Callable[[int | None, str, Array], None]
Case = tuple[Array, Array, Array]  # (found, expected, the bound of their difference)


@dataclass(frozen=True)
class Error:
    """The distance of an implementation from NumPy in one operation."""

    layer: int | None  # None: after the last layer
    operation: str
    implementation: str
    error: float  # the largest difference, relative to the largest result
    share: float  # of the bound that rounding allows; above 1 it is a mismatch


class C:
    """The C kernels: `linear`, `attention`, and a whole layer."""

    def __init__(self, threads: int | None, exact: bool):
        self.kernels, self.exact = Kernels(threads, exact), exact
        self.name = "C, exact" if exact else "C, default"
        self.dtype = np.float32 if exact else np.float16  # of the cache

    def linear(self, x: Array, w: StoredTensor, dense: Array, y: Array) -> Iterator[Case]:
        """The case of the prompt, and that of its last token."""
        weight = KernelWeight(w)
        for part, exact in ((x, y), (x[:, -1:], y[:, -1:])):
            stored = part if weight.columns is None else part.take(weight.columns, axis=-1)
            rounded = rounded_activations(stored, w.format, self.kernels.activation_bits)
            there = rounded if w.column_order is None else rounded.take(w.column_order, axis=-1)
            weights = rounded_weights(w) if w.format.name in ROUNDED_TABLES else dense
            right = exact if rounded is stored else F.linear(there, weights)
            bound = bounds.linear(part[0], dense, w.format, rounded is not stored)
            yield self.kernels.linear(part, weight), right, bound

    def attention(self, q: Array, k: Array, v: Array) -> Iterator[Case]:
        with np.errstate(over="ignore"):
            k, v = k.astype(self.dtype), v.astype(self.dtype)
        for part in (q, q[:, -1:]):
            yield self.kernels.attention(part, k, v), F.attention(part, k, v), bounds.attention(part, k, v)

    def layer(
        self, h: Array, after: Array, args: ModelArgs, w: dict[str, StoredTensor], freqs_cis: Array
    ) -> Iterator[Case]:
        """A whole layer in one call: a prompt, then one more token."""
        one = replace(args, n_layers=1)
        weights = {
            f"layers.0.{name}.weight": t.dequantize() if len(t.shape) == 1 else KernelWeight(t)
            for name, t in w.items()
        }
        block = TransformerBlock(one, 0, weights, self.kernels.linear, self.kernels.attention)
        T, cache = h.shape[1], KVCache(one, 1, h.shape[1], self.dtype)
        if (fused := fused_weights(block, self.kernels)) is not None:
            block = FusedBlock(block, self.kernels, fused)
        parts = [block(h[:, :-1], 0, freqs_cis[:-1], cache), block(h[:, -1:], T - 1, freqs_cis[-1:], cache)]
        found = np.concatenate(parts, axis=1)
        yield found - h, after - h, bounds.layer(h, after, self.exact)  # the layer's own addition


class Torch:
    """PyTorch's own functions, as the laws test them, and RoPE from the papers: no code of functional.py."""

    name = "PyTorch"

    def __init__(self, args: ModelArgs, T: int):
        import torch

        from ..proof import torch_ops, torch_rope

        self.ops = torch_ops
        self.freqs_cis = torch_rope.rotary_table(args, T, torch.float32).numpy()

    def norm(self, x: Array, weight: Array, eps: float) -> Array:
        return self.ops.rms_norm(x, weight, eps)

    def linear(self, x: Array, w: StoredTensor, dense: Array, y: Array) -> Iterator[Case]:
        yield self.ops.linear(x, dense), y, bounds.linear(x[0], dense, w.format, False)

    def rope(self, x: Array) -> Array:
        return self.ops.apply_rotary_emb(x, self.freqs_cis)

    def attention(self, q: Array, k: Array, v: Array) -> Iterator[Case]:
        yield self.ops.attention(q, k, v), F.attention(q, k, v), bounds.attention(q, k, v)

    def swiglu(self, gate: Array, up: Array) -> Array:
        return self.ops.swiglu(gate, up)


def pytorch(args: ModelArgs, T: int) -> list[Torch]:
    """PyTorch, if it is installed."""
    try:
        import torch  # noqa: F401
    except ImportError:
        return []
    return [Torch(args, T)]


def operation_errors(
    opened: Checkpoint,
    ids: Sequence[int],
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    look: Look = lambda layer, name, weight: None,
) -> Iterator[Error]:
    """The errors of all operations on the tokens `ids`, in the order of the forward pass.

    look(layer, name, weight) receives every weight in float32, except the embedding.
    """
    args, weights, T = opened.args, opened.weights(), len(ids)
    kernels, torches = [C(threads, exact=True), C(threads, exact=False)], pytorch(args, T)
    # A scaling may depend on the size of the context, so the table is computed for all of it.
    freqs_cis = F.precompute_freqs_cis(args.head_dim, args.max_seq_len, args.rope_theta, args.rope_scaling)[
        :T
    ]
    walk = Walk(args, kernels, torches, freqs_cis)
    h = weights["tok_embeddings.weight"][np.array([ids])]
    for layer in range(args.n_layers):
        progress(f"layer {layer}", layer, args.n_layers)
        names = {name: weights[f"layers.{layer}.{name}.weight"] for name in (*NORMS, *MATRICES)}
        w = {name: stored.realize() for name, stored in names.items()}
        dense = {name: stored.dequantize() for name, stored in w.items()}
        for name, weight in dense.items():
            look(layer, name, weight)
        with np.errstate(all="ignore"):  # other checks report the infinities of a broken model
            h = walk.layer(layer, h, w, dense)
        yield from walk.errors
        walk.errors.clear()
    progress("output", args.n_layers, args.n_layers)
    with np.errstate(all="ignore"):
        walk.end(h, weights["norm.weight"].dequantize(), weights["output.weight"].realize(), look)
    yield from walk.errors


class Walk:
    """NumPy's forward pass. After each step, the other implementations compute the same step."""

    def __init__(self, args: ModelArgs, kernels: list[C], torches: list[Torch], freqs_cis: Array):
        self.args, self.kernels, self.torches, self.freqs_cis = args, kernels, torches, freqs_cis
        self.fastest = 1.0  # radians a position, of the fastest pair
        if args.rope_scaling is not None:
            freqs = F.rope_freqs(args.head_dim, args.rope_theta)
            freqs /= args.rope_scaling.divisors(freqs, args.rope_theta, args.max_seq_len)
            self.fastest = max(1.0, freqs.max())
        self.others: list[C | Torch] = [*kernels, *torches]
        self.errors: list[Error] = []

    at: int | None  # the layer; None after the last

    def layer(self, layer: int, h: Array, w: dict[str, StoredTensor], dense: dict[str, Array]) -> Array:
        """(1, T, D) -> (1, T, D)."""
        self.at, self.w, self.dense = layer, w, dense
        x, (T, Dh) = self.norm("attention_norm", h, dense["attention_norm"]), (h.shape[1], self.args.head_dim)
        q, k, v = (self.linear(f"attention.{name}", x).reshape(1, T, -1, Dh) for name in ("wq", "wk", "wv"))
        q, k = self.rope(q), self.rope(k)
        mixed = F.attention(q, k, v)
        for other in self.others:
            self.note("attention", other, other.attention(q, k, v))
        between = h + self.linear("attention.wo", mixed.reshape(1, T, -1))
        x = self.norm("ffn_norm", between, dense["ffn_norm"])
        gate, up = self.linear("feed_forward.w_gate", x), self.linear("feed_forward.w_up", x)
        wide = F.swiglu(gate, up)
        for other in self.torches:
            self.note("swiglu", other, [(other.swiglu(gate, up), wide, bounds.swiglu(wide))])
        after = between + self.linear("feed_forward.w_down", wide)
        for other in self.kernels:
            self.note("layer", other, other.layer(h, after, self.args, w, self.freqs_cis))
        return after

    def end(self, h: Array, norm: Array, output: StoredTensor, look: Look) -> None:
        """The norm and the output matrix after the last layer, some rows of the matrix at a time."""
        self.at = None
        look(None, "norm", norm)
        x = self.norm("norm", h, norm)
        for begin in range(0, len(output), OUTPUT_ROWS):
            rows = slice(begin, begin + OUTPUT_ROWS)
            stored = output.stored_rows(rows)
            shape = len(stored), output.shape[1]
            part = StoredTensor(output.format, shape, stored, column_order=output.column_order)
            self.w, self.dense = {"output": part}, {"output": part.dequantize()}
            look(None, "output", self.dense["output"])
            self.linear("output", x)

    def norm(self, name: str, x: Array, weight: Array) -> Array:
        expected = F.rms_norm(x, weight, self.args.norm_eps)
        for other in self.torches:
            found = other.norm(x, weight, self.args.norm_eps)
            self.note(name, other, [(found, expected, bounds.norm(expected))])
        return expected

    def rope(self, x: Array) -> Array:
        expected, angles = F.apply_rotary_emb(x, self.freqs_cis), np.arange(x.shape[1]) * self.fastest
        for other in self.torches:
            self.note("rope", other, [(other.rope(x), expected, bounds.rope(expected, angles))])
        return expected

    def linear(self, name: str, x: Array) -> Array:
        y = F.linear(x, self.dense[name])
        for other in self.others:
            self.note(name.rpartition(".")[2], other, other.linear(x, self.w[name], self.dense[name], y))
        return y

    def note(self, operation: str, other: C | Torch, cases: Iterable[Case]) -> None:
        """Keep the errors of some cases."""
        for found, expected, bound in cases:
            self.errors.append(Error(self.at, operation, other.name, *distance(found, expected, bound)))


def distance(found: Array, expected: Array, bound: Array) -> tuple[float, float]:
    """-> the largest difference relative to the largest result, and to its bound. NaN equals only NaN."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    difference = np.where(same, 0, np.abs(found.astype(np.float64) - expected))
    difference = np.where(np.isnan(difference), np.inf, difference)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    share = np.where(same, 0, difference / np.maximum(np.nan_to_num(bound, nan=0), 1e-300))
    if not difference.any():
        return 0.0, 0.0
    return float(difference.max() / max(largest, 1e-300)), float(share.max())
