"""`numpy-llama eval` as a user meets it."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from helpers.command_line import PROGRAM, assert_refused, run
from helpers.ranks import on_ranks
from helpers.tiny_models import SPEAKER, write_speaker

QUESTIONS = [
    {"query": f"{i} and {i} are", "choices": [str(2 * i), f"{i} fishes", "a long way home"], "gold": i % 3}
    for i in range(1, 8)
]
COUNTS = ("requests", "tokens", "computed")


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """A model and a file of questions."""
    folder = tmp_path_factory.mktemp("eval")
    model = write_speaker(folder / "m.gguf", replace(SPEAKER, max_seq_len=128))
    return str(model), str(write(folder / "sums.jsonl", QUESTIONS))


@pytest.fixture
def evaluate(main, capsys, monkeypatch):
    """The command in this process, for its libraries take seconds to import: -> (code, stdout, stderr)."""
    monkeypatch.setenv("TQDM_DISABLE", "1")  # the command sets it

    def evaluate(*arguments: str) -> tuple[int, str, str]:
        try:
            code = main(["eval", *arguments])
        except SystemExit as end:
            code = end.code
        return (code, *capsys.readouterr())

    return evaluate


@pytest.fixture
def evaluated(evaluate):
    """What the command prints with --json."""

    def evaluated(*arguments: str) -> dict:
        code, stdout, stderr = evaluate(*arguments, "--json")
        assert code == 0, stderr
        return json.loads(stdout)

    return evaluated


@pytest.fixture
def refused(evaluate):
    """Check that the last line on stderr has these words, with this exit code and no output."""

    def refused(code: int, words: str, *arguments: str) -> None:
        found, stdout, stderr = evaluate(*arguments)
        assert (found, stdout) == (code, "") and words in stderr.splitlines()[-1]

    return refused


def test_the_table_and_json_have_the_same_numbers(files, evaluate, evaluated):
    model, tasks = files
    found = evaluated("-m", model, "--tasks", tasks)
    (result,) = found["results"]
    assert result.keys() == {"task", "items", "num_fewshot", "metrics"}
    assert (result["task"], result["items"], result["num_fewshot"]) == ("sums", 7, 0)
    assert found["requests"] == 21 and 0 < found["computed"] < found["tokens"] and found["seconds"] > 0
    code, stdout, _ = evaluate("-m", model, "--tasks", tasks)
    head, *rows, last = stdout.splitlines()
    assert (code, head.split()) == (0, ["task", "items", "shots", "metric", "value", "standard", "error"])
    assert rows[0].split()[:3] == ["sums", "7", "0"]
    for row, (name, metric) in zip(rows, result["metrics"].items(), strict=True):
        assert row.split()[-3:] == [name, f"{metric['value']:.4f}", f"{metric['standard_error']:.4f}"]
    assert last.startswith(f"21 requests, {found['tokens']} tokens, {found['computed']} computed, ")


def test_limit_and_examples(files, evaluated):
    found = evaluated("-m", files[0], "--tasks", files[1], "--limit", "1", "--num-fewshot", "2")["results"][0]
    assert (found["items"], found["num_fewshot"]) == (1, 2)
    assert found["metrics"]["acc"]["standard_error"] is None


def test_the_chat_template_is_applied(files, evaluated, refused, smollm2_path):
    arguments = "-m", str(smollm2_path), "--tasks", files[1], "--limit", "1"
    plain, chat = evaluated(*arguments), evaluated(*arguments, "--apply-chat-template")
    assert chat["tokens"] > plain["tokens"]
    refused(1, "no chat template", "-m", files[0], "--tasks", files[1], "--apply-chat-template")


def test_requests_beyond_the_context_are_counted(files, evaluate, tmp_path):
    long = write(tmp_path / "long.jsonl", [QUESTIONS[0] | {"query": "and so on " * 20}] * 2)
    code, _, stderr = evaluate("-m", files[0], "--tasks", str(long))
    assert code == 0 and "6 of 6 requests do not fit the context" in stderr


@pytest.mark.parametrize("content", ["{\n", '{"query": "a"}\n', None])
def test_a_wrong_file_is_refused_before_the_model_is_loaded(content, refused, tmp_path):
    path = tmp_path / "mine.jsonl"
    if content is not None:
        path.write_text(json.dumps(QUESTIONS[0]) + "\n" + content)
    words = "is not there" if content is None else "mine.jsonl, line 2"
    refused(1, words, "-m", "no-such-model", "--tasks", str(path))


def test_wrong_usage_is_refused(files, refused):
    model, tasks = files
    refused(2, "--tasks", "-m", model)
    refused(2, "--limit", "-m", model, "--tasks", tasks, "--limit", "0")
    refused(2, "two tasks have the name 'sums'", "-m", model, "--tasks", f"{tasks},{tasks}")
    refused(2, "~no-such-user/x.jsonl", "-m", model, "--tasks", "~no-such-user/x.jsonl")
    refused(1, "/no/such/folder/r", "-m", model, "--tasks", tasks, "--out", "/no/such/folder/r")


def test_without_the_extra_one_line_names_it(files, tmp_path):
    (tmp_path / "lm_eval.py").write_text("raise ImportError('No module named lm_eval')\n")
    path = os.pathsep.join([str(tmp_path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = run("eval", "--tasks", files[1], env={**os.environ, "PYTHONPATH": path})
    assert_refused(done, 1, 'pip install "numpy_llama[eval]"')


def test_after_ctrl_c_the_same_command_continues(files, evaluated, tmp_path):
    """The results are those of a run without an interruption, and nothing is computed twice."""
    out = tmp_path / "results.jsonl"
    rows = [row | {"query": f"{n}: {row['query']}"} for n in range(60) for row in QUESTIONS]
    many = write(tmp_path / "many.jsonl", rows)
    arguments = ["-m", files[0], "--tasks", str(many)]
    process = subprocess.Popen(
        [PROGRAM, "eval", *arguments, "--out", str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    while process.poll() is None and (not out.exists() or out.read_bytes().count(b"\n") < 20):
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    kept = out.read_bytes().count(b"\n") - 1
    assert (process.returncode, stdout) == (130, b"") and 0 < kept < 3 * len(rows)
    assert stderr.decode() == f"numpy-llama: {out} has {kept} results: the same command continues\n"
    again, whole = evaluated(*arguments, "--out", str(out)), evaluated(*arguments)
    assert again["results"] == whole["results"]
    assert again["computed"] < whole["computed"] and again["tokens"] == whole["tokens"]
    assert evaluated(*arguments, "--out", str(out))["computed"] == 0


def test_results_of_another_model_are_not_used(files, evaluated, refused, tmp_path):
    model, tasks = files
    out = tmp_path / "results.jsonl"
    evaluated("-m", model, "--tasks", tasks, "--limit", "1", "--out", str(out))
    before = out.read_bytes()
    other = str(write_speaker(tmp_path / "other.gguf", format="Q8_0"))
    refused(1, "the results of another model", "-m", other, "--tasks", tasks, "--out", str(out))
    assert out.read_bytes() == before


def test_two_ranks_get_the_results_of_one(files, evaluated):
    model, tasks = files
    command = [
        sys.executable,
        "-m",
        "numpy_llama",
        "eval",
        "-m",
        model,
        "--tasks",
        tasks,
        "--limit",
        "4",
        "--json",
    ]
    done = on_ranks(2, *command)
    assert (done.returncode, done.stderr) == (0, b"")
    both, one = json.loads(done.stdout), evaluated("-m", model, "--tasks", tasks, "--limit", "4")
    assert both["results"] == one["results"]
    assert [both[name] for name in COUNTS] == [one[name] for name in COUNTS]
