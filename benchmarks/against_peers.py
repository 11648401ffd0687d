"""The speed of numpy_llama, llama.cpp and ik_llama.cpp on the same GGUF files, by turns in one run.

    python benchmarks/against_peers.py FILE.gguf ... [--llama-cpp PYTHON] [--ik LLAMA_BENCH]
        [-p 512] [-n 64] [-d 0] [-t 2] [-r 5] [--json]

llama.cpp runs through llama-cpp-python, in any interpreter that has it: --llama-cpp PYTHON. ik_llama.cpp runs
through its own llama-bench: --ik LLAMA_BENCH. With neither option, PYTHON is this interpreter.
docs/reference/benchmarks.md says how to compile both for the machine where they run.

All do the same work: random ids, the logits of the last position, no text and no sampling. A round measures
the limits of the machine, then every test by each contestant in turn. tg64 decodes 64 tokens one by one.
pp512 is a prompt of 512. pp4, pp8 and pp16 are one call each. numpy_llama and llama.cpp keep the file mapped
and idle between their turns. llama-bench is a process for each turn, and warms up in it.

A peer is tried with and without flash attention (fa), with weights as stored and repacked at load (rtr). The
fastest settings are used, separately for tg, pp and calls. They stand in brackets, with the seconds in which
a fresh process loads the file with them and decodes one token.

After the rounds, fresh processes start by turns with the settings for tg. Their first token is timed from the
start of the process, imports of Python included. Cold means that the file's pages were dropped from the page
cache. Peak memory is that of one token and a prompt, mapped pages of the file included.

A number is the median of the rounds. A ratio above 1 says that numpy_llama is so much better.
"""

import argparse
import json
import math
import os
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

from contestants import IK, LLAMA_CPP, OURS, Child, Ik, Test

SETTINGS = [(flash, repack) for flash in (1, 0) for repack in (1, 0)]  # of a peer
WARM, COLD, MEMORY = "first token warm", "first token cold", "peak memory"
UNITS = {WARM: ("s", 1), COLD: ("s", 1), MEMORY: ("GB", 1e9)}  # of the tests in which less is better
PAUSE = 0.05  # seconds before each turn: the threads of the last contestant have stopped spinning by then
CALLS = [Test("call", "pp", length, 5) for length in (4, 8, 16)]
TRIAL = [Test("tg", "tg", 8, 2), Test("pp", "pp", 128, 2), CALLS[1]]  # one of each group


class Race:
    """The contestants on one file."""

    def __init__(self, file: Path, options: argparse.Namespace):
        self.file, self.options = file, options
        programs = {OURS: sys.executable, LLAMA_CPP: options.llama_cpp, IK: options.ik}
        self.programs = {name: program for name, program in programs.items() if program}
        self.tests = [Test("tg", "tg", options.new), Test("pp", "pp", options.prompt)]
        self.tests += [test for test in CALLS if test.length != options.prompt]
        self.room = max(test.length for test in self.tests)
        self.trial = [test._replace(length=min(test.length, self.room)) for test in TRIAL]
        self.runs, self.loads, self.limits = defaultdict(lambda: defaultdict(list)), defaultdict(list), []

    def start(self, name: str, settings: tuple, depth: int) -> Child | Ik:
        arguments = (str(self.file), self.options.threads, depth, self.room, *settings)
        return (Ik if name == IK else Child)(name, self.programs[name], *arguments)

    def choose(self, name: str) -> dict[str, tuple]:
        """The settings with which each group of tests is fastest: (flash attention, repacking)."""
        seconds = {test.group: {} for test in self.trial}
        for settings in SETTINGS if name != OURS else [()]:
            with self.start(name, settings, self.options.depth) as contestant:
                for test in self.trial:
                    seconds[test.group][settings] = contestant.run(test) or math.inf
        return {group: min(tried, key=tried.get) for group, tried in seconds.items()}

    def rounds(self) -> None:
        """The tests, by turns. The contestants stay until all rounds are done."""
        with ExitStack() as stack:
            racers = {}
            for name, groups in self.chosen.items():
                for settings in set(groups.values()):
                    racer = self.start(name, settings, self.options.depth)
                    racers[name, settings] = stack.enter_context(racer)
                    for test in self.trial if name != IK else []:
                        racer.run(test)  # the warm-up
            ours = racers[OURS, ()]
            self.costs = {test: ours.ask("cost", test.kind, test.length) for test in self.tests}
            for _ in range(self.options.repeat):
                self.limits.append(ours.ask("limits"))
                for test in self.tests:
                    for name, groups in self.chosen.items():
                        time.sleep(PAUSE)
                        if seconds := racers[name, groups[test.group]].run(test):
                            self.runs[str(test)][name].append(test.length / seconds)
            self.about = {name: racers[name, groups["tg"]].about() for name, groups in self.chosen.items()}

    def first_token(self, name: str, settings: tuple, prompt: int = 0) -> tuple[float, int]:
        """Seconds from the start of a process to its first token, and its peak memory, `prompt` included."""
        began = time.perf_counter()
        with self.start(name, settings, depth=0) as contestant:
            contestant.run(Test("tg", "tg", 1), fresh=True)
            seconds = time.perf_counter() - began
            if prompt:
                contestant.run(Test("pp", "pp", prompt), fresh=True)
        return seconds, contestant.peak

    def starts(self) -> None:
        """Fresh processes, by turns. No other process may map the file, or its pages cannot be dropped."""
        for name, groups in self.chosen.items():
            self.runs[MEMORY][name] = [self.first_token(name, groups["tg"], self.options.prompt)[1]]
        for _ in range(self.options.repeat):
            for name, groups in self.chosen.items():
                if dropped(self.file):
                    self.runs[COLD][name].append(self.first_token(name, groups["tg"])[0])
                for settings in set(groups.values()):
                    self.loads[name, settings].append(self.first_token(name, settings)[0])
                self.runs[WARM][name] = self.loads[name, groups["tg"]]
        if len(self.runs[COLD]) < len(self.chosen):
            del self.runs[COLD]

    def result(self) -> dict:
        """All measurements."""
        self.chosen = {name: self.choose(name) for name in self.programs}
        self.rounds()
        self.starts()
        read, fma = map(statistics.median, zip(*self.limits, strict=True))
        tests = {}
        for name, runs in self.runs.items():
            tests[name] = {
                who: {"median": statistics.median(them), "runs": them} for who, them in runs.items()
            }
            for it in tests[name].values():
                ratio = tests[name][OURS]["median"] / it["median"]
                it["ratio"] = 1 / ratio if name in UNITS else ratio
        for test in self.tests:
            for who, it in tests[str(test)].items():
                settings = self.chosen[who][test.group]
                it["settings"] = [key for key, on in zip(("fa", "rtr"), settings, strict=False) if on]
                it["first_token"] = statistics.median(self.loads[who, settings])
            ours, (nbytes, operations) = tests[str(test)][OURS], self.costs[test]
            ours["share_of_read_bandwidth"] = nbytes * ours["median"] / test.length / read
            ours["share_of_fma_peak"] = operations * ours["median"] / test.length / fma
        about = {"file": self.file.name, "about": self.about, "threads": self.options.threads}
        limits = {"read_bandwidth": read, "fma_peak": fma}
        return about | {"depth": self.options.depth} | limits | {"tests": tests}


