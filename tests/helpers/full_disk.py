"""A disk that is full when a file of a given name is written."""

import errno
import os
from pathlib import Path


def fill_disk(monkeypatch, name: str, time: int = 1) -> None:
    """Each file is synchronized before it is renamed: this fails for `name`, from the given time on."""
    sync, times = os.fsync, []

    def fsync(number: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{number}")).name.startswith(f".{name}."):
            times.append(number)
            if len(times) >= time:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(number)

    monkeypatch.setattr(os, "fsync", fsync)
