import functools
import io
import json
import tracemalloc
from copy import copy
from datetime import datetime
from functools import cache
from types import SimpleNamespace
from unittest import mock

import jinja2
import pytest
from helpers.tokenizers import (
    CHARACTERS,
    CONTROL_NAMES,
    FRAGMENTS,
    TEXTS,
    byte_level_metadata,
    hugging_face,
    sentencepiece_metadata,
    trained_sentencepiece,
)
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

import numpy_llama as nl
from numpy_llama.checkpoint.gguf.file import GGUFFile
from numpy_llama.cli import chat as chat_command
from numpy_llama.cli.conversation import Conversation
from numpy_llama.errors import MismatchError, ParameterError, TemplateError, TextError
from numpy_llama.text.chat import CHAT_FORMATS, ChatTemplate, Llama2Chat, Llama3Chat, format_for
from numpy_llama.text.tokenizer import tokenizer_from_gguf

DEADLINE = mock.patch("numpy_llama.text.sandbox.MAX_SECONDS", 0.3)


CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# After Llama 3: BOS, a header for each role, contents trimmed.
LLAMA3 = """
{%- for message in messages %}
    {%- if loop.first %}{{ bos_token }}{% endif %}
    {{- '<|start|>' + message.role + '<|eot_id|>\n\n' + message['content'] | trim + '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start|>assistant<|eot_id|>\n\n' }}{% endif %}"""
# After Llama 2: each exchange between BOS and EOS, the system message inside the first question.
LLAMA2 = """
{%- if messages[0]['role'] == 'system' %}
    {%- set system = '<<SYS>>\n' + messages[0]['content'].strip() + '\n<</SYS>>\n\n' %}
    {%- set rest = messages[1:] %}
{%- else %}
    {%- set system = '' %}{% set rest = messages %}
{%- endif %}
{%- for message in rest %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('roles must alternate user/assistant') }}
    {%- endif %}
    {%- set content = system + message['content'] if loop.first else message['content'] %}
    {%- if message['role'] == 'user' %}
        {{- bos_token + '[INST] ' + content | trim + ' [/INST]' }}
    {%- else %}
        {{- ' ' + content | trim + ' ' + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Ordinary text has no control token in it, nor a piece that the template's own text would complete.
ORDINARY = TEXTS.filter(lambda text: not any(name in text for name in [*CONTROL_NAMES, "<s>", "<unk>"]))
HOSTILE = st.lists(
    st.sampled_from([*CONTROL_NAMES, "<s>", "<unk>"]).flatmap(
        lambda name: st.tuples(st.integers(0, len(name)), st.integers(0, len(name))).map(
            lambda cut: name[min(cut) : max(cut)] or name
        )
    )
    | FRAGMENTS
    | st.text(CHARACTERS, max_size=2)
    | st.sampled_from(["\U000f0000", "\U000f0001", "\ufdd0", "system\n", "\n", " "]),
    max_size=12,
).map("".join)


def conversation(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(contents)]


def byte_level(**entries):
    metadata = byte_level_metadata() | {f"tokenizer.ggml.{key}": value for key, value in entries.items()}
    return tokenizer_from_gguf(metadata, "small.gguf")


def renamed(**names):
    """The small byte-level vocabulary, some of its control tokens under other names."""
    tokens = byte_level_metadata()["tokenizer.ggml.tokens"]
    return byte_level(tokens=[names.get(token.strip("<|>"), token) for token in tokens])


BYTE_LEVEL, SENTENCE_PIECE = byte_level(), tokenizer_from_gguf(sentencepiece_metadata(), "small.gguf")
CASES = pytest.mark.parametrize(
    ("tokenizer", "source"),
    [(BYTE_LEVEL, CHATML), (BYTE_LEVEL, LLAMA3), (SENTENCE_PIECE, LLAMA2)],
    ids=["chatml", "llama3", "llama2"],
)


template = cache(ChatTemplate)  # compiled once for all examples


# Llama 3's tokens, by the ids of those that the small vocabulary has.
HEADERS = {"im_start": "<|start_header_id|>", "im_end": "<|end_header_id|>"}
LLAMA3_VOCABULARY = renamed(**HEADERS)


def as_hugging_face_renders(
    source: str, messages, bos: str, eos: str, add_generation_prompt: bool = True, **more
) -> str:
    """What apply_chat_template of transformers renders."""
    values = {"bos_token": bos, "eos_token": eos, "add_generation_prompt": add_generation_prompt} | more
    (text,), _ = render_jinja_template(conversations=[messages], chat_template=source, **values)
    return text


def control_ids(tokenizer, ids):
    return [i for i in ids if i in set(tokenizer.control_tokens.values())]


@given(contents=st.lists(ORDINARY, min_size=1, max_size=4), prompt=st.booleans())
def test_smollm2_equals_hugging_face(smollm2, contents, prompt):
    tokenizer, reference, source = smollm2
    messages = conversation(*contents)
    text = as_hugging_face_renders(source, messages, "<|im_start|>", "<|im_end|>", prompt)
    assert template(source).encode(tokenizer, messages, prompt) == reference.encode(text).ids


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    metadata = GGUFFile(smollm2_path).metadata
    source = metadata["tokenizer.chat_template"]
    return tokenizer_from_gguf(metadata, str(smollm2_path)), hugging_face(metadata), source


@pytest.mark.parametrize("source", [CHATML, LLAMA3])
@given(contents=st.lists(ORDINARY, min_size=1, max_size=4))
def test_byte_level_equals_hugging_face(source, contents):
    messages = conversation(*contents)
    text = as_hugging_face_renders(source, messages, "<|begin_of_text|>", "<|im_end|>")
    expected = hugging_face(byte_level_metadata()).encode(text).ids
    assert template(source).encode(BYTE_LEVEL, messages) == expected


def test_llama2_by_hand():
    """Text between control tokens is encoded as a text of its own, so with a space before it."""
    messages = [{"role": "system", "content": " be kind\n"}, *conversation("hi ", "the fox", "  and?")]
    texts = [" <<SYS>>\nbe kind\n<</SYS>>\n\nhi [/INST] the fox ", " and? [/INST]"]
    name = SENTENCE_PIECE.control_tokens
    encode = trained_sentencepiece().encode
    assert ChatTemplate(LLAMA2).encode(SENTENCE_PIECE, messages) == [
        *(name["<s>"], name["[INST]"], *encode(texts[0]), name["</s>"]),
        *(name["<s>"], name["[INST]"], *encode(texts[1])),
    ]


# Text that has a turn's mark is not for Llama 2.
UNMARKED = ORDINARY.filter(lambda text: not any(tag in text for tag in Llama2Chat.TAGS))


@given(st.lists(UNMARKED, min_size=1, max_size=5), st.none() | UNMARKED)
def test_llama2_as_meta_writes_it(contents, system):
    """Meta's generation.py: pairs of question and answer, each a text of its own between BOS and EOS."""
    messages = conversation(*contents)
    questions, answers = [text.strip() for text in contents[::2]], [text.strip() for text in contents[1::2]]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
        questions[0] = f"<<SYS>>\n{system}\n<</SYS>>\n\n{contents[0]}".strip()
    names, encode, expected = SENTENCE_PIECE.control_tokens, trained_sentencepiece().encode, []
    for question, answer in zip(questions, answers, strict=False):
        text = f"[INST] {question} [/INST] {answer} "
        expected += [names["<s>"], *encode(text), names["</s>"]]
    if len(questions) > len(answers):
        expected += [names["<s>"], *encode(f"[INST] {questions[-1]} [/INST]")]
    assert Llama2Chat().encode(SENTENCE_PIECE, messages, add_generation_prompt=False) == expected
    if len(questions) > len(answers):
        assert Llama2Chat().encode(SENTENCE_PIECE, messages) == expected
    else:
        with pytest.raises(ParameterError, match="the last from user"):
            Llama2Chat().encode(SENTENCE_PIECE, messages)


