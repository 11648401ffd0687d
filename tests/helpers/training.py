"""Tiny learners, rows of random examples, and a tiny run."""

import itertools
from pathlib import Path

import numpy as np
from hypothesis import settings

from numpy_llama.config import ModelArgs
from numpy_llama.learner import Learner
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import TINY, random_weights
from numpy_llama.training.compute import Compute, numpy_compute
from numpy_llama.training.data import read_data
from numpy_llama.training.examples import Example, Row
from numpy_llama.training.models import new_args
from numpy_llama.training.optimizer import Hyperparameters
from numpy_llama.training.pretrain import pretrain
from numpy_llama.training.run import Run, open_folder
from numpy_llama.training.trainer import Schedule

# Each example of these tests computes a model several times.
some = settings(max_examples=max(settings().max_examples // 8, 4))


def tiny_learner(seed: int = 0, dtype=np.float64, frozen: bool = False, args: ModelArgs = TINY) -> Learner:
    weights = random_weights(np.random.default_rng(seed), args, dtype)
    weights["output.weight"] = weights["tok_embeddings.weight"]
    return Learner(Transformer(args, weights), frozen=frozen)


def random_example(rng: np.random.Generator, most: int = 12, vocab_size: int = TINY.vocab_size) -> Example:
    """Up to `most` inputs. Some of the targets are trained, perhaps none."""
    n = int(rng.integers(1, most + 1))
    return Example(
        rng.integers(vocab_size, size=n + 1), rng.random(n) < rng.choice([0.0, 0.5, 1.0]), f"line {n}"
    )


def random_rows(rng: np.random.Generator, n: int, most: int = 12) -> list[Row]:
    """Rows of one to three examples, of which at least one target is trained."""
    rows = [tuple(random_example(rng, most) for _ in range(rng.integers(1, 4))) for _ in range(n)]
    whole = Example(rng.integers(TINY.vocab_size, size=4), np.ones(3, bool), "whole")
    return [*rows[:-1], (whole,)]


WORDS = [("quick", "old", "tiny"), ("dog", "crow", "cat"), ("red", "lazy", "big")]
CORPUS = "".join(
    f"The {a} {b} sees a {c} fox, number {i}.\n" for i, (a, b, c) in enumerate(itertools.product(*WORDS))
)
STEPS = 6


def begin(
    out: Path,
    corpus: Path,
    resume: bool = False,
    steps: int = STEPS,
    dim: int = 16,
    layers: int = 2,
    compute: Compute | None = None,
    **options,
) -> Run:
    """A run that pre-trains a tiny model. Its folder is not kept open: only one process trains in it."""

    def shape(vocab_size: int) -> ModelArgs:
        return new_args(dim, layers, 2, 1, vocab_size, 24)

    options = {"vocab_size": 300, "seq_len": 24, "batch_size": 4, "seed": 3} | options
    how = Hyperparameters(1e-2), Schedule(steps, 2)
    with open_folder(out, resume) as folder:
        return pretrain(read_data(corpus), folder, shape, compute or numpy_compute(), *how, **options)[0]


def finish(run: Run, **options) -> None:
    run.run(lambda report: None, **{"eval_every": 2, "save_every": 2} | options)
