"""Generation: the loop over ids, streams of text, stop texts, sessions."""

import gc
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from itertools import pairwise
from weakref import ref

import numpy as np
import pytest
import torch
from helpers.tiny_models import float_weights
from hypothesis import example, given, settings
from hypothesis import strategies as st

import numpy_llama as nl
from numpy_llama.cache import KVCache
from numpy_llama.errors import (
    ContextOverflowError,
    MismatchError,
    NumericsError,
    ParameterError,
    TemplateError,
)
from numpy_llama.generation.generate import Request, forward, generate
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.generation.transcript import StopTexts
from numpy_llama.proof.tiny import TINY
from numpy_llama.window import PREFILL_CHUNK

ARGS = replace(TINY, max_seq_len=2 * PREFILL_CHUNK + 50)
V = ARGS.vocab_size


@pytest.fixture(scope="module")
def model():
    return nl.Transformer(ARGS, float_weights(ARGS))


@pytest.fixture(scope="module")
def llama(smollm2_path):
    return nl.load(smollm2_path)


def run(model, prompt, session=None, sampler=None, **options):
    """-> (the new ids, the reason of the end)."""
    ids, steps = [], generate(model, prompt, session or Session(model), sampler or Sampler(), **options)
    while True:
        try:
            ids.append(next(steps))
        except StopIteration as end:
            return ids, end.value


@settings(max_examples=50)  # of up to 1,064 tokens
@given(length=st.integers(1, 2 * PREFILL_CHUNK + 40), seed=st.integers(0, 99))
def test_greedy_ids_are_those_of_the_plain_model(model, length, seed):
    """However the prompt is cut and cached: each id is the argmax of one pass over all that came before."""
    prompt = np.random.default_rng(seed).integers(0, V, length).tolist()
    ids, reason = run(model, prompt, max_tokens=4)
    assert reason == "length" and len(ids) == 4
    logits = model(np.array([prompt + ids]))[0]
    for i, token in enumerate(ids):
        row = logits[length - 1 + i]
        # In float32 two ways of adding may order two nearly equal logits differently.
        assert row[token] >= row.max() - 1e-5 * np.abs(row).max()


def test_it_ends_before_any_of_several_stop_ids(model):
    prompt = [3, 1, 4]
    free, _ = run(model, prompt, max_tokens=10)
    never = min(set(range(V)) - set(free))
    for stop in set(free):
        assert run(model, prompt, max_tokens=10, stop_ids={never, stop}) == (free[: free.index(stop)], "stop")


def test_max_tokens_is_kept(model):
    assert run(model, [1], max_tokens=0) == ([], "length")
    assert len(run(model, [1], max_tokens=7)[0]) == 7


def test_a_full_context_ends_with_length(model):
    for room in (4, 5):
        ids, reason = run(model, [1, 2, 3], Session(model, room))
        assert (len(ids), reason) == (room - 3, "length")


def test_a_prompt_without_room_is_refused_before_any_work(model):
    def no_work(*args):
        raise AssertionError("the model was called")

    for length in (5, 6):
        with pytest.raises(ContextOverflowError, match=f"the prompt has {length} tokens, the context 5"):
            run(model, [1] * length, Session(model, 5), on_prefill=no_work)
    with pytest.raises(ParameterError, match="prompt is empty"):
        run(model, [])


def test_ids_outside_the_vocabulary_are_refused(model):
    for bad in (-1, V):
        with pytest.raises(ParameterError, match=rf"they must lie in 0\.\.{V - 1}"):
            run(model, [1, bad])


def test_progress_is_reported(model):
    progress = []
    run(model, [1] * (PREFILL_CHUNK + 7), max_tokens=1, on_prefill=lambda *news: progress.append(news))
    total = PREFILL_CHUNK + 7
    assert progress == [(0, total), (PREFILL_CHUNK, total), (total, total)]


