"""The package's names come when they are asked for, and Ctrl-C is heard before they do."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import numpy_llama as nl


def python(code: str) -> str:
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_importing_the_package_imports_nothing_else():
    code = "import sys; before = set(sys.modules); import numpy_llama; print(*set(sys.modules) - before)"
    ours = [name for name in python(code).split() if name.startswith(("numpy", "jinja2", "numpy_llama."))]
    assert ours == ["numpy_llama"]


def test_names_are_there():
    assert set(nl.__all__) <= set(dir(nl))
    for name in nl.__all__:
        assert getattr(nl, name).__name__ == name
    with pytest.raises(AttributeError, match="module 'numpy_llama' has no attribute 'nope'"):
        nl.nope  # noqa: B018
    with pytest.raises(ImportError):
        from numpy_llama import nope  # noqa: F401


def test_what_type_checkers_see_is_what_there_is():
    source = Path(nl.__file__).read_text()
    seen = [line.split() for line in source.splitlines() if line.startswith("    from .")]
    assert {(module.removeprefix("."), name) for _, module, _, name, _, _ in seen} == {
        (module, name) for name, module in nl._HOME.items()
    }


@pytest.mark.parametrize(
    "first", ["", "import numpy_llama.llama", "from numpy_llama.checkpoint.download import locate"]
)
def test_pull_is_the_function_and_not_its_module(first):
    code = "import numpy_llama as nl; from numpy_llama import pull; print(nl.pull is pull, callable(pull))"
    assert python(f"{first}\n{code}") == "True True\n"
    code = "from numpy_llama import *; import numpy_llama.generation.generate; print(load, KVCache, pull)"
    assert "<function pull" in python(f"{first}\n{code}")


@pytest.mark.parametrize("command", [["-m", "numpy_llama"], ["-c", "import numpy_llama.cli as c; c.main()"]])
def test_the_command_line_runs(command):
    done = subprocess.run([sys.executable, *command, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"numpy-llama {nl.__version__}\n")


# Announces itself where `main` imports the command line, and then waits for standard input.
BEGIN = """
import os, sys
from numpy_llama.__main__ import main
class Announce:
    def find_spec(self, name, *where):
        if name == "numpy_llama.cli":
            os.write(1, b".")
sys.meta_path.insert(0, Announce())
sys.exit(main())
"""


def begin(**options) -> subprocess.Popen:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", BEGIN, "generate"], **pipes, **options)
    assert process.stdout.read(1) == b"."
    return process


SWEEP = [ms if ms % 100 == 0 else pytest.param(ms, marks=pytest.mark.slow) for ms in range(0, 400, 25)]


@pytest.mark.parametrize("milliseconds", SWEEP)
def test_ctrl_c_during_the_imports_is_quiet(milliseconds):
    with begin() as process:
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
        assert (process.stdout.read(), process.stderr.read()) == (b"", b"")


def test_ctrl_c_is_ignored_by_those_who_were_started_so():
    with begin(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN)) as process:
        for _ in range(10):
            process.send_signal(signal.SIGINT)
            time.sleep(0.03)
        _, stderr = process.communicate(timeout=60)
        assert process.returncode == 2 and b"Traceback" not in stderr  # there was nothing to read


def test_ctrl_c_is_a_keyboard_interrupt_again_when_all_is_imported():
    code = (
        "import signal, sys; import numpy_llama.__main__ as m; sys.argv = ['numpy-llama', 'doctor']\n"
        "m.main()\n"
        "try: signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt: print('heard')"
    )
    assert python(code).endswith("heard\n")
