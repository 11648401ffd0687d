"""A run: step by step, the gradients of its rows, clipping, AdamW.

    for each step:  rows from order.py -> micro-batches -> gradients, added up -> clip -> AdamW

The order of sums: the gradients of a micro-batch are computed by themselves, and then added to the sum of
those before it. ranks.py keeps this order.

A run is a function of its options alone. It stops with an error if a loss is not finite. While AdamW changes
the numbers, a signal such as Ctrl-C waits: so they are whole whenever a run is interrupted.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..backend.signals import delayed_signals
from ..backward import Gradients
from ..config import Array
from ..errors import NumericsError
from ..learner import Learner
from .batch import inputs, micro_batches, targets
from .examples import Row
from .objectives import Numbers, Objective
from .optimizer import AdamW, clip, learning_rate, squares
from .order import Order

Computed = tuple[list[Row], float, Numbers]  # a micro-batch, its share of the loss and of further numbers


@dataclass(frozen=True)
class Schedule:
    """The learning rate over a run: `steps` steps, of which the first `warmup` rise. It falls to 0."""

    steps: int
    warmup: int = 0


@dataclass(frozen=True)
class Step:
    """The numbers of a step. `number` counts from 1."""

    number: int
    loss: float
    lr: float
    norm: float  # of the gradients before clipping
    tokens: int  # inputs
    targets: int  # that were trained
    seconds: float
    numbers: Numbers = field(default_factory=dict)  # of the objective


class NotFiniteError(NumericsError):
    """The loss or the gradients of a step are NaN or infinite. All ranks have these sums, and raise it."""


class Trainer:
    """A run in memory. `optimizer.t` is the number of steps that were made."""

    def __init__(
        self,
        learner: Learner,
        optimizer: AdamW,
        rows: Sequence[Row],
        order: Order,
        objective: Objective,
        schedule: Schedule,
        most_tokens: int,
        squares: Callable[[Array], float] = squares,
        n_ranks: int = 1,
    ):
        """`most_tokens`: inputs of a micro-batch, unless one row has more. `squares`: of optimizer.norm.

        `n_ranks`: the ranks that the micro-batches are cut for, however many compute them.
        """
        self.learner, self.optimizer, self.objective = learner, optimizer, objective
        self.rows, self.order, self.schedule = rows, order, schedule
        self.most_tokens, self.squares, self.n_ranks = most_tokens, squares, n_ranks
        self.made: Step | None = None  # the newest step, also if a signal ended the program just after it

    def steps(self) -> Iterator[Step]:
        """All steps up to the end of the schedule, one by one."""
        while self.optimizer.t < self.schedule.steps:
            yield self.step()

    def step(self) -> Step:
        """One step. NotFiniteError if the loss is not finite; the parameters stay as they are then."""
        return self.take([self.rows[i] for i in self.order(self.optimizer.t)])

    def take(self, rows: Sequence[Row]) -> Step:
        """A step on these rows."""
        began, at = time.perf_counter(), self.optimizer.t
        h, s = self.optimizer.hyperparameters, self.schedule
        gradients = Gradients()
        loss, numbers = self._sum(rows, gradients)
        norm = clip(gradients, h.max_norm, self.squares)
        self._check_finite(norm, "the length of the gradients", rows)
        lr = learning_rate(at, s.steps, h.lr, s.warmup)
        with delayed_signals():
            self.optimizer.step(gradients, lr)
            seconds = time.perf_counter() - began
            made = Step(at + 1, loss, lr, norm, inputs(rows), targets(rows), seconds, numbers)
            self.made = made
        return made

    def evaluate(self, rows: Sequence[Row]) -> tuple[float, Numbers]:
        """The loss and the further numbers of these rows, which are not trained."""
        return self._sum(rows)

    def _sum(self, rows: Sequence[Row], gradients: Gradients | None = None) -> tuple[float, Numbers]:
        """The loss and the further numbers of all micro-batches, added up, and their gradients if wanted."""
        n, loss, numbers = self.objective.size(rows), 0.0, Numbers()
        groups = micro_batches(rows, self.most_tokens, self.n_ranks)
        for group, share, more in self._computed(groups, n, gradients):
            if gradients is not None:
                self._check_finite(share, "the loss", group)
            loss += share
            numbers = {name: numbers.get(name, 0.0) + x for name, x in more.items()}
        return loss, numbers

    def _computed(
        self, groups: Sequence[list[Row]], n: int, gradients: Gradients | None
    ) -> Iterator[Computed]:
        """Each micro-batch with its share of the loss and of further numbers. Gradients are added up."""
        for group in groups:
            yield group, *self._compute(group, n, gradients)

    def _compute(self, group: Sequence[Row], n: int, gradients: Gradients | None) -> tuple[float, Numbers]:
        """One micro-batch. Its gradients are added to `gradients`."""
        with np.errstate(over="ignore", invalid="ignore", divide="ignore"):  # the sum is checked
            if gradients is None:
                return self.objective.loss(self.learner, group, n)
            return self.objective.gradients(self.learner, group, n, gradients)

    def _check_finite(self, x: float, what: str, rows: Sequence[Row]) -> None:
        if not math.isfinite(x):
            places = list(dict.fromkeys(example.where for row in rows for example in row))
            shown = "; ".join(places[:4]) + (f"; and {len(places) - 4} more" if len(places) > 4 else "")
            raise NotFiniteError(
                f"step {self.optimizer.t + 1}: {what} is {x}, on {shown}; "
                "look at these examples, or begin again with a lower --lr"
            )
