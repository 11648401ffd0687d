"""Lines that a person types, one at a time: a mark before each, editing, and a history in a file.

The history is a convenience: if its file cannot be read or written, there is none, and nothing is said.
"""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from .. import parallel, system

MOST_LINES = 1000  # of the history
MOST_CHARACTERS = 10_000  # of a line in it
PRIVATE = 0o600  # nobody else reads what was asked


def history_file() -> Path:
    """numpy_llama/chat_history in the user's folder of what programs remember."""
    return system.state_folder() / "numpy_llama" / "chat_history"


class Lines:
    """The lines of standard input. On a terminal they are edited, and those of former runs come back."""

    def __init__(self) -> None:
        self.typed = sys.stdin.isatty()
        self.edited = self.typed and sys.stdout.isatty()
        if self.edited:
            system.edit_lines(old_lines())

    def ask(self, mark: str) -> str:
        """The next line, without its end, after a mark that is not part of the answers. EOFError if none."""
        if self.edited:
            line = input(mark)
            remember(line)
            return line
        if not self.typed:
            parallel.await_reader(1)  # mpiexec could show the mark before the end of the answer
        print(mark, end="", file=sys.stderr, flush=True)
        if self.typed:
            return input()
        if not (data := sys.stdin.buffer.readline()):  # sys.stdin would decode more than a line at once
            raise EOFError
        return data.decode().removesuffix("\n").removesuffix("\r")


def old_lines() -> list[str]:
    """The last lines of the history. Each is a JSON text in the file, because pasted text has newlines."""
    lines: list[str] = []
    with suppress(OSError, RuntimeError):  # no file, no home
        stored = history_file().read_bytes().splitlines(keepends=True)
        for text in stored[-MOST_LINES:]:
            with suppress(ValueError):
                line = json.loads(text)
                lines += [line] if isinstance(line, str) and "\0" not in line else []
        if len(stored) > 2 * MOST_LINES:
            _write(stored[-MOST_LINES:], os.O_TRUNC)
    return lines


def remember(line: str) -> None:
    """Add a line to the history."""
    if line.strip() and len(line) <= MOST_CHARACTERS:
        with suppress(OSError, RuntimeError):
            history_file().parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            _write([json.dumps(line).encode() + b"\n"], os.O_APPEND)


def _write(lines: list[bytes], how: int) -> None:
    with open(os.open(history_file(), os.O_WRONLY | os.O_CREAT | how, PRIVATE), "wb") as file:
        file.writelines(lines)
