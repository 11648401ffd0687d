"""Structured output: every text follows its schema, expression or grammar, whatever the logits are."""

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import numpy as np
import pytest
import regex
from helpers.schemas import SUPPORTED, UNSUPPORTED, random_text, schemas
from helpers.tiny_models import SPEAKER, float_weights, write_speaker
from helpers.tokenizers import (
    TEXTS,
    altered,
    byte_level,
    byte_level_metadata,
    put,
    sentence_piece,
    sentencepiece_metadata,
)
from hypothesis import assume, given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

import numpy_llama as nl
from numpy_llama.errors import GrammarError, ParameterError, ResourceLimitError, UnsupportedError
from numpy_llama.generation import structured
from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.session import Session
from numpy_llama.generation.speculative import Drafter
from numpy_llama.generation.structured import Constraint, Grammar, Vocabulary, fault_of
from numpy_llama.text.tokenizer import UNUSED, Tokenizer, tokenizer_from_gguf

SEEDS = st.integers(0, 2**32 - 1)


@cache
def spaced() -> Tokenizer:
    """SentencePiece that puts a space before each part of a text, also where a text continues."""
    return tokenizer_from_gguf(
        sentencepiece_metadata() | {"numpy_llama.tokenizer.space_if_none": True}, "small.gguf"
    )


TOKENIZERS = {
    "smollm": byte_level,
    "llama 3": lambda: byte_level("llama-bpe"),
    "sentencepiece": sentence_piece,
    "sentencepiece, no space": lambda: sentence_piece(False),
    "sentencepiece, spaces": spaced,
}
ANY_TOKENIZER = st.sampled_from([*TOKENIZERS])


@contextmanager
def no_other_process() -> Iterator[None]:
    """The random rules here are harmless, and a process for each would take most of the time."""
    with patch.object(structured, "fault_of", lambda *grammar: ""):
        yield


def constraint(tokenizer: Tokenizer, **rule) -> Constraint:
    with no_other_process():
        return Constraint(Grammar(**rule), tokenizer)


def allowed(constraint: Constraint, tokenizer: Tokenizer) -> np.ndarray:
    """The ids that may come next."""
    return np.flatnonzero(constraint(np.zeros(tokenizer.n_used, np.float32)) == 0)


def follow(constraint: Constraint, tokenizer: Tokenizer, text: str) -> Constraint:
    """A copy that has taken a text, in the fewest tokens that are allowed."""
    constraint, rest = copy(constraint), text.encode()
    while rest:
        ids = [int(i) for i in allowed(constraint, tokenizer) if rest.startswith(tokenizer.meanings[i])]
        best = max((i for i in ids if tokenizer.meanings[i]), key=lambda i: len(tokenizer.meanings[i]))
        constraint.take(best)
        rest = rest[len(tokenizer.meanings[best]) :]
    return constraint


# ---------------------------------------------------------------- JSON schemas

STRING = re.compile(r'"(?:\\.|[^"\\])*"')


@given(name=ANY_TOKENIZER, schema=SUPPORTED, seed=SEEDS)
def test_every_text_is_valid(name, schema, seed):
    """jsonschema is the oracle. A schema that contradicts itself is refused, and no other one."""
    tokenizer = TOKENIZERS[name]()
    try:
        rule = constraint(tokenizer, json_schema=schema)
    except GrammarError as error:
        assert "Unsatisfiable" in str(error)
        return
    text, reason = random_text(rule, tokenizer, seed)
    if reason == "stop":
        Draft202012Validator(schema).validate(json.loads(text))
        assert not re.search(r"\s", STRING.sub("", text)), text  # a name may occur twice, a number be 6e0


@given(schema=schemas(st.sampled_from(UNSUPPORTED)))
def test_no_keyword_is_left_out(schema):
    assume(any(json.dumps(bad)[1:-1] in json.dumps(schema) for bad in UNSUPPORTED))  # not an empty object
    with pytest.raises(GrammarError):
        constraint(byte_level(), json_schema={"allOf": [schema]})


