"""Programs under mpiexec as a user meets them: the text of one process, and faults that end all ranks."""

import os
import select
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from helpers.command_line import PROGRAM, assert_refused, run
from helpers.ranks import MPIEXEC, TIMEOUT, TOGETHER, alone, on_each, on_ranks
from helpers.tiny_models import SPEAKER, write_speaker
from helpers.updates import random_updates

import numpy_llama as nl
from numpy_llama.backend.limits import available_cpus
from numpy_llama.checkpoint.adapters import write_peft

HERE = Path(__file__).parent
FAULTS, REFUSALS, ARGUMENTS = (str(HERE / f"{name}.py") for name in ("with_a_fault", "refusals", "arguments"))


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    return write_speaker(tmp_path_factory.mktemp("model") / "m.gguf")


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_text_is_that_of_one_process(ranks, smollm2_path):
    for command in (
        ["generate", "-n", "30", "Once upon a time"],
        ["generate", "-n", "12", "--temperature", "1", "--seed", "7", "Once upon a time"],
        ["generate", "-n", "12", "--beams", "4", "Once upon a time"],
        ["chat", "Name the capital of France."],
        ["generate", "-n", "12", "--lookup", "One, two, three, one, two, three, one,"],
        ["generate", "-n", "6", "--draft", str(smollm2_path), "Once upon a time"],
    ):
        arguments = [*command, "-m", str(smollm2_path), "-t", "1"]
        wanted = run(*arguments)
        done = on_ranks(ranks, PROGRAM, *arguments)
        assert (done.returncode, done.stdout, done.stderr) == (0, wanted.stdout, b"")


def test_each_line_of_a_pipe_is_a_turn_of_a_conversation(smollm2_path):
    """mpiexec gives no terminal. What is no text is one line only, and the marks are not in the answers."""
    llama, messages, answers = nl.load(smollm2_path, threads=1), [], b""
    for question in ("Name the capital of France.", "And of Italy?", "And of Spain?"):
        messages.append({"role": "user", "content": question})
        messages.append({"role": "assistant", "content": llama.chat(messages, max_tokens=20).text})
        answers += messages[-1]["content"].encode() + b"\n"
    typed = b"Name the capital of France.\nAnd of Italy?\r\n\xff\n\nAnd of Spain?"
    command = PROGRAM, "chat", "-m", str(smollm2_path), "-t", "1", "-n", "20", "--temperature", "0"
    done = on_ranks(2, *command, input=typed)
    assert (done.returncode, done.stdout) == (0, answers)
    assert done.stderr.count(b"> ") == 6 and b"that is not UTF-8 text; try again\n" in done.stderr
    done = on_ranks(2, *command, "--json", input=b"Name the capital\nof France.\n")
    assert done.stdout.count(b"{") == 2 and done.stderr == b""  # one question


def test_ctrl_c_stops_an_answer(smollm2_path):
    """A terminal sends it to all. MPICH's mpiexec passes the first one on, and writes two lines."""
    command = PROGRAM, "chat", "-m", str(smollm2_path), "-t", "1", "-n", "400"
    started = subprocess.Popen(
        [MPIEXEC, "-n", "2", *command], env=os.environ | TOGETHER, start_new_session=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    started.stdin.write(b"Write a very long story about a dragon.\n")
    started.stdin.flush()
    answers = select.select([started.stdout], [], [], TIMEOUT)[0]
    os.killpg(started.pid, signal.SIGINT if answers else signal.SIGKILL)
    assert answers, "there was no answer before the end of standard input"
    out, err = started.communicate(b"Name the capital of France.\n", timeout=TIMEOUT)
    assert started.returncode == 0 and err.count(b"> ") == 3
    assert len(nl.load(smollm2_path).tokenizer.encode(out.decode())) < 300


def test_commands_of_a_loaded_model(path, tmp_path):
    text = tmp_path / "text"
    text.write_text("Once upon a time there was a text of some words. " * 5)
    arguments = "perplexity", "-m", str(path), "--ctx", "32", str(text)
    wanted = alone(PROGRAM, *arguments)
    done = on_ranks(3, PROGRAM, *arguments, "--shares", "1,1,2")
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted.stdout, b"")
    tests = "-p", "8", "-n", "4", "-d", "0,5", "-b", "1,2", "-r", "1"
    done = on_ranks(2, PROGRAM, "bench", *tests, "--json", "-m", str(path), "--shares", "auto")
    assert (done.returncode, done.stderr, done.stdout.count(b'"test"')) == (0, b"", 6)