@given(
    old=st.lists(st.integers(0, 3), min_size=1, max_size=30),
    new=st.lists(st.integers(0, 3), min_size=1, max_size=30),
)
def test_a_session_is_reused_as_far_as_the_prompts_agree(model, old, new):
    """A second prompt in a used session gives what it gives in a fresh one; only its new end is computed."""
    session = Session(model)
    run(model, old, session, max_tokens=3)
    held = list(session.ids)
    progress = []
    again = run(model, new, session, max_tokens=5, on_prefill=lambda done, total: progress.append(done))
    assert again == run(model, new, max_tokens=5)
    same = next(
        (i for i, (a, b) in enumerate(zip(held, new, strict=False)) if a != b), min(len(held), len(new))
    )
    assert progress[0] == min(same, len(new) - 1)


turns = st.tuples(
    st.lists(st.integers(0, 3), min_size=1, max_size=12),  # the prompt: with 4 ids, prefixes are often equal
    st.none() | st.tuples(st.integers(0, 5), st.integers(0, 1)),  # an interrupt, in which call of which layer
)


@given(st.lists(turns, min_size=1, max_size=5))
def test_a_session_holds_whatever_was_said_in_it(model, turns):
    """Prompts that agree in part, some of them interrupted, one after another in one session.

    Each gives what it gives in a fresh session, and the cache counts no position behind the ids.
    """
    session = Session(model)
    for prompt, interrupt in turns:
        if interrupt is None:
            assert run(model, prompt, session, max_tokens=3) == run(model, prompt, max_tokens=3)
            assert session.cache.filled == [len(session.ids)] * ARGS.n_layers
        else:
            calls, layer = interrupt[0], model.layers[interrupt[1]]
            with pytest.MonkeyPatch.context() as patch, suppress(KeyboardInterrupt):
                patch.setattr(layer, "feed_forward", interrupted(layer.feed_forward, calls))
                run(model, prompt, session, max_tokens=3)


def interrupted(part, after: int):
    """A part of the model, interrupted by Ctrl-C once it was called `after` times."""
    left = iter(range(after))

    def run(x):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return part(x)

    return run


def test_an_interrupted_session_can_be_used_again(model, monkeypatch):
    session, prompt = Session(model), [1, 2, 3, 4]
    steps = generate(model, prompt, session, Sampler())
    first = [next(steps) for _ in range(3)]

    def interrupt(x):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model.layers[1], "feed_forward", interrupt)
        with pytest.raises(KeyboardInterrupt):
            next(steps)
    assert run(model, prompt, session, max_tokens=3)[0] == first


def test_two_generations_in_one_session_are_refused(model):
    session = Session(model)
    first = generate(model, [1, 2], session, Sampler())
    next(first)
    second = generate(model, [3, 4], session, Sampler())
    next(second)
    with pytest.raises(ParameterError, match="the session is in use by a later generation"):
        next(first)
    assert [next(second) for _ in range(2)]


def test_a_copied_session_goes_on_by_itself(model):
    """Another text in the copy leaves what the first one holds as it was."""
    session = Session(model)
    made, _ = run(model, [1, 2, 3], session, max_tokens=6)
    longer = [1, 2, 3, *made[:5], 7]
    wanted, _ = run(model, longer, max_tokens=5)
    copied = deepcopy(session)
    run(model, [9, 8, 7, 6, 5, 4, 3, 2, 1], copied, max_tokens=5)
    assert session.ids[:8] == longer[:8]
    assert run(model, longer, session, max_tokens=5)[0] == wanted


def test_logits_that_are_no_numbers_stop_it(model, monkeypatch):
    monkeypatch.setattr(model, "logits", lambda h: np.full(V, np.nan, np.float32))
    with pytest.raises(
        NumericsError, match=r"position 1, token 7: every layer.* but the largest logit is nan"
    ):
        run(model, [1, 7])


def test_sampling_that_leaves_no_id_is_not_called_a_fault_of_the_model(model):
    with pytest.raises(
        NumericsError, match=r"the model.s logits are finite, but after .* logit_bias .* is -inf"
    ):
        run(model, [1, 7], sampler=Sampler(logit_bias=dict.fromkeys(range(V), -np.inf)))


