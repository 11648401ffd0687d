"""The program on Windows and on macOS, as far as Linux can imitate them (helpers/other_systems.py)."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
from helpers.other_systems import CPU_NAME, commands, interpreter
from helpers.tiny_models import SPEAKER, write_speaker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux imitates the others")

SYSTEMS = ["windows", "macos"]
MODEL = ["-m", "model.gguf"]
CHAT = ["chat", *MODEL, "--chat-format", "chatml", "-n", "5"]
TRAIN = ["train", "corpus.txt", "--out", "new", "--dim", "32", "--layers", "1", "--heads", "1"]
TRAIN += ["--kv-heads", "1", "--vocab-size", "300", "--seq-len", "64", "--batch-size", "4"]
TUNE = ["finetune", "facts.jsonl", "--out", "adapter", "--seq-len", "64", "--rank", "2"]
FULL = ["--method", "full", "--seq-len", "64"]
# Command, standard input, exit code. Those in PLAIN print the same on every system.
PLAIN = {
    "tokenize": (["tokenize", *MODEL, "na\u00efve \u65e5"], "", 0),
    "tokenize, piped": (["tokenize", *MODEL], "na\u00efve \u65e5", 0),
    "generate": (["generate", *MODEL, "The", "-n", "6", "--temperature", "2", "--seed", "3"], "", 0),
    "generate, numpy": (["generate", *MODEL, "The", "-n", "6", "--backend", "numpy"], "", 0),
    "beams": (["generate", *MODEL, "The", "-n", "4", "--beams", "3"], "", 0),
    "generate, a grammar": (["generate", *MODEL, "The", "-n", "9", "--regex", "(\u00e4|\u65e5)+"], "", 0),
    "generate, a bad grammar": (["generate", *MODEL, "The", "--regex", "("], "", 2),
    "chat": (CHAT, "\u00c4nne?\n", 0),
    "attention": (["attention", *MODEL, "The fox"], "", 0),
    "lens": (["lens", *MODEL, "The fox"], "", 0),
    "perplexity": (["perplexity", *MODEL, "corpus.txt", "--ctx", "32"], "", 0),
}
OTHERS = {
    "doctor": (["doctor"], "", 0),
    "info": (["info", "model.gguf"], "", 0),
    "bench": (["bench", *MODEL, "-p", "4", "-n", "2", "-r", "1"], "", 0),
    "a new session": (["generate", *MODEL, "The", "-n", "3", "--session", "s.session"], "", 0),
    "an old session": (["generate", *MODEL, "The", "-n", "3", "--session", "s.session"], "", 0),
    "convert": (["convert", "model.gguf", "out.gguf", "--dtype", "q8"], "", 0),
    "convert, replace": (["convert", "model.gguf", "out.gguf", "--dtype", "bf16"], "", 0),
    "convert, itself": (["convert", "out.gguf", "out.gguf", "--dtype", "q8"], "", 2),
    "train": ([*TRAIN, "--iters", "2"], "", 0),
    "train, resume": ([*TRAIN, "--iters", "3", "--resume"], "", 0),
    "finetune": ([*TUNE, "-m", "new", "--iters", "2"], "", 0),
    "finetune, resume": ([*TUNE, "-m", "new", "--iters", "3", "--resume"], "", 0),
    "finetune, all": ([*TUNE[:3], "all", *MODEL, *FULL, "--iters", "1"], "", 0),
    "finetune, all, resume": ([*TUNE[:3], "all", *MODEL, *FULL, "--iters", "2", "--resume"], "", 0),
    "an adapter": (["generate", "-m", "new", "--adapter", "adapter:0.5", "The", "-n", "3"], "", 0),
    "merge": (["merge", "-m", "new", "--adapter", "adapter", "--out", "empty"], "", 0),
    "the merged model": (["generate", "-m", "empty", "The", "-n", "3"], "", 0),
}
ALL = PLAIN | OTHERS


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What became of every command on each system: {system: {name: (code, output, remarks)}}."""
    found = {}
    for system in ("linux", *SYSTEMS):
        folder = tmp_path_factory.mktemp(system)
        write_speaker(folder / "model.gguf", replace(SPEAKER, max_seq_len=256))
        (folder / "empty").mkdir()
        text = "".join(f"The fox {i} sees \u00e4 crow.\n" for i in range(60))
        (folder / "corpus.txt").write_text(text, encoding="utf-8")
        facts = [{"prompt": f"{i} is", "completion": f" \u00e4 {i}"} for i in range(6)]
        (folder / "facts.jsonl").write_text("\n".join(map(json.dumps, facts)), encoding="utf-8")
        given = [(command, stdin) for command, stdin, _ in ALL.values()]
        found[system] = dict(zip(ALL, commands(system, given, folder), strict=True))
    return found


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("system", SYSTEMS)
def test_every_command_runs(done, system, name):
    code, _, remarks = done[system][name]
    assert (code, "Traceback" in remarks) == (ALL[name][2], False), remarks


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("system", SYSTEMS)
def test_the_output_is_that_of_linux(done, system, name):
    assert done[system][name] == done["linux"][name]


@pytest.mark.parametrize("system", SYSTEMS)
def test_doctor_names_the_cpu(done, system):
    assert CPU_NAME in done[system]["doctor"][1]


@pytest.mark.parametrize("system", SYSTEMS)
def test_the_room_of_tasks_is_imported(system):
    """After lm-eval and its many packages, which have ways of their own with each system."""
    names = ", ".join(f"numpy_llama.evaluation.{name}" for name in ("harness", "run", "store", "tasks"))
    *command, code = interpreter(system, f"import {names}")
    command = [one for one in command if one not in ("-W", "error")]
    done = subprocess.run(
        [*command, f"import datasets, lm_eval.tasks\n{code}"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
