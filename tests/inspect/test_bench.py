"""`bench`: the probes do what they say, the columns are what they are called, wrong requests are refused."""

import json
import os
import re
import signal
import statistics
import subprocess
import sys
import time
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import assert_refused, run
from helpers.gguf_writer import byte_vocabulary, write_llama
from helpers.kernels import Guarded
from helpers.tiny_models import float_weights, stored
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_llama import functional as F
from numpy_llama.backend import build, kernels
from numpy_llama.checkpoint.presets import n_parameters
from numpy_llama.inspect import bench
from numpy_llama.inspect.bench import Machine, Result, Task
from numpy_llama.model import Transformer
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.window import PREFILL_CHUNK

# Every size another one, so that no two can be taken for each other.
ARGS = replace(TINY_BLOCKS, n_layers=3, hidden_dim=160, vocab_size=288, max_seq_len=2048)
LAST = PREFILL_CHUNK + 40  # a prompt of two chunks
TASKS = [Task("pp", 5), Task("pp", LAST, 7), Task("tg", 4), Task("tg", 3, 9), Task("tg", 3, 9, 5)]
ISA = kernels.isa()  # as it is chosen where nobody asks for another
CSRC = Path(bench.__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    weights = float_weights(ARGS)
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    return write_llama(path, ARGS, weights, "Q8_0", **byte_vocabulary(ARGS.vocab_size))


def stored_weights(format="Q8_0"):
    return stored(float_weights(ARGS), format)


# --- the probes -------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 3000), max_size=4), st.integers(1, 4), st.data())
@settings(max_examples=settings().max_examples // 4)
@example([2, 194, 64 * 3 + 2], 3, None)  # what is left behind equal shares
def test_the_read_probe_reads_every_byte(isa, sizes, threads, data):
    rng = np.random.default_rng(0)
    arrays = [rng.integers(0, 256, size, dtype=np.uint8) for size in sizes]
    words = [np.append(a, np.zeros(-len(a) % 4, np.uint8)).view("<u4") for a in arrays]
    expected = int(np.bitwise_xor.reduce(np.concatenate([*words, np.zeros(1, "<u4")])))
    assert kernels.read_probe(arrays, threads) == expected
    if data is not None and sum(sizes):
        array = arrays[data.draw(st.sampled_from([i for i, n in enumerate(sizes) if n]))]
        array[data.draw(st.integers(0, len(array) - 1))] ^= 1
        assert kernels.read_probe(arrays, threads) != expected


@pytest.mark.parametrize("at_end", [True, False])
def test_the_read_probe_touches_nothing_beside_its_arrays(isa, at_end):
    for size in (1, 3, 4, 63, 64, 65, 127, 255, 256, 257, 300):
        guarded = Guarded()
        arrays = [guarded.copy(np.full(n, 1, np.uint8), at_end) for n in (size, 5)]
        for threads in (1, 2, 3):
            assert kernels.read_probe(arrays, threads) == kernels.read_probe([a.copy() for a in arrays], 1)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_fma_probe_does_all_its_work(isa, threads):
    """x -> x / 2 + 1 goes to 2, from wherever it began; after no step it is still there."""
    chains = 12
    assert kernels.fma_probe(384 << 8, threads) == 2 * chains * threads
    assert kernels.fma_probe(0, threads) == sum(range(chains)) * threads
    header = CSRC / f"vec_{isa}.h"
    lanes = 1 if isa == "scalar" else int(re.search(r"#define LANES (\d+)", header.read_text())[1])
    assert kernels.fma_probe(2 * chains * lanes, 1) == sum(i / 2 + 1 for i in range(chains))  # one step


def test_the_machine_has_limits(isa):
    machine = Machine(2)
    assert (machine.threads, machine.isa) == (2, isa)
    one = Machine(1)
    for ask in (lambda: one.read_bandwidth([np.zeros(1 << 22, np.uint8)]), one.fma_peak):
        assert 1e7 < ask() < 1e13
    assert Machine().threads == kernels.available_cpus()


def test_without_kernels_the_limits_are_unknown(path):
    code = """
import sys
sys.modules["numpy_llama.backend._kernels"] = None
from numpy_llama.cli import main
main(["bench", "-m", sys.argv[1], "--backend", "numpy", "-p", "4", "-n", "2", "-r", "1", *sys.argv[2:]])
"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    prefill, decode = map(json.loads, done.stdout.splitlines())
    for line in (prefill, decode):
        assert line["tokens_per_second"] > 0
        assert line["read_bandwidth"] is line["fma_peak"] is line["share_of_fma_peak"] is None
    assert decode["bytes_per_second"] > 0 and decode["share_of_read_bandwidth"] is None
    done = subprocess.run(command, capture_output=True, text=True)
    assert len(done.stdout.splitlines()) == 3 and "BLAS" in done.stdout


# --- what a task takes ------------------------------------------------------------------------------------


class Counted:
    """A model that counts what it multiplies and what it reads."""

    def __init__(self):
        self.operations = self.nbytes = 0
        self.shapes = []

    def linear(self, x, w):
        self.operations += 2 * x.size * len(w)
        self.nbytes += w.nbytes
        return F.linear(x, w)

    def attention(self, q, k, v):
        self.nbytes += k.nbytes + v.nbytes
        self.shapes.append(q.shape[:2])
        return F.attention(q, k, v)

    def model(self):
        weights = float_weights(ARGS)
        return Transformer(ARGS, weights, self.linear, self.attention)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_costs_are_what_is_really_multiplied_and_read(task):
    counted = Counted()
    model, rng = counted.model(), np.random.default_rng(0)
    cache = bench.filled_cache(model, task, rng)
    assert cache.filled == [task.depth] * ARGS.n_layers and cache.batch == task.batch
    bench.once(model, rng.integers(0, 288, (task.batch, task.length)), cache, task, task.steps)
    assert cache.filled == [task.depth + task.length] * ARGS.n_layers == [cache.max_seq_len] * ARGS.n_layers
    cost = bench.cost(model, task, kv_per_position=2 * 3 * 2 * 16 * 4)
    assert (cost.operations, cost.nbytes) == (counted.operations, counted.nbytes)


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_weights_are_counted_in_the_bytes_that_the_path_reads(backend):
    model = build(ARGS, stored_weights(), backend=backend)
    n = n_parameters(ARGS) - ARGS.vocab_size * ARGS.dim - (2 * ARGS.n_layers + 1) * ARGS.dim
    nbytes = n * 4 if backend == "numpy" else n // 32 * 34
    assert bench.cost(model, Task("tg", 10), 0).nbytes == 10 * nbytes
    assert sum(piece.nbytes for piece in bench.probed(model)) == nbytes
    assert bench.formats(model) == ("F32" if backend == "numpy" else "Q8_0")


def test_formats_are_named_by_their_bytes():
    weights = stored_weights("Q4_0")
    for name in ("output.weight", "layers.1.feed_forward.w_down.weight"):
        weights[name] = stored_weights("F16")[name]
    weights["layers.0.attention.wk.weight"] = stored_weights("Q8_0")["layers.0.attention.wk.weight"]
    assert bench.formats(build(ARGS, weights)) == "Q4_0+F16+Q8_0"


def test_of_a_large_model_only_a_part_is_probed(monkeypatch):
    model = build(ARGS, stored_weights())
    first, second, *_ = (bench.stored(linear).nbytes for linear in bench.matrices(model))
    monkeypatch.setattr(bench, "READ_BYTES", first + 1)
    assert [piece.nbytes for piece in bench.probed(model)] == [first, second]


def test_names():
    assert [str(task) for task in TASKS] == ["pp5", f"pp{LAST} @ d7", "tg4", "tg3 @ d9", "tg3 b5 @ d9"]
    assert Task("pp", LAST, 7).steps == [(7, 7 + PREFILL_CHUNK), (7 + PREFILL_CHUNK, 7 + LAST)]
    assert Task("tg", 3, 9).steps == [(9, 10), (10, 11), (11, 12)]


# --- what is measured -------------------------------------------------------------------------------------


class Limits:
    """A machine whose probes give these numbers, one after another."""

    def __init__(self, read, fma):
        self.read, self.fma = iter(read), iter(fma)

    def read_bandwidth(self, pieces):
        return next(self.read)

    def fma_peak(self):
        return next(self.fma)


def test_measure_with_a_clock_of_our_own(monkeypatch):
    """Runs of 1, 3 and 2 seconds; the warm-up and the first probes do not count."""
    now = iter(np.cumsum([0, 50, 0, 1, 0, 3, 0, 2]).tolist())
    clock = types.SimpleNamespace(perf_counter=lambda: next(now), sleep=lambda seconds: None)
    monkeypatch.setattr(bench, "time", clock)
    counted, heard = Counted(), []
    task = Task("tg", 6, 4, 2)
    machine = Limits([9e9, 5e9, 1e9, 3e9], [9e9, 4e9, 6e9, 8e9])
    result = bench.measure(counted.model(), task, machine, 3, lambda *run: heard.append(run))
    assert heard == [(0, 3), (1, 3), (2, 3)]
    assert counted.shapes == [(2, 1)] * ARGS.n_layers * (1 + 3 * 6)  # warm up with one step
    assert result.seconds == [1, 3, 2]
    assert result.rates == [12, 4, 6]
    assert (result.read_bandwidth, result.fma_peak) == (3e9, 6e9)


def test_columns():
    task = Task("tg", 10, 0, 2)
    result = Result(task, bench.Cost(operations=4000, nbytes=600), [2.0, 5.0, 4.0], 1e3, 1e4)
    assert result.rates == [10, 4, 5]
    assert (result.mean, result.sd) == (statistics.fmean([10, 4, 5]), statistics.stdev([10, 4, 5]))
    a_token = 1 / 20
    assert result.operations == pytest.approx(4000 * a_token * result.mean)
    assert result.nbytes == pytest.approx(600 * a_token * result.mean)
    assert Result(task, result.cost, [2.0], 1, 1).sd == 0


# --- the command ------------------------------------------------------------------------------------------

# fmt: off
KEYS = [
    "model", "size", "parameters", "format", "backend", "isa", "threads", "test", "length", "depth", "batch",
    "tokens_per_second", "sd", "runs", "bytes_per_second", "read_bandwidth", "share_of_read_bandwidth",
    "operations_per_second", "fma_peak", "share_of_fma_peak", "peak_memory",
]
# fmt: on


def lines_of(path, *arguments):
    done = run("bench", "-m", str(path), *arguments)
    assert (done.returncode, done.stderr) == (0, b"")
    return done.stdout.decode().splitlines()


def test_json_has_everything(path):
    options = ["-p", "6", "-n", "4", "-d", "0,5", "-b", "1,3", "-t", "1,2", "-r", "2"]
    lines = [json.loads(line) for line in lines_of(path, *options, "--json")]
    tests = ["pp6", "tg4", "tg4 b3", "pp6 @ d5", "tg4 @ d5", "tg4 b3 @ d5"]
    assert [(line["threads"], line["test"]) for line in lines] == [
        (t, test) for t in (1, 2) for test in tests
    ]
    for line in lines:
        assert list(line) == KEYS
        assert (line["model"], line["format"], line["backend"]) == ("tiny.gguf", "Q8_0", "c")
        assert (line["isa"], line["parameters"]) == (ISA, n_parameters(ARGS))
        assert len(line["runs"]) == 2 and line["tokens_per_second"] == pytest.approx(sum(line["runs"]) / 2)
        assert line["peak_memory"] > 10 << 20 and line["fma_peak"] > 1e7
        share = line["operations_per_second"] / line["fma_peak"]
        assert line["share_of_fma_peak"] == pytest.approx(share) and share > 0
        if line["test"].startswith("tg"):
            share = line["bytes_per_second"] / line["read_bandwidth"]
            assert line["share_of_read_bandwidth"] == pytest.approx(share) and share > 0
        else:
            assert line["bytes_per_second"] is line["share_of_read_bandwidth"] is None


def test_the_numpy_path_can_be_measured_too(path):
    (line,) = map(json.loads, lines_of(path, "-p0", "-n3", "-r1", "--backend", "numpy", "--json"))
    assert (line["test"], line["format"], line["threads"], line["isa"]) == ("tg3", "F32", None, None)
    assert line["size"] == 4 * n_parameters(ARGS)
    assert line["sd"] == 0 and line["bytes_per_second"] > 0


def test_the_table_has_a_line_for_each_test(path):
    title, prefill, decode, limits = lines_of(path, "-p", "6", "-n", "4", "-t", "2", "-r", "2")
    assert len({len(title), len(prefill), len(decode)}) == 1
    assert title.split()[:4] == ["model", "size", "parameters", "format"]
    assert "pp6" in prefill and prefill.split().count("-") == 2
    assert "tg4" in decode and decode.count("%") == 2
    assert limits.startswith(f"at best, 2 threads, {ISA}: read ")


@pytest.mark.parametrize(
    "arguments, code, words",
    [
        (["-p", "0", "-n", "0"], 2, ["nothing to measure"]),
        (["-p", "6,x"], 2, ["-p", "'x' is not a whole number, 0 or above"]),
        (["-p", ""], 2, ["-p", "''"]),
        (["-n", "-1"], 2, ["-n", "'-1'"]),
        (["-t", "1,0"], 2, ["-t", "'0' is not a whole number, 1 or above"]),
        (["-b", "0"], 2, ["-b", "'0'"]),
        (["-r", "0"], 2, ["-r", "'0'"]),
        (["-t", "1,1025"], 2, ["threads is 1025, it must be a whole number from 1 to 1024"]),
        (["-p", "9", "--max-seq-len", "2049"], 2, ["max_seq_len is 2049, ", "from 1 to 2048"]),
        (["-p", "9", "-n", "0", "--max-seq-len", "8"], 1, ["pp9 takes 9 positions", "tiny.gguf has 8"]),
        (["-p", "2049"], 1, ["pp2049 takes 2049 positions", "tiny.gguf has 2048"]),
        (["-p", "1", "-n", "13", "-d", "2036"], 1, ["tg13 @ d2036 takes 2049 positions", "has 2048"]),
        (
            ["-p", "1", "-n", "512", "-b", "10000000"],
            1,
            ["tg512 b10000000 does not fit", "GiB are available"],
        ),
    ],
)
def test_what_cannot_be_measured_is_refused_before_anything_is(path, arguments, code, words):
    assert_refused(run("bench", "-m", str(path), *arguments), code, *words)


# --- against peers ----------------------------------------------------------------------------------------

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "against_peers.py"

# A token takes a stand-in 1 ms, if flash attention is on, and if its weights are repacked for a prompt and as
# stored for decoding. It takes 4 ms otherwise.
LLAMA_CPP = """
import ctypes, time, types
__version__ = "0"
llama_token = ctypes.c_int32
held = [0]
llama_log_callback = lambda f: f
llama_log_set = lambda *a: None
llama_backend_init = lambda: None
llama_model_default_params = lambda: types.SimpleNamespace(use_extra_bufts=None)
llama_model_load_from_file = lambda path, params: path.endswith(b".gguf") and params
llama_model_get_vocab = lambda model: model
llama_vocab_n_tokens = lambda vocab: 288
llama_print_system_info = lambda: b"CPU : X = 1 | "
llama_context_default_params = lambda: types.SimpleNamespace(n_batch=8)
def llama_init_from_model(model, params):
    held[0], params.repacked = 0, model.use_extra_bufts
    return params
def llama_batch_get_one(tokens, n):
    return list(tokens)
def llama_decode(context, batch):
    held[0] += len(batch)
    if len(batch) > context.n_batch or held[0] > context.n_ctx or max(batch) >= 288:
        return 1
    best = context.flash_attn_type and context.repacked == (len(batch) > 1)
    time.sleep((0.001 if best else 0.004) * len(batch))
    return 0
llama_get_memory = lambda context: context
def llama_memory_seq_rm(memory, sequence, begin, end):
    held[0] = begin
llama_synchronize = lambda context: None
"""
LLAMA_BENCH = """
import json, os, sys
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
print(*sys.argv[1:], file=open(__file__ + ".log", "a"))
prompt, new = int(options["-p"]), int(options["-n"])
if "-gp" in options:
    assert prompt == new == 0
    prompt, new = 0, int(options["-gp"].split(",")[1])
assert options["-m"].endswith(".gguf") and options["-o"] == "json" and (prompt == 0) != (new == 0)
best = options["-fa"] == "1" and options["-rtr"] == str(int(prompt > 0))
ns = (1_000_000 if best else 4_000_000) * (prompt + new)
slow = [] if "-gp" in options or options["-w"] == "0" else [9 * ns]
samples = (slow + [ns] * int(options["-r"]))[: int(options["-r"])]
print(json.dumps([{"build_commit": "abc", "samples_ns": samples}]))
"""


@pytest.fixture
def peers(tmp_path):
    """The options that name stand-ins of both peers."""
    (tmp_path / "llama_cpp.py").write_text(LLAMA_CPP)
    python, llama_bench = tmp_path / "python", tmp_path / "llama-bench"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path} exec {sys.executable} "$@"\n')
    llama_bench.write_text(f"#!{sys.executable}\n{LLAMA_BENCH}")
    for program in (python, llama_bench):
        program.chmod(0o755)
    return ["--llama-cpp", python, "--ik", llama_bench]


def against(*arguments):
    command = [sys.executable, SCRIPT, "-p", "24", "-n", "5", "-t", "1", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("depth", [0, 20])
def test_all_are_asked_for_the_same(path, peers, depth):
    done = against(path, *peers, "-d", depth, "-r", "2", "--json")
    assert done.returncode == 0 and not done.stderr, done.stderr
    results = json.loads(done.stdout)
    assert (results["file"], results["depth"], results["threads"]) == ("tiny.gguf", depth, 1)
    assert results["about"] == {
        "numpy_llama": f"numpy_llama, {ISA}",
        "llama.cpp": "llama-cpp-python 0, CPU : X = 1",
        "ik_llama.cpp": "ik_llama.cpp abc",
    }
    model = build(ARGS, stored_weights())
    position = model.new_cache(1, 1)
    for test, length in {"tg5": 5, "pp24": 24, "pp4": 4, "pp8": 8, "pp16": 16}.items():
        them = results["tests"][test]
        assert set(them) == set(results["about"]) - ({"ik_llama.cpp"} if depth and test != "tg5" else set())
        for name, it in them.items():
            assert len(it["runs"]) == 2 and it["median"] == statistics.median(it["runs"])
            assert it["ratio"] == pytest.approx(them["numpy_llama"]["median"] / it["median"])
            assert it["first_token"] > 0
            if name != "numpy_llama":
                assert it["settings"] == (["fa"] if test == "tg5" else ["fa", "rtr"])
        assert 0 < them["llama.cpp"]["median"] <= 1000
        if "ik_llama.cpp" in them:
            assert them["ik_llama.cpp"]["median"] == pytest.approx(1000)
        ours = them["numpy_llama"]
        cost = bench.cost(model, Task(test[:2], length, depth), position.k.nbytes + position.v.nbytes)
        for share, of, limit in (
            ("share_of_read_bandwidth", cost.nbytes, "read_bandwidth"),
            ("share_of_fma_peak", cost.operations, "fma_peak"),
        ):
            assert ours[share] == pytest.approx(of / length * ours["median"] / results[limit])
    for test, times in {"first token warm": 2, "peak memory": 1}.items():
        for it in results["tests"][test].values():
            assert len(it["runs"]) == times and it["median"] > 0
            assert it["ratio"] == pytest.approx(
                it["median"] / results["tests"][test]["numpy_llama"]["median"]
            )
    log = (peers[-1].parent / "llama-bench.log").read_text()
    assert ("-gp 20,5" in log) == bool(depth)


def test_the_comparison_is_a_table(path, peers):
    done = against(path, path, *peers[2:], "-r", "1")
    title, rule, *rows = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert title == "| file | test | numpy_llama | of the limit | ik_llama.cpp | ratio |"
    assert len({line.count("|") for line in (title, rule, *rows)}) == 1
    for text in ("| tg5, tokens/s |", "| pp16, tokens/s |", "| first token warm, s |", "| peak memory, GB |"):
        assert sum(text in row for row in rows) == 2


def test_a_contestant_that_fails_is_named(path, peers, tmp_path):
    other = tmp_path / "tiny.other"
    other.symlink_to(path)
    for arguments, line in (
        ([path, *peers, "-d", "2040"], "numpy_llama: ParameterError: max_seq_len is 2064"),
        ([other, *peers], "llama.cpp: ValueError: it cannot load "),
        ([path, "--llama-cpp", "true"], "llama.cpp gave no answer, its exit code is 0"),
        ([path, "--ik", "false"], "ik_llama.cpp: false failed, its exit code is 1"),
        ([path, "--ik", "true"], "ik_llama.cpp: true printed no result in JSON"),
    ):
        done = against(*arguments)
        assert done.returncode == 1 and not done.stdout
        assert done.stderr.startswith(line) and done.stderr.count("\n") == 1
    for arguments, line in (
        ([path, "--ik", tmp_path], f"{tmp_path} is no program"),
        ([tmp_path / "none.gguf"], "none.gguf is no file"),
        ([path, "-r", "0"], "-r must be 1 or above"),
    ):
        done = against(*arguments)
        assert done.returncode == 2 and line in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_nothing_runs_on_after_an_interrupt(path, tmp_path, number, code):
    slow, pid = tmp_path / "llama-bench", tmp_path / "pid"
    slow.write_text(f"#!/bin/sh\necho $$ > {pid}.new; mv {pid}.new {pid}; exec sleep 60\n")
    slow.chmod(0o755)
    with subprocess.Popen([sys.executable, SCRIPT, path, "--ik", slow], stderr=subprocess.PIPE) as process:
        while not pid.exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.send_signal(number)
        assert (process.wait(10), process.stderr.read()) == (code, b"")
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)
