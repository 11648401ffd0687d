"""The course is whole: each chapter has its parts, every experiment can fail, every grader finds laws.

That its cells run, and that what it quotes is there, shows when it is built: python -m sphinx -W -n docs OUT.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CHAPTERS = sorted((ROOT / "docs" / "course").glob("*.md"))
CELLS = re.compile(r"^```\{code-cell\} ipython3\n(.*?)^```$", re.DOTALL | re.MULTILINE)
PARTS = ["A picture", "What pins it down", "Your turn", "Would you have caught it?"]


def test_there_are_twenty_four():
    assert [path.name[:2] for path in CHAPTERS] == [f"{n:02}" for n in range(24)]


def test_each_word_is_explained_once_in_its_place():
    _, _, glossary = (ROOT / "docs" / "reference" / "names.md").read_text().partition("## Words")
    words = [word.lower() for word in re.findall(r"^(.+)\n: ", glossary, re.MULTILINE)]
    assert len(words) > 40 and words == sorted({*words})


def test_every_gradient_is_quoted():
    source = (ROOT / "numpy_llama" / "backward.py").read_text()
    quoted = re.findall(
        r"^```\{literalinclude\} .*/backward\.py\n:pyobject: (\w+)$",
        "".join(path.read_text() for path in CHAPTERS),
        re.MULTILINE,
    )
    assert sorted(quoted) == sorted(re.findall(r"^(?:def|class) (\w+)", source, re.MULTILINE))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_a_chapter_has_its_parts(path):
    text = path.read_text()
    headings = re.findall(r"^## (.*)$", text, re.MULTILINE)
    assert [part for part in PARTS if not any(heading.startswith(part) for heading in headings)] == []
    assert re.search(r"^\*\*.+\?\*\*$", text, re.MULTILINE)  # the question
    assert "```{bug} " in text and ("$$" in text or path.stem.startswith(("09", "14")))


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_experiment_can_fail_and_every_figure_is_described(path):
    for cell in CELLS.findall(path.read_text()):
        if "remove-input" in cell:
            assert re.search(r":    alt: \w.{40,}", cell), cell
        else:
            assert re.search(r"^\s*assert |^agree\(\)$", cell, re.MULTILINE), cell


@pytest.fixture(scope="module")
def held():
    """The grader's counts for the exercises as a student finds them: {operation: (laws held, all laws)}."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "--pyargs"]
    done = subprocess.run(
        [*command, "numpy_llama.proof", "--ops", "exercises/my_ops.py"],
        cwd=ROOT,
        env={**os.environ, "HYPOTHESIS_PROFILE": "few"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "rms_norm is not written yet" in done.stdout
    _, _, table = done.stdout.partition("laws that hold")
    return {name: (int(n), int(of)) for name, n, of in re.findall(r"^(\w+) +(\d+) of (\d+)", table, re.M)}


def test_what_is_not_written_keeps_no_law(held):
    stubs = re.findall(r"^(?:def|class) (\w+)", (ROOT / "exercises" / "my_ops.py").read_text(), re.MULTILINE)
    assert {*held} == {*stubs} and len(stubs) > 20
    assert {name: n for name, (n, _) in held.items() if n} == {}


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: path.stem)
def test_every_grader_finds_laws(path, held):
    text = path.read_text()
    graders = re.findall(r"--ops my_ops\.py(?: -k (?:\"([^\"]+)\"|(\w+)))?$", text, re.MULTILINE)
    assert graders
    for quoted, word in graders:
        for name in {*re.findall(r"\w+", quoted or word)} - {"and", "or", "not"}:
            chapter = ROOT / "numpy_llama" / "proof" / f"test_{name.removeprefix('test_')}.py"
            assert chapter.exists() or any(name in operation for operation in held), name
