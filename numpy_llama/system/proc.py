"""The lines and numbers of small text files in /proc and /sys. A system without them has none."""

from pathlib import Path


def lines(path: str | Path) -> list[str]:
    """The lines of a file; none if it cannot be read."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []


def numbers(path: str | Path) -> dict[str, int]:
    """The lines "name number ..." of a file such as /proc/meminfo."""
    words = [line.split() for line in lines(path)]
    return {line[0]: int(line[1]) for line in words if len(line) > 1 and line[1].isdecimal()}
