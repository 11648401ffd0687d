"""Several sequences side by side: each gets what it gets alone."""

from dataclasses import replace
from functools import lru_cache
from unittest.mock import patch

import numpy as np
import pytest
from helpers.tiny_models import float_weights, stored
from hypothesis import given
from hypothesis import strategies as st

import numpy_llama as nl
from numpy_llama import llama as llama_module
from numpy_llama.backend import build
from numpy_llama.errors import (
    ContextOverflowError,
    NumericsError,
    ParameterError,
    ResourceLimitError,
    TemplateError,
)
from numpy_llama.generation.batch import (
    LEAST_SHARED,
    OWN,
    BatchCache,
    generate_batch,
    hidden_states,
    sessions_for,
    shared_prefix,
    side_by_side,
)
from numpy_llama.generation.generate import Request, generate, prefill
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.proof.bounds import CHUNKS_32
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.window import PREFILL_CHUNK

ARGS = replace(TINY_BLOCKS, max_seq_len=PREFILL_CHUNK + 60)
V = ARGS.vocab_size


# With activations of 8 bits another order of sums moves some of them by a whole step, 2^-7 of its block.
STEPS_8 = 5e-2


def build_tiny(format="Q8_0", **options):
    return build(ARGS, stored(float_weights(ARGS), format), **options)


@lru_cache
def wide(**options):
    """With heads of 32 numbers, which a cache in q8 needs."""
    args = replace(ARGS, head_dim=32, n_heads=2, n_kv_heads=1)
    return build(args, stored(float_weights(args), "Q8_0"), **options)


@pytest.fixture(scope="module", params=["numpy", "c"])
def model(request):
    """In exact mode both give a row among others what they give it alone, or nearly: the ids are equal."""
    return build_tiny(backend=request.param, exact=request.param == "c")


@pytest.fixture(scope="module")
def llama(smollm2_path):
    return nl.load(smollm2_path, exact=True)


def alone(model, prompt, sampler, **options):
    """-> (the new ids, the reason of the end)."""
    ids, steps = [], generate(model, prompt, Session(model), sampler, **options)
    while True:
        try:
            ids.append(next(steps))
        except StopIteration as end:
            return ids, end.value


def together(model, prompts, sampler, **options):
    sequences = [Request(prompt, Session(model), sampler, **options) for prompt in prompts]
    made = [[] for _ in prompts]
    for i, token in generate_batch(model, sequences):
        made[i].append(token)
    assert [one.ids for one in sequences] == [p + m for p, m in zip(prompts, made, strict=True)]
    return [(ids, one.reason) for ids, one in zip(made, sequences, strict=True)]


def ragged_prompts(rng, B, longest=30):
    return [rng.integers(0, 45, rng.integers(1, longest)).tolist() for _ in range(B)]


samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 1.5]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    seed=st.integers(0, 9),
)


@given(B=st.integers(0, 5), seed=st.integers(0, 99), sampler=samplers, n=st.sampled_from([0, 1, 7, None]))
def test_each_gets_what_it_gets_alone(model, B, seed, sampler, n):
    """Prompts of any lengths; they end at any step: at a stop id, at `max_tokens`, in a full context."""
    rng = np.random.default_rng(seed)
    prompts, options = ragged_prompts(rng, B), {"max_tokens": n, "stop_ids": {3, 30}, "vocab_size": 45}
    expected = [alone(model, prompt, sampler, **options) for prompt in prompts]
    assert together(model, prompts, sampler, **options) == expected


def test_a_full_context_and_a_prompt_in_chunks_beside_short_ones(model):
    prompts = [[1] * (ARGS.max_seq_len - 3), [2, 7], [5]]
    batched = together(model, prompts, Sampler(), max_tokens=6)
    assert batched == [alone(model, prompt, Sampler(), max_tokens=6) for prompt in prompts]
    assert [len(ids) for ids, _ in batched] == [3, 6, 6]


@given(seed=st.integers(0, 99))
def test_the_order_of_the_prompts_does_not_matter(model, seed):
    rng = np.random.default_rng(seed)
    prompts, sampler = ragged_prompts(rng, 4), Sampler(temperature=1.0, seed=seed)
    order = rng.permutation(4)
    batched = together(model, prompts, sampler, max_tokens=6)
    assert together(model, [prompts[i] for i in order], sampler, max_tokens=6) == [batched[i] for i in order]


def decode_step(model, prompts, tokens, rooms, spoil=None):
    """Logits (B, V) of one step after ragged prompts, in caches of these rooms."""
    caches = [model.new_cache(1, room) for room in rooms]
    for cache, prompt in zip(caches, prompts, strict=True):
        if spoil is not None:
            cache.k[:], cache.v[:] = spoil, spoil
        model.hidden(np.array([prompt]), 0, cache)
    start_pos = np.array([len(prompt) for prompt in prompts])
    return model.logits(hidden_states(model, np.array(tokens)[:, None], start_pos, BatchCache(caches)))[:, 0]


