"""Linux and macOS: locks, signals, limits, and lines that are typed."""

import fcntl
import mmap
import os
import resource
import shlex
import signal
import sys
import termios
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

assert sys.platform != "win32"  # type checkers read no further there

ENDING = (signal.SIGTERM, signal.SIGHUP)  # signals that ask a program to end, beside Ctrl-C
END_OF_INPUT = "Ctrl-D"
ULIMITS = {"u": resource.RLIMIT_NPROC, "v": resource.RLIMIT_AS}
yield_cpu = os.sched_yield


def in_forked_child(run: Callable[[], None]) -> None:
    """Call `run` in every process that os.fork makes of this one."""
    os.register_at_fork(after_in_child=run)


def is_running(process: int) -> bool:
    """Whether a process has that number."""
    try:
        os.kill(process, 0)  # no signal, only the check
    except ProcessLookupError:
        return False
    except OSError:  # of another user
        return True
    return True


def ulimit(option: str) -> int | None:
    """The limit that `ulimit -OPTION` shows, in bytes or processes; None if there is none."""
    limit = resource.getrlimit(ULIMITS[option])[0]
    return None if limit == resource.RLIM_INFINITY else limit


# ---------------------------------------------------------------- files


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time holds the lock of a file, which is made if it is missing, or of a folder.

    BlockingIOError: another process holds it, and `wait` is false.
    """
    how = os.O_RDONLY if path.is_dir() else os.O_RDWR | os.O_CREAT
    place = os.open(path, how, 0o666)
    try:
        try:
            fcntl.flock(place, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        os.close(place)  # and with it the lock


def sync(place: int) -> None:
    """What was written to an open file or folder survives a loss of power after this."""
    if sys.platform == "darwin":
        with suppress(OSError):  # a file system without it
            fcntl.fcntl(place, fcntl.F_FULLFSYNC)  # fsync(2) of macOS leaves data in the drive's own memory
            return
    os.fsync(place)


def sync_folder(path: Path) -> None:
    """The names in a folder survive a loss of power after this."""
    place = os.open(path, os.O_RDONLY)
    try:
        sync(place)
    finally:
        os.close(place)


def forget_pages(pages: mmap.mmap, start: int, nbytes: int) -> None:
    """Release whole pages of a mapped file, which the system reads again when they are used."""
    pages.madvise(mmap.MADV_DONTNEED, start, nbytes)


# ---------------------------------------------------------------- terminals and pipes


def piped(stream: TextIO) -> TextIO:
    """An output as it is to be written to if no terminal shows it."""
    return stream


def quote(text: str) -> str:
    """A text as one word of a command line."""
    return shlex.quote(text)


def unread(pipe: int) -> bool:
    """Whether the reader of a pipe has bytes before it. OSError: it is no pipe."""
    return any(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))


def edit_lines(history: Iterable[str]) -> None:
    """From now on `input` has line editing, and goes back to these lines."""
    with suppress(ImportError):  # a Python without it
        import readline

        if os.environ.get("TERM", "dumb") != "dumb":
            readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one text
        for line in history:
            readline.add_history(line)