REFUSED = {
    '"not"': {"not": {"type": "null"}},
    '"uniqueItems"': {"type": "array", "uniqueItems": True},
    '"if", "then"': {"if": {"type": "string"}, "then": {"minLength": 3}},
    "oneOf": {"oneOf": [{"minimum": 3}, {"maximum": 5}]},
    "format: idn-email": {"type": "string", "format": "idn-email"},
    "look-ahead": {"type": "string", "pattern": "(?=a)b"},
    "minProperties is 3": {"properties": {"a": {"type": "object", "minProperties": 3}}},
    "type: strnig": {"type": "strnig"},
    "'minLength'": {"type": "string", "minLength": "3"},
    "'required'": {"type": "object", "required": "a"},
    "minimum (5) is greater than maximum (3)": {"type": "integer", "minimum": 5, "maximum": 3},
    "example.org/x.json": {"$ref": "https://example.org/x.json"},
    "file:///etc/passwd": {"$ref": "file:///etc/passwd"},
    "circular": {"allOf": [{"$ref": "#"}, {"type": "object"}]},
}


@pytest.mark.parametrize("word", REFUSED)
def test_a_schema_that_is_not_supported_is_refused_by_name(word):
    with pytest.raises(GrammarError, match=re.escape(word)):
        Grammar(json_schema=REFUSED[word])


def test_a_schema_cannot_switch_keywords_off():
    with pytest.raises(GrammarError, match='"not"'):
        Grammar(json_schema={"x-guidance": {"lenient": True}, "not": {"type": "null"}})


def test_properties_that_must_be_there_may_be_counted():
    schema = {"type": "object", "properties": {"a": {}, "b": {}}, "required": ["a", "b"], "minProperties": 3}
    text, reason = random_text(constraint(byte_level(), json_schema=schema), byte_level(), 0, closing=6)
    assert reason == "stop" and len(json.loads(text)) >= 3


# ---------------------------------------------------------------- regular expressions