@given(B=st.integers(1, 5), seed=st.integers(0, 99))
def test_logits_are_those_of_each_alone(model, B, seed):
    rng = np.random.default_rng(seed)
    prompts, tokens = ragged_prompts(rng, B), rng.integers(0, V, B).tolist()
    rooms = [len(prompt) + int(rng.integers(1, 20)) for prompt in prompts]
    logits = decode_step(model, prompts, tokens, rooms)
    for prompt, token, row in zip(prompts, tokens, logits, strict=True):
        whole = model(np.array([[*prompt, token]]))[0, -1]
        np.testing.assert_allclose(row, whole, rtol=0, atol=CHUNKS_32 * np.abs(whole).max())


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "F16", "BF16"])
def test_logits_of_rounded_activations(format, rng):
    model, exact = build_tiny(format), build_tiny(format, exact=True)
    prompts, tokens = ragged_prompts(rng, 5), [1, 2, 3, 4, 5]
    logits = decode_step(model, prompts, tokens, [40] * 5)
    for prompt, token, row in zip(prompts, tokens, logits, strict=True):
        whole = exact(np.array([[*prompt, token]]))[0, -1]
        np.testing.assert_allclose(row, whole, rtol=0, atol=STEPS_8 * np.abs(whole).max())


def test_slots_not_yet_written_are_never_read(model):
    prompts, tokens = [[1, 2, 3, 4, 5, 6, 7], [8], [9, 10, 11]], [12, 13, 14]
    clean = decode_step(model, prompts, tokens, [8, 40, 20])
    np.testing.assert_array_equal(decode_step(model, prompts, tokens, [8, 40, 20], spoil=np.nan), clean)


def test_caches_are_written_where_they_lie(model):
    """A step stores one position of each sequence, and copies or moves none."""
    caches = [model.new_cache(1, 9), model.new_cache(1, 5)]
    where = [(cache.k.ctypes.data, cache.v.ctypes.data) for cache in caches]
    for cache, T in zip(caches, (4, 2), strict=True):
        model.hidden(np.array([[1] * T]), 0, cache)
    before = [cache.k.copy() for cache in caches]
    xk = np.ones((2, 1, ARGS.n_kv_heads, ARGS.head_dim), np.float32)
    keys, values = BatchCache(caches).update(1, np.array([4, 2]), xk, 2 * xk)
    assert [k.shape[:2] for k in keys] == [v.shape[:2] for v in values] == [(1, 5), (1, 3)]
    for cache, k, v, old, begin, end in zip(caches, keys, values, before, where, (4, 2), strict=True):
        assert (cache.k.ctypes.data, cache.v.ctypes.data) == begin
        assert np.shares_memory(k, cache.k) and np.shares_memory(v, cache.v)
        assert (k[:, end] == 1).all() and (v[:, end] == 2).all()
        np.testing.assert_array_equal(cache.k[:, :, :, :end], old[:, :, :, :end])


def test_the_model_itself_is_not_changed(model):
    tokens, before = np.array([[1, 2, 3]]), [layer.attention.attention for layer in model.layers]
    side_by_side(model, BatchCache([model.new_cache(1)]))
    assert [layer.attention.attention for layer in model.layers] == before
    assert np.isfinite(model(tokens)).all()


def test_positions_outside_the_context_are_refused(model):
    for start_pos in ([0, ARGS.max_seq_len], [-1, 0]):
        caches = BatchCache([model.new_cache(1) for _ in start_pos])
        with pytest.raises(ContextOverflowError, match="do not fit a context"):
            side_by_side(model, caches)(np.array([[1], [2]]), np.array(start_pos), caches)


def test_a_sequence_can_be_ended_from_outside(model):
    free = together(model, [[1], [2], [3]], Sampler(), max_tokens=8)
    sequences = [Request([i], Session(model), Sampler(), max_tokens=8) for i in (1, 2, 3)]
    made = [[], [], []]
    for i, token in generate_batch(model, sequences):
        made[i].append(token)
        if i == 1 and len(made[1]) == 3:
            sequences[1].stop()
    assert [(made[i], sequences[i].reason) for i in (0, 2)] == [free[0], free[2]]
    assert (made[1], sequences[1].reason) == (free[1][0][:3], "stop")


def test_who_has_ended_takes_no_more_work(model, monkeypatch):
    rows, logits = [], model.logits
    monkeypatch.setattr(model, "logits", lambda h: rows.append(h.shape[:-1]) or logits(h))
    sequences = [Request([1], Session(model), Sampler(), max_tokens=n) for n in (4, 2, 0, 3)]
    assert len(list(generate_batch(model, sequences))) == 9
    assert rows == [()] * 4 + [(3,), (2,), (1,)]


