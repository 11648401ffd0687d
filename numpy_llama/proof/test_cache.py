"""The KV cache: what was computed for a position is kept, and found again."""

from functools import partial

import numpy as np
from hypothesis import strategies as st

from ..config import ModelArgs
from .bounds import assert_same
from .laws import assert_refused, assert_that, law, small_sizes, sources

ROOM = 9
ARGS = ModelArgs(8, 3, 4, 2, 4, 8, 8, 1e-5, 1e4, ROOM)  # 3 layers, 2 key heads of 4 numbers


def new(ops, source, B):
    """A cache full of NaN: no slot may be read before it is written."""
    cache = ops.KVCache(ARGS, B, ROOM, source.dtype)
    for name in ("k", "v"):
        if isinstance(getattr(cache, name, None), np.ndarray):
            getattr(cache, name)[...] = np.nan
    return cache


def keys_values(source, B, T):
    return source.array(B, T, 2, 4), source.array(B, T, 2, 4)


@law("KVCache", sources, st.integers(1, 3), st.integers(1, ROOM), st.integers(0, 2))
def test_what_is_stored_comes_back(ops, source, B, T, layer):
    """update returns all keys and values so far, (B, S, K, Dh), bit for bit."""
    xk, xv = keys_values(source, B, T)
    keys, values = new(ops, source, B).update(layer, 0, xk, xv)
    assert_same(keys, xk)
    assert_same(values, xv)


@law("KVCache", sources, st.integers(1, 3), st.integers(0, ROOM))
def test_pieces_make_up_the_whole(ops, source, B, cut):
    """However a sequence is cut, what lies in the cache at the end is the same."""
    xk, xv = keys_values(source, B, ROOM)
    cache = new(ops, source, B)
    cache.update(0, 0, xk[:, :cut], xv[:, :cut])
    keys, values = cache.update(0, cut, xk[:, cut:], xv[:, cut:])
    assert_same(keys, xk)
    assert_same(values, xv)


@law("KVCache", sources, st.integers(1, 3))
def test_one_position_after_the_other(ops, source, B):
    """After position s, s + 1 positions are there, the new one last."""
    xk, xv = keys_values(source, B, ROOM)
    cache = new(ops, source, B)
    for s in range(ROOM):
        keys, values = cache.update(1, s, xk[:, [s]], xv[:, [s]])
        assert_same(keys, xk[:, : s + 1])
        assert_same(values, xv[:, : s + 1])


@law("KVCache", sources, small_sizes)
def test_layers_do_not_mix(ops, source, T):
    """Each layer has its own positions."""
    cache, stored = new(ops, source, 2), {}
    for layer in (0, 2, 1):
        stored[layer] = keys_values(source, 2, T)
        cache.update(layer, 0, *stored[layer])
    for layer, (xk, xv) in stored.items():
        more = keys_values(source, 2, 1)
        keys, values = cache.update(layer, T, *more)
        assert_same(keys[:, :T], xk)
        assert_same(values[:, :T], xv)


@law("KVCache", sources, small_sizes, st.integers(0, 4))
def test_an_earlier_start_forgets_what_lay_behind(ops, source, T, start):
    """A cache is rewound by writing earlier: what comes back ends with what was written."""
    cache = new(ops, source, 1)
    xk, xv = keys_values(source, 1, ROOM)
    cache.update(0, 0, xk, xv)
    more_k, more_v = keys_values(source, 1, T)
    keys, values = cache.update(0, start, more_k, more_v)
    assert_same(keys, np.concatenate([xk[:, :start], more_k], axis=1))
    assert_same(values, np.concatenate([xv[:, :start], more_v], axis=1))


@law("KVCache", sources)
def test_two_caches_are_two_conversations(ops, source):
    """Nothing is shared."""
    one, other = new(ops, source, 1), new(ops, source, 1)
    xk, xv = keys_values(source, 1, 3)
    keys, values = one.update(0, 0, xk, xv)
    other.update(0, 0, xk + 1, xv + 1)
    assert_same(keys, xk)
    assert_same(values, xv)


