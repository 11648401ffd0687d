"""Steps of training: sums over micro-batches, masks, packed rows, preferences, and what ends a run."""

import math
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers.training import random_rows, some, tiny_learner
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.backward import add
from numpy_llama.errors import NumericsError
from numpy_llama.learner import Learner
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import TINY, random_weights
from numpy_llama.training.batch import batch_of, cut, inputs, micro_batches, targets
from numpy_llama.training.examples import Example
from numpy_llama.training.lora import with_lora
from numpy_llama.training.objectives import DPO, NextToken
from numpy_llama.training.optimizer import AdamW, Hyperparameters
from numpy_llama.training.order import Order
from numpy_llama.training.trainer import Schedule, Trainer

SEEDS = st.integers(0, 2**32 - 1)
# The same sums in another order, in float64.
EQUAL = {"rtol": 1e-9, "atol": 1e-12}
LEARNER = tiny_learner()
UNTIED = random_weights(np.random.default_rng(0), TINY, np.float32)


def gradients_of(objective, learner, rows, most):
    n, loss, gradients = objective.size(rows), 0.0, {}
    for group in micro_batches(rows, most):
        loss += objective.gradients(learner, group, n, gradients)[0]
    return loss, gradients


def assert_same(left, right):
    assert math.isclose(left[0], right[0], rel_tol=1e-10)
    assert left[1].keys() == right[1].keys()
    for name, gradient in left[1].items():
        assert np.isfinite(gradient).all()
        np.testing.assert_allclose(gradient, right[1][name], **EQUAL, err_msg=name)


@some
@given(SEEDS, st.integers(1, 6), st.integers(1, 60))
def test_micro_batches_change_nothing(seed, n, most):
    """Weighted by tokens, the last partial one too; rows whose targets are all masked give no NaN."""
    rows = random_rows(np.random.default_rng(seed), n)
    whole = gradients_of(NextToken(), LEARNER, rows, inputs(rows))
    assert_same(gradients_of(NextToken(), LEARNER, rows, most), whole)


@pytest.mark.parametrize("tied", [True, False])
@some
@given(SEEDS, st.integers(1, 60))
def test_gradients_of_micro_batches_are_added_one_after_the_other(tied, seed, most):
    """To the bit: so it does not matter which process computes them."""
    learner = tiny_learner(dtype=np.float32) if tied else Learner(Transformer(TINY, UNTIED))
    objective, rows = NextToken(), random_rows(np.random.default_rng(seed), 5)
    _, found = gradients_of(objective, learner, rows, most)
    total = {}
    for group in micro_batches(rows, most):
        alone = {}
        objective.gradients(learner, group, targets(rows), alone)
        add(total, alone)
    assert found.keys() == total.keys() and ("output.weight" in found) != tied
    for name, gradient in found.items():
        np.testing.assert_array_equal(gradient, total[name], err_msg=name)


@some
@given(SEEDS, st.integers(1, 12), st.integers(1, 60), st.integers(1, 4))
def test_micro_batches_are_rows_in_their_order_and_fit(seed, n, most, n_ranks):
    rows = random_rows(np.random.default_rng(seed), n)
    groups = micro_batches(rows, most, n_ranks)
    assert [row for group in groups for row in group] == rows
    assert all(inputs(group) <= most or len(group) == 1 for group in groups)


@some
@given(SEEDS, st.integers(1, 12), st.integers(1, 9))
def test_the_parts_of_some_rows_are_about_equally_large(seed, n, parts):
    rows = random_rows(np.random.default_rng(seed), n)
    groups, longest = cut(rows, parts), max(inputs([row]) for row in rows)
    assert len(groups) <= parts and all(inputs(group) <= inputs(rows) / parts + longest for group in groups)


@pytest.mark.parametrize("n_ranks, sizes", [
    (1, [8, 8, 8, 8]), (2, [8, 8, 8, 8]), (3, [5, 6, 5, 5, 6, 5]), (4, [8, 8, 8, 8]), (5, [6, 7, 6, 7, 6]),
    (8, [4] * 8), (40, [1] * 32),
])  # fmt: skip
def test_each_rank_has_as_many_micro_batches(n_ranks, sizes):
    rows = [(Example(np.arange(11), np.ones(10, bool), ""),) for _ in range(32)]
    assert [len(group) for group in micro_batches(rows, 80, n_ranks)] == sizes


@some
@given(SEEDS, st.integers(1, 40))
def test_a_run_in_micro_batches_is_the_run_without(seed, most):
    rows, results = random_rows(np.random.default_rng(seed), 5), []
    for size in (most, 1000):
        trainer = trainer_on(rows, tiny_learner(args=replace(TINY, n_layers=1)), most=size)
        losses = [trainer.step().loss for _ in range(2)]
        results.append((losses[1], {name: p.copy() for name, p in trainer.optimizer.parameters.items()}))
    assert_same(*results)