@pytest.mark.parametrize(
    "penalty",
    [
        {"repetition_penalty": 2.0},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 1.0},
        {"dry_multiplier": 1.0},
    ],
    ids=str,
)
def test_ids_that_only_pad_the_embedding_have_no_penalty(model, penalty):
    options = {"sampler": Sampler(**penalty), "max_tokens": 5, "vocab_size": V - 2}
    assert len(run(model, [1, V - 1, 7, V - 2], **options)[0]) == 5


def test_a_request_that_ended_frees_its_session(model):
    """Without the garbage collector, because a cache may be most of the memory."""
    request = Request([1, 2], Session(model), Sampler())
    with request.step() as session:
        cache = ref(session.cache)
    del session
    gc.disable()
    try:
        del request
        assert cache() is None
    finally:
        gc.enable()


def test_the_seed_decides(model):
    draw = [run(model, [1], sampler=Sampler(temperature=1.5, seed=s), max_tokens=20)[0] for s in (7, 7, 8)]
    assert draw[0] == draw[1] != draw[2]


def test_the_penalty_sees_the_prompt_and_what_was_made(model):
    ids, _ = run(model, [1, 2], sampler=Sampler(repetition_penalty=1e6), max_tokens=30)
    assert len({1, 2, *ids}) == 32


def test_a_cache_has_no_gaps_and_its_own_batch(model):
    cache = model.new_cache(batch=1, max_seq_len=16)
    with pytest.raises(ParameterError, match="position 5 comes after 0 stored ones"):
        model(np.array([[1]]), 5, cache)
    model(np.array([[1, 2, 3]]), 0, cache)
    model(np.array([[4]]), 2, cache)  # going back is not a gap
    with pytest.raises(ParameterError, match="position 4 comes after 3"):
        model(np.array([[1]]), 4, cache)
    with pytest.raises(ParameterError, match="2 sequences do not fit a cache for 1"):
        model(np.array([[1], [2]]), 0, cache)


def test_an_update_that_stops_halfway_counts_nothing(model):
    """Keys are new and values still old: the positions from its start on are stored no longer."""
    cache = model.new_cache(batch=1, max_seq_len=16)
    model(np.array([[1, 2, 3, 4, 5]]), 0, cache)

    class Interrupt:
        def __array__(self, *args, **kwargs):
            raise KeyboardInterrupt

    keys = np.ones((1, 2, ARGS.n_kv_heads, ARGS.head_dim), np.float32)
    with pytest.raises(KeyboardInterrupt):
        cache.update(1, 2, keys, Interrupt())
    assert cache.filled == [5, 2]
    with pytest.raises(ParameterError, match="position 3 comes after 2"):
        cache.update(1, 3, keys, keys)
    small = KVCache(ARGS, 1, 16, np.float16)
    small.update(0, 0, *[np.repeat(keys, 3, axis=1)] * 2)
    with pytest.raises(NumericsError, match="beyond 65504"):
        small.update(0, 2, keys, keys * 1e6)
    assert small.filled == [2, 0]


@pytest.mark.parametrize("tokens", [[1, 2], 3, [[[1]]], [[1.5]], [[True]], None])
def test_tokens_are_whole_numbers_in_rows(model, tokens):
    with pytest.raises(ParameterError, match="wanted whole numbers of shape"):
        model(np.array(tokens))


def test_forward_counts_positions(model):
    session = Session(model)
    whole = forward(model, [1, 2, 3, 4, 5], session)
    halves = Session(model)
    forward(model, [1, 2], halves)
    np.testing.assert_allclose(
        forward(model, [3, 4, 5], halves), whole, rtol=0, atol=1e-5 * np.abs(whole).max()
    )
    assert halves.ids == session.ids == [1, 2, 3, 4, 5]


# ---------------------------------------------------------------- stop texts