def test_a_session_serves_one_sequence(model):
    session = Session(model)
    sequences = [Request([1, 2], session, Sampler()), Request([3], session, Sampler())]
    with pytest.raises(ParameterError, match=r"prompts\[0\]: the session is in use by a later generation"):
        next(generate_batch(model, sequences))


@pytest.mark.parametrize("odd", range(5))
def test_the_sequence_that_fails_is_named(model, odd):
    sequences = [Request([i], Session(model), Sampler(), max_tokens=3) for i in range(1, 6)]
    steps = generate_batch(model, sequences)
    for _ in sequences:
        next(steps)
    with sequences[odd].step() as session:
        session.cache.v[1] = np.inf
    where = rf"prompts\[{odd}\]: position 1, token \d+: what comes out of layer 1, the first to go wrong, is"
    with pytest.raises(NumericsError, match=where):
        next(steps)


@pytest.mark.parametrize("odd", range(5))
def test_each_of_many_caches_is_checked(model, odd):
    """A gap, or no room, in any one of them."""
    caches = [model.new_cache(batch=1, max_seq_len=8) for _ in range(5)]
    for cache in caches:
        model.hidden(np.array([[1, 2, 3, 4]]), 0, cache)
    for start, error, message in [
        (5, ParameterError, "position 5 comes after 4 stored ones"),
        (8, ContextOverflowError, r"positions 8\.\.8 do not fit a cache of 8"),
        (-1, ContextOverflowError, r"positions -1\.\.2 do not fit"),
    ]:
        starts = np.where(np.arange(5) == odd, start, 2)
        with pytest.raises(error, match=message):
            together = BatchCache(caches)
            side_by_side(model, together).hidden(np.full((5, 1), 7), starts, together)


# ---------------------------------------------------------------- texts

TEXTS = ["Once upon a time", "The capital of France is", "def fibonacci(n):\n", "Die Würde 🙂", "1 2 3 4 5"]


def gist(completion):
    c = completion
    return c.text, c.tokens, c.prompt_tokens, c.finish_reason, c.logprobs


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.95, "seed": 8, "top_logprobs": 2}])
def test_texts_are_those_of_each_alone(llama, sampling):
    options = {"max_tokens": 24, "stop": [" little", "\n\n", "\n    if"], **sampling}
    expected = [gist(llama.generate(text, **options)) for text in TEXTS]
    completions = llama.generate_batch(TEXTS, **options)
    assert [gist(one) for one in completions] == expected
    assert {one.finish_reason for one in completions} == {"stop", "length"}
    assert all(one.prefill_seconds > 0 and one.decode_seconds >= 0 for one in completions)


@pytest.mark.parametrize(
    "options", [{"backend": "numpy"}, {"exact": True}, {}, {"cache_dtype": "q8"}], ids=str
)
@given(
    same=st.integers(0, 3 * LEAST_SHARED),
    own=st.lists(st.integers(0, 2 * OWN), min_size=1, max_size=4),
    seed=st.integers(0, 99),
)
def test_what_all_prompts_begin_with_is_computed_once(options, same, own, seed):
    """The kernels give the logits of each alone, bit for bit."""
    model, rng = wide(**options), np.random.default_rng(seed)
    begin = rng.integers(0, V, same).tolist()
    prompts = [[*begin, i, *rng.integers(0, V, n).tolist()] for i, n in enumerate(own)]
    with patch.object(model, "hidden", wraps=model.hidden) as hidden:
        sessions = sessions_for(model, prompts, [len(prompt) + 3 for prompt in prompts])
    n = len(sessions[0].ids)
    assert sum(call.args[0].size for call in hidden.call_args_list) == n == shared_prefix(prompts)
    assert n == 0 or LEAST_SHARED <= n <= same
    if len(own) > 1 and same >= LEAST_SHARED and min(own) >= OWN:
        assert n == same
    for prompt, session in zip(prompts, sessions, strict=True):
        request = Request(prompt, session, Sampler())
        found, wanted = prefill(model, request), forward_alone(model, prompt)
        if options.get("backend") == "numpy":
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
        else:
            np.testing.assert_array_equal(found, wanted)


def forward_alone(model, prompt):
    return prefill(model, Request(prompt, Session(model), Sampler()))


def test_texts_with_one_beginning_are_those_of_each_alone(llama):
    begin = "The capital of France is Paris. " * 9
    prompts = [
        begin + end for end in ("The capital of Spain is the city of", "Long ago there lived an old king who")
    ]
    for one, prompt in zip(llama.generate_batch(prompts, max_tokens=12), prompts, strict=True):
        assert one.text == llama.generate(prompt, max_tokens=12).text


