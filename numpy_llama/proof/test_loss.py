"""The loss: cross-entropy, -log softmax(logits)[target], with one weight for each target.

The head computes it in chunks of the rows that have a weight. cross_entropy_backward has its general laws in
test_gradients.py.
"""

import functools
import math

import numpy as np
import pytest
from hypothesis import strategies as st

from .. import functional as F
from ..backward import linear_dw, linear_dx
from ..learner import FrozenLinear, TrainedLinear
from . import laws, torch_ops
from .bounds import assert_same, assert_within, unit
from .gradients import widened
from .laws import assert_refused, assert_that, sizes, small_sizes, sources

law = functools.partial(laws.law, share=1 / 4)  # of the examples: the laws are many

scales = st.sampled_from([0.25, 1.0, 5.0, 50.0])
chunk_sizes = st.sampled_from([1, 2, 3, 7, 64])


def bound(logits):
    """A logit is exact; lse is a sum of V exponentials, and the rounding of its size and of the target's."""
    V, most = logits.shape[-1], np.abs(logits).max(axis=-1)
    return unit(logits.dtype) * (4 * most.astype(np.float64) + 2 * V + 24)


# --- each row ---------------------------------------------------------------------------------------------


@law("cross_entropy", sources, small_sizes, sizes)
def test_the_formula(ops, source, N, V):
    """nll = log sum_j exp(logit_j) - logit of the target, and lse is the first term."""
    logits, targets = source.array(N, V), source.ids(V, N)
    wanted = np.array([math.log(math.fsum(map(math.exp, row))) for row in logits])
    nll, lse = ops.cross_entropy(logits, targets)
    assert_within(lse, wanted, bound(logits))
    assert_within(nll, wanted - logits[np.arange(N), targets], bound(logits))


@law("cross_entropy", sources, small_sizes, sizes, scales)
def test_as_pytorch(ops, source, N, V, scale):
    """It gives torch.nn.functional.cross_entropy and torch.logsumexp."""
    logits, targets = source.array(N, V) * ops.dtype.type(scale), source.ids(V, N)
    wanted = torch_ops.cross_entropy(widened(logits), targets)
    for found, other in zip(ops.cross_entropy(logits, targets), wanted, strict=True):
        assert_within(found, other, 2 * bound(logits))


@law("cross_entropy", sources, small_sizes, sizes, scales)
def test_in_float32(ops, source, N, V, scale):
    """The same in float32."""
    logits, targets = (source.array(N, V) * scale).astype(np.float32), source.ids(V, N)
    found = ops.cross_entropy(logits, targets)
    assert_that(all(x.dtype == np.float32 for x in found), "float32 went in, another precision came out")
    for one, other in zip(found, torch_ops.cross_entropy(widened(logits), targets), strict=True):
        assert_within(one, other, 2 * bound(logits))


@pytest.mark.filterwarnings("error")
@law("cross_entropy cross_entropy_backward", sources, st.integers(2, 9))
def test_no_exponential_overflows(ops, source, V):
    """Logits of 1e4 apart: a sure target costs 0, a hopeless one the distance, and no gradient is NaN."""
    logits = np.full((2, V), -1e4, ops.dtype)
    logits[:, 1] = 0
    targets = np.array([1, 0])
    nll, lse = ops.cross_entropy(logits, targets)
    assert_within(nll, [0, 1e4], 1e-3)
    wanted = np.zeros((2, V))
    wanted[1, :2] = -1, 1
    assert_within(ops.cross_entropy_backward(np.ones(2, ops.dtype), logits, targets, lse), wanted, 1e-6)


@law("cross_entropy cross_entropy_backward", sources, small_sizes, sizes)
def test_the_gradient_of_a_row_sums_to_0(ops, source, N, V):
    """A number added to all logits changes no probability."""
    logits, targets, dnll = source.array(N, V), source.ids(V, N), source.array(N)
    _, lse = ops.cross_entropy(logits, targets)
    dlogits = widened(ops.cross_entropy_backward(dnll, logits, targets, lse))
    assert_within(dlogits.sum(axis=-1), np.zeros(N), 2 * bound(logits) * np.abs(dnll))


@law("cross_entropy", sources, st.integers(1, 9))
def test_a_target_outside_the_vocabulary_is_refused(ops, source, V):
    """It raises, and never counts from the end."""
    logits = source.array(3, V)
    for bad in (-1, V):
        targets = np.array([0, bad, V - 1])
        assert_refused(functools.partial(ops.cross_entropy, logits, targets), f"targets {targets} of {V}")