@given(
    text=st.text("ab", max_size=40),
    stop=st.lists(st.text("ab", min_size=1, max_size=5), max_size=3),
    cuts=st.lists(st.integers(0, 40), max_size=10),
)
@example(text="baa", stop=["a", "baa"], cuts=[2])  # "a" is complete before "baa", though it begins later
def test_stop_texts_cut_at_the_first_one_however_the_text_arrives(text, stop, cuts):
    edges = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stops, out, released = StopTexts(stop), "", []
    for begin, end in pairwise(edges):
        out += stops.push(text[begin:end])
        released.append((end, len(out)))
        if stops.found:
            break
    else:
        out += stops.held
    _, first = min(((at + len(s), at) for s in stop if (at := text.find(s)) >= 0), default=(0, None))
    assert out == text[:first]
    assert stops.found == (first is not None)
    # Nothing is held back that cannot be the beginning of a stop text.
    for end, given_out in released:
        held = text[given_out:end]
        assert stops.found or not held or any(s.startswith(held) for s in stop)


def test_the_first_of_several_stop_texts_in_one_piece_counts():
    stops = StopTexts(["late", "early"])
    assert stops.push("so early, so late") == "so " and stops.found


@pytest.mark.parametrize("stop", ["text", [""], [1], [None]])
def test_stop_must_be_a_list_of_texts(stop):
    with pytest.raises(ParameterError, match="stop is"):
        StopTexts(stop)


# ---------------------------------------------------------------- streams of text


def test_a_stream_is_the_completion_in_pieces(llama):
    expected = llama.generate("Once upon a time", max_tokens=20)
    pieces = list(llama.stream("Once upon a time", max_tokens=20))
    assert "".join(piece.text for piece in pieces) == expected.text == pieces[-1].completion.text
    assert [piece.token for piece in pieces] == [*expected.tokens, None]
    assert all(piece.completion is None for piece in pieces[:-1])
    assert expected.text == llama.tokenizer.decode(expected.tokens)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "repetition_penalty": 3.0, "seed": 1}])
def test_logprobs_are_those_of_the_model_before_any_step(llama, sampling):
    """Against torch.log_softmax of the logits of the same passes, whatever the sampler does."""
    options = {"max_tokens": 8, **sampling}
    done = llama.generate("Once upon a time", top_logprobs=3, **options)
    assert done.tokens == llama.generate("Once upon a time", **options).tokens
    session, last = llama.new_session(32), done.prompt_tokens
    for token, one in zip(done.tokens, done.logprobs, strict=True):
        logits = forward(llama.model, last, session)
        last = [token]
        expected = torch.log_softmax(torch.from_numpy(logits[: llama.tokenizer.n_used]).double(), -1)
        values, ids = expected.topk(3)
        assert one.chosen == pytest.approx(expected[token].item(), rel=1e-12)
        assert [i for i, _ in one.top] == ids.tolist()
        assert [value for _, value in one.top] == pytest.approx(values.tolist(), rel=1e-12)


def test_each_piece_has_the_logprobs_of_its_token(llama):
    options = {"max_tokens": 20, "stop": ["she"]}
    *pieces, last = llama.stream("Once upon a time, there was", top_logprobs=0, **options)
    assert [piece.logprobs for piece in pieces] == last.completion.logprobs
    assert len(last.completion.tokens) == len(pieces) and all(not piece.logprobs.top for piece in pieces)
    *pieces, last = llama.stream("Once upon a time, there was", **options)
    assert last.completion.logprobs is None and {piece.logprobs for piece in pieces} == {None}


def test_a_bias_is_for_ids_or_for_texts_of_one_token(llama):
    first, *_ = llama.generate("Once upon a time", max_tokens=1).tokens
    (other,) = llama.tokenizer.encode(" and")
    banned = llama.generate("Once upon a time", max_tokens=4, logit_bias={first: -np.inf})
    assert first not in banned.tokens
    assert llama.generate("Once upon a time", max_tokens=2, logit_bias={" and": 99.0}).tokens == [other] * 2
    for bias, message in [
        ({" and so on": 1.0}, r"' and so on' is 3 tokens: \d+, \d+, \d+; a text must be one token"),
        ({llama.tokenizer.n_used: 1.0}, "has id 49152, the last one is 49151"),
        ({1.5: 1.0}, "logit_bias is .* it must be a mapping"),
        ([1], "logit_bias is .* it must be a mapping"),
    ]:
        with pytest.raises(ParameterError, match=message):
            llama.stream("a", logit_bias=bias)