@pytest.mark.parametrize("at", [0, 1, 2, 3])
@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_llama2_refuses_its_own_tags_as_meta_does(tag, at):
    messages = [{"role": "system", "content": "x"}, *conversation("x", "x", "x")]
    messages[at]["content"] = f"a{tag}b"
    with pytest.raises(TextError, match=rf"messages\[{at}\] has the tag {tag.replace('[', chr(92) + '[')}"):
        Llama2Chat().encode(SENTENCE_PIECE, messages)
    messages[at]["content"] = f"a{tag[:-1]}b{tag[1:]}"
    assert len(control_ids(SENTENCE_PIECE, Llama2Chat().encode(SENTENCE_PIECE, messages))) == 3


@pytest.mark.parametrize(
    "roles",
    [
        "system",
        "assistant",
        "tool",
        "user user",
        "user assistant",
        "system system user",
        "system assistant user",
        "user system",
        "user assistant assistant",
        "user assistant tool",
    ],
)
def test_llama2_wants_turns(roles):
    messages = [{"role": role, "content": "x"} for role in roles.split()]
    with pytest.raises(ParameterError, match=f"the roles are {', '.join(roles.split())}; Llama 2 wants"):
        Llama2Chat().encode(SENTENCE_PIECE, messages)


@given(
    st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), ORDINARY), min_size=1, max_size=4)
)
def test_llama3_as_meta_writes_it(turns):
    """The text as a whole; the reference reads its control tokens."""
    header = "<|start_header_id|>{}<|end_header_id|>\n\n".format
    text = "".join(header(role) + content.strip() + "<|eot_id|>" for role, content in turns)
    metadata = byte_level_metadata() | {"tokenizer.ggml.tokens": LLAMA3_VOCABULARY.tokens}
    expected = hugging_face(metadata).encode("<|begin_of_text|>" + text).ids
    messages = [{"role": role, "content": content} for role, content in turns]
    assert Llama3Chat().encode(LLAMA3_VOCABULARY, messages, add_generation_prompt=False) == expected
    answer = hugging_face(metadata).encode(header("assistant")).ids
    assert Llama3Chat().encode(LLAMA3_VOCABULARY, messages) == expected + answer


@given(contents=st.lists(HOSTILE | st.sampled_from([*HEADERS.values()]), min_size=1, max_size=4))
def test_no_message_makes_a_control_token_of_llama3(contents):
    ids = Llama3Chat().encode(LLAMA3_VOCABULARY, conversation(*contents))
    name = LLAMA3_VOCABULARY.control_tokens
    header = [name["<|start_header_id|>"], name["<|end_header_id|>"]]
    turn = [*header, name["<|eot_id|>"]]
    assert control_ids(LLAMA3_VOCABULARY, ids) == [name["<|begin_of_text|>"], *turn * len(contents), *header]


@given(contents=st.lists(HOSTILE, min_size=1, max_size=4))
def test_no_message_makes_a_control_token_of_llama2(contents):
    try:
        ids = Llama2Chat().encode(SENTENCE_PIECE, conversation(*contents), add_generation_prompt=False)
    except TextError:
        assert any(tag in text for tag in Llama2Chat.TAGS for text in contents)
        return
    name = SENTENCE_PIECE.control_tokens
    turns = [name["<s>"], name["</s>"]] * len(contents)
    assert control_ids(SENTENCE_PIECE, ids) == turns[: len(contents)]


def test_what_a_tool_says_is_llama3s_ipython():
    ids = Llama3Chat().encode(LLAMA3_VOCABULARY, [{"role": "tool", "content": "42"}], False)
    assert LLAMA3_VOCABULARY.decode(ids) == "ipython\n\n42"


def test_a_format_needs_its_control_tokens():
    with pytest.raises(MismatchError, match=r"needs the control token <\|start_header_id\|>, which"):
        Llama3Chat().encode(BYTE_LEVEL, conversation("hi"))
    with pytest.raises(MismatchError, match="needs the control token <s>, which"):
        Llama2Chat().encode(BYTE_LEVEL, conversation("hi"))


