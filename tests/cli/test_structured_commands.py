"""`generate` and `chat` with --json-schema, --regex and --grammar."""

import json
import os

import pytest
from helpers.command_line import assert_refused, run

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string"}, "age": {"type": "integer"}},
    "required": ["name", "age"],
    "additionalProperties": False,
}
QUESTION = "As JSON: Anna is 34 years old."


@pytest.fixture
def schema(tmp_path):
    path = tmp_path / "person.json"
    path.write_text(json.dumps(SCHEMA))
    return str(path)


def test_chat_prints_json(smollm2_path, schema):
    done = run("chat", "-m", str(smollm2_path), QUESTION, "--json-schema", schema)
    assert (done.stdout, done.stderr) == (b'{"name":"Anna","age":34}\n', b"")


def test_json_and_a_schema_are_two_things(smollm2_path, schema):
    done = run("chat", "-m", str(smollm2_path), QUESTION, "--json-schema", schema, "--json")
    result = json.loads(done.stdout)
    assert json.loads(result["text"]) == {"name": "Anna", "age": 34} and result["finish_reason"] == "stop"


def test_generate_and_chat_follow_a_regular_expression(smollm2_path):
    for verb in ("generate", "chat"):
        done = run(verb, "-m", str(smollm2_path), "Is grass green?", "--regex", "Yes|No")
        assert done.stdout in (b"Yes\n", b"No\n")


def test_a_grammar_in_a_file(smollm2_path, tmp_path):
    (tmp_path / "list.lark").write_text('start: item item item\nitem: "- " /[A-Za-z ]{1,12}/ "\\n"\n')
    done = run("chat", "-m", str(smollm2_path), "Name colours.", "--grammar", str(tmp_path / "list.lark"))
    lines = done.stdout.decode().splitlines()
    assert len(lines) == 3 and all(line.startswith("- ") for line in lines)


@pytest.mark.parametrize("more", [[], ["--json"]], ids=["text", "json"])
def test_a_text_that_was_cut_gets_a_note(smollm2_path, schema, more):
    done = run("chat", "-m", str(smollm2_path), QUESTION, "--json-schema", schema, "-n", "4", *more)
    assert done.returncode == 0 and b"cut after 4 tokens" in done.stderr and b"--max-tokens" in done.stderr
    assert not more or json.loads(done.stdout)["finish_reason"] == "length"


REFUSED = [
    (["--regex", "(a"], 2, ["regex", "unclosed group"]),
    (["--json-schema", "not.json"], 2, ["json_schema", '"not"']),
    (["--json-schema", "broken.json"], 1, ["broken.json", "no JSON", "line 1 column 10"]),
    (["--json-schema", "list.json"], 1, ["list.json", "wanted a JSON object"]),
    (["--json-schema", "nothing.json"], 1, ["nothing.json", "not there"]),
    (["--grammar", "broken.lark"], 2, ["grammar", "line 2, column 8", "foo"]),
    (["--grammar", "latin.lark"], 2, ["latin.lark is not UTF-8"]),
    (["--regex", "a", "--grammar", "broken.lark"], 2, ["not allowed with"]),
]


@pytest.mark.parametrize("options, code, words", REFUSED, ids=lambda value: str(value)[:40])
def test_what_is_wrong_is_refused_before_a_model_is_loaded(options, code, words, tmp_path):
    (tmp_path / "not.json").write_text('{"not": {}}')
    (tmp_path / "broken.json").write_text('{"type": }')
    (tmp_path / "list.json").write_text("[]")
    (tmp_path / "broken.lark").write_text('\nstart: foo "a"\n')
    (tmp_path / "latin.lark").write_bytes(b'start: "\xe9"')
    for verb in ("generate", "chat"):
        assert_refused(run(verb, "-m", "no-such-model", "x", *options, cwd=tmp_path), code, *words)


def test_a_beam_search_takes_no_form():
    done = run("generate", "x", "--beams", "2", "--regex", "a")
    assert_refused(done, 2, "--regex has no place in a beam search")


def test_without_the_extra_one_line_names_it(tmp_path):
    (tmp_path / "llguidance.py").write_text("raise ImportError")
    env = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = run("generate", "x", "--regex", "a", env=env)
    assert_refused(done, 1, 'pip install "numpy_llama[structured]"')
