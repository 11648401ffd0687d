"""The gradients of a block and of the whole model on random tiny weights: against autograd, and in pieces."""

import functools

import numpy as np
from hypothesis import strategies as st

from .. import backward
from .. import learner as learning
from ..config import Array
from ..model import Transformer
from . import torch_ops
from .bounds import CHUNKS_32, CHUNKS_64, GRADIENT_32, GRADIENT_64, assert_near, assert_same, assert_within
from .gradients import documents
from .laws import Source, assert_that, law, seeds
from .tiny import configurations, random_tokens, random_weights

whole = functools.partial(law, share=1 / 10)
cuts = st.integers(0, 4)
lengths = st.integers(1, 24)


class Batch:
    """Random rows: tokens, targets and weights, of which a third are 0, and where the documents begin."""

    def __init__(self, ops, args, seed, B=2, T=24, cuts=0):
        self.rng = np.random.default_rng(seed)
        self.tokens, self.targets = random_tokens(self.rng, args, B, T), random_tokens(self.rng, args, B, T)
        self.weights = (self.rng.normal(size=(B, T)) * (self.rng.random((B, T)) > 1 / 3)).astype(ops.dtype)
        self.first = documents(Source(seed, True), B, T, cuts)

    def __iter__(self):
        yield from (self.tokens, self.targets, self.weights, self.first)

    def cut(self, rows, columns):
        """Some rows and columns, as documents of their own."""
        return (x[rows, columns] for x in (self.tokens, self.targets, self.weights))


def random_model(ops, args, seed, tied=False):
    weights = random_weights(np.random.default_rng(seed), args, ops.dtype)
    return weights | {"output.weight": weights["tok_embeddings.weight"]} if tied else weights


def tolerance(ops, wide=GRADIENT_64, narrow=GRADIENT_32):
    return wide if ops.dtype == np.float64 else narrow


def assert_gradients(found, wanted, allowed):
    """The same names, and each within a share of its largest number.

    Those of wq and wk may cancel to 0, as where a token sees itself alone. Their terms are as large as the
    other gradients, and each is rounded. So a tenth of the largest of all counts too.
    In float32 on one token they err by 5e-7 of the largest of all, and in PyTorch by 1e-7.
    """
    assert_that(found.keys() == wanted.keys(), f"gradients of {sorted(found)}, wanted: {sorted(wanted)}")
    most = {name: np.abs(x).max() for name, x in wanted.items()}
    for name, x in wanted.items():
        assert_within(found[name], x, allowed * (most[name] + max(most.values()) / 10))


def summed(one, other):
    return {name: one[name] + other[name] for name in one}


# --- a block ----------------------------------------------------------------------------------------------


def random_block(ops, args, seed, T, cuts):
    """A block that learns, x, freqs_cis and first."""
    rng = np.random.default_rng(seed)
    model = learning.Learner(Transformer(args, random_weights(rng, args, ops.dtype)))
    first = documents(Source(seed, True), 2, T, cuts)
    freqs_cis = model.freqs_cis[np.arange(T) - first]
    return model.layers[0], rng.normal(size=(2, T, args.dim)).astype(ops.dtype), freqs_cis, first


def saved_by(ops, *arguments):
    """What the block's forward pass saves: their own, or NumPy's if they have none."""
    forward = ops.block_forward if "block_forward" in ops.operations else backward.block_forward
    return forward(*arguments)[1]


@whole("block_forward", configurations(), seeds, lengths)
def test_a_block_forward_is_the_block(ops, args, seed, T):
    """On one document y is what TransformerBlock computes, which predicts."""
    block, x, freqs_cis, first = random_block(ops, args, seed, T, 0)
    cache = Transformer(args, random_model(ops, args, seed)).new_cache(2)
    y, _ = ops.block_forward(block, x, freqs_cis, first)
    assert_near(y, block(x, 0, freqs_cis, cache), tolerance(ops, CHUNKS_64, CHUNKS_32))


