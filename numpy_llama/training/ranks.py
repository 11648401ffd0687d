"""Training on several ranks: each computes whole micro-batches, and the bits are those of one process.

    micro-batch        0      1      2      3      4
    computed by rank   0      1      2      0      1          of three, in two rounds
    gradients        (((g0  +  g1) +  g2) +  g3) +  g4        in this order, as in trainer.py

Rank 0 has the run: its data and its folder. It sends the rows of a step to the others, and all ranks run the
same method of their trainers. After a round each rank receives a part of every gradient from the others, and
adds up this part. After the last round the parts are gathered. Then every rank clips and runs AdamW on all
numbers, so rank 0 has the whole state. Another number of ranks continues it with the same bits.
"""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .. import parallel
from ..backward import Gradients
from ..checkpoint import open_checkpoint
from ..checkpoint.base import Checkpoint
from ..checkpoint.memory import available_memory
from ..config import Array
from ..errors import NumpyLlamaError
from ..parallel.cut import Cuts, cut, widths
from ..parallel.load import check_alike, facts, program
from ..parallel.ranks import Ranks, Result, Stopped
from .compute import Compute, compute_of
from .examples import Row
from .models import frozen_weights
from .objectives import Numbers
from .order import Order
from .recipe import Recipe
from .state import arrays
from .trainer import Computed, NotFiniteError, Step, Trainer

PIECE = 1 << 22  # numbers of a gradient that are exchanged at once
Shapes = dict[str, tuple[str, tuple[int, ...]]]


class ParallelTrainer(Trainer):
    """The trainer of a rank. A step and an evaluation on rank 0 run on all."""

    def __init__(self, ranks: Ranks, number: int, *arguments: Any):
        super().__init__(*arguments)
        self.ranks, self.number = ranks, number
        self.is_shared = False  # on rank 0: the others have its numbers, which may be those of a saved run

    def take(self, rows: Sequence[Row]) -> Step:
        return self._on_all(Trainer.take, rows)

    def evaluate(self, rows: Sequence[Row]) -> tuple[float, Numbers]:
        return self._on_all(Trainer.evaluate, rows)

    def _on_all(self, method: Callable[..., Result], *arguments: Any) -> Result:
        """On rank 0: run a method on all ranks. After a signal they leave it before the next round."""
        if not self.is_shared:
            self.is_shared = True
            self._on_all(ParallelTrainer.take_over, self.optimizer.t)
        error: NotFiniteError | None = None
        while error is None:  # again, if the signal ends nothing: a terminal was closed, and nohup ignores it
            with self.ranks.together("call", _follow, self.number, method, *arguments):
                try:
                    return method(self, *arguments)
                except NotFiniteError as found:  # all ranks have the same numbers, so each ends here
                    error = found
        raise error

    def take_over(self, t: int) -> None:
        """On every rank: rank 0's parameters and, after t steps, its moments."""
        self.optimizer.t = t
        for name, x in arrays(self.optimizer):
            if t or name.startswith("parameter/"):
                self.ranks.broadcast(x)

    def _computed(
        self, groups: Sequence[list[Row]], n: int, gradients: Gradients | None
    ) -> Iterator[Computed]:
        ranks, sums = self.ranks, dict[tuple[str, int], Array]()
        for begin in range(0, len(groups), ranks.size):
            ranks.stop_if_asked()
            now, own = groups[begin : begin + ranks.size], None if gradients is None else Gradients()
            found = self._compute(now[ranks.rank], n, own) if ranks.rank < len(now) else None
            shares = [share for share in ranks.exchange(found) if share is not None]
            for group, share in zip(now, shares, strict=True):
                yield group, *share
            if own is not None:
                self._add(sums, own, len(now))
        if gradients is not None:
            gradients.update(self._gathered(sums))

    def _add(self, sums: dict[tuple[str, int], Array], own: Gradients, senders: int) -> None:
        """Add this rank's part of the gradients of the first ranks, in their order. `own` is emptied."""
        for name, p in self.optimizer.parameters.items():
            gradient = own.pop(name).reshape(-1) if own else np.empty(p.size, p.dtype)
            for at in range(0, p.size, PIECE):
                piece = gradient[at : at + PIECE]
                for part in self.ranks.parts(piece, self._cut(piece), senders):
                    if (name, at) in sums:
                        sums[name, at] += part
                    else:
                        sums[name, at] = part.copy()

    def _gathered(self, sums: dict[tuple[str, int], Array]) -> Iterator[tuple[str, Array]]:
        """All parts of each gradient. `sums` is emptied."""
        for name, p in self.optimizer.parameters.items():
            whole = np.empty(p.size, p.dtype)
            for at in range(0, p.size, PIECE):
                piece = whole[at : at + PIECE]
                cuts = self._cut(piece)
                piece[cuts[self.ranks.rank]] = sums.pop((name, at))
                self.ranks.gather_in_place(piece, [width * p.itemsize for width in widths(cuts)])
            yield name, whole.reshape(p.shape)

    def _cut(self, piece: Array) -> Cuts:
        """The part of each rank."""
        return cut(piece.size, [1] * self.ranks.size)


