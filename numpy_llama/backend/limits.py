"""The system's limits on this process: control groups, CPUs, threads and their stacks.

A container is a control group (cgroups(7)). Each group has its own limits, and so has every group around it.
Version 2 has one tree for all controllers; version 1 has a tree for each of them.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from .. import system
from ..errors import ResourceLimitError
from ..system import affinity as affinity
from ..system.proc import lines

PROC = Path("/proc/self")
CGROUP = Path("/sys/fs/cgroup")


def groups(controller: str) -> Iterator[Path]:
    """The folders of this process's group and its parents, in version 2 and in version 1's `controller`."""
    paths = {1: "/", 2: "/"}  # version -> the process's group in that tree
    for line in lines(PROC / "cgroup"):
        match line.split(":", 2):
            case [_, "", path]:
                paths[2] = path
            case [_, controllers, path] if controller in controllers.split(","):
                paths[1] = path
    for folder, root, version in _trees(controller):
        inner = folder / paths[version].removeprefix(root.rstrip("/")).lstrip("/")
        yield from (group for group in [inner, *inner.parents] if group.is_relative_to(folder))


def _trees(controller: str) -> Iterator[tuple[Path, str, int]]:
    """(folder, the group at its root, version) of each tree: the usual folders, and the mounted ones."""
    yield CGROUP, "/", 2
    yield CGROUP / controller, "/", 1
    for line in lines(PROC / "mountinfo"):
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


def cpu_quota() -> float | None:
    """The CPUs that the control groups grant: the least quota / period of all; None without a quota."""
    return min((quota for group in groups("cpu") if (quota := _quota_of(group))), default=None)


def _quota_of(group: Path) -> float | None:
    version_1 = [line for name in ("quota", "period") for line in lines(group / f"cpu.cfs_{name}_us")]
    for pair in (" ".join(lines(group / "cpu.max")).split(), version_1):
        if len(pair) == 2 and all(n.isdecimal() for n in pair) and int(pair[1]):  # not "max", not -1
            return int(pair[0]) / int(pair[1])
    return None


def stack_bytes(environment: Mapping[str, str]) -> int:
    """The stack of each OpenMP thread by OMP_STACKSIZE, else GOMP_STACKSIZE; 0: the system's default.

    The value is a number of KiB, or a number with B, K, M or G behind it. Any other value is ignored.
    """
    for name in ("OMP_STACKSIZE", "GOMP_STACKSIZE"):
        if found := re.fullmatch(r"\s*\+?(\d+)\s*([BKMG]?)\s*", environment.get(name, ""), re.I | re.A):
            nbytes = int(found[1]) << 10 * "BKMG".index(found[2].upper() or "K")
            return nbytes if nbytes < 1 << 40 else 0
    return 0


def too_many_threads(threads: int, made: int, stack: int) -> ResourceLimitError:
    """The error for a team that the system does not make, with the limits in force."""
    limits = [f"each takes a stack of {stack} bytes (OMP_STACKSIZE)"] if stack else []
    for option, unit in (("u", 1), ("v", 1 << 10)):
        if (limit := system.ulimit(option)) is not None:
            limits.append(f"`ulimit -{option}` is {limit // unit}")
    pids = [int(line) for group in groups("pids") for line in lines(group / "pids.max") if line.isdecimal()]
    if pids:
        limits.append(f"the control group allows {min(pids)} processes (pids.max)")
    known = f" ({', '.join(limits)})" if limits else ""
    return ResourceLimitError(
        f"{threads} threads were asked for, the system makes {made}{known}; "
        "choose fewer, for example threads=1, on the command line -t 1, or raise the limit"
    )


def too_small_stack(whose: str, room: int, wanted: int) -> ResourceLimitError:
    """The error for a stack that is too small for the C kernels."""
    return ResourceLimitError(
        f"the stack of {whose} has room for {max(room, 0)} bytes, the C kernels need {wanted}; "
        "OMP_STACKSIZE=1M gives more, or `ulimit -s 1024`, or threading.stack_size in Python"
    )
