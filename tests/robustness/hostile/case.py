"""What a case is: an id, a short name, and a function that builds its variants in a folder."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy_llama as nl

MiB = 1 << 20

ACCEPTED = "accepted"


@dataclass(frozen=True)
class Variant:
    """One file or input. `expected` names error classes (a subclass will do), ACCEPTED, or "exit N"."""

    name: str
    run: Callable[[], object]
    expected: tuple[str, ...]
    names: str = ""  # the file or the argument that the message must name
    says: tuple[str, ...] = ()  # and what else it must say
    seconds: float = 2.0  # of CPU time
    room: int = 64 * MiB  # of extra memory
    reference: tuple[str, Path] | None = None  # which reference reader may try which path
    patience: float = 10.0  # seconds until the watchdog ends it
    watched: bool = True  # False: it starts programs or writes files itself, so no audit
    compiles: bool = False  # Jinja compiles the template: the one exception from "nothing is compiled"


@dataclass(frozen=True)
class Case:
    id: str
    name: str
    build: Callable[[Path], Iterator[Variant]]


CASES: dict[str, Case] = {}
# Sound files that the same functions build: none of them is refused.
CONTROLS: dict[str, Case] = {}


def case(id: str, name: str):
    """Enter a function (folder) -> its variants into the table."""

    def enter(build: Callable[[Path], Iterator[Variant]]):
        table = CONTROLS if id.startswith("OK") else CASES
        assert id not in table
        table[id] = Case(id, name, build)
        return build

    return enter


def loads(path: Path) -> None:
    """Load the model and make one token with it."""
    nl.load(path, threads=1).generate("a", max_tokens=1)


def model(name: str, path: Path, *expected: str, **options) -> Variant:
    """A model that is loaded and used once. R3: it may take 64 MiB and four times its size in memory."""
    files = [path] if path.is_file() else list(path.rglob("*"))
    room = 64 * MiB + 4 * sum(file.stat().st_size for file in files)
    return Variant(name, lambda: loads(path), expected, **{"names": str(path), "room": room} | options)


def tokenizer(name: str, path: Path, *expected: str, use=lambda tokenizer: None, **options) -> Variant:
    """A tokenizer that is loaded, and used by `use`."""
    room = 64 * MiB + 4 * path.stat().st_size
    return Variant(
        name,
        lambda: use(nl.load_tokenizer(path)),
        expected,
        **{"names": str(path), "room": room} | options,
    )
