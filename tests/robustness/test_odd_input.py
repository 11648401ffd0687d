"""Odd input is read rightly, or there is one remark on stderr: control tokens' names, a byte order mark."""

import codecs

import pytest
from helpers.tiny_models import write_speaker
from helpers.tokenizers import byte_level, sentence_piece

import numpy_llama as nl
from numpy_llama.errors import TextError


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_speaker(tmp_path_factory.mktemp("odd") / "m.gguf")


BOTH = pytest.mark.parametrize("build", [byte_level, sentence_piece])


@BOTH
def test_names_are_read_as_tokens_only_where_asked(build):
    tokenizer = build()
    name, number = next(reversed(tokenizer.control_tokens.items()))
    text = f"Hello{name}{name} world"
    assert number not in tokenizer.encode(text)
    wanted = [*tokenizer.encode("Hello"), number, number, *tokenizer.encode(" world")]
    assert tokenizer.encode(text, special=True) == wanted
    assert tokenizer.encode("Hello world", special=True) == tokenizer.encode("Hello world")


@BOTH
def test_every_name_is_read(build):
    tokenizer = build()
    for name, number in tokenizer.control_tokens.items():
        assert tokenizer.encode(name, special=True) == [number]


def test_the_longest_name_at_a_place_is_read(path):
    tokenizer = nl.load_tokenizer(path)
    assert tokenizer.encode("<|user|><|user|", special=True) == [257, *b"<|user|"]


def test_a_bos_that_is_there_is_not_doubled(path):
    tokenizer = nl.load_tokenizer(path)
    assert tokenizer.encode("<|begin|>a", bos=True, special=True) == [256, 97]
    assert tokenizer.encode("a", bos=True, special=True) == [256, 97]
    assert tokenizer.encode("<|begin|>a", bos=True) == [256, *b"<|begin|>a"]
    assert tokenizer.encode("<|begin|>a", special=True) == [256, 97]


def test_a_prompt_with_names_is_read_as_asked(path):
    llama = nl.load(path, threads=1)
    prompt = "<|user|>hi<|end|>"
    assert llama.generate(prompt, max_tokens=1).prompt_tokens == [256, *prompt.encode()]
    assert llama.generate(prompt, max_tokens=1, special=True).prompt_tokens == [256, 257, *b"hi", 258]


@pytest.mark.parametrize("verb", ["generate -n 1", "tokenize", "attention", "lens"])
def test_a_name_in_a_text_is_remarked_on(verb, path, capsys, main):
    assert main([*verb.split(), "-m", str(path), "a<|user|>b<|user|>"]) == 0
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "'<|user|>', a control token's name" in message and "`chat`" in message
    assert ("--parse-special" in message) == (verb in ("generate -n 1", "tokenize"))


@pytest.mark.parametrize("text", ["a<user>b", "<|nobody|>", "<| user |>", ""])
def test_other_texts_are_not_remarked_on(text, path, capsys, main):
    assert main(["tokenize", "-m", str(path), text]) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("option", ["--parse-special", "--special"])
def test_special_on_the_command_line(option, path, capsys, main):
    assert main(["tokenize", option, "-m", str(path), "<|user|>b"]) == 0
    out, err = capsys.readouterr()
    assert [int(line.split()[0]) for line in out.splitlines()] == [256, 257, 98]
    assert err == ""
    arguments = ["generate", "-m", str(path), option, "-n", "1", "--json", "<|user|>b"]
    assert main(arguments) == 0
    assert '"prompt_tokens": [256, 257, 98]' in capsys.readouterr().out


def test_help_says_how_names_are_read(capsys, main):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    help_text = " ".join(capsys.readouterr().out.split())
    assert (
        "The names of control tokens in a text are plain text, unless --parse-special is given" in help_text
    )


@pytest.fixture
def stdin(monkeypatch):
    import io
    import sys

    return lambda data: monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def ids_of(out):
    return [int(line.split()[0]) for line in out.splitlines()]


def test_a_byte_order_mark_is_left_out_and_remarked_on(path, stdin, capsys, main):
    stdin(codecs.BOM_UTF8 + b"hi\n")
    assert main(["tokenize", "-m", str(path)]) == 0
    from_stdin = capsys.readouterr()
    assert main(["tokenize", "-m", str(path), "\ufeffhi"]) == 0
    from_argument = capsys.readouterr()
    for (out, err), source in ((from_stdin, "standard input"), (from_argument, "the text")):
        assert ids_of(out) == [256, *b"hi"]
        assert err == f"numpy-llama: {source} begins with a byte order mark, which is left out\n"


def test_only_a_mark_at_the_start_is_one(path, capsys, main):
    assert main(["tokenize", "-m", str(path), "a\ufeff"]) == 0
    out, err = capsys.readouterr()
    assert ids_of(out) == [256, *b"a", *codecs.BOM_UTF8] and err == ""


def test_a_file_may_begin_with_a_mark(path, tmp_path, capsys, main):
    text = "To be, or not to be. " * 6
    files = [tmp_path / "plain.txt", tmp_path / "marked.txt"]
    files[0].write_text(text, "utf-8")
    files[1].write_text(text, "utf-8-sig")
    outputs = []
    for file in files:
        assert main(["perplexity", "-m", str(path), "--ctx", "32", str(file)]) == 0
        outputs.append(capsys.readouterr())
    assert outputs[0].out == outputs[1].out
    assert outputs[0].err == "" and "marked.txt begins with a byte order mark" in outputs[1].err


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_named(encoding, stdin, capsys, main):
    stdin("\ufeffhi".encode(encoding) if encoding != "utf-16" else "hi".encode(encoding))
    assert main(["tokenize"]) == 2
    assert "it begins as UTF-16: iconv -f UTF-16 -t UTF-8" in capsys.readouterr().err


def test_a_byte_of_an_argument_that_is_no_utf_8_is_named():
    with pytest.raises(TextError, match=r"character 1 .* half a surrogate pair: byte 0xe9 of"):
        byte_level().encode("a\udce9")


@pytest.mark.parametrize("option", ["--top-k=5", "--top-p=0.5", "--min-p=0.1"])
def test_a_filter_without_a_temperature_is_remarked_on(option, path, capsys, main):
    arguments = ["generate", "-m", str(path), "-n", "1", option, "hi"]
    assert main(arguments) == 0
    name = option.partition("=")[0]
    assert f"{name} has no effect at temperature 0" in capsys.readouterr().err
    assert main([*arguments, "--temperature", "1"]) == 0
    assert capsys.readouterr().err == ""
