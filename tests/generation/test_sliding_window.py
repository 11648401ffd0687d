"""Sliding windows: a token sees the last `sliding_window` positions, and the cache stores no others for long.

`pytest -s` prints the largest differences of the logits from transformers', and the sizes of the caches.
"""

import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM, Phi3Config, Phi3ForCausalLM

import numpy_llama.window as module
from numpy_llama import errors
from numpy_llama.backend import build
from numpy_llama.checkpoint.huggingface import HuggingFaceCheckpoint
from numpy_llama.checkpoint.memory import gib, memory_plan
from numpy_llama.cli import info
from numpy_llama.generation.batch import generate_batch
from numpy_llama.generation.generate import Request, generate
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.inspect.tracing import trace
from numpy_llama.learner import Learner
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.window import BLOCK, PREFILL_CHUNK, WindowKVCache, positions_stored
from tests.helpers.tiny_models import float_weights, stored

WINDOW, LONGER = 9, 70
CLOSE = 5e-6  # of the largest logit, in exact arithmetic
ARGS = replace(TINY_BLOCKS, head_dim=32, n_heads=2, n_kv_heads=1, max_seq_len=LONGER, sliding_window=WINDOW)
KINDS = {
    "numpy": {"backend": "numpy"},
    "c": {"threads": 2, "exact": True},
}
CACHES = {
    "float32": {"exact": True},
    "float16": {},
    "q8": {"cache_dtype": "q8"},
    "numpy": {"backend": "numpy"},
    "numpy q8": {"backend": "numpy", "cache_dtype": "q8"},
}


@pytest.fixture
def small(monkeypatch):
    """Chunks and blocks so small that a short text passes many of them. The C kernels' blocks have 128."""
    monkeypatch.setattr(module, "PREFILL_CHUNK", 6)
    monkeypatch.setattr(module, "BLOCK", 4)


def models():
    sizes = {
        "vocab_size": 53, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": LONGER,
        "sliding_window": WINDOW, "rms_norm_eps": 1e-5, "initializer_range": 0.15, "pad_token_id": 0,
        "attn_implementation": "eager",
    }  # fmt: skip
    for config, kind in ((MistralConfig, MistralForCausalLM), (Phi3Config, Phi3ForCausalLM)):
        torch.manual_seed(0)
        yield kind(config(**sizes)).eval()


def tokens_of(B: int, T: int = LONGER) -> np.ndarray:
    return np.random.default_rng(T).integers(53, size=(B, T))