@some
@given(SEEDS, st.integers(1, 4))
def test_a_step_is_the_mean_over_all_trained_targets_of_examples_that_are_alone(seed, n):
    """So packed examples cannot see each other, and no place between two of them is a target."""
    rows = random_rows(np.random.default_rng(seed), n)
    examples = [example for row in rows for example in row]
    alone = 0.0
    for one in examples:
        logits = LEARNER(one.ids[None, :-1])[0]
        log_z = np.log(np.exp(logits).sum(axis=-1))
        alone += ((log_z - logits[np.arange(len(one)), one.ids[1:]]) * one.trained).sum()
    loss, _ = gradients_of(NextToken(), LEARNER, rows, inputs(rows))
    assert math.isclose(loss, alone / targets(rows), rel_tol=1e-10)
    assert math.isclose(NextToken().loss(LEARNER, rows, targets(rows))[0], loss, rel_tol=1e-12)


@some
@given(SEEDS)
def test_other_examples_of_a_row_change_no_gradient(seed):
    """The targets of one example alone are trained: its neighbours may be any."""
    rng = np.random.default_rng(seed)
    (row,) = random_rows(rng, 1)
    masked = [
        replace(one, trained=np.zeros(len(one), bool)) for group in random_rows(rng, 2) for one in group
    ]
    assert_same(
        gradients_of(NextToken(), LEARNER, [(*masked, *row, *masked)], 1000),
        gradients_of(NextToken(), LEARNER, [row], 1000),
    )


def test_a_step_without_any_target_is_finite():
    rows = [(Example(np.arange(5), np.zeros(4, bool), "here"),)]
    loss, gradients = gradients_of(NextToken(), LEARNER, rows, 100)
    assert loss == 0 and all((gradient == 0).all() for gradient in gradients.values())


@some
@given(SEEDS, st.integers(1, 5))
def test_rows_of_one_length_are_rows_of_the_arrays(seed, n):
    rng = np.random.default_rng(seed)
    rows = [(Example(rng.integers(9, size=7), np.ones(6, bool), ""),) for _ in range(n)]
    assert batch_of(rows).tokens.shape == (n, 6) and (batch_of(rows).first == 0).all()
    ragged = batch_of([*rows, (Example(np.arange(3), np.ones(2, bool), ""),)])
    assert ragged.tokens.shape == (1, 6 * n + 2)
    assert ragged.first[0].tolist() == [6 * i for i in range(n) for _ in range(6)] + [6 * n] * 2
    assert ragged.sums(np.ones((1, 6 * n + 2))).tolist() == [6.0] * n + [2.0]


# --- DPO ---


def pair(rng, most=8):
    def answer():
        n = int(rng.integers(2, most))
        trained = np.arange(n) >= rng.integers(0, n)
        return Example(rng.integers(TINY.vocab_size, size=n + 1), trained, "pair")

    return answer(), answer()


def adapted(seed: int = 0, trained: bool = True):
    """A frozen learner and the same with LoRA, whose B is no longer 0."""
    base = tiny_learner(frozen=True)
    learner = with_lora(base, ["q_proj", "k_proj", "v_proj", "down_proj"], 3, 0.7, seed, np.float64)
    rng = np.random.default_rng(seed)
    for p in learner.parameters().values():
        p += trained * 0.1 * rng.standard_normal(p.shape)
    return base, learner


def assert_gradients_are_slopes(objective, learner, rows, rng):
    """Along a random direction in all parameters: central differences, whose error is that of h^2."""
    loss, gradients = gradients_of(objective, learner, rows, 1000)
    parameters = learner.parameters()
    assert gradients.keys() == parameters.keys()
    direction = {name: rng.standard_normal(p.shape) for name, p in parameters.items()}
    h, losses = 1e-5, []
    for sign in (1, -1):
        for name, p in parameters.items():
            p += sign * h * direction[name]
        losses.append(objective.loss(learner, rows, objective.size(rows))[0])
        for name, p in parameters.items():
            p -= sign * h * direction[name]
    slope = sum((gradients[name] * direction[name]).sum() for name in gradients)
    assert math.isclose((losses[0] - losses[1]) / (2 * h), slope, rel_tol=1e-5, abs_tol=1e-7)
    assert math.isclose(loss, objective.loss(learner, rows, objective.size(rows))[0], rel_tol=1e-10)


