"""From records to ids: which targets are trained, one BOS and one EOS, cutting and packing."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.tokenizers import TEXTS, byte_level, sentence_piece
from helpers.training import some
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.errors import NumpyLlamaError, ParameterError, TemplateError, UnsupportedError
from numpy_llama.text.chat import ChatTemplate, Llama2Chat
from numpy_llama.training.data import KINDS, Record
from numpy_llama.training.examples import Encoder, Example, packed, rows_of

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# As in models that think: only the last answer keeps its thoughts.
FORGETFUL = CHATML.replace(
    "message['content'] +", "(message['content'] if loop.last or loop.index0 % 2 == 0 else '') +"
)
ENDLESS = CHATML.replace("<|im_end|>", "")
WITH_BOS = "{{ bos_token }}" + CHATML
CHAT = Encoder(byte_level(), ChatTemplate(CHATML))
# What a search for the template's own text would find in the wrong place.
TRAPS = st.sampled_from(["<|im_start|>assistant\n", "assistant\n", "<|im_end|>", "\n", ""])
CONTENTS = st.tuples(TRAPS, TEXTS, TRAPS).map("".join)


def record(where="d.jsonl, line 1", **values) -> Record:
    kind = next(kind for kind, keys in KINDS.items() if {*keys} == values.keys())
    return Record(kind, values, where)


def trained_ids(example: Example) -> list[int]:
    return example.ids[1:][example.trained].tolist()


def turns(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": content} for i, content in enumerate(contents)]


@some
@given(st.lists(CONTENTS, min_size=2, max_size=6), st.booleans())
def test_the_turns_of_the_assistant_are_trained_with_their_stop_tokens(contents, with_system):
    messages = [{"role": "system", "content": "<|im_start|>assistant\n"}] * with_system + turns(*contents)
    (example,) = CHAT.answers(record(messages=messages))
    tokenizer, end = byte_level(), byte_level().control_tokens["<|im_end|>"]
    said = [one["content"] for one in messages if one["role"] == "assistant"]
    # The text after the last answer would not be trained, and is not read.
    assert trained_ids(example) == [i for text in said for i in [*tokenizer.encode(text), end]]
    whole = CHAT.chat_format.encode(tokenizer, messages, False)
    assert example.ids.tolist() == whole[: len(example.ids)]


@some
@given(st.lists(CONTENTS, min_size=2, max_size=6))
def test_the_ids_before_an_answer_are_those_that_chat_begins_with(contents):
    (example,) = CHAT.answers(record(messages=turns(*contents)))
    begins = np.flatnonzero(np.diff(example.trained.astype(int), prepend=0) == 1) + 1
    for i, begin in enumerate(begins.tolist()):
        before = turns(*contents)[: 2 * i + 1]
        assert example.ids[:begin].tolist() == CHAT.chat_format.encode(byte_level(), before)


@pytest.mark.parametrize(
    "template, found",
    [
        (FORGETFUL, "writes the first 2 messages in another way when more follow: token"),
        (ENDLESS, "without a token that stops generation"),
        (CHATML.replace("assistant\n' }}", "assistant\n<think>\n' }}"), "writes the first 1 messages"),
    ],
)
def test_a_template_that_cannot_be_masked_is_refused_by_name(template, found):
    encoder = Encoder(byte_level(), ChatTemplate(template))
    with pytest.raises(TemplateError, match=f"d.jsonl, line 1: the chat template .*{found}"):
        encoder.answers(record(messages=turns("a", "b", "c", "d")))


def test_a_template_that_forgets_earlier_answers_trains_one_answer():
    encoder = Encoder(byte_level(), ChatTemplate(FORGETFUL))
    assert trained_ids(encoder.answers(record(prompt="a", completion="b"))[0])


@pytest.mark.parametrize(
    "messages, found",
    [
        ([], "it must be a list with a message"),
        (turns("a"), "have no turn of the assistant"),
        (turns("a", "b")[1:], "begin with a turn of the assistant"),
        ([{"role": "user", "content": None}], r"messages\[0\]"),
        ([{"role": "bot", "content": "a"}], r"messages\[0\]"),
        (turns("a", "\ud800"), "half a surrogate pair"),
    ],
)
def test_an_impossible_conversation_is_refused_with_its_line(messages, found):
    with pytest.raises(NumpyLlamaError, match=f"d.jsonl, line 1: .*{found}"):
        CHAT.answers(record(messages=messages))


def test_messages_need_a_chat_format():
    with pytest.raises(UnsupportedError, match="no chat format"):
        Encoder(byte_level()).answers(record(messages=turns("a", "b")))


def test_texts_of_a_chat_model_are_turns():
    by_texts = CHAT.answers(record(prompt="Hi", completion="Ho"))[0]
    by_messages = CHAT.answers(record(prompt=turns("Hi"), completion=turns("Hi", "Ho")[1:]))[0]
    assert by_texts.ids.tolist() == by_messages.ids.tolist()
    assert by_texts.trained.tolist() == by_messages.trained.tolist()


def test_an_answer_trains_no_earlier_turn():
    (example,) = CHAT.answers(record(prompt=turns("a", "b", "c"), completion="d"))
    end = byte_level().control_tokens["<|im_end|>"]
    assert trained_ids(example) == [*byte_level().encode("d"), end]


@some
@given(TEXTS, TEXTS, st.booleans())
def test_a_completion_is_trained_with_eos_and_its_prompt_is_not(prompt, completion, add_bos):
    tokenizer = replace(byte_level(), add_bos=add_bos)
    before = tokenizer.encode(prompt, bos=add_bos)
    if not before:
        with pytest.raises(ParameterError, match="the prompt is empty"):
            Encoder(tokenizer).answers(record(prompt=prompt, completion=completion))
        return
    (example,) = Encoder(tokenizer).answers(record(prompt=prompt, completion=completion))
    answer = [*tokenizer.encode(completion), tokenizer.eos_ids[0]]
    assert example.ids.tolist() == before + answer and trained_ids(example) == answer


@some
@given(TEXTS, TEXTS)
def test_sentencepiece_reads_prompt_and_completion_as_one_text(prompt, completion):
    tokenizer = sentence_piece()
    (example,) = Encoder(tokenizer).answers(record(prompt=prompt, completion=completion))
    assert example.ids.tolist() == tokenizer.encode(prompt + completion, bos=True, eos=True)
    before, begin = tokenizer.encode(prompt, bos=True), len(example) - sum(example.trained)
    assert example.trained[begin:].all() and example.ids[: begin + 1].tolist() == before[: begin + 1]
    assert begin + 1 == len(before) or example.ids[begin + 1] != before[begin + 1]


@some
@given(TEXTS)
@pytest.mark.parametrize("tokenizer", [byte_level(), sentence_piece()], ids=["byte level", "sentencepiece"])
@pytest.mark.parametrize("spelled", ["", "<s>", "</s>", "<|endoftext|>"])
def test_a_text_has_one_bos_and_one_eos(tokenizer, spelled, text):
    ids = Encoder(tokenizer).text(record(text=spelled + text)).ids.tolist()
    assert ids.count(tokenizer.bos_id) == int(tokenizer.add_bos)
    assert ids.count(tokenizer.eos_ids[0]) == 1 and ids[-1] == tokenizer.eos_ids[0]


@pytest.mark.parametrize("template", [CHATML, WITH_BOS])
def test_a_conversation_has_one_bos(template):
    tokenizer = replace(byte_level(), add_bos=True)
    (example,) = Encoder(tokenizer, ChatTemplate(template)).answers(
        record(messages=turns("a", "b", "c", "d"))
    )
    assert example.ids.tolist().count(tokenizer.bos_id) == 1


def test_llama_2_ends_each_answer_with_eos():
    (example,) = Encoder(sentence_piece(), Llama2Chat()).answers(record(messages=turns("a", "b", "c", "d")))
    assert trained_ids(example).count(sentence_piece().eos_ids[0]) == 2
    assert example.ids.tolist().count(sentence_piece().bos_id) == 2  # Meta begins each exchange with it


def test_examples_are_cut_and_those_without_a_target_left_out():
    records = [
        record(prompt="fox " * 3, completion="dog"),
        record(prompt="fox " * 3, completion="dog " * 40),
        record(prompt="fox " * 40, completion="dog"),
    ]
    rows = rows_of(records, Encoder(byte_level()), seq_len=12)
    assert len(rows.rows) == 2 and (rows.cut, rows.without_target) == (1, 1)
    assert [len(example) for (example,) in rows.rows] == [len(rows.rows[0][0]), 12]
    assert all(example.trained.any() for (example,) in rows.rows)


def test_a_pair_is_left_out_as_a_whole():
    records = [
        record(prompt="fox", chosen="dog", rejected="cat"),
        record(prompt="fox " * 9, chosen="", rejected=""),
    ]
    rows = rows_of(records, Encoder(byte_level()), seq_len=8)
    assert len(rows.rows) == 1 and rows.without_target == 1
    assert [trained_ids(example)[-1] for example in rows.rows[0]] == [byte_level().eos_ids[0]] * 2


@some
@given(st.lists(st.integers(0, 30), max_size=8), st.integers(1, 12))
def test_packing_trains_each_target_once_from_the_text_before_it(lengths, seq_len):
    texts, ids = [], iter(range(10_000))
    for n in lengths:
        texts.append(Example(np.array([next(ids) for _ in range(n + 1)]), np.ones(n, bool), "here"))
    rows = packed(iter(texts), seq_len)
    pairs = [
        (int(a), int(b)) for row in rows for one in row for a, b in zip(one.ids, one.ids[1:], strict=False)
    ]
    expected = [(int(a), int(b)) for one in texts for a, b in zip(one.ids, one.ids[1:], strict=False)]
    assert pairs == expected
    assert all(example.trained.all() and len(example) for row in rows for example in row)
    assert [sum(map(len, row)) for row in rows[:-1]] == [seq_len] * (len(rows) - 1)
