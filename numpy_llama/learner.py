"""A model that learns: the same Transformer, of parts that have gradients. Its gradients have Meta's names.

A part has two things more than in model.py. `backward(dy, x)` gives dx, and the gradients of the part's own
weights by attribute. `learned` names these attributes. An adapter is such a part: `with_parts` puts it in.
The inner loops come from outside, as in model.py: a backend has its own `Functions`.

    learner = Learner(model)
    run = learner.forward(tokens)
    loss, gradients = learner.backward(run, targets, weights)      # {"layers.0.attention.wq.weight": ...}
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np

from . import backward as B
from . import functional as F
from . import lora as L
from .backward import Gradients, add
from .config import Array
from .errors import MismatchError, ParameterError, UnsupportedError, escape
from .model import Attention, FeedForward, Linear, RMSNorm, Transformer, TransformerBlock

Function = Callable[..., Any]

# The parts of a block, in the order of the forward pass.
BLOCK = (
    *("attention_norm", "attention.wq", "attention.wk", "attention.wv"),
    *("attention.attention", "attention.wo", "ffn_norm"),
    *("feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down"),
)


@dataclass(frozen=True)
class Functions:
    """The inner loops of training. A backend has its own, with the same names and signatures.

    `attention` is the function of the model that attention_saving and attention_backward belong to.
    """

    linear_dx: Function = B.linear_dx
    linear_dw: Function = B.linear_dw
    attention: Function = F.attention
    attention_saving: Function = B.attention_saving
    attention_backward: Function = B.attention_backward
    block_forward: Function = B.block_forward
    block_backward: Function = B.block_backward
    head_loss: Function = B.head_loss
    log_probs: Function = B.log_probs
    add_lora: Function = L.add_lora
    lora_backward: Function = L.lora_backward


def checkpointing(functions: Functions) -> Functions:
    """The same functions, but a block keeps only x and is computed again in backward (Chen et al. 2016)."""

    def block_forward(block: Any, x: Array, freqs_cis: Array, first: Array) -> tuple[Array, Array]:
        y, _ = functions.block_forward(block, x, freqs_cis, first)
        return y, x

    def block_backward(
        block: Any, dy: Array, x: Array, freqs_cis: Array, first: Array
    ) -> tuple[Array, Gradients]:
        _, saved = functions.block_forward(block, x, freqs_cis, first)
        return functions.block_backward(block, dy, saved, freqs_cis, first)

    return replace(functions, block_forward=block_forward, block_backward=block_backward)


class FrozenLinear(Linear):
    """y = x W^T with a weight that does not learn, so it may be quantized."""

    learned: tuple[str, ...] = ()

    def __init__(self, weight: Any, linear: Function, linear_dx: Function):
        super().__init__(weight, linear)
        self.linear_dx = linear_dx

    def backward(self, dy: Array, x: Array) -> tuple[Array, Gradients]:
        return self.linear_dx(dy, self.weight), {}


class TrainedLinear(FrozenLinear):
    """y = x W^T with a weight that learns."""

    learned = ("weight",)

    def __init__(self, weight: Array, linear: Function, linear_dx: Function, linear_dw: Function):
        super().__init__(weight, linear, linear_dx)
        self.linear_dw = linear_dw

    def backward(self, dy: Array, x: Array) -> tuple[Array, Gradients]:
        return self.linear_dx(dy, self.weight), {"weight": self.linear_dw(dy, x)}


class FrozenRMSNorm(RMSNorm):
    """RMSNorm with a weight that does not learn."""

    learned: tuple[str, ...] = ()

    def backward(self, dy: Array, x: Array) -> tuple[Array, Gradients]:
        return B.rms_norm_backward(dy, x, self.weight, self.eps)[0], {}


class TrainedRMSNorm(FrozenRMSNorm):
    """RMSNorm with a weight that learns."""

    learned = ("weight",)

    def backward(self, dy: Array, x: Array) -> tuple[Array, Gradients]:
        dx, dweight = B.rms_norm_backward(dy, x, self.weight, self.eps)
        return dx, {"weight": dweight}


class SavingAttention:
    """An attention function with its two functions for training."""

    learned: tuple[str, ...] = ()

    def __init__(self, attention: Function, saving: Function, backward: Function):
        self.attention, self.saving, self.backward = attention, saving, backward

    def __call__(self, q: Array, k: Array, v: Array, **window: int) -> Array:
        return self.attention(q, k, v, **window)


@dataclass
class Pass:
    """A forward pass. `Learner.backward` follows it once, and releases what each block has saved."""

    tokens: Array  # (B, T)
    first: Array  # (B, T)
    freqs_cis: Array  # (B, T, Dh / 2)
    h: Array  # (B, T, D), after the last layer
    saved: list[Any]  # by layer


class Learner(Transformer):
    """The same model, with the same weights, that has gradients.

    With `frozen` no weight of the model learns, only the parts that `with_parts` puts in.
    """

    def __init__(self, model: Transformer, functions: Functions | None = None, frozen: bool = False):
        vars(self).update(vars(model))
        self.functions, self.frozen = functions or Functions(), frozen
        parts = {name: self._with_gradient(part) for name, part in self._parts()}
        vars(self).update(vars(self.with_parts(parts)))

    def parameters(self) -> Gradients:
        """The weights that learn, by the names of their gradients, in the order of the forward pass."""
        found = {} if self.frozen else {"tok_embeddings.weight": self.tok_embeddings}
        for name, part in self._parts():
            found |= {f"{name}.{key}": getattr(part, key) for key in part.learned}
        if self._is_tied():
            del found["output.weight"]
        return found

    def forward(self, tokens: Any, first: Array | None = None, keep: bool = True) -> Pass:
        """All layers, and what `backward` needs of them: (B, T) ids. By default a row is one document.

        keep: without it nothing is kept for `backward`, as an evaluation needs nothing.
        """
        tokens = np.asarray(tokens)
        x = F.embedding(tokens, self.tok_embeddings)  # (B, T, D)
        first = np.zeros_like(tokens) if first is None else first
        check_first(first, tokens)
        positions = np.arange(tokens.shape[1]) - first
        check_window(self.args.sliding_window, positions)
        freqs_cis = F.freqs_cis_at(self.freqs_cis, positions, 1)[:, :, 0]  # (B, T, Dh / 2)
        for name, part in self._parts():
            check_gradient(name, part)
        saved, lowest = [], self._lowest()
        for i, layer in enumerate(self.layers):
            x, kept = self.functions.block_forward(layer, x, freqs_cis, first)
            if keep:
                saved.append(kept if i >= lowest else None)
        return Pass(tokens, first, freqs_cis, x, saved)

    def log_probs(self, run: Pass, targets: Array, mask: Array) -> Array:
        """The log-probability of each target where the mask is not 0, else 0: (B, T), (B, T) -> (B, T)."""
        check_targets(run, targets, mask)
        return self.functions.log_probs(self.norm(run.h), self.output, targets, mask)

    def backward(
        self, run: Pass, targets: Array, weights: Array, gradients: Gradients | None = None
    ) -> tuple[float, Gradients]:
        """loss = sum of weight * -log p(target), and its gradients. They are added to `gradients`, if given.

        targets and weights (B, T). Micro-batches add up to one batch if each weight is 1 / n, where n counts
        the trained targets of all of them. The bits are those of adding the gradients of each pass alone.
        """
        check_targets(run, targets, weights)
        if len(run.saved) != len(self.layers):
            raise ParameterError(
                "this forward pass keeps nothing for backward, or backward has followed it: compute it again"
            )
        gradients = {} if gradients is None else gradients
        loss, dx, head = self.functions.head_loss(self.norm(run.h), self.output, targets, weights)
        tied = self._is_tied()
        if not tied:
            add(gradients, head, "output.")
        dx, own = self.norm.backward(dx, run.h)  # type: ignore[attr-defined]
        add(gradients, own, "norm.")
        for i in reversed(range(self._lowest(), len(self.layers))):
            kept = run.saved.pop()
            dx, own = self.functions.block_backward(self.layers[i], dx, kept, run.freqs_cis, run.first)
            add(gradients, own, f"layers.{i}.")
        if not self.frozen:
            ids, places = np.unique(run.tokens, return_inverse=True)  # of the few rows that were read
            rows = B.embedding_backward(dx, places.reshape(run.tokens.shape), len(ids))
            name = "tok_embeddings.weight"
            if tied:
                head["weight"][ids] += rows
                add(gradients, head, "tok_embeddings.")
            else:
                if name not in gradients:
                    gradients[name] = np.zeros(self.tok_embeddings.shape, rows.dtype)
                gradients[name][ids] += rows
        return loss, gradients

    def loss_and_gradients(
        self, tokens: Any, targets: Array, weights: Array, first: Array | None = None
    ) -> tuple[float, Gradients]:
        """`backward` after `forward`."""
        return self.backward(self.forward(tokens, first), targets, weights)

    def _parts(self) -> Iterator[tuple[str, Any]]:
        """The name and the part, of all that compute, in the order of the forward pass."""
        for i, layer in enumerate(self.layers):
            check_block(f"layers.{i}", layer)
            yield from ((f"layers.{i}.{name}", part) for name, part in block_parts(layer))
        yield from (("norm", self.norm), ("output", self.output))

    def _lowest(self) -> int:
        """The lowest layer that learns: those below it need no gradient."""
        learned = [i for i, layer in enumerate(self.layers) if any(p.learned for _, p in block_parts(layer))]
        return min(learned, default=len(self.layers)) if self.frozen else 0

    def _is_tied(self) -> bool:
        """Whether the output's weight is the embedding: its gradient is the sum of both."""
        return type(self.output) is TrainedLinear and self.output.weight is self.tok_embeddings

    def _with_gradient(self, part: Any) -> Any:
        """A part of model.py with its gradient. Any other part must have its own."""
        f = self.functions
        if type(part) is Linear and self.frozen:
            return FrozenLinear(part.weight, part.linear, f.linear_dx)
        if type(part) is Linear:
            return TrainedLinear(part.weight, part.linear, f.linear_dx, f.linear_dw)
        if type(part) is RMSNorm:
            return (FrozenRMSNorm if self.frozen else TrainedRMSNorm)(part.weight, part.eps)
        if part == f.attention:
            return SavingAttention(part, f.attention_saving, f.attention_backward)
        if isinstance(part, partial) and hasattr(own := self._with_gradient(part.func), "saving"):
            return SavingAttention(part, own.saving, own.backward)  # within a window: `forward` checks it
        return part


