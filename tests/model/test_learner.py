"""A model that learns: what it refuses, how much memory it takes, and whether it learns.

numpy_llama/proof/test_learning.py compares its results with PyTorch.
"""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest

from numpy_llama import functional as F
from numpy_llama.backend import build
from numpy_llama.backend.formats import StoredTensor
from numpy_llama.backward import attention_backward, attention_saving, head_loss, linear_dw, linear_dx
from numpy_llama.errors import ContextOverflowError, MismatchError, ParameterError, UnsupportedError
from numpy_llama.learner import Functions, Learner, TrainedLinear
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import CONTEXT, TINY, random_tokens, random_weights


@pytest.fixture
def model(rng) -> Transformer:
    return Transformer(TINY, random_weights(rng, TINY, np.float32))


@pytest.fixture
def learner(model) -> Learner:
    return Learner(model)


@pytest.fixture
def batch(rng):
    tokens = random_tokens(rng, TINY, 2, 8)
    return tokens, np.roll(tokens, -1, axis=1), np.full(tokens.shape, 1 / tokens.size, np.float32)


def test_it_learns(learner, batch):
    """Thirty steps against the gradient halve the loss; parameters() are the model's own arrays."""
    losses = []
    for _ in range(30):
        loss, gradients = learner.loss_and_gradients(*batch)
        losses.append(loss)
        for name, weight in learner.parameters().items():
            assert (
                gradients[name].dtype == weight.dtype == np.float32 and gradients[name].shape == weight.shape
            )
            weight -= 0.3 * gradients[name]
    assert losses[-1] < losses[0] / 2


def test_the_model_is_unchanged(model, batch):
    """It shares the weights, but keeps its parts: it predicts with the function that it was given."""
    before, logits = vars(model).copy(), model(batch[0])
    Learner(model).loss_and_gradients(*batch)
    assert vars(model) == before and not hasattr(model.layers[0].attention.wq, "backward")
    assert (model(batch[0]) == logits).all()


def test_a_pass_for_its_result_alone_keeps_nothing(learner, batch):
    tokens, targets, weights = batch
    run, wanted = learner.forward(tokens, keep=False), learner.forward(tokens)
    np.testing.assert_array_equal(run.h, wanted.h)
    assert run.saved == []
    np.testing.assert_array_equal(*(learner.log_probs(x, targets, weights) for x in (run, wanted)))
    with pytest.raises(ParameterError, match="keeps nothing for backward"):
        learner.backward(run, targets, weights)


def test_a_pass_is_followed_once(learner, batch):
    run = learner.forward(batch[0])
    learner.backward(run, *batch[1:])
    with pytest.raises(ParameterError, match="compute it again"):
        learner.backward(run, *batch[1:])


class Scaled:
    """A part of one number: y = scale * base(x)."""

    learned = ("scale",)

    def __init__(self, base):
        self.base, self.scale = base, np.ones(1, np.float32)

    def __call__(self, x):
        return self.scale * self.base(x)

    def backward(self, dy, x):
        dx, _ = self.base.backward(self.scale * dy, x)
        return dx, {"scale": (dy * self.base(x)).sum(keepdims=True).reshape(1)}


@pytest.mark.parametrize("layer", [0, 1])
def test_below_the_lowest_part_that_learns_nothing_is_kept_or_computed(model, batch, layer):
    """Its gradient is what it is when all layers are followed."""
    frozen = Learner(model, frozen=True)
    name = f"layers.{layer}.feed_forward.w_down"
    one = frozen.with_parts({name: Scaled(frozen.layers[layer].feed_forward.w_down)})
    lowest = frozen.layers[0].attention.wv
    both = one.with_parts({"layers.0.attention.wv": Scaled(lowest)})
    run = one.forward(batch[0])
    assert [kept is None for kept in run.saved] == [True] * layer + [False] * (2 - layer)
    _, found = one.backward(run, *batch[1:])
    _, wanted = both.loss_and_gradients(*batch)
    assert found.keys() == one.parameters().keys() == {f"{name}.scale"}
    assert found[f"{name}.scale"] == wanted[f"{name}.scale"]


# --- what is refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, part, found",
    [
        ("layers.1.attention.wq", lambda x: x, "has no gradient, it lacks backward, learned"),
        ("layers.1.attention.attention", F.attention, "has no gradient, it lacks backward, learned, saving"),
        ("output", lambda x: x, "has no gradient, it lacks backward, learned"),
        ("layers.0.attention", lambda x, start_pos, freqs_cis, cache: x, "only Attention of model.py"),
        ("layers.0.feed_forward", lambda x: x, "only FeedForward of model.py"),
        ("layers.0", lambda x, start_pos, freqs_cis, cache: x, "only a TransformerBlock"),
    ],
)
def test_a_part_without_gradient_is_refused_by_name(learner, batch, name, part, found):
    """What is exchanged is what runs: no gradient of another part is computed instead."""
    with pytest.raises(UnsupportedError, match=f"^{name} is .*{found}"):
        learner.with_parts({name: part}).forward(batch[0])


