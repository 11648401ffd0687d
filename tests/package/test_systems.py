"""What differs between systems has one room, and text has one encoding."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "numpy_llama"
SOURCES = sorted([*PACKAGE.rglob("*.py"), *ROOT.glob("csrc/*.py"), ROOT / "setup.py"])
ASKS = re.compile(r"\bsys\.platform\b|\bos\.name\b|\bplatform\.system\b")
# Modules that Windows lacks, and those that only it has.
OF_ONE_SYSTEM = {"fcntl", "grp", "pty", "pwd", "readline", "resource", "termios", "tty"} | {
    "msvcrt",
    "winreg",
}
# The first runs as a program of its own; the second is reached on systems with os.fork alone.
EXCEPTIONS = {"generation/try_grammar.py", "parallel/watch.py"}


def imported(source: str) -> set[str]:
    """The modules that a file imports, wherever the statement stands."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module)
    return names


def test_one_room_asks_for_the_system():
    found = set()
    for path in PACKAGE.rglob("*.py"):
        source = path.read_text(encoding="utf-8")
        if path.parent.name != "system" and (ASKS.search(source) or imported(source) & OF_ONE_SYSTEM):
            found.add(path.relative_to(PACKAGE).as_posix())
    assert found == EXCEPTIONS


def test_commands_in_messages_run_in_every_shell():
    """cmd of Windows takes single quotes as letters."""
    quoted = re.compile(r"(pip install|numpy-llama \w+)[^\n`]* '")
    named = {path.name for path in PACKAGE.rglob("*.py") if quoted.search(path.read_text(encoding="utf-8"))}
    assert named == set()


def texts_without_encoding(source: str) -> Iterator[int]:
    """The lines that open a text whose encoding is the system's, on Windows cp1252 or another."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name, owner = ast.unparse(node.func).rpartition(".")[2], ast.unparse(node.func).rpartition(".")[0]
        given = {keyword.arg: keyword.value for keyword in node.keywords}
        mode = given.get("mode")
        if name == "open" and owner not in ("os", "archive"):
            places = node.args[0 if owner else 1 :]
            mode = places[0] if places else mode
        elif name.endswith("TemporaryFile"):
            mode = node.args[0] if node.args else mode or ast.Constant("w+b")
        elif name not in ("read_text", "write_text"):
            continue
        is_binary = isinstance(mode, ast.Constant) and "b" in mode.value
        if not is_binary and "encoding" not in given:
            yield node.lineno


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_text_has_an_encoding(path):
    assert list(texts_without_encoding(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "line, found",
    [
        ("open(path)", True),
        ("open(path, 'w')", True),
        ("open(path, 'rb')", False),
        ("open(path, encoding='utf-8')", False),
        ("path.open()", True),
        ("path.open('a', newline='')", True),
        ("path.open('xb')", False),
        ("Path('a').read_text(errors='replace')", True),
        ("path.write_text(text, encoding='utf-8')", False),
        ("os.open(path, os.O_RDONLY)", False),
        ("TemporaryFile()", False),
        ("TemporaryFile('w+')", True),
    ],
)
def test_a_text_without_encoding_is_seen(line, found):
    assert bool(list(texts_without_encoding(line))) == found


def test_types_are_checked_for_each_system():
    """The types of Python's own library say which names each system has."""
    checks = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert {"mypy", "mypy --platform win32", "mypy --platform darwin"} <= {*checks}