def test_the_format_of_a_vocabulary():
    assert format_for(LLAMA3_VOCABULARY) is CHAT_FORMATS["llama3"]
    assert format_for(BYTE_LEVEL) is None
    # Byte-level, whatever it calls its tokens.
    assert format_for(renamed(**{"im_start": "<s>", "[INST]": "<x>"})) is None

    def sentence_piece(*others: str):
        metadata = sentencepiece_metadata()
        tokens = metadata["tokenizer.ggml.tokens"].copy()
        for old, new in zip(["[INST]", "<|im_end|>"], others, strict=True):
            tokens[tokens.index(old)] = new
        return tokenizer_from_gguf(metadata | {"tokenizer.ggml.tokens": tokens}, "small.gguf")

    assert format_for(sentence_piece("<pad>", "<x>")) is CHAT_FORMATS["llama2"]
    assert format_for(sentence_piece("[INST]", "<x>")) is None
    assert format_for(sentence_piece("<x>", "<|im_start|>")) is None


@pytest.mark.parametrize("format", CHAT_FORMATS.values(), ids=CHAT_FORMATS)
@pytest.mark.parametrize("messages", [[], "hi", [{"role": "wizard", "content": "hi"}]])
def test_formats_want_messages_too(format, messages):
    with pytest.raises(ParameterError, match=r"^messages"):
        format.encode(SENTENCE_PIECE, messages)


def test_what_cannot_be_said_does_not_end_a_conversation(monkeypatch, capsys):
    heard = []

    class Speaker:
        chat_format, sampling_defaults = Llama2Chat(), {}

        def new_session(self):
            return SimpleNamespace(cache=SimpleNamespace(max_seq_len=1000))

        def encode_chat(self, messages):
            heard.append([message["content"] for message in messages])
            return self.chat_format.encode(SENTENCE_PIECE, messages)

        def stream_chat(self, messages, **options):
            yield nl.Piece("yes", 1)
            yield nl.Piece("", None, nl.Completion("yes", [1], [1], "stop", 1.0, 1.0))

    typed = io.BytesIO(b"say [INST]\nhello\n")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(typed))
    Conversation(Speaker(), None, {}).run()
    assert heard == [["say [INST]"], ["hello"]]
    output = capsys.readouterr()
    assert "has the tag [INST]" in output.err and output.out.startswith("yes\n")


@CASES
@given(data=st.data(), n=st.integers(1, 4))
def test_no_message_makes_a_control_token(tokenizer, source, data, n):
    contents = data.draw(st.lists(HOSTILE, min_size=n, max_size=n))
    ids = template(source).encode(tokenizer, conversation(*contents))
    harmless = template(source).encode(tokenizer, conversation(*["x"] * n))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, harmless)


@given(contents=st.lists(HOSTILE, min_size=1, max_size=4))
def test_messages_arrive_unchanged(contents):
    ids = template(CHATML).encode(BYTE_LEVEL, conversation(*contents))
    parts, names = [[]], BYTE_LEVEL.control_tokens
    for i in ids:
        if i in names.values():
            parts.append([])
        else:
            parts[-1].append(i)
    texts = [BYTE_LEVEL.decode(part) for part in parts]
    # parts: nothing, system, "\n", first message, "\n", second message, ...
    assert texts[3:-1:2] == [f"{m['role']}\n{m['content']}" for m in conversation(*contents)]


def test_trimming_and_searching_work_on_real_text():
    source = (
        "{{ message }}{% set c = messages[0].content %}{{ c | trim }}|{{ 'fox' in c }}|{{ c.split('::')[1] }}"
    )
    ids = ChatTemplate(source).encode(BYTE_LEVEL, conversation("  <|im_end|> fox::</s>dog\n "))
    assert BYTE_LEVEL.decode(ids) == "<|im_end|> fox::</s>dog|True|</s>dog\n "
    assert not control_ids(BYTE_LEVEL, ids)


@pytest.mark.parametrize(
    ("source", "content"),
    [
        ("{{ '<|' + messages[0].content + '|>' }}", "im_end"),
        ("{{ messages[0].content + '>' }}", "</s"),
        ("{{ '<' + messages[0].content }}", "/s>"),
        ("{{ messages[0].content | lower }}", "<|IM_END|>"),
        ("{{ messages[0].content | replace('~', '') }}", "<|im~_end|>"),
        ("{{ messages[0].content[::-1] }}", ">|dne_mi|<"),
        ("{{ messages[0].content + messages[1].content }}", "<|im_"),
    ],
)
def test_a_template_that_puts_names_together_is_refused(source, content):
    messages = conversation(content, "end|>")
    with pytest.raises(TemplateError, match="makes control tokens out of the text of a message"):
        ChatTemplate(source).encode(BYTE_LEVEL, messages)


def test_bos_comes_once():
    text = "<|start|>user"
    plain, with_bos = ChatTemplate(text), ChatTemplate("{{ bos_token }}" + text)
    adds, bare = byte_level(add_bos_token=True), byte_level(add_bos_token=False)
    messages = conversation("hi")
    expected = plain.encode(bare, messages)
    assert expected[0] == bare.control_tokens["<|start|>"]
    for tokenizer, template in ((adds, plain), (adds, with_bos), (bare, with_bos)):
        assert template.encode(tokenizer, messages) == [tokenizer.bos_id, *expected]


WITH_BOS = {
    "llama3": LLAMA3,
    "before each question": LLAMA2,
    "behind a line feed": "{{ '\\n' }}" + LLAMA3,
    "behind another control token": "{{ '<|start|>' + bos_token }}" + CHATML,
    "in the middle": "{% for m in messages %}{{ '<|start|>' + m.content }}"
    "{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}{% endfor %}",
    "at the end": CHATML + "{{ bos_token }}",
    "by its name": "<|begin_of_text|>" + CHATML,
    "twice": "{{ bos_token }}" + LLAMA3,
}


@pytest.mark.parametrize("add_bos", [True, False])
@pytest.mark.parametrize("source", WITH_BOS.values(), ids=WITH_BOS)
@given(contents=st.lists(ORDINARY, min_size=1, max_size=3))
def test_bos_stands_where_the_template_writes_it_as_in_transformers(source, add_bos, contents):
    messages = conversation(*contents)
    reference = apply_chat_template(source, messages)
    assert template(source).encode(byte_level(add_bos_token=add_bos), messages) == reference
    assert BYTE_LEVEL.bos_id in reference


@given(contents=st.lists(ORDINARY, min_size=1, max_size=3))
def test_bos_comes_before_a_template_that_writes_none_if_the_tokenizer_says_so(contents):
    messages = conversation(*contents)
    reference = apply_chat_template(CHATML, messages)
    assert template(CHATML).encode(byte_level(add_bos_token=False), messages) == reference
    assert template(CHATML).encode(byte_level(add_bos_token=True), messages) == [
        BYTE_LEVEL.bos_id,
        *reference,
    ]


