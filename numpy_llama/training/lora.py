"""LoRA as a part that learns: a frozen weight and two small matrices (Hu et al. 2021, section 4.1).

y = W x + scale * B A x       A (r, IN) begins at random, B (OUT, r) at 0: at first the model is unchanged
scale = alpha / r, or alpha / sqrt(r) (rank-stabilized, Kalajdzievski 2023)
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np

from ..backward import Gradients
from ..checkpoint.names import LAYER, expected_shape
from ..config import Array, ModelArgs
from ..errors import ParameterError, escape
from ..learner import FrozenLinear, Functions, Learner
from ..lora import LoRALinear, LowRank

# Each matrix of a layer by the name that PEFT uses: {"q_proj": "attention.wq", ...}.
TARGETS = {row[2].rpartition(".")[2]: row[0] for row in LAYER if len(row[-1]) == 2}


@dataclass(frozen=True)
class LoRA:
    """The adapter: its rank, alpha, kind of scale, and the matrices that it stands beside."""

    rank: int
    alpha: float
    rslora: bool
    targets: Sequence[str]

    def __post_init__(self) -> None:
        if not 0 < self.alpha < math.inf:
            raise ParameterError(f"alpha is {self.alpha}, it must be above 0: it scales what is learnt")
        checked_targets(self.targets)

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, self.rslora)


class TrainedLoRA(LoRALinear):
    """LoRALinear whose A and B learn. The base does not, so its weight may be quantized."""

    learned = ("lora_a", "lora_b")

    def __init__(self, base: FrozenLinear, lora_a: Array, lora_b: Array, scale: float, functions: Functions):
        super().__init__(base, lora_a, lora_b, scale)
        self.functions = functions

    def __call__(self, x: Array) -> Array:
        return self.functions.add_lora(self.base(x), x, self.lora_a, self.lora_b, self.scale)

    def backward(self, dy: Array, x: Array) -> tuple[Array, Gradients]:
        """lora.lora_backward adds to the dx of the base."""
        dx, _ = self.base.backward(dy, x)
        dx, da, db = self.functions.lora_backward(dx, dy, x, self.lora_a, self.lora_b, self.scale)
        return dx, {"lora_a": da, "lora_b": db}


def scale_of(rank: int, alpha: float, rslora: bool = False) -> float:
    return alpha / math.sqrt(rank) if rslora else alpha / rank


def checked_targets(targets: Sequence[str]) -> list[str]:
    """Our names of these matrices of a layer, by PEFT's names. ParameterError if there is no such matrix."""
    if not targets:
        raise ParameterError(f"targets is empty, wanted names among {', '.join(TARGETS)}")
    if unknown := [name for name in targets if name not in TARGETS]:
        found = escape(unknown[0], 60)
        raise ParameterError(f"targets has {found}, wanted names among {', '.join(TARGETS)}")
    return [TARGETS[name] for name in dict.fromkeys(targets)]


def lora_count(args: ModelArgs, targets: Sequence[str], rank: int) -> int:
    """How many numbers A and B have, in all layers."""
    return args.n_layers * rank * sum(map(sum, _shapes(args, targets)))


def highest_rank(args: ModelArgs, targets: Sequence[str]) -> int:
    """The highest rank of these matrices: B A with a higher one can be no other matrix."""
    return max(map(min, _shapes(args, targets)))


def _shapes(args: ModelArgs, targets: Sequence[str]) -> list[tuple[int, ...]]:
    return [expected_shape(f"layers.0.{name}.weight", args) for name in checked_targets(targets)]


def with_lora(
    learner: Learner, targets: Sequence[str], rank: int, scale: float, seed: int = 0, dtype: Any = np.float32
) -> Learner:
    """A frozen learner with LoRA beside these matrices of each layer, by PEFT's names.

    A is drawn as PEFT draws it, uniformly within 1 / sqrt(IN). B is 0.
    """
    names = checked_targets(targets)
    rng, parts = np.random.default_rng(seed), dict[str, Any]()
    for i, layer in enumerate(learner.layers):
        for name in names:
            base = attrgetter(name)(layer)
            OUT, IN = base.weight.shape
            a = rng.uniform(-(IN**-0.5), IN**-0.5, (rank, IN)).astype(dtype)
            b = np.zeros((OUT, rank), dtype)
            parts[f"layers.{i}.{name}"] = TrainedLoRA(base, a, b, scale, learner.functions)
    return learner.with_parts(parts)  # type: ignore[return-value]  # a copy of its own class


def low_ranks(learner: Learner) -> dict[str, LowRank]:
    """What the adapter's files hold: A, B and the scale of each weight, by our name of the weight."""
    parts = {name.removesuffix(".lora_a") for name in learner.parameters() if name.endswith(".lora_a")}
    found = {}
    for i, layer in enumerate(learner.layers):
        for ours in TARGETS.values():
            if (name := f"layers.{i}.{ours}") in parts:
                part = attrgetter(ours)(layer)
                found[f"{name}.weight"] = LowRank(part.lora_a, part.lora_b, part.scale)
    return found
