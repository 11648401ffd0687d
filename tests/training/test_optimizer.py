"""AdamW, its schedule and clipping, against PyTorch in float64."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.training import some
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.errors import ParameterError
from numpy_llama.training import optimizer
from numpy_llama.training.optimizer import AdamW, Hyperparameters, clip, learning_rate, norm

SEEDS = st.integers(0, 2**32 - 1)
SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=1, max_size=2).map(tuple), min_size=1, max_size=4)
# A few roundings a step, each 1e-16 of a number near 1.
EQUAL = {"rtol": 1e-12, "atol": 1e-14}


def drawn(rng, shapes, scale=1.0) -> dict[str, np.ndarray]:
    return {str(i): scale * rng.standard_normal(shape) for i, shape in enumerate(shapes)}


@some
@given(SEEDS, SHAPES, st.floats(1e-5, 1e-1), st.floats(0, 0.5), st.floats(0.5, 0.99), st.floats(0.5, 0.999))
def test_adamw_is_pytorchs(seed, shapes, lr, decay, beta1, beta2):
    rng = np.random.default_rng(seed)
    parameters = drawn(rng, shapes)
    h = Hyperparameters(lr, beta1, beta2, 1e-8, decay)
    theirs = [torch.tensor(p, requires_grad=True) for p in parameters.values()]
    groups = [
        {"params": [p for p in theirs if p.ndim == 2], "weight_decay": decay},
        {"params": [p for p in theirs if p.ndim == 1], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr, (beta1, beta2), 1e-8)
    ours = AdamW(parameters, h)
    for step in range(5):
        gradients = drawn(rng, shapes, 10.0 ** rng.integers(-3, 3))
        for p, g in zip(theirs, gradients.values(), strict=True):
            p.grad = torch.tensor(g)
        for group in reference.param_groups:
            group["lr"] = lr / (step + 1)
        reference.step()
        ours.step(gradients, lr / (step + 1))
    for p, theirs_p in zip(parameters.values(), theirs, strict=True):
        np.testing.assert_allclose(p, theirs_p.detach().numpy(), **EQUAL)


@given(SEEDS, st.integers(1, 40))
def test_pieces_change_no_bit(seed, piece):
    results = []
    for size in (piece, 1 << 16):
        rng = np.random.default_rng(seed)
        parameters = drawn(rng, [(6, 5), (7,)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optimizer, "PIECE", size)
            ours = AdamW(parameters, Hyperparameters(0.1))
            ours.step(drawn(rng, [(6, 5), (7,)]), 0.1)
        results.append(b"".join(p.tobytes() for p in parameters.values()))
    assert results[0] == results[1]


def test_an_update_is_in_place_and_float32_stays_float32():
    p = np.ones((3, 4), np.float32)
    ours = AdamW({"p": p}, Hyperparameters(0.1))
    ours.step({"p": np.ones((3, 4), np.float32)}, 0.1)
    assert ours.parameters["p"] is p and p.dtype == ours.m["p"].dtype == np.float32 and (p < 1).all()


def test_a_parameter_that_cannot_be_updated_in_place_is_refused():
    p = np.ones((3, 4)).T
    with pytest.raises(ParameterError, match="cannot be updated in place"):
        AdamW({"p": p}, Hyperparameters(0.1)).step({"p": np.ones((4, 3))}, 0.1)


def test_only_matrices_decay():
    parameters = {"matrix": np.ones((2, 2)), "norm": np.ones(2)}
    zeros = {name: np.zeros_like(p) for name, p in parameters.items()}
    AdamW(parameters, Hyperparameters(0.1, weight_decay=0.5)).step(zeros, 0.1)
    assert (parameters["matrix"] == 1 - 0.1 * 0.5).all() and (parameters["norm"] == 1).all()


@given(SEEDS, SHAPES, st.floats(1e-3, 1e3))
def test_clipping_is_pytorchs(seed, shapes, max_norm):
    gradients = drawn(np.random.default_rng(seed), shapes, 10.0)
    theirs = [torch.tensor(g, requires_grad=True) for g in gradients.values()]
    for p in theirs:
        p.grad = p.detach().clone()
    total = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert math.isclose(clip(gradients, max_norm), total, rel_tol=1e-12)
    for g, p in zip(gradients.values(), theirs, strict=True):
        np.testing.assert_allclose(g, p.grad.numpy(), **EQUAL)


def test_clipping_by_0_changes_nothing_and_sees_what_is_not_finite():
    gradients = {"a": np.array([3.0, 4.0])}
    assert clip(gradients, 0) == 5.0 and gradients["a"].tolist() == [3.0, 4.0]
    assert math.isnan(norm([np.array([1.0, np.nan])])) and math.isinf(norm([np.array([1.0, np.inf])]))


@given(st.integers(1, 500), st.integers(0, 600), st.floats(0, 1))
def test_the_learning_rate_rises_then_falls_and_is_never_0(steps, warmup, lowest):
    rates = [learning_rate(step, steps, 1.0, warmup, lowest) for step in range(steps)]
    assert all(0 < rate <= 1 + 1e-12 for rate in rates)
    assert rates[: warmup + 1] == sorted(rates[: warmup + 1])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert warmup >= steps or rates[warmup] == 1.0  # the first step without a warm-up has all of it
    assert math.isclose(
        learning_rate(max(steps, warmup), steps, 1.0, warmup, lowest), lowest if warmup < steps else 1
    )


@pytest.mark.parametrize("name, value", [("lr", -1), ("beta1", 1.0), ("eps", math.nan), ("max_norm", -0.1)])
def test_impossible_hyperparameters_are_refused(name, value):
    with pytest.raises(ParameterError, match=name):
        replace(Hyperparameters(0.1), **{name: value})