def block_parts(layer: Any) -> Iterator[tuple[str, Any]]:
    """The name and the part, of all in a block."""
    yield from ((name, attrgetter(name)(layer)) for name in BLOCK)


def check_block(name: str, layer: Any) -> None:
    """UnsupportedError unless the layer has the structure of `block_forward`, with whatever parts."""
    if not isinstance(layer, TransformerBlock):
        raise UnsupportedError(f"{name} is {escape(layer, 60)}: only a TransformerBlock has a gradient")
    for child, kind in (("attention", Attention), ("feed_forward", FeedForward)):
        if type(getattr(layer, child)) is not kind:
            found, wanted = escape(getattr(layer, child), 60), kind.__name__
            raise UnsupportedError(f"{name}.{child} is {found}: only {wanted} of model.py has a gradient")


def check_gradient(name: str, part: Any) -> None:
    """UnsupportedError unless the part has a gradient."""
    wanted = ["backward", "learned", *(["saving"] if name.endswith("attention.attention") else [])]
    if missing := [one for one in wanted if not hasattr(part, one)]:
        raise UnsupportedError(
            f"{name} is {escape(part, 60)}: it has no gradient, it lacks {', '.join(missing)}"
        )


def check_first(first: Array, tokens: Array) -> None:
    """ParameterError unless every row of `first` is a row of documents, one behind the other."""
    if first.shape != tokens.shape or not np.issubdtype(first.dtype, np.integer) or not first.size:
        found, wanted = f"{first.dtype} of shape {first.shape}", f"whole numbers of shape {tokens.shape}"
        raise ParameterError(f"first is {found}, it must be {wanted}, at least one")
    begins = first == np.arange(first.shape[1])  # a document begins, or else it goes on
    if not (begins[:, 0].all() and (begins | (first == np.roll(first, 1, axis=1))).all()):
        raise ParameterError("first[b, t] must be the position at which the document of token t begins")


def check_window(window: int | None, positions: Array) -> None:
    """UnsupportedError if a document is longer than the sliding window, which has no gradient here."""
    if window is not None and (longest := int(positions.max()) + 1) > window:
        raise UnsupportedError(
            f"a document has {longest} tokens, and the model a sliding window of {window}: "
            f"training computes documents of up to {window} tokens"
        )


def check_targets(run: Pass, targets: Array, weights: Array) -> None:
    """MismatchError unless each token has a target and a weight."""
    for name, x in (("targets", targets), ("weights", weights)):
        if x.shape != run.tokens.shape:
            raise MismatchError(f"{name} are of shape {x.shape}, the tokens are {run.tokens.shape}")
