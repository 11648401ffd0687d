"""Branches of a session: each goes on as if it were alone, and the positions before are shared."""

import gc
import os
import pickle
import sys
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny_models import float_weights, stored
from hypothesis import given, settings
from hypothesis import strategies as st

from numpy_llama.backend import build
from numpy_llama.cache import KVCache
from numpy_llama.errors import ResourceLimitError
from numpy_llama.generation import branch as branching
from numpy_llama.generation.batch import BatchCache, hidden_states
from numpy_llama.generation.branch import branch
from numpy_llama.generation.generate import forward
from numpy_llama.generation.session import Session
from numpy_llama.proof.tiny import TINY_BLOCKS

ROOM = 320
ARGS = replace(TINY_BLOCKS, n_layers=2, head_dim=32, n_heads=2, n_kv_heads=1, vocab_size=64, max_seq_len=ROOM)
KINDS = {
    "float32 numpy": {"backend": "numpy"},
    "float64 numpy": {"backend": "numpy", "dtype": np.float64},
    "q8 numpy": {"backend": "numpy", "cache_dtype": "q8"},
    "float32": {"exact": True},
    "float16": {},
    "q8": {"cache_dtype": "q8"},
}
WINDOW, CHUNK = 12, 8


@pytest.fixture(
    scope="module", params=[(kind, window) for kind in KINDS for window in (None, WINDOW)], ids=str
)
def model(request):
    """A model of each kind of cache. With a window it drops 128 positions when it has 148."""
    kind, window = request.param
    args = replace(ARGS, sliding_window=window)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("numpy_llama.window.PREFILL_CHUNK", CHUNK)
        yield build(args, stored(float_weights(args), "F32"), threads=1, **KINDS[kind])


def go_on(model, session: Session, n: int, seed: int = 0) -> np.ndarray:
    """Compute n more ids; -> the logits after the last."""
    ids = np.random.default_rng(seed).integers(ARGS.vocab_size, size=n).tolist()
    for begin in range(0, n, CHUNK):
        logits = forward(model, ids[begin : begin + CHUNK], session)
    return logits


def assert_alike(model, branched: Session, copied: Session) -> None:
    """They hold the same, and go on with the same bits."""
    assert branched.ids == copied.ids
    assert (branched.cache.filled, branched.cache.dropped) == (copied.cache.filled, copied.cache.dropped)
    if len(copied.ids) < ROOM:
        np.testing.assert_array_equal(*(go_on(model, one, 1) for one in (branched, copied)))


@settings(max_examples=20)
@given(data=st.data())
def test_any_branches_are_what_copies_are(model, data):
    """Branches of branches, steps, other continuations and ends in any order, beside a model that copies."""
    pairs = [(Session(model), Session(model))]
    for seed in range(data.draw(st.integers(1, 12))):
        i = data.draw(st.integers(0, len(pairs) - 1))
        branched, copied = pairs[i]
        what = data.draw(st.sampled_from(["branch", "branch", "go on", "go on", "go back", "end"]))
        if what == "branch":
            pairs.append((branched.branch(), deepcopy(copied)))
        elif what == "end" and len(pairs) > 1:
            del pairs[i]
        elif what == "go back":
            end = len(copied.ids)
            kept = data.draw(st.integers(0, end) | st.integers(max(0, end - WINDOW), end))
            prompt = [*copied.ids[:kept], (copied.ids[kept] + 1) % 64 if kept < end else 0, 0]
            assert branched.keep_prefix_of(prompt, model) == copied.keep_prefix_of(prompt, model)
        elif n := min(data.draw(st.integers(1, 9) | st.integers(60, 150)), ROOM - len(copied.ids)):
            found, wanted = (go_on(model, one, n, seed) for one in (branched, copied))
            np.testing.assert_array_equal(found, wanted)
    for pair in pairs:
        assert_alike(model, *pair)


def test_branches_go_on_in_a_batch(model):
    """Beams: branches of one prompt, and one of their branches, with the bits of copies."""
    first = Session(model)
    go_on(model, first, 140)
    beams = [first.branch(), first.branch(), first]
    beams.append(beams[0].branch())
    copies = [deepcopy(one) for one in beams]
    for at in range(140, 152):
        tokens, starts = np.arange(4)[:, None] + at % 60, np.full(4, at)
        found, wanted = (
            hidden_states(model, tokens, starts, BatchCache([one.cache for one in sessions]))
            for sessions in (beams, copies)
        )
        np.testing.assert_array_equal(found, wanted)


def test_what_a_branch_stores_the_others_do_not_see(model):
    """Even at positions that are shared, and whichever of the two begins anew."""
    first = Session(model)
    go_on(model, first, 100)
    copied, branches = deepcopy(first), [first.branch() for _ in range(3)]
    for one in (first, branches[1]):
        one.keep_prefix_of([99], model)
        go_on(model, one, 100, seed=1)
    for one in (branches[0], branches[2]):
        assert_alike(model, one, deepcopy(copied))
    assert_alike(model, first, branches[1])


def test_what_a_window_has_moved_is_not_shared(model):
    """It is full, so the next position moves the last ones to the front."""
    session = Session(model)
    go_on(model, session, 148)
    session.branch()
    go_on(model, session, 1)
    assert_alike(model, session.branch(), deepcopy(session))


