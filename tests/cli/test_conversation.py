"""A conversation: its commands, its context, its loops, its sampling; what is typed, and its history."""

import json
import stat
from dataclasses import fields, replace
from pathlib import Path

import pytest
from helpers.terminal import Terminal
from helpers.tiny_models import SPEAKER, write_speaker
from hypothesis import given
from hypothesis import strategies as st

import numpy_llama as nl
from numpy_llama.cli import conversation, lines
from numpy_llama.cli.conversation import COMMANDS, DEFAULTS, Conversation
from numpy_llama.errors import TemplateError
from numpy_llama.training.data import read_data
from numpy_llama.training.examples import Encoder, rows_of

TEMPLATE = "{% for m in messages %}<|user|>{{ m['role'][0] + m['content'] }}<|end|>{% endfor %}<|begin|>"
CONTEXT = 256


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    args = replace(SPEAKER, max_seq_len=CONTEXT)
    return write_speaker(tmp_path_factory.mktemp("model") / "m.gguf", args)


@pytest.fixture(scope="module")
def llama(path) -> nl.Llama:
    llama = nl.load(path, threads=1)
    llama.chat_format = nl.ChatTemplate(TEMPLATE)
    return llama


@pytest.fixture
def talk(llama) -> Conversation:
    return Conversation(llama, None, {"max_tokens": 8, "seed": 1})


@pytest.fixture
def typed(talk, capsys):
    """A function that types lines, and returns what went to stdout and stderr, without the marks."""

    def type_lines(*given: str, talk: Conversation = talk) -> tuple[str, str]:
        left = iter(given)

        def ask(mark: str) -> str:
            for line in left:
                return line
            raise EOFError

        talk.lines.ask = ask
        talk.run()
        out, err = capsys.readouterr()
        greeting, _, err = err.partition("\n")
        assert "/help" in greeting
        return out, err.rstrip("\n")

    return type_lines


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


# ---------------------------------------------------------------- questions and answers


@pytest.mark.parametrize(
    "given, question",
    [
        (["hi"], "hi"),
        (["//etc is a folder"], "/etc is a folder"),
        ([" /etc is a folder"], " /etc is a folder"),
        (['"""', "// a", "", ' b"""'], "// a\n\n b"),
        (['"""a', 'b""" '], "a\nb"),
        (['"""/help"""'], "/help"),
        (["def f():\n    pass"], "def f():\n    pass"),
    ],
)
def test_a_question_is_asked_as_it_is_meant(given, question, talk, typed, llama):
    answer = llama.chat([user(question)], max_tokens=8, seed=1, **DEFAULTS).text
    assert typed(*given) == (answer + "\n", "")
    assert talk.messages == [user(question), assistant(answer)]


def test_what_is_no_question_is_not_asked(talk, typed):
    out, err = typed("", "  ", '""""""', "a\udcffb", "/nope", "/\x1b[2J")
    assert out == "" and talk.messages == []
    *_, nope, odd = err.splitlines()
    assert all(f"/{name}" in nope for name in ("nope", *COMMANDS)) and "//nope is text" in nope
    assert "\x1b" not in odd


def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(talk, typed, llama):
    typed("hi")
    before = talk.messages
    remarks = typed("x" * CONTEXT)[1]
    assert "no room for an answer" in remarks and "nearly full" not in remarks
    assert talk.messages == before
    typed("more")
    assert len(talk.messages) == 4


def test_a_model_without_a_chat_format_ends_it(path, typed):
    with pytest.raises(TemplateError, match="this model has no chat template"):
        typed("hi", talk=Conversation(nl.load(path, threads=1), None, {}))


# ---------------------------------------------------------------- sampling


