"""Drafts change the number of passes, and never the text."""

import json
import pickle
from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
from helpers.command_line import assert_refused
from helpers.command_line import run as program
from helpers.gguf_writer import write_llama
from helpers.kernels import real_weight
from helpers.tiny_models import SPEAKER, float_weights, stored, write_speaker
from helpers.updates import every_matrix, random_updates
from hypothesis import given, settings
from hypothesis import strategies as st

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.backend.formats import FORMATS, StoredTensor
from numpy_llama.errors import MismatchError, NumericsError, ParameterError
from numpy_llama.generation import speculative
from numpy_llama.generation.generate import generate
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.generation.speculative import (
    MOST_TOKENS,
    Drafter,
    DraftModel,
    Speculation,
    best_length,
    relative_cost,
)
from numpy_llama.proof.tiny import TINY_BLOCKS, random_weights
from numpy_llama.text.tokenizer import spelled

ROOM = 60
ARGS = replace(TINY_BLOCKS, head_dim=32, max_seq_len=ROOM)
V = ARGS.vocab_size
KINDS = {
    "Q8_0": {},
    "BF16": {},
    "Q4_0, cache q8": {"cache_dtype": "q8"},
    "F32, exact": {"exact": True},
    "Q8_0, window": {},
}


def build_tiny(format, args=ARGS, seed=0, **options):
    return build(args, stored(float_weights(args, seed), format), **options)


@pytest.fixture(scope="module", params=KINDS)
def model(request):
    args = replace(ARGS, sliding_window=9) if "window" in request.param else ARGS
    return build_tiny(request.param.partition(",")[0], args, **KINDS[request.param])


class Scripted(Drafter):
    """Knows the text, and errs with a probability; at times it proposes too few ids, too many or none."""

    def __init__(self, text, right, seed):
        self.text, self.right, self.rng = text, right, np.random.default_rng(seed)

    def propose(self, ids, k):
        rest = [*self.text[len(ids) :], *self.rng.integers(0, V, k).tolist()]
        n = self.rng.choice([0, max(k - 1, 0), k, k + 3], p=[0.1, 0.1, 0.7, 0.1])
        return [i if self.rng.random() < self.right else int(self.rng.integers(0, V)) for i in rest[:n]]


class AlmostRight(Drafter):
    """Every other draft ends with a wrong id."""

    def __init__(self, text):
        self.text, self.times = text, 0

    def propose(self, ids, k):
        self.times += 1
        draft = self.text[len(ids) : len(ids) + k]
        return [*draft[:-1], 0] if self.times % 2 else draft


class Eager(Speculation):
    """Drafts as many ids as fit, whatever was accepted."""

    def _draft(self, request):
        self.acceptance = 1.0
        return super()._draft(request)


def run(model, prompt, session, sampler, **options):
    """-> (the new ids, the reason of the end)."""
    ids, steps = [], generate(model, prompt, session, sampler, **options)
    while True:
        try:
            ids.append(next(steps))
        except StopIteration as end:
            return ids, end.value


def drafter_of(kind, model, text, seed):
    if kind == "lookup":
        return nl.Lookup()
    if kind == "draft model":
        small = draft_model()
        return DraftModel(small, Session(small), 0.1, vocab_size=V)
    return Scripted(text, {"right": 1.0, "partly right": 0.7, "random": 0.0}[kind], seed)