@whole("block_backward", configurations(), seeds, lengths, cuts)
def test_a_block_as_autograd(ops, args, seed, T, cuts):
    """dx and the gradients of the nine weights are those of autograd, in rows of several documents."""
    block, x, freqs_cis, first = random_block(ops, args, seed, T, cuts)
    dy = np.random.default_rng(seed + 1).normal(size=x.shape).astype(x.dtype)
    saved = saved_by(ops, block, x, freqs_cis, first)
    dx, found = ops.block_backward(block, dy, saved, freqs_cis, first)
    _, saved = backward.block_forward(block, x, freqs_cis, first)
    dx_wanted, wanted = torch_ops.block_backward(block, dy, saved, freqs_cis, first)
    assert_near(dx, dx_wanted, tolerance(ops))
    assert_gradients(found, wanted, tolerance(ops))


@whole("block_backward", configurations(), seeds, st.integers(2, 24), st.data())
def test_no_gradient_of_a_block_comes_from_before(ops, args, seed, T, data):
    """With dy only at earlier positions, dx of the later ones is 0."""
    block, x, freqs_cis, first = random_block(ops, args, seed, T, 0)
    t = data.draw(st.integers(1, T - 1), label="position")
    dy = np.random.default_rng(seed + 1).normal(size=x.shape).astype(x.dtype)
    dy[:, t:] = 0
    saved = saved_by(ops, block, x, freqs_cis, first)
    dx, _ = ops.block_backward(block, dy, saved, freqs_cis, first)
    assert_same(dx[:, t:], np.zeros_like(dx[:, t:]))


# --- the model --------------------------------------------------------------------------------------------


@whole("Learner", configurations(), seeds, st.booleans(), cuts)
def test_gradients_as_autograd(ops, args, seed, tied, cuts):
    """The loss and the gradient of every weight are those of the transcription to PyTorch."""
    weights, batch = random_model(ops, args, seed, tied), Batch(ops, args, seed, cuts=cuts)
    loss, found = ops.Learner(args, weights).loss_and_gradients(*batch)
    wide = {name: w.astype(np.float64) for name, w in weights.items()}
    if tied:
        wide["output.weight"] = wide["tok_embeddings.weight"]
    wanted_loss, wanted = torch_ops.Learner(args, wide).loss_and_gradients(*batch)
    assert_within(loss, wanted_loss, tolerance(ops) * np.abs(batch.weights).sum() * np.log(args.vocab_size))
    assert_gradients(found, wanted, tolerance(ops))


@whole("Learner", configurations(), seeds, cuts)
def test_they_are_the_slope_of_the_loss(ops, args, seed, cuts):
    """A small step in any direction changes the loss by <gradients, step>."""
    if ops.dtype != np.float64:
        return  # a small step would vanish in float32
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed, 1, 12, cuts)
    _, found = ops.Learner(args, weights).loss_and_gradients(*batch)
    step = {name: 1e-5 * batch.rng.normal(size=w.shape) for name, w in weights.items()}
    above, below = (
        ops.Learner(args, {n: w + sign * step[n] for n, w in weights.items()}).loss_and_gradients(*batch)[0]
        for sign in (1, -1)
    )
    products = {name: found[name] * step[name] for name in found}
    size = sum(np.abs(x).sum() for x in products.values())
    assert_within((above - below) / 2, sum(x.sum() for x in products.values()), 1e-6 * size + 1e-12)


@whole("Learner", configurations(), seeds, st.sampled_from([-100, -1, 10**6]))
def test_a_masked_target_does_not_count(ops, args, seed, masked):
    """Where the weight is 0 the target may be any number: loss and gradients are the same bits."""
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed)
    learner = ops.Learner(args, weights)
    loss, wanted = learner.loss_and_gradients(*batch)
    batch.targets = np.where(batch.weights == 0, masked, batch.targets)
    again, found = learner.loss_and_gradients(*batch)
    assert_same(again, loss)
    assert_gradients(found, wanted, 0)


@whole("Learner", configurations(), seeds)
def test_nothing_trained_teaches_nothing(ops, args, seed):
    """A batch of masked targets alone has the loss 0, and for every weight a gradient of 0."""
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed)
    batch.weights = np.zeros_like(batch.weights)
    loss, found = ops.Learner(args, weights).loss_and_gradients(*batch)
    assert_same(loss, 0.0)
    assert_gradients(found, {name: np.zeros_like(w) for name, w in weights.items()}, 0)