@law("cross_entropy cross_entropy_backward", sources, st.integers(1, 9))
def test_no_rows(ops, source, V):
    """A chunk may be empty."""
    logits, none = source.array(0, V), np.zeros(0, int)
    nll, lse = ops.cross_entropy(logits, none)
    assert_same(nll, np.zeros(0))
    assert_same(ops.cross_entropy_backward(nll, logits, none, lse), np.zeros((0, V)))


# --- the head ---------------------------------------------------------------------------------------------


class Head:
    """An output part, and (B, T) rows with targets and weights, of which about half are 0."""

    def __init__(self, source, B, T, D, V):
        self.h, self.w = source.array(B, T, D), source.normal(V, D)
        self.output = TrainedLinear(self.w, F.linear, linear_dx, linear_dw)
        self.targets = source.ids(V, B, T)
        self.weights = source.normal(B, T) * source.ids(2, B, T).astype(source.dtype)

    def bounds(self):
        """Of the loss, of a row of dh, and of dw, by the sums of their absolute values."""
        D, (V, u) = self.h.shape[-1], (len(self.w), unit(self.h.dtype))
        h, w, weights = (np.abs(widened(x)) for x in (self.h, self.w, self.weights))
        error = u * (2 * D + 2 * V + 32 + self.h.size) * (1 + 4 * (h @ w.T).max())
        rows = weights[..., None] * error
        return (
            error * (weights * (1 + 2 * (h @ w.T).max(axis=-1))).sum(),
            2 * rows * w.max(),
            2 * error * np.einsum("bt,btd->d", weights, h)[None],
        )

    def assert_same_loss(self, found, wanted):
        loss, dh, dw = self.bounds()
        assert_within(found[0], wanted[0], 2 * loss)
        assert_within(found[1], wanted[1], 2 * dh)
        assert_that(found[2].keys() == {"weight"}, f"gradients of {list(found[2])}, wanted that of weight")
        assert_within(found[2]["weight"], wanted[2]["weight"], 2 * dw)


heads = st.builds(tuple, st.tuples(small_sizes, small_sizes, small_sizes, st.integers(2, 9)))


@law("head_loss", sources, heads, chunk_sizes)
def test_the_head_as_pytorch(ops, source, shape, chunk):
    """loss = sum weights nll, with dh and dW, as autograd of the whole gives them."""
    head = Head(source, *shape)
    wide = TrainedLinear(widened(head.w), F.linear, linear_dx, linear_dw)
    wanted = torch_ops.head_loss(widened(head.h), wide, head.targets, widened(head.weights))
    head.assert_same_loss(ops.head_loss(head.h, head.output, head.targets, head.weights, chunk), wanted)


@law("head_loss", sources, heads, chunk_sizes, chunk_sizes)
def test_the_size_of_a_chunk_changes_nothing(ops, source, shape, one, other):
    """However many rows are in memory at a time, the loss and the gradients are the same."""
    head = Head(source, *shape)
    found, wanted = (
        ops.head_loss(head.h, head.output, head.targets, head.weights, chunk) for chunk in (one, other)
    )
    head.assert_same_loss(found, wanted)


@law("head_loss", sources, heads, chunk_sizes, st.sampled_from([-100, -1, 10**6]))
def test_a_target_without_weight_does_not_count(ops, source, shape, chunk, masked):
    """Where the weight is 0 the target may be any number, and dh is 0: the same bits."""
    head = Head(source, *shape)
    found = ops.head_loss(head.h, head.output, head.targets, head.weights, chunk)
    targets = np.where(head.weights == 0, masked, head.targets)
    again = ops.head_loss(head.h, head.output, targets, head.weights, chunk)
    assert_same(again[0], found[0])
    assert_same(again[1], found[1])
    assert_same(again[2]["weight"], found[2]["weight"])
    assert_same(found[1][head.weights == 0], np.zeros(((head.weights == 0).sum(), shape[2])))


@law("head_loss log_probs", sources, heads, chunk_sizes)
def test_the_head_leaves_its_arguments_alone(ops, source, shape, chunk):
    """h, the weight, targets and weights are what they were."""
    head = Head(source, *shape)
    arrays = head.h, head.w, head.targets, head.weights
    before = [x.copy() for x in arrays]
    ops.head_loss(head.h, head.output, head.targets, head.weights, chunk)
    ops.log_probs(head.h, head.output, head.targets, head.weights, chunk)
    for x, was in zip(arrays, before, strict=True):
        assert_same(x, was)