def in_pieces(model: Transformer, tokens: np.ndarray, ends: list[int], cache=None) -> np.ndarray:
    """The logits of a text that is computed piece by piece in one cache."""
    cache = cache or model.new_cache(*tokens.shape)
    parts = [
        model(tokens[:, a:b], a, cache) for a, b in zip([0, *ends], [*ends, tokens.shape[1]], strict=True)
    ]
    return np.concatenate(parts, axis=1)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.abs(found - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("kind", KINDS)
def test_logits_as_transformers_beyond_the_window(kind, tmp_path):
    """At once, in chunks, and one token after another."""
    for model in models():
        folder = tmp_path / model.config.model_type
        model.save_pretrained(folder)
        checkpoint = HuggingFaceCheckpoint(folder)
        assert (checkpoint.args.sliding_window, checkpoint.args.max_seq_len) == (WINDOW, LONGER)
        ours = build(checkpoint.args, checkpoint.weights(), **KINDS[kind])
        assert type(ours.new_cache()) is WindowKVCache
        tokens = tokens_of(2)
        with torch.no_grad():
            expected = model(torch.from_numpy(tokens)).logits.numpy()
        for name, ends in {
            "at once": [], "in chunks": [1, 16, 32, 61], "one by one": [*range(20, LONGER)],
        }.items():  # fmt: skip
            difference = relative(in_pieces(ours, tokens, ends), expected)
            print(f"\n{model.config.model_type}, {kind}, {name}: {difference:.1e} of the largest logit")
            assert difference < CLOSE
        without = build(replace(checkpoint.args, sliding_window=None), checkpoint.weights(), **KINDS[kind])
        assert relative(without(tokens)[:, :WINDOW], expected[:, :WINDOW]) < CLOSE
        assert relative(without(tokens), expected) > 0.01  # the window shows


@pytest.mark.parametrize("window, read", [(None, None), (8, 8), (69, 69), (70, None), (262_144, None)])
def test_the_window_of_a_config(window, read, tmp_path):
    """A window that hides no position of the context is none."""
    model = next(models())
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | {"sliding_window": window}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert HuggingFaceCheckpoint(tmp_path).args.sliding_window == read


# --- the cache --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("T", [1, 3, 6, 7, 20])
def test_a_cache_that_drops_is_one_that_keeps_all(small, kind, T):
    """Pieces of T tokens, some of them longer than the room for new ones."""
    model = build(ARGS, stored(float_weights(ARGS), "F32"), **CACHES[kind])
    keeps = build(replace(ARGS, sliding_window=None), stored(float_weights(ARGS), "F32"), **CACHES[kind])
    whole = Transformer(ARGS, float_weights(ARGS), cache_type=keeps.cache_type, cache_dtype=keeps.cache_dtype)
    tokens, ends = tokens_of(2), [*range(T, LONGER, T)]
    cache = model.new_cache(2)
    assert cache.k.shape[3] == positions_stored(ARGS, LONGER) == WINDOW + 6 + 4
    near = 5e-2 if kind in ("float16", "q8") else CLOSE  # activations of 8 bits
    assert relative(in_pieces(model, tokens, ends, cache), in_pieces(whole, tokens, ends)) < near
    assert all(0 < LONGER - dropped <= cache.k.shape[3] for dropped in cache.dropped)


@pytest.mark.parametrize("kind", [kind for kind in CACHES if "numpy" not in kind])
def test_prefill_in_chunks_has_the_bits_of_smaller_chunks(kind):
    """The C kernels' blocks begin at the same positions, whatever was dropped."""
    args = replace(ARGS, max_seq_len=2600, sliding_window=200)
    model = build(args, stored(float_weights(args), "Q8_0"), threads=2, **CACHES[kind])
    tokens = tokens_of(1, 2500)
    logits = [in_pieces(model, tokens, [*range(n, 2500, n)]) for n in (500, 130)]
    np.testing.assert_array_equal(*logits)


def test_a_text_may_begin_anew_or_go_back_a_little(small):
    """Up to the positions that it sees; further back is an error that names where it may begin."""
    model = build(ARGS, stored(float_weights(ARGS), "F32"), exact=True)
    tokens, cache = tokens_of(1), model.new_cache(1)
    wanted = in_pieces(model, tokens, [*range(5, LONGER, 5)], cache)
    for start in (LONGER - 1, cache.least_start):
        assert relative(model(tokens[:, start:], start, cache), wanted[:, start:]) < CLOSE
    with pytest.raises(
        errors.ParameterError, match=f"go on from position {cache.least_start} or later, or begin"
    ):
        model(tokens[:, 30:31], 30, cache)
    assert relative(in_pieces(model, tokens, [*range(6, LONGER, 6)], cache), wanted) < CLOSE


def test_an_interrupted_move_keeps_nothing(small):
    """After Ctrl-C between two heads the cache is refused, except from position 0 on."""

    class Interrupted(np.ndarray):
        def __setitem__(self, *item):
            raise KeyboardInterrupt

    model = build(ARGS, stored(float_weights(ARGS), "F32"), exact=True)
    tokens, cache = tokens_of(1), model.new_cache(1)
    wanted = in_pieces(model, tokens[:, :19], [6, 12], cache)
    cache.v = cache.v.view(Interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.make_room([1], 19, 1)
    cache.v = cache.v.view(np.ndarray)
    with pytest.raises(errors.ParameterError, match="no longer stored"):
        model(tokens[:, 19:20], 19, cache)
    assert relative(in_pieces(model, tokens[:, :19], [6, 12], cache), wanted) < CLOSE


def test_the_room_is_that_of_the_window():
    """Printed by `info`: the memory of Mistral 7B v0.1 at its whole context."""
    args = replace(ARGS, max_seq_len=32768, sliding_window=4096)
    model = Transformer(args, float_weights(args), cache_type=WindowKVCache)
    plan = memory_plan(args, stored(float_weights(args), "F32"), "numpy")
    cache = model.new_cache()
    nbytes = cache.k.nbytes + cache.v.nbytes
    print(f"\na window of 4,096 in a context of 32,768: {cache.k.shape[3]} positions stored, {nbytes} bytes")
    assert cache.k.shape[3] == 4096 + PREFILL_CHUNK + BLOCK == plan.stored_positions
    assert plan.peak(32768) - plan.fixed == nbytes == 4736 * plan.kv_per_position
    assert plan.peak(32768) == plan.peak(4736) > plan.peak(4735)
    assert plan.context_within(plan.peak(4736)) == 32768 and plan.context_within(plan.peak(4735)) == 4735
    assert model.new_cache(max_seq_len=100).k.shape[3] == 100
    rows = dict(info.memory(plan, 1 << 40))
    print(f"KV cache  {rows['KV cache']}")
    assert rows["KV cache"].endswith(f"at most {gib(nbytes)} (4,736 positions) with the sliding window")


# --- what generation does with it -------------------------------------------------------------------------


def greedy(model: Transformer, prompt, session: Session, n: int = 12) -> list[int]:
    return list(generate(model, prompt, session, Sampler(temperature=0), max_tokens=n))


@pytest.mark.parametrize("kind", KINDS)
def test_a_conversation_goes_on_goes_back_and_begins_anew(small, monkeypatch, kind):
    """Each turn has the ids of a new session; only what the cache dropped is computed again."""
    monkeypatch.setattr("numpy_llama.generation.generate.PREFILL_CHUNK", 6)
    model = build(ARGS, stored(float_weights(ARGS), "F32"), **KINDS[kind])
    session, prompt = Session(model), tokens_of(1)[0, :30].tolist()
    answer = greedy(model, prompt, session)
    for turn in (
        [*prompt, *answer, 3, 4, 5],  # the next question
        [*prompt, *answer, 3, 6],  # asked otherwise
        [*prompt[:10], 7],  # far back
        prompt,
    ):
        assert greedy(model, turn, deepcopy(session)) == greedy(model, turn, Session(model))
        assert greedy(model, turn, session) == greedy(model, turn, Session(model))


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_of_different_lengths(small, monkeypatch, kind):
    monkeypatch.setattr("numpy_llama.generation.generate.PREFILL_CHUNK", 6)
    model = build(ARGS, stored(float_weights(ARGS), "F32"), **KINDS[kind])
    prompts = [tokens_of(1)[0, :n].tolist() for n in (2, 40, 11)]
    requests = [Request(p, Session(model), Sampler(temperature=0), max_tokens=25) for p in prompts]
    found = [[] for _ in prompts]
    for i, token in generate_batch(model, requests):
        found[i].append(token)
    assert found == [greedy(model, prompt, Session(model), 25) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
def test_a_trace_has_the_window(small, kind):
    model = build(ARGS, stored(float_weights(ARGS), "F32"), **KINDS[kind])
    tokens = tokens_of(1, 30)
    with trace(model, "layers.1.attention.weights") as seen:
        traced = seen.model(tokens)
    weights = seen["layers.1.attention.weights"]
    distance = np.arange(30)[:, None] - np.arange(30)
    assert ((weights > 0) == ((distance >= 0) & (distance < WINDOW))).all()
    assert relative(traced, model(tokens)) < CLOSE


def test_training_is_within_the_window():
    """A longer document is refused by name."""
    for model in (
        Transformer(ARGS, float_weights(ARGS)),
        build(ARGS, stored(float_weights(ARGS), "F32"), backend="numpy"),
    ):
        learner = Learner(model)
        tokens = tokens_of(1, WINDOW + 1)
        short, one = tokens[:, :WINDOW], np.ones((1, WINDOW))
        whole = Learner(Transformer(replace(ARGS, sliding_window=None), float_weights(ARGS)))
        loss, gradients = learner.loss_and_gradients(short, tokens[:, 1:], one)
        wanted, their = whole.loss_and_gradients(short, tokens[:, 1:], one)
        assert loss == pytest.approx(wanted) and gradients.keys() == their.keys()
        for name, x in gradients.items():
            np.testing.assert_allclose(x, their[name], atol=1e-5 * np.abs(their[name]).max())
        with pytest.raises(
            errors.UnsupportedError, match="a document has 10 tokens, and the model a sliding window of 9"
        ):
            learner.forward(tokens)
        first = np.array([[0] * 5 + [5] * 5])
        learner.forward(tokens, first)  # two short documents