# Without \d and \w: in llguidance the latter has combining marks too, and its Unicode is newer than Python's.
ATOMS = st.sampled_from(
    [*'ab é/"#', "[0-9]", "[a-zé]", "[a-f]", "[^ab]", ".", r"\.", "🦙", r"\n", r"\\", "the "]
)
REGEXES = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, min_size=2, max_size=3).map("".join)
        | st.lists(inner, min_size=2, max_size=3).map(lambda found: f"({'|'.join(found)})")
        | st.tuples(inner, st.sampled_from(["?", "*", "+", "{2}", "{1,3}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        )
    ),
    max_leaves=6,
)


@given(name=ANY_TOKENIZER, pattern=REGEXES, seed=SEEDS)
def test_every_text_matches_as_a_whole(name, pattern, seed):
    tokenizer = TOKENIZERS[name]()
    text, reason = random_text(constraint(tokenizer, regex=pattern), tokenizer, seed, most=60)
    assert reason == "length" or re.fullmatch(pattern, text)


@given(name=ANY_TOKENIZER, pattern=REGEXES, seed=SEEDS)
def test_each_token_leads_to_a_match_and_the_end_stands_only_behind_one(name, pattern, seed):
    """The package regex has partial matches, the oracle. A forced token is one of several that would do."""
    tokenizer, rng, text = TOKENIZERS[name](), np.random.default_rng(seed), b""
    rule = constraint(tokenizer, regex=pattern)
    for _ in range(8):
        ids = allowed(rule, tokenizer)
        ends = set(tokenizer.eos_ids) & {*ids.tolist()}
        with_whole_characters = regex.fullmatch(pattern, text.decode(errors="ignore"))
        assert bool(ends) == bool(with_whole_characters and text.decode(errors="replace").encode() == text)
        assert not ends or ends == set(tokenizer.eos_ids)
        for i in {*ids.tolist()} - ends:
            longer = (text + tokenizer.meanings[i]).decode(errors="ignore")
            assert tokenizer.meanings[i] and regex.fullmatch(pattern, longer, partial=True)
        token = int(rng.choice(ids))
        text += tokenizer.meanings[token]
        if token in ends or rule.take(token):
            break


# ---------------------------------------------------------------- grammars


def test_a_grammar_counts_brackets():
    rule = constraint(byte_level(), grammar='start: "(" start* ")"')
    for seed in range(10):
        text, reason = random_text(rule, byte_level(), seed, most=60, closing=0)
        depth = np.cumsum([1 if c == "(" else -1 for c in text])
        assert {*text} <= {*"()"} and (depth[:-1] > 0).all() and depth[-1] >= 0
        assert (reason == "stop") == (depth[-1] == 0)


def test_a_grammar_may_name_control_tokens():
    tokenizer = byte_level()
    start, end = tokenizer.control_tokens["<|im_start|>"], tokenizer.control_tokens["<|im_end|>"]
    rule = follow(constraint(tokenizer, grammar="start: /a+/ <|im_start|> /b/ <|im_end|>"), tokenizer, "aa")
    assert start in allowed(rule, tokenizer) and end not in allowed(rule, tokenizer)
    rule.take(start)
    rule = follow(rule, tokenizer, "b")
    assert allowed(rule, tokenizer).tolist() == [end]
    with pytest.raises(GrammarError, match=re.escape("<|nobody|>")):
        Constraint(Grammar(grammar="start: <|nobody|>"), tokenizer)


@pytest.mark.parametrize("grammar", ['start: "a" <|im_end|> "b"', 'start: a "b"\na[stop=""]: /a+/'])
def test_no_end_id_before_the_end(grammar):
    """An end id would end the generation too early. The first grammar allows no other id, and is an error."""
    tokenizer = byte_level()
    rule = follow(constraint(tokenizer, grammar=grammar), tokenizer, "a")
    if "stop" not in grammar:
        with pytest.raises(GrammarError, match="no token"):
            allowed(rule, tokenizer)
    else:
        assert not {*tokenizer.eos_ids} & {*allowed(rule, tokenizer).tolist()}


# ---------------------------------------------------------------- vocabularies


@given(name=ANY_TOKENIZER, text=TEXTS.filter(bool))
def test_what_must_follow_is_spelt_as_it_is(name, text):
    """Without SentencePiece's space, and with U+2581, which its tokens write for a space."""
    vocabulary = Vocabulary(TOKENIZERS[name]())
    assert b"".join(vocabulary.tokens[i] for i in vocabulary(text)) == text.encode()


@given(text=TEXTS)
def test_what_must_follow_is_spelt_as_the_tokenizer_spells_it(text):
    tokenizer = byte_level()
    plain = "".join(part for part in tokenizer.cut(text) if isinstance(part, str))
    assert Vocabulary(tokenizer)(plain) == tokenizer.encode_part(plain, False)


def test_ids_without_a_token_are_never_chosen():
    unused = altered(sentencepiece_metadata(), "token_type", put([300, -1], UNUSED))
    tokenizer = tokenizer_from_gguf(unused, "small.gguf")
    rule = constraint(tokenizer, regex="(?s:.*)")
    logits = rule(np.zeros(512, np.float32))  # an embedding that was padded
    assert logits[299] == 0 and logits[300] == -np.inf and (logits[tokenizer.n_used :] == -np.inf).all()


def test_a_character_that_no_token_spells_ends_in_an_error():
    unused = altered(byte_level_metadata(), "token_type", put(byte_level().meanings.index(b"\xf1"), UNUSED))
    tokenizer = tokenizer_from_gguf(unused, "small.gguf")
    with pytest.raises(GrammarError, match=r"no token of the vocabulary|doesn't satisfy"):
        random_text(constraint(tokenizer, regex="[ab]\U00041234c"), tokenizer, 0)


def test_a_vocabulary_without_an_end_token_is_refused():
    tokenizer = replace(byte_level(), eos_ids=())
    with pytest.raises(UnsupportedError, match=r"small\.gguf has no end token"):
        constraint(tokenizer, regex="a")


# ---------------------------------------------------------------- what is wrong, too large or hostile


WRONG = [
    ({"regex": "(a"}, "unclosed group"),
    ({"regex": r"(a)\1"}, "backreferences are not supported"),
    ({"regex": r"[^\s\S]"}, "no token of the vocabulary can come next"),
    ({"regex": "(" * 100_000}, "..."),
    ({"grammar": "hello world"}, "line 1, column 7: Expected token ':'"),
    ({"grammar": 'start: "a" foo'}, 'line 1, column 8: unknown name: "foo"'),
    ({"grammar": ""}, "no start rule found"),
    ({"grammar": '{"grammars": []}'}, "line 1"),
    ({"grammar": "start: " + "(" * 5000}, "too deeply nested"),
    ({"json_schema": {"$ref": "#"}}, "no token of the vocabulary can come next"),
    ({"json_schema": {"a": float("nan")}}, "cannot be written as JSON"),
    ({"json_schema": {1: {2, 3}}}, "cannot be written as JSON"),
    ({"json_schema": {"$ref": ["a" + "é" * 99]}}, "panic"),
]


@pytest.mark.parametrize("rule, words", WRONG, ids=lambda value: ascii(value)[:30])
def test_what_is_wrong_is_an_error_of_one_line(rule, words):
    with pytest.raises(GrammarError, match=re.escape(words)) as caught:
        Grammar(**rule)
    assert len(str(caught.value)) < 500


def chain(n: int) -> str:
    return "".join(f"r{i}: r{i + 1}\n" for i in range(n)) + f'r{n}: "a"\nstart: r0 | <|im_end|>'


TOO_LARGE = {
    "grammar": chain(20_000),
    "json_schema": {
        "$ref": "#/$defs/0",
        "$defs": {str(i): {"properties": {"x": {"$ref": f"#/$defs/{i + 1}"}}} for i in range(5000)},
    },
}


@pytest.mark.parametrize("name", TOO_LARGE)
def test_what_overflows_the_stack_of_llguidance_leaves_this_process_alive(name):
    with pytest.raises(GrammarError, match="too large"):
        Grammar(**{name: TOO_LARGE[name]})


def test_control_tokens_do_not_hide_what_is_too_large():
    """Without the vocabulary llguidance stops at the name of a control token, and does not see the rest."""
    hidden = Grammar(grammar=f"start: <|im_end|> | r0\n{chain(20_000).partition('start')[0]}")
    with pytest.raises(GrammarError, match="too large"):
        Constraint(hidden, byte_level())


@pytest.mark.slow
def test_what_takes_hours_is_given_up():
    with pytest.raises(GrammarError, match="too large"):
        Grammar(json_schema={"type": "integer", "multipleOf": 99_999_989})


def test_a_nesting_that_python_cannot_write_is_refused():
    schema: dict = {}
    for _ in range(100_000):
        schema = {"items": schema}
    with pytest.raises(GrammarError, match="recursion"):
        Grammar(json_schema=schema)
    schema = {}
    schema["items"] = schema
    with pytest.raises(GrammarError, match="Circular"):
        Grammar(json_schema=schema)


def test_a_grammar_that_never_ends_is_an_error_not_a_hang():
    """llguidance follows what must come next, and gives up: there is no end to it."""
    rule = constraint(byte_level(), grammar='start: "a" start')
    with pytest.raises(GrammarError, match="Too many items"):
        random_text(rule, byte_level(), 0)


def test_a_failure_of_the_other_process_is_shown(tmp_path, monkeypatch):
    broken = tmp_path / "try.py"
    broken.write_text("raise SystemExit('no memory')")
    monkeypatch.setattr(structured, "TRY_GRAMMAR", broken)
    with pytest.raises(GrammarError, match="it was not compiled: no memory"):
        Grammar(regex="a test of the other process")


def test_a_process_that_the_system_kills_is_no_fault_of_the_grammar(tmp_path, monkeypatch):
    killed = tmp_path / "try.py"
    killed.write_text("import os, signal; os.kill(os.getpid(), signal.SIGKILL)")
    with monkeypatch.context() as patched:
        patched.setattr(structured, "TRY_GRAMMAR", killed)
        with pytest.raises(ResourceLimitError, match="was killed"):
            Grammar(regex="a test of a process that is killed")
    Grammar(regex="a test of a process that is killed")


@pytest.mark.parametrize(
    "rules",
    [
        {},
        {"regex": "a", "grammar": 'start: "a"'},
        {"regex": 3},
        {"grammar": b"start"},
        {"json_schema": "{}"},
        {"json_schema": []},
        {"regex": "\ud800"},
    ],
    ids=str,
)
def test_arguments_are_checked(rules):
    with pytest.raises(nl.NumpyLlamaError):
        Grammar(**rules)


def test_without_the_extra_the_way_out_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UnsupportedError, match=re.escape('pip install "numpy_llama[structured]"')):
        Grammar(json_schema={"type": "null"})


