"""Scores of given continuations, against PyTorch, and how many ids they compute."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.tiny_models import float_weights, stored, write_speaker
from hypothesis import given, settings
from hypothesis import strategies as st

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.errors import ContextOverflowError, NumericsError, ParameterError
from numpy_llama.generation.generate import forward
from numpy_llama.generation.scoring import Score, Scorer
from numpy_llama.generation.session import Session
from numpy_llama.proof.tiny import TINY, TINY_BLOCKS
from numpy_llama.window import PREFILL_CHUNK

ARGS = replace(TINY, max_seq_len=2 * PREFILL_CHUNK + 50)
V = ARGS.vocab_size
EXACT = 1e-10  # float64
Q8 = 0.02  # kernels in blocks of Q8_0, whose attention adds in another order


@pytest.fixture(scope="module")
def model():
    weights = {name: w.astype(np.float64) for name, w in float_weights(ARGS).items()}
    return nl.Transformer(ARGS, weights)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return nl.load(write_speaker(tmp_path_factory.mktemp("speaker") / "speaker.gguf"), threads=1)


def by_torch(model, context, continuation) -> Score:
    """From one pass over all ids, without a cache."""
    if not continuation:
        return Score(0.0, True)
    logits = torch.from_numpy(model(np.array([[*context, *continuation]]))[0]).double()
    rows, chosen = logits[len(context) - 1 : -1], torch.tensor(continuation)
    log_p = torch.log_softmax(rows, -1).gather(-1, chosen[:, None])
    return Score(float(log_p.sum()), bool((rows.argmax(-1) == chosen).all()))


# Few different ids, so that many requests begin alike.
IDS = st.lists(st.integers(0, 2), max_size=6)
REQUESTS = st.lists(st.tuples(IDS.filter(len), IDS), max_size=8)


def assert_near(found, wanted, near):
    assert [one.is_greedy for one in found] == [one.is_greedy for one in wanted]
    np.testing.assert_allclose(
        [one.log_likelihood for one in found], [one.log_likelihood for one in wanted], rtol=0, atol=near
    )


@given(requests=REQUESTS)
def test_scores_are_pytorchs_and_each_prefix_is_computed_once(model, requests):
    scorer = Scorer(model, Session(model, 16))
    found = scorer.score(requests)
    assert_near(found, [by_torch(model, *one) for one in requests], EXACT)
    scored = [(*context, *continuation)[:-1] for context, continuation in requests if continuation]
    assert scorer.computed == len({ids[:n] for ids in scored for n in range(1, len(ids) + 1)})
    assert dict(Scorer(model, Session(model, 16)).each(requests)) == dict(enumerate(found))


@settings(max_examples=20)
@given(requests=REQUESTS, more=REQUESTS, window=st.sampled_from([None, 4]))
def test_the_kernels_have_the_scores_of_numpy(requests, more, window):
    """Also in two calls, and with a window, which computes a text anew when it has dropped its beginning."""
    args = replace(TINY_BLOCKS, head_dim=32, max_seq_len=16, sliding_window=window)
    weights = stored(float_weights(args), "Q8_0")
    fast, plain = build(args, weights, threads=1), build(args, weights, backend="numpy")
    scorer = Scorer(fast, Session(fast, 16))
    found = [*scorer.score(requests), *scorer.score(more)]
    wanted = [by_torch(plain, *one) for one in (*requests, *more)]
    assert np.abs(np.subtract([one[0] for one in found], [one[0] for one in wanted])).max(initial=0) < 5 * Q8


def test_a_long_continuation_is_scored_in_chunks(model):
    ids = np.random.default_rng(0).integers(V, size=2 * PREFILL_CHUNK + 9).tolist()
    for n in (1, 7, PREFILL_CHUNK, PREFILL_CHUNK + 1):
        request = ids[:n], ids[n:]
        assert_near(Scorer(model, Session(model)).score([request]), [by_torch(model, *request)], 1e-8)


def test_what_temperature_0_makes_is_greedy(llama):
    made = llama.generate("Once", max_tokens=6).tokens
    other = [*made[:5], (made[5] + 1) % 250]
    found = llama.log_likelihoods("Once", [made, other, made[:3], []])
    assert [one.is_greedy for one in found] == [True, False, True, True]
    assert found[3].log_likelihood == 0 > found[2].log_likelihood > found[0].log_likelihood


def test_a_text_is_what_follows_the_ids_of_its_context(smollm2_path):
    """The context's own ids in number, also where a token lies across the boundary."""
    llama = nl.load(smollm2_path)
    encode = llama.tokenizer.encode
    assert len(encode("The c")) == len(encode("The cat")) == 2
    for context, text in [("The capital of France is", " Paris"), ("The c", "at sat")]:
        ids, whole = encode(context), encode(context + text)
        found = llama.log_likelihoods(context, [text, whole[len(ids) :]])
        assert found[0] == found[1] == llama.log_likelihoods(ids, [whole[len(ids) :]])[0]
    paris, london = llama.log_likelihoods("The capital of France is", [" Paris", " London"])
    assert paris.is_greedy and not london.is_greedy
    assert paris.log_likelihood > london.log_likelihood + 1
    assert llama.log_likelihoods(encode("The capital of France is"), [" Paris"]) == [paris]


def test_what_cannot_be_scored_is_named(llama):
    room = llama.max_context
    for context, continuations, error, words in [
        ([], [[1]], ParameterError, r"requests\[0\]: the context is empty, it needs an id, such as BOS"),
        ([1], [[2], [259]], ParameterError, r"token id 259 lies outside the vocabulary, 0\.\.258"),
        ([1], [[2], [3] * room, [4] * (room + 1)], ContextOverflowError, r"requests\[2\]: 65 ids .* 64"),
        ([1], "two", ParameterError, "the continuations are one text"),
        ([1], 2, ParameterError, "continuations is 2, it must be a list"),
    ]:
        with pytest.raises(error, match=words):
            llama.log_likelihoods(context, continuations)
    with pytest.raises(ParameterError, match=r"requests\[1\]: token id -1 lies outside"):
        Scorer(llama.model, llama.new_session()).score([([1], [2]), ([1], [-1])])


def test_a_session_that_another_uses_is_refused(model):
    scorer = Scorer(model, Session(model))
    scorer.score([([1, 2], [3])])
    Scorer(model, scorer.session).score([([1, 5], [4])])
    with pytest.raises(ParameterError, match="in use by a later"):
        scorer.score([([1, 5], [3])])


def test_logits_that_are_no_numbers_are_an_error(model, monkeypatch):
    session = Session(model)
    forward(model, [1, 2], session)
    scorer = Scorer(model, session)
    monkeypatch.setattr(model, "logits", lambda h: np.full((len(h), V), np.nan))
    with pytest.raises(NumericsError, match="before id 3: the largest logit is nan, not finite"):
        scorer.score([([1, 2], [3])])
