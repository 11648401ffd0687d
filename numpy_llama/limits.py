"""What the system leaves to this process: its control groups, and the CPUs that it may use.

A container is a control group (cgroups(7)). Each group has limits of its own, and the groups around it have
theirs. Version 2 has one tree for all controllers; version 1 has a tree for each of them.
"""

import os
from collections.abc import Iterator
from pathlib import Path

PROC = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")


def groups(controller: str) -> Iterator[Path]:
    """The folders of our own group and of all around it: version 2, and version 1's tree of `controller`."""
    paths = {1: "/", 2: "/"}  # version -> our own group in that tree
    for line in _lines(PROC / "cgroup"):
        match line.split(":", 2):
            case [_, "", path]:
                paths[2] = path
            case [_, controllers, path] if controller in controllers.split(","):
                paths[1] = path
    for folder, root, version in _trees(controller):
        inner = folder / paths[version].removeprefix(root.rstrip("/")).lstrip("/")
        yield from (group for group in [inner, *inner.parents] if group.is_relative_to(folder))


def _trees(controller: str) -> Iterator[tuple[Path, str, int]]:
    """(folder, the group at its root, version) of each tree: in the usual places, and wherever it is mounted."""
    yield CGROUP, "/", 2
    yield CGROUP / controller, "/", 1
    for line in _lines(PROC / "mountinfo"):
        mount, _, kind = line.partition(" - ")
        match mount.split(" "), kind.split(" "):
            case [_, _, _, root, folder, *_], ["cgroup2", *_]:
                yield Path(folder), root, 2
            case [_, _, _, root, folder, *_], ["cgroup", _, options] if controller in options.split(","):
                yield Path(folder), root, 1


def available_cpus() -> int:
    """The CPUs that this process may use: its affinity, and the least quota of its control groups."""
    cpus = affinity()
    return cpus if (quota := cpu_quota()) is None else max(1, min(cpus, int(quota)))


def affinity() -> int:
    """The CPUs on which this process may run."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cpu_quota() -> float | None:
    """The CPUs whose time the control groups grant: the least quota / period of all; None without a quota."""
    return min((quota for group in groups("cpu") if (quota := _quota_of(group))), default=None)


def _quota_of(group: Path) -> float | None:
    version_1 = [line for name in ("quota", "period") for line in _lines(group / f"cpu.cfs_{name}_us")]
    for words in (" ".join(_lines(group / "cpu.max")).split(), version_1):
        if len(words) == 2 and all(word.isdecimal() for word in words) and int(words[1]):  # not "max", not -1
            return int(words[0]) / int(words[1])
    return None


def numbers(path: str | Path) -> dict[str, int]:
    """The lines "name number ..." of one of the kernel's tables."""
    lines = [line.split() for line in _lines(Path(path))]
    return {line[0]: int(line[1]) for line in lines if len(line) > 1 and line[1].isdecimal()}


def _lines(path: Path) -> list[str]:
    """The lines of a file of the kernel's; none if it cannot be read."""
    try:
        return path.read_text(errors="replace").splitlines()
    except OSError:
        return []
