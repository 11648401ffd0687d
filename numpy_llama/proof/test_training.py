"""What training adds to the gradients: a step of AdamW, LoRA as a part that learns, the weights of DPO."""

import functools

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from .. import functional as F
from ..backward import linear_dw, linear_dx
from ..learner import FrozenLinear, Functions
from ..training.optimizer import Hyperparameters
from . import laws
from .bounds import assert_same, assert_within, unit
from .gradients import widened
from .laws import assert_that, small_sizes, sources

law = functools.partial(laws.law, share=1 / 4)  # of the examples: the laws are many

rates = st.sampled_from([1e-3, 0.03, 0.25])
decays = st.sampled_from([0.0, 0.1, 0.5])
scales = st.sampled_from([0.5, 1.0, 2.0])
betas = st.sampled_from([0.1, 0.5, 2.0])


# --- AdamW ------------------------------------------------------------------------------------------------


@law("adamw", sources, small_sizes, small_sizes, rates, decays, st.sampled_from([0.0, 0.5, 0.9]))
def test_some_steps_as_pytorch(ops, source, a, b, lr, decay, beta1):
    """Five steps in a row are those of torch.optim.AdamW, with p, m and v changed in place."""
    h = Hyperparameters(lr, beta1, 0.95, 1e-8)
    p, m, v = source.normal(a, b), np.zeros((a, b), source.dtype), np.zeros((a, b), source.dtype)
    theirs = torch.tensor(widened(p), requires_grad=True)
    reference = torch.optim.AdamW([theirs], lr, (beta1, h.beta2), h.eps, decay)
    for t in range(1, 6):
        g = source.array(a, b)
        theirs.grad = torch.tensor(widened(g))
        reference.step()
        ops.adamw(p, g, m, v, t, lr, decay, h)
    allowed = unit(ops.dtype) * (100 * np.abs(widened(p)).max() + 2000 * lr)
    assert_within(p, theirs.detach().numpy(), allowed + 1e-7 * lr)


@law("adamw", sources, small_sizes, small_sizes, rates, st.sampled_from([1e-3, 1.0, 1e3]))
def test_the_first_step_has_the_length_of_the_learning_rate(ops, source, a, b, lr, size):
    """At t = 1 each number moves by lr against its gradient, however large or small the gradient is."""
    p, g = source.normal(a, b), source.dtype.type(size) * np.sign(source.normal(a, b))
    before, m, v = p.copy(), np.zeros_like(p), np.zeros_like(p)
    ops.adamw(p, g, m, v, 1, lr, 0.0, Hyperparameters(lr))
    wanted = before - lr * np.sign(g)
    assert_within(p, wanted, 1e-4 * lr + 4 * unit(ops.dtype) * np.abs(before).max())


@law("adamw", sources, small_sizes, small_sizes, rates, decays)
def test_decay_is_no_part_of_the_gradient(ops, source, a, b, lr, decay):
    """Decay takes lr decay p from p, whatever the gradient is, and nothing of it goes into m and v."""
    h, found = Hyperparameters(lr), []
    start, g, t = source.normal(a, b), source.normal(a, b), 3
    for one in (decay, 0.0):
        p, m, v = start.copy(), 0.5 * g, g * g
        ops.adamw(p, g, m, v, t, lr, one, h)
        found.append((p, m, v))
    (p, m, v), (free, free_m, free_v) = found
    assert_within(widened(free) - p, lr * decay * start, 8 * unit(ops.dtype) * (1 + np.abs(start).max()))
    assert_same(m, free_m)
    assert_same(v, free_v)


# --- LoRA -------------------------------------------------------------------------------------------------


class Adapted:
    """A frozen weight W (OUT, IN) with A (r, IN) and B (OUT, r), rows x and the gradient dy."""

    def __init__(self, ops, source, OUT, IN, r, scale):
        self.w, self.a, self.b = source.array(OUT, IN), source.array(r, IN), source.array(OUT, r)
        self.x, self.dy, self.scale = source.array(2, 3, IN), source.array(2, 3, OUT), scale
        self.base = FrozenLinear(self.w, F.linear, linear_dx)
        self.part = lambda base, b: ops.TrainedLoRA(base, self.a, b, scale, Functions())
        self.allowed = 1e-11 if ops.dtype == np.float64 else 1e-3


