"""What a model on several ranks does and refuses, in one program. It prints nothing if all is well.

python refusals.py MODEL
"""

import copy
import pickle
import re
import signal
import sys

import numpy as np
import pytest

import numpy_llama as nl
from numpy_llama.cache import KVCache
from numpy_llama.errors import (
    ContextOverflowError,
    FormatError,
    MismatchError,
    NumericsError,
    ParameterError,
    UnsupportedError,
)
from numpy_llama.generation.batch import BatchCache, hidden_states
from numpy_llama.inspect.bench import Task, filled_cache

llama = nl.load(sys.argv[1], threads=1)
model, tokens = llama.model, np.array([[1, 2, 3]])
wanted = model(tokens)


def refused(error, words):
    return pytest.raises(error, match=words)


def unharmed():
    """The other ranks run on."""
    np.testing.assert_array_equal(model(tokens), wanted)


# A function of a user runs on rank 0 only, and may fail there.
def wrong(x):
    raise KeyError("of the function")


fails = {
    "layers.1.attention.wv": (KeyError, "of the function", wrong),
    "layers.0.attention.attention": (KeyError, "of the function", lambda q, k, v: wrong(q)),
    "layers.0.attention.wo": (ValueError, "broadcast", lambda x: x[..., :3]),
    "layers.0.attention_norm": (MismatchError, "x is float32 of shape", lambda x: x[..., :3]),
    "layers.0.ffn_norm": (MismatchError, "x is <U1 of shape", lambda x: np.full(x.shape, "x")),
    "layers.0.attention.wk.linear": (UnsupportedError, "rank 0 has only a part of the weight", np.dot),
    "layers.0.attention.wk": (NumericsError, "layer 0, positions 0..2: a key", lambda x: x[..., :32] * 1e9),
    "layers.0.attention": (
        MismatchError,
        "wanted (B, T, 2, 16)",
        lambda x, start_pos, freqs_cis, cache: cache.update(0, 0, *np.zeros((2, 1, 3, 4, 16))),
    ),
}
for name, (error, words, part) in fails.items():
    with refused(error, re.escape(words)):
        model.with_parts({name: part})(tokens)
    unharmed()
with refused(UnsupportedError, "a part of a model on several ranks cannot be called by itself"):
    model.shared.model.hidden(tokens)
here = KVCache(model.args, 1, 8, np.float16)  # which the other ranks do not have
assert np.abs(model(tokens, 0, here) - wanted).max() < 1e-2 * np.abs(wanted).max()
with refused(UnsupportedError, "in each process"):
    pickle.dumps(model)
assert copy.deepcopy(model) is model

# What an input makes impossible is an error on rank 0 alone.
cache = model.new_cache(1, 8)
small, wanted_h = model.with_parts({"layers": model.layers[:1]}).new_cache(1, 8), model.hidden(tokens)
odd = copy.deepcopy(cache)
odd.head_dim = 8  # as if it were of another model
for error, words, call in [
    (ParameterError, "must lie in 0..258", lambda: model(np.array([[10**6]]))),
    (ParameterError, "whole numbers of shape", lambda: model(np.array([1.5]))),
    (ParameterError, "no token to compute", lambda: model(np.zeros((1, 0), int))),
    (ContextOverflowError, "do not fit a context of 64", lambda: model(tokens, 10**6)),
    (ContextOverflowError, "do not fit a cache of 8", lambda: model(tokens, 6, cache)),
    (ParameterError, "a gap", lambda: model(tokens, 5, cache)),
    (ParameterError, "2 sequences do not fit", lambda: model(np.ones((2, 1), int), 0, cache)),
    (ValueError, "broadcast", lambda: model.logits(np.zeros((1, 3), np.float32))),
    (MismatchError, "output takes numbers", lambda: model.logits(np.zeros((1, 64), complex))),
    (ParameterError, "max_seq_len is 65", lambda: model.new_cache(1, 65)),
    (ParameterError, "shares are", lambda: nl.load(sys.argv[1], shares=[1])),
    (ParameterError, "adapter is 3, it must", lambda: nl.load(sys.argv[1], adapter=3)),
    (FormatError, "some is not there", lambda: nl.load(sys.argv[1], adapter="some")),
    (ParameterError, "a gap", lambda: cache.update(0, 3, *np.zeros((2, 1, 1, 2, 16), np.float32))),
    (MismatchError, "does not fit layer 1", lambda: model.layers[1](wanted_h, 0, model.freqs_cis[:3], small)),
    (ParameterError, "a gap", lambda: model.layers[1](wanted_h, 2, model.freqs_cis[:3], cache)),
    (ValueError, "broadcast", lambda: model.layers[1](wanted_h, 0, model.freqs_cis[:2], cache)),
    (MismatchError, "a cache of 1 layers does not fit layer 1", lambda: model(tokens, 0, small)),
    (MismatchError, "head_dim 8 is of another model", lambda: model(tokens, 0, odd)),
]:
    with refused(error, words):
        call()
    unharmed()

# A Ctrl-C in a pass of several tokens acts before the next layer, and the model can be used again.
cut = model.shared.model.layers[0].cut
usual, gathers = cut.gather, []


def interrupted(memory, nbytes):
    gathers.append(nbytes)
    if len(gathers) == 1:
        signal.raise_signal(signal.SIGINT)
    usual(memory, nbytes)


cut.gather = interrupted
with pytest.raises(KeyboardInterrupt):
    model(tokens)
assert len(gathers) == 4 < 4 * model.args.n_layers
unharmed()
gathers.clear()
handler = signal.signal(signal.SIGINT, lambda number, frame: None)  # the program goes on
unharmed()
assert len(gathers) == 4 + 4 * model.args.n_layers  # some in vain, and all
signal.signal(signal.SIGINT, handler)
cut.gather = usual
unharmed()

# Sessions: copied, not pickled, and forgotten.
session = llama.new_session(32)
first = llama.generate("hi", max_tokens=4, session=session)
other, branched = copy.deepcopy(session), session.branch()
with refused(UnsupportedError, "cannot be pickled"):
    pickle.dumps(session)
with refused(UnsupportedError, "a session on several ranks has no file"):
    llama.save_session(session, "no.session")
longer = [llama.generate("hi you", max_tokens=4, session=one).tokens for one in (session, other, branched)]
assert longer[0] == longer[1] == longer[2]
del session, other, branched
unharmed()
batch = llama.generate_batch(["hi", "hello", "hi"], max_tokens=4)
assert batch[0].tokens == batch[2].tokens == first.tokens
starts, caches = np.array([0, 0]), [model.new_cache(1, 8)]
with refused(ParameterError, "2 sequences, 1 caches"):
    hidden_states(model, np.ones((2, 1), int), starts, BatchCache(caches))

# Two models, and a cache that is filled from outside as `bench -d` does.
second = nl.load(sys.argv[1], threads=1, exact=True).model
assert not (second(tokens) == wanted).all() and second.new_cache().k.dtype == np.float32
filled = filled_cache(model, Task("tg", 2, depth=5), np.random.default_rng(0))
np.testing.assert_array_equal(model(tokens[:, :2], 5, filled), model(tokens[:, :2], 5, copy.deepcopy(filled)))
del second
unharmed()