@whole("Learner", configurations(), seeds, st.integers(1, 23))
def test_the_future_teaches_nothing(ops, args, seed, t):
    """Tokens after the last trained target change no gradient, and their own embeddings learn nothing."""
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed)
    batch.weights[:, t:] = 0
    learner = ops.Learner(args, weights)
    _, wanted = learner.loss_and_gradients(*batch)
    unseen = np.setdiff1d(batch.tokens[:, t:], batch.tokens[:, :t])
    assert_same(wanted["tok_embeddings.weight"][unseen], np.zeros((len(unseen), args.dim)))
    batch.tokens[:, t:] = random_tokens(batch.rng, args, 2, 24 - t)
    _, found = learner.loss_and_gradients(*batch)
    assert_gradients(found, wanted, tolerance(ops, CHUNKS_64, CHUNKS_32))


@whole("Learner", configurations(), seeds)
def test_a_tied_embedding_gets_both_gradients(ops, args, seed):
    """As the table and as the output: its gradient is the sum of the two."""
    tied, batch = random_model(ops, args, seed, tied=True), Batch(ops, args, seed)
    apart = tied | {"output.weight": tied["output.weight"].copy()}
    _, wanted = ops.Learner(args, apart).loss_and_gradients(*batch)
    wanted["tok_embeddings.weight"] = wanted["tok_embeddings.weight"] + wanted.pop("output.weight")
    _, found = ops.Learner(args, tied).loss_and_gradients(*batch)
    assert_gradients(found, wanted, tolerance(ops, CHUNKS_64, CHUNKS_32))


@whole("Learner", configurations(), seeds, st.integers(1, 23))
def test_micro_batches_add_up(ops, args, seed, cut):
    """A batch in pieces gives the sum of their gradients: rows one at a time, or packed documents alone."""
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed)
    learner = ops.Learner(args, weights)
    loss, found = learner.loss_and_gradients(*batch)
    (one, g_one), (other, g_other) = (
        learner.loss_and_gradients(*batch.cut([b], slice(None))) for b in (0, 1)
    )
    assert_within(one + other, loss, tolerance(ops) * np.abs(batch.weights).sum() * np.log(args.vocab_size))
    assert_gradients(summed(g_one, g_other), found, tolerance(ops))
    batch.first[:, cut:] = cut
    _, found = learner.loss_and_gradients(*batch)
    halves = [
        learner.loss_and_gradients(*batch.cut(slice(2), part))[1] for part in (slice(cut), slice(cut, 24))
    ]
    assert_gradients(summed(*halves), found, tolerance(ops))


@whole("Learner", configurations(), seeds)
def test_twice_the_weights_of_the_targets(ops, args, seed):
    """Twice the weights give twice the loss and twice the gradients, to the bit."""
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed)
    learner = ops.Learner(args, weights)
    loss, wanted = learner.loss_and_gradients(*batch)
    batch.weights = 2 * batch.weights
    twice, found = learner.loss_and_gradients(*batch)
    assert_same(twice, 2 * loss)
    assert_gradients(found, {name: 2 * x for name, x in wanted.items()}, 0)


# --- how a learner works: PyTorch's has only the gradients -------------------------------------------------


@whole("Learner Transformer block_forward", configurations(), seeds, st.booleans())
def test_it_is_still_the_model(ops, args, seed, tied):
    """Its logits, and the hidden states of `forward`, are those of the model, whose weights it uses."""
    weights, batch = random_model(ops, args, seed, tied), Batch(ops, args, seed)
    learner, model = ops.Learner(args, weights), ops.Transformer(args, weights)
    allowed = tolerance(ops, CHUNKS_64, CHUNKS_32)
    assert_near(learner(batch.tokens), model(batch.tokens), allowed)
    assert_near(learner.logits(learner.forward(batch.tokens).h), model(batch.tokens), allowed)
    wanted = [name for name in weights if not (tied and name == "output.weight")]
    assert_that(sorted(learner.parameters()) == sorted(wanted), f"{list(learner.parameters())} learn")


