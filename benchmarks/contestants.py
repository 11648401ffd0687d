"""The contestants of against_peers.py, each in processes of its own.

    PYTHON benchmarks/contestants.py NAME ARGUMENTS

numpy_llama and llama.cpp run this file: it answers questions on standard input. ARGUMENTS are in JSON.
ik_llama.cpp runs its own llama-bench.
"""

import ctypes
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from typing import NamedTuple

OURS, LLAMA_CPP, IK = "numpy_llama", "llama.cpp", "ik_llama.cpp"


class Test(NamedTuple):
    """One prompt (pp) or the decoding (tg) of `length` tokens, as often as `times` in a turn."""

    group: str  # the tests of a group run with the same settings
    kind: str
    length: int
    times: int = 1

    def __str__(self) -> str:
        return f"{self.kind}{self.length}"


class Ours:
    """numpy_llama with its default options."""

    def __init__(self, file: str, threads: int, depth: int, room: int):
        import numpy_llama as nl
        from numpy_llama.inspect import bench

        self.bench, self.depth = bench, depth
        self.model, self.machine = nl.load(file, threads=threads).model, bench.Machine(threads)
        task = bench.Task("tg", room, depth)
        rng = bench.np.random.default_rng(0)
        self.ids = rng.integers(0, self.model.args.vocab_size, (1, room))
        self.cache = bench.filled_cache(self.model, task, rng)
        self.pieces = bench.probed(self.model)

    def about(self) -> str:
        return f"numpy_llama, {self.machine.isa}"

    def limits(self) -> list[float]:
        """The machine's limits: bytes and float32 operations a second."""
        return [self.machine.read_bandwidth(self.pieces), self.machine.fma_peak()]

    def run(self, kind: str, length: int) -> float:
        task = self.bench.Task(kind, length, self.depth)
        return self.bench.once(self.model, self.ids, self.cache, task, task.steps)

    def cost(self, kind: str, length: int) -> list[int]:
        """The bytes and the operations of one run."""
        kv = (self.cache.k.nbytes + self.cache.v.nbytes) // self.cache.max_seq_len
        cost = self.bench.cost(self.model, self.bench.Task(kind, length, self.depth), kv)
        return [cost.nbytes, cost.operations]


class LlamaCpp:
    """llama.cpp with its default options, except the number of threads, flash attention and repacking."""

    def __init__(self, file: str, threads: int, depth: int, room: int, flash: int, repack: int):
        import llama_cpp

        self.lib, self.depth = llama_cpp, depth
        self.silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.use_extra_bufts = bool(repack)
        self.model = llama_cpp.llama_model_load_from_file(file.encode(), options)
        if not self.model:
            raise ValueError(f"it cannot load {file}")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        rng = random.Random(0)
        self.ids = [rng.randrange(vocabulary) for _ in range(max(depth, room))]
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = depth + room
        params.n_batch = max(params.n_batch, room)
        params.n_threads = params.n_threads_batch = threads
        params.flash_attn_type = flash
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        for begin in range(0, depth, params.n_batch):
            self.decode(self.ids[begin : min(begin + params.n_batch, depth)])

    def about(self) -> str:
        features = self.lib.llama_print_system_info().decode().strip(" |\n")
        return f"llama-cpp-python {self.lib.__version__}, {features}"

    def decode(self, ids: list[int]) -> None:
        tokens = (self.lib.llama_token * len(ids))(*ids)  # the batch only points to them
        batch = self.lib.llama_batch_get_one(tokens, len(ids))
        if (code := self.lib.llama_decode(self.context, batch)) != 0:
            raise ValueError(f"llama_decode returned {code}")

    def run(self, kind: str, length: int) -> float:
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(self.context), 0, self.depth, -1)
        step = length if kind == "pp" else 1
        began = time.perf_counter()
        for begin in range(0, length, step):
            self.decode(self.ids[begin : begin + step])
        self.lib.llama_synchronize(self.context)
        return time.perf_counter() - began