def test_an_option_comes_from_the_command_line_the_model_or_the_default(path, llama, typed):
    own = nl.Llama(
        llama.model,
        llama.tokenizer,
        llama.chat_format,
        sampling_defaults={"temperature": 0.3, "top_k": None, "top_p": 0.9},
    )
    talk = Conversation(own, None, {"top_p": 0.5, "max_tokens": 4, "stop": []})
    shown = dict(line.split(maxsplit=1) for line in typed("/set", talk=talk)[1].splitlines())
    assert {name: words.split() for name, words in shown.items()}.items() >= {
        "temperature": ["0.3", "the", "model's"],
        "top_k": ["off", "the", "model's"],
        "top_p": ["0.5", "given"],
        "min_p": ["0.05", "default"],
        "repetition_penalty": ["1.0"],
        "seed": ["off"],
        "max_tokens": ["4", "given"],
    }.items()
    options = {field.name for field in fields(nl.Sampler)} | {"max_tokens"}
    assert shown.keys() == options - {"dry_breakers"}  # which the command line does not have


def test_a_template_in_the_home_of_nobody_is_refused(main, capsys):
    assert main(["chat", "--chat-format", "~no-such-user/x", "-m", "none", "hi"]) == 2
    assert "--chat-format '~no-such-user/x'" in capsys.readouterr().err


def test_set_changes_the_next_answer(talk, typed, llama):
    err = typed("/set temperature 0", "/set top-k 3", "/set min_p off", "/set max_tokens 5", "hi")[1]
    assert [" ".join(line.split()) for line in err.splitlines()] == [
        "temperature 0.0 given",
        "top_k 3 given",
        "min_p off given",
        "max_tokens 5 given",
    ]
    assert talk.messages[-1] == assistant(llama.chat([user("hi")], max_tokens=5).text)


def test_an_option_without_a_number_is_set_too(talk, typed, llama):
    """A space before the text of a token is part of it."""
    _, err = typed("/set logit_bias  =2.5", "/set dry_multiplier 0.8", "hi")
    assert err.splitlines()[0].endswith("{' ': 2.5} given")
    way = DEFAULTS | {"logit_bias": {" ": 2.5}, "dry_multiplier": 0.8}
    assert talk.messages[-1] == assistant(llama.chat([user("hi")], max_tokens=8, seed=1, **way).text)


@pytest.mark.parametrize(
    "line, words",
    [
        ("/set heat 3", "'heat' is no option: temperature, top_k"),
        ("/set temperature hot", "argument --temperature: invalid float value: 'hot'"),
        ("/set temperature -1", "temperature is -1.0, it must be a finite number, 0 or above"),
        ("/set temperature nan", "temperature is nan"),
        ("/set top_k 0", "top_k is 0, it must be"),
        ("/set top_k 5 --json", "argument --top-k: invalid int value: '5 --json'"),
        ("/set max_tokens -1", "'-1' is not a whole number"),
        ("/set stop x", "'stop' is no option"),
        ("/set logit_bias nothing like one token=1", "a text must be one token"),
    ],
)
def test_a_wrong_value_is_refused_and_changes_nothing(line, words, talk, typed):
    before = dict(talk.options)
    assert words in typed(line)[1]
    assert dict(talk.options) == before


def test_a_single_question_is_answered_by_the_likeliest_tokens(path, tmp_path, main, capsys, llama):
    template = tmp_path / "t.jinja"
    template.write_text(TEMPLATE)
    assert main(["chat", "-m", str(path), "-n", "9", "--chat-format", str(template), "hi"]) == 0
    assert capsys.readouterr().out == llama.chat([user("hi")], max_tokens=9).text + "\n"


# ---------------------------------------------------------------- commands


def test_help_lists_every_command(typed):
    err = typed("/help")[1]
    assert [line.split()[0] for line in err.splitlines()[: len(COMMANDS)]] == [
        f"/{name}" for name in COMMANDS
    ]
    page = (Path(__file__).parents[2] / "docs" / "guide" / "use.md").read_text()
    for name in COMMANDS:
        assert hasattr(Conversation, f"do_{name}") and f"\n| `/{name}" in page


