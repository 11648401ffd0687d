"""benchmarks/validation_loss_against_pytorch.py: both trainers train the same model on the same tokens."""

import math
import random

import pytest
import torch
from helpers.benchmarks import script

STEPS = 4


@pytest.fixture(scope="module")
def race():
    return script("validation_loss_against_pytorch")


def test_both_trainers_do_the_same(race, tmp_path):
    """On one text: the validation losses of a few steps agree, to the last row, which is shorter."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnop", k=rng.randint(2, 6))) for _ in range(200)]
    corpus, out = tmp_path / "corpus.txt", tmp_path / "run"
    corpus.write_text(" ".join(rng.choices(words, k=4_000)))
    loss, seconds = race.ours(corpus, out, 0, STEPS, 1)
    train, valid = race.rows_of_run(corpus, out)
    assert {race.inputs([row]) == race.LENGTH for row in train} == {True, False}
    assert len(train) < race.ROWS * STEPS  # so each row is trained
    model = race.first_model(out, 0)
    with torch.no_grad():
        first = float(race.loss(model, valid))
    theirs, seconds_there = race.theirs(model, train, valid, 0, STEPS)
    assert first == pytest.approx(math.log(512), rel=0.01) and theirs < 0.99 * first
    assert theirs == pytest.approx(loss, abs=2e-5) and min(seconds, seconds_there) > 0