@some
@given(SEEDS, st.integers(1, 3))
def test_the_gradients_of_dpo_are_the_slopes_of_its_loss(seed, n):
    rng = np.random.default_rng(seed)
    base, learner = adapted(seed)
    assert_gradients_are_slopes(DPO(base, 0.3), learner, [pair(rng) for _ in range(n)], rng)


@some
@given(SEEDS)
def test_the_gradients_of_lora_are_the_slopes_of_the_loss(seed):
    rng = np.random.default_rng(seed)
    _, learner = adapted(seed)
    assert_gradients_are_slopes(NextToken(), learner, random_rows(rng, 2), rng)


@pytest.mark.parametrize("objective", [NextToken(), DPO(tiny_learner(frozen=True))])
def test_a_loss_without_gradients_keeps_no_activations(objective, rng):
    """Its memory does not grow with the layers. A gradient keeps the activations of each."""
    answers = [Example(rng.integers(TINY.vocab_size, size=24), np.ones(23, bool), "answer") for _ in "12"]
    rows, peaks = [tuple(answers)], []
    for n_layers in (2, 12):
        learner = tiny_learner(args=replace(TINY, n_layers=n_layers))
        objective.loss(learner, rows, 1)  # the first call also imports
        tracemalloc.start()
        objective.loss(learner, rows, 1)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0]


def test_dpo_begins_at_the_reference():
    rng = np.random.default_rng(0)
    base, learner = adapted(trained=False)
    rows = [pair(rng) for _ in range(3)]
    loss, numbers = DPO(base).gradients(learner, rows, 3, {})
    assert math.isclose(loss, math.log(2), rel_tol=1e-12)
    assert numbers["rewards/margins"] == numbers["rewards/accuracies"] == 0.0


@some
@given(SEEDS, st.integers(1, 30))
def test_micro_batches_change_nothing_in_dpo(seed, most):
    rng = np.random.default_rng(seed)
    base, learner = adapted(seed)
    rows = [pair(rng) for _ in range(4)]
    assert_same(gradients_of(DPO(base), learner, rows, most), gradients_of(DPO(base), learner, rows, 1000))


def test_dpo_makes_the_chosen_answers_likelier():
    rng = np.random.default_rng(1)
    base, learner = adapted(trained=False)
    rows, objective = [pair(rng) for _ in range(4)], DPO(base)
    optimizer = AdamW(learner.parameters(), Hyperparameters(0.02))
    trainer = Trainer(learner, optimizer, rows, Order(4, 4), objective, Schedule(15), 1000)
    steps = list(trainer.steps())
    assert steps[-1].loss < 0.5 < steps[0].loss
    assert steps[-1].numbers["rewards/accuracies"] == 1.0 and steps[-1].numbers["rewards/margins"] > 0.5


# --- what ends a run ---


def trainer_on(rows, learner=None, most=1000, **schedule) -> Trainer:
    learner = learner or tiny_learner()
    optimizer = AdamW(learner.parameters(), Hyperparameters(1e-2))
    order, schedule = Order(len(rows), 2), Schedule(**{"steps": 4, **schedule})
    return Trainer(learner, optimizer, rows, order, NextToken(), schedule, most)


@pytest.mark.parametrize("spoilt, what", [("norm.weight", "the loss"), ("wq", "the length of the gradients")])
def test_a_number_that_is_not_finite_stops_with_step_and_examples(spoilt, what, monkeypatch):
    rows = random_rows(np.random.default_rng(0), 2)
    trainer = trainer_on(rows)
    trainer.step()
    before = {name: p.copy() for name, p in trainer.optimizer.parameters.items()}
    if spoilt == "norm.weight":
        before[spoilt][0] = trainer.optimizer.parameters[spoilt][0] = np.nan
    else:
        gradients = NextToken.gradients

        def infinite(self, learner, rows, n, found):
            result = gradients(self, learner, rows, n, found)
            found["layers.0.attention.wq.weight"][0, 0] = np.inf
            return result

        monkeypatch.setattr(NextToken, "gradients", infinite)
    with pytest.raises(NumericsError, match=rf"step 2: {what} is (nan|inf), on .*(line|whole)"):
        trainer.step()
    assert trainer.optimizer.t == 1
    for name, p in trainer.optimizer.parameters.items():
        np.testing.assert_array_equal(p, before[name])


def test_steps_go_on_to_the_end_of_the_schedule():
    rows = random_rows(np.random.default_rng(0), 5)
    trainer = trainer_on(rows, steps=4, warmup=2)
    steps = list(trainer.steps())
    assert [step.number for step in steps] == [1, 2, 3, 4] and list(trainer.steps()) == []
    assert [step.lr for step in steps] == pytest.approx([5e-3, 1e-2, 1e-2, 5e-3])
    assert steps[0].tokens == inputs([rows[i] for i in trainer.order(0)])