@pytest.mark.parametrize(
    "command",
    [
        ["tokenize", "-m", "MODEL", "hi"],
        ["convert", "MODEL", "OUT", "--dtype", "q8"],
        ["convert", "MODEL", "NOWHERE", "--dtype", "q8"],
        ["merge", "-m", "MODEL", "--adapter", "LORA", "--out", "OUT"],
        ["--help"],
        ["nonsense"],
        ["info", "nothing"],
    ],
    ids=" ".join,
)
def test_a_command_without_ranks_runs_once(command, path, tmp_path):
    """On rank 0: with the same output, the same files and the same errors."""
    updates = random_updates(1, {"layers.0.attention.wq.weight": 2}, args=SPEAKER)
    (tmp_path / "lora").mkdir()
    write_peft(tmp_path / "lora", updates, SPEAKER)
    places = {
        "MODEL": str(path),
        "LORA": str(tmp_path / "lora"),
        "OUT": "out.gguf",
        "NOWHERE": "none/out.gguf",
    }
    arguments = [places.get(word, word) for word in command]
    folder, ends, written = tmp_path / "folder", [], []
    for start in (alone, partial(on_ranks, 2)):
        folder.mkdir()
        done = start(PROGRAM, *arguments, cwd=folder)
        ends.append((done.returncode, done.stdout, done.stderr))
        written.append({file.name: file.read_bytes() for file in folder.iterdir()})
        shutil.rmtree(folder)
    assert ends[0] == ends[1]
    assert written[0] == written[1] and len(written[0]) == ("OUT" in command)


def test_a_reader_that_stops_leaves_no_process_behind(smollm2_path):
    program = f"{MPIEXEC} -n 2 {PROGRAM} generate -m {smollm2_path} -t 1 -n 4000 --temperature 2 hi"
    done = alone("sh", "-c", f"{program} | head -c 5", env=TOGETHER)
    assert (done.returncode, len(done.stdout), done.stderr) == (0, 5, b"")


def test_no_run_ends_as_if_it_were_killed():
    """mpiexec does so with about one in five of these, if a rank ends by os._exit behind Finalize."""
    for _ in range(12):
        program = "from numpy_llama import parallel; parallel.ranks()"
        done = on_ranks(4, sys.executable, "-c", program, env={"MPIR_CVAR_ENABLE_HEAVY_YIELD": "0"})
        assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_refused_and_what_runs_on(ranks, path):
    done = on_ranks(ranks, sys.executable, REFUSALS, str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr.decode()


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_a_wrong_argument_is_an_error_as_in_one_process(backend, path):
    """And what has a result alone has it on ranks. The run goes on."""
    program = sys.executable, ARGUMENTS, str(path), backend
    wanted, done = alone(*program), on_ranks(2, *program)
    assert (done.returncode, done.stdout) == (0, wanted.stdout), done.stderr.decode()
    assert wanted.returncode == 0 and b"an error" in wanted.stdout


@pytest.mark.parametrize("ranks, options, code, words", [
    (5, [], 1, "5 ranks, but the model has 4 query heads"),
    (3, ["--shares", "1,2"], 2, "shares are [1.0, 2.0], they must be 3 numbers above 0"),
    (2, ["--shares", "1,x"], 2, "'1,x' is not a list of numbers above 0, such as 3,1"),
    (2, ["--adapter", "x"], 1, "x is not there"),
    (2, ["--nothing"], 2, "unrecognized arguments: --nothing"),
])  # fmt: skip
def test_impossible_options_are_one_line(ranks, options, code, words, path):
    assert_refused(on_ranks(ranks, PROGRAM, "generate", "-m", str(path), *options, "hi"), code, words)


def test_shares_need_ranks(path):
    assert_refused(run("generate", "-m", str(path), "hi", "--shares", "1,2"), 2, "start with mpiexec")


@pytest.mark.parametrize("rank", [0, 1, 2])
@pytest.mark.parametrize(
    "fault, words",
    [
        ("error", "a key is beyond float16"),
        ("bug", r"ZeroDivisionError: two\nlines"),
        ("memory", "MemoryError"),
    ],
)
def test_a_rank_that_fails_ends_all(rank, fault, words, path):
    done = on_ranks(3, sys.executable, FAULTS, str(path), str(rank), fault)
    assert_refused(done, 1, f"rank {rank} of 3: {words}", os.uname().nodename)


def test_ctrl_c_is_for_rank_0(path):
    """A terminal sends it to all."""
    wanted = run("generate", "-m", str(path), "-n", "3", "hi").stdout
    done = on_ranks(2, sys.executable, FAULTS, str(path), "1", "interrupted")
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted, b"")


