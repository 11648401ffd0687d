"""The package's rooms: what lies in each, how long the four files are, and that imports run downwards.

`pytest -s` prints the tree with its lines, and the rooms that each room imports.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import numpy_llama

PACKAGE = Path(numpy_llama.__file__).parent
# A room is a folder of the package, or a module beside them. A floor imports those below it, and its own.
FLOORS = [
    {"__init__", "__main__"},
    {"cli"},
    {"verify", "proof", "inspect", "evaluation", "training"},
    {"llama"},
    {"parallel"},
    {"checkpoint"},
    {"backend", "generation"},
    {"learner", "lora"},
    {"model", "backward"},
    {"functional", "cache", "rope", "parts", "window"},
    {"config", "text"},
    {"errors", "system"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
FOUR = ("config", "functional", "cache", "model")
Imports = dict[str, dict[str, list[str]]]


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def imported(path: Path, package: Path) -> Iterator[str]:
    """All modules that a file imports, wherever the statement stands; ours as 'numpy_llama.name'."""
    inside = [package.name, *path.relative_to(package).parent.parts]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = inside[: len(inside) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base == [package.name]:  # from . import functional
                yield from (f"{package.name}.{alias.name}" for alias in node.names)
            else:
                yield ".".join(base)


def room_of(path: Path, package: Path) -> str:
    return path.relative_to(package).parts[0].removesuffix(".py")


def imports(package: Path) -> Imports:
    """Room -> the rooms that it imports -> the files that do so."""
    rooms = {room_of(path, package) for path in files(package)}
    graph: Imports = {room: {} for room in rooms}
    for path in files(package):
        room = room_of(path, package)
        for name in imported(path, package):
            other = name.split(".")[1] if name.startswith(f"{package.name}.") else ""
            if other in rooms - {room}:  # another name is a value of the package itself
                graph[room].setdefault(other, []).append(path.relative_to(package).as_posix())
    return graph


def upwards(graph: Imports) -> list[str]:
    return [
        f"{', '.join(sorted(set(files)))} imports {other}, which lies above {room}"
        for room, others in graph.items()
        for other, files in others.items()
        if FLOOR[other] < FLOOR[room]
    ]


def circle(graph: Imports) -> set[str]:
    """The rooms that stand in a circle, or lead to one."""
    left = {room: set(others) for room, others in graph.items()}
    while leaves := {room for room, others in left.items() if not others}:
        left = {room: others - leaves for room, others in left.items() if room not in leaves}
    return set(left)


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def tree(folder: Path, indent: str = "") -> Iterator[str]:
    """Files first, then folders, each with its lines."""
    for path in sorted(folder.glob("*.py")):
        yield f"{indent + path.name:<44}{lines(path):>6}"
    for inner in sorted(path for path in folder.iterdir() if path.is_dir() and files(path)):
        yield f"{indent + inner.name + '/':<44}{sum(map(lines, files(inner))):>6}"
        yield from tree(inner, indent + "  ")


def table(graph: Imports) -> Iterator[str]:
    for room in sorted(graph, key=lambda room: (FLOOR[room], room)):
        below = sorted(graph[room], key=lambda other: (FLOOR[other], other))
        yield f"{FLOOR[room]}  {room:<12} -> {', '.join(below) or '-'}"


def test_imports_run_downwards_and_not_in_circles():
    graph = imports(PACKAGE)
    print("", f"{PACKAGE.name}/", *tree(PACKAGE, "  "), "", sep="\n")
    assert graph.keys() == FLOOR.keys(), "FLOORS must say what may import each room"
    print(*table(graph), sep="\n")
    assert not upwards(graph)
    assert not circle(graph)


def test_who_may_know_the_backend():
    """The model is handed its functions, and generation is handed the model: neither asks which one runs."""
    graph = imports(PACKAGE)
    assert {room for room, others in graph.items() if "backend" in others} <= {
        "__init__", "cli", "verify", "proof", "inspect", "training", "llama", "parallel", "checkpoint",
    }  # fmt: skip


@pytest.mark.parametrize(
    "file, line, above",
    [
        ("model.py", "from .llama import load", "llama, which lies above model"),
        ("model.py", "def f():\n    import numpy_llama.cli.chat", "cli, which lies above model"),
        ("text/chat.py", "from .. import functional", "functional, which lies above text"),
        ("text/chat.py", "from ..errors import E", None),
        ("text/chat.py", "from .bpe import merge", None),
        ("text/chat.py", "from .. import __version__", None),
    ],
)
def test_an_arrow_upwards_is_seen(file, line, above, tmp_path):
    package = tmp_path / "numpy_llama"
    for name in ("__init__", "model", "llama", "functional", "errors", "cli/chat", "text/chat"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / f"{name}.py").touch()
    (package / file).write_text(line)
    assert upwards(imports(package)) == ([f"{file} imports {above}"] if above else [])


def test_a_circle_is_seen():
    assert circle({"a": {"b": []}, "b": {"c": []}, "c": {"b": []}, "d": {}}) == {"a", "b", "c"}
    assert circle({"a": {"b": []}, "b": {"c": []}, "c": {}}) == set()


def test_the_four_files_are_short():
    assert lines(PACKAGE / "model.py") < 200
    assert sum(lines(PACKAGE / f"{name}.py") for name in FOUR) <= 470


def test_what_the_core_imports():
    ours = {f"numpy_llama.{name}" for name in ("functional", "cache", "config", "parts")}
    outside = {"numpy", "typing", "collections.abc", "dataclasses", "functools"}
    assert set(imported(PACKAGE / "model.py", PACKAGE)) <= ours | outside
    ours = {f"numpy_llama.{name}" for name in ("config", "errors")}
    assert set(imported(PACKAGE / "functional.py", PACKAGE)) <= ours | {"numpy", "math"}
