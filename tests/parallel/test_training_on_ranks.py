"""Training on ranks has the bits of one process with the same micro-batches, and ends as one process does."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import PROGRAM, assert_refused
from helpers.ranks import MPIEXEC, TOGETHER, alone, on_each, on_ranks
from helpers.tiny_models import write_speaker
from helpers.training import CORPUS

from numpy_llama.training.run import STATE
from numpy_llama.training.state import State

PROGRAMS = Path(__file__).with_name("trainings.py")
CUT = 3  # ranks that the micro-batches are cut for
OF_TIME = {"seconds", "tokens_per_second", "gflops"}
HOST = os.uname().nodename


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A model, a corpus whose last row is shorter, and answers of many lengths."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    write_speaker(folder / "model.gguf")
    (folder / "corpus.txt").write_text(CORPUS)

    def text() -> str:
        return "".join(rng.choice([*"abcde "], rng.integers(1, 20)))

    for way in ("lora", "full"):
        records = [{"prompt": f"{text()}?", "completion": text()} for _ in range(21)]
        (folder / f"{way}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    pairs = [{"prompt": f"{text()}?", "chosen": text(), "rejected": text()} for _ in range(21)]
    (folder / "dpo.jsonl").write_text("".join(json.dumps(one) + "\n" for one in pairs))
    return folder


def train(data: Path, out: Path, ranks: int, *options: str, cut: int = CUT) -> subprocess.CompletedProcess:
    """Run trainings.py. No ranks: one process."""
    command = sys.executable, str(PROGRAMS), str(data), str(out), str(cut), *options
    return on_ranks(ranks, *command) if ranks else alone(*command)


def written(out: Path) -> dict[str, object]:
    """All that the runs have written; of the logs what does not depend on time."""
    found: dict[str, object] = {}
    for path in sorted(out.rglob("*.*")):
        if path.name == "log.csv":
            with path.open(newline="") as file:
                rows = [
                    {name: x for name, x in row.items() if name not in OF_TIME}
                    for row in csv.DictReader(file)
                ]
            found[str(path.relative_to(out))] = rows
        elif path.suffix != ".png":
            found[str(path.relative_to(out))] = path.read_bytes()
    return found


def of(found: dict[str, object], *ways: str) -> dict[str, object]:
    """The files of these ways to train."""
    return {name: x for name, x in found.items() if Path(name).parts[0] in ways}


def assert_same(out: Path, wanted: dict[str, object]) -> None:
    got = written(out)
    assert got.keys() == wanted.keys()
    assert [name for name in wanted if got[name] != wanted[name]] == []


@pytest.fixture(scope="module")
def wanted(data, tmp_path_factory) -> dict[str, object]:
    """What one process writes."""
    out = tmp_path_factory.mktemp("alone")
    done = train(data, out, 0)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr.decode()
    return written(out)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_ranks_have_the_bits_of_one_process(ranks, data, wanted, tmp_path):
    """Every way to train, losses and state too. Ranks are fewer and more than the micro-batches of a step."""
    done = train(data, tmp_path, ranks)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr.decode()
    assert_same(tmp_path, wanted)


@pytest.mark.parametrize("first, then", [(3, 0), (0, 2), (2, 4)])
def test_another_number_of_ranks_continues_a_run(first, then, data, wanted, tmp_path):
    """With its micro-batches, which are cut for the ranks that it began on."""
    ways = "--ways", "train", "dpo"
    done = train(data, tmp_path, first, "--until", "3", *ways, cut=0 if first == CUT else CUT)
    assert (done.returncode, done.stdout) == (0, b"stopped\n" * 2), done.stderr.decode()
    done = train(data, tmp_path, then, *ways, cut=0)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr.decode()
    assert_same(tmp_path, of(wanted, "train", "dpo"))


def test_a_signal_leaves_the_step(data, wanted, tmp_path):
    """On rank 0 in the fourth step, as alone; on the others it has no effect. Then the run goes on."""
    for rank, fault, text, step in (("0", "interrupted", b"stopped\n", 3), ("1", "interrupted", b"", 5)):
        done = train(data, tmp_path / rank, 2, "--ways", "train", "--fault", rank, fault)
        assert (done.returncode, done.stdout, done.stderr) == (0, text, b"")
        assert State(tmp_path / rank / "train" / STATE).step == step
    done = train(data, tmp_path / "0", 2, "--ways", "train")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    done = train(data, tmp_path / "2", 2, "--ways", "train", "--fault", "0", "hung up")
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    for rank in "012":
        assert_same(tmp_path / rank, of(wanted, "train"))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_leaves_the_old_state(rank, data, tmp_path):
    done = train(data, tmp_path, 3, "--ways", "train", "--fault", str(rank), "killed")
    assert done.returncode != 0 and b"Traceback" not in done.stderr
    assert State(tmp_path / "train" / STATE).step == 2


@pytest.mark.parametrize(
    "rank, fault, words",
    [
        (0, "error", "a kernel failed"),
        (2, "error", "a kernel failed"),
        (1, "bug", r"ZeroDivisionError: two\nlines"),
        (0, "numerics", "a score is NaN"),
        (2, "numerics", "a score is NaN"),
    ],
)
def test_a_rank_that_fails_ends_all(rank, fault, words, data, tmp_path):
    done = train(data, tmp_path, 3, "--ways", "lora", "--fault", str(rank), fault)
    assert_refused(done, 1, f"rank {rank} of 3: {words}", HOST)
    assert State(tmp_path / "lora" / STATE).step == 2


def test_a_loss_that_is_not_finite_is_named_as_alone(data, tmp_path):
    """Wherever its example was computed. The other ranks run on, and the next run finds them."""
    texts = []
    for ranks in (0, 2, 3):
        done = train(data, tmp_path / str(ranks), ranks, "--ways", "lora", "dpo", "--fault", "0", "nan")
        assert (done.returncode, done.stderr) == (0, b""), done.stderr.decode()
        texts.append(done.stdout)
    assert texts[0].startswith(b"step ") and b": the loss is nan, on " in texts[0] and b"line 9" in texts[0]
    assert texts[1:] == texts[:1] * 2


def test_the_rank_with_the_least_memory_decides(data, tmp_path):
    done = train(data, tmp_path, 2, "--ways", "lora", "--fault", "1", "memory")
    assert done.returncode == 1 and b"ResourceLimitError" in done.stderr
    assert b"are available, of which 80% may be used" in done.stderr


def test_ranks_that_differ_are_refused(data, tmp_path):
    """Frozen weights are read on every rank, all other numbers come from rank 0."""
    for name, change in (("same", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        content = bytearray((data / "model.gguf").read_bytes())
        content[len(content) // 2 // 4096 * 4096] ^= change  # a weight
        (tmp_path / name / "model.gguf").write_bytes(content)
    options = "-m", "model.gguf", "--out", "run", "--seq-len", "48", "--iters", "1", "-t", "1"
    program = PROGRAM, "finetune", str(data / "lora.jsonl"), *options
    same, other = (("-wdir", str(tmp_path / name), *program) for name in ("same", "other"))
    assert_refused(on_each(same, other), 1, "model.gguf is a file of", f"on {HOST}, rank 1", "needs the same")
    isa = ("-wdir", str(tmp_path / "same"), "-env", "NUMPY_LLAMA_ISA", "scalar", *program)
    assert_refused(on_each(same, isa), 1, f"the instruction set is scalar on {HOST}, rank 1")
    done = on_each(*((*part, "--method", "full") for part in (same, other)))
    assert done.returncode == 0 and not (tmp_path / "other" / "run").exists(), done.stderr.decode()


def test_the_commands_show_what_one_process_shows(data, tmp_path):
    """Ctrl-C saves a step, and another number of ranks continues."""
    out = str(tmp_path / "run")
    options = "--batch-size", "6", "--seq-len", "24", "--vocab-size", "300", "--dim", "32", "-t", "1"
    command = PROGRAM, "train", str(data / "corpus.txt"), "--out", out, *options, "--report-every", "1"
    started = subprocess.Popen(
        [MPIEXEC, "-n", "2", *command, "--iters", "100000"], env=os.environ | TOGETHER,
        start_new_session=True, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    while not started.stdout.readline().strip().startswith(b"3 "):
        pass
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    _, err = started.communicate(timeout=120)
    step = State(tmp_path / "run" / STATE).step
    assert started.returncode == 130 and step >= 3
    assert err.endswith(
        f"numpy-llama: stopped after step {step}, which is saved: --resume continues\n".encode()
    )
    done = on_ranks(3, *command, "--iters", str(step + 2), "--resume")
    assert done.returncode == 0 and b"resumed after step" in done.stderr, done.stderr.decode()
    assert State(tmp_path / "run" / STATE).step == step + 2
