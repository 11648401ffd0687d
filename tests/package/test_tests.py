"""Rules of the tests themselves: what they share lies in helpers, and the paths that are named exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"
# The chapters of laws are test modules too.
MODULES = sorted([*TESTS.rglob("test_*.py"), *ROOT.glob("numpy_llama/proof/test_*.py")])
FOLDERS = ("docs", "numpy_llama", "tests")
NAMING = ["*.md", "csrc/*", *(f"{folder}/**/*.{kind}" for folder in FOLDERS for kind in ("md", "py"))]


def imports(source: str) -> set[str]:
    """Each part of each name that is imported, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
    return {part for name in names for part in name.split(".")}


def test_no_file_imports_a_test_module():
    modules = {path.stem for path in MODULES} | {"conftest"}
    for path in TESTS.rglob("*.py"):
        found = imports(path.read_text()) & modules
        assert not found, f"{path.relative_to(ROOT)} imports {found}; what is shared lies in tests/helpers"


IMPORTS = ["import test_cli", "from test_cli import x", "from .. import test_cli", "import cli.test_cli"]


@pytest.mark.parametrize("line", IMPORTS)
def test_an_import_of_a_test_module_is_seen(line):
    assert "test_cli" in imports(line) & imports(f"def f():\n    {line}")


def test_a_name_says_which_file_is_meant():
    names = [path.name for path in MODULES if TESTS in path.parents]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("maker", [r"^\w+ = (\w+\.)?ModelArgs\(", r"^def random_weights\("])
def test_the_tiny_model_is_made_in_one_place(maker):
    """That is numpy_llama/proof/tiny.py. Those of helpers/generations.py are cut as Meta cut its own."""
    makers = {path.name for path in TESTS.rglob("*.py") if re.search(maker, path.read_text(), re.MULTILINE)}
    assert makers <= {"generations.py"}


def test_paths_that_are_named_exist():
    for path in {path for pattern in NAMING for path in ROOT.glob(pattern) if path.is_file()}:
        for named in re.findall(r"\btests/[\w/.-]*\w", path.read_text(errors="replace")):
            assert (ROOT / named).exists(), f"{path.relative_to(ROOT)} names {named}"
