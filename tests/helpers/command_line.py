"""The program, run as a user runs it."""

import subprocess
import sys
from pathlib import Path

PROGRAM = str(Path(sys.executable).with_name("numpy-llama"))


def run(*arguments: str, stdin: bytes | None = None, **options) -> subprocess.CompletedProcess:
    """Run the program to its end; standard input is empty unless given. Output is bytes."""
    source = {"input": stdin} if stdin is not None else {"stdin": subprocess.DEVNULL}
    done = subprocess.run([PROGRAM, *arguments], capture_output=True, timeout=600, **source, **options)
    assert b"Traceback" not in done.stderr and b"Exception ignored" not in done.stderr, done.stderr.decode()
    return done


def assert_refused(done: subprocess.CompletedProcess, code: int, *words: str) -> None:
    """One line on stderr with these words, nothing on stdout, this exit code."""
    message = done.stderr.decode()
    assert done.returncode == code, message
    assert done.stdout == b"" and message.count("\n") == 1, message
    for word in words:
        assert word in message


def written(path: Path) -> tuple[int, int]:
    """The file, and when it was last written. Its time of the last access changes when it is read."""
    found = path.stat()
    return found.st_ino, found.st_mtime_ns