# ---------------------------------------------------------------- generations


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """Random weights: only the constraint makes its texts right."""
    llama = nl.load(write_speaker(tmp_path_factory.mktemp("structured") / "m.gguf"))
    llama.chat_format = nl.ChatTemplate("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return llama


PERSON = {
    "type": "object",
    "properties": {
        "n": {"type": "string", "pattern": "^[a-z]{1,6}$"},
        "a": {"type": "integer", "maximum": 99},
    },
    "required": ["n", "a"],
    "additionalProperties": False,
}


SAMPLING = [
    {"repetition_penalty": 1.5},
    {"temperature": 5},
    {"temperature": 1, "top_k": 3, "dry_multiplier": 2},
    {"temperature": 1, "top_p": 0.5, "min_p": 0.1, "presence_penalty": 3},
    {"temperature": 2, "typical_p": 0.7, "xtc_probability": 1, "xtc_threshold": 0},
    {"temperature": 2, "mirostat_tau": 1, "top_n_sigma": 1},
]


@pytest.mark.parametrize("options", SAMPLING, ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_a_generation_is_valid_json_and_then_ends(llama, options, seed):
    """After every step of sampling: each keeps at least one of the ids that the schema allows."""
    done = llama.generate("x", json_schema=PERSON, seed=seed, **options)
    Draft202012Validator(PERSON).validate(json.loads(done.text))
    assert done.finish_reason == "stop"


def test_nothing_is_computed_behind_the_end(llama):
    """The last id completes the text, so no pass follows, and it is no matter that max_tokens is reached."""
    session = llama.new_session()
    done = llama.generate("x", regex="abc", max_tokens=3, session=session)
    assert (done.text, done.finish_reason, len(done.tokens)) == ("abc", "stop", 3)
    assert session.ids == [*done.prompt_tokens, *done.tokens[:-1]]


def test_log_probabilities_are_those_of_the_model(llama):
    """Without the constraint, which would make a forced token certain."""
    done = llama.generate("x", regex="abc", top_logprobs=1)
    assert done.text == "abc" and all(-20 < entry.chosen < -1 for entry in done.logprobs)


def test_a_text_that_is_cut_is_no_json(llama):
    done = llama.generate("x", json_schema=PERSON, max_tokens=5)
    assert (done.text, done.finish_reason) == ('{"n":', "length")


def test_where_a_text_may_end_the_model_decides(llama):
    texts = {
        llama.generate("x", regex="a{1,40}", max_tokens=40, temperature=3, seed=seed).text
        for seed in range(8)
    }
    assert len(texts) > 2 and all(re.fullmatch("a{1,40}", text) for text in texts)


def test_a_batch_has_the_texts_of_single_generations(llama):
    options = {"json_schema": PERSON, "temperature": 2.0, "seed": 5}
    prompts = ["x", "hello", "abc"]
    alone = [llama.generate(prompt, **options) for prompt in prompts]
    batch = llama.generate_batch(prompts, **options)
    assert [done.text for done in batch] == [done.text for done in alone]
    assert all(done.finish_reason == "stop" and json.loads(done.text) for done in batch)


@pytest.mark.parametrize("temperature", [0, 2])
def test_drafts_change_nothing(llama, temperature):
    """Each draft is right, or wrong in its second id: the constraint takes only what was chosen."""
    options = {"json_schema": PERSON, "temperature": temperature, "seed": 3}
    plain = llama.generate("x", **options)

    class Known(Drafter):
        def propose(self, ids, k):
            begin = len(ids) - len(plain.prompt_tokens)
            draft = plain.tokens[begin : begin + k]
            return draft[:1] + [5] * (len(draft) - 1) if begin % 3 == 2 else draft

    drafted = llama.generate("x", draft=Known(), **options)
    assert (drafted.text, drafted.tokens, drafted.finish_reason) == (plain.text, plain.tokens, "stop")
    assert drafted.drafts.accepted > 0


def test_a_stop_text_still_ends_it(llama):
    done = llama.generate("x", json_schema=PERSON, stop=['"a"'])
    assert done.finish_reason == "stop" and done.text.endswith('",')


def test_an_error_comes_before_the_prompt_is_computed(llama):
    with pytest.raises(GrammarError):
        llama.stream("x", regex="(a")
    with pytest.raises(ParameterError, match="regex and grammar"):
        llama.generate_batch(["x"], regex="a", grammar="start: /a/")


@pytest.mark.parametrize("pattern", ["[a-c ]{3}", " x", "x y", "\u2581?a"])
@pytest.mark.parametrize("name", ["sentencepiece", "sentencepiece, spaces"])
def test_a_first_space_of_sentencepiece_is_part_of_the_text(name, pattern):
    """`chat` drops the space before an answer, which the tokenizer adds. Then the text would not match."""
    tokenizer = TOKENIZERS[name]()
    args = replace(SPEAKER, vocab_size=tokenizer.vocab_size)
    llama = nl.Llama(nl.Transformer(args, float_weights(args)), tokenizer, nl.ChatTemplate("{{ messages }}"))
    for seed in range(4):
        options = {"regex": pattern, "temperature": 2.0, "seed": seed, "max_tokens": 20}
        text = llama.chat([{"role": "user", "content": "x"}], **options).text
        assert re.fullmatch(pattern, text), text
        assert re.fullmatch(pattern, llama.generate("x", **options).text)


def test_requests_do_not_share_a_state(llama):
    rule = constraint(llama.tokenizer, regex="ab")
    for _ in range(2):
        request = nl.generation.generate.Request(
            [1], Session(llama.model), Sampler(), stop_ids=llama.tokenizer.eos_ids, constraint=rule
        )
        ids = [request.choose(np.zeros(SPEAKER.vocab_size, np.float32)) for _ in range(3)]
        assert ids == [97, 98, None] and request.reason == "stop"


def test_the_default_model_extracts_facts(smollm2_path):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string"}, "age": {"type": "integer"}, "city": {"type": "string"}},
        "required": ["name", "age", "city"],
    }
    question = [{"role": "user", "content": "As JSON: Anna is 34 and lives in Oslo."}]
    done = nl.load(smollm2_path).chat(question, json_schema=schema | {"additionalProperties": False})
    assert done.text == '{"name":"Anna","age":34,"city":"Oslo"}'


def test_a_grammar_is_tried_once():
    before = fault_of.cache_info().misses
    for _ in range(2):
        Grammar(regex="tried (once|twice)")
    assert fault_of.cache_info().misses == before + 1
