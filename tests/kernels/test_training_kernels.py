"""The rest of a training step in C against NumPy: norms, RoPE, SwiGLU, the loss, AdamW, and whole models.

Each runs on every instruction set of this machine. Threads and short calls change no bit.
"""

from types import SimpleNamespace

import numpy as np
import pytest
from helpers.kernels import bits, for_each, seeds
from hypothesis import example, given
from hypothesis import strategies as st

from numpy_llama import backward as B
from numpy_llama import functional as F
from numpy_llama.backend import training
from numpy_llama.backend.formats import StoredTensor
from numpy_llama.backend.kernels import KernelWeight
from numpy_llama.backend.training import TrainingKernels
from numpy_llama.errors import MismatchError, ParameterError, UnsupportedError
from numpy_llama.learner import FrozenLinear, Learner, checkpointing
from numpy_llama.model import Transformer
from numpy_llama.proof.bounds import EXP_32, MODEL_32, U32, assert_near, assert_within, g
from numpy_llama.proof.tiny import TINY, random_tokens, random_weights
from numpy_llama.training.optimizer import adamw

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")
counts = st.one_of(st.integers(1, 70), st.sampled_from([(1 << 14) - 1, (1 << 14) + 5, 3 << 14]))


def same_bits(got, expected) -> None:
    for a, b in zip(got, expected, strict=True):
        np.testing.assert_array_equal(bits(a), bits(b))


@for_each
@given(
    rows=st.integers(1, 140), D=st.sampled_from([3, 32, 64, 96, 288]), threads=st.integers(1, 3), seed=seeds
)
@example(rows=128, D=32, threads=2, seed=0)  # whole NORM_ROWS
def test_rms_norm_and_its_gradient(isa, rows, D, threads, seed):
    rng, eps = np.random.default_rng(seed), 1e-5
    dy, x, weight = (rng.standard_normal(s, dtype=np.float32) for s in ((rows, D), (rows, D), D))
    kernel, wide = TrainingKernels(threads), [a.astype(np.float64) for a in (dy, x, weight)]
    y = F.rms_norm(*wide[1:], eps)
    assert_within(kernel.rms_norm(x, weight, eps), y, (g(D) + 4 * U32) * np.abs(y))
    got, (dx, dweight) = kernel.rms_norm_backward(dy, x, weight, eps), B.rms_norm_backward(*wide, eps)
    r = 1 / np.sqrt(np.mean(wide[1] ** 2, axis=-1, keepdims=True) + eps)
    xh, slope = np.abs(wide[1] * r), np.abs(wide[0] * wide[2])
    terms = r * (slope + xh * np.mean(slope * xh, axis=-1, keepdims=True))  # of dx, without their signs
    assert_within(got[0], dx, 2 * (g(D) + 8 * U32) * terms)
    assert_within(got[1], dweight, (g(rows) + g(D) + 4 * U32) * (np.abs(wide[0]) * xh).sum(axis=0))
    same_bits(TrainingKernels(1).rms_norm_backward(dy, x, weight, eps), got)


@for_each
@given(
    T=st.integers(1, 30), H=st.integers(1, 3), pairs=st.integers(1, 40), threads=st.integers(1, 3), seed=seeds
)
def test_rope_and_its_gradient(isa, T, H, pairs, threads, seed):
    rng, kernel = np.random.default_rng(seed), TrainingKernels(threads)
    x = rng.standard_normal((2, T, H, 2 * pairs), dtype=np.float32)
    for shape in ((T, pairs), (2, T, pairs)):
        freqs_cis = np.exp(1j * rng.uniform(0, 7, shape)).astype(np.complex64)
        size = 4 * U32 * np.repeat(np.abs(x[..., ::2]) + np.abs(x[..., 1::2]), 2, axis=-1)
        for turn, c in ((F.apply_rotary_emb, freqs_cis), (B.apply_rotary_emb_backward, freqs_cis.conj())):
            expected = turn(x.astype(np.float64), freqs_cis.astype(np.complex128))
            assert_within(kernel.apply_rotary_emb(x, c), expected, size)


@for_each
@given(n=counts, scale=st.sampled_from([1, 30, 1000]), threads=st.integers(1, 3), seed=seeds)
def test_swiglu_and_its_gradient(isa, n, scale, threads, seed):
    rng, kernel = np.random.default_rng(seed), TrainingKernels(threads)
    ds, gate, up = (rng.standard_normal(n, dtype=np.float32) for _ in range(3))
    gate *= np.float32(scale)
    ds_, gate_, up_ = (a.astype(np.float64) for a in (ds, gate, up))
    s = F.swiglu(gate_, up_)
    tiny = 1e-33  # below exp(-76) silu leaves float32's accuracy
    assert_within(kernel.swiglu(gate, up), s, (EXP_32 + 8 * U32) * np.abs(s) + tiny)
    dgate, dup = B.swiglu_backward(ds_, gate_, up_)
    with np.errstate(over="ignore"):
        sig = 1 / (1 + np.exp(-gate_))
    terms = np.abs(ds_ * up_) * sig * (1 + np.abs(gate_) * (1 - sig))  # of dgate, without their signs
    got = kernel.swiglu_backward(ds, gate, up)
    assert_within(got[0], dgate, 2 * (EXP_32 + 8 * U32) * terms + tiny)
    assert_within(got[1], dup, (EXP_32 + 8 * U32) * np.abs(dup) + tiny)
    same_bits(TrainingKernels(1).swiglu_backward(ds, gate, up), got)