def draft_model():
    return build_tiny("Q4_0", replace(ARGS, n_layers=1, max_seq_len=ROOM // 2))


samplers = st.builds(
    Sampler,
    temperature=st.sampled_from([0.0, 0.3, 1.5]),
    top_k=st.sampled_from([None, 3]),
    repetition_penalty=st.sampled_from([1.0, 1.3]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    dry_multiplier=st.sampled_from([0.0, 1.0]),
    xtc_probability=st.sampled_from([0.0, 0.5]),  # draws before the choice
    mirostat_tau=st.sampled_from([None, 3.0]),  # keeps a state
    seed=st.integers(0, 9),
)
prompts = st.lists(st.integers(0, 5), min_size=1, max_size=ROOM - 1)  # few ids: a lookup finds many
drafters = st.sampled_from(["lookup", "draft model", "right", "partly right", "random"])


@given(
    prompt=prompts,
    sampler=samplers,
    kind=drafters,
    n=st.sampled_from([0, 1, 2, 9, None]),
    stop=st.sets(st.integers(0, V - 1), max_size=3),
    speculation=st.sampled_from([Speculation, Eager]),
    seed=st.integers(0, 99),
)
def test_the_text_is_the_same(model, prompt, sampler, kind, n, stop, speculation, seed):
    """For any sampler, penalty and seed; to a stop id, to `max_tokens` and to the end of the context."""
    options = {"max_tokens": n, "stop_ids": stop, "vocab_size": V - 3}
    session, other = Session(model), Session(model)
    wanted = run(model, prompt, session, sampler, **options)
    # The drafter goes on behind the end of the text: with the stop id, and with ids that have no token.
    free, _ = run(model, prompt, Session(model), sampler)
    drafting = speculation(drafter_of(kind, model, [*prompt, *free], seed))
    assert run(model, prompt, other, sampler, decode=drafting, **options) == wanted
    assert other.ids == session.ids
    counts, used = drafting.drafts, len(wanted[0]) + (wanted[1] == "stop")
    assert counts.accepted <= counts.drafted <= (MOST_TOKENS - 1) * counts.passes
    assert counts.passes + counts.accepted == max(used - 1, 0)


turns = st.lists(st.tuples(prompts, st.integers(0, 12), drafters), min_size=1, max_size=4)


@settings(max_examples=25)
@given(turns=turns, sampler=samplers, seed=st.integers(0, 99))
def test_a_session_goes_on_after_any_end(model, turns, sampler, seed):
    """Generations that are closed anywhere, in one session: each begins as in a fresh one, and nothing of
    a draft that was not chosen is left in the session."""
    session, own = Session(model), draft_model()
    lasting = DraftModel(own, Session(own), 0.1, vocab_size=V)
    for prompt, steps, kind in turns:
        wanted, _ = run(model, prompt, Session(model), sampler)
        drafter = lasting if kind == "draft model" else drafter_of(kind, model, [*prompt, *wanted], seed)
        made = generate(model, prompt, session, sampler, decode=Eager(drafter))
        found = [token for token, _ in zip(made, range(steps), strict=False)]
        made.close()
        assert found == wanted[: len(found)]
        assert session.ids == [*prompt, *wanted][: len(session.ids)]
        assert all(filled >= len(session.ids) for filled in session.cache.filled)


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("passes", [1, 2, 3])
def test_an_interrupted_pass_leaves_the_session_as_it_was(layer, passes, monkeypatch):
    model, sampler = nl.Transformer(ARGS, float_weights(ARGS)), Sampler()
    prompt, session = [1, 2, 3, 4], Session(model)
    wanted, _ = run(model, prompt, Session(model), sampler)
    part, calls = model.layers[layer].feed_forward, iter(range(passes))

    def interrupt(x):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return part(x)

    found = []
    with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
        patch.setattr(model.layers[layer], "feed_forward", interrupt)
        speculation = Eager(Scripted([*prompt, *wanted], 0.8, 5))
        found.extend(generate(model, prompt, session, sampler, decode=speculation))
    assert len(session.ids) < ROOM - 1 and session.ids == [*prompt, *wanted][: len(session.ids)]
    assert run(model, prompt, session, sampler) == (wanted, "length")


def test_a_window_moves_on_below_drafts():
    """A context of many windows: positions are dropped, and a draft that is not accepted is overwritten."""
    args = replace(ARGS, sliding_window=20, max_seq_len=1100)
    model, prompt = build_tiny("Q8_0", args), np.random.default_rng(3).integers(0, V, 700).tolist()
    session, other = Session(model), Session(model)
    wanted = run(model, prompt, session, Sampler(1.0, seed=1))
    drafting = Eager(Scripted([*prompt, *wanted[0]], 0.8, 1))
    assert run(model, prompt, other, Sampler(1.0, seed=1), decode=drafting) == wanted
    assert session.cache.dropped[0] > 0 and drafting.drafts.accepted > 50
    assert other.cache.least_start < len(other.ids) - MOST_TOKENS  # where a draft may begin


# ---------------------------------------------------------------- bits


BITS = replace(ARGS, dim=256, head_dim=64, n_kv_heads=1, hidden_dim=256, max_seq_len=300)
OPTIONS = {
    "plain": {},
    "exact": {"exact": True},
    "15 bits": {"activation_bits": 15},
    "cache q8": {"cache_dtype": "q8"},
    "LoRA": {"adapters": [random_updates(0, every_matrix(3, BITS), args=BITS)]},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("format", FORMATS)
def test_a_token_has_the_same_bits_in_a_pass_of_up_to_eight(format, options, rng):
    """More than eight tokens round float weights, and attention then has another order of sums."""
    weights = {
        name: StoredTensor.quantize(w, "F32") if w.ndim == 1 else real_weight(rng, FORMATS[format], *w.shape)
        for name, w in float_weights(BITS).items()
    }
    model = build(BITS, weights, **options)
    ids, start = rng.integers(0, V, (1, 300)), 240
    begun = Session(model)
    model.hidden(ids[:, :start], 0, begun.cache)

    def logits(T):
        passes = [slice(at, min(at + T, 264)) for at in range(start, 264, T)]
        rows = [model.logits(model.hidden(ids[:, one], one.start, begun.cache))[0] for one in passes]
        return np.concatenate(rows)

    alone = logits(1)
    assert np.isfinite(alone).all()
    for T in range(2, MOST_TOKENS + 1):
        np.testing.assert_array_equal(logits(T), alone, err_msg=f"{T} tokens")


# ---------------------------------------------------------------- drafters


@pytest.mark.parametrize(
    "ids, k, wanted",
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 2, [4, 5]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 9, [4, 5, 1, 2, 3]),
        ([1, 2, 3, 4, 9, 2, 3, 5, 1, 2, 3], 1, [4]),  # three ids before two, though two are newer
        ([2, 3, 4, 0, 2, 3, 5, 0, 2, 3], 1, [5]),  # the newest of several
        ([7, 2, 3, 4, 1, 2, 3], 3, [4, 1, 2]),
        ([5, 5, 5, 5], 4, [5]),
        ([1, 2, 3, 1], 4, []),  # one id is too little
        ([4, 4], 4, []),
        ([1], 4, []),
        ([], 4, []),
    ],
)
def test_a_lookup_proposes_what_came_before(ids, k, wanted):
    assert list(nl.Lookup().propose(ids, k)) == wanted


@given(ids=st.lists(st.integers(0, 3), max_size=40), k=st.integers(1, 9))
def test_a_lookup_finds_the_newest_of_the_longest(ids, k):
    wanted = []
    for n in (2, 3):
        for at in range(len(ids) - n):
            if ids[at : at + n] == ids[-n:]:
                wanted = ids[at + n : at + n + k]
    assert list(nl.Lookup().propose(ids, k)) == wanted


def test_a_draft_model_is_greedy_and_computes_what_is_new(monkeypatch):
    """After a draft that was accepted as a whole its last id is new too; after a wrong one, what differs."""
    model = draft_model()
    drafter, text = DraftModel(model, Session(model), 0.1, vocab_size=V), [1, 2, 3]
    computed, hidden = [], model.hidden

    def counted(tokens, start_pos, cache):
        computed.append(list(range(start_pos, start_pos + tokens.shape[1])))
        return hidden(tokens, start_pos, cache)

    monkeypatch.setattr(model, "hidden", counted)
    for accepted in (4, 2, 0):
        wanted, _ = run(model, text, Session(model), Sampler(), max_tokens=4)
        computed.clear()
        draft = list(drafter.propose(text, 4))
        assert draft == wanted
        assert computed[0][-1] == len(text) - 1 and len(computed) == 4
        assert len(computed[0]) == {3: 3, 8: 2, 11: 1}[len(text)]
        text += [*draft[:accepted], (draft[accepted] + 1) % V if accepted < 4 else 7]
    assert drafter.propose([1] * (ROOM // 2), 4) == []  # its context is full


@pytest.mark.parametrize(
    "a, cost, k", [(0, 0, 0), (0.15, 0, 0), (0.3, 0, 1), (0.8, 0, 4), (1, 0, 7), (0.3, 0.2, 0)]
)
def test_the_length_that_is_worth_most(a, cost, k):
    assert best_length(a, cost, 7) == k
    worth = [sum(a**i for i in range(n + 1)) / (1 + n * (speculative.EXTRA + cost)) for n in range(8)]
    assert worth[k] == max(worth)


def test_the_length_follows_what_is_accepted():
    """Right drafts grow to the longest. Wrong ones become rare, and right ones are found again."""
    model, prompt = build_tiny("Q8_0", replace(ARGS, max_seq_len=1500)), [1, 2, 3]
    text = [*prompt, *run(model, prompt, Session(model), Sampler(1.0, seed=0), max_tokens=1400)[0]]

    ks = {}

    class Turning(Drafter):
        def propose(self, ids, k):
            ks[len(ids)] = k
            right = len(ids) < 200 or len(ids) > 900
            return [(i + (not right)) % V for i in text[len(ids) : len(ids) + k]]

    drafting = Speculation(Turning())
    assert run(model, prompt, Session(model), Sampler(1.0, seed=0), max_tokens=1400, decode=drafting)[0]
    assert max(ks.values()) == MOST_TOKENS - 1 == ks[max(at for at in ks if at < 200)]
    wrong = [at for at in ks if 300 < at < 900]
    assert 1 < len(wrong) < 100
    assert max(k for at, k in ks.items() if at > 1200) == MOST_TOKENS - 1


@pytest.mark.parametrize("n", [2, 3, 5, 8, 9, 30])
def test_a_draft_ends_where_the_text_may_end(n):
    """The logits after the last id that fits are never used, so no draft reaches that id."""
    model, prompt, ends = nl.Transformer(ARGS, float_weights(ARGS)), [1, 2, 3], []

    class Watching(Drafter):
        def propose(self, ids, k):
            ends.append(len(ids) + k)
            return [0] * k

    run(model, prompt, Session(model), Sampler(1.5, seed=0), max_tokens=n, decode=Eager(Watching()))
    assert max(ends, default=0) == (len(prompt) + n - 1 if n > 2 else 0)


def test_a_draft_that_overflows_is_left_out():
    """An id that the model cannot compute, but does not choose, is no error."""
    weights = random_weights(np.random.default_rng(0), ARGS, np.float32)
    weights["tok_embeddings.weight"][V - 1] = np.inf
    model, prompt = nl.Transformer(ARGS, weights), [1, 2, 3]

    class Bad(Drafter):
        def propose(self, ids, k):
            return [V - 1] * k

    wanted = run(model, prompt, Session(model), Sampler(), vocab_size=V - 1)
    drafting = Eager(Bad())
    assert run(model, prompt, Session(model), Sampler(), decode=drafting, vocab_size=V - 1) == wanted
    assert drafting.drafts.accepted == 0 < drafting.drafts.drafted
    own = DraftModel(model, Session(model), 0.1)
    with pytest.raises(NumericsError, match="the draft model: position 1, token 52: its embedding"):
        own.propose([1, V - 1], 3)


# ---------------------------------------------------------------- text


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_speaker(tmp_path_factory.mktemp("speculative") / "m.gguf", format="Q8_0")


@pytest.fixture(scope="module")
def small_path(tmp_path_factory):
    small = replace(SPEAKER, n_layers=1)
    return write_speaker(tmp_path_factory.mktemp("speculative") / "small.gguf", small, "Q8_0")


@pytest.fixture(scope="module")
def llama(path):
    return nl.load(path)


@pytest.mark.parametrize("draft", ["lookup", "model"])
def test_a_stream_is_the_same(llama, small_path, draft):
    drafter = nl.Lookup() if draft == "lookup" else llama.new_drafter(nl.load(small_path))
    for stop, n in (((), None), ((), 0), ((), 5), (("e",), None), (tuple("aeiou"), 40)):
        options = {"stop": stop, "max_tokens": n, "temperature": 0.5, "seed": 3, "top_logprobs": 2}
        plain = list(llama.stream("hi hi hi hi", **options))
        pieces = list(llama.stream("hi hi hi hi", draft=drafter, **options))
        assert [replace(p, completion=None) for p in pieces] == [replace(p, completion=None) for p in plain]
        assert plain[-1].completion.drafts is None
        done = pieces[-1].completion
        assert replace(done, drafts=None, prefill_seconds=0, decode_seconds=0) == replace(
            plain[-1].completion, prefill_seconds=0, decode_seconds=0
        )
        assert done.drafts.accepted <= done.drafts.drafted
        assert pickle.loads(pickle.dumps(done)) == done


def test_a_text_with_a_rule_is_the_same(llama):
    """The rule sees each chosen id once, and no drafted id that is not chosen."""
    options = {"regex": "(ab|ac){6}d", "temperature": 1.0, "seed": 4}
    plain = llama.generate("abacabacabac", **options)
    drafted = llama.generate("abacabacabac", draft=nl.Lookup(), **options)
    assert (drafted.text, drafted.finish_reason) == (plain.text, plain.finish_reason) == (plain.text, "stop")
    assert 0 < drafted.drafts.accepted < drafted.drafts.drafted


def test_what_comes_from_a_session_after_drafts_is_the_same(llama, tmp_path):
    """A file and a branch have the chosen ids only."""
    plain, session = llama.new_session(), llama.new_session()
    made = llama.generate("abab", max_tokens=20, session=plain).tokens
    prompt = [256, *b"abab"]
    found = llama.generate("abab", max_tokens=20, session=session, draft=AlmostRight([*prompt, *made])).tokens
    assert found == made and session.ids == plain.ids
    llama.save_session(session, tmp_path / "one")
    again = [*prompt, *made, 7]
    wanted = llama.generate(again, max_tokens=9).tokens
    for one in (session.branch(), llama.load_session(tmp_path / "one"), session):
        assert llama.generate(again, max_tokens=9, session=one).tokens == wanted


def test_a_conversation_keeps_what_the_draft_model_has_computed(llama, small_path):
    llama.chat_format = nl.ChatTemplate(
        "{% for m in messages %}<|user|>{{ m['content'] }}<|end|>{% endfor %}"
    )
    drafter, session, plain = llama.new_drafter(nl.load(small_path)), llama.new_session(), llama.new_session()
    drafter.cost, messages = 0.1, []
    for question in ("hi", "you"):
        messages.append({"role": "user", "content": question})
        options = {"max_tokens": 9, "temperature": 1.0, "seed": 1}
        answer = llama.chat(messages, session=session, draft=drafter, **options)
        assert answer.text == llama.chat(messages, session=plain, **options).text
        messages.append({"role": "assistant", "content": answer.text})
    assert drafter.session.ids[: len(answer.prompt_tokens)] == answer.prompt_tokens


def test_a_draft_model_has_the_same_vocabulary(llama, smollm2_path, tmp_path, path):
    with pytest.raises(
        MismatchError, match=r"id 0 is .* in the draft model's vocabulary, and .* in the model's"
    ):
        llama.new_drafter(nl.load(smollm2_path))
    for other in (None, "lookup", 3):
        with pytest.raises(ParameterError, match=r"llama is .*, it must be a Llama"):
            llama.new_drafter(other)
    many = nl.load(write_speaker_of(tmp_path / "many.gguf", 388))
    with pytest.raises(MismatchError, match="the draft model's vocabulary has 388 ids, the model's 259"):
        llama.new_drafter(many)
    some = nl.load(write_speaker_of(tmp_path / "some.gguf", 387))  # 128 more
    for one, other in ((llama, some), (some, llama)):
        drafter, options = one.new_drafter(other), {"max_tokens": 20, "temperature": 3.0, "seed": 1}
        drafter.cost = 0.1  # it drafts
        made = one.generate([1, 2], draft=drafter, **options)
        assert made.tokens == one.generate([1, 2], **options).tokens and made.drafts.drafted
    assert max(made.tokens) >= 259  # an id that the draft model does not have


def write_speaker_of(path, n):
    """A model of n ids: the bytes, and control tokens."""
    args = replace(SPEAKER, vocab_size=n)
    tokens = [spelled(bytes([b])) for b in range(256)] + [f"<|{i}|>" for i in range(256, n)]
    vocabulary = {"model": "gpt2", "pre": "gpt-2", "tokens": tokens, "merges": [], "add_bos_token": False}
    vocabulary |= {"token_type": np.array([1] * 256 + [3] * (n - 256), np.int32)}
    return write_llama(path, args, float_weights(args), "Q8_0", **vocabulary)


def test_what_is_no_drafter_is_refused(llama):
    for wrong in ("lookup", 3, llama, nl.Lookup):
        with pytest.raises(
            ParameterError, match=r"draft is .*, it must be Lookup\(\) or what new_drafter\(\) makes"
        ):
            llama.generate("hi", draft=wrong)
    with pytest.raises(ParameterError, match="a batch takes no `draft`"):
        llama.generate_batch(["hi"], draft=nl.Lookup())


def test_costs_are_relative():
    big = replace(ARGS, n_layers=10)
    assert relative_cost(ARGS, ARGS) == 1
    n = {
        a.n_layers: sum(w.size for k, w in float_weights(a).items() if w.ndim == 2 and "emb" not in k)
        for a in (ARGS, big)
    }
    assert relative_cost(ARGS, big) == pytest.approx(n[ARGS.n_layers] / n[10])


# ---------------------------------------------------------------- the command line


def test_the_command_line_prints_the_same(path, small_path):
    plain = json.loads(program("generate", "hi hi hi", "-m", str(path), "-n", "20", "--json").stdout)
    assert "drafts" not in plain
    for option in (["--lookup"], ["--draft", str(small_path)]):
        done = program("generate", "hi hi hi", "-m", str(path), "-n", "20", "--json", *option)
        found = json.loads(done.stdout)
        assert found["tokens"] == plain["tokens"] and list(found["drafts"]) == [
            "passes",
            "drafted",
            "accepted",
        ]


def test_the_command_line_refuses(path, smollm2_path):
    both = program("generate", "hi", "-m", str(path), "--lookup", "--draft", "x")
    assert_refused(both, 2, "not allowed with argument --lookup")
    other = program("generate", "hi", "-m", str(path), "--draft", str(smollm2_path))
    assert_refused(other, 1, "a draft model needs the same vocabulary")
