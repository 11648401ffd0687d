"""Beam search: the ids and scores of transformers, and what a search must be whatever the model."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from helpers.beams import EARLY_STOPPING, LENGTH_PENALTIES, SCORES, assert_same, by_transformers, searches
from helpers.tiny_models import float_weights, stored
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaForCausalLM

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.errors import ContextOverflowError, NumericsError, ParameterError, ResourceLimitError
from numpy_llama.generation.beam import Beam, BeamSearch, follow
from numpy_llama.generation.generate import Request, generate, prefill
from numpy_llama.generation.sampling import Sampler, log_softmax
from numpy_llama.generation.session import Session
from numpy_llama.proof.oracle import transformers_model
from numpy_llama.proof.tiny import GENERATIONS

ROOM = 64
MODELS = ["llama1", "llama3.1", "mqa"]


def weights_of(name):
    """Weights whose next ids are about as certain as those of a real model."""
    args = replace(GENERATIONS[name], max_seq_len=ROOM)
    weights = float_weights(args)
    weights["output.weight"] = 3 * weights["output.weight"]
    return args, weights


BUILDS = {
    "NumPy, float32": lambda args, weights: nl.Transformer(args, weights),
    "NumPy, float64": lambda args, weights: nl.Transformer(
        args, {name: w.astype(np.float64) for name, w in weights.items()}
    ),
    "C": lambda args, weights: build(args, stored(weights, "F32"), exact=True, threads=1),
}


def search(
    model, prompt, sampler=None, max_tokens=None, stop_ids=(), vocab_size=None, stopped=None, **options
):
    """-> [(the new ids, the score), ...]"""
    request = Request(prompt, Session(model, ROOM), sampler or Sampler(), max_tokens, stop_ids, vocab_size)
    more = {} if stopped is None else {"stopped": stopped}
    found = BeamSearch(**options)(model, request, prefill(model, request), **more)
    return [(beam.ids, beam.score) for beam in found]


@pytest.fixture(scope="module", params=MODELS)
def expected(request):
    """Searches with the results of transformers."""
    args, weights = weights_of(request.param)
    theirs = transformers_model(args, weights)
    V = args.vocab_size
    every_sixth, every_third = list(range(0, V, 6)), list(range(0, V, 3))  # texts of all lengths end
    cases = searches(V, [[], [7, 11], every_sixth, every_third])
    return args, weights, [(one, by_transformers(theirs, one)) for one in cases]


@pytest.mark.parametrize("implementation", BUILDS)
def test_ids_and_scores_are_those_of_transformers(expected, implementation):
    args, weights, cases = expected
    model = BUILDS[implementation](args, weights)
    for search, texts in cases:
        assert_same(model, search, texts)


@given(
    seed=st.integers(0, 999),
    n=st.integers(1, 9),
    beams=st.integers(1, 3),
    length_penalty=st.sampled_from(LENGTH_PENALTIES),
    early_stopping=st.sampled_from(EARLY_STOPPING),
)
def test_a_search_is_over_where_transformers_stops(seed, n, beams, length_penalty, early_stopping):
    rng, most = np.random.default_rng(seed), 10
    best = -rng.uniform(1, 20)
    scores = (
        best / rng.integers(1, most + 1) ** length_penalty * rng.uniform(0.8, 1.2, rng.integers(0, beams + 1))
    )
    finished = [Beam([], score) for score in sorted(scores, reverse=True)]
    of_slots = torch.tensor([[beam.score for beam in finished] + [-1e9] * (beams - len(finished))])
    hopeful = LlamaForCausalLM._check_early_stop_heuristic(
        torch.tensor([[True]]),
        torch.tensor([[best]]),
        of_slots,
        of_slots > -1e9,
        cur_len=3 + n,
        max_length=3 + most,
        decoder_prompt_len=3,
        early_stopping=early_stopping,
        length_penalty=length_penalty,
    )
    goes_on = LlamaForCausalLM._beam_search_has_unfinished_sequences(
        hopeful, of_slots > -1e9, torch.zeros_like(of_slots, dtype=bool), early_stopping
    )
    search = BeamSearch(beams, length_penalty, early_stopping)
    assert search.is_over(best, finished, n, most) != bool(goes_on)


# ------------------------------------------------------------------------- what a search is


@pytest.fixture(scope="module")
def model():
    return BUILDS["NumPy, float64"](*weights_of("llama3.1"))


settings_of_a_search = st.fixed_dictionaries(
    {"length_penalty": st.sampled_from([-1.0, 0.0, 0.5, 2.0]), "early_stopping": st.booleans()}
)


@settings(max_examples=20)
@given(seed=st.integers(0, 999), n=st.integers(0, 12), options=settings_of_a_search)
def test_one_beam_is_greedy(model, seed, n, options):
    """The beam takes the likeliest id at each step, and its score is the sum of their log p."""
    rng = np.random.default_rng(seed)
    prompt, stop_ids = rng.integers(0, 53, 4).tolist(), set(rng.integers(0, 53, 4).tolist())
    greedy = list(generate(model, prompt, Session(model, ROOM), Sampler(), max_tokens=n, stop_ids=stop_ids))
    ((ids, score),) = search(model, prompt, max_tokens=n, stop_ids=stop_ids, beams=1, **options)
    assert [i for i in ids if i not in stop_ids] == greedy and len(ids) in (n, len(greedy) + 1)
    if ids:
        total = log_p_of(model, prompt, ids).sum()
        np.testing.assert_allclose(score, total / len(ids) ** options["length_penalty"])


def log_p_of(model, prompt, ids):
    """log p of each of `ids`, by one pass over all."""
    rows = model(np.array([prompt + ids]))[0, len(prompt) - 1 : -1]
    return np.array([log_softmax(row)[token] for row, token in zip(rows, ids, strict=True)])


@settings(max_examples=10)
@given(seed=st.integers(0, 999), length_penalty=st.sampled_from([-1.0, 0.0, 1.0, 2.0]))
def test_with_enough_beams_it_is_the_best_of_all_texts(seed, length_penalty):
    """V = 4 and 3 steps: of all 4^3 texts, with one id as the end, the 5 with the best scores."""
    args = replace(GENERATIONS["llama2"], vocab_size=4, max_seq_len=ROOM)
    model = nl.Transformer(args, float_weights(args, seed))
    texts = {cut(ids, 3) for ids in product(range(4), repeat=3)}
    scores = {ids: log_p_of(model, [1, 2], list(ids)).sum() / len(ids) ** length_penalty for ids in texts}
    best = sorted(texts, key=scores.get, reverse=True)[:5]
    options = {"beams": 4**3, "length_penalty": length_penalty, "early_stopping": "never"}
    found = search(model, [1, 2], max_tokens=3, stop_ids=[3], num_return_sequences=5, **options)
    assert [tuple(ids) for ids, _ in found] == best
    np.testing.assert_allclose([score for _, score in found], [scores[ids] for ids in best], rtol=SCORES)


def cut(ids, end):
    return ids[: ids.index(end) + 1] if end in ids else ids


def test_more_beams_find_what_greedy_does_not(model):
    """The likeliest ids one by one do not make the likeliest text."""
    prompts = np.random.default_rng(0).integers(0, 53, (20, 3)).tolist()
    better = 0
    for prompt in prompts:
        (_, one), (_, four) = (search(model, prompt, max_tokens=8, beams=b)[0] for b in (1, 4))
        better += four > one + 1e-9
    assert better >= 5


def test_a_permutation_of_beams_branches_no_session():
    class Counted:
        branches = 0

        def branch(self):
            Counted.branches += 1
            return Counted()

    a, b, c = sessions = [Counted(), Counted(), Counted()]
    assert follow(sessions, [2, 0, 1]) == [c, a, b] and Counted.branches == 0
    first, second, third = follow(sessions, [1, 1, 0])
    assert (first, third) == (b, a) and second not in sessions and Counted.branches == 1


def test_the_prompt_is_computed_once_and_all_beams_in_one_pass(model, monkeypatch):
    passes = []
    run_layers = nl.Transformer.run_layers

    def watched(self, h, *more):
        passes.append(h.shape[:2])
        return run_layers(self, h, *more)

    monkeypatch.setattr(nl.Transformer, "run_layers", watched)
    search(model, [1, 2, 3, 4, 5], max_tokens=4, beams=3)
    assert passes == [(1, 5), (3, 1), (3, 1), (3, 1)]


def test_padding_ids_are_never_chosen_and_have_their_probability(model):
    """The softmax has all rows of the embedding, as in transformers."""
    ((ids, score),) = search(model, [1, 2], max_tokens=1, vocab_size=5, beams=1)
    rows = log_softmax(model(np.array([[1, 2]]))[0, -1])
    assert ids == [rows[:5].argmax()] and score == pytest.approx(rows[:5].max())


def test_more_beams_than_continuations(model):
    """Three ids and two steps make nine texts."""
    found = search(model, [1], max_tokens=2, vocab_size=3, beams=20, num_return_sequences=20)
    assert sorted(ids for ids, _ in found) == [[i, j] for i in range(3) for j in range(3)]
    assert [score for _, score in found] == sorted((score for _, score in found), reverse=True)


def test_a_beam_that_is_stopped_is_finished(model):
    """Where `stopped` is true a beam ends, and no other beam has those ids at its start."""
    options = {"beams": 3, "num_return_sequences": 3, "length_penalty": 0}
    free = search(model, [5], max_tokens=6, **options)[0][0]
    found = search(model, [5], max_tokens=6, stopped=lambda ids: ids == free[:2], **options)
    assert all(ids[:2] != free[:2] or len(ids) == 2 for ids, _ in found)
    assert free[:2] in [ids for ids, _ in found]


def test_a_search_ends_if_all_beams_are_stopped(model):
    found = search(model, [5], max_tokens=6, stopped=lambda ids: True, beams=3, num_return_sequences=3)
    assert [len(ids) for ids, _ in found] == [1, 1, 1]


def test_a_full_context_ends_a_search(model):
    request = Request([1, 2, 3], Session(model, 5), Sampler())
    (best,) = BeamSearch(3)(model, request, prefill(model, request))
    assert len(best.ids) == 2


def test_a_number_that_is_not_finite_is_an_error():
    args, weights = weights_of("llama3.1")
    weights["output.weight"] = weights["output.weight"] * np.float32(np.inf)
    broken = nl.Transformer(args, weights)
    with pytest.raises(NumericsError, match="the largest logit is nan"):
        search(broken, [1], max_tokens=2)
    args, weights = weights_of("llama3.1")
    weights["tok_embeddings.weight"][7] = np.nan
    with pytest.raises(NumericsError, match="position 1, token 7: its embedding is not finite"):
        search(nl.Transformer(args, weights), [1], max_tokens=2, beams=53)


# ------------------------------------------------------------------------- texts


@pytest.fixture(scope="module")
def llama(smollm2_path):
    return nl.load(smollm2_path, exact=True, threads=1)


PROMPT = "The capital of France is"


def test_completions(llama):
    found = llama.beam_search(PROMPT, beams=3, num_return_sequences=3, max_tokens=8)
    assert len({one.text for one in found}) == 3
    assert [one.score for one in found] == sorted((one.score for one in found), reverse=True)
    for one in found:
        assert one.prompt_tokens == llama.tokenizer.encode(PROMPT)
        assert one.text == llama.tokenizer.decode(one.tokens) and one.finish_reason == "length"
        total = log_p_of(llama.model, one.prompt_tokens, one.tokens).sum()
        assert one.score == pytest.approx(total / 8, rel=1e-3)
        assert one.prefill_seconds > 0 and one.decode_seconds > 0
    ids = llama.tokenizer.encode(PROMPT)
    assert llama.beam_search(np.array(ids), beams=3, max_tokens=8)[0].tokens == found[0].tokens
    assert llama.generate(PROMPT, max_tokens=1).score is None


def test_an_end_token_is_no_token_of_the_text_but_counts(llama):
    """After the question of a chat the answer is short, and ends."""
    prompt = llama.encode_chat([{"role": "user", "content": "Say yes."}])
    one = llama.beam_search(prompt, beams=2, max_tokens=30, length_penalty=0)[0]
    assert one.finish_reason == "stop" and not {*one.tokens} & {*llama.tokenizer.eos_ids}
    totals = [log_p_of(llama.model, prompt, [*one.tokens, end]).sum() for end in llama.tokenizer.eos_ids]
    assert one.score == pytest.approx(max(totals), rel=1e-3)


def test_a_stop_text_ends_a_beam(llama):
    options = {"beams": 3, "num_return_sequences": 3, "max_tokens": 12}
    for one in llama.beam_search(PROMPT, stop=[".", " the"], **options):
        assert "." not in one.text and " the" not in one.text
        whole = llama.tokenizer.decode(one.tokens)
        assert (one.finish_reason == "stop") == (whole != one.text)
        total = log_p_of(llama.model, one.prompt_tokens, one.tokens).sum()
        assert one.score == pytest.approx(total / len(one.tokens), rel=1e-3)


def test_no_token_at_all(llama):
    (one,) = llama.beam_search(PROMPT, max_tokens=0)
    assert (one.text, one.tokens, one.finish_reason, one.score) == ("", [], "length", 0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"beams": 0}, "beams is 0, it must be a whole number from 1 to 1024"),
        ({"beams": 2.0}, "beams is 2.0, it must be a whole"),
        ({"num_return_sequences": 5}, "num_return_sequences is 5, it must be a whole number from 1 to 4"),
        ({"length_penalty": float("nan")}, "length_penalty is nan, it must be a number from -10 to 10"),
        ({"length_penalty": "1"}, "length_penalty is '1', it must be a number"),
        ({"early_stopping": "always"}, "early_stopping is 'always', it must be True, False or \"never\""),
        ({"early_stopping": 1}, "early_stopping is 1, it must be True"),
        ({"temperature": 0.8}, "temperature is 0.8, a beam search wants 0.*: leave temperature out"),
        ({"seed": 0}, "seed is 0, a beam search wants None"),
        ({"stop": "x"}, "stop is 'x', it must be a list of texts"),
        ({"on_prefill": 3}, "on_prefill is 3"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"regex": "a+"}, "a beam search takes no `regex`: leave it out, or generate without beams"),
        ({"draft": nl.Lookup()}, "a beam search takes no `draft`"),
    ],
)
def test_bad_options_are_refused(llama, options, message):
    with pytest.raises(ParameterError, match=message):
        llama.beam_search(PROMPT, **options)


def test_a_score_is_a_number_of_python(model):
    [(_, score)] = search(model, [1, 2], max_tokens=3, beams=2, length_penalty=np.float32(2))
    assert type(score) is float


def test_a_prompt_that_does_not_fit_is_refused(llama, monkeypatch):
    with pytest.raises(ContextOverflowError, match="the prompt has 9000 tokens, the context 8192"):
        llama.beam_search([5] * 9000)
    with pytest.raises(ParameterError, match="the prompt is empty"):
        llama.beam_search("")
    monkeypatch.setattr("numpy_llama.llama.available_memory", lambda: 10**6)
    with pytest.raises(ResourceLimitError, match=r"4 sequences of up to 105 tokens need .* MiB of KV cache"):
        llama.beam_search([5] * 5, max_tokens=100)
