"""The files beside the package agree with it and with each other: version, tools, Pythons, citation."""

import re
import shutil
import subprocess
from fnmatch import fnmatch
from pathlib import Path

import pytest
import yaml

import numpy_llama as nl

ROOT = Path(__file__).parents[2]
PYPROJECT = (ROOT / "pyproject.toml").read_text()
CHECKS = ["ruff check", "ruff format", "clang-format", "mypy"]


def test_the_version_stands_in_one_place():
    assert re.fullmatch(r"\d+\.\d+\.\d+", nl.__version__)
    assert re.search(r'^dynamic = \["version"\]', PYPROJECT, re.MULTILINE)
    assert 'version = { attr = "numpy_llama.__version__" }' in PYPROJECT
    source = (ROOT / "numpy_llama" / "__init__.py").read_text()
    assert (
        f'\n__version__ = "{nl.__version__}"\n' in source
    )  # a literal: setuptools reads it without an import
    others = ["pyproject.toml", "setup.py", "README.md", "CITATION.cff", "docs/conf.py"]
    assert [path for path in others if nl.__version__ in (ROOT / path).read_text()] == []


def test_a_wheel_has_every_room():
    listed = re.findall(r'^    "(numpy_llama[\w.]*)",$', PYPROJECT, re.MULTILINE)
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in (ROOT / "numpy_llama").rglob("__init__.py")}
    assert {name.replace(".", "/") for name in listed} >= rooms


def test_the_changelog_begins_with_this_version():
    headings = re.findall(r"^## \[([^]]+)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert headings and headings[0] in (nl.__version__, "Unreleased")
    assert nl.__version__ in headings


def test_the_citation_can_be_read():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert citation["cff-version"] == "1.2.0" and citation["title"] == "numpy_llama"
    assert f'license = "{citation["license"]}"' in PYPROJECT


@pytest.mark.skipif(not (ROOT / ".git").exists() or not shutil.which("git"), reason="git lists the files")
def test_a_source_distribution_has_every_file():
    command = ["git", "-c", "safe.directory=*", "ls-files"]  # the checkout may be another user's
    tracked = subprocess.check_output(command, cwd=ROOT, text=True).split()
    found_by_setuptools = ["LICENSE", "MANIFEST.in", "numpy_llama", "pyproject.toml", "setup.py"]
    lines = [line.split() for line in (ROOT / "MANIFEST.in").read_text().splitlines()]
    patterns = [p for verb, *words in lines if verb in ("include", "graft") for p in words]
    names = {name.partition("/")[0] for name in tracked}.difference(found_by_setuptools)
    assert [name for name in sorted(names) if not any(fnmatch(name, p) for p in patterns)] == []


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "tests.yml").read_text())


def steps(workflow: dict, job: str) -> list[str]:
    return [step["run"] for step in workflow["jobs"][job]["steps"] if "run" in step]


def test_the_workflow_tries_every_python(workflow):
    (oldest,) = re.findall(r'requires-python = ">=3\.(\d+)"', PYPROJECT)
    tried = [
        int(python.partition(".")[2]) for python in workflow["jobs"]["tests"]["strategy"]["matrix"]["python"]
    ]
    assert tried == [*range(int(oldest), max(tried) + 1)] and len(tried) >= 5


def test_the_workflow_runs_the_commands_of_the_readme(workflow):
    last = re.findall(r"^```sh\n(.*)\n```$", (ROOT / "README.md").read_text(), re.MULTILINE)[-1]
    assert [command for command in last.split(" && ") if command not in steps(workflow, "tests")] == []


def test_the_same_checks_run_everywhere(workflow):
    """Before a commit, in `.ci/run` and in the public CI, with the tools of the lint extra."""
    local = [line.strip() for line in (ROOT / ".ci" / "run").read_text().splitlines()]
    public = [step for step in steps(workflow, "lint") if not step.startswith("pip ")]
    assert [step.split()[0] for step in public] == ["ruff", "ruff", "clang-format", "mypy", "mypy", "mypy"]
    assert [step for step in public if step not in local] == []
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert [check for check in CHECKS if not any(hook["entry"].startswith(check) for hook in hooks)] == []
    (lint,) = re.findall(r"^lint = \[(.*)\]$", PYPROJECT, re.MULTILINE)
    assert {hook["entry"].split()[0] for hook in hooks} == {*re.findall(r'"([\w-]+)==', lint)}
    assert all(hook["language"] == "system" for hook in hooks)
