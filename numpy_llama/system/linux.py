"""Linux: the memory and the CPUs of the machine, and the folders of a user.

Control groups limit both too: backend/limits.py.
"""

import os
import platform
import sys

from .proc import lines, numbers

assert sys.platform not in ("win32", "darwin")  # type checkers read no further there

CACHES, STATES = ".cache", ".local/state"


def free_memory() -> int:
    """The bytes that programs may still use. Files that the system keeps in memory count as free."""
    kib = numbers("/proc/meminfo").get("MemAvailable:")
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if kib is None else kib * 1024


def peak_memory() -> int | None:
    """The most bytes that this process ever had in memory, including pages of mapped files."""
    kib = numbers("/proc/self/status").get("VmHWM:")
    return None if kib is None else kib * 1024


def affinity(process: int = 0) -> int:
    """The CPUs on which a process may run, by default this one."""
    return len(os.sched_getaffinity(process))


def cpu_name() -> str:
    about = [line.partition(":") for line in lines("/proc/cpuinfo")]
    names = [value.strip() for key, _, value in about if key.strip() == "model name"]
    return names[0] if names else platform.processor()