def test_quit_ends(talk, typed):
    typed("/quit", "hi")
    assert talk.messages == []


def test_clear_and_undo_and_the_system_message(talk, typed):
    assert typed("/system", "/system  Be\nbrief. ", "/system")[1].endswith("\nBe\nbrief.")
    system = {"role": "system", "content": "Be\nbrief."}
    typed("one", "two")
    first, second = talk.messages[1:3], talk.messages[3:]
    assert talk.messages == [system, *first, *second] and second[0] == user("two")
    typed("/undo")
    assert talk.messages == [system, *first]
    typed("/system Be long.")
    assert talk.messages == [{"role": "system", "content": "Be long."}, *first]
    typed("/clear")
    assert talk.messages == [{"role": "system", "content": "Be long."}]
    for command in ("/undo", "/regen", "/save x.jsonl"):
        assert "there is no question yet" in typed(command)[1]


def test_regen_answers_again_with_the_next_seed(talk, typed, llama):
    typed("hi")
    for seed in (2, 3):
        typed("/regen")
        answer = llama.chat([user("hi")], max_tokens=8, seed=seed, **DEFAULTS).text
        assert talk.messages == [user("hi"), assistant(answer)]
    typed("/undo", "hi")
    assert talk.messages[1]["content"] == llama.chat([user("hi")], max_tokens=8, seed=1, **DEFAULTS).text
    assert "another seed changes nothing" in typed("/set temperature 0", "/regen")[1]


def test_speed_is_printed_when_it_is_asked_for(typed):
    assert typed("hi")[1] == ""
    assert "8 tokens, " in typed("/speed on", "hi")[1]
    assert typed("/speed off", "hi")[1] == ""
    assert "wanted /speed on or /speed off" in typed("/speed")[1]


def test_finetune_reads_what_was_saved_and_load_continues_it(talk, typed, llama, tmp_path):
    file = tmp_path / "talk.jsonl"
    typed("/system Be brief.", 'ü "\n🦙', f"/save {file}")
    first = talk.messages
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    assert "saved as conversation 2" in typed("/clear", "two", "three", f"/save {file}")[1]
    data = read_data(file)
    assert data.kind == "messages"
    assert [record.values["messages"] for record in data.train] == [first, talk.messages]
    encoder = Encoder(llama.tokenizer, nl.ChatTemplate(TEMPLATE.replace("<|begin|>", "")))
    assert len(rows_of(data.train, encoder, CONTEXT).rows) == 2
    saved = talk.messages
    assert "loaded 5 messages" in typed("/clear", f"/load {file}")[1]
    assert talk.messages == saved
    typed("four")
    assert talk.messages[:5] == saved and talk.messages[5] == user("four")


@pytest.mark.parametrize(
    "content, words",
    [
        (None, "is not there"),
        ("\n", "talk.jsonl has no conversation"),
        ("{", "is no JSON"),
        ('{"text": "x"}', "line 1 is no conversation"),
        ('{"messages": [{"role": "king", "content": "x"}]}', "it must have a role, one of"),
        ('{"messages": ["x"]}', "messages[0] is 'x'"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "talk.jsonl: character 0"),
        ('{"messages": [{"role": "user", "content": "\\u001b[2J"}]}\n{"messages": {}}', "wanted a list"),
    ],
)
def test_a_file_that_holds_no_conversation_is_refused(content, words, talk, typed, tmp_path):
    file = tmp_path / "talk.jsonl"
    if content is not None:
        file.write_text(content)
    typed("hi")
    before = talk.messages
    err = typed(f"/load {file}")[1]
    assert err.startswith("numpy-llama: ") and err.count("\n") == 0 and words in err
    assert talk.messages == before