MAPPED = [
    "{{ '<%(role)s> %(content)s %%' % messages[0] }}",
    "{{ '%(a%b)5.1f|%(a%b)-6d|%% (x)' % {'a%b': 2} }}",
    "{{ '%s %%' % {'a': 1} }}{{ 'none' % {} }}{{ '%(a)r' % {'a': 'b'} }}",
    "{{ '%(a)s %(b)03d' | format(a=messages[0].content, b=7) }}",
]


@pytest.mark.parametrize("source", MAPPED)
@given(content=ORDINARY)
def test_a_text_with_percent_takes_a_mapping_as_in_transformers(source, content):
    messages = conversation(content)
    assert template(source).encode(byte_level(add_bos_token=False), messages) == apply_chat_template(
        source, messages
    )


@pytest.mark.parametrize("tools", [None, [], [{"name": "add"}]])
def test_the_template_for_tools_as_in_transformers(tools):
    sources = {"default": CHATML, "tool_use": "{{ tools | tojson }}" + CHATML}
    tokenizer, messages = copy(of_transformers()), conversation("hi")
    tokenizer.chat_template = sources
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False, "tools": tools}
    wanted = tokenizer.apply_chat_template(messages, **options)
    both = ChatTemplate(sources["default"], sources["tool_use"])
    assert both.encode(byte_level(add_bos_token=False), messages, tools=tools) == wanted
    assert (wanted == apply_chat_template(CHATML, messages)) == (tools is None)


@cache
def of_transformers() -> PreTrainedTokenizerFast:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(tokenizer_object=hugging_face(byte_level_metadata()), **names)


def apply_chat_template(source: str, messages: list[dict]) -> list[int]:
    """transformers' own."""
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": False}
    return of_transformers().apply_chat_template(messages, chat_template=source, **options)


def test_longest_control_token_first():
    names = byte_level_metadata()["tokenizer.ggml.tokens"].copy()
    names[names.index("<|start|>")], names[names.index("[INST]")] = "<|im_", "<|im_end|>x"
    tokenizer = byte_level(tokens=names)
    ids = ChatTemplate("<|im_end|>x<|im_end|>y<|im_x").encode(tokenizer, conversation("hi"))
    assert [tokenizer.piece(i) for i in ids] == ["<|im_end|>x", "<|im_end|>", "y", "<|im_", "x"]


@pytest.mark.parametrize(
    "messages",
    [
        [],
        None,
        "hi",
        {"role": "user", "content": "hi"},
        ["hi"],
        [{"role": "user"}],
        [{"content": "hi"}],
        [{"role": "user", "content": None}],
        [{"role": "user", "content": b"hi"}],
        [{"role": "user", "content": "hi", "name": {1, 2}}],
        [{"role": "user", "content": 7, "name": "me"}],
        [{"role": "<|im_end|>", "content": "hi"}],
        [{"role": ["user"], "content": "hi"}],
    ],
)
def test_messages_must_be_messages(messages):
    with pytest.raises(ParameterError, match=r"^messages"):
        ChatTemplate(CHATML).encode(BYTE_LEVEL, messages)


def test_message_with_half_a_surrogate_pair():
    with pytest.raises(TextError, match=r"character 1 of the text is U\+D800"):
        ChatTemplate(CHATML).encode(BYTE_LEVEL, conversation("a\ud800"))


def test_messages_of_all_private_characters():
    text = "".join(map(chr, range(0xF0000, 0x110000)))
    with pytest.raises(TextError, match="private-use"):
        ChatTemplate(CHATML).encode(BYTE_LEVEL, conversation(text))


def test_what_hugging_face_gives_to_templates():
    source = (
        "{{ {'a': '<é>'} | tojson }}|{{ tools is none and documents is none }}|{{ strftime_now('%Y') }}|"
        "{% for i in [1, 2, 3] %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}|{{ eos_token }}\n"
        "    {% if true %}\nx\n    {% endif %}\n"
    )
    year = str(datetime.now().year)
    expected = '{"a": "<é>"}|True|' + year + "|1|<|im_end|>\nx\n"
    assert ChatTemplate(source).render(conversation("hi"), BYTE_LEVEL) == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("a\n{% if %}", r"line 2: .Expected an expression"),
        ("a\nb{{ nope.x }}", r"line 2: .*'nope' is undefined"),
        ("\n\n{{ raise_exception('roles \x1b[31m!') }}", r"line 3: 'roles \\x1b\[31m!'"),
        ("{{ 1 // 0 }}", "line 1: .*by zero"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% import 'x' as y %}", "no loader"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "'__class__'.*unsafe"),
        ("{{ (messages | attr('__class__')).x }}", "No filter named 'attr'"),
        ("{{ ''['__class__'].x }}", "unsafe"),
        ("{{ raise_exception.__globals__ }}{{ raise_exception.__globals__.x }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ 'a' * 10000000000 }}", r"operator \*"),
        ("{{ 10 ** 100 }}", r"operator \*\*"),
        ("{{ '%1000000000d' % 1 }}", "operator %"),
        ("{% for i in range(1000000000) %}{% endfor %}", "[Rr]ange too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% if 1 %}" * 5_000, "recursion"),
        ("a" * 300_000, "300000 characters, at most 65536"),
        ("{% for i in range(99) %}{{ 'a' * 50000 }}{% endfor %}", "writes too much"),
    ],
)
def test_template_errors_are_ours(source, message):
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError, match=message):
            ChatTemplate(source).render(conversation("hi"), BYTE_LEVEL)
        assert tracemalloc.get_traced_memory()[1] < 64 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    ],
)
@DEADLINE
def test_a_template_that_does_not_end_is_stopped(source):
    with pytest.raises(TemplateError, match="takes longer"):
        ChatTemplate(source).render(conversation("hi"), BYTE_LEVEL)


