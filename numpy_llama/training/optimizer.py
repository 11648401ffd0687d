"""AdamW, its learning rate at each step, and the clipping of gradients.

    m = beta1 m + (1 - beta1) g                  v = beta2 v + (1 - beta2) g^2
    p = p - lr weight_decay p - lr m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps)

Loshchilov & Hutter 2019, algorithm 2; t counts from 1. Matrices decay, vectors (the norms) do not.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np

from ..config import Array
from ..errors import ParameterError

PIECE = 1 << 16  # numbers that are updated at once: they and their temporary arrays stay in the cache


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of AdamW that do not change during a run. `lr` is the highest learning rate."""

    lr: float
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    max_norm: float = 1.0  # of the gradients; 0 clips nothing

    def __post_init__(self) -> None:
        for name, least, below in (
            *(("lr", 0.0, math.inf), ("beta1", 0.0, 1.0), ("beta2", 0.0, 1.0)),
            *(("eps", 0.0, math.inf), ("weight_decay", 0.0, math.inf), ("max_norm", 0.0, math.inf)),
        ):
            value = getattr(self, name)
            if not least <= value < below:
                raise ParameterError(f"{name} is {value}, it must be at least {least:g} and below {below:g}")


def adamw(
    p: Array, g: Array, m: Array, v: Array, t: int, lr: float, weight_decay: float, h: Hyperparameters
) -> None:
    """Step t of AdamW for one parameter. p, m and v are changed in place."""
    rate, scale = lr / (1 - h.beta1**t), 1 / (1 - h.beta2**t)
    for p_, g_, m_, v_ in zip(*map(_pieces, (p, g, m, v)), strict=True):
        m_ *= h.beta1
        m_ += (1 - h.beta1) * g_
        v_ *= h.beta2
        v_ += (1 - h.beta2) * g_ * g_
        p_ *= 1 - lr * weight_decay
        p_ -= rate * m_ / (np.sqrt(scale * v_) + h.eps)


def _pieces(x: Array) -> list[Array]:
    flat = x.reshape(-1) if x.flags.c_contiguous else None
    if flat is None:
        raise ParameterError(f"an array of strides {x.strides} cannot be updated in place")
    return [flat[i : i + PIECE] for i in range(0, len(flat), PIECE)]


class AdamW:
    """The parameters of a run with their moments m and v. `t` steps were made."""

    def __init__(
        self,
        parameters: Mapping[str, Array],
        hyperparameters: Hyperparameters,
        update: Callable[..., None] = adamw,
    ):
        """`update` is `adamw` or its C twin."""
        self.parameters, self.hyperparameters, self.update = parameters, hyperparameters, update
        self.m = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.v = {name: np.zeros_like(p) for name, p in parameters.items()}
        self.t = 0

    def step(self, gradients: Mapping[str, Array], lr: float) -> None:
        """One step with this learning rate. `gradients` has an array for each parameter."""
        h, self.t = self.hyperparameters, self.t + 1
        for name, p in self.parameters.items():
            decay = h.weight_decay if p.ndim == 2 else 0.0
            self.update(p, gradients[name], self.m[name], self.v[name], self.t, lr, decay, h)


def learning_rate(step: int, steps: int, highest: float, warmup: int = 0, lowest: float = 0.0) -> float:
    """The learning rate of step 0, 1, ...: a linear warm-up, then a cosine from `highest` to `lowest`.

    Loshchilov & Hutter 2017. The first step of a warm-up has 1 / warmup of `highest`, not 0.
    """
    if step < warmup:
        return highest * (step + 1) / warmup
    share = min((step - warmup) / max(1, steps - warmup), 1.0)
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * share)) / 2


def squares(x: Array) -> float:
    """The sum of x^2, in float64."""
    return math.fsum(float(np.square(piece, dtype=np.float64).sum()) for piece in _pieces(x))


def norm(gradients: Iterable[Array], squares: Callable[[Array], float] = squares) -> float:
    """The length of all gradients together, as one vector. `squares` is the function above or its C twin."""
    return math.sqrt(math.fsum(map(squares, gradients)))


def clip(
    gradients: Mapping[str, Array], max_norm: float, squares: Callable[[Array], float] = squares
) -> float:
    """Scale the gradients in place by min(1, max_norm / (norm + 1e-6)) -> the norm before (Pascanu 2013).

    max_norm 0 changes nothing, and a norm that is not finite is only returned.
    """
    length = norm(gradients.values(), squares)
    if max_norm and max_norm < length + 1e-6 < math.inf:
        for gradient in gradients.values():
            gradient *= max_norm / (length + 1e-6)
    return length
