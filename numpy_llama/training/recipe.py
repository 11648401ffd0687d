"""What a run learns, and how: each rank of the run makes its trainer from the same recipe."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from ..config import ModelArgs
from .compute import Compute
from .examples import Row
from .lora import LoRA, with_lora
from .objectives import DPO, NextToken, Objective
from .optimizer import AdamW, Hyperparameters
from .order import Order
from .plan import TrainingPlan
from .trainer import Schedule, Trainer

SomeTrainer = TypeVar("SomeTrainer", bound=Trainer)


@dataclass(frozen=True)
class Recipe:
    """All of a trainer but its numbers and its data."""

    args: ModelArgs
    plan: TrainingPlan
    hyperparameters: Hyperparameters
    schedule: Schedule
    lora: LoRA | None = None  # None: all weights learn
    beta: float | None = None  # of DPO; None: the next token is learnt
    seed: int = 0  # of A

    def trainer(
        self,
        compute: Compute,
        weights: Mapping[str, Any],
        rows: Sequence[Row],
        order: Order,
        kind: Callable[..., SomeTrainer],
    ) -> SomeTrainer:
        """A trainer of that kind, whose weights learn in place, or A and B beside them."""
        learner = reference = compute.learner(
            self.args, weights, self.plan.checkpointing, frozen=self.lora is not None
        )
        if self.lora is not None:
            learner = with_lora(reference, self.lora.targets, self.lora.rank, self.lora.scale, self.seed)
        objective: Objective = NextToken() if self.beta is None else DPO(reference, self.beta)
        optimizer = AdamW(learner.parameters(), self.hyperparameters, compute.adamw)
        how = objective, self.schedule, self.plan.most_tokens, compute.squares, self.plan.n_ranks
        return kind(learner, optimizer, rows, order, *how)