def test_a_foreign_attention_is_not_taken_for_our_own(model, batch):
    """The pair of functions belongs to one attention function, `Functions.attention`."""

    def other(q, k, v):
        return F.attention(q, k, v)

    foreign = model.with_parts({"layers.*.attention.attention": other})
    with pytest.raises(
        UnsupportedError, match=r"^layers\.0\.attention\.attention is .*a_foreign_attention.*lacks backward"
    ):
        Learner(foreign).forward(batch[0])
    Learner(foreign, replace(Functions(), attention=other)).loss_and_gradients(*batch)


def test_the_model_that_numpy_loads_learns(batch):
    """Its attention is in short calls and has its own gradient."""
    weights = random_weights(np.random.default_rng(0), TINY, np.float32)
    stored = {name: StoredTensor.quantize(w, "F32") for name, w in weights.items()}
    loaded = build(TINY, stored, backend="numpy")
    loss, found = Learner(loaded).loss_and_gradients(*batch)
    wanted_loss, wanted = Learner(Transformer(TINY, weights)).loss_and_gradients(*batch)
    assert loss == wanted_loss and found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        np.testing.assert_array_equal(found[name], gradient, err_msg=name)


@pytest.mark.parametrize(
    "first, message",
    [
        (
            np.zeros((2, 7), int),
            r"first is int64 of shape \(2, 7\), it must be whole numbers of shape \(2, 8\)",
        ),
        (np.zeros((2, 8)), "first is float64"),
        (np.ones((2, 8), int), "must be the position at which the document"),
        (np.array([[0, 0, 0, 2, 2, 2, 2, 2]] * 2), "must be the position at which the document"),
        (np.array([[0, 0, 2, 2, 0, 0, 0, 0]] * 2), "must be the position at which the document"),
        (np.array([[0, 0, 0, -1, -1, -1, -1, -1]] * 2), "must be the position at which the document"),
    ],
)
def test_first_must_describe_documents(learner, batch, first, message):
    with pytest.raises(ParameterError, match=message):
        learner.forward(batch[0], first)


def test_what_does_not_fit_is_refused(learner, batch, rng):
    run = learner.forward(batch[0])
    with pytest.raises(MismatchError, match=r"targets are of shape \(2, 7\), the tokens are \(2, 8\)"):
        learner.backward(run, batch[1][:, 1:], batch[2])
    with pytest.raises(MismatchError, match=r"weights are of shape"):
        learner.log_probs(run, batch[1], batch[2][:1])
    for bad in (-1, TINY.vocab_size):
        targets = np.where(batch[1] == batch[1][0, 0], bad, batch[1])
        found = f"targets from {targets.min()} to {targets.max()}, they must lie in 0..{TINY.vocab_size - 1}"
        with pytest.raises(ParameterError, match=found):
            learner.backward(run, targets, batch[2])
    with pytest.raises(ParameterError, match="token ids"):
        learner.forward(batch[0] - TINY.vocab_size)
    with pytest.raises(ParameterError, match="at least one"):
        learner.forward(batch[0][:, :0])
    long = random_tokens(rng, TINY, 1, CONTEXT + 1)
    with pytest.raises(ContextOverflowError, match=f"do not fit a context of {CONTEXT}"):
        learner.forward(long)
    learner.forward(long, np.where(np.arange(CONTEXT + 1) < 9, 0, 9)[None])  # two documents that fit


@pytest.mark.parametrize("shape", [(1, 5, 2, 6), (1, 4, 3, 6), (1, 4, 2, 8), (2, 4, 2, 6)])
def test_attention_refuses_what_numpy_would_broadcast(shape):
    q, first = np.ones((1, 4, 4, 6)), np.zeros((1, 4), int)
    with pytest.raises(MismatchError, match="do not fit each other"):
        attention_saving(q, np.ones(shape), np.ones(shape), first)
    with pytest.raises(MismatchError, match="do not fit each other"):
        attention_saving(q, np.ones((1, 4, 2, 6)), np.ones(shape), first)


# --- memory -----------------------------------------------------------------------------------------------


def peak(call) -> int:
    """The most memory in use at a time, in bytes."""
    tracemalloc.start()
    call()
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return most


def test_the_scores_of_all_queries_are_never_in_memory(rng):
    """(H, T, T) float32 would be 16 MiB."""
    q, k, v = (rng.normal(size=(1, 1024, heads, 16)).astype(np.float32) for heads in (4, 1, 1))
    first = np.zeros((1, 1024), int)
    out, lse = attention_saving(q, k, v, first)
    assert peak(lambda: attention_saving(q, k, v, first)) < 6 << 20
    assert peak(lambda: attention_backward(q, q, k, v, out, lse, first)) < 8 << 20


def test_the_logits_of_all_rows_are_never_in_memory(rng):
    """(T, V) float32 would be 32 MiB; dW is 1 MiB, and as much again while a chunk adds to it."""
    h, w = rng.normal(size=(1024, 32)).astype(np.float32), rng.normal(size=(8192, 32)).astype(np.float32)
    output, targets = TrainedLinear(w, F.linear, linear_dx, linear_dw), rng.integers(8192, size=1024)
    assert peak(lambda: head_loss(h, output, targets, np.ones(1024), 32)) < 8 << 20
