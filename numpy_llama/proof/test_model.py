"""The whole model on random tiny weights: against PyTorch and transformers, and against itself in pieces."""

import functools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st

from ..config import Array
from . import tiny, torch_ops
from .bounds import CHUNKS_32, CHUNKS_64, MODEL_32, MODEL_64, assert_near, assert_same
from .laws import assert_refused, assert_that, law, seeds
from .oracle import Oracle
from .tiny import CONTEXT, GENERATIONS, TINY, configurations, random_tokens, random_weights

# Two distributions over the vocabulary that are this close look the same in a sample of 10^8 tokens.
KULLBACK_LEIBLER = 1e-8

whole = functools.partial(law, share=1 / 5)


@pytest.fixture(scope="module")
def oracle():
    with Oracle() as one:
        yield one


def model_and_tokens(ops, args, seed, B=2, T=CONTEXT):
    rng = np.random.default_rng(seed)
    return ops.Transformer(args, random_weights(rng, args, ops.dtype)), random_tokens(rng, args, B, T)


def tolerance(ops, wide=CHUNKS_64, narrow=CHUNKS_32):
    return wide if ops.dtype == np.float64 else narrow


# --- against PyTorch --------------------------------------------------------------------------------------


@whole("Transformer", configurations(), seeds, st.booleans())
def test_logits_as_pytorch(ops, args, seed, tied):
    """In the finest precision, the logits of the transcription to PyTorch."""
    rng = np.random.default_rng(seed)
    weights, tokens = random_weights(rng, args, ops.dtype, tied), random_tokens(rng, args)
    logits = ops.Transformer(args, weights)(tokens)
    assert_that(logits.dtype == ops.dtype, f"{ops.dtype} went in, {logits.dtype} came out")
    wide = {name: w.astype(np.float64) for name, w in weights.items()}
    assert_near(logits, torch_ops.Transformer(args, wide)(tokens), tolerance(ops, MODEL_64, MODEL_32))


expected_logits: dict[str, list[Array]] = {}  # the same examples come again for the next implementation


@law("Transformer", tiny.longer_configurations(), seeds, st.booleans(), share=1 / 5)
def test_256_tokens_as_both(ops, oracle, args, seed, tied):
    """On 256 teacher-forced tokens in float32, the logits equal those of PyTorch and of transformers within 5
    millionths of the largest. The choice is the same where the two likeliest differ by more, and so is the
    distribution."""
    compare_with_both(ops, oracle, args, seed, tied)


@law("Transformer rms_norm softmax", tiny.longer_configurations(), seeds, st.booleans(), share=5 / 3)
def test_many_configurations_as_both(ops, oracle, args, seed, tied):
    """The same for many more models, of whoever has all the parts: of them the C kernels have two."""
    compare_with_both(ops, oracle, args, seed, tied)


def compare_with_both(ops, oracle, args, seed, tied):
    rng = np.random.default_rng(seed)
    weights, tokens = random_weights(rng, args, np.float32, tied), random_tokens(rng, args, 1, 256)
    key = repr((args, seed, tied))
    if key not in expected_logits:
        expected_logits[key] = oracle.both(args, weights, tokens)
    logits = ops.Transformer(args, weights)(tokens)
    assert_that(logits.dtype == np.float32, f"float32 went in, {logits.dtype} came out")
    # A RoPE scaling makes queries and keys longer: scores, and their rounding, grow by the square.
    longer = 1.0 if args.rope_scaling is None else max(args.rope_scaling.length_factor, 1.0)
    allowed = MODEL_32 * longer**2
    for expected in expected_logits[key]:
        assert_near(logits, expected, allowed)
        second, first = np.sort(expected, axis=-1)[..., -2:].transpose(2, 0, 1)
        clear = first - second > 2 * allowed * np.abs(expected).max()
        assert_same(logits.argmax(-1)[clear], expected.argmax(-1)[clear])
        assert_that(divergence(expected, logits) < KULLBACK_LEIBLER, "other probabilities")


def divergence(expected, logits):
    """The largest Kullback-Leibler divergence of the positions, in nat."""
    p, q = (
        x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True)
        for x in (expected, logits)
    )
    return (np.exp(p) * (p - q)).sum(-1).max()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("generation", GENERATIONS)
