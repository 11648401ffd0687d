"""Windows: the names of posix.py and linux.py, by msvcrt and kernel32.dll."""

import ctypes
import errno
import io
import mmap
import msvcrt
import os
import platform
import signal
import subprocess
import sys
import time
import winreg
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from ctypes import c_size_t, c_uint32, c_uint64
from ctypes.wintypes import HANDLE
from pathlib import Path
from typing import TextIO

assert sys.platform == "win32"  # type checkers read no further elsewhere

CACHES = STATES = os.environ.get("LOCALAPPDATA", "AppData/Local")
ENDING = (signal.SIGTERM, signal.SIGBREAK)  # SIGBREAK is Ctrl-Break, and also a window that is closed
END_OF_INPUT = "Ctrl-Z and Enter"
CPU = r"HARDWARE\DESCRIPTION\System\CentralProcessor\0"  # in the registry
LOCK = ".lock"  # in a folder that is locked
NAP = 0.1  # seconds between two looks at a lock
SYNCHRONIZE, WAIT_TIMEOUT, ACCESS_DENIED = 0x100000, 258, 5

kernel32 = ctypes.WinDLL("kernel32", use_last_error=True)
kernel32.OpenProcess.restype = kernel32.GetCurrentProcess.restype = HANDLE


# ---------------------------------------------------------------- the machine and its processes


class MemoryStatus(ctypes.Structure):
    """MEMORYSTATUSEX of sysinfoapi.h. `physical_left` includes files that the system keeps in memory."""

    _fields_ = (
        *(("nbytes", c_uint32), ("load", c_uint32)),
        *(("physical", c_uint64), ("physical_left", c_uint64), ("others", c_uint64 * 5)),
    )


class MemoryCounters(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS of psapi.h."""

    _fields_ = (("nbytes", c_uint32), ("faults", c_uint32), ("peak", c_size_t), ("others", c_size_t * 7))


def free_memory() -> int:
    """The bytes that programs may still use. Files that the system keeps in memory count as free."""
    status = MemoryStatus(nbytes=ctypes.sizeof(MemoryStatus))
    kernel32.GlobalMemoryStatusEx(ctypes.byref(status))
    return int(status.physical_left)


def peak_memory() -> int | None:
    """The most bytes that this process ever had in memory, including pages of mapped files."""
    counters = MemoryCounters(nbytes=ctypes.sizeof(MemoryCounters))
    this = HANDLE(kernel32.GetCurrentProcess())
    kernel32.K32GetProcessMemoryInfo(this, ctypes.byref(counters), counters.nbytes)
    return int(counters.peak)


def affinity(process: int = 0) -> int:
    """The CPUs on which this process may run. The mask is 0 if they are in several groups of 64."""
    mask, of_machine = c_size_t(), c_size_t()
    this = HANDLE(kernel32.GetCurrentProcess())
    kernel32.GetProcessAffinityMask(this, ctypes.byref(mask), ctypes.byref(of_machine))
    return mask.value.bit_count() or os.cpu_count() or 1


def cpu_name() -> str:
    try:
        with winreg.OpenKey(winreg.HKEY_LOCAL_MACHINE, CPU) as key:
            return str(winreg.QueryValueEx(key, "ProcessorNameString")[0]).strip()
    except OSError:
        return platform.processor()


def is_running(process: int) -> bool:
    """Whether a process has that number. os.kill(process, 0) would be a Ctrl-C for it."""
    handle = HANDLE(kernel32.OpenProcess(SYNCHRONIZE, False, process))
    if not handle:
        return ctypes.get_last_error() == ACCESS_DENIED  # of another user
    try:
        return bool(kernel32.WaitForSingleObject(handle, 0) == WAIT_TIMEOUT)
    finally:
        kernel32.CloseHandle(handle)


def in_forked_child(run: Callable[[], None]) -> None:
    """Windows has no fork."""


def ulimit(option: str) -> int | None:
    """Windows has no such limits."""
    return None


def yield_cpu() -> None:
    time.sleep(0)


# ---------------------------------------------------------------- files


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[None]:
    """One process at a time holds the lock of a file, which is made if it is missing, or of a folder.

    Windows locks bytes of files, so a folder gets a file. BlockingIOError: another process holds the lock,
    and `wait` is false.
    """
    file = path / LOCK if path.is_dir() else path
    place = os.open(file, os.O_RDWR | os.O_CREAT)
    try:
        while not _has_locked(place):
            if not wait:
                raise BlockingIOError(errno.EAGAIN, "another process holds the lock")
            time.sleep(NAP)
        try:
            yield
        finally:
            msvcrt.locking(place, msvcrt.LK_UNLCK, 1)
    finally:
        os.close(place)
        if file != path:
            with suppress(OSError):  # another process has it open
                file.unlink()


def _has_locked(place: int) -> bool:
    try:
        msvcrt.locking(place, msvcrt.LK_NBLCK, 1)
    except OSError:
        return False
    return True


def sync(place: int) -> None:
    """What was written to an open file survives a loss of power after this."""
    os.fsync(place)


def sync_folder(path: Path) -> None:
    """Windows opens no folder, and the file system keeps a journal of names."""


def forget_pages(pages: mmap.mmap, start: int, nbytes: int) -> None:
    """Windows takes pages of mapped files back by itself when it needs them."""


# ---------------------------------------------------------------- terminals and pipes


class Piped(io.TextIOWrapper):
    """An output to a pipe or a file, in UTF-8. If nobody reads the pipe, that is a BrokenPipeError."""

    def __init__(self, stream: io.TextIOWrapper):
        self.stream = stream  # kept: it would close its buffer at its end
        encoding = stream.encoding if "PYTHONIOENCODING" in os.environ else "utf-8"
        how = {name: getattr(stream, name) for name in ("line_buffering", "write_through")}
        super().__init__(stream.buffer, encoding, stream.errors, **how)

    def write(self, text: str) -> int:
        with _broken_pipes():
            return super().write(text)

    def flush(self) -> None:
        with _broken_pipes():
            super().flush()


@contextmanager
def _broken_pipes() -> Iterator[None]:
    """Windows' error for a closed pipe is often EINVAL."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE)) from None


def piped(stream: TextIO) -> TextIO:
    """An output as it is to be written to if no terminal shows it."""
    return Piped(stream) if isinstance(stream, io.TextIOWrapper) else stream


def quote(text: str) -> str:
    """A text as one word of a command line, for cmd and PowerShell."""
    return subprocess.list2cmdline([text])


def unread(pipe: int) -> bool:
    """Whether the reader of a pipe has bytes before it. It is asked under mpiexec alone."""
    return False


def edit_lines(history: Iterable[str]) -> None:
    """A console of Windows edits lines by itself, and keeps those of one run."""
