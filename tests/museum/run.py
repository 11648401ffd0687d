"""Puts bugs into a copy of this project, one at a time, and reports the test that fails.

    python tests/museum/run.py                  the historic bugs of bugs.py: which test killed each
    python tests/museum/run.py "double BOS"     those whose name begins so
    python tests/museum/run.py --mutations 100  random mechanical changes by mutations.py

A bug survives if no test fails: exit code 1. Slow modules are imported once, and the tests of each bug run in
a fork of that process. A test that fails with a bug must pass without it.
"""

import argparse
import compileall
import gc
import hashlib
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
from py_compile import PycInvalidationMode

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[0] = str(HERE)
# The kernels use the OpenMP library that PyTorch loads. By default its threads spin while they wait, as those
# of NumPy's OpenBLAS do, which slows down other tests on the same CPUs. The libraries read these variables
# when they are loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import hypothesis  # noqa: E402
import numpy  # noqa: E402, F401
import pytest  # noqa: E402
import torch  # noqa: E402
from bugs import BUGS, Bug  # noqa: E402
from mutations import mutations  # noqa: E402
from transformers import LlamaForCausalLM  # noqa: E402, F401

torch.set_num_threads(1)
VECTOR_FILES = ("csrc/vec", "csrc/unpack.h", "csrc/linear_gem")  # these have no scalar forms
LIMIT = 900  # seconds, many times the duration of the tests: a bug that makes them hang is killed too


@dataclass(frozen=True)
class Verdict:
    killed_by: str | None  # the first test that failed; None: the bug has survived
    law: str = ""  # the statement of that test


class Copy:
    """A copy of the project, in which one file at a time is changed."""

    def __init__(self, folder: Path):
        self.folder = folder
        ours = shutil.ignore_patterns("__pycache__", ".*", "build", "*.egg-info", "museum")
        for name in ("numpy_llama", "csrc", "tests"):
            shutil.copytree(ROOT / name, folder / name, ignore=ours)
        for name in ("pyproject.toml", "setup.py", "README.md"):
            shutil.copy(ROOT / name, folder)
        # Each fork imports the package again. A changed file has another hash, so it is compiled again.
        compileall.compile_dir(
            folder / "numpy_llama", quiet=1, invalidation_mode=PycInvalidationMode.CHECKED_HASH
        )
        self.kernels = next(iter(sorted((folder / "numpy_llama" / "backend").glob("_kernels*.so"))), None)
        if self.kernels is None:  # the package is installed elsewhere
            found = Path(subprocess.check_output([sys.executable, "-c", WHERE], text=True).strip())
            self.kernels = Path(shutil.copy(found, folder / "numpy_llama" / "backend"))
        self.built = self.kernels.read_bytes()
        self.pass_without_bugs: set[tuple[object, ...]] = set()

    def judge(self, bug: Bug) -> Verdict:
        """Put the bug in, run its tests, and take it out again."""
        path, numpy_alone = self.folder / bug.file, not bug.file.startswith("csrc/")
        text = path.read_text()
        if text.count(bug.before) != 1:
            raise SystemExit(f"{bug.name}: {bug.file} holds {bug.before!r} {text.count(bug.before)} times")
        try:
            path.write_text(text.replace(bug.before, bug.after))
            if bug.file.startswith("csrc/"):
                self.compile(vectors=bug.file.startswith(VECTOR_FILES))
            killed_by, law = forked(self.folder, bug.tests.split(), numpy_alone)
        finally:
            path.write_text(text)
            if bug.file.startswith("csrc/"):
                self.kernels.unlink()
                self.kernels.write_bytes(self.built)
        if killed_by:
            one = killed_by.removesuffix(UNIMPORTABLE)  # a test or a file; else pytest, a signal or the clock
            alone = [one] if "::" in one or one.endswith(".py") else bug.tests.split()
            if (*alone, numpy_alone) not in self.pass_without_bugs:
                if forked(self.folder, alone, numpy_alone)[0]:
                    log = (self.folder / "log.txt").read_text()[-2000:]
                    raise SystemExit(f"{killed_by}: this fails without the bug too\n{log}")
                self.pass_without_bugs.add((*alone, numpy_alone))
        return Verdict(killed_by, law)

    def compile(self, vectors: bool) -> None:
        """Compile the kernels again, with little optimization, which does not change their results.

        Without `vectors` only the scalar forms, which takes a tenth of the time.
        A source whose preprocessed text was compiled before keeps its object file.
        """
        source = self.folder / "_kernels.c"
        if not source.exists():
            run([sys.executable, "-c", EMIT, source], self.folder / "csrc")
        sys.path.insert(0, str(self.folder / "csrc"))
        from build_kernels import COMPILE, SOURCES, openmp_flags

        compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc").split()[0]
        options = [*COMPILE, "-O1", "-w", "-fPIC", *openmp_flags()]
        options += ["-DPy_LIMITED_API=0x030a0000", "-I", "csrc", "-I", sysconfig.get_paths()["include"]]
        options += [] if vectors else ["-DSCALAR_ONLY"]
        objects = []
        for name in [str(source), *(f"csrc/{name}" for name in SOURCES)]:
            text = run([compiler, *options, "-E", name], self.folder)
            objects.append(self.folder / f"{hashlib.sha256(text).hexdigest()}.o")
            if not objects[-1].exists():
                run([compiler, *options, "-c", name, "-o", objects[-1]], self.folder)
        self.kernels.unlink()  # not overwritten, because it may be mapped
        run([compiler, *options, "-shared", *objects, "-o", self.kernels], self.folder)


def run(command: list[object], folder: Path) -> bytes:
    """What a command prints. CalledProcessError if it fails."""
    return subprocess.run([*map(str, command)], cwd=folder, check=True, stdout=subprocess.PIPE).stdout


EMIT = "import sys, build_kernels; build_kernels.make_ffi().emit_c_code(sys.argv[1])"
UNIMPORTABLE = " (it cannot even be imported)"
WHERE = "import importlib.util as u; print(u.find_spec('numpy_llama.backend._kernels').origin)"


class Witness:
    """A pytest plugin that keeps the first failure. `numpy_alone`: run the laws only on NumPy's functions."""

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
            self.killed_by = report.nodeid + UNIMPORTABLE


def implementation(item):
    return getattr(item, "callspec", None) and item.callspec.params.get("ops")


def forked(folder: Path, tests: list[str], numpy_alone: bool = False) -> tuple[str | None, str]:
    """Run tests on the copy in a child process: -> the first test that failed, and its law."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:  # the child must never return into the parent's code
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
        del sys.modules[name]  # the original's module
    # Without entry points: for those pytest would rewrite the asserts of the whole package in each fork.
    os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    options = ["-x", "-q", "--tb=short", "-p", "no:cacheprovider", "-p", "numpy_llama.proof.plugin"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]  # hypothesis is already imported
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
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],  # without shrinking
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    with tempfile.TemporaryDirectory() as folder:
        copy = Copy(Path(folder))
        gc.freeze()  # what is imported stays: no fork looks through it, or copies its pages
        for bug in bugs:
            yield bug, copy.judge(bug)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", nargs="?", default="", help="only bugs whose name begins so")
    parser.add_argument("--mutations", type=int, default=0, metavar="N", help="N mechanical changes instead")
    parser.add_argument("--seed", type=int, default=0, help="the seed that chooses them [%(default)s]")
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
