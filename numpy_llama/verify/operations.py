"""Every operation of every layer of a model: C against NumPy, and against PyTorch where it is installed.

Every implementation gets NumPy's inputs, so an error comes from the operation that shows it. The C kernels
multiply a prompt and a single token in different ways, and both are checked. With quantized activations the
right result is linear(quantize_activations(x), w). The float32 copy of one layer is in memory at a time.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .. import functional as F
from ..backend.formats import QK, StoredTensor, quantize_activations
from ..backend.fused import FusedBlock, fused_weights
from ..backend.kernels import Kernels, KernelWeight, quantizes_activations
from ..cache import KVCache
from ..checkpoint import Checkpoint
from ..config import ModelArgs
from ..model import TransformerBlock
from . import bounds

LAYER = (
    "attention_norm", "wq", "wk", "wv", "rope", "attention", "wo",
    "ffn_norm", "w_gate", "w_up", "swiglu", "w_down", "layer",
)  # fmt: skip
MATRICES = {f"attention.{name}" for name in ("wq", "wk", "wv", "wo")}
MATRICES |= {f"feed_forward.{name}" for name in ("w_gate", "w_up", "w_down")}
NORMS = ("attention_norm", "ffn_norm")
OUTPUT_ROWS = 8192  # of the output matrix at a time: it may be larger than a layer
Look = Callable[[int | None, str, np.ndarray], None]


@dataclass(frozen=True)
class Error:
    """The error of one implementation against NumPy, in one operation."""

    layer: int | None  # None: after the last layer
    operation: str
    implementation: str
    error: float  # the largest, relative to the largest result
    share: float  # the error divided by its bound; above 1 it is a miss


class C:
    """The C kernels: `linear`, `attention`, and a whole layer."""

    def __init__(self, threads: int | None, exact: bool):
        self.kernels, self.exact = Kernels(threads, exact), exact
        self.name = "C, exact" if exact else "C, default"
        self.dtype = np.float32 if exact else np.float16  # of the cache

    def linear(self, x, w: StoredTensor, dense, y) -> Iterator[tuple]:
        """-> (found, expected, bound) twice: for the prompt, and for its last token alone."""
        packed, T = KernelWeight(w), x.shape[1]
        quantized = not self.exact and quantizes_activations(w.format, T)
        right = F.linear(_rounded(x, max(w.format.block, QK)), dense) if quantized else y
        yield self.kernels.linear(x, packed), right, bounds.linear(x[0], dense, w.format, quantized)
        quantized = not self.exact and quantizes_activations(w.format, 1)
        right, x = (right if quantized else y)[:, -1:], x[:, -1:]
        yield self.kernels.linear(x, packed), right, bounds.linear(x[0], dense, w.format, quantized)

    def attention(self, q, k, v) -> Iterator[tuple]:
        with np.errstate(over="ignore"):
            k, v = k.astype(self.dtype), v.astype(self.dtype)
        for part in (q, q[:, -1:]):
            yield self.kernels.attention(part, k, v), F.attention(part, k, v), bounds.attention(part, k, v)

    def layer(self, h, after, args: ModelArgs, w: dict[str, StoredTensor], freqs_cis) -> Iterator[tuple]:
        """A whole layer in one call: a prompt, then one more token. Compared is what the layer adds to h."""
        one = replace(args, n_layers=1)
        packed = {
            f"layers.0.{name}.weight": t.dequantize() if len(t.shape) == 1 else KernelWeight(t)
            for name, t in w.items()
        }
        block = TransformerBlock(one, 0, packed, self.kernels.linear, self.kernels.attention)
        T, cache = h.shape[1], KVCache(one, 1, h.shape[1], self.dtype)
        if (weights := fused_weights(block, self.kernels)) is not None:
            block = FusedBlock(block, self.kernels, weights)
        parts = [block(h[:, :-1], 0, freqs_cis[:-1], cache), block(h[:, -1:], T - 1, freqs_cis[-1:], cache)]
        found = np.concatenate(parts, axis=1)
        yield found - h, after - h, bounds.layer(h, after, self.exact)


class Torch:
    """PyTorch's own functions, and RoPE from the papers: no code of functional.py."""

    name = "PyTorch"

    def __init__(self, torch, args: ModelArgs, T: int):
        from ..proof.torch_rope import rotary_table

        torch.set_num_threads(1)  # two pools of OpenMP threads slow each other down
        self.torch = torch
        self.turns = rotary_table(args, T, torch.float32)[:, None]  # (T, 1, Dh / 2)

    def tensor(self, x):
        return self.torch.from_numpy(x if x.flags.writeable else x.copy())

    def norm(self, x, weight, eps):
        given, weight = map(self.tensor, (x, weight))
        return self.torch.nn.functional.rms_norm(given, weight.shape, weight, eps).numpy()

    def linear(self, x, w: StoredTensor, dense, y) -> Iterator[tuple]:
        found = self.torch.nn.functional.linear(*map(self.tensor, (x, dense))).numpy()
        yield found, y, bounds.linear(x[0], dense, w.format, False)

    def rope(self, x):
        pairs = self.torch.view_as_complex(self.tensor(x).unflatten(-1, (-1, 2)))
        return self.torch.view_as_real(pairs * self.turns).flatten(-2).numpy()

    def attention(self, q, k, v) -> Iterator[tuple]:
        heads_first = [self.tensor(x).transpose(1, 2) for x in (q, k, v)]
        attend = self.torch.nn.functional.scaled_dot_product_attention
        found = attend(*heads_first, is_causal=True, enable_gqa=True).transpose(1, 2).numpy()
        yield found, F.attention(q, k, v), bounds.attention(q, k, v)

    def swiglu(self, gate, up):
        gate, up = map(self.tensor, (gate, up))
        return (self.torch.nn.functional.silu(gate) * up).numpy()