@for_each
@given(
    N=st.integers(0, 9), V=st.one_of(st.integers(1, 70), st.just(1000)), threads=st.integers(1, 3), seed=seeds
)
def test_cross_entropy_and_its_gradient(isa, N, V, threads, seed):
    rng = np.random.default_rng(seed)
    logits = 5 * rng.standard_normal((N, V), dtype=np.float32)
    targets, weights = rng.integers(0, V, N), rng.standard_normal(N).astype(np.float32)
    wide = logits.astype(np.float64)
    nll, lse = B.cross_entropy(wide, targets)
    dlogits = B.cross_entropy_backward(weights.astype(np.float64), wide, targets, lse)
    got = TrainingKernels(threads).cross_entropy(logits, targets, weights)
    far = np.abs(wide - wide.max(axis=1, keepdims=True)).max(axis=1, initial=0)  # exp's argument is rounded
    relative = EXP_32 + g(V) + (8 + far) * U32
    assert_within(got, nll, relative + 2 * far * U32)
    chosen = np.arange(V) == targets[:, None]
    p = np.exp(wide - lse[:, None])
    assert_within(logits, dlogits, np.abs(weights)[:, None] * (2 * relative[:, None] * p + 2 * U32 * chosen))


def test_targets_are_checked():
    logits, weights = np.zeros((2, 3), np.float32), np.ones(2, np.float32)
    for targets in ([0, 3], [-1, 0]):
        with pytest.raises(ParameterError, match=r"must lie in 0\.\.2"):
            TrainingKernels(1).cross_entropy(logits, np.array(targets), weights)


def test_heads_that_are_too_wide_are_refused(isa):
    """The kernels have room for 256 numbers of a head."""
    with pytest.raises(UnsupportedError, match="head_dim is 258"):
        TrainingKernels(1).apply_rotary_emb(np.ones((1, 1, 1, 258), np.float32), np.ones((1, 129), "c8"))


@for_each
@example(n=9, t=1, lr=3.803647559834643e-05, threads=1, seed=0)  # lr / 0.1 is not lr * (1 / 0.1) in float32
@given(n=counts, t=st.integers(1, 1000), lr=st.floats(0, 1), threads=st.integers(1, 3), seed=seeds)
def test_adamw_gives_the_bits_of_numpy(isa, n, t, lr, threads, seed):
    rng = np.random.default_rng(seed)
    p, gradient, m, v = (rng.standard_normal(n, dtype=np.float32) for _ in range(4))
    h = SimpleNamespace(beta1=0.9, beta2=0.95, eps=1e-8)
    arrays = [p, gradient, m, v * v]
    expected = [a.copy() for a in arrays]
    adamw(*expected, t, lr, 0.1, h)
    TrainingKernels(threads).adamw(*arrays, t, lr, 0.1, h)
    same_bits(arrays, expected)


def test_adamw_refuses_what_it_cannot_change_in_place():
    p, h = np.ones((4, 4), np.float32), SimpleNamespace(beta1=0.9, beta2=0.95, eps=1e-8)
    for wrong in (p.T[:2].T, p.astype(np.float64), p[:2]):
        with pytest.raises(MismatchError):
            TrainingKernels(1).adamw(wrong, p, p, p, 1, 1e-3, 0.1, h)


@for_each
@given(n=counts, threads=st.integers(1, 3), seed=seeds)
def test_squares(isa, n, threads, seed):
    x = np.random.default_rng(seed).standard_normal(n, dtype=np.float32)
    wide = x.astype(np.float64)
    assert_within(TrainingKernels(threads).squares(x), wide @ wide, g(1 << 12) * (wide @ wide))
    assert TrainingKernels(threads).squares(x) == TrainingKernels(1).squares(x)


def test_short_calls_give_the_same_bits(isa, rng, monkeypatch):
    ds, gate, up = (rng.standard_normal((70, 37), dtype=np.float32) for _ in range(3))
    logits, targets = rng.standard_normal((9, 50), dtype=np.float32), rng.integers(0, 50, 9)
    h = SimpleNamespace(beta1=0.9, beta2=0.95, eps=1e-8)

    def everything():
        kernel, arrays, z = TrainingKernels(2), [x.copy() for x in (ds, gate, up, up * up)], logits.copy()
        kernel.adamw(*arrays, 3, 1e-3, 0.1, h)
        nll = kernel.cross_entropy(z, targets, ds[:9, 0])
        return [*arrays, z, nll, kernel.swiglu(gate, up), *kernel.swiglu_backward(ds, gate, up)]

    whole = everything()
    monkeypatch.setattr(training, "PIECE", 64)
    same_bits(everything(), whole)


