"""Tokens a second of llama.cpp and numpy_llama on the same GGUF files, by turns in one run, and the ratio.

    python benchmarks/against_llama_cpp.py FILE.gguf ... [-p 512] [-n 64] [-d 0] [-t 2] [-r 5] [--json]

llama.cpp runs through llama-cpp-python, in any interpreter that has it: --llama-cpp PYTHON. Its wheels are
built for many processors. To be fastest it must be compiled on the machine where it runs:

    pip install --no-binary llama-cpp-python llama-cpp-python

Each contestant is a process of its own, which keeps the file mapped and warm and is idle between its turns.
Both do the same work: random ids, the logits of the last position, no text and no sampling. A round measures
the limits of the machine, then decode of -n tokens by both, then prefill of -p tokens by both. Medians of the
rounds are printed. llama.cpp is tried with and without flash attention, and the faster of the two is used,
separately for decode and prefill.
"""

import argparse
import ctypes
import json
import random
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from functools import cache
from pathlib import Path

PAUSE = 0.05  # seconds before each turn: the threads of the other contestant have stopped spinning by then
SHORT = {"tg": 8, "pp": 128}  # tokens in the first round


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
    """llama.cpp with its default options, except the number of threads and flash attention."""

    def __init__(self, file: str, threads: int, depth: int, room: int):
        import llama_cpp

        self.lib, self.threads, self.depth, self.room = llama_cpp, threads, depth, room
        self.silent = llama_cpp.llama_log_callback(lambda level, text, user: None)
        llama_cpp.llama_log_set(self.silent, ctypes.c_void_p())
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(
            file.encode(), llama_cpp.llama_model_default_params()
        )
        if not self.model:
            sys.exit(f"llama.cpp cannot load {file}")
        vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        rng = random.Random(0)
        self.ids = [rng.randrange(vocabulary) for _ in range(max(depth, room))]

    def about(self) -> str:
        features = self.lib.llama_print_system_info().decode().strip(" |\n")
        return f"llama-cpp-python {self.lib.__version__}, {features}"

    @cache  # noqa: B019  it lives as long as the process
    def context(self, flash: int):
        """A context that holds `depth` positions."""
        params = self.lib.llama_context_default_params()
        params.n_ctx = self.depth + self.room
        params.n_threads = params.n_threads_batch = self.threads
        params.flash_attn_type = flash
        context = self.lib.llama_init_from_model(self.model, params)
        for begin in range(0, self.depth, params.n_batch):
            self.decode(context, self.ids[begin : min(begin + params.n_batch, self.depth)])
        return context

    def decode(self, context, ids: list[int]) -> None:
        tokens = (self.lib.llama_token * len(ids))(*ids)  # the batch only points to them
        if (code := self.lib.llama_decode(context, self.lib.llama_batch_get_one(tokens, len(ids)))) != 0:
            sys.exit(f"llama.cpp: llama_decode returned {code}")

    def run(self, kind: str, length: int, flash: int) -> float:
        context = self.context(flash)
        self.lib.llama_memory_seq_rm(self.lib.llama_get_memory(context), 0, self.depth, -1)
        step = length if kind == "pp" else 1
        began = time.perf_counter()
        for begin in range(0, length, step):
            self.decode(context, self.ids[begin : begin + step])
        self.lib.llama_synchronize(context)
        return time.perf_counter() - began


def answer(contestant: Ours | LlamaCpp) -> None:
    """The loop of a contestant: a call a line, [name of a method, its arguments], and a result a line."""
    for line in sys.stdin:
        name, *arguments = json.loads(line)
        print(json.dumps(getattr(contestant, name)(*arguments)), flush=True)


