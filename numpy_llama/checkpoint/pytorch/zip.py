"""The zip of torch.save: the name and the place of each record.

    header, name, extra, bytes, sizes     for each record; torch pads `extra` so that the bytes are aligned
    the directory: entry, name, extra     again for each record
    zip64 end, its locator, the end       the place of the directory; torch always writes all three

What this file promises: directory and headers agree, because another program may read only one of them. No
record is compressed or encrypted, and no two overlap, so the records are never larger than the file. Names
are plain paths below one folder. Nothing is extracted. The format is PKWARE's APPNOTE.
"""

import struct
import zlib
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

from ...errors import (
    FormatError,
    NumpyLlamaError,
    ResourceLimitError,
    TruncatedError,
    UnsupportedError,
    escape,
)
from ..files import MappedFile

MAX_RECORDS = 100_000
CRC_CHUNK = 1 << 24  # bytes between two chances for Ctrl-C

# APPNOTE 4.3: each structure begins with its signature.
HEADER = struct.Struct("<4s5H3I2H")
ENTRY = struct.Struct("<4s6H3I5H2I")
END64 = struct.Struct("<4sQ2H2I4Q")
LOCATOR64 = struct.Struct("<4sIQI")
END = struct.Struct("<4s4H2IH")

SIZES_FOLLOW, UTF8 = 0x0008, 0x0800  # flags: CRC and sizes in the header are 0; the name's encoding
MAX16, MAX32 = (1 << 16) - 1, (1 << 32) - 1  # MAX32 in an entry: the number is in the zip64 extra field


@dataclass(frozen=True)
class Record:
    """A record and the place of its bytes in the file."""

    name: str  # below the archive's folder
    start: int
    nbytes: int
    crc: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


class _Entry(NamedTuple):
    """The directory's entry of a record."""

    path: bytes
    method: int
    header: int  # the byte at which its header begins
    start: int  # the byte at which its data begin
    packed: int
    nbytes: int
    crc: int


def zip_records(file: MappedFile) -> dict[str, Record]:
    """Every record by its name, "data.pkl" for example."""
    return _ZipReader(file).records()


def check_crc(file: MappedFile, record: Record) -> None:
    """FormatError unless the record's bytes have the CRC-32 that the directory gives."""
    crc = 0
    for at in range(record.start, record.end, CRC_CHUNK):
        nbytes = min(CRC_CHUNK, record.end - at)
        crc = zlib.crc32(file.bytes_at(at, nbytes, escape(record.name)).data, crc)
        file.forget(at, nbytes)
    if crc != record.crc:
        raise FormatError(
            f"{file.path}: {escape(record.name)} at byte {record.start} has CRC {crc:08x}, "
            f"the directory says {record.crc:08x}"
        )