# ---------------------------------------------------------------- whole models


def batch(rng):
    tokens, targets = (random_tokens(rng, TINY, 2, 21) for _ in range(2))
    first = np.zeros_like(tokens)
    first[0, 7:], first[0, 12:] = 7, 12
    return tokens, targets, rng.standard_normal(tokens.shape).astype(np.float32) / 21, first


def in_c(weights, threads=2, change=lambda functions: functions, **options) -> Learner:
    kernel = TrainingKernels(threads)
    return Learner(
        Transformer(TINY, weights, kernel.linear, kernel.attention), change(kernel.functions()), **options
    )


def test_a_model_learns_as_in_numpy(isa, rng):
    """Loss and gradients; the same with checkpointing; the same bits with any number of threads."""
    weights, some = random_weights(rng, TINY, np.float32), batch(rng)
    loss, expected = Learner(Transformer(TINY, weights)).loss_and_gradients(*some)
    got_loss, got = in_c(weights).loss_and_gradients(*some)
    assert abs(got_loss - loss) <= MODEL_32 * abs(loss) and list(got) == list(expected)
    for name, gradient in expected.items():
        assert_near(got[name], gradient, 4 * MODEL_32)  # backward is as long as three forward passes
    for other in (in_c(weights, threads=1), in_c(weights, change=checkpointing)):
        again = other.loss_and_gradients(*some)
        assert again[0] == got_loss
        same_bits(again[1].values(), got.values())


class Scaled(FrozenLinear):
    """A part of another kind: three times a frozen layer."""

    learned = ("scale",)
    scale = np.float32(3)

    def __call__(self, x):
        return self.scale * super().__call__(x)

    def backward(self, dy, x):
        dx, _ = super().backward(self.scale * dy, x)
        return dx, {"scale": np.sum(dy * super().__call__(x))}


@pytest.mark.parametrize("format", ["F32", "BF16", "Q8_0", "Q4_0"])
def test_a_frozen_quantized_model_passes_gradients_to_its_parts(isa, format, rng):
    """Every exchanged part is what runs, on weights of any format."""
    weights = random_weights(rng, TINY, np.float32)
    stored = {
        name: StoredTensor.quantize(w, format) if w.ndim == 2 and w.shape[1] % 32 == 0 else w
        for name, w in weights.items()
    }
    plain = {name: w.dequantize() if isinstance(w, StoredTensor) else w for name, w in stored.items()}
    packed = {name: KernelWeight(w) if isinstance(w, StoredTensor) else w for name, w in stored.items()}
    packed["tok_embeddings.weight"], some = plain["tok_embeddings.weight"], batch(rng)

    def scaled(learner: Learner) -> Learner:
        names = [f"layers.{i}.{name}" for i in range(TINY.n_layers) for name in PARTS]
        names.append("output")
        parts = {}
        for name in names:
            part = learner
            for key in name.split("."):
                part = part[int(key)] if key.isdigit() else getattr(part, key)
            parts[name] = Scaled(part.weight, part.linear, part.linear_dx)
        return learner.with_parts(parts)

    loss, expected = scaled(Learner(Transformer(TINY, plain), frozen=True)).loss_and_gradients(*some)
    got_loss, got = scaled(in_c(packed, frozen=True)).loss_and_gradients(*some)
    assert abs(got_loss - loss) <= 4 * MODEL_32 * abs(loss) and list(got) == list(expected)
    largest = max(np.abs(gradient) for gradient in expected.values())
    for name, gradient in expected.items():
        assert abs(got[name] - gradient) <= 20 * MODEL_32 * largest


PARTS = ("attention.wq", "attention.wk", "attention.wv", "attention.wo")
PARTS += ("feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down")


def test_the_chunk_of_the_loss_changes_nothing(isa, rng):
    weights, (tokens, targets, share, first) = random_weights(rng, TINY, np.float32), batch(rng)
    share[:, ::3] = 0  # not trained
    kernel, learner = TrainingKernels(2), in_c(weights)
    h = learner.norm(learner.forward(tokens, first).h)
    whole = B.head_loss(h.astype(np.float64), Learner(Transformer(TINY, weights)).output, targets, share)
    for chunk in (1, 5, 1000):
        for output in (learner.output, Learner(Transformer(TINY, weights)).output):  # of C, and another part
            loss, dh, gradients = kernel.head_loss(h, output, targets, share, chunk)
            assert abs(loss - whole[0]) <= MODEL_32 * np.abs(share).sum() * 10
            assert_near(dh, whole[1], MODEL_32)
            assert_near(gradients["weight"], whole[2]["weight"], MODEL_32)
            assert not dh[:, ::3].any()