def test_dry_ends_a_repetition_and_breakers_are_texts(llama):
    prompt = "one two three four, one two three four, one two three"
    options = {"max_tokens": 1, "dry_multiplier": 50.0}
    assert llama.generate(prompt, max_tokens=1).text == " four"
    assert llama.generate(prompt, **options).text != " four"
    assert llama.generate(prompt, **options, dry_breakers=["two", "three"]).text == " four"
    for breakers in ("x", [""], [1], 5):
        with pytest.raises(ParameterError, match="dry_breakers is"):
            llama.stream("a", dry_breakers=breakers)


@pytest.mark.parametrize("n", [-1, 1.5, True, "3", 10**9])
def test_top_logprobs_is_checked(llama, n):
    with pytest.raises(ParameterError, match="top_logprobs is"):
        llama.stream("a", top_logprobs=n)


def test_a_stop_text_ends_the_stream(llama):
    free = llama.generate("Once upon a time", max_tokens=30).text
    stop = free[17:23]  # from the middle of one word into the next
    cut = llama.generate("Once upon a time", max_tokens=30, stop=["never said", stop])
    assert cut.text == free[: free.find(stop)] and cut.finish_reason == "stop"


def test_a_stream_never_splits_a_character(llama):
    """Emoji take several tokens: every piece is whole characters, and nothing is lost."""
    ids = llama.tokenizer.encode("🙂🙃 naïve 漢字 🏳️‍🌈!")
    assert any("\ufffd" in llama.tokenizer.decode([i]) for i in ids)  # there are tokens of half a character

    class Parrot:
        args = llama.model.args

        def new_cache(self, batch, max_seq_len):
            return type("Cache", (), {"max_seq_len": max_seq_len})()

        def hidden(self, tokens, start_pos, cache):
            return np.full((1, tokens.shape[1], 1), start_pos + tokens.shape[1] - 1)

        def logits(self, h):
            logits = np.zeros(49152, np.float32)
            logits[[*ids, 2][int(h[0])]] = 1
            return logits

    parrot = nl.Llama(Parrot(), llama.tokenizer)
    pieces = [piece.text for piece in parrot.stream([0], max_tokens=100)]
    assert "".join(pieces) == "🙂🙃 naïve 漢字 🏳️‍🌈!"
    assert not any("\ufffd" in piece for piece in pieces)
    cut_in_half = parrot.generate([0], max_tokens=1).text
    assert cut_in_half == "\ufffd" or cut_in_half == "🙂"


@pytest.mark.parametrize("prompt", [b"hi", [1.5], [True], ["a"], [[1, 2]], {1: 2}.items()])
def test_a_prompt_is_text_or_ids(llama, prompt):
    with pytest.raises(ParameterError, match="a text or a list of token ids"):
        llama.stream(prompt)


@pytest.mark.parametrize("n", [-1, 1.5, "3", True])
def test_max_tokens_is_checked(llama, n):
    with pytest.raises(ParameterError, match="max_tokens is"):
        llama.stream("hi", max_tokens=n)


def test_a_model_without_a_template_does_not_chat(llama):
    with pytest.raises(TemplateError, match="no chat template"):
        nl.Llama(llama.model, llama.tokenizer).chat([{"role": "user", "content": "hi"}])


def test_a_tokenizer_larger_than_the_embedding_is_refused(llama, model):
    with pytest.raises(MismatchError, match=f"the tokenizer has 49152 ids, the embedding {V} rows"):
        nl.Llama(model, llama.tokenizer)


def test_what_the_docstring_of_the_package_shows(llama):
    ids = llama.encode_chat([{"role": "user", "content": "hi"}])
    assert llama.tokenizer.piece(ids[0]) == "<|im_start|>"
    tokens = llama.tokenizer.encode("The Eiffel Tower is in")
    cache = llama.model.new_cache(batch=1, max_seq_len=512)
    logits = llama.model(np.array([tokens]), start_pos=0, cache=cache)
    assert logits.shape == (1, len(tokens), 49152) and logits.dtype == np.float32
    assert llama.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