def answer(name: str, arguments: list) -> None:
    """The loop of a contestant: a call a line, [name of a method, its arguments], and a result a line."""
    try:
        contestant = {OURS: Ours, LLAMA_CPP: LlamaCpp}[name](*arguments)
        for line in sys.stdin:
            method, *values = json.loads(line)
            print(json.dumps(getattr(contestant, method)(*values)), flush=True)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), flush=True)


class Process:
    """A process that ends with its block. Ctrl-C in the terminal does not reach it."""

    def __init__(self, command: list):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.popen = subprocess.Popen([str(word) for word in command], start_new_session=True, **pipes)

    def wait(self) -> int:
        """The exit code. `peak` becomes the most bytes of memory that the process has had."""
        if self.popen.returncode is None:
            _, status, usage = os.wait4(self.popen.pid, 0)
            self.popen.returncode = os.waitstatus_to_exitcode(status)
            self.peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return self.popen.returncode

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        if self.popen.returncode is None:
            os.kill(self.popen.pid, signal.SIGKILL)
            self.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            with suppress(BrokenPipeError):
                pipe.close()


class Child(Process):
    """A contestant in a process of its own, which waits between its turns."""

    def __init__(self, name: str, python: str, *arguments):
        super().__init__([python, __file__, name, json.dumps(arguments)])
        self.name = name

    def ask(self, *question):
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(question), file=self.popen.stdin, flush=True)
        if not (line := self.popen.stdout.readline()):
            sys.exit(f"{self.name} gave no answer, its exit code is {self.wait()}")
        with suppress(ValueError):
            result = json.loads(line)
            if not isinstance(result, dict):
                return result
            line = result["error"]
        sys.exit(f"{self.name}: {line.strip()}")

    def about(self) -> str:
        return self.ask("about")

    def run(self, test: Test, fresh: bool = False) -> float:
        """Seconds for one time, the median."""
        return statistics.median(self.ask("run", test.kind, test.length) for _ in range(test.times))


class Ik:
    """ik_llama.cpp: its llama-bench, a process for each call of `run`, which loads the file anew."""

    def __init__(self, name: str, bench: str, file: str, threads: int, depth: int, room: int, *settings):
        flash, repack = settings
        self.command = [bench, "-m", file, "-t", threads, "-fa", flash, "-rtr", repack, "-o", "json"]
        self.depth, self.peak = depth, 0

    def about(self) -> str:
        return f"{IK} {self.build}"

    def run(self, test: Test, fresh: bool = False) -> float | None:
        """Seconds for one time, the median. None for a prompt behind positions: llama-bench has no such test.

        It warms up with one token only, which is too little. So the first time is not counted here. Behind
        positions their prompt has warmed up. A `fresh` process does not warm up.
        """
        what = {"-p": 0, "-n": 0, {"pp": "-p", "tg": "-n"}[test.kind]: test.length}
        if self.depth:
            if test.kind == "pp":
                return None
            what = {"-p": 0, "-n": 0, "-gp": f"{self.depth},{test.length}"}
        skipped = 0 if fresh or self.depth else 1
        what |= {"-r": skipped + test.times, "-w": int(not fresh)}
        with Process([*self.command, *(word for pair in what.items() for word in pair)]) as process:
            text = process.popen.stdout.read()
            if code := process.wait():
                sys.exit(f"{IK}: {self.command[0]} failed, its exit code is {code}")
        try:
            (result,) = json.loads(text)
        except ValueError:
            sys.exit(f"{IK}: {self.command[0]} printed no result in JSON")
        self.build, self.peak = result["build_commit"], max(self.peak, process.peak)
        return statistics.median(result["samples_ns"][skipped:]) / 1e9

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None: ...


if __name__ == "__main__":
    answer(sys.argv[1], json.loads(sys.argv[2]))
