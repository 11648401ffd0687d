"""benchmarks/contestants.py: both sides of the race of training do the same work."""

import math

import pytest
from helpers.benchmarks import script

SHAPE = [32, 2, 4, 2, 8, 64, 40]  # dim, layers, heads, kv heads, head_dim, hidden_dim, vocabulary


@pytest.fixture(scope="module")
def contestants():
    return script("contestants")


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of transformers, when peft asks it
@pytest.mark.parametrize("base, dtype", [(None, "float32"), ("F32", "float32"), ("F32", "bfloat16")])
def test_both_train_as_many_numbers(contestants, base, dtype):
    ours = contestants.Training(SHAPE, 2, 9, base, 1)
    theirs = contestants.PyTorch(SHAPE, 2, 9, base, 1, dtype)
    learned = sum(p.size for p in ours.trainer.optimizer.parameters.values())
    assert learned == sum(p.numel() for p in theirs.parameters)
    assert min(ours.step(), theirs.step()) > 0 and ours.trainer.optimizer.t == 1


def test_a_base_of_4_bits(contestants):
    """Its matrices stay as they are stored, and as many numbers learn as with a base in float32."""
    in_4_bits, in_full = (contestants.Training(SHAPE, 2, 9, base, 1).trainer for base in ("Q4_0", "F32"))
    learned = [[p.shape for p in one.optimizer.parameters.values()] for one in (in_4_bits, in_full)]
    assert learned[0] == learned[1]
    model = in_4_bits.learner
    assert model.layers[1].feed_forward.w_down.base.weight.format.name == "Q4_0"
    assert model.output.weight is model.tok_embeddings
    assert in_4_bits.step().norm > 0


def test_the_operations_of_a_step(contestants):
    """6 for each weight and token, and 14 for each number of a head and visible pair."""
    layer = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64
    pairs = 2 * math.comb(10, 2)
    wanted = 6 * 2 * 9 * (2 * layer + 32 * 40) + 14 * pairs * 2 * 4 * 8
    assert contestants.Training(SHAPE, 2, 9, None, 1).operations() == wanted
