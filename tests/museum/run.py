"""Puts faults into a copy of this project, one at a time, and looks which test fails.

    python tests/museum/run.py                  the historic bugs of bugs.py: a table of who killed them
    python tests/museum/run.py "double BOS"     those whose name begins so
    python tests/museum/run.py --mutations 100  small mechanical changes of mutations.py, drawn by chance

A fault that no test notices has survived: exit code 1. What is slow to import is imported once, and each
fault gets a fork of that. A test that has noticed one must pass without it.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[0] = str(HERE)
# PyTorch brings the OpenMP that the kernels then use too. By default its threads spin while they wait, which
# makes other tests that share the CPUs wait as well. Read when it is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")

import hypothesis  # noqa: E402
import numpy  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
from bugs import BUGS, Bug  # noqa: E402
from mutations import mutations  # noqa: E402

torch.set_num_threads(1)
LIMIT = 900  # seconds, many times what the tests take: a fault that makes them hang is noticed too


@dataclass(frozen=True)
class Verdict:
    killed_by: str | None  # the first test that failed; None: the fault has survived
    law: str = ""  # what that test states


class Copy:
    """The project in a folder of its own, where one file at a time is changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        ours = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "museum")
        for name in ("numpy_llama", "csrc", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ours)
        for name in ("pyproject.toml", "setup.py", "README.md"):
            shutil.copy(ROOT / name, folder)
        self.kernels = next(iter(sorted((folder / "numpy_llama" / "backend").glob("_kernels*.so"))), None)
        if self.kernels is None:  # the package is installed elsewhere
            found = Path(subprocess.check_output([sys.executable, "-c", WHERE], text=True).strip())
            self.kernels = Path(shutil.copy(found, folder / "numpy_llama" / "backend"))
        self.built = self.kernels.read_bytes()

    def judge(self, bug: Bug) -> Verdict:
        """Put the fault in, run the tests that should notice, take it out again."""
        path = self.folder / bug.file
        text = path.read_text()
        if text.count(bug.before) != 1:
            raise SystemExit(f"{bug.name}: {bug.file} holds {bug.before!r} {text.count(bug.before)} times")
        try:
            path.write_text(text.replace(bug.before, bug.after))
            if bug.file.startswith("csrc/"):
                self.compile()
            killed_by, law = forked(self.folder, bug.tests.split(), not bug.file.startswith("csrc/"))
        finally:
            path.write_text(text)
            if bug.file.startswith("csrc/"):
                self.kernels.unlink()
                self.kernels.write_bytes(self.built)
        if "::" in (killed_by or "") and forked(self.folder, [killed_by])[0]:
            told = (self.folder / "log.txt").read_text()[-2000:]
            raise SystemExit(f"{killed_by} fails without the fault too\n{told}")
        return Verdict(killed_by, law)

    def compile(self) -> None:
        """The kernels anew, little optimized: the fault is in what they compute."""
        source = self.folder / "_kernels.c"
        subprocess.run(
            [sys.executable, "-c", EMIT, source],
            cwd=self.folder / "csrc",
            check=True,
            stdout=subprocess.DEVNULL,
        )
        sys.path.insert(0, str(self.folder / "csrc"))
        from build_kernels import COMPILE, SOURCES, openmp_flags

        compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
        options = [*COMPILE, "-O1", "-w", "-fPIC", "-shared", *openmp_flags()]
        options += ["-DPy_LIMITED_API=0x030a0000", "-I", "csrc", "-I", sysconfig.get_paths()["include"]]
        self.kernels.unlink()  # never written over: it may be mapped
        sources = [str(source), *(f"csrc/{name}" for name in SOURCES)]
        subprocess.run([compiler, *options, *sources, "-o", self.kernels], cwd=self.folder, check=True)


EMIT = "import sys, build_kernels; build_kernels.make_ffi().emit_c_code(sys.argv[1])"
WHERE = "import importlib.util as u; print(u.find_spec('numpy_llama.backend._kernels').origin)"


class Witness:
    """A pytest plugin that remembers the first failure. What is not about NumPy's own functions is left out
    where they alone were changed."""

    killed_by, law = None, ""

    def __init__(self, numpy_alone: bool):
        self.numpy_alone = numpy_alone

    def pytest_collection_modifyitems(self, items):
        if self.numpy_alone:
            items[:] = [item for item in items if str(implementation(item)) in ("None", "numpy")]

    def pytest_runtest_logreport(self, report):
        if report.failed and self.killed_by is None:
            self.killed_by, self.law = report.nodeid, getattr(report, "sentence", "")

    def pytest_collectreport(self, report):
        if report.failed and self.killed_by is None:
            self.killed_by = f"{report.nodeid} (it cannot even be imported)"


def implementation(item):
    return getattr(item, "callspec", None) and item.callspec.params.get("ops")


def forked(folder: Path, tests: list[str], numpy_alone: bool = False) -> tuple[str | None, str]:
    """Run tests in a child of this process, in the copy: -> the first that failed, and its law."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # it must never return: what stands above it on the stack belongs to the parent
        try:
            log = os.open(folder / "log.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(log, 1)
            os.dup2(log, 2)
            os.write(write, json.dumps(tried(folder, tests, Witness(numpy_alone))).encode())
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        deadline = time.monotonic() + LIMIT
        while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if time.monotonic() > deadline:
                os.kill(child, 9)
                os.waitpid(child, 0)
                return "the clock: the tests hang", ""
            time.sleep(0.02)
        if ended[1]:
            return f"an end with {os.waitstatus_to_exitcode(ended[1])}", ""
        killed_by, law = json.loads(pipe.read())
    return killed_by, law


def tried(folder: Path, tests: list[str], witness: Witness) -> tuple[str | None, str]:
    os.chdir(folder)
    sys.path[:0] = [str(folder), str(folder / "tests")]
    sys.dont_write_bytecode = True
    os.environ["HYPOTHESIS_PROFILE"] = "museum"
    for name in [name for name in sys.modules if name.partition(".")[0] == "numpy_llama"]:
        del sys.modules[name]  # of the original
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is there already
    code = pytest.main([*options, *tests], plugins=[witness])
    if code and witness.killed_by is None:
        return f"pytest, with exit code {int(code)}", ""
    return witness.killed_by, witness.law


def verdicts(bugs: list[Bug]) -> Iterator[tuple[Bug, Verdict]]:
    hypothesis.settings.register_profile(
        "museum",
        max_examples=60,
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # found is enough: no shrinking
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        for bug in bugs:
            yield bug, copy.judge(bug)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", default="", help="only those that begin so")
    parser.add_argument("--mutations", type=int, default=0, metavar="N", help="N mechanical changes instead")
    parser.add_argument("--seed", type=int, default=0, help="which of them [%(default)s]")
    args = parser.parse_args()
    bugs = mutations(ROOT, args.mutations, args.seed) if args.mutations else BUGS
    bugs = [bug for bug in bugs if bug.name.startswith(args.name)]
    survivors = 0
    for bug, verdict in verdicts(bugs):
        who = (verdict.killed_by or "SURVIVED").removeprefix("numpy_llama/proof/")
        print(f"{bug.name:<52} {who}", flush=True)
        if verdict.law:
            print(f"{'':<52}   {verdict.law}")
        survivors += verdict.killed_by is None
    print(f"{len(bugs) - survivors} of {len(bugs)} killed")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main())
