"""macOS: the memory and the CPUs of the machine, by sysctl(3), and the folders of a user."""

import ctypes
import os
import resource
import sys

assert sys.platform == "darwin"  # type checkers read no further elsewhere

CACHES, STATES = "Library/Caches", "Library/Application Support"
# Pages that are unused, that programs have offered, and that hold files; pages read ahead are among the last.
FREE = ("vm.page_free_count", "vm.page_purgeable_count", "vm.page_pageable_external_count")


def free_memory() -> int:
    """The bytes that programs may still use. Files that the system keeps in memory count as free."""
    counts = [_number(name) for name in FREE]
    return _number("hw.pagesize") * sum(counts) or _number("hw.memsize")


def peak_memory() -> int | None:
    """The most bytes that this process ever had in memory, including pages of mapped files."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def affinity(process: int = 0) -> int:
    """The performance cores, or all CPUs if they are of one kind.

    Threads share the rows of a matrix evenly, and an efficiency core would be the last to end.
    """
    return _number("hw.perflevel0.physicalcpu") or os.cpu_count() or 1


def cpu_name() -> str:
    return _value("machdep.cpu.brand_string").rstrip(b"\0").decode(errors="replace")


def _number(name: str) -> int:
    """A number of 4 or 8 bytes; 0 if this machine does not have it."""
    return int.from_bytes(_value(name), "little")


def _value(name: str) -> bytes:
    """The value of a name of sysctl(3); empty if this machine does not have it."""
    value, nbytes = ctypes.create_string_buffer(256), ctypes.c_size_t(256)
    failed = ctypes.CDLL(None).sysctlbyname(name.encode(), value, ctypes.byref(nbytes), None, 0)
    return b"" if failed else value.raw[: nbytes.value]
