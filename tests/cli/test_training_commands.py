"""`train` and `finetune` as a user meets them: what they print and write, Ctrl-C and mistakes."""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from helpers.command_line import PROGRAM, assert_refused, run
from helpers.tiny_models import write_speaker
from helpers.training import CORPUS, begin

from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.cli import finetune, runs, train
from numpy_llama.errors import ParameterError
from numpy_llama.training.run import open_folder

SMALL = ["--dim", "16", "--layers", "1", "--heads", "2", "--kv-heads", "1", "--vocab-size", "300"]
SMALL += ["--seq-len", "16", "--batch-size", "4", "--backend", "numpy"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("commands")
    (folder / "corpus.txt").write_text(CORPUS)
    facts = [{"prompt": f"{i} is", "completion": f" {i + 1}"} for i in range(6)]
    (folder / "facts.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    write_speaker(folder / "model.gguf")
    return folder


def test_train_makes_a_model_that_generate_runs(folder, tmp_path):
    out = str(tmp_path / "run1")
    done = run("train", str(folder / "corpus.txt"), "--out", out, *SMALL, "--iters", "6", "--eval-every", "3")
    assert done.returncode == 0, done.stderr.decode()
    lines = done.stdout.decode().splitlines()
    assert lines[0].split() == ["step", "loss", "valid", "lr", "norm", "tokens/s", "of", "FMA", "left"]
    assert [line.split()[0] for line in lines if line[:7].strip().isdigit()] == ["1", "3", "6"]
    assert any("sample: " in line for line in lines) and lines[-1].split() == ["step", "1", "6"]
    notes = done.stderr.decode().splitlines()
    assert "parameters" in notes[0] and "memory: " in notes[1] and "weights" in notes[1]
    assert "log.csv" in notes[2] and f"generate -m {out}" in notes[3]
    done = run("generate", "-m", out, "The", "-n", "3", "--json")
    assert len(json.loads(done.stdout)["tokens"]) <= 3 and done.returncode == 0


def test_finetune_makes_an_adapter_in_pefts_form(folder, tmp_path):
    out = tmp_path / "adapter"
    arguments = ["-m", str(folder / "model.gguf"), "--iters", "2", "--seq-len", "16", "--backend", "numpy"]
    done = run("finetune", str(folder / "facts.jsonl"), "--out", str(out), *arguments, "--rank", "2")
    assert done.returncode == 0, done.stderr.decode()
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (2, 4)
    assert config["base_model_name_or_path"] == str(folder / "model.gguf")
    assert f"--adapter {out}" in done.stderr.decode().splitlines()[-1]


def test_ctrl_c_saves_and_resume_continues(folder, tmp_path):
    arguments = ["train", str(folder / "corpus.txt"), "--out", str(tmp_path / "run"), *SMALL]
    arguments += ["--iters", "100000", "--report-every", "1"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen([PROGRAM, *arguments], **pipes) as process:
        while process.stdout.readline().split()[:1] != [b"5"]:
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in stderr
    assert b"is saved: --resume continues" in stderr
    (step,) = [int(word) for word in stderr.split(b"stopped after step ")[1].split(b",")[:1]]
    assert step >= 5
    done = run(*arguments, "--iters", str(step + 1), "--resume")
    assert f"resumed after step {step} of {step + 1}".encode() in done.stderr and done.returncode == 0
    assert len((tmp_path / "run" / "log.csv").read_text().splitlines()) >= step


def test_a_second_ctrl_c_claims_no_saved_step(folder, tmp_path, monkeypatch, capsys):
    """It ends the first save: there is no state then."""
    run = begin(tmp_path / "run", folder / "corpus.txt")

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(run.trainer, "step", interrupt)
    monkeypatch.setattr(run, "save", interrupt)
    monkeypatch.setattr(runs.Machine, "fma_peak", lambda self: 1.0)
    args = argparse.Namespace(threads=1, report_every=1, eval_every=1, save_every=1, seed=0, resume=False)
    with pytest.raises(KeyboardInterrupt):
        runs.carry_out(run, None, None, args, run.trainer.rows[0], 0.0)
    assert "is saved" not in capsys.readouterr().err
    assert not (tmp_path / "run" / "state.safetensors").exists()


def test_the_loss_of_the_test_split_ends_a_run(folder, tmp_path):
    """All of its rows, with the weights at the end; it is that of validation if the rows are the same."""
    (tmp_path / "data").mkdir()
    for split in ("train", "valid", "test"):
        (tmp_path / "data" / f"{split}.jsonl").write_bytes((folder / "facts.jsonl").read_bytes())
    out = tmp_path / "a b"
    arguments = ["-m", str(folder / "model.gguf"), "--iters", "2", "--seq-len", "16", "--backend", "numpy"]
    done = run("finetune", str(tmp_path / "data"), "--out", str(out), *arguments)
    lines = done.stdout.decode().splitlines()
    (valid,) = [line.split()[2] for line in lines if line[:7].strip() == "2"]
    assert lines[-1] == f"test: loss {valid}, on 6 rows"
    assert f"--adapter '{out}'" in done.stderr.decode().splitlines()[-1]


def test_the_folder_is_taken_before_the_texts_are_read(folder, tmp_path, main, monkeypatch):
    """And until the end: a second command would write into it."""
    refused = []

    def other(prepare, *arguments, **options):
        with pytest.raises(ParameterError, match="trains in it now"), open_folder(tmp_path / "run", True):
            pass
        refused.append(prepare)
        return prepare(*arguments, **options)

    for module, name in ((train, "pretrain"), (finetune, "finetune"), (runs, "sample")):
        monkeypatch.setattr(module, name, partial(other, getattr(module, name)))
    rest = ["--out", str(tmp_path / "run"), "--iters", "1"]
    assert main(["train", str(folder / "corpus.txt"), *rest, *SMALL]) == 0
    shutil.rmtree(tmp_path / "run")
    rest += ["-m", str(folder / "model.gguf"), "--seq-len", "16", "--backend", "numpy"]
    assert main(["finetune", str(folder / "facts.jsonl"), *rest]) == 0
    assert len(refused) == 4


def test_a_run_that_has_all_its_steps_says_so(folder, tmp_path):
    command = ["train", str(folder / "corpus.txt"), "--out", str(tmp_path / "run"), *SMALL, "--resume"]
    done = run(*command, "--iters", "2")
    assert done.returncode == 0 and b"run has no saved step: the run begins anew" in done.stderr
    done = run(*command, "--iters", "2")
    assert done.returncode == 0 and b"all steps are made; a larger --iters continues" in done.stderr
    assert b"tokens/s" not in done.stdout
    done = run(*command, "--iters", "1")
    assert_refused(done, 2, "run has made 2 steps, --iters is 1: a larger --iters continues")


def test_full_fine_tuning_runs_without_the_c_kernels(folder, tmp_path):
    """From the first step to the file: its weights keep their format."""
    arguments = ["-m", str(folder / "model.gguf"), "--iters", "1", "--seq-len", "16", "--backend", "numpy"]
    arguments += ["--method", "full", "--out", str(tmp_path / "run")]
    code = "import sys; sys.modules['numpy_llama.backend._kernels'] = None; import numpy_llama.cli as cli; "
    command = [sys.executable, "-c", f"{code}sys.exit(cli.main(sys.argv[1:]))"]
    done = subprocess.run(
        [*command, "finetune", str(folder / "facts.jsonl"), *arguments], capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    assert open_checkpoint(tmp_path / "run" / "model.gguf").weights()


def test_a_reader_that_ends_saves_the_run(folder, tmp_path):
    command = f"{PROGRAM} train {folder / 'corpus.txt'} --out {tmp_path / 'run'} {' '.join(SMALL)}"
    command += " --iters 100000 --report-every 1 | head -n 4"
    done = subprocess.run(["sh", "-c", command], capture_output=True, timeout=60)
    assert len(done.stdout.splitlines()) == 4 and (tmp_path / "run" / "state.safetensors").exists()
    assert b"is saved: --resume continues" in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "verb, data, options, code, found",
    [
        ("train", "none.txt", [], 1, "none.txt is not there; wanted a text"),
        ("train", "corpus.txt", ["--kv-heads", "3"], 1, "must be a multiple of n_kv_heads 3"),
        ("train", "corpus.txt", ["--vocab-size", "9"], 1, "give another --vocab-size"),
        ("train", "corpus.txt", ["--lr", "-1"], 2, "'-1' is not a number, 0 or above"),
        ("train", "facts.jsonl", [], 2, "line 1: training from scratch takes texts"),
        ("finetune", "facts.jsonl", ["--targets", "q_proj,wq"], 2, "targets has 'wq'"),
        (
            "finetune",
            "facts.jsonl",
            ["--method", "full", "--rank", "2"],
            2,
            "rank is for --method lora or dpo",
        ),
        (
            "finetune",
            "facts.jsonl",
            ["--method", "full", "--rslora"],
            2,
            "rslora is for --method lora or dpo",
        ),
        ("finetune", "facts.jsonl", ["--beta", "0.2"], 2, "beta is for --method dpo, the method is lora"),
        ("finetune", "facts.jsonl", ["--alpha", "0"], 2, "alpha is 0.0, it must be above 0"),
        ("finetune", "facts.jsonl", ["--method", "dpo"], 2, "line 1 has completions; --method dpo"),
        ("finetune", "odd.jsonl", [], 1, "odd.jsonl, line 2 is no JSON"),
    ],
)
def test_a_mistake_is_one_line(verb, data, options, code, found, folder, tmp_path):
    (folder / "odd.jsonl").write_text('{"text": "a"}\n{"text": \n')
    model = ["-m", str(folder / "model.gguf")] if verb == "finetune" else []
    done = run(
        verb, str(folder / data), "--out", str(tmp_path / "run"), *model, *options, "--backend", "numpy"
    )
    assert_refused(done, code, found)


def test_a_folder_of_another_run_is_not_touched(folder, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run("train", str(folder / "corpus.txt"), "--out", str(tmp_path), *SMALL)
    assert_refused(done, 2, "has files, and no run that can be resumed: give another --out")
    assert os.listdir(tmp_path) == ["notes.txt"]
