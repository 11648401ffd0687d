"""What Linux, macOS and Windows do differently. No other room asks which system it runs on.

linux.py, macos.py   the memory and the CPUs of the machine, the folders of a user
posix.py             what these two share: locks, signals, limits, typed lines
windows.py           the same names for Windows

docs/reference/platforms.md lists the differences, and the test of each.
"""

import os
import sys
from pathlib import Path

if sys.platform == "win32":
    from .windows import *  # noqa: F403
else:
    from .posix import *  # noqa: F403

    if sys.platform == "darwin":
        from .macos import *  # noqa: F403
    else:
        from .linux import *  # noqa: F403


def cache_folder() -> Path:
    """The user's folder of files that can be fetched again. RuntimeError: the user has no home folder."""
    return _named("XDG_CACHE_HOME") or Path.home() / CACHES  # noqa: F405


def state_folder() -> Path:
    """The user's folder of what programs remember. RuntimeError: the user has no home folder."""
    return _named("XDG_STATE_HOME") or Path.home() / STATES  # noqa: F405


def _named(variable: str) -> Path | None:
    """The folder of a variable, if its path is absolute (XDG base directory specification)."""
    path = Path(os.environ.get(variable, "")).expanduser()
    return path if path.is_absolute() else None
