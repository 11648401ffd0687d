"""What a step minimizes: the loss of some rows as weights of their targets, which `Learner.backward` takes.

    NextToken    weight 1 / n for each trained target; n is their number in the whole step
    DPO          weight beta sigmoid(-u) / n for the targets of the chosen answer, and minus that for the
                 rejected one's; n is the number of pairs in the whole step

A step may take its rows in several micro-batches. n counts all of them, so their gradients simply add up.
"""

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from ..backward import Gradients
from ..config import Array
from ..errors import ParameterError
from ..learner import Learner
from .batch import batch_of, targets
from .examples import Row

Numbers = dict[str, float]


class Objective(Protocol):
    numbers: tuple[str, ...]  # the names of its further numbers

    def size(self, rows: Sequence[Row]) -> int:
        """n of these rows, which are all of a step."""

    def gradients(
        self, learner: Learner, rows: Sequence[Row], n: int, gradients: Gradients
    ) -> tuple[float, Numbers]:
        """Add the gradients of a micro-batch -> its share of the loss, and of further numbers of the step."""

    def loss(self, learner: Learner, rows: Sequence[Row], n: int) -> tuple[float, Numbers]:
        """The same numbers without gradients."""


class NextToken:
    """The mean of -log p(target) over the trained targets: pre-training, and fine-tuning with masks."""

    numbers: tuple[str, ...] = ()

    def size(self, rows: Sequence[Row]) -> int:
        return targets(rows)

    def gradients(
        self, learner: Learner, rows: Sequence[Row], n: int, gradients: Gradients
    ) -> tuple[float, Numbers]:
        batch = batch_of(rows)
        weights = batch.trained / max(n, 1)
        run = learner.forward(batch.tokens, batch.first)
        loss, _ = learner.backward(run, batch.targets, weights, gradients)
        return loss, {}

    def loss(self, learner: Learner, rows: Sequence[Row], n: int) -> tuple[float, Numbers]:
        batch = batch_of(rows)
        run = learner.forward(batch.tokens, batch.first, keep=False)
        found = learner.log_probs(run, batch.targets, batch.trained)
        return float(-found.sum(dtype=np.float64) / max(n, 1)), {}


def dpo(gained: Array, beta: float) -> tuple[Array, Array]:
    """-log sigmoid(u), u = beta (gained[:, 0] - gained[:, 1]), and the weights of the targets of each answer.

    gained = lp - ref of chosen and rejected, (pairs, 2) -> losses (pairs,), weights (pairs, 2).
    """
    u = beta * (gained[:, 0] - gained[:, 1])
    slope = beta * np.exp(-np.logaddexp(0, u))  # beta sigmoid(-u), which cannot overflow
    return np.logaddexp(0, -u), np.stack([slope, -slope], axis=1)


class DPO:
    """-log sigmoid(u), u = beta ((lp - ref) of chosen - (lp - ref) of rejected).

    Rafailov et al. 2023, equation 7. lp is the log-probability of an answer, and ref that of the
    reference: the same model without its adapter.
    """

    numbers: tuple[str, ...] = (  # TRL's names
        *("rewards/chosen", "rewards/rejected"),
        *("rewards/accuracies", "rewards/margins"),
    )

    def __init__(self, reference: Learner, beta: float = 0.1):
        if not 0 < beta < math.inf:
            raise ParameterError(f"beta is {beta}, it must be above 0: it scales every gradient")
        self.reference, self.beta = reference, beta

    def size(self, rows: Sequence[Row]) -> int:
        return len(rows)

    def gradients(
        self, learner: Learner, rows: Sequence[Row], n: int, gradients: Gradients
    ) -> tuple[float, Numbers]:
        batch, reference = batch_of(rows), self._log_probs(self.reference, rows)
        run = learner.forward(batch.tokens, batch.first)
        found = batch.sums(learner.log_probs(run, batch.targets, batch.trained))
        weights, loss, numbers = self._at(found - reference, n)
        learner.backward(run, batch.targets, batch.spread(weights) * batch.trained, gradients)
        return loss, numbers

    def loss(self, learner: Learner, rows: Sequence[Row], n: int) -> tuple[float, Numbers]:
        found = self._log_probs(learner, rows) - self._log_probs(self.reference, rows)
        return self._at(found, n)[1:]

    def _log_probs(self, learner: Learner, rows: Sequence[Row]) -> Array:
        """The log-probability of each answer: chosen, rejected, chosen, ..."""
        batch = batch_of(rows)
        run = learner.forward(batch.tokens, batch.first, keep=False)
        return batch.sums(learner.log_probs(run, batch.targets, batch.trained))

    def _at(self, gained: Array, n: int) -> tuple[Array, float, Numbers]:
        """From lp - ref of each answer: the weight of its targets, the loss, and TRL's numbers."""
        gained = gained.reshape(-1, 2)
        losses, weights = dpo(gained, self.beta)
        rewards = self.beta * gained
        u = rewards[:, 0] - rewards[:, 1]
        sums = (rewards[:, 0].sum(), rewards[:, 1].sum(), (u > 0).sum(), u.sum())
        numbers = {name: float(x) / n for name, x in zip(self.numbers, sums, strict=True)}
        return weights.reshape(-1) / n, float(losses.sum()) / n, numbers