def test_the_clock_changes_nothing_that_is_written():
    """The looks at the clock are put into loops and macros, also before an `else` and inside filters."""
    source = (
        "{% macro m(x) %}<{{ x }}>{% endmacro %}{% for i in range(3) recursive %}{{ loop.index }}{{ m(i) }}"
        "{% else %}none{% endfor %}{% for i in [] %}{% else %}none{% endfor %}"
        "{% set t %}{% for i in 'ab' %}{{ i }} {% endfor %}{% endset %}{{ t | trim | upper }}"
    )
    expected = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source).render()
    assert ChatTemplate(source).render(conversation("hi"), BYTE_LEVEL) == expected == "1<0>2<1>3<2>noneA B"


@pytest.mark.parametrize(
    "source",
    [
        "{{ lipsum(n=1000000) }}",
        "{{ '{:3000000000}'.format_map({}) }}",
        "{{ [1] | slice(1000000000) | list }}",
        "{{ 'x' | center(3000000000) }}",
        "{{ '%3000000000d' | format(1) }}",
        "{{ '{:3000000000}'.format(1) }}",
        "{{ 'x'.ljust(3000000000) }}",
        "{{ 'a' | indent(2000000000) }}",
        "{{ ('a' * 60000) | replace('a', 'b' * 60000) }}",
        "{{ ('a ' * 3000000) | wordwrap(1) | length }}",
    ],
)
def test_what_makes_most_out_of_least_is_refused(source, smollm2_path):
    tokenizer = nl.load_tokenizer(smollm2_path)
    with pytest.raises(TemplateError, match="chat template, line 1"):
        ChatTemplate(source).render([{"role": "user", "content": "hi"}], tokenizer)


# Each step is small, and what it makes is twice what it was given: no clock would stop it in time.
A = "{% set a = 'a' * 200000 %}"
GROWTH = {
    "tilde": "{% set a = 'ab' %}" + "{% set a = a ~ a %}" * 40,
    "tilde at once": A + "{{ " + "~".join(["a"] * 500) + " }}",
    "plus": "{% set a = 'ab' %}" + "{% set a = a + a %}" * 40,
    "lists": "{% set a = [1] %}" + "{% set a = a + a %}" * 40,
    "in each other": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 60 + "{{ a }}",
    "tuples": "{% set a = (1,) %}" + "{% set a = (a, a) %}" * 60 + "{{ a == a }}",
    "mappings": "{% set a = {} %}" + "{% set a = {1: a, 2: a} %}" * 60 + "{{ a | tojson }}",
    "dict": "{% set a = dict() %}" + "{% set a = dict(x=a, y=a) %}" * 60,
    "attributes": "{% set n = namespace(x=[1]) %}" + "{% set n.x = [n.x, n.x] %}" * 60,
    "in a loop": "{% set n = namespace(x='a') %}"
    "{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "blocks": "{% set a %}ab{% endset %}" + "{% set a %}{{ a }}{{ a }}{% endset %}" * 40,
    "constants": "{% set a %}{% for i in range(99999) %}" + "x" * 50_000 + "{% endfor %}{% endset %}",
    "macro": "{% macro m() %}{% for i in range(99999) %}"
    + "x" * 50_000
    + "{% endfor %}{% endmacro %}{{ m() }}",
    "callers": "{% macro m() %}{{ caller() }}{{ caller() }}{% endmacro %}"
    + "{% call m() %}" * 18
    + "x" * 1000
    + "{% endcall %}" * 18,
    "slices": A + "".join(f"{{% set a{i} = a[1:] %}}" for i in range(200)),
    "capitals": A + "".join(f"{{% set a{i} = a | upper %}}" for i in range(200)),
    "join": A + "{{ ([a] * 1000) | join }}",
    "join by it": "{% set b = 'a' * 90000 %}{{ ([1] * 5000) | join(b) }}",
    "join's method": "{% set b = 'a' * 90000 %}{{ b.join(['x'] * 5000) }}",
    "join an attribute": A + "{{ ([{'x': a}] * 1000) | join(attribute='x') }}",
    "replace": "{{ ('a' * 60000) | replace('a', 'b' * 60000) }}",
    "replace's method": "{{ ('a' * 60000).replace('a', 'b' * 60000) }}",
    "map": "{% set b = 'a' * 50000 %}{{ range(99999) | map('default', 1) | map('replace', '', b) | list }}",
    "text of a list": A + "{{ ([a] * 1000) | string }}",
    "a list as it is": A + "{{ [a, a, a, a, a, a, a, a] * 100 }}",
    "indents": "{% set a = [1] * 9000 %}" + "{% set a = [a] %}" * 200 + "{{ a | tojson(indent=8) }}",
    "pieces": "{{ ('ab ' * 80000).split() }}",
    "%": "{{ ('%1000000000d' ~ '') % 1 }}",
    "dates": "{{ strftime_now('%999d' * 40000) }}",
    "bytes": "{{ (1).to_bytes(1000000000, 'big') }}",
    "translate": "{{ ('a' * 60000).translate({97: 'b' * 60000}) }}",
    "fromkeys": "{{ dict.fromkeys(range(99999)) }}",
    "indent": "{% set a = 'a\n' * 9000 %}{{ a | indent(1000) }}",
    "indent by a text": "{{ 'a' | indent('b' * 90000) }}",
    "center": "{{ 'x' | center(3000000000) }}",
    "batch": "{{ [1] | batch(1000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(1000000000) | list }}",
    "tabs": "{{ ('\t' * 90000).expandtabs(1000) }}",
    "zeros": "{{ '1'.zfill(1000000000) }}",
    "formats": "{{ ('%s' * 9000) | format('x') }}",
    "format's width": "{{ '%*d' | format(1000000000, 1) }}",
    "format many times": A + "{{ ('{0}' * 90).format(a) }}",
    "format by it": "{{ '{:{}}'.format(1, 1000000000) }}",
    "format of lists": "{% set a = 'a' * 9000 %}{{ ('%s' * 200) % (([a] * 20,) * 200) }}",
    "separators": "{{ [1, 2] | tojson(separators=('a' * 90000, ':')) }}",
    "powers": "{{ [0] * (2 ** 40) }}",
    "sums": "{{ ([[1] * 9999] * 9999) | sum(start=[]) }}",
}