# The trainers of the other ranks, by the numbers that rank 0 gave them.
_trainers: dict[int, ParallelTrainer] = {}


def trainer_of(
    recipe: Recipe,
    compute: Compute,
    weights: Mapping[str, Any],
    rows: Sequence[Row],
    order: Order,
    source: Checkpoint | None = None,
) -> Trainer:
    """The trainer of a run, in one process or on rank 0 of several. `source` has the frozen weights."""
    if (ranks := parallel.ranks()) is None:
        return recipe.trainer(compute, weights, rows, order, Trainer)
    number, shapes = ranks.new_number(), None if source is not None else _shapes(weights)
    how = number, recipe, compute.backend, compute.threads, source and source.path, shapes
    with ranks.together("call", _begin, *how, passing=NumpyLlamaError):
        _checked(ranks, compute.backend, lambda: source)
        trainer = ranks.everywhere(
            lambda: recipe.trainer(compute, weights, rows, order, partial(ParallelTrainer, ranks, number))
        )
    weakref.finalize(trainer, ranks.forgotten.append, ("call", _forget, number)).atexit = False
    return trainer


def least_memory(available: int) -> int:
    """The least memory that a rank has, where this process has `available` bytes."""
    if (ranks := parallel.ranks()) is None:
        return available
    with ranks.together("call", _memory):
        return min(ranks.exchange(available // ranks.local))


def n_ranks() -> int:
    """The number of ranks; 1 in one process."""
    ranks = parallel.ranks()
    return 1 if ranks is None else ranks.size


def _checked(ranks: Ranks, backend: str, opened: Callable[[], Checkpoint | None]) -> Checkpoint | None:
    """The checkpoint of the frozen weights. MismatchError unless all ranks have the same, and the program."""
    source = ranks.everywhere(opened)
    own = ranks.everywhere(lambda: {} if source is None else facts(source, backend))
    check_alike(ranks, program("numpy") | program(backend) | own)
    return source


def _shapes(weights: Mapping[str, Array]) -> Shapes:
    """Each weight with its shape, and the first name of its array."""
    first = dict[int, str]()
    return {name: (first.setdefault(id(w), name), w.shape) for name, w in weights.items()}


# --- the other ranks ---------------------------------------------------------------------------------------


def _begin(
    ranks: Ranks,
    number: int,
    recipe: Recipe,
    backend: str,
    threads: int | None,
    path: Path | None,
    shapes: Shapes | None,
) -> None:
    """Make the trainer of this rank. Rank 0 sends the rows of each step, and the numbers before the first."""

    def trainer() -> ParallelTrainer:
        compute, kind = compute_of(backend, threads), partial(ParallelTrainer, ranks, number)
        if source is not None:
            source.watch()
            weights = frozen_weights(source.weights(), compute)
        else:
            made = {name: np.zeros(shape, np.float32) for name, shape in (shapes or {}).values()}
            weights = {name: made[first] for name, (first, _) in (shapes or {}).items()}
        return recipe.trainer(compute, weights, (), Order(1, 1), kind)

    with suppress(NumpyLlamaError):  # it is raised on rank 0 too
        source = _checked(ranks, backend, lambda: None if path is None else open_checkpoint(path))
        _trainers[number] = ranks.everywhere(trainer)


def _follow(ranks: Ranks, number: int, method: Callable[..., Any], *arguments: Any) -> None:
    with suppress(NotFiniteError, Stopped):  # as on rank 0
        method(_trainers[number], *arguments)


def _forget(ranks: Ranks, number: int) -> None:
    _trainers.pop(number, None)


def _memory(ranks: Ranks) -> None:
    ranks.exchange(available_memory() // ranks.local)