def test_ctrl_c_while_a_command_is_sent_ends_all(path):
    """Other ranks may have it already, and would wait in it."""
    done = on_ranks(2, sys.executable, FAULTS, str(path), "0", "interrupted while sending")
    assert (done.returncode, done.stdout, done.stderr) == (130, b"", b"")


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("fault", ["killed", "without mpiexec"])
def test_a_rank_that_is_killed_ends_all(rank, fault, path):
    assert on_ranks(2, sys.executable, FAULTS, str(path), str(rank), fault).returncode != 0


@pytest.mark.parametrize("rank, by", [(0, 1), (1, 0), (2, 0)])
def test_a_rank_that_is_stopped_ends_all(rank, by, path):
    done = on_ranks(3, sys.executable, FAULTS, str(path), str(rank), "stopped")
    assert_refused(done, 1, f"rank {by} of 3: no sign of life of {os.uname().nodename}, rank {rank}, for ")


@pytest.mark.parametrize("other", ["true", "false"])
def test_a_program_that_does_not_start_on_each_machine_ends(other):
    program = """
from numpy_llama import parallel
from numpy_llama.parallel import watch
watch.START, watch.LONGEST_START = 0.5, 1
parallel.ranks()
"""
    done = on_each((sys.executable, "-c", program), (other,))
    words = b"numpy-llama: not all processes have started after 0.5 s: can each machine start this program?\n"
    assert done.returncode != 0 and done.stderr == words


def test_the_end_of_a_script_is_the_end_of_all(path):
    done = on_ranks(3, sys.executable, FAULTS, str(path), "0", "script")
    assert done.returncode == 1 and done.stderr.endswith(b"KeyError: 'of the script'\n")


def test_the_end_of_a_script_waits_for_the_command_of_a_thread(path):
    program = """
import sys, threading, time
import numpy_llama as nl
llama = nl.load(sys.argv[1], threads=1)
def speak():
    while True:
        llama.generate("hi", max_tokens=30)
threading.Thread(target=speak, daemon=True).start()
time.sleep(0.3)
"""
    done = on_ranks(3, sys.executable, "-c", program, str(path))
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_a_rank_that_cannot_serve_ends_all():
    """Its signals are those of the main thread."""
    program = """
import threading
from numpy_llama import parallel
thread = threading.Thread(target=parallel.ranks)
thread.start()
thread.join()
"""
    done = on_ranks(2, sys.executable, "-c", program)
    assert_refused(done, 1, "rank 1 of 2: ValueError: signal only works in main thread")


def test_ranks_that_differ_are_refused(path, tmp_path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 // 4096 * 4096] ^= 1  # a weight
    for name, content in (("same", path.read_bytes()), ("other", bytes(data))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "m.gguf").write_bytes(content)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "smaller").mkdir()
    write_speaker(tmp_path / "smaller" / "m.gguf", replace(SPEAKER, hidden_dim=64, n_layers=1))
    program = PROGRAM, "generate", "-m", "m.gguf", "-n", "3", "hi"
    folders = "same", "other", "nothing", "smaller"
    same, other, nothing, smaller = (("-wdir", str(tmp_path / name), *program) for name in folders)
    text = alone(*program, cwd=tmp_path / "same").stdout
    done = on_each(same, same)
    assert (done.returncode, done.stdout, done.stderr) == (0, text, b"")
    host = os.uname().nodename
    assert_refused(
        on_each(same, other), 1, "m.gguf is a file of", f"on {host}, rank 1", "every rank needs the same"
    )
    assert_refused(on_each(same, same, nothing), 1, f"{host}, rank 2: m.gguf is not there")
    assert_refused(on_each(same, smaller), 1, "ModelArgs is ModelArgs(dim=64, n_layers=1")
    isa = ("-wdir", str(tmp_path / "same"), "-env", "NUMPY_LLAMA_ISA", "scalar", *program)
    assert_refused(on_each(same, isa), 1, f"the instruction set is scalar on {host}, rank 1")