@pytest.mark.parametrize("source", GROWTH.values(), ids=GROWTH)
def test_a_template_has_room_for_so_much(source):
    tracemalloc.start()
    try:
        with pytest.raises(
            TemplateError, match=r"too much|not allowed|unsafe|of 200000 char|No filter|numbers only|a width"
        ):
            ChatTemplate(source).render(conversation("hi"), BYTE_LEVEL)
        assert tracemalloc.get_traced_memory()[1] < 12 << 20
    finally:
        tracemalloc.stop()


def test_namespaces_in_each_other_have_no_long_text():
    source = "{% set a = namespace() %}" + "{% set a = namespace(x=a, y=a) %}" * 20 + "{{ a }}"
    assert ChatTemplate(source).render(conversation("hi"), BYTE_LEVEL) == "<namespace>"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{% set a = 3 %}" + "{% set a = a * a %}" * 60, "a number beyond"),
        ("{{ ('9' * 4000) | int // 3 }}", "a number beyond"),
        ("{{ 1.5 | round(1000000000, 'ceil') }}", "a width of more than 1024"),
        ("{{ range(99999) | select('in', ['a'] * 90000) | list }}", "takes longer"),
        ("{% set l = ['a'] * 90000 %}{% for i in range(99999) if i in l %}{% endfor %}", "takes longer"),
        ("{{ ('a' * 9999).strip('b' * 9999 ~ 'a') }}", "more than 1024 characters"),
        ("{{ ('ab' * 9999).rfind('b' * 9999) }}", "more than 1024 characters"),
        ("{{ 'a' | e }}" * 5000, "parts, at most 8192"),
        ("{{ 1" + "+1" * 30_000 + "}}", "recursion"),
        ("{{ " + "[" * 20_000 + "]" * 20_000 + " }}", "recursion"),
        ("{{ loop }}{% block b %}{{ self.b() }}{% endblock %}", "recursion"),
    ],
)
@DEADLINE
def test_steps_that_take_long_are_refused(source, message):
    with pytest.raises(TemplateError, match=message):
        ChatTemplate(source).render(conversation("hi"), BYTE_LEVEL)


def test_room_grows_with_the_messages():
    """Real templates make some copies of what was said; a thousand messages of a page each are no attack."""
    pages = ["a page\n" * 500] * 1000
    text = ChatTemplate(CHATML).render(conversation(*pages), BYTE_LEVEL)
    assert len(text) > 1000 * 3500
    often = ChatTemplate("{% for i in range(99) %}" + CHATML + "{% endfor %}")
    with pytest.raises(TemplateError, match="too much"):
        often.render(conversation(*pages[:20]), BYTE_LEVEL)


PLAIN = """
{%- set ns = namespace(n=0, seen=[], text='') %}
{%- for message in messages[::-1][:3] %}
    {%- set ns.n = ns.n + loop.index0 * 2 - 1 %}
    {%- set ns.seen = ns.seen + [message.role] %}
    {%- set ns.text = ns.text ~ message['content'].strip().split('</think>')[-1].lstrip('\n') ~ loop.last %}
{%- endfor %}
{%- set a, (b, c) = 1, (2, [3, {'k': 'v'}]) -%}
{{ ns.seen }}{{ ns.text }}{{ ns.n // 3 }}|{{ a ~ b ~ c }}|{{ (a, b)[1:] }}|{{ 7 % 4 }}{{ -a }}{{ 2.5 * 2 }}
{{ ', '.join(['x', 'y']) }}|{{ 'aXa'.replace('a', 'b') }}|{{ 'aXa'.replace('a', 'b', 1) }}
{{ 'a-b' | replace('-', '+') }}|{{ [{'n': 'x'}] | join(',', attribute='n') }}
{% for k, v in {'p': 1, 'q': [2]}.items() if k != 'z' %}{{ k }}={{ v }}{{ ';' if not loop.last }}{% endfor %}
{{ messages | map(attribute='role') | join('/') }}|{{ [1, 2] | join }}|{{ nope is defined }}
{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ 'b' in ['a', 'b'] }}
{%- macro say(x, times=2) -%}{{ x * times }}{{ caller() if caller else '' }}{%- endmacro %}
{{ say('ab') }}{% call say('c', times=3) %}!{% endcall %}{% filter upper %}up{{ a }}{% endfilter %}
{% set block %}  {{ 'é' | upper }} {% endset %}{{ block | trim }}{{ '<' | e }}{{ 'x' is string }}
{%- set joined = ['s'] * 3 %}{{ joined | join('-') }}{{ range(3) | list }}{{ 'abc'[1] }}{{ 'abc'[1:] }}
{{- 'title case' | title }}{{ cycler('odd', 'even').next() }}{{ none }}{{ messages[0].content is mapping }}
"""