@whole("Learner block_forward", configurations(), seeds, st.booleans(), cuts)
def test_checkpointing_changes_no_bit(ops, args, seed, tied, cuts):
    """A block that is computed again gives the same loss and the same gradients, to the bit."""
    weights, batch = random_model(ops, args, seed, tied), Batch(ops, args, seed, cuts=cuts)
    learner = ops.Learner(args, weights)
    loss, wanted = learner.loss_and_gradients(*batch)
    again = ops.Learner(args, weights, learning.checkpointing(learner.functions))
    run = again.forward(batch.tokens, batch.first)
    assert_that(all(x.shape == run.h.shape for x in run.saved), "more than x is kept of a block")
    found_loss, found = again.backward(run, batch.targets, batch.weights)
    assert_same(found_loss, loss)
    assert_gradients(found, wanted, 0)


@whole("Learner block_forward", configurations(), seeds, cuts)
def test_gradients_are_added_to_given_ones(ops, args, seed, cuts):
    """`backward` with gradients adds to them: two passes give the sum of both."""
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed, cuts=cuts)
    learner = ops.Learner(args, weights)
    _, wanted = learner.loss_and_gradients(*batch)
    found: dict[str, Array] = {}
    for _ in range(2):
        run = learner.forward(batch.tokens, batch.first)
        _, found = learner.backward(run, batch.targets, batch.weights, found)
    assert_gradients(found, {name: 2 * x for name, x in wanted.items()}, 0)


@whole("Learner block_forward", configurations(), seeds, cuts)
def test_the_loss_is_made_of_log_probabilities(ops, args, seed, cuts):
    """loss = -sum weights log p, where the weights may depend on the log p, as in DPO and PPO."""
    weights, batch = random_model(ops, args, seed), Batch(ops, args, seed, cuts=cuts)
    learner = ops.Learner(args, weights)
    run = learner.forward(batch.tokens, batch.first)
    log_p = learner.log_probs(run, batch.targets, batch.weights != 0)
    loss, _ = learner.backward(run, batch.targets, batch.weights)
    size = np.abs(batch.weights).sum() * np.log(args.vocab_size)
    assert_within(-(log_p * batch.weights).sum(), loss, tolerance(ops, CHUNKS_64, CHUNKS_32) * size)


class Adapter:
    """y = base(x) + (x a^T) b^T over a part that does not learn (LoRA, Hu et al. 2021, without its scale)."""

    learned = ("a", "b")

    def __init__(self, base, a, b):
        self.base, self.a, self.b = base, a, b

    def __call__(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T

    def backward(self, dy, x):
        dz = dy @ self.b
        own = {"a": backward.linear_dw(dz, x), "b": backward.linear_dw(dy, x @ self.a.T)}
        return self.base.backward(dy, x)[0] + dz @ self.a, own


@whole("Learner block_forward", configurations(), seeds, st.booleans(), cuts)
def test_only_what_is_put_in_learns(ops, args, seed, tied, cuts):
    """In a frozen learner only adapters learn: da = b^T dW and db = dW a^T, for the merged weight W + b a."""
    weights, batch = random_model(ops, args, seed, tied), Batch(ops, args, seed, cuts=cuts)
    frozen = ops.Learner(args, weights, None, True)
    assert_that(frozen.parameters() == {}, "a frozen learner has parameters")
    adapters, merged = {}, dict(weights)
    bases = {"layers.0.attention.wk": frozen.layers[0].attention.wk, "output": frozen.output}
    for name, base in bases.items():
        OUT, IN = weights[f"{name}.weight"].shape
        a, b = (batch.rng.normal(size=n).astype(ops.dtype) / 4 for n in ((3, IN), (OUT, 3)))
        adapters[name] = Adapter(base, a, b)
        merged[f"{name}.weight"] = weights[f"{name}.weight"] + b @ a
    adapted = frozen.with_parts(adapters)
    loss, found = adapted.loss_and_gradients(*batch)
    assert_that(found.keys() == adapted.parameters().keys(), f"gradients of {list(found)}")
    wanted_loss, full = ops.Learner(args, merged).loss_and_gradients(*batch)
    assert_within(loss, wanted_loss, tolerance(ops) * np.abs(batch.weights).sum() * np.log(args.vocab_size))
    wanted: dict[str, Array] = {}
    for name, part in adapters.items():
        wanted |= {
            f"{name}.a": part.b.T @ full[f"{name}.weight"],
            f"{name}.b": full[f"{name}.weight"] @ part.a.T,
        }
    assert_gradients(found, wanted, 4 * tolerance(ops))
