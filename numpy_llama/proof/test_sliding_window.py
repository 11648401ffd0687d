"""A sliding window: a query sees the last `window` positions, its own included (Beltagy et al. 2020)."""

from dataclasses import replace

import numpy as np
from hypothesis import strategies as st

from ..config import ModelArgs
from . import torch_ops
from .bounds import CHUNKS_32, CHUNKS_64, MODEL_32, MODEL_64, assert_near, assert_same, assert_within
from .laws import assert_that, law, seeds, sources
from .test_attention import bound, drawn, shapes
from .test_model import in_chunks, model_and_tokens, tolerance, whole
from .tiny import CONTEXT, configurations, random_tokens, random_weights

# Windows that end within a block of a kernel, at its end, and beyond all positions.
windows = st.one_of(st.integers(1, 12), st.sampled_from([63, 64, 65, 127, 128, 129, 200, 400]))


@law("windowed_attention", sources, shapes(), windows)
def test_as_pytorch(ops, source, n, window):
    """It gives what torch's scaled_dot_product_attention gives, with the mask of the window."""
    q, k, v = drawn(source, n)
    wide_q, wide_k, wide_v = (x.astype(np.float64) for x in (q, k, v))
    expected = torch_ops.windowed_attention(wide_q, wide_k, wide_v, window)
    assert_within(ops.windowed_attention(q, k, v, window), expected, 2 * bound(q, k, v))


@law("windowed_attention", sources, shapes(), windows)
def test_a_key_outside_the_window_changes_nothing(ops, source, n, window):
    """The first query's window begins at S - T - window + 1. What lies before may be anything."""
    q, k, v = drawn(source, n)
    before = ops.windowed_attention(q, k, v, window)
    outside = max(n.S - n.T - window + 1, 0)
    k2, v2 = k.copy(), v.copy()
    k2[:, :outside], v2[:, :outside] = 99, -1000
    assert_same(ops.windowed_attention(q, k2, v2, window), before)


@law("windowed_attention", sources, shapes(), windows, st.data())
def test_each_query_has_a_window_of_its_own(ops, source, n, window, data):
    """What query t gives is what it gives alone, with only the positions of its window."""
    q, k, v = drawn(source, n)
    t = data.draw(st.integers(0, n.T - 1), label="query")
    end = n.S - n.T + t + 1
    seen = slice(max(end - window, 0), end)
    alone = ops.windowed_attention(q[:, [t]], k[:, seen], v[:, seen], window)
    assert_within(ops.windowed_attention(q, k, v, window)[:, [t]], alone, 2 * bound(q, k, v))


@law("windowed_attention", sources, shapes(), windows)
def test_the_first_position_of_the_window_matters(ops, source, n, window):
    """More of its value gives more."""
    q, k, v = drawn(source, n)
    q, k = q / 8, k / 8  # no share may vanish in rounding
    first = max(n.S - window, 0)  # of the last query
    more = v.copy()
    more[:, first] += 1000
    before, after = (ops.windowed_attention(q, k, x, window)[:, -1] for x in (v, more))
    assert_that(after > before, f"the last query does not see position {first}")


@law("windowed_attention attention", sources, shapes(), st.integers(0, 9))
def test_a_window_of_all_positions_is_none(ops, source, n, more):
    """window >= S: the same numbers as without it."""
    q, k, v = drawn(source, n)
    assert_same(ops.windowed_attention(q, k, v, n.S + more), ops.attention(q, k, v))


@law("windowed_attention", sources, shapes())
def test_a_window_of_one_is_the_own_value(ops, source, n):
    """Each query gives the value of its own position."""
    q, k, v = drawn(source, n)
    assert_same(ops.windowed_attention(q, k, v, 1), np.repeat(v[:, n.S - n.T :], n.H // n.K, axis=2))


@whole("Transformer", configurations(), seeds, st.integers(1, CONTEXT))
def test_logits_as_pytorch(ops, args, seed, window):
    """In the finest precision, the logits of the transcription to PyTorch."""
    rng, args = np.random.default_rng(seed), replace(args, sliding_window=window)
    weights, tokens = random_weights(rng, args, ops.dtype), random_tokens(rng, args)
    wide = {name: w.astype(np.float64) for name, w in weights.items()}
    expected = torch_ops.Transformer(args, wide)(tokens)
    assert_near(ops.Transformer(args, weights)(tokens), expected, tolerance(ops, MODEL_64, MODEL_32))


@whole(
    "Transformer KVCache",
    configurations(),
    seeds,
    st.integers(1, CONTEXT),
    st.sets(st.integers(1, CONTEXT - 1)),
)
def test_chunks_of_any_size_are_the_whole(ops, args, seed, window, cuts):
    """Prefill in chunks, and decode, give the logits of one pass."""
    model, tokens = model_and_tokens(ops, replace(args, sliding_window=window), seed)
    chunks = np.diff([0, *sorted(cuts), CONTEXT]).tolist()
    assert_near(in_chunks(model, tokens, chunks), model(tokens), tolerance(ops, CHUNKS_64, CHUNKS_32))


@law(
    "WindowKVCache", sources, st.integers(1, 9), st.lists(st.sampled_from([1, 7, 130, 512, 700]), max_size=9)
)
def test_the_cache_returns_what_is_seen_and_stores_little_more(ops, source, window, pieces):
    """After each update, of any length: the T new positions and the window - 1 before them."""
    args = ModelArgs(8, 2, 2, 1, 2, 8, 8, 1e-5, 1e4, 7000, sliding_window=window)
    cache, kept = ops.WindowKVCache(args, 1, 7000, source.dtype), source.array(1, 0, 1, 2)
    for T in pieces:
        start, new = kept.shape[1], source.array(1, T, 1, 2)
        kept = np.concatenate([kept, new], axis=1)
        for layer in range(2):
            keys, values = cache.update(layer, start, new, -new)
            seen = kept[:, max(start - window + 1, 0) :]
            assert_same(keys, seen)
            assert_same(values, -seen)
    assert_that(cache.k.shape[3] <= window + 640, "it has room for much more than the window and a chunk")
