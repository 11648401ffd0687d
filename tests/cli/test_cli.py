"""The command line as a user meets it: what it prints where, its exit codes, and never a traceback."""

import json
import math
import os
import signal
import subprocess
import time

import pytest
from helpers import generations
from helpers.command_line import PROGRAM, assert_refused, run, written
from helpers.terminal import Terminal

import numpy_llama as nl
from numpy_llama.cli import common


def test_chat_answers(smollm2_path):
    done = run("chat", "-m", str(smollm2_path), "Name the capital of France.")
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"The capital of France is Paris.\n"


def test_chat_reads_the_question_from_a_pipe(smollm2_path):
    done = run("chat", "-m", str(smollm2_path), stdin=b"Name the capital of France.\n")
    assert done.stdout == b"The capital of France is Paris.\n"


def test_a_system_message_changes_the_answer(smollm2_path):
    llama = nl.load(smollm2_path)
    messages = [
        {"role": "system", "content": "You are a pirate."},
        {"role": "user", "content": "Who are you?"},
    ]
    expected = llama.chat(messages, max_tokens=12).text
    done = run("chat", "-m", str(smollm2_path), "--system", "You are a pirate.", "-n", "12", "Who are you?")
    assert done.stdout.decode().removesuffix("\n") == expected


def test_generate_is_the_python_face_and_json_has_everything(smollm2_path):
    llama = nl.load(smollm2_path)
    expected = llama.generate("Once upon a time", max_tokens=16)
    arguments = ["generate", "-m", str(smollm2_path), "-n", "16"]
    assert run(*arguments, "Once upon a time").stdout.decode() == expected.text + "\n"
    assert run(*arguments, stdin=b"Once upon a time\n").stdout.decode() == expected.text + "\n"
    ids = ",".join(map(str, expected.prompt_tokens))
    assert run(*arguments, "--prompt-ids", ids).stdout.decode() == expected.text + "\n"

    asked = run(*arguments, "--json", "--top-logprobs", "2", "Once upon a time")
    lines = asked.stdout.decode().splitlines()
    assert len(lines) == 1
    result = json.loads(lines[0])
    assert result["text"] == expected.text
    assert result["tokens"] == expected.tokens
    assert result["prompt_tokens"] == expected.prompt_tokens
    assert result["finish_reason"] == "length"
    assert all(value > 0 for value in result["timings"].values())
    assert [one["id"] for one in result["logprobs"]] == expected.tokens
    for one in result["logprobs"]:
        first, second = one["top_logprobs"]  # the likeliest was chosen
        assert first == {key: one[key] for key in ("id", "token", "bytes", "logprob")}
        assert bytes(one["bytes"]).decode() == one["token"] and second["logprob"] < one["logprob"] < 0


def test_json_has_logprobs_only_if_asked(smollm2_path):
    done = run("generate", "-m", str(smollm2_path), "-n", "1", "--json", "hi")
    assert "logprobs" not in json.loads(done.stdout)


def test_beams_print_the_best_text_and_json_has_all(smollm2_path):
    expected = nl.load(smollm2_path).beam_search(
        "Once upon a time", beams=3, length_penalty=0.5, num_return_sequences=3, max_tokens=8
    )
    arguments = ["generate", "-m", str(smollm2_path), "-n", "8", "--beams", "3", "--length-penalty", "0.5"]
    assert run(*arguments, "Once upon a time").stdout.decode() == expected[0].text + "\n"
    result = json.loads(run(*arguments, "--json", "Once upon a time").stdout)
    assert (result["text"], result["tokens"]) == (expected[0].text, expected[0].tokens)
    assert [(one["score"], one["text"], one["tokens"]) for one in result["beams"]] == [
        (one.score, one.text, one.tokens) for one in expected
    ]
    assert {one["finish_reason"] for one in result["beams"]} == {"length"}


def test_results_in_json_have_no_nan():
    results = {
        "a": [1.5, math.nan, (math.inf, -math.inf)],
        "b": {"c": math.nan},
        "d": "NaN",
        "e": True,
        "f": 3,
    }
    expected = {"a": [1.5, None, [None, None]], "b": {"c": None}, "d": "NaN", "e": True, "f": 3}
    assert json.loads(common.results_json(results)) == expected