def test_texts_and_ids_may_be_mixed(llama):
    ids = llama.tokenizer.encode(TEXTS[0])
    one, two, three = llama.generate_batch([TEXTS[0], ids, np.array(ids)], max_tokens=3)
    assert gist(one) == gist(two) == gist(three)


def test_conversations(llama):
    questions = ["What is the capital of France?", "And of Italy, the country where Rome lies?"]
    conversations = [[{"role": "user", "content": question}] for question in questions]
    expected = [gist(llama.chat(messages, max_tokens=12)) for messages in conversations]
    assert [gist(one) for one in llama.chat_batch(conversations, max_tokens=12)] == expected
    with pytest.raises(TemplateError, match=r"prompts\[0\]: this model has no chat template"):
        nl.Llama(llama.model, llama.tokenizer).chat_batch(conversations)


def test_a_stop_text_that_was_only_begun_is_part_of_the_text(llama):
    free = llama.generate(TEXTS[0], max_tokens=5).text
    stop = [free[-3:] + " and never said"]
    assert llama.generate(TEXTS[0], max_tokens=5, stop=stop).text == free
    assert llama.generate_batch(TEXTS[:1], max_tokens=5, stop=stop)[0].text == free


def test_an_answer_begins_a_text_and_a_continuation_does_not(llama, monkeypatch):
    """Where words begin with a space, that of the first is dropped from an answer only."""
    at_starts = []

    class Spy(llama_module.Transcript):
        def __init__(self, tokenizer, stop_texts, at_start):
            at_starts.append(at_start)
            super().__init__(tokenizer, stop_texts, at_start)

    monkeypatch.setattr(llama_module, "Transcript", Spy)
    messages = [{"role": "user", "content": "hi"}]
    llama.generate("hi", max_tokens=1), llama.chat(messages, max_tokens=1)
    llama.generate_batch(["hi"], max_tokens=1), llama.chat_batch([messages], max_tokens=1)
    assert at_starts == [False, True, False, True]


def test_none_and_one(llama):
    assert llama.generate_batch([]) == []
    (one,) = llama.generate_batch(["The sea"], max_tokens=5)
    assert gist(one) == gist(llama.generate("The sea", max_tokens=5))
    (one,) = llama.generate_batch(["The sea"], max_tokens=0)
    assert gist(one) == gist(llama.generate("The sea", max_tokens=0))


@pytest.mark.parametrize(
    "prompts, error, message",
    [
        ("text", ParameterError, "the prompts are one text, they must be a list"),
        ([1, 2], ParameterError, r"prompts\[0\]: the prompt is 1, it must be a text or"),
        (["a", b"b"], ParameterError, r"prompts\[1\]: the prompt must be a text or"),
        (
            ["a", [5, -1]],
            ParameterError,
            r"prompts\[1\]: token id -1 lies outside the vocab",
        ),
        (["a", "b", ""], ParameterError, r"prompts\[2\]: the prompt is empty"),
        (
            ["a", [5] * 8192],
            ContextOverflowError,
            r"prompts\[1\]: the prompt has 8192 tokens, the con",
        ),
    ],
)
def test_bad_prompts_are_refused_before_any_work(llama, prompts, error, message, monkeypatch):
    monkeypatch.setattr(llama_module, "generate_batch", None)
    with pytest.raises(error, match=message):
        llama.generate_batch(prompts, max_tokens=3)


@pytest.mark.parametrize("options", [{"max_tokens": -1}, {"stop": "x"}, {"temperature": -1}, {"seed": 1.5}])
def test_bad_options_are_refused(llama, options):
    with pytest.raises(ParameterError, match=next(iter(options))):
        llama.generate_batch(["a"], **options)


def test_a_batch_that_does_not_fit_is_refused_with_the_numbers(llama, monkeypatch):
    one = llama.model.new_cache(1, 100)
    nbytes = one.k.nbytes + one.v.nbytes
    monkeypatch.setattr(llama_module, "available_memory", lambda: 2 * nbytes)
    prompts = [[5] * 90, [5] * 90]
    assert len(llama.generate_batch(prompts, max_tokens=10)) == 2
    with pytest.raises(ResourceLimitError, match=r"3 sequences of up to 100 tokens need .* MiB of KV"):
        llama.generate_batch([*prompts, [5]], max_tokens=10)
    small = nl.Llama(llama.model, llama.tokenizer, max_context=95)
    with pytest.raises(ContextOverflowError, match=r"prompts\[1\]: the prompt has 96 tokens, the context 95"):
        small.generate_batch([[5], [5] * 96], max_tokens=10)