def dropped(file: Path) -> bool:
    """Drop the file's pages from the page cache. False if some are still there, or nobody can say."""
    if not hasattr(os, "RWF_NOWAIT"):  # only Linux has it
        return False
    with file.open("rb") as stream:
        os.fsync(stream.fileno())
        os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        for part in range(64):
            with suppress(BlockingIOError):  # it is not in memory
                os.preadv(stream.fileno(), [bytearray(1)], file.stat().st_size * part // 64, os.RWF_NOWAIT)
                return False
    return True


def rows(result: dict) -> Iterator[str]:
    """The lines of the table for one file, in Markdown."""
    read, fma = f"{result['read_bandwidth'] / 1e9:.1f} GB/s", f"{result['fma_peak'] / 1e9:.0f} Gop/s"
    for name, test in result["tests"].items():
        unit, scale = UNITS.get(name, ("tokens/s", 1))
        ours = test[OURS]
        limit = f"{ours['share_of_fma_peak']:.0%} of {fma}" if "share_of_fma_peak" in ours else ""
        if name.startswith("tg"):
            limit = f"{ours['share_of_read_bandwidth']:.0%} of {read}"
        depth = f" @ d{result['depth']}" if result["depth"] and name not in UNITS else ""
        cells = [result["file"], f"{name}{depth}, {unit}", f"{ours['median'] / scale:.2f}", limit]
        for who in list(result["about"])[1:]:
            if it := test.get(who):
                used = [*it["settings"], f"{it['first_token']:.1f} s"] if "settings" in it else []
                note = f" ({' '.join(used)})" if used else ""
                cells += [f"{it['median'] / scale:.2f}{note}", f"{it['ratio']:.2f}"]
            else:
                cells += ["", ""]
        yield f"| {' | '.join(cells)} |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE.gguf")
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--new", type=int, default=64)
    parser.add_argument("-d", "--depth", type=int, default=0, help="positions already in the cache")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("--llama-cpp", metavar="PYTHON", help="an interpreter that has llama_cpp")
    parser.add_argument("--ik", metavar="LLAMA_BENCH", help="ik_llama.cpp's llama-bench")
    parser.add_argument("--json", action="store_true", help="print one JSON object a file")
    options = parser.parse_args()
    if min(options.prompt, options.new, options.threads, options.repeat) < 1 or options.depth < 0:
        parser.error("-p, -n, -t and -r must be 1 or above, -d 0 or above")
    if not options.ik and not options.llama_cpp:
        options.llama_cpp = sys.executable
    for program in filter(None, (options.ik, options.llama_cpp)):
        if not shutil.which(program):
            parser.error(f"{program} is no program")
    for file in options.files:
        if not file.is_file():
            parser.error(f"{file} is no file")
    return options


def main() -> None:
    options = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # the contestants end too
    for i, file in enumerate(options.files):
        result = Race(file, options).result()
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        if i == 0:
            print("\n".join(result["about"].values()))
            print(f"{options.threads} threads, medians of {options.repeat}\n")
            peers = [f"{name} | ratio" for name in result["about"] if name != OURS]
            titles = " | ".join(["file", "test", OURS, "of the limit", *peers])
            print(f"| {titles} |\n|{'---|' * (titles.count('|') + 1)}")
        print("\n".join(rows(result)), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