@given(contents=st.lists(TEXTS, min_size=1, max_size=4))
def test_what_real_templates_do_is_done(contents):
    messages = conversation(*contents)
    expected = as_hugging_face_renders(PLAIN, messages, "", "")
    assert template(PLAIN).render(messages, BYTE_LEVEL) == expected


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The <b>weather</b> 'now', \u00e9",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CALL = {
    "id": "call00001",
    "type": "function",
    "function": {"name": "f", "arguments": {"a": [1.5, None, True]}},
}
WITH_TOOLS = [
    {"role": "user", "content": "hi"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "7", "name": "f", "tool_call_id": "call00001"},
]
ALLOWED = {
    "generation": "{% for m in messages %}{% generation %}{{ m.role }}\n{% endgeneration %}-{% endfor %}",
    "a scope": "{% set a = 1 %}{% generation %}{% set a = 2 %}{{ a }}{% endgeneration %}{{ a }}",
    "break": "{% for m in messages %}{% if loop.index > 1 %}{% break %}{% endif %}{{ m.role }}{% endfor %}",
    "continue": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.role }}{% endfor %}",
    "tools": "{% for tool in tools %}{{ tool.function.name }}{{ tool | tojson }}{% endfor %}",
    "indented": "{{ tools | tojson(indent=4) }}{{ tools | tojson(indent=1, sort_keys=true) }}",
    "separators": "{{ tools[0] | tojson(separators=(',', ':')) }}",
    "ASCII": "{{ tools[0] | tojson(ensure_ascii=True) }}{{ '\U0001f999' | tojson(ensure_ascii=true) }}",
    "documents": "{% for d in documents %}{{ d.title }}: {{ d['text'] }}\n{% endfor %}",
    "tool calls": "{% for m in messages %}{{ m.tool_calls is defined }}{{ m.get('content') }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{{ c.id }}{% endfor %}{% endfor %}",
    "named tokens": "{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token is defined }}",
    "filters": "{{ 'a\nb' | indent }}|{{ 'a\nb' | indent(2, true) }}|{{ 2.567 | round(1) }}|{{ 2.5 | round }}"
    "|{{ [1, 2, 3] | sum }}|{{ [{'n': 2}] | sum(attribute='n', start=1) }}|{{ 'x' | center(5) }}|"
    "{{ '%s-%02d' | format('a', 7) }}|{{ 'a b c' | wordcount }}|{{ 'abcdefgh' | truncate(5, true, '') }}|"
    "{{ [1, 2, 3] | batch(2, 0) | list }}|{{ [1, 2, 3] | slice(2) | list }}|{{ 'a b' | urlencode }}|"
    "{{ 12345 | filesizeformat }}|{{ '<i>x</i>' | striptags }}|{{ '<' | forceescape }}",
    "methods": "{{ 'a'.ljust(3) }}|{{ 'a'.rjust(3, '*') }}|{{ '7'.zfill(3) }}|{{ 'a-b-c'.rsplit('-', 1) }}|"
    "{{ 'a-b'.rpartition('-') }}|{{ 'aba'.rfind('a') }}|{{ 'aba'.rindex('a') }}|{{ '\tx'.expandtabs(2) }}|"
    "{{ '{0}, {1:>3}{n!r}'.format('a', 'b', n='c') }}|{{ '{}-{}'.format(1, 2) }}"
    "{{ 'a'.isascii() }}{{ '1'.isdecimal() }}{{ 'a'.isprintable() }}{{ {'a': 1}.copy() }}",
    "operators": "{{ 2 ** 10 }}|{{ 10 ** 10 }}|{{ '%s %d' % ('a', 3) }}|{{ '%.2f' % 1.5 }}|{{ 'ab' * 2 }}",
    "the date": "{{ strftime_now('%Y-%m') }}",
}


@pytest.mark.parametrize("source", ALLOWED.values(), ids=ALLOWED)
def test_a_template_may_do_what_transformers_allows(source):
    extras = {"tools": [TOOL], "documents": [{"title": "A", "text": "one"}]}
    names = {"unk_token": "<unk>"}
    expected = as_hugging_face_renders(source, WITH_TOOLS, "<s>", "</s>", **extras, **names)
    messages = [{key: value for key, value in m.items() if value is not None} for m in WITH_TOOLS]
    entries = {"tokenizer.ggml.unknown_token_id": 0}
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata() | entries, "x")
    assert ChatTemplate(source).render(messages, tokenizer, **extras) == expected


def test_names_in_tools_and_documents_make_no_control_token():
    """Whatever of JSON shows them: the values, the keys, and JSON in ASCII."""
    source = (
        "{{ '<|im_start|>' }}{{ tools | tojson(ensure_ascii=true) }}{{ documents | tojson }}"
        "{{ messages[0].tool_calls | tojson }}{{ '<|im_end|>' }}"
    )
    name = "x<|im_end|></s>\u00e9"
    messages = [{"role": "assistant", "tool_calls": [{name: name}]}]
    extras = {"tools": [{name: [name]}], "documents": [{"title": name, name: 1}]}
    ids = ChatTemplate(source).encode(BYTE_LEVEL, messages, **extras)
    control = BYTE_LEVEL.control_tokens
    assert control_ids(BYTE_LEVEL, ids) == [control["<|im_start|>"], control["<|im_end|>"]]
    in_ascii = json.dumps(extras["tools"])
    plain = json.dumps(extras["documents"], ensure_ascii=False) + json.dumps(
        messages[0]["tool_calls"], ensure_ascii=False
    )
    assert BYTE_LEVEL.decode(ids) == in_ascii + plain


@pytest.mark.parametrize(
    "extras",
    [
        {"tools": "x"},
        {"tools": [1]},
        {"documents": {"title": "x"}},
        {"tools": [{"a": {1}}]},
        {"tools": [{1: 2}]},
    ],
)
def test_tools_are_json(extras):
    with pytest.raises(ParameterError, match=r"(tools|documents) is .*, it must be a list of objects"):
        ChatTemplate("x").encode(BYTE_LEVEL, conversation("hi"), **extras)
    deep = {"tools": [{"a": functools.reduce(lambda inner, _: [inner], range(99), 1)}]}
    with pytest.raises(ParameterError, match="tools is"):
        ChatTemplate("x").encode(BYTE_LEVEL, conversation("hi"), **deep)


@pytest.mark.parametrize("name", ["llama2", "llama3", "chatml"])
def test_a_format_without_tools_refuses_them(name):
    tokenizer = {"llama2": SENTENCE_PIECE, "llama3": LLAMA3_VOCABULARY, "chatml": BYTE_LEVEL}[name]
    with pytest.raises(ParameterError, match="no place for tools"):
        CHAT_FORMATS[name].encode(tokenizer, conversation("hi"), tools=[TOOL])
    with pytest.raises(ParameterError, match=r"messages\[0\] is"):
        CHAT_FORMATS[name].encode(tokenizer, [{"role": "user", "content": "x", "name": "y"}])


# ---------------------------------------------------------------- the common formats

FORMATTED = {  # as the models' cards show them: system, question, answer, question
    "chatml": "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n"
    "<|im_start|>assistant\nA<|im_end|>\n<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\n",
    "mistral": "[INST] S\n\nQ [/INST] A</s>[INST] R [/INST]",
    "zephyr": "<|system|>\nS</s>\n<|user|>\nQ</s>\n<|assistant|>\nA</s>\n<|user|>\nR</s>\n<|assistant|>\n",
    "phi3": "<|system|>\nS<|end|>\n<|user|>\nQ<|end|>\n<|assistant|>\nA<|end|>\n"
    "<|user|>\nR<|end|>\n<|assistant|>\n",
    "tulu": "<|system|>\nS\n<|user|>\nQ\n<|assistant|>\nA</s>\n<|user|>\nR\n<|assistant|>\n",
    "vicuna": "S USER: Q ASSISTANT: A</s>USER: R ASSISTANT:",
    "alpaca": "S\n\n### Instruction:\nQ\n\n### Response:\nA</s>\n\n### Instruction:\nR\n\n### Response:\n",
    "solar": "### System:\nS\n\n### User:\nQ\n\n### Assistant:\nA\n\n### User:\nR\n\n### Assistant:\n",
    "openchat": "S<|end_of_turn|>GPT4 Correct User: Q<|end_of_turn|>GPT4 Correct Assistant: A<|end_of_turn|>"
    "GPT4 Correct User: R<|end_of_turn|>GPT4 Correct Assistant:",
    "deepseek": "S\n\nUser: Q\n\nAssistant: A</s>User: R\n\nAssistant:",
}