def test_a_copy_or_a_pickle_of_a_branch_shares_nothing(model):
    first = Session(model)
    go_on(model, first, 50)
    branched = first.branch()
    for other in (deepcopy(branched), pickle.loads(pickle.dumps(branched))):
        assert type(other.cache.filled) is list and not np.shares_memory(other.cache.k, branched.cache.k)
        other.keep_prefix_of([*other.ids, 0], model)
        assert_alike(model, other, branched.branch())


def test_an_empty_session_has_branches(model):
    assert_alike(model, Session(model).branch(), Session(model))


def test_a_branch_copies_only_what_is_not_shared(model, monkeypatch):
    """Of a long continuation, it is shared too from the next branch on."""
    copied = []

    def copy_positions(cache, to, first, original=branching.copy_positions):
        copied.append(branching.positions(cache, first) // ARGS.n_layers)
        original(cache, to, first)

    monkeypatch.setattr(branching, "copy_positions", copy_positions)
    session = Session(model)
    go_on(model, session, 100)
    twin = session.branch()
    assert copied == [100, 0]
    go_on(model, twin, 7)
    again = twin.branch().branch()
    assert copied == [100, 0, 7, 7]
    go_on(model, again, 35)
    again.branch()
    assert copied[4:] == [42]
    again.keep_prefix_of(again.ids[:40], model)
    go_on(model, again, 3)
    again.branch()
    assert copied[5:] == [3]
    again.branch()
    assert copied[6:] == [3]
    go_on(model, again, 50)  # 39 of 92 are shared
    again.branch()
    assert copied[7:] == [92, 0]


# --- memory -----------------------------------------------------------------------------------------------


def megabytes() -> float:
    """The memory of this process. A page that it maps several times counts once."""
    lines = dict(line.split(":") for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Pss"].split()[0]) / 1024


def full_cache(n: int) -> KVCache:
    cache = KVCache(replace(ARGS, max_seq_len=2 * n), 1, 2 * n)
    for layer in range(ARGS.n_layers):
        cache.update(layer, 0, *np.random.default_rng(layer).random((2, 1, n, 1, 32), np.float32))
    return cache


@pytest.mark.skipif(sys.platform != "linux", reason="how much memory is shared is read from /proc")
def test_many_branches_take_the_memory_of_one():
    """A cache of 16 MB in 32 branches, each of which stores one position: two pages in each of two layers."""
    cache = full_cache(32768)
    branches = [branch(cache)]
    assert cache.k[:, :, :, :32768].sum() > 0 < cache.v[:, :, :, :32768].sum()  # the pages of the file
    before = megabytes()  # now, because the heap may keep those of the first arrays
    branches += [branch(cache) for _ in range(31)]
    for one in branches:
        for layer in range(ARGS.n_layers):
            keys, _ = one.update(layer, 32768, *np.ones((2, 1, 1, 1, 32), np.float32))
            np.testing.assert_array_equal(keys[:, :-1], cache.k[layer].swapaxes(1, 2)[:, :32768])
        assert one.v[:, :, :, :32768].sum() > 0
    used = megabytes() - before
    print(f"\n31 further branches of a cache of 16 MB: {used:.1f} MB more")
    assert used < 16  # one copy more


@pytest.mark.skipif(sys.platform != "linux", reason="open files are counted in /proc")
def test_the_last_branch_frees_the_file():
    """It is open once for the snapshot, and once for each mapping of it."""

    def opened() -> int:
        gc.collect()
        return sum("numpy_llama" in os.path.realpath(one) for one in Path("/proc/self/fd").iterdir())

    before, cache = opened(), full_cache(64)
    wanted = cache.k.copy()
    branches = [branch(branch(cache)) for _ in range(5)]
    assert opened() == before + 1 + 6
    del cache
    keys = branches.pop().k[..., :64, :]
    branches.clear()
    assert opened() == before + 1  # the mapping of those keys
    np.testing.assert_array_equal(keys, wanted[..., :64, :])
    del keys
    assert opened() == before


def test_without_a_file_in_memory_it_is_a_temporary_file(monkeypatch):
    """As on macOS and Windows."""
    monkeypatch.delattr(os, "memfd_create", raising=False)
    cache = full_cache(64)
    wanted = deepcopy(cache)
    other = branch(cache)
    other.update(0, 3, *np.ones((2, 1, 1, 1, 32), np.float32))
    np.testing.assert_array_equal(cache.k[..., :64, :], wanted.k[..., :64, :])


@pytest.mark.parametrize("name", ["_file_in_memory", "mmap"])
def test_no_further_branch_is_one_line(monkeypatch, name):
    """The session itself stays as it was."""

    def refuse(*_, **options):
        raise OSError(24, "Too many open files")

    cache = full_cache(64)
    wanted = deepcopy(cache)
    monkeypatch.setattr(branching, name, refuse)
    with pytest.raises(ResourceLimitError, match="no further branch of the session, Too many open files: "):
        branch(cache)
    assert vars(cache).keys() == vars(wanted).keys() and cache.filled == wanted.filled
    np.testing.assert_array_equal(cache.k[..., :64, :], wanted.k[..., :64, :])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_process_stores_for_itself():
    cache = branch(full_cache(64))
    wanted = cache.k[..., :64, :].copy()
    if not (child := os.fork()):
        cache.k[:] = 7
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    np.testing.assert_array_equal(cache.k[..., :64, :], wanted)