def _rounded(x, block: int):
    """`quantize_activations` of rows of any length. Rows are padded with zeros, as the kernels do."""
    IN = x.shape[-1]
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -IN % block)])
    return quantize_activations(padded, block)[..., :IN]


def pytorch():
    """The module, or None."""
    try:
        import torch
    except ImportError:
        return None
    return torch


def operation_errors(
    opened: Checkpoint,
    ids: Sequence[int],
    threads: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    look: Look = lambda layer, name, weight: None,
) -> Iterator[Error]:
    """The errors of all operations on the tokens `ids`, in the order of the forward pass.

    look(layer, name, weight) is called with every weight but the embedding, in float32.
    """
    args, weights, T = opened.args, opened.weights(), len(ids)
    torch, kernels = pytorch(), [C(threads, exact=True), C(threads, exact=False)]
    torches = [] if torch is None else [Torch(torch, args, T)]
    # The whole context's table, for a scaling may depend on its size.
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
        with np.errstate(all="ignore"):  # the census reports the infinities of a broken model
            h = walk.layer(layer, h, w, dense)
        yield from walk.errors
        walk.errors.clear()
    progress("output", args.n_layers, args.n_layers)
    with np.errstate(all="ignore"):
        walk.end(h, weights["norm.weight"].dequantize(), weights["output.weight"].realize(), look)
    yield from walk.errors


class Walk:
    """NumPy's forward pass. Every other implementation computes each step from the same input."""

    def __init__(self, args: ModelArgs, kernels: list[C], torches: list[Torch], freqs_cis):
        self.args, self.kernels, self.torches, self.freqs_cis = args, kernels, torches, freqs_cis
        self.fastest = 1.0  # radians a position, of the fastest pair
        if args.rope_scaling is not None:
            freqs = F.rope_freqs(args.head_dim, args.rope_theta)
            freqs /= args.rope_scaling.divisors(freqs, args.rope_theta, args.max_seq_len)
            self.fastest = max(1.0, freqs.max())
        self.others: list[C | Torch] = [*kernels, *torches]
        self.errors: list[Error] = []

    at: int | None  # the layer; None after the last

    def layer(self, layer: int, h, w: dict[str, StoredTensor], dense: dict[str, np.ndarray]):
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

    def end(self, h, norm, output: StoredTensor, look: Look) -> None:
        """The steps after the last layer: the norm, and the output matrix, OUTPUT_ROWS rows at a time."""
        self.at = None
        look(None, "norm", norm)
        x = self.norm("norm", h, norm)
        for begin in range(0, len(output), OUTPUT_ROWS):
            rows = slice(begin, begin + OUTPUT_ROWS)
            part = StoredTensor(output.format, (len(output.data[rows]), output.shape[1]), output.data[rows])
            self.w, self.dense = {"output": part}, {"output": part.dequantize()}
            look(None, "output", self.dense["output"])
            self.linear("output", x)

    def norm(self, name: str, x, weight):
        expected = F.rms_norm(x, weight, self.args.norm_eps)
        for other in self.torches:
            found = other.norm(x, weight, self.args.norm_eps)
            self.note(name, other, [(found, expected, bounds.norm(expected))])
        return expected

    def rope(self, x):
        expected, angles = F.apply_rotary_emb(x, self.freqs_cis), np.arange(x.shape[1]) * self.fastest
        for other in self.torches:
            self.note("rope", other, [(other.rope(x), expected, bounds.rope(expected, angles))])
        return expected

    def linear(self, name: str, x):
        y = F.linear(x, self.dense[name])
        for other in self.others:
            self.note(name.rpartition(".")[2], other, other.linear(x, self.w[name], self.dense[name], y))
        return y

    def note(self, operation: str, other, cases) -> None:
        """Add the error of each case (found, expected, bound) to `errors`."""
        for found, expected, bound in cases:
            self.errors.append(Error(self.at, operation, other.name, *distance(found, expected, bound)))


def distance(found, expected, bound) -> tuple[float, float]:
    """-> the largest difference, relative to the largest result and relative to its bound. NaN equals NaN."""
    same = (found == expected) | (np.isnan(found) & np.isnan(expected))
    difference = np.where(same, 0, np.abs(found.astype(np.float64) - expected))
    difference = np.where(np.isnan(difference), np.inf, difference)
    largest = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    share = np.where(same, 0, difference / np.maximum(np.nan_to_num(bound, nan=0), 1e-300))
    if not difference.any():
        return 0.0, 0.0
    return float(difference.max() / max(largest, 1e-300)), float(share.max())