def test_the_same_seed_gives_the_same_text_on_any_number_of_threads(smollm2_path):
    arguments = ["generate", "-m", str(smollm2_path), "-n", "24", "--temperature", "1.2", "--top-p", "0.95"]
    texts = {run(*arguments, "--seed", "7", "-t", str(t), "The sea").stdout for t in (1, 2)}
    assert len(texts) == 1
    assert run(*arguments, "--seed", "8", "The sea").stdout not in texts


def test_stop_text_ends_the_output(smollm2_path):
    done = run("generate", "-m", str(smollm2_path), "--stop", " time,", "-n", "20", "--json", "Once upon a")
    result = json.loads(done.stdout)
    assert (result["text"], result["finish_reason"]) == ("", "stop")


def test_the_numpy_path_says_the_same(smollm2_path):
    done = run("chat", "-m", str(smollm2_path), "--backend", "numpy", "Name the capital of France.")
    assert done.stdout == b"The capital of France is Paris.\n"


def test_info_shows_what_is_in_the_file_and_what_it_takes(smollm2_path):
    done = run("info", str(smollm2_path))
    first, kinds = done.stdout.decode().split("\n\n")
    lines = dict(line.split(maxsplit=1) for line in first.splitlines())
    assert lines["dim"] == "576" and lines["n_kv_heads"] == "3" and lines["vocab_size"] == "49152"
    assert lines["Q4_1"].startswith("210 tensors") and lines["parameters"] == "134,515,008"
    assert lines["chat"] == "template    the model's own"
    assert lines["weights"] == "made     92.0 MiB, joined, expanded or packed on loading"
    assert lines["available"].endswith("GiB: it fits")
    assert "blk.N.attn_q.weight" in kinds and "576 x 576" in kinds and len(kinds.splitlines()) == 11


def test_info_on_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "m").mkdir()
    generations.FORMATS["HF, sharded"]("Llama 3", tmp_path / "m")
    done = run("info", str(tmp_path / "m"))
    assert done.returncode == 0 and b"tokenizer        none" in done.stdout
    assert_refused(run("generate", "-m", str(tmp_path / "m"), "x"), 1, "no tokenizer")


def test_tokenize_shows_ids_and_pieces(smollm2_path):
    done = run("tokenize", "-m", str(smollm2_path), "Hello world 12")
    assert done.stdout.decode().split() == [
        "19556",
        "'Hello'",
        "905",
        "'",
        "world'",
        "216",
        "'",
        "'",
        "33",
        "'1'",
        "34",
        "'2'",
    ]


def test_tokenize_shows_half_a_character_as_bytes(smollm2_path):
    lines = run("tokenize", "-m", str(smollm2_path), "🦙").stdout.decode().splitlines()
    assert any("b'" in line and "\\x" in line and "\\\\x" not in line for line in lines)


def test_doctor_names_the_instruction_set():
    done = run("doctor", env={**os.environ, "NUMPY_LLAMA_ISA": "scalar"})
    assert done.returncode == 0 and b"instructions   scalar, of " in done.stdout


def test_pull_prints_the_path_and_does_nothing_twice(smollm2_path):
    before = written(smollm2_path)
    done = run("pull", "smollm2-135m-instruct")
    assert done.stdout.decode() == f"{smollm2_path}\n" and written(smollm2_path) == before


def test_help_and_version():
    assert b"generate" in run("--help").stdout
    assert run("--version").stdout.decode() == f"numpy-llama {nl.__version__}\n"


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("verb", ["generate", "chat", "tokenize"])
def test_a_wrong_path_is_refused(verb):
    assert_refused(
        run(verb, "-m", "no/such.gguf", "hi"), 1, "'no/such.gguf' is neither a file or folder", "pull"
    )


@pytest.mark.parametrize("verb", ["generate", "chat", "tokenize"])
def test_files_that_are_no_models_are_refused(verb, tmp_path, smollm2_path):
    assert_refused(run(verb, "-m", str(tmp_path), "hi"), 1, str(tmp_path), "folder")
    text = tmp_path / "text.gguf"
    text.write_text("This is not a model, whatever it is called.\n")
    assert_refused(run(verb, "-m", str(text), "hi"), 1, str(text), "GGUF")
    empty = tmp_path / "empty.gguf"
    empty.touch()
    assert_refused(run(verb, "-m", str(empty), "hi"), 1, str(empty), "0 bytes")


