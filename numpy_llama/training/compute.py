"""The functions that training computes with, on one backend: NumPy's, or their C twins."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .. import functional as F
from .. import parallel
from ..backend.formats import StoredTensor
from ..config import Array, ModelArgs
from ..learner import Functions, Learner, checkpointing
from ..model import Function, Transformer
from .optimizer import adamw, squares


@dataclass(frozen=True)
class Compute:
    """One backend. `freeze` makes of a weight that does not learn what `linear` takes."""

    backend: str
    linear: Function
    attention: Function
    functions: Functions
    adamw: Callable[..., None]
    squares: Callable[[Array], float]
    freeze: Callable[[StoredTensor], Any]
    frozen_bytes: Callable[[StoredTensor], int]
    threads: int | None = None  # that were asked for

    def learner(
        self, args: ModelArgs, weights: Mapping[str, Any], with_checkpointing: bool, frozen: bool = False
    ) -> Learner:
        """A model whose weights learn in place, or, with `frozen`, only the parts that are put in later."""
        functions = checkpointing(self.functions) if with_checkpointing else self.functions
        return Learner(Transformer(args, weights, self.linear, self.attention), functions, frozen)


def compute_of(backend: str, threads: int | None) -> Compute:
    return c_compute(threads) if backend == "c" else numpy_compute()


def numpy_compute() -> Compute:
    def expanded(w: StoredTensor) -> int:
        return 4 * math.prod(w.shape)

    functions = Functions()
    return Compute(
        "numpy", F.linear, F.attention, functions, adamw, squares, StoredTensor.dequantize, expanded
    )


def c_compute(threads: int | None = None) -> Compute:
    """The C kernels, in float32. A weight that does not learn stays as it is stored.

    By default they have all CPUs, or this rank's share of them.
    """
    from ..backend.kernels import KernelWeight  # only here: NumPy's path runs without the extension
    from ..backend.training import TrainingKernels

    ranks = parallel.ranks()
    kernels = TrainingKernels(ranks.threads() if threads is None and ranks is not None else threads)

    def freeze(w: StoredTensor) -> Any:
        return KernelWeight(w, kernels.threads) if len(w.shape) == 2 else w.dequantize()

    functions = kernels.functions()
    return Compute(
        *("c", kernels.linear, kernels.attention, functions),
        *(kernels.adamw, kernels.squares, freeze, lambda w: w.nbytes),
        threads=threads,
    )