def test_save_never_harms_another_file(talk, typed, tmp_path):
    typed("hi")
    for name, content in (("model.gguf", "GGUF"), ("texts.jsonl", '{"text": "x"}\n')):
        (tmp_path / name).write_text(content)
        assert typed(f"/save {tmp_path / name}")[1].startswith("numpy-llama: ")
        assert (tmp_path / name).read_text() == content
    assert "cannot be written" in typed(f"/save {tmp_path}/no/such.jsonl")[1]
    assert "ends in .jsonl" in typed("/save")[1]
    assert "~nobody-here" in typed("/save ~nobody-here/x.jsonl")[1]


def test_a_loaded_file_does_not_command_the_terminal(typed, talk, llama, tmp_path):
    file, odd = tmp_path / "talk.jsonl", "\x1b[2J"
    messages = [{"role": "system", "content": odd}, user(odd), assistant(odd)]
    file.write_text(json.dumps({"messages": messages}))
    err = typed(f"/load {file}", "/system")[1]
    assert talk.messages == messages and "\x1b" not in err
    assert err.endswith(r"\x1b[2J")
    call = {"role": "assistant", "tool_calls": [{"name": odd}]}
    file.write_text(json.dumps({"messages": [user("x"), call]}))
    llama.chat_format, template = nl.ChatTemplate("{{ messages | tojson }}"), llama.chat_format
    assert "\x1b" not in typed(f"/load {file}", "/system")[1]
    llama.chat_format = template


# ---------------------------------------------------------------- loops and a full context


def test_a_loop_is_ended_with_a_remark(talk, typed, llama, monkeypatch):
    """The conversation keeps the repeated text once: 5 tokens, if 20 are shown and 15 only repeat them."""
    options = {"max_tokens": 100, "seed": 1, **DEFAULTS}
    texts = [piece.text for piece in llama.stream_chat([user("hi")], **options)]
    monkeypatch.setattr(conversation, "repeated_ids", lambda ids: 15 * (len(ids) == 20))
    out, err = typed("/set max_tokens 100", "hi")
    assert out == "".join(texts[:20]).removesuffix("\n") + "\n"
    assert "the answer repeats itself, so it was ended" in err
    assert talk.messages == [user("hi"), assistant("".join(texts[:5]))]
    assert "repeats itself" in typed("more")[1] and len(talk.messages) == 4


@given(st.lists(st.integers(0, 90), min_size=1, max_size=12), st.booleans())
def test_the_oldest_questions_are_dropped(llama, sizes, system):
    """Then half of the context is free, or only the question is left; and not before a quarter is not."""
    talk = Conversation(llama, "S" * 20 if system else None, {})
    head = [*talk.messages]
    turns = [[user(f"{i}" + "q" * size), assistant("a" * size)] for i, size in enumerate(sizes)]
    messages = [*head, *(one for turn in turns for one in turn)][:-1]
    kept = talk.with_room(messages)

    def used(messages):
        return len(llama.encode_chat(messages))

    assert kept[: len(head)] == head and kept[-1] == messages[-1]
    rest = kept[len(head) :]
    assert rest == messages[len(messages) - len(rest) :] and rest[0]["role"] == "user"
    if used(messages) <= CONTEXT * 3 / 4:
        assert kept == messages
    else:
        assert used(kept) <= CONTEXT / 2 or len(rest) == 1
        if len(rest) + len(head) < len(messages):  # one question less would not do
            longer = [*head, *messages[len(messages) - len(rest) - 2 :]]
            assert used(longer) > CONTEXT / 2


def test_a_long_conversation_goes_on(talk, typed, llama):
    err = typed("/system S", *(f"question {i} " + "x" * 30 for i in range(9)))[1]
    remarks = [line for line in err.splitlines() if "nearly full" in line]
    assert 2 <= len(remarks) < 9 and "oldest question" in remarks[0]
    assert talk.messages[0] == {"role": "system", "content": "S"}
    assert talk.messages[-2]["content"].startswith("question 8")


def test_an_answer_that_meets_the_end_of_the_context_says_so(talk, typed):
    assert typed("/set max_tokens off", "hi")[1].splitlines()[1:] == [
        "numpy-llama: the context is full, so the answer ends here"
    ]
    typed("next")
    assert [message["content"] for message in talk.messages[:-1]] == ["next"]  # all before it is dropped
    assert "full, so" not in typed("/clear", "/set max_tokens 5", "hi")[1]


