"""benchmarks/contestants.py: both sides of the race of training do the same work."""

import math

import pytest
from helpers.benchmarks import script

SHAPE = [16, 2, 4, 2, 8, 24, 40]  # dim, layers, heads, kv heads, head_dim, hidden_dim, vocabulary


@pytest.fixture(scope="module")
def contestants():
    return script("contestants")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, when peft asks it
@pytest.mark.parametrize("lora", [False, True])
def test_both_train_as_many_numbers(contestants, lora):
    ours = contestants.Training(SHAPE, 2, 9, lora, 1)
    theirs = contestants.PyTorch(SHAPE, 2, 9, lora, 1)
    learned = sum(p.size for p in ours.trainer.optimizer.parameters.values())
    assert learned == sum(p.numel() for p in theirs.parameters)
    assert min(ours.step(), theirs.step()) > 0 and ours.trainer.optimizer.t == 1


def test_the_operations_of_a_step(contestants):
    """6 for each weight and token, and 14 for each number of a head and visible pair."""
    layer = 16 * 32 * 2 + 16 * 16 * 2 + 3 * 16 * 24
    pairs = 2 * math.comb(10, 2)
    wanted = 6 * 2 * 9 * (2 * layer + 16 * 40) + 14 * pairs * 2 * 4 * 8
    assert contestants.Training(SHAPE, 2, 9, False, 1).operations() == wanted