@pytest.mark.parametrize("size", [1000, 1_000_000, 98_000_000])
def test_half_a_download_is_refused(size, tmp_path, smollm2_path):
    half = tmp_path / "half.gguf"
    with smollm2_path.open("rb") as whole:
        half.write_bytes(whole.read(size))
    assert_refused(run("generate", "-m", str(half), "hi"), 1, str(half), f"{size}")


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["-t", "0"], ["-t", "'0' is not a whole number, 1 or above"]),
        (["-t", "two"], ["-t", "'two'"]),
        (["-n", "-1"], ["-n", "'-1' is not a whole number, 0 or above"]),
        (["--temperature", "nan"], ["temperature is nan"]),
        (["--temperature", "-1"], ["temperature is -1"]),
        (["--temperature", "inf"], ["temperature is inf"]),
        (["--top-k", "0"], ["top_k is 0"]),
        (["--top-p", "1.5"], ["top_p is 1.5"]),
        (["--seed", "-3"], ["seed is -3"]),
        (["--typical-p", "2"], ["typical_p is 2"]),
        (["--penalty-window", "0"], ["penalty_window is 0"]),
        (["--logit-bias", "5"], ["--logit-bias", "'5' is not TOKEN=X"]),
        (["--logit-bias", "5=inf"], ["--logit-bias", "'5=inf' is not TOKEN=X"]),
        (["--stop", ""], ["--stop"]),
        (["--top-logprobs", "2"], ["--top-logprobs", "add --json"]),
        (["--backend", "cuda"], ["--backend", "cuda"]),
        (["--prompt-ids", "1,x"], ["--prompt-ids", "1,x"]),
        (["--prompt-ids", "1,2"], ["not both"]),
        (["--colour"], ["--colour"]),
        (["--beams", "0"], ["--beams", "'0' is not a whole number, 1 or above"]),
        (["--beams", "4", "--length-penalty", "11"], ["length_penalty is 11.0", "from -10 to 10"]),
        (["--beams", "4", "--temperature", "1"], ["temperature is 1.0, a beam search wants 0"]),
        (["--beams", "4", "--seed", "0"], ["seed is 0", "leave seed out"]),
        (["--beams", "4", "--session", "x"], ["--session has no place in a beam search"]),
        (["--beams", "4", "--top-logprobs", "0", "--json"], ["--top-logprobs has no place"]),
        (["--beams", "4", "--lookup"], ["--lookup has no place"]),
        (["--beams", "4", "--regex", "a+"], ["--regex has no place in a beam search"]),
        (["--length-penalty", "2"], ["--length-penalty is for a beam search: add --beams 4"]),
    ],
)
def test_wrong_arguments_are_refused_before_a_model_is_loaded(arguments, words):
    assert_refused(run("generate", "-m", "no/such.gguf", "hi", *arguments), 2, *words)


def test_no_or_unknown_command_is_refused():
    assert_refused(run(), 2, "COMMAND")
    assert_refused(run("sing"), 2, "sing")


def test_unknown_names_are_refused():
    assert_refused(run("pull", "gpt-5"), 1, "'gpt-5'", "smollm2-135m-instruct")


def test_ids_outside_the_vocabulary_are_refused(smollm2_path):
    for ids in ("5,49152", "5,-1", "99999999999999999999999"):
        assert_refused(run("generate", "-m", str(smollm2_path), f"--prompt-ids={ids}"), 2, "49151")


@pytest.mark.parametrize("verb", ["generate", "chat", "tokenize"])
@pytest.mark.parametrize(
    "data, words",
    [
        (b"ab\xff\xfe\x80", ["not UTF-8", "0xff", "offset 2"]),
        ("hello".encode("utf-16"), ["not UTF-8", "offset 0"]),
        (b"a\0b", ["0x00", "offset 1"]),
    ],
)
def test_input_that_is_no_text_is_refused(verb, data, words):
    assert_refused(run(verb, stdin=data), 2, *words)


def test_an_argument_that_is_no_text_is_refused(smollm2_path):
    done = subprocess.run(
        [PROGRAM.encode(), b"generate", b"-m", str(smollm2_path).encode(), b"a\xff"], capture_output=True
    )
    assert_refused(done, 2, "surrogate")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
