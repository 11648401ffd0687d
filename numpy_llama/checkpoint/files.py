"""Files for every reader here: mapped, never written, and watched for change.

What this file promises: no read goes beyond the end of a file. A name that is no regular file is an error,
because a read could block. Other programs can still change a mapped file: `check_unchanged` detects it.
"""

import errno
import hashlib
import mmap
import os
import re
import secrets
import shutil
import socket
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import BinaryIO

import numpy as np

from .. import system
from ..backend.formats import forget_pages
from ..errors import FileChangedError, FormatError, ResourceLimitError, TruncatedError

PART = re.compile(r"\.(.+)\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part")  # name, place and number of the writer
# Other files that a failed download may leave under the wanted name, by their first bytes.
MISTAKEN = {
    b"version https://git-lfs": "a Git LFS pointer: the file itself was never downloaded",
    b"<!DOCTYPE": "an HTML page",
    b"<!doctype": "an HTML page",
    b"<html": "an HTML page",
}


class MappedFile:
    """A file mapped into memory, read only. `map` is all of its bytes; the system reads only those used."""

    def __init__(self, path: str | os.PathLike[str], wanted: str, least: int = 1):
        """For messages: `wanted` is the kind of file, `least` the bytes that such a file has at least."""
        self.path = Path(path)
        try:
            if not self.path.is_file():  # a read of a FIFO or a device may block, or never end
                what = "no regular file" if os.path.lexists(path) else "not there"
                what = "a folder" if self.path.is_dir() else what
                raise FormatError(f"{path} is {what}; wanted {wanted}")
            with open(path, "rb") as file:
                self.identity = _identity(os.fstat(file.fileno()))
                self.size = os.fstat(file.fileno()).st_size
                if not self.size:
                    raise TruncatedError(f"{path}: 0 bytes, need {least}; incomplete copy or download?")
                self.map = mmap.mmap(file.fileno(), self.size, access=mmap.ACCESS_READ)
        except OSError as error:
            if error.errno == errno.ENOMEM:
                what = f"its {self.size} bytes do not fit into what this process may use (ulimit -v)"
                raise ResourceLimitError(f"{path}: {what}") from None
            raise FormatError(f"{path} cannot be read: {error.strerror}") from None

    def checked_end(self, start: int, nbytes: int, field: str) -> int:
        """The end of `nbytes` bytes at `start`. Every length is checked here against the size of the file."""
        if start + nbytes > self.size:
            raise TruncatedError(
                f"{self.path}: {field} at byte {start} needs {start + nbytes} bytes, "
                f"the file has {self.size}; incomplete copy or download?"
            )
        return start + nbytes

    def refuse_mistaken(self, wanted: str) -> None:
        """FormatError if a failed download left another file under the name of `wanted`."""
        for start, what in MISTAKEN.items():
            if self.map[: len(start)] == start:
                raise FormatError(f"{self.path} is {what}; wanted {wanted}")

    def bytes_at(self, start: int, nbytes: int, field: str) -> np.ndarray:
        """A view of these bytes; nothing is copied."""
        self.checked_end(start, nbytes, field)
        return np.frombuffer(self.map, np.uint8, nbytes, start)

    def forget(self, start: int, nbytes: int) -> None:
        """Release pages whose content was copied, so that they no longer count as memory of this process."""
        forget_pages(self.map, start, nbytes)

    def check_unchanged(self) -> None:
        """FileChangedError if the path is another file by now, or if the mapped file was written to."""
        try:
            found = _identity(os.stat(self.path))
        except OSError as error:
            raise FileChangedError(
                f"{self.path} is in use and can no longer be read: {error.strerror}"
            ) from None
        if found != self.identity:
            names = ("device", "inode", "size", "time of change")
            rows = zip(names, self.identity, found, strict=True)
            changes = [f"{name} was {was}, is {now}" for name, was, now in rows if was != now]
            raise FileChangedError(f"{self.path} was changed while in use: {'; '.join(changes)}")


def mapped(path: Path, wanted: str) -> mmap.mmap | BytesIO:
    """The bytes of a text file. An empty file cannot be mapped, and is an empty text."""
    try:
        return MappedFile(path, wanted).map
    except TruncatedError:
        return BytesIO()


def _identity(stat: os.stat_result) -> tuple[int, int, int, int]:
    return stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns


def sync(file: BinaryIO) -> None:
    """Everything that was written to the file is on the disk after this."""
    file.flush()
    system.sync(file.fileno())


def write_file(out: Path, nbytes: int, write: Callable[[Path], None]) -> None:
    """Let `write` fill a file of about `nbytes` bytes beside `out`, and rename it to `out` when it is whole.

    ResourceLimitError if the disk has no room, FormatError if the file cannot be written. `out` is then what
    it was.
    """
    try:
        part = part_beside(out)  # first: what it removes makes room
        if (free := shutil.disk_usage(out.parent).free) < nbytes:
            raise ResourceLimitError(f"{out} needs {nbytes:,} bytes, the disk has {free:,} left")
        _replace(out, part, write)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise ResourceLimitError(
                f"{out} was not written: {error.strerror}; nothing was changed"
            ) from None
        raise FormatError(f"{out} cannot be written: {error.strerror}") from None


def write_bytes(out: Path, data: bytes) -> None:
    """Replace a file by these bytes, as `write_file` does."""

    def write(part: Path) -> None:
        with part.open("xb") as file:
            file.write(data)
            sync(file)

    write_file(out, len(data), write)


def part_beside(out: Path) -> Path:
    """A new name beside `out`, for a file or a folder that becomes `out` when it is whole.

    What processes that were killed have left beside `out` is removed.
    """
    name = out.name[:200]
    remove_left(out.parent, name)
    return out.with_name(f".{name}.{_place()}-{os.getpid()}-{secrets.token_hex(4)}.part")


def remove_left(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left in a folder: the parts of the file `name`, or all parts.

    Another machine may write into the same folder over a network. Its parts stay, because whether its
    processes run is unknown here.
    """
    for left in folder.glob(".*.part"):
        writer = PART.fullmatch(left.name)
        if writer is None or name not in (None, writer[1]) or writer[2] != _place():
            continue
        if not system.is_running(int(writer[3])):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)


def _place() -> str:
    """Where the number of a process is valid: this machine, or a container on it."""
    try:
        numbers = os.stat("/proc/self/ns/pid").st_ino
    except OSError:  # not Linux
        numbers = 0
    return hashlib.blake2b(f"{socket.gethostname()} {numbers}".encode(), digest_size=4).hexdigest()


def _replace(out: Path, part: Path, write: Callable[[Path], None]) -> None:
    try:
        write(part)
        os.replace(part, out)
    except BaseException as error:
        try:
            part.unlink(missing_ok=True)
        except OSError as left:
            if isinstance(error, Exception):
                what = f"{error}; {part.name} is left beside it, it cannot be removed: {left.strerror}"
                raise FormatError(f"{out} was not written: {what}") from None
        raise
    try:
        system.sync_folder(out.parent)  # the new name too survives a loss of power
    except OSError as error:
        what = f"its folder cannot be synchronized with the disk: {error.strerror}"
        raise FormatError(
            f"{out} was written and is whole, but {what}; after a loss of power the old file may be back"
        ) from None