@law("Transformer")
def test_every_generation_as_both(ops, oracle, generation, tied):
    """LLaMA 1, 2, 3, 3.1 and 3.2, in float32."""
    rng, args = np.random.default_rng(0), GENERATIONS[generation]
    weights, tokens = random_weights(rng, args, np.float32, tied), random_tokens(rng, args, T=CONTEXT)
    logits = ops.Transformer(args, weights)(tokens)
    for expected in oracle.both(args, weights, tokens):
        assert_near(logits, expected, MODEL_32)


@pytest.mark.parametrize("generation", ["llama3", "llama3.1", "llama3.2"])
@law("Transformer")
def test_the_generations_differ(ops, generation):
    """The comparisons mean something: theta, scaling and its factor all show within the context."""
    args = replace(GENERATIONS[generation], vocab_size=TINY.vocab_size)
    rng = np.random.default_rng(0)
    weights, tokens = random_weights(rng, TINY, ops.dtype), random_tokens(rng, TINY, T=CONTEXT)
    logits = ops.Transformer(args, weights)(tokens)
    others = [replace(a, vocab_size=TINY.vocab_size) for a in GENERATIONS.values() if a.n_kv_heads == 2]
    for other in others:
        if other != args:
            difference = np.abs(ops.Transformer(other, weights)(tokens) - logits).max()
            assert_that(difference > 1e-3, f"{other} gives the same")


# --- what every model does --------------------------------------------------------------------------------


@whole("Transformer", configurations(), seeds)
def test_every_position_has_logits(ops, args, seed):
    """(B, T) ids -> (B, T, V)."""
    model, tokens = model_and_tokens(ops, args, seed)
    shape, wanted = model(tokens).shape, (*tokens.shape, args.vocab_size)
    assert_that(shape == wanted, f"{wanted} wanted, {shape} came")


@whole("Transformer", configurations(), seeds, st.integers(1, CONTEXT - 1))
def test_the_future_does_not_matter(ops, args, seed, split):
    """Other tokens from `split` on change no logit before it, and some logit from there on."""
    model, tokens = model_and_tokens(ops, args, seed)
    other = tokens.copy()
    other[:, split:] = (tokens[:, split:] + 1) % args.vocab_size
    before, after = model(tokens), model(other)
    assert_near(before[:, :split], after[:, :split], tolerance(ops))
    assert_that((before[:, split] != after[:, split]).any(), f"token {split} changes nothing")


@whole("Transformer", configurations(), seeds)
def test_rows_of_a_batch_are_independent(ops, args, seed):
    """Each sequence gives what it gives alone."""
    model, tokens = model_and_tokens(ops, args, seed, 3)
    assert_near(model(tokens[[1]]), model(tokens)[[1]], tolerance(ops))


@whole("Transformer", configurations(), seeds)
def test_the_order_of_words_matters(ops, args, seed):
    """Two tokens exchanged: without RoPE the last position would compute the same."""
    args = replace(args, n_layers=1)
    model, tokens = model_and_tokens(ops, args, seed, 1, 5)
    tokens[0] = [0, 1, 2, 3, 4]
    exchanged = tokens[:, [1, 0, 2, 3, 4]]
    one, other = model(tokens)[:, -1], model(exchanged)[:, -1]
    assert_that(np.abs(one - other).max() > 1e-5 * np.abs(one).max(), "the last position computes the same")


@whole("Transformer", configurations(), seeds)
def test_the_last_norms_weight_scales_the_logits(ops, args, seed):
    """Twice the weight of the last norm doubles every logit, exactly."""
    rng = np.random.default_rng(seed)
    weights, tokens = random_weights(rng, args, ops.dtype), random_tokens(rng, args)
    twice = {**weights, "norm.weight": 2 * weights["norm.weight"]}
    assert_same(ops.Transformer(args, twice)(tokens), 2 * ops.Transformer(args, weights)(tokens))


@whole("Transformer", configurations(), seeds)
def test_gate_and_up_are_not_the_same(ops, args, seed):
    """w1 and w3 exchanged give other logits: silu stands on one of them."""
    rng = np.random.default_rng(seed)
    weights, tokens = random_weights(rng, args, ops.dtype), random_tokens(rng, args)
    swapped = {**weights}
    for i in range(args.n_layers):
        gate, up = f"layers.{i}.feed_forward.w_gate.weight", f"layers.{i}.feed_forward.w_up.weight"
        swapped |= {gate: weights[up], up: weights[gate]}
    one, other = (ops.Transformer(args, w)(tokens) for w in (weights, swapped))
    assert_that(np.abs(one - other).max() > 1e-4 * np.abs(one).max(), "exchanging them changed nothing")


