"""A test kills every bug of the museum. `pytest -s tests/museum/test_museum.py` prints which."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


def museum(*arguments: str) -> str:
    done = subprocess.run([sys.executable, RUN, *arguments], stdout=subprocess.PIPE, text=True)
    print(done.stdout)
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_every_bug_fits_the_code():
    code = "from bugs import BUGS; print(*(f'{bug.file}\\t{bug.before!r}' for bug in BUGS), sep='\\n')"
    printed = subprocess.check_output([sys.executable, "-c", code], cwd=RUN.parent, text=True)
    for file, before in (line.split("\t") for line in printed.splitlines()):
        text = (RUN.parents[2] / file).read_text()
        assert text.count(ast.literal_eval(before)) == 1, f"{file}: {before}"


@pytest.mark.slow
def test_every_historic_bug_is_caught():
    printed = museum()
    killed, of = map(int, re.search(r"^(\d+) of (\d+) killed$", printed, re.MULTILINE).groups())
    assert killed == of > 30


def test_what_changes_nothing_survives(tmp_path):
    """A change without effect survives, and the museum reports it."""
    code = (
        "import run, bugs; run.BUGS[:] = [bugs.Bug('a space', '', bugs.F, 'x * x', 'x  *  x', bugs.NORM)]; "
    )
    done = subprocess.run(
        [sys.executable, "-c", code + "raise SystemExit(run.main())"],
        cwd=RUN.parent,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert (done.returncode, done.stdout.split()[-3:]) == (1, ["of", "1", "killed"])
    assert "SURVIVED" in done.stdout


@pytest.mark.parametrize("name", ["broken.py", "nowhere.py"])
def test_what_fails_without_the_bug_is_no_judge(name):
    """A file that cannot be imported, or does not exist, kills no bug: the museum stops with an error."""
    code = f"""
import run, bugs
class Copy(run.Copy):
    def __init__(self, folder):
        super().__init__(folder)
        (folder / "tests" / "broken.py").write_text("import nowhere")
run.Copy = Copy
run.BUGS[:] = [bugs.Bug("a space", "", bugs.F, "x * x", "x  *  x", "tests/" + {name!r})]
raise SystemExit(run.main())
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=RUN.parent, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert "this fails without the bug too" in done.stderr