class _ZipReader:
    """Reads the directory. `at` is its next byte."""

    def __init__(self, file: MappedFile):
        self.file, self.map, self.at = file, file.map, 0

    def fail(self, problem: str, error: type[NumpyLlamaError] = FormatError) -> NoReturn:
        raise error(f"{self.file.path}: {problem} (before byte {self.at})")

    def unpack(self, layout: struct.Struct, at: int, signature: bytes) -> list[Any]:
        """The fields after the signature."""
        if not 0 <= at <= self.file.size - layout.size or self.map[at : at + 4] != signature:
            self.fail(f"the zip has no {signature!r} at byte {at}")
        return list(layout.unpack_from(self.map, at)[1:])

    def records(self) -> dict[str, Record]:
        count, directory, end = self.directory()
        self.at = directory
        entries = sorted((self.entry(end) for _ in range(count)), key=lambda entry: entry.header)
        if self.at != end:
            self.fail(f"the zip directory goes on after its last entry, to byte {end}")
        found: dict[str, Record] = {}
        for entry, start in zip(entries, [e.header for e in entries[1:]] + [directory], strict=True):
            if entry.start + entry.packed > start:
                self.fail(f"overlapping records: {escape(entry.path)} goes beyond byte {start}")
        for entry in entries:
            name = self.below_folder(entry.path, entries[0].path)
            if entry.method:
                self.fail(f"compressed record {escape(name)}: torch compresses none", UnsupportedError)
            if entry.packed != entry.nbytes:
                self.fail(f"record {escape(name)} has {entry.nbytes} bytes, but {entry.packed} in the zip")
            if name in found:
                self.fail(f"two records are called {escape(name)}")
            found[name] = Record(name, entry.start, entry.nbytes, entry.crc)
        return found

    def directory(self) -> tuple[int, int, int]:
        """-> the number of entries, and the start and the end of the directory."""
        at = self.file.size - END.size
        if self.map[max(at, 0) :][:4] != b"PK\5\6":
            problem = "the zip does not end with its directory; incomplete copy or download?"
            raise TruncatedError(f"{self.file.path}: {problem}")
        *disks, here, count, nbytes, start, comment = self.unpack(END, at, b"PK\5\6")
        if self.map[max(at - LOCATOR64.size, 0) :][:4] == b"PK\6\7":
            short = here, count, nbytes, start
            disk, there, _ = self.unpack(LOCATOR64, at - LOCATOR64.size, b"PK\6\7")
            at -= LOCATOR64.size + END64.size
            *_, disk64, disk_of_start, here, count, nbytes, start = self.unpack(END64, at, b"PK\6\6")
            disks += [disk, disk64, disk_of_start]
            long = min(here, MAX16), min(count, MAX16), min(nbytes, MAX32), min(start, MAX32)
            if there != at or short != long:
                self.fail(f"the two ends of the zip differ: {short} and, at byte {there}, {long}")
        if any(disks) or here != count or comment:
            self.fail("the zip is one of several, or has a comment")
        if start + nbytes != at:
            self.fail(f"the zip directory, {nbytes} bytes at {start}, must end at byte {at}")
        if count > MAX_RECORDS:
            self.fail(f"the zip has {count} records, the limit is {MAX_RECORDS}", ResourceLimitError)
        return count, start, at

    def entry(self, end: int) -> _Entry:
        """The next entry of the directory, compared with the record's header."""
        fields = self.unpack(ENTRY, self.at, b"PK\1\2")
        _, _, flags, method, _, _, crc, packed, nbytes, name, extra, comment, disk, _, _, header = fields
        path_start = self.at + ENTRY.size
        extra_start = path_start + name
        path, extras = self.map[path_start:extra_start], self.map[extra_start : extra_start + extra]
        self.at = extra_start + extra + comment
        if self.at > end or disk:
            self.fail(f"the zip entry of {escape(path)} goes beyond the directory")
        if MAX32 in (nbytes, packed, header):
            nbytes, packed, header = self.zip64(extras, [nbytes, packed, header])
        if flags & ~(SIZES_FOLLOW | UTF8):
            self.fail(f"record {escape(path)} has the flags {flags:#06x}; is it encrypted?")

        fields = self.unpack(HEADER, header, b"PK\3\4")
        _, flags_here, method_here, _, _, crc_here, packed_here, nbytes_here, name_here, extra_here = fields
        path_start = header + HEADER.size
        start = path_start + name_here + extra_here
        unknown = 0 if flags & SIZES_FOLLOW else None
        same = (
            (flags_here, method_here, self.map[path_start : path_start + name_here]) == (flags, method, path)
            and crc_here in (crc, unknown)
            and packed_here in (packed, unknown, MAX32)
            and nbytes_here in (nbytes, unknown, MAX32)
        )
        if not same:
            self.fail(f"the header of {escape(path)} at byte {header} differs from the zip directory")
        return _Entry(path, method, header, start, packed, nbytes, crc)

    def below_folder(self, path: bytes, first: bytes) -> str:
        """b"NAME/data/0" -> "data/0". NAME must be the folder of the first record too."""
        try:
            folder, *parts = path.decode().split("/")
        except UnicodeDecodeError:
            folder, parts = "", []
        plain = parts and not {"", ".", ".."} & {folder, *parts} and b"\\" not in path and b"\0" not in path
        if not plain or not first.startswith(f"{folder}/".encode()):
            self.fail(f"a record is called {escape(path)}, wanted a path below one folder")
        return "/".join(parts)

    def zip64(self, extras: bytes, numbers: list[int]) -> list[int]:
        """The numbers; each MAX32 is replaced by the next 64-bit number of extra field 1 (APPNOTE 4.5.3)."""
        at = 0
        while (field := extras[at : at + 4]) and struct.unpack("<2H", field.ljust(4, b"\0"))[0] != 1:
            at += 4 + int.from_bytes(field[2:4], "little")
        held = extras[at + 4 :][: int.from_bytes(field[2:4], "little")]  # less if the entry is cut
        values = struct.iter_unpack("<Q", held[: len(held) // 8 * 8])
        found = [next(values, (None,))[0] if number == MAX32 else number for number in numbers]
        if None in found:
            self.fail("a zip entry lacks its zip64 numbers")
        return found