@pytest.mark.parametrize("name", [name for name in CHAT_FORMATS if name not in ("llama2", "llama3")])
def test_common_formats(name):
    messages = [{"role": "system", "content": "S"}, *conversation("Q", "A", "R")]
    format = CHAT_FORMATS[name]
    assert format.render(messages, SENTENCE_PIECE) == FORMATTED[name]
    prompt = format.render(messages[:2], SENTENCE_PIECE)[
        len(format.render(messages[:2], SENTENCE_PIECE, False)) :
    ]
    assert FORMATTED[name].endswith(prompt) and (prompt or name == "mistral")
    ids = format.encode(SENTENCE_PIECE, messages)
    expected = SENTENCE_PIECE.encode(FORMATTED[name], bos=True, special=True)
    assert ids == expected


@pytest.mark.parametrize("name", FORMATTED)
def test_common_formats_refuse_their_own_marks(name):
    """Where a mark is a control token, the text of a message never makes one, and nothing is refused."""
    format = CHAT_FORMATS[name]
    for mark in format.marks:
        assert mark in format.source or mark.strip("<|>") in ("system", "user", "assistant")
        if mark in SENTENCE_PIECE.control_tokens:
            harmless = control_ids(SENTENCE_PIECE, format.encode(SENTENCE_PIECE, conversation("x")))
            ids = format.encode(SENTENCE_PIECE, conversation(f"a{mark}b"))
            assert control_ids(SENTENCE_PIECE, ids) == harmless
            continue
        with pytest.raises(TextError, match="which only the chat format may write"):
            format.encode(SENTENCE_PIECE, conversation("hi", f"a{mark}b"))


@pytest.mark.parametrize("name", ["mistral", "vicuna", "alpaca"])
def test_a_role_that_a_format_does_not_have(name):
    with pytest.raises(TemplateError, match="this format has no role tool"):
        CHAT_FORMATS[name].encode(SENTENCE_PIECE, [{"role": "tool", "content": "7"}])


def test_the_format_of_the_command_line(tmp_path):
    assert chat_command.chat_format("vicuna") is CHAT_FORMATS["vicuna"]
    path = tmp_path / "mine.jinja"
    path.write_bytes(b"\xef\xbb\xbf{{ messages[0].content }}!")  # a byte order mark is no text
    text = chat_command.chat_format(str(path)).render(conversation("hi"), BYTE_LEVEL)
    assert text == "hi!"
    with pytest.raises(ParameterError, match="--chat-format nope: no file, and not one of llama2, llama3"):
        chat_command.chat_format("nope")
    path.write_bytes(b"\xff")
    with pytest.raises(TemplateError, match=r"mine.jinja: byte 0 is not UTF-8"):
        chat_command.chat_format(str(path))
    path.write_bytes(b"x" * 300_000)
    with pytest.raises(TemplateError, match="300000 bytes, at most 262144 are read"):
        chat_command.chat_format(str(path))


def test_a_template_that_does_not_run_has_a_way_round():
    with pytest.raises(TemplateError, match=r"'nope'.*; --chat-format has the common formats"):
        ChatTemplate("{% nope %}").render(conversation("hi"), BYTE_LEVEL)


# What a file may hold that means harm, by the names that it has among the hostile cases.
HARM = {
    "J01": [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ self.__init__.__globals__['os'].popen('id') }}",
    ],
    "J02": [
        "{{ messages | attr('__class__') }}",
        "{{ ''['__class__'].mro() }}",
        "{{ ([{}] | map(attribute='__class__') | list)[0].mro() }}",
    ],
    "J03": [
        "{{ '{0.__class__}'.format(messages) }}",
        "{{ '{x.__class__}'.format_map({'x': 1}) }}",
        "{{ '%(x)s' % 1 }}",
        "{{ '%(y)s' % {'x': 1} }}",
        "{% set f = '{0.__class__}'.format %}{{ f(messages) }}",
        "{% set f = '{0.__class__}'.format %}{{ [messages] | map(f) | list }}",
    ],
    "J04": [
        "{% for i in range(10**9) %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    ],
    "J05": [
        "{{ 'a' * 10**10 }}",
        "{{ 'a' * 10000000000 }}",
        "{{ '%1000000000d' % 1 }}",
        "{{ '%(x)1000000000d' % {'x': 1} }}",
        "{{ '%(x)-1000000000d' | format(x=1) }}",
        "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}",
        "{{ '%%%(x).1000000000f' % {'x': 1} }}",
        "{{ ('%(x)s' * 100000) % {'x': 'a' * 1000} }}",
        "{{ 10 ** 10 ** 9 }}",
    ],
    "J06": ["{% include '/etc/passwd' %}", "{% import 'os' as os %}", "{% extends 'base' %}"],
    "J07": [
        "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
        "{% if 1 %}" * 10_000 + "{% endif %}" * 10_000,
        "a" * 5_000_000,
    ],
    "J08": ["{% if %}", "{{ nope.x }}", "{{ raise_exception('no') }}"],
}


@pytest.mark.parametrize(("case", "source"), [(case, source) for case in HARM for source in HARM[case]])
@DEADLINE
def test_harm_is_a_template_error(case, source):
    with pytest.raises(TemplateError, match=r"^the model's chat template, line"):
        ChatTemplate(source).encode(BYTE_LEVEL, conversation("hi"))
    assert Llama3Chat().encode(LLAMA3_VOCABULARY, conversation("hi"))  # the way out: --chat-format
