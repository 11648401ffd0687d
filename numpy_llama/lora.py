"""LoRA: a weight W is used as W + scale * B A, where A and B are small and W stays as it is.

Hu et al. 2021, section 4.1. W is (OUT, IN), A is (r, IN), B is (OUT, r), and the rank r is much smaller than
both. The parts stand beside a model's own parts and come in through `Transformer.with_parts`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from . import functional as F
from .backward import linear_dw
from .config import Array
from .model import Function, Transformer


class LowRank(NamedTuple):
    """The update of one weight. The rows of `b` are in the model's order."""

    a: Array  # (r, IN)
    b: Array  # (OUT, r)
    scale: float

    def delta(self, rows: slice | Array = slice(None)) -> Array:
        """scale * B A, or some rows of it: -> (OUT, IN)."""
        return np.float32(self.scale) * self.b[rows] @ self.a


def add_lora(y: Array, x: Array, a: Array, b: Array, scale: float) -> Array:
    """y += scale (x A^T) B^T, in place. (..., OUT), (..., IN), (r, IN), (OUT, r) -> y."""
    y += scale * (x @ a.T) @ b.T
    return y


def lora_backward(
    dx: Array, dy: Array, x: Array, a: Array, b: Array, scale: float
) -> tuple[Array, Array, Array]:
    """z = scale x A^T, dz = scale dy B: dx += dz A in place, dA = dz^T x, dB = dy^T z. -> dx, dA, dB."""
    z, dz = scale * (x @ a.T), scale * (dy @ b)
    dx += dz @ a
    return dx, linear_dw(dz, x), linear_dw(dy, z)


class LoRALinear:
    """y = base(x) + scale * (x A^T) B^T. `linear` is the function that takes A and B as they are."""

    def __init__(self, base: Any, lora_a: Any, lora_b: Any, scale: float = 1.0, linear: Function = F.linear):
        self.base, self.lora_a, self.lora_b, self.scale, self.linear = base, lora_a, lora_b, scale, linear

    @property
    def weight(self) -> Any:
        """The weight of the base, without the update."""
        return self.base.weight

    def __call__(self, x: Array) -> Array:
        low = self.linear(x, self.lora_a)  # (..., IN) -> (..., r)
        return self.base(x) + self.scale * self.linear(low, self.lora_b)  # (..., OUT)


class LoRAEmbedding:
    """Row i of the table is W[i] + scale * B[i] A: A is (r, D), B is (V, r)."""

    def __init__(self, base: Any, lora_a: Array, lora_b: Array, scale: float = 1.0):
        self.base, self.lora_a, self.lora_b, self.scale = base, lora_a, lora_b, scale

    def __len__(self) -> int:
        return len(self.base)

    def __getitem__(self, index: Any) -> Array:
        return self.base[index] + self.scale * self.lora_b[index] @ self.lora_a


def stacked(updates: Sequence[LowRank]) -> LowRank:
    """The sum of several updates of one weight, as one of the sum of their ranks."""
    if len(updates) == 1:
        return updates[0]
    a = np.concatenate([one.a for one in updates])
    return LowRank(a, np.concatenate([np.float32(one.scale) * one.b for one in updates], axis=1), 1.0)


def by_weight(adapters: Sequence[Mapping[str, LowRank]]) -> dict[str, LowRank]:
    """The updates of all adapters together, by the name of the weight."""
    names = dict.fromkeys(name for adapter in adapters for name in adapter)
    return {name: stacked([one[name] for one in adapters if name in one]) for name in names}


def adapted(
    model: Transformer,
    adapters: Sequence[Mapping[str, LowRank]],
    weight: Callable[[Array], Any] = lambda x: x,
    linear: Function = F.linear,
) -> Transformer:
    """The same model with these adapters. `weight` makes of an array what `linear` takes."""
    parts: dict[str, Any] = {}
    for name, (a, b, scale) in by_weight(adapters).items():
        part = name.removesuffix(".weight")
        if part == "tok_embeddings":
            dtype = model.norm.weight.dtype
            parts[part] = LoRAEmbedding(model.tok_embeddings, a.astype(dtype), b.astype(dtype), scale)
            continue
        base: Any = model
        for step in part.split("."):
            base = base[int(step)] if isinstance(base, list) else getattr(base, step)
        parts[part] = LoRALinear(base, weight(a), weight(b), scale, linear)
    return model.with_parts(parts) if parts else model
