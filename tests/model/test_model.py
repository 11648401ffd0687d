"""The model: what its cache, its sizes and its calls refuse, and in which words.

numpy_llama/proof/test_model.py compares its results with PyTorch.
"""

from dataclasses import MISSING, fields, replace

import numpy as np
import pytest

import numpy_llama
from numpy_llama import functional as F
from numpy_llama.config import ModelArgs
from numpy_llama.errors import ConfigError, ContextOverflowError, MismatchError, ParameterError
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import CONTEXT, TINY, random_tokens, random_weights
from numpy_llama.rope import Llama3Scaling

# --- the cache --------------------------------------------------------------------------------------------


def tiny_model(rng, dtype=np.float64):
    return Transformer(TINY, random_weights(rng, TINY, dtype))


@pytest.mark.parametrize("room", [6, CONTEXT])  # a cache below the context, and one as long as it
@pytest.mark.parametrize("beyond", [1, 2, 3, 50])
@pytest.mark.parametrize("before", [0, 1, 2, 5])
def test_overflow_raises_before_writing(rng, room, beyond, before):
    model = tiny_model(rng)
    cache = model.new_cache(1, room)
    model(random_tokens(rng, TINY, 1, room), 0, cache)
    k, v = cache.k.copy(), cache.v.copy()
    with pytest.raises(ContextOverflowError, match="do not fit"):
        model(random_tokens(rng, TINY, 1, before + beyond), room - before, cache)
    np.testing.assert_array_equal(cache.k, k)
    np.testing.assert_array_equal(cache.v, v)


@pytest.mark.parametrize("T", [1, 2, 3])
@pytest.mark.parametrize("start_pos", [-1, -2, -3, -CONTEXT, CONTEXT + 1, 10**6])
def test_impossible_positions_are_refused(rng, start_pos, T):
    model = tiny_model(rng)
    with pytest.raises(ContextOverflowError):
        model(random_tokens(rng, TINY, 1, T), start_pos, model.new_cache())


@pytest.mark.parametrize("tokens", [[1, 2], [[[1]]], [[1.0]], [[True]]])
def test_tokens_are_whole_numbers_of_two_axes(rng, tokens):
    with pytest.raises(ParameterError, match=r"tokens are .*, wanted whole numbers of shape \(B, T\)"):
        tiny_model(rng)(np.array(tokens))


@pytest.mark.parametrize("starts", [[0, CONTEXT], [CONTEXT, 0], [0, -1]])
def test_every_sequence_must_fit_the_context(rng, starts):
    with pytest.raises(ContextOverflowError, match="do not fit a context"):
        tiny_model(rng).hidden(random_tokens(rng, TINY, 2, 1), np.array(starts))


def test_a_prompt_beyond_the_context_is_refused(rng):
    with pytest.raises(ContextOverflowError, match=rf"0\.\.{CONTEXT} do not fit a context of {CONTEXT}"):
        tiny_model(rng)(random_tokens(rng, TINY, 1, CONTEXT + 1))


@pytest.mark.parametrize("max_seq_len", [-1, CONTEXT + 1])
def test_a_cache_beyond_the_context_is_refused(rng, max_seq_len):
    with pytest.raises(ParameterError, match=rf"{max_seq_len}.*from 1 to {CONTEXT}"):
        tiny_model(rng).new_cache(1, max_seq_len)


@pytest.mark.parametrize("bad", [-1, TINY.vocab_size])
def test_ids_outside_the_vocabulary_are_refused(rng, bad):
    with pytest.raises(ParameterError):
        tiny_model(rng)(np.array([[0, bad]]))


@pytest.mark.parametrize(
    "q, k, v",
    [
        ((2, 3, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)),
        ((2, 3, 4, 8), (2, 5, 4, 8), (2, 5, 1, 8)),
        ((2, 3, 1, 8), (2, 5, 2, 8), (2, 5, 2, 8)),
    ],
)
def test_attention_refuses_what_numpy_would_broadcast(q, k, v):
    with pytest.raises(MismatchError, match="do not fit each other"):
        F.attention(np.ones(q), np.ones(k), np.ones(v))


def test_linear_and_attention_are_handed_in(rng):
    """The seam: the model computes with what it is given, and with nothing else of its own."""
    weights, tokens, calls = random_weights(rng, TINY), random_tokens(rng, TINY, T=4), []

    def linear(x, w):
        calls.append("linear")
        return numpy_llama.functional.linear(x, w)

    def attention(q, k, v):
        calls.append("attention")
        return numpy_llama.functional.attention(q, k, v)

    logits = Transformer(TINY, weights, linear, attention)(tokens)
    np.testing.assert_array_equal(logits, Transformer(TINY, weights)(tokens))
    layer = ["linear"] * 3 + ["attention"] + ["linear"] * 4
    assert calls == layer * TINY.n_layers + ["linear"]


# --- hyperparameters --------------------------------------------------------------------------------------

WHOLE = ["dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "hidden_dim", "vocab_size", "max_seq_len"]


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("bad", [0, -1, 2.0, "4", None])
def test_sizes_must_be_whole_numbers_above_0(name, bad):
    with pytest.raises(ConfigError, match=name):
        replace(TINY, **{name: bad})


@pytest.mark.parametrize("name", ["norm_eps", "rope_theta"])
@pytest.mark.parametrize("bad", [0.0, -1e-5, np.nan, np.inf])
def test_eps_and_theta_must_be_finite_and_above_0(name, bad):
    with pytest.raises(ConfigError, match=name):
        replace(TINY, **{name: bad})


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "n_heads is 4.*multiple of n_kv_heads 3"),
        ({"n_heads": 2, "n_kv_heads": 4}, "n_heads is 2.*multiple of n_kv_heads 4"),
        ({"head_dim": 5}, "head_dim is 5.*even"),
    ],
)
def test_sizes_must_fit_each_other(bad, message):
    with pytest.raises(ConfigError, match=message):
        replace(TINY, **bad)


def test_what_the_generations_differ_in_has_no_default():
    defaults = [f.name for f in fields(ModelArgs) if f.default is not MISSING]
    assert defaults == ["rope_scaling", "sliding_window"]


@pytest.mark.parametrize(
    "bad",
    [
        {"factor": 0.0},
        {"factor": -8.0},
        {"factor": np.nan},
        {"low_freq_factor": np.inf},
        {"original_max_seq_len": 0},
        {"original_max_seq_len": 8192.0},
        {"low_freq_factor": 4.0},
        {"low_freq_factor": 5.0},
    ],
)
def test_rope_scaling_is_validated(bad):
    with pytest.raises(ConfigError, match=next(iter(bad))):
        Llama3Scaling(**({"factor": 8.0} | bad))