@whole("Transformer", configurations(), seeds)
def test_a_layer_of_zeros_adds_nothing(ops, args, seed):
    """wo = 0 and w_down = 0 in the last layer: the residual stream passes, as if the layer were not there."""
    rng, args = np.random.default_rng(seed), replace(args, n_layers=2)
    weights, tokens = random_weights(rng, args, ops.dtype), random_tokens(rng, args)
    for name in ("attention.wo", "feed_forward.w_down"):
        weights[f"layers.1.{name}.weight"] = np.zeros_like(weights[f"layers.1.{name}.weight"])
    short = {name: w for name, w in weights.items() if not name.startswith("layers.1.")}
    expected = ops.Transformer(replace(args, n_layers=1), short)(tokens)
    assert_same(ops.Transformer(args, weights)(tokens), expected)


@pytest.mark.parametrize("bad", [-1, TINY.vocab_size])
@law("Transformer")
def test_ids_outside_the_vocabulary_are_refused(ops, bad):
    """They raise, and never count from the end."""
    model, _ = model_and_tokens(ops, TINY, 0)
    assert_refused(lambda: model(np.array([[0, bad]])), f"id {bad} of {TINY.vocab_size}")


# --- with a cache -----------------------------------------------------------------------------------------


def poisoned_cache(model, batch):
    cache = model.new_cache(batch)
    cache.k[...], cache.v[...] = np.nan, np.nan
    return cache


def in_chunks(model, tokens, chunks):
    cache, start_pos, logits = poisoned_cache(model, len(tokens)), 0, []
    for T in chunks:
        logits.append(model(tokens[:, start_pos : start_pos + T], start_pos, cache))
        start_pos += T
    return np.concatenate(logits, axis=1)


@whole("Transformer KVCache", configurations(), seeds, st.sets(st.integers(1, CONTEXT - 1)))
def test_chunks_of_any_size_are_the_whole(ops, args, seed, cuts):
    """However a prompt is cut, with slots never written full of NaN, the logits are those of one pass."""
    model, tokens = model_and_tokens(ops, args, seed)
    chunks = np.diff([0, *sorted(cuts), CONTEXT])
    assert_near(in_chunks(model, tokens, chunks), model(tokens), tolerance(ops))


@whole("Transformer KVCache", configurations(), seeds)
def test_token_by_token_is_the_whole(ops, args, seed):
    """Decoding gives what prefill gives."""
    model, tokens = model_and_tokens(ops, args, seed)
    assert_near(in_chunks(model, tokens, [1] * CONTEXT), model(tokens), tolerance(ops))


@whole("Transformer KVCache", configurations(), seeds, st.integers(1, CONTEXT - 1))
def test_rewind_and_replay(ops, args, seed, split):
    """A cache is rewound by starting earlier: what lies behind start_pos is forgotten."""
    model, tokens = model_and_tokens(ops, args, seed)
    cache = poisoned_cache(model, 2)
    model((tokens + 1) % args.vocab_size, 0, cache)
    parts = [model(tokens[:, :split], 0, cache), model(tokens[:, split:], split, cache)]
    assert_near(np.concatenate(parts, axis=1), model(tokens), tolerance(ops))


@whole("Transformer KVCache", configurations(), seeds)
def test_two_caches_are_two_conversations(ops, args, seed):
    """One model, two caches, turn by turn: each gives what it gives alone."""
    model, a = model_and_tokens(ops, args, seed, 1, 8)
    b = (a + 1) % args.vocab_size
    cache_a, cache_b = poisoned_cache(model, 1), poisoned_cache(model, 1)
    for i in range(8):
        last_a, last_b = model(a[:, [i]], i, cache_a), model(b[:, [i]], i, cache_b)
    assert_near(last_a[:, 0], model(a)[:, -1], tolerance(ops))
    assert_near(last_b[:, 0], model(b)[:, -1], tolerance(ops))


@whole("Transformer KVCache", seeds, st.integers(1, 6), st.integers(1, 5))
def test_what_does_not_fit_is_refused_before_anything_is_written(ops, seed, start, beyond):
    """A cache that is full holds what it held."""
    model, tokens = model_and_tokens(ops, TINY, seed, 1, 6)
    cache = model.new_cache(1, 6)
    model(tokens, 0, cache)
    k, v = cache.k.copy(), cache.v.copy()
    more = random_tokens(np.random.default_rng(seed), TINY, 1, 6 - start + beyond)
    assert_refused(lambda: model(more, start, cache), f"{more.shape[1]} tokens at {start} of 6")
    assert_same(cache.k, k)
    assert_same(cache.v, v)