@pytest.mark.parametrize("verb", ["generate -n 1", "tokenize", "info no/such", "doctor"])
def test_closed_streams_make_no_traceback(verb, closed, smollm2_path):
    done = subprocess.run(f"{PROGRAM} {verb} {closed}", shell=True, capture_output=True, timeout=60)
    assert b"Traceback" not in done.stderr + done.stdout and done.returncode in (0, 1, 2)


def test_nothing_to_do_is_refused(smollm2_path):
    assert_refused(run("generate", "-m", str(smollm2_path), ""), 2, "the prompt is empty")
    assert_refused(run("generate", "-m", str(smollm2_path)), 2, "the prompt is empty")  # from /dev/null
    assert_refused(run("chat", "-m", str(smollm2_path), " "), 2, "the question is empty")
    assert_refused(run("chat", "-m", str(smollm2_path)), 2, "the question is empty")


def test_a_prompt_beyond_the_context_is_refused_with_both_numbers(smollm2_path):
    done = run("generate", "-m", str(smollm2_path), stdin=b"word " * 8200)
    assert_refused(done, 1, "the prompt has 82", "the context 8192")


def test_a_full_disk_is_an_error(smollm2_path):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [PROGRAM, "chat", "-m", smollm2_path, "Name the capital of France."],
            stdout=full,
            stderr=subprocess.PIPE,
        )
    assert done.returncode == 1
    assert done.stderr == b"numpy-llama: the disk is full: the output is not complete\n"


# ---------------------------------------------------------------- ends that come from outside


def test_a_pipe_that_closes_early_ends_it_quietly(smollm2_path):
    done = subprocess.run(
        f"{PROGRAM} generate -m {smollm2_path} -n 4000 'Once upon a time' | head -c 10",
        shell=True,
        capture_output=True,
        timeout=60,  # 4,000 tokens would take longer
    )
    assert len(done.stdout) == 10 and done.stderr == b""


def test_ctrl_c_while_the_prompt_is_read(smollm2_path):
    process = subprocess.Popen(
        [PROGRAM, "generate", "-m", smollm2_path, "word " * 8000],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    time.sleep(3)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert (process.returncode, out, err) == (130, b"", b"")


def test_ctrl_c_while_it_writes_keeps_what_was_written(smollm2_path):
    process = subprocess.Popen(
        [PROGRAM, "generate", "-m", smollm2_path, "-n", "4000", "Once upon a time"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=10)
    assert process.returncode == 130 and err == b""
    assert len(first) == 20 and out.endswith(b"\n")


@pytest.fixture
def terminal(smollm2_path):
    terminal = Terminal("chat", "-m", str(smollm2_path), "-n", "200", "--temperature", "0")
    yield terminal
    terminal.close()


def test_a_conversation_on_a_terminal_has_history(terminal, smollm2_path):
    llama, messages, at = nl.load(smollm2_path), [], terminal.wait_for(b"> ")
    for question in ("Name the capital of France.", "And of Italy?"):
        messages.append({"role": "user", "content": question})
        answer = llama.chat(messages, max_tokens=200).text
        messages.append({"role": "assistant", "content": answer})
        terminal.type(question.encode() + b"\n")
        at = terminal.wait_for(question.encode(), at)
        at = terminal.wait_for(answer.encode().replace(b"\n", b"\r\n"), at)
        at = terminal.wait_for(b"\n> ", at)
    terminal.type(b"\x04")
    assert terminal.end() == 0


def test_ctrl_c_in_a_conversation_cuts_the_answer_and_then_ends_it(terminal):
    question = b"Write a very long story about a dragon."
    at = terminal.wait_for(b"> ")
    terminal.type(question + b"\n")
    at = terminal.wait_for(b"\n", terminal.wait_for(question, at))
    terminal.wait_for(b" ", at + 1)  # the answer has begun
    terminal.process.send_signal(signal.SIGINT)
    terminal.wait_for(b"\n> ", at, seconds=10)
    time.sleep(0.5)  # the prompt is seen a moment before Python waits at it
    terminal.process.send_signal(signal.SIGINT)
    assert terminal.end() == 130