class Counting(TrainedLinear):
    """An output that keeps the numbers of rows that it is asked for."""

    def __init__(self, weight):
        super().__init__(weight, F.linear, linear_dx, linear_dw)
        self.rows = []

    def __call__(self, x):
        self.rows.append(len(x))
        return super().__call__(x)


@law("head_loss", sources, heads, chunk_sizes)
def test_only_rows_with_a_weight_are_computed(ops, source, shape, chunk):
    """Logits are computed for rows that have a weight, at most `chunk` at a time: h of others may be NaN."""
    if ops.name == "torch":
        return  # all rows at once
    head = Head(source, *shape)
    counting = Counting(head.w)
    head.h[head.weights == 0] = np.nan
    loss, dh, own = ops.head_loss(head.h, counting, head.targets, head.weights, chunk)
    assert_that(
        np.isfinite(loss) and np.isfinite(dh).all() and np.isfinite(own["weight"]).all(), "NaN came in"
    )
    trained = np.count_nonzero(head.weights)
    assert_that(sum(counting.rows) == trained, f"{trained} rows have a weight, {counting.rows} were computed")
    assert_that(max(counting.rows) <= chunk, f"{counting.rows} rows at a time, at most {chunk} were wanted")


@law("head_loss", sources, heads, chunk_sizes)
def test_nothing_trained_gives_nothing(ops, source, shape, chunk):
    """Without any weight the loss is 0 and every gradient is 0, not NaN and not missing."""
    head = Head(source, *shape)
    loss, dh, own = ops.head_loss(head.h, head.output, head.targets, 0 * head.weights, chunk)
    assert_same(loss, 0.0)
    assert_same(dh, np.zeros_like(head.h))
    assert_same(own["weight"], np.zeros_like(head.w))


@law("head_loss", sources, heads, chunk_sizes)
def test_twice_the_weights(ops, source, shape, chunk):
    """Twice the weights give twice the loss and twice the gradients, to the last bit."""
    head = Head(source, *shape)
    one, other = (
        ops.head_loss(head.h, head.output, head.targets, weights, chunk)
        for weights in (head.weights, 2 * head.weights)
    )
    assert_same(other[0], 2 * one[0])
    assert_same(other[1], 2 * one[1])
    assert_same(other[2]["weight"], 2 * one[2]["weight"])


@law("head_loss", sources, heads, chunk_sizes)
def test_a_frozen_head_has_no_gradient(ops, source, shape, chunk):
    """An output that does not learn gives the same dh, and no gradient of its own."""
    if ops.name == "torch":
        return  # its head is always the weight
    head = Head(source, *shape)
    frozen = FrozenLinear(head.w, F.linear, linear_dx)
    _, dh, own = ops.head_loss(head.h, frozen, head.targets, head.weights, chunk)
    assert_same(dh, ops.head_loss(head.h, head.output, head.targets, head.weights, chunk)[1])
    assert_that(own == {}, f"gradients of {list(own)}, wanted none")


@law("head_loss log_probs", sources, heads, chunk_sizes)
def test_the_loss_is_made_of_log_probabilities(ops, source, shape, chunk):
    """loss = -sum weights log p, so that DPO and PPO weigh what they have measured."""
    head = Head(source, *shape)
    log_p = ops.log_probs(head.h, head.output, head.targets, head.weights, chunk)
    loss, _, _ = ops.head_loss(head.h, head.output, head.targets, head.weights, chunk)
    assert_within(-(widened(log_p) * widened(head.weights)).sum(), loss, 2 * head.bounds()[0])


@law("log_probs", sources, heads, chunk_sizes)
def test_log_probs_as_pytorch(ops, source, shape, chunk):
    """log softmax(output(h))[target] where the mask is not 0, else 0, whatever the target is there."""
    head = Head(source, *shape)
    wide = TrainedLinear(widened(head.w), F.linear, linear_dx, linear_dw)
    wanted = torch_ops.log_probs(widened(head.h), wide, head.targets, head.weights)
    targets = np.where(head.weights == 0, -100, head.targets)
    found = ops.log_probs(head.h, head.output, targets, head.weights, chunk)
    most = np.abs(widened(head.h) @ widened(head.w).T).max()
    assert_within(found, wanted, unit(ops.dtype) * (40 + 8 * sum(shape)) * (1 + 4 * most))
    assert_same(found[head.weights == 0], np.zeros((head.weights == 0).sum()))