@law("KVCache", sources, st.integers(1, ROOM), st.integers(1, 4))
def test_what_does_not_fit_is_refused_before_anything_is_written(ops, source, start, beyond):
    """A full cache raises, and holds what it held."""
    cache = new(ops, source, 1)
    xk, xv = keys_values(source, 1, ROOM)
    cache.update(0, 0, xk, xv)
    T = ROOM - start + beyond
    assert_refused(
        lambda: cache.update(0, start, *keys_values(source, 1, T)), f"{T} positions at {start} of {ROOM}"
    )
    last = ROOM - 1
    keys, values = cache.update(0, last, xk[:, [last]], xv[:, [last]])
    assert_same(keys, xk)
    assert_same(values, xv)


@law("KVCache", sources, st.integers(-ROOM, -1))
def test_positions_below_0_are_refused(ops, source, start):
    """They do not count from the end."""
    cache = new(ops, source, 1)
    assert_refused(lambda: cache.update(0, start, *keys_values(source, 1, 1)), f"position {start}")


@law("KVCache", sources, st.integers(0, 3))
def test_gaps_are_refused(ops, source, there):
    """What comes after the next free position would leave slots that nobody wrote."""
    cache = new(ops, source, 1)
    if there:
        cache.update(0, 0, *keys_values(source, 1, there))
    message = f"position {there + 1} of a cache that holds {there}"
    assert_refused(lambda: cache.update(0, there + 1, *keys_values(source, 1, 1)), message)


@law("KVCache", sources, st.integers(0, 2))
def test_a_rewound_cache_holds_no_more(ops, source, start):
    """An update at `start` ends the cache there: the positions behind it are a gap again."""
    cache = new(ops, source, 1)
    cache.update(0, 0, *keys_values(source, 1, 4))
    cache.update(0, start, *keys_values(source, 1, 1))
    what = f"position {start + 2} of a cache that was rewound to {start + 1}"
    assert_refused(lambda: cache.update(0, start + 2, *keys_values(source, 1, 1)), what)


# (layer, where to begin, how many), in any order: appended, rewound, or with a gap.
updates = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 99), st.integers(1, 4)), max_size=20)


@law("KVCache", sources, st.integers(1, 3), updates)
def test_only_the_positions_before_the_last_update_count(ops, source, B, updates):
    """After an update of T positions at start, layer by layer, start + T are stored: never more."""
    cache, stored = new(ops, source, B), [keys_values(source, B, 0) for _ in range(3)]
    for layer, place, T in updates:
        more, before = keys_values(source, B, T), stored[layer]
        held = before[0].shape[1]
        start = place % (held + 3)  # the last two are gaps
        if start > held or start + T > ROOM:
            what = f"positions {start}..{start + T - 1} of layer {layer}, which holds {held} of {ROOM}"
            assert_refused(partial(cache.update, layer, start, *more), what)
            continue
        both = zip(before, more, strict=True)
        stored[layer] = tuple(np.concatenate([old[:, :start], x], axis=1) for old, x in both)
        keys, values = cache.update(layer, start, *more)
        assert_same(keys, stored[layer][0])
        assert_same(values, stored[layer][1])


@law("KVCache", sources)
def test_a_batch_of_another_size_is_refused(ops, source):
    """Two sequences do not fit a cache for three."""
    cache = new(ops, source, 3)
    assert_refused(lambda: cache.update(0, 0, *keys_values(source, 2, 1)), "2 sequences of 3")
    assert_refused(lambda: cache.update(0, 0, *keys_values(source, 4, 1)), "4 sequences of 3")


@law("KVCache", sources)
def test_the_precision_is_that_asked_for(ops, source):
    """Half of it takes half the memory: keys are rounded once, when they are stored."""
    cache = ops.KVCache(ARGS, 1, ROOM, np.float16)
    xk, xv = keys_values(source, 1, 3)
    keys, _ = cache.update(0, 0, xk, xv)
    assert_that(keys.dtype == np.float16, f"float16 wanted, {keys.dtype} came back")
    assert_same(keys, xk.astype(np.float16))