# ---------------------------------------------------------------- on a terminal


@pytest.fixture
def terminal(path, tmp_path):
    template, begun = tmp_path / "t.jinja", []
    template.write_text(TEMPLATE)

    def begin(state: Path, term: str = "xterm") -> Terminal:
        arguments = "chat", "-m", str(path), "-n", "3", "--seed", "1", "--chat-format", str(template)
        begun.append(Terminal(*arguments, state=state, term=term))
        begun[-1].wait_for(b"> ")
        return begun[-1]

    yield begin
    for one in begun:
        one.close()


def ask(terminal: Terminal, text: bytes) -> None:
    """Type a line, and wait for the next mark."""
    at = len(terminal.seen)
    terminal.type(text)
    terminal.wait_for(b"> ", terminal.wait_for(b"\n", at))


def test_lines_of_former_conversations_come_back(terminal, tmp_path):
    """And nobody else reads them. Pasted lines are one question, in the history too."""
    first = terminal(tmp_path)
    ask(first, b"one\n")
    ask(first, b"\x1b[200~two\nlines\x1b[201~\n")
    first.type(b"/quit\n")
    assert first.end() == 0
    file = tmp_path / "numpy_llama" / "chat_history"
    assert [json.loads(line) for line in file.read_text().splitlines()] == ["one", "two\nlines", "/quit"]
    assert (stat.S_IMODE(file.stat().st_mode), stat.S_IMODE(file.parent.stat().st_mode)) == (0o600, 0o700)
    second = terminal(tmp_path)
    ask(second, b"\x1b[A\x1b[A\n")
    second.type(b"/save " + str(tmp_path / "t.jsonl").encode() + b"\n")
    second.wait_for(b"saved")
    second.type(b"/quit\n")
    assert second.end() == 0
    assert json.loads((tmp_path / "t.jsonl").read_text())["messages"][0] == user("two\nlines")


def test_without_a_place_for_the_history_there_is_none(terminal, tmp_path):
    (tmp_path / "numpy_llama").write_text("no folder")
    one = terminal(tmp_path, term="dumb")
    ask(one, b"one\n")
    one.type(b"\x1b[A\x1b[A\n/quit\n")
    assert one.end() == 0
    assert b"denied" not in one.seen and b"\x1b[?2004h" not in one.seen


@pytest.mark.parametrize(
    "state, folder",
    [("/s", "/s"), ("~/s", "/home/u/s"), ("s", "/home/u/.local/state"), ("", "/home/u/.local/state")],
)
def test_the_place_of_the_history(state, folder, monkeypatch):
    monkeypatch.setenv("HOME", "/home/u")
    monkeypatch.setenv("XDG_STATE_HOME", state)
    assert lines.history_file() == Path(folder) / "numpy_llama" / "chat_history"


def test_the_history_is_bounded_and_a_damaged_one_does_no_harm(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = lines.history_file()
    assert lines.old_lines() == []
    lines.remember("  ")
    lines.remember("x" * (lines.MOST_CHARACTERS + 1))
    assert not file.exists()
    lines.remember("first")
    file.write_bytes(b'\xff\n{"a": 1}\n"cut\n"nul \\u0000"\n' + file.read_bytes())
    assert lines.old_lines() == ["first"]
    for i in range(2 * lines.MOST_LINES):
        lines.remember(str(i))
    last = [str(i) for i in range(lines.MOST_LINES, 2 * lines.MOST_LINES)]
    assert lines.old_lines() == lines.old_lines() == last
    assert len(file.read_text().splitlines()) == lines.MOST_LINES
    monkeypatch.setenv("XDG_STATE_HOME", "~nobody-here/state")
    lines.remember("more")
    assert lines.old_lines() == []