@law("TrainedLoRA", sources, small_sizes, small_sizes, small_sizes, scales)
def test_it_is_a_weight_with_a_small_update(ops, source, OUT, IN, r, scale):
    """y = x M^T and dx = dy M with M = W + scale B A; dA = scale B^T dW, dB = scale dW A^T, dW = dy^T x."""
    c = Adapted(ops, source, OUT, IN, r, scale)
    part, merged = c.part(c.base, c.b), c.w + scale * c.b @ c.a
    assert_within(part(c.x), c.x @ merged.T, c.allowed)
    dx, own = part.backward(c.dy, c.x)
    dw = linear_dw(c.dy, c.x)
    assert_that(own.keys() == {"lora_a", "lora_b"}, f"gradients of {list(own)}, wanted lora_a and lora_b")
    assert_within(dx, c.dy @ merged, c.allowed)
    assert_within(own["lora_a"], scale * c.b.T @ dw, c.allowed)
    assert_within(own["lora_b"], scale * dw @ c.a.T, c.allowed)


@law("TrainedLoRA", sources, small_sizes, small_sizes, small_sizes, scales)
def test_it_begins_without_effect(ops, source, OUT, IN, r, scale):
    """With B = 0 y and dx are the base's, to the bit, and A has the gradient 0."""
    c = Adapted(ops, source, OUT, IN, r, scale)
    part = c.part(c.base, np.zeros_like(c.b))
    dx, own = part.backward(c.dy, c.x)
    assert_same(part(c.x), c.base(c.x))
    assert_same(dx, c.base.backward(c.dy, c.x)[0])
    assert_same(own["lora_a"], np.zeros_like(c.a))


class Sealed:
    """A base that gives y and dx, and has no weight to look at."""

    learned = ()

    def __init__(self, base):
        self.call, self.backward, self.linear = base, base.backward, base.linear

    def __call__(self, x):
        return self.call(x)


@law("TrainedLoRA", sources, small_sizes, small_sizes, small_sizes, scales)
def test_the_weight_itself_is_not_needed(ops, source, OUT, IN, r, scale):
    """The base gives y and dx, and nothing else is asked of it: its weight may be quantized."""
    c = Adapted(ops, source, OUT, IN, r, scale)
    sealed, usual = c.part(Sealed(c.base), c.b), c.part(c.base, c.b)
    assert_same(sealed(c.x), usual(c.x))
    assert_same(sealed.backward(c.dy, c.x)[0], usual.backward(c.dy, c.x)[0])


# --- DPO --------------------------------------------------------------------------------------------------


@law("dpo", sources, small_sizes, betas)
def test_the_weights_are_the_slopes_of_the_loss(ops, source, n, beta):
    """loss = -log sigmoid(beta (chosen - rejected)). A weight is minus its slope: it stands before -log p."""

    def loss(x):
        return np.logaddexp(0, -beta * (x[:, 0] - x[:, 1]))

    gained, h = source.normal(n, 2), 1e-5
    losses, weights = ops.dpo(gained, beta)
    assert_within(losses, loss(widened(gained)), 16 * unit(ops.dtype) * (1 + 2 * beta * np.abs(gained).max()))
    for i in range(2):
        step = h * np.eye(2)[i]
        slope = (loss(widened(gained) + step) - loss(widened(gained) - step)) / (2 * h)
        assert_within(weights[:, i], -slope, 1e-8 + 100 * unit(ops.dtype))


@law("dpo", small_sizes, betas)
def test_at_the_reference_both_answers_weigh_half(ops, n, beta):
    """Where nothing is gained the loss is log 2, and the weights are beta / 2 and -beta / 2."""
    losses, weights = ops.dpo(np.zeros((n, 2), ops.dtype), beta)
    assert_within(losses, np.full(n, np.log(2)), 4 * unit(ops.dtype))
    assert_within(weights, np.tile([beta / 2, -beta / 2], (n, 1)), 4 * beta * unit(ops.dtype))


@law("dpo", sources, small_sizes, betas, st.sampled_from([-8, 3, 64]))
def test_only_the_difference_counts(ops, source, n, beta, both):
    """The same number added to chosen and rejected changes nothing: whole numbers, so to the bit."""
    gained = source.ids(9, n, 2).astype(ops.dtype)
    for found, wanted in zip(ops.dpo(gained + both, beta), ops.dpo(gained, beta), strict=True):
        assert_same(found, wanted)


@pytest.mark.filterwarnings("error")
@law("dpo", betas)
def test_a_sure_pair_does_not_overflow(ops, beta):
    """Far on the right side loss and weights are 0; far on the wrong side they are -u and beta."""
    gained = np.array([[1e4, -1e4], [-1e4, 1e4]], ops.dtype)
    losses, weights = ops.dpo(gained, beta)
    assert_within(losses, [0, 2e4 * beta], 1e-2)
    assert_within(weights, [[0, 0], [beta, -beta]], 1e-6)
