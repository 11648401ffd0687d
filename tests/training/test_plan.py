"""The plan of memory against what a step takes, and the operations against a count by hand."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers.training import tiny_learner

from numpy_llama import backward
from numpy_llama.backend import training
from numpy_llama.checkpoint.memory import PYTHON
from numpy_llama.errors import ResourceLimitError
from numpy_llama.learner import Learner, checkpointing
from numpy_llama.proof.tiny import TINY
from numpy_llama.training.examples import Example
from numpy_llama.training.objectives import NextToken
from numpy_llama.training.optimizer import AdamW, Hyperparameters
from numpy_llama.training.order import Order
from numpy_llama.training.plan import SHARE, Work, largest, training_plan
from numpy_llama.training.state import State, save_state
from numpy_llama.training.trainer import Schedule, Trainer

ARGS = replace(
    TINY, dim=64, n_layers=4, n_heads=4, head_dim=16, hidden_dim=192, vocab_size=512, max_seq_len=256
)
ENOUGH = 1 << 40


def plan_of(learner, seq_len, tokens, available=ENOUGH):
    learned = sum(p.size for p in learner.parameters().values())
    return training_plan(learner.args, 4 * learned, learned, seq_len, tokens, available, "the model")


def rows_of_length(n: int, count: int):
    rng = np.random.default_rng(0)
    return [(Example(rng.integers(512, size=n + 1), np.ones(n, bool), "here"),) for _ in range(count)]


@pytest.mark.parametrize("with_checkpointing", [False, True])
def test_a_step_takes_no_more_memory_than_planned(with_checkpointing):
    """And no less than a quarter of it: a plan that is too careful would refuse what fits."""
    learner = tiny_learner(dtype=np.float32, args=ARGS)
    plan = plan_of(learner, 64, 256)
    if with_checkpointing:
        learner = Learner(learner, checkpointing(learner.functions))
        smallest = plan.weights + plan.learning + plan.scratch + 1
        while True:
            try:
                plan = plan_of(learner, 256, 256, int(smallest))
                break
            except ResourceLimitError:
                smallest *= 1.02
    assert plan.checkpointing == with_checkpointing and plan.most_tokens == 256
    tracemalloc.start()
    try:
        optimizer = AdamW(learner.parameters(), Hyperparameters(1e-3))
        rows = rows_of_length(64, 4)
        trainer = Trainer(learner, optimizer, rows, Order(4, 4), NextToken(), Schedule(2), plan.most_tokens)
        trainer.step()
        used = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    expected = plan.peak - plan.weights - PYTHON
    assert expected / 4 < used < expected


def test_the_logits_of_the_c_kernels_take_no_more_than_planned():
    """The plan counts three arrays of CHUNK rows. C has one array, in which logits become dlogits."""
    assert training.CHUNK <= 3 * backward.CHUNK


def test_a_plan_takes_smaller_micro_batches_then_checkpointing_then_none():
    learner = tiny_learner(dtype=np.float32, args=ARGS)
    plans, found = [plan_of(learner, 128, 1024)], plan_of(learner, 128, 1024).peak / SHARE
    with pytest.raises(
        ResourceLimitError, match=r"the model takes .*: weights .* are available.*--method lora"
    ):
        while True:
            found *= 0.99
            plans.append(plan_of(learner, 128, 1024, int(found)))
            assert plans[-1].peak <= SHARE * found
    steps = [plan.most_tokens for plan in plans if not plan.checkpointing]
    assert steps[0] == 1024 and steps == sorted(steps, reverse=True) and 128 <= steps[-1] < 256
    assert plans[-1].checkpointing and plans[-1].most_tokens >= 128


def test_a_resumed_run_keeps_its_micro_batches(tmp_path):
    learner = tiny_learner(dtype=np.float32)
    optimizer = AdamW(learner.parameters(), Hyperparameters(1e-3))
    begun = training_plan(TINY, 0, 1000, 8, 17, ENOUGH, "the model")
    save_state(tmp_path / "state", optimizer, {"most_tokens": 17, "checkpointing": False})
    now = training_plan(TINY, 0, 1000, 8, 64, ENOUGH, "the model")
    sizes = 0, 1000, 8, 64
    resumed = training_plan(TINY, *sizes, ENOUGH, "the model", State(tmp_path / "state"))
    assert resumed == begun != now
    save_state(tmp_path / "state", optimizer, {"most_tokens": 17, "checkpointing": True})
    state = State(tmp_path / "state")
    plan = training_plan(TINY, *sizes, ENOUGH, "the model", state)
    assert plan.checkpointing and plan.activations < begun.activations
    assert training_plan(TINY, *sizes, plan.peak, "the model", state) == plan  # all of the memory may be used
    with pytest.raises(ResourceLimitError, match=r"state: the run was begun with more memory, .* available"):
        training_plan(TINY, *sizes, plan.peak - 1, "the model", state)


def test_the_longest_row_counts_also_where_it_is_not_trained():
    """And a row longer than the usual micro-batch is one by itself."""
    learner = tiny_learner(dtype=np.float32, args=ARGS)
    train, held_out = rows_of_length(8, 3), rows_of_length(40, 1)
    assert largest(train, held_out, 2) == (40, 16) and largest(train, [], 2) == (8, 16)
    short, long = plan_of(learner, 8, 16), plan_of(learner, 40, 16)
    assert long.most_tokens == 40 and long.activations == 40 * short.activations // 16
    assert plan_of(learner, 3000, 6000).most_tokens == 3000 and plan_of(learner, 8, 6000).most_tokens == 2048


@pytest.mark.parametrize("all_learns, dpo", [(True, False), (False, False), (False, True)])
def test_operations_are_those_of_a_count_by_hand(all_learns, dpo):
    rows = rows_of_length(5, 2)
    rows[0][0].trained[:3] = False
    a, H = ARGS, ARGS.n_heads * ARGS.head_dim
    layer = a.dim * H * 2 + a.dim * a.n_kv_heads * a.head_dim * 2 + 3 * a.dim * a.hidden_dim
    matrices = (6 if all_learns else 4) + 2 * dpo
    expected = a.n_layers * layer * matrices * 10 + a.vocab_size * a.dim * (matrices + 2 * dpo) * 7
    expected += a.n_layers * H * 2 * (7 + 2 * dpo) * (15 + 15)
    assert Work.of(ARGS, all_learns, dpo).operations(rows) == expected