def test_adapters_that_differ_are_refused(path, tmp_path):
    updates = random_updates(1, {"layers.0.attention.wq.weight": 2}, args=SPEAKER)
    other_scale = {name: one._replace(scale=2.0) for name, one in updates.items()}
    other_b = {name: one._replace(b=-one.b) for name, one in updates.items()}
    for name, found in (("same", updates), ("scale", other_scale), ("numbers", other_b)):
        (tmp_path / name / "lora").mkdir(parents=True)
        write_peft(tmp_path / name / "lora", found, SPEAKER)
    program = PROGRAM, "generate", "-m", str(path), "-n", "3", "hi", "--adapter", "lora"
    same, scale, numbers = (
        ("-wdir", str(tmp_path / name), *program) for name in ("same", "scale", "numbers")
    )
    text = alone(*program, cwd=tmp_path / "same").stdout
    done = on_each(same, same)
    assert (done.returncode, done.stdout, done.stderr) == (0, text, b"")
    assert_refused(on_each(same, scale), 1, "the updates of lora is 1 weights, scales", "rank 1")
    assert_refused(on_each(same, numbers), 1, "lora/adapter_model.safetensors is a file of", "rank 1")
    assert_refused(on_each(same, ("-wdir", str(tmp_path), *program)), 1, "rank 1: lora is not there")


def test_more_threads_than_cpus_are_said(path):
    cpus = available_cpus()
    done = on_ranks(2, PROGRAM, "generate", "-m", str(path), "-n", "3", "-t", str(cpus + 1), "hi")
    share = max(1, cpus // 2)
    said = (
        f"rank 0: {cpus + 1} threads, but 2 ranks on this machine have {share} CPUs each: give -t {share}\n"
    )
    assert done.returncode == 0 and done.stderr.decode() == f"numpy-llama: {os.uname().nodename}, {said}"


def test_the_mpiexec_of_another_mpi_is_noticed(path):
    for size, rank, how in (
        ("PMI_SIZE", "PMI_RANK", "each sees 1"),
        ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "it is that of Open MPI"),
    ):
        done = alone(PROGRAM, "info", str(path), env={size: "2", rank: "0"})
        assert_refused(done, 1, f"mpiexec has started 2 processes, and {how}", "another MPI than mpi4py's")


def test_mpi_is_imported_under_mpiexec_only(path, tmp_path):
    (tmp_path / "mpi4py.py").write_text("raise ImportError('it is not installed')")
    hidden = {"PYTHONPATH": f"{tmp_path}:{os.environ.get('PYTHONPATH', '')}"}
    program = PROGRAM, "generate", "-m", str(path), "-n", "3", "hi"
    for done in (alone(*program, env=hidden), on_ranks(1, *program, env=hidden)):
        assert (done.returncode, done.stderr) == (0, b"")
    done = on_ranks(2, *program, env=hidden)
    assert done.returncode == 1 and b"rank" not in done.stderr
    assert b'2 processes without MPI (it is not installed): pip install "numpy_llama[mpi]"' in done.stderr


def test_ctrl_c_ends_all_with_status_130(smollm2_path):
    command = (
        PROGRAM,
        "generate",
        "-m",
        str(smollm2_path),
        "-t",
        "1",
        "-n",
        "4000",
        "--temperature",
        "2",
        "hi",
    )
    started = subprocess.Popen(
        [MPIEXEC, "-n", "2", *command], env=os.environ | TOGETHER, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert started.stdout.read(20)
    os.killpg(started.pid, signal.SIGINT)  # as a terminal does
    out, err = started.communicate(timeout=60)
    assert (started.returncode, err) == (130, b"") and out.endswith(b"\n")
