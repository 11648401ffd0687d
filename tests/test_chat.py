import tracemalloc
from datetime import datetime

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from test_tokenizer import (
    CHARACTERS,
    CONTROL_NAMES,
    FRAGMENTS,
    TEXTS,
    byte_level_metadata,
    hugging_face,
    sentencepiece_metadata,
    trained_sentencepiece,
)

import numpy_llama as nl
from numpy_llama.chat import ChatTemplate
from numpy_llama.checkpoint.gguf import GGUFFile
from numpy_llama.errors import ParameterError, TemplateError, TextError
from numpy_llama.tokenizer import tokenizer_from_gguf

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


BYTE_LEVEL, SENTENCE_PIECE = byte_level(), tokenizer_from_gguf(sentencepiece_metadata(), "small.gguf")
CASES = pytest.mark.parametrize(
    ("tokenizer", "source"),
    [(BYTE_LEVEL, CHATML), (BYTE_LEVEL, LLAMA3), (SENTENCE_PIECE, LLAMA2)],
    ids=["chatml", "llama3", "llama2"],
)


def as_hugging_face_renders(
    source: str, messages, bos: str, eos: str, add_generation_prompt: bool = True
) -> str:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    return environment.from_string(source).render(
        messages=messages, add_generation_prompt=add_generation_prompt, bos_token=bos, eos_token=eos
    )


def control_ids(tokenizer, ids):
    return [i for i in ids if i in set(tokenizer.control_tokens.values())]


@given(contents=st.lists(ORDINARY, min_size=1, max_size=4), prompt=st.booleans())
def test_smollm2_equals_hugging_face(smollm2, contents, prompt):
    tokenizer, reference, source = smollm2
    messages = conversation(*contents)
    text = as_hugging_face_renders(source, messages, "<|im_start|>", "<|im_end|>", prompt)
    assert ChatTemplate(source).encode(tokenizer, messages, prompt) == reference.encode(text).ids


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
    assert ChatTemplate(source).encode(BYTE_LEVEL, messages) == expected


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


@CASES
@given(data=st.data(), n=st.integers(1, 4))
def test_no_message_makes_a_control_token(tokenizer, source, data, n):
    contents = data.draw(st.lists(HOSTILE, min_size=n, max_size=n))
    ids = ChatTemplate(source).encode(tokenizer, conversation(*contents))
    harmless = ChatTemplate(source).encode(tokenizer, conversation(*["x"] * n))
    assert control_ids(tokenizer, ids) == control_ids(tokenizer, harmless)


@given(contents=st.lists(HOSTILE, min_size=1, max_size=4))
def test_messages_arrive_unchanged(contents):
    ids = ChatTemplate(CHATML).encode(BYTE_LEVEL, conversation(*contents))
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
    with pytest.raises(TemplateError, match="makes control tokens out of what a message says"):
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
        [{"role": "user", "content": "hi", "name": "me"}],
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
        ("{{ 10 ** 10 }}", r"operator \*\*"),
        ("{{ '%1000000000d' % 1 }}", "operator %"),
        ("{% for i in range(1000000000) %}{% endfor %}", "[Rr]ange too big"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "recursion"),
        ("{% if 1 %}" * 10_000, "recursion"),
        ("a" * 300_000, "300000 characters, at most 262144"),
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