class Child:
    """A contestant in a process of its own."""

    def __init__(self, python: str, name: str, *arguments):
        command = [python, __file__, "--contestant", name, json.dumps(arguments)]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *question):
        time.sleep(PAUSE)
        with suppress(BrokenPipeError):  # then there is no answer either
            print(json.dumps(question), file=self.process.stdin, flush=True)
        if not (line := self.process.stdout.readline()):
            sys.exit(f"{self.name} gave no answer, it ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.communicate()


def compare(file: Path, options: argparse.Namespace) -> dict:
    """All results for one file."""
    lengths = {"tg": options.new, "pp": options.prompt}
    arguments = (str(file), options.threads, options.depth, max(lengths.values()))
    runs = {(kind, who): [] for kind in lengths for who in ("ours", "theirs")}
    read, fma, flash = [], [], {}
    with (
        Child(sys.executable, "numpy_llama", *arguments) as ours,
        Child(options.llama_cpp, "llama.cpp", *arguments) as theirs,
    ):
        about = [ours.ask("about"), theirs.ask("about")]
        cost = {kind: ours.ask("cost", kind, length) for kind, length in lengths.items()}
        for kind, length in lengths.items():
            short = min(SHORT[kind], length)
            ours.ask("run", kind, short)
            seconds = {on: min(theirs.ask("run", kind, short, on) for _ in range(2)) for on in (0, 1)}
            flash[kind] = min(seconds, key=seconds.get)
        for _ in range(options.repeat):
            limits = ours.ask("limits")
            read.append(limits[0])
            fma.append(limits[1])
            for kind, length in lengths.items():
                runs[kind, "ours"].append(length / ours.ask("run", kind, length))
                runs[kind, "theirs"].append(length / theirs.ask("run", kind, length, flash[kind]))
    result = {
        "file": file.name,
        "about": about,
        "threads": options.threads,
        "depth": options.depth,
        "read_bandwidth": statistics.median(read),
        "fma_peak": statistics.median(fma),
    }
    for kind, length in lengths.items():
        mine, other = (statistics.median(runs[kind, who]) for who in ("ours", "theirs"))
        result[f"{kind}{length}"] = {
            "ours": mine,
            "llama_cpp": other,
            "ratio": mine / other,
            "flash_attention": bool(flash[kind]),
            "runs": {who: runs[kind, who] for who in ("ours", "theirs")},
            "share_of_read_bandwidth": cost[kind][0] * mine / length / result["read_bandwidth"],
            "share_of_fma_peak": cost[kind][1] * mine / length / result["fma_peak"],
        }
    return result


def row(result: dict, decode: str, prefill: str) -> str:
    """One line of the table, in Markdown."""
    cells = [result["file"]]
    for name, share in ((decode, "share_of_read_bandwidth"), (prefill, "share_of_fma_peak")):
        it = result[name]
        flash = " (fa)" if it["flash_attention"] else ""
        cells += [f"{it['ours']:.2f}", f"{it['llama_cpp']:.2f}{flash}"]
        cells += [f"{it['ratio']:.2f}", f"{it[share]:.0%}"]
    cells += [f"{result['read_bandwidth'] / 1e9:.1f}", f"{result['fma_peak'] / 1e9:.0f}"]
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.gguf")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--new", type=int, default=64)
    parser.add_argument("-d", "--depth", type=int, default=0, help="positions already in the cache")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("--llama-cpp", default=sys.executable, metavar="PYTHON", help="it has llama_cpp")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    options = parser.parse_args()
    if min(options.prompt, options.new, options.threads, options.repeat) < 1 or options.depth < 0:
        parser.error("-p, -n, -t and -r must be 1 or above, -d 0 or above")
    decode, prefill = f"tg{options.new}", f"pp{options.prompt}"
    for i, file in enumerate(options.files):
        result = compare(file, options)
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        if i == 0:
            depth = f" @ d{options.depth}" if options.depth else ""
            print(
                f"{' against '.join(result['about'])}\n"
                f"{options.threads} threads, medians of {options.repeat}\n"
            )
            titles = ["llama.cpp", "ratio", "of read", f"{prefill}{depth}", "llama.cpp", "ratio", "of FMA"]
            titles = ["file", f"{decode}{depth}", *titles, "read GB/s", "FMA Gop/s"]
            print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
        print(row(result, decode, prefill), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--contestant"]:
        answer({"numpy_llama": Ours, "llama.cpp": LlamaCpp}[sys.argv[2]](*json.loads(sys.argv[3])))
    else:
        main()
