"""P: pickled checkpoints, the zip of today and the pickles of before, as Meta's consolidated.00.pth.

A pickle is a program for a stack machine. Here it is written in its opcodes, one Python function each.
"""

import io
import struct
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from .case import ACCEPTED, Variant, case, model
from .models import meta_folder, weights

# ---------------------------------------------------------------- opcodes

PROTO2, STOP, MARK, REDUCE, BUILD, TUPLE, POP_MARK = b"\x80\x02", b".", b"(", b"R", b"b", b"t", b"1"
EMPTY_DICT, EMPTY_LIST, EMPTY_TUPLE, NONE, FALSE = b"}", b"]", b")", b"N", b"\x89"
SETITEM, SETITEMS, APPENDS, PERSID, INST, OBJ = b"s", b"u", b"e", b"Q", b"i", b"o"


def name(module: str, attribute: str) -> bytes:
    """GLOBAL"""
    return b"c" + f"{module}\n{attribute}\n".encode()


def text(value: str) -> bytes:
    """BINUNICODE"""
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    """BININT, LONG1"""
    if -(1 << 31) <= value < 1 << 31:
        return b"J" + struct.pack("<i", value)
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def numbers(values) -> bytes:
    """A tuple of them."""
    return MARK + b"".join(map(number, values)) + TUPLE


def call(function: bytes, *arguments: bytes) -> bytes:
    return function + MARK + b"".join(arguments) + TUPLE + REDUCE


ORDERED_DICT = call(name("collections", "OrderedDict"))


def storage(key: str, numel: int, kind: str = "FloatStorage", extra: bytes = b"") -> bytes:
    """What a persistent id names: ("storage", class, key, place, number of elements)."""
    parts = text("storage") + name("torch", kind) + text(key) + text("cpu") + number(numel)
    return MARK + parts + extra + TUPLE + PERSID


def tensor(stored: bytes, size, stride, offset: int = 0) -> bytes:
    rest = [number(offset), numbers(size), numbers(stride), FALSE, ORDERED_DICT]
    return call(name("torch._utils", "_rebuild_tensor_v2"), stored, *rest)


def strides(shape) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[i + 1 :])) for i in range(len(shape)))


def state_dict(tensors: dict[str, np.ndarray], legacy: bool = False, target: bytes = EMPTY_DICT) -> bytes:
    """{name: tensor}, storage i under the key str(i)."""
    out = target + MARK
    for i, (key, value) in enumerate(tensors.items()):
        stored = storage(str(i), value.size, extra=NONE if legacy else b"")
        out += text(key) + tensor(stored, value.shape, strides(value.shape))
    return out + SETITEMS


def pickled(body: bytes) -> bytes:
    return PROTO2 + body + STOP


# ---------------------------------------------------------------- the zip


@dataclass
class Record:
    """One file in the archive; what may differ between its two headers can be given twice."""

    name: bytes
    data: bytes
    method: int = 0
    flags: int = 0
    crc: int | None = None
    size: int | None = None  # unpacked
    local_name: bytes | None = None
    local_flags: int | None = None
    at: int | None = None  # where the central directory says that it lies


def zip_bytes(records: list[Record]) -> bytes:
    """Stored records, each beginning at a multiple of 64 bytes, as torch writes them."""
    out, central = bytearray(), b""
    for record in records:
        at = len(out) if record.at is None else record.at
        crc = zlib.crc32(record.data) if record.crc is None else record.crc
        size = len(record.data) if record.size is None else record.size
        local_name = record.name if record.local_name is None else record.local_name
        local_flags = record.flags if record.local_flags is None else record.local_flags
        if record.at is None:
            filler = -(len(out) + 30 + len(local_name) + 4) % 64
            extra = b"FB" + struct.pack("<H", filler) + bytes(filler)
            sizes = (crc, len(record.data), size, len(local_name), len(extra))
            out += struct.pack("<4s5H3I2H", b"PK\3\4", 0, local_flags, record.method, 0, 0, *sizes)
            out += local_name + extra + record.data
        fields = (0, 0, record.flags, record.method, 0, 0, crc, len(record.data), size, len(record.name))
        central += struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields, 0, 0, 0, 0, 0, at) + record.name
    n = len(records)
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, n, n, len(central), len(out), 0)
    return bytes(out) + central + end


def records(pickle: bytes, storages: list[bytes], byteorder: bytes = b"little") -> list[Record]:
    """What torch.save writes."""
    out = [Record(b"archive/data.pkl", pickle), Record(b"archive/byteorder", byteorder)]
    out += [Record(b"archive/data/%d" % i, data) for i, data in enumerate(storages)]
    return [*out, Record(b"archive/version", b"3\n")]


def model_records() -> list[Record]:
    values = weights()
    return records(pickled(state_dict(values)), [value.tobytes() for value in values.values()])


def pth_bytes(tensors: dict[str, np.ndarray]) -> bytes:
    return zip_bytes(records(pickled(state_dict(tensors)), [value.tobytes() for value in tensors.values()]))


def file(folder: Path, what: str, data: bytes, *expected: str, **options) -> Variant:
    path = meta_folder(folder / f"{sum(1 for _ in folder.iterdir())}", pth=data)
    return model(what, path, *expected, **{"reference": ("torch", path / "consolidated.00.pth")} | options)


def program(folder: Path, what: str, body: bytes, *expected: str, **options) -> Variant:
    """A whole pickle in a zip with one storage of 16 bytes, "0"."""
    return file(folder, what, zip_bytes(records(body, [bytes(16)])), *expected, **options)


def extended(folder: Path, what: str, extra: bytes, *expected: str, **options) -> Variant:
    """A model that is in order but for one more entry of its dictionary, which this value is."""
    return whole(folder, what, state_dict(weights()) + text("extra") + extra + SETITEM, *expected, **options)


def whole(folder: Path, what: str, body: bytes, *expected: str, **options) -> Variant:
    """A model whose weights are all there; this is its pickle."""
    storages = [value.tobytes() for value in weights().values()]
    return file(folder, what, zip_bytes(records(pickled(body), storages)), *expected, **options)


# ---------------------------------------------------------------- names and calls


@case("P01", "a call of os.system")
def os_system(folder: Path) -> Iterator[Variant]:
    body = call(name("os", "system"), text("touch never"))
    yield program(folder, "alone", pickled(body), "UnsafePickleError", says=("os.system",))
    yield extended(folder, "behind the weights", body, "UnsafePickleError", says=("os.system",))


@case("P02", "builtins and pip")
def builtins(folder: Path) -> Iterator[Variant]:
    for module, attribute in [
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("builtins", "__import__"),
        ("__builtin__", "eval"),
        ("pip", "main"),
    ]:
        says = (f"{module}.{attribute}",)
        body = call(name(module, attribute), text("1"))
        yield extended(folder, says[0], body, "UnsafePickleError", says=says)


@case("P03", "functions of torch that load, and dotted names")
def torch_functions(folder: Path) -> Iterator[Variant]:
    for module, attribute in [
        ("torch.jit", "_script.load"),
        ("torch.hub", "load"),
        ("torch._utils", "_rebuild_tensor_v2.__globals__"),
        ("torch._utils.x", "__globals__"),
        ("torch", "serialization.os.system"),
    ]:
        body = call(name(module, attribute), text("x"))
        yield extended(folder, f"{module} {attribute}", body, "UnsafePickleError")


@case("P04", "bytearray(10^12)")
def bytearray_bomb(folder: Path) -> Iterator[Variant]:
    body = call(name("builtins", "bytearray"), number(10**12))
    yield extended(folder, "10^12", body, "UnsafePickleError", says=("bytearray",))


@case("P05", "items set on what is no dictionary")
def set_items(folder: Path) -> Iterator[Variant]:
    for what, target in [("a list", EMPTY_LIST), ("a tuple", EMPTY_TUPLE), ("a number", number(1))]:
        one = target + number(0) + number(1) + SETITEM
        many = target + MARK + number(0) + number(1) + SETITEMS
        yield extended(folder, f"{what}, one", one, "UnsafePickleError")
        yield extended(folder, f"{what}, many", many, "UnsafePickleError")


# ---------------------------------------------------------------- tensors


@case("P06", "a storage smaller than it says")
def small_storage(folder: Path) -> Iterator[Variant]:
    body = tensor(storage("0", 10**9), (10**9,), (1,))
    yield program(folder, "16 bytes of 4 GB", pickled(in_dict(body)), "FormatError", says=("storage",))


def in_dict(value: bytes) -> bytes:
    return EMPTY_DICT + text("output.weight") + value + SETITEM


@case("P07", "one number as 10^12 of them")
def expanded(folder: Path) -> Iterator[Variant]:
    body = tensor(storage("0", 4), (10**12,), (0,))
    yield program(folder, "stride 0", pickled(in_dict(body)), "ResourceLimitError")


@case("P08", "a view beyond its storage")
def view(folder: Path) -> Iterator[Variant]:
    for what, size, stride, offset in [
        ("offset -1", (2,), (1,), -1),
        ("stride -1", (2,), (-1,), 3),
        ("one too many", (4,), (1,), 1),
        ("rows too far apart", (2, 2), (3, 1), 0),
        ("size -1", (-1,), (1,), 0),
    ]:
        body = tensor(storage("0", 4), size, stride, offset)
        yield program(folder, what, pickled(in_dict(body)), "FormatError")


@case("P09", "state for a tensor and for a dictionary")
def build(folder: Path) -> Iterator[Variant]:
    state = EMPTY_DICT + text("__class__") + number(1) + SETITEM
    one = tensor(storage("0", 4), (4,), (1,)) + state + BUILD
    yield program(folder, "a tensor", pickled(in_dict(one)), "UnsafePickleError")
    ordered = state_dict(weights(), target=ORDERED_DICT)
    attributes = EMPTY_DICT + text("__setitem__") + NONE + SETITEM
    yield whole(folder, "a dictionary", ordered + attributes + BUILD, "UnsafePickleError", ACCEPTED)
    metadata = EMPTY_DICT + text("_metadata") + EMPTY_DICT + SETITEM  # as state_dict() of any module has it
    yield whole(folder, "_metadata", ordered + metadata + BUILD, ACCEPTED)


# ---------------------------------------------------------------- opcodes


@case("P10", "a stack that is empty")
def underflow(folder: Path) -> Iterator[Variant]:
    for what, body in [
        ("REDUCE", REDUCE),
        ("REDUCE of a text", text("x") + EMPTY_TUPLE + REDUCE),
        ("POP_MARK", POP_MARK),
        ("TUPLE", TUPLE),
        ("SETITEMS", SETITEMS),
        ("BINGET", b"h\x07"),
        ("LONG_BINGET", b"j\xff\xff\xff\xff"),
        ("BINPUT", b"q\0"),
        ("STOP", b""),
    ]:
        yield program(folder, what, pickled(body), "FormatError")


@case("P11", "the opcodes of protocols 4 and 5")
def newer_protocols(folder: Path) -> Iterator[Variant]:
    def short(value: str) -> bytes:
        return b"\x8c" + bytes([len(value)]) + value.encode()

    system = short("os") + short("system") + b"\x93" + MARK + text("true") + TUPLE + REDUCE
    frame = b"\x80\x04\x95" + struct.pack("<Q", len(system) + 1) + system + STOP
    safe = ("UnsupportedError", "UnsafePickleError")
    yield program(folder, "STACK_GLOBAL os.system", frame, *safe)
    yield program(folder, "MEMOIZE", b"\x80\x04" + EMPTY_DICT + b"\x94" + STOP, *safe)
    yield program(folder, "BYTEARRAY8", b"\x80\x05\x96" + struct.pack("<Q", 1) + b"x" + STOP, *safe)
    yield program(folder, "NEXT_BUFFER", b"\x80\x05\x97" + STOP, *safe)
    yield program(folder, "a long frame", b"\x80\x04\x95" + b"\xff" * 8 + STOP, *safe)


@case("P12", "opcodes that make objects in other ways")
def other_opcodes(folder: Path) -> Iterator[Variant]:
    for what, body in [
        ("INST", MARK + text("true") + INST + b"os\nsystem\n"),
        ("OBJ", MARK + name("collections", "OrderedDict") + OBJ),
        ("EXT1", b"\x82\x01"),
        ("PERSID", b"P0\n"),
        ("NEWOBJ_EX", name("collections", "OrderedDict") + EMPTY_TUPLE + EMPTY_DICT + b"\x92"),
    ]:
        yield program(folder, what, pickled(body), "UnsafePickleError")


@case("P13", "a pickle that breaks off, or goes on")
def broken(folder: Path) -> Iterator[Variant]:
    values = weights()
    storages = [value.tobytes() for value in values.values()]
    whole = pickled(state_dict(values))
    for what, body in [
        ("no STOP", whole[:-1]),
        ("garbage after STOP", whole + b"garbage"),
        ("os.system before an error", PROTO2 + call(name("os", "system"), text("true")) + b"\xff"),
        ("in the middle of a number", PROTO2 + b"J\0\0"),
        ("a text of 2^32 - 1 bytes", PROTO2 + b"X\xff\xff\xff\xffabc."),
        ("no opcode", PROTO2 + b"\xff."),
    ]:
        yield file(folder, what, zip_bytes(records(body, storages)), "FormatError")


# ---------------------------------------------------------------- the archive


def deflated_zeros(mebibytes: int) -> bytes:
    """One deflated block of a mebibyte, again and again: a bomb need not be packed to be written."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    first = packer.compress(bytes(1 << 20)) + packer.flush(zlib.Z_FULL_FLUSH)
    return first * mebibytes + packer.flush()


@case("P14", "a compressed record: 10 MB that become 10 GB")
def zip_bomb(folder: Path) -> Iterator[Variant]:
    gigabyte, n = deflated_zeros(1024), 1 << 28
    body, storages = EMPTY_DICT, []
    for i in range(10):
        body += text(str(i)) + tensor(storage(str(i), n), (n,), (1,)) + SETITEM
        storages.append(Record(b"archive/data/%d" % i, gigabyte, method=8, size=4 * n, crc=0))
    parts = [Record(b"archive/data.pkl", pickled(body)), *storages]
    # torch would begin to unpack it, so it is not asked.
    yield file(folder, "10 GB", zip_bytes(parts), "UnsupportedError", says=("compressed",), reference=None)
    body = in_dict(tensor(storage("0", 1 << 18), (1 << 18,), (1,)))
    crc, data = zlib.crc32(bytes(1 << 20)), deflated_zeros(1)
    parts = [Record(b"archive/data.pkl", pickled(body)), Record(b"archive/version", b"3\n")]
    parts += [Record(b"archive/data/0", data, method=8, size=1 << 20, crc=crc)]
    yield file(folder, "1 MB", zip_bytes(parts), "UnsupportedError", says=("compressed",))


@case("P15", "records that overlap")
def overlapping(folder: Path) -> Iterator[Variant]:
    parts = model_records()
    first = len(zip_local(parts[:2]))
    parts[3].at = first  # both of the first two storages lie where the first one does
    parts[3].local_name = parts[2].name
    yield file(folder, "two names, one place", zip_bytes(parts), "FormatError")
    inner = Record(b"archive/data/99", bytes(16))
    outer = Record(b"archive/data/98", zip_local([inner]))
    parts = [*model_records(), outer]
    inner.at = len(zip_local(parts)) - len(outer.data)
    data = zip_bytes([*parts, inner])
    yield file(folder, "a record in a record", data, "FormatError", says=("overlap",))
    yield file(folder, "quoted", quoted_overlap(), "FormatError", says=("overlap",), reference=None)


def zip_local(parts: list[Record]) -> bytes:
    """The archive up to its central directory."""
    whole = zip_bytes(parts)
    return whole[: struct.unpack("<I", whole[-6:-2])[0]]


def quoted_overlap() -> bytes:
    """David Fifield's: each record's data is the next record's header, quoted, and then all that follows."""
    n, kernel = 250, zlib.compress(bytes(21 << 20), 9)[2:-4]  # 21 MB in 21 kB, and each record has them all
    total, entries, unpacked = kernel, [], 21 << 20
    for i in reversed(range(n)):
        key = b"archive/data/%d" % i
        packed = len(total)
        head = struct.pack("<4s5H3I2H", b"PK\3\4", 0, 0, 8, 0, 0, 0, packed, unpacked, len(key), 0) + key
        entries.append((key, packed, unpacked, len(total) + len(head)))
        quote = struct.pack("<BHH", 0, len(head), len(head) ^ 0xFFFF)  # a stored block that is not the last
        total = quote + head + total
        unpacked += len(head)
    key, body = b"archive/data.pkl", pickled(EMPTY_DICT)
    out = zip_local([Record(key, body)]) + total
    fields = (zlib.crc32(body), len(body), len(body), len(key))
    central = struct.pack("<4s6H3I5H2I", b"PK\1\2", *[0] * 6, *fields, *[0] * 6) + key
    for key, packed, size, from_end in entries:
        fields = (0, 0, 0, 8, 0, 0, 0, packed, size, len(key), 0, 0, 0, 0, 0, len(out) - from_end)
        central += struct.pack("<4s6H3I5H2I", b"PK\1\2", *fields) + key
    end = struct.pack("<4s4H2IH", b"PK\5\6", 0, 0, n + 1, n + 1, len(central), len(out), 0)
    return out + central + end


@case("P16", "records with names that lead elsewhere")
def zip_slip(folder: Path) -> Iterator[Variant]:
    for key in (b"archive/../../x", b"/etc/passwd", b"archive\\..\\x", b"archive/a\0b", b"../data.pkl"):
        parts = [*model_records(), Record(key, b"x")]
        yield file(folder, repr(key)[2:-1], zip_bytes(parts), "FormatError")


@case("P17", "two names for one record")
def two_names(folder: Path) -> Iterator[Variant]:
    parts = model_records()
    parts[0].local_name = b"archive/dada.pkl"
    yield file(folder, "data.pkl", zip_bytes(parts), "FormatError")
    parts = model_records()
    parts[2].local_name = b"archive/data/1"
    yield file(folder, "a storage", zip_bytes(parts), "FormatError")


@case("P18", "flags that say encrypted")
def flags(folder: Path) -> Iterator[Variant]:
    for what, bits in [("encrypted", 1), ("strongly", 0x41), ("masked", 0x2000), ("patched", 0x20)]:
        for where in ("directory", "header", "both"):
            parts = model_records()
            parts[0].flags = bits if where != "header" else 0
            parts[0].local_flags = bits if where != "directory" else 0
            yield file(folder, f"{what}, {where}", zip_bytes(parts), "FormatError")


@case("P19", "a checksum that is wrong")
def checksum(folder: Path) -> Iterator[Variant]:
    parts = model_records()
    parts[0].crc = 1
    yield file(folder, "data.pkl", zip_bytes(parts), "FormatError")
    parts = model_records()
    parts[2].crc = 1
    # The weights are mapped and not read on loading, so that a checksum of theirs is not looked at.
    yield file(folder, "a storage", zip_bytes(parts), "FormatError", ACCEPTED)


@case("P20", "TorchScript")
def torchscript(folder: Path) -> Iterator[Variant]:
    for key, data in [(b"archive/constants.pkl", pickled(EMPTY_TUPLE)), (b"archive/code/x.py", b"pass")]:
        parts = [*model_records(), Record(key, data)]
        yield file(folder, key.decode(), zip_bytes(parts), "UnsupportedError", says=("TorchScript",))


@case("P21", "another order of bytes")
def byteorder(folder: Path) -> Iterator[Variant]:
    for order, expected in [(b"big", "UnsupportedError"), (b"xyz", "FormatError"), (b"", "FormatError")]:
        parts = model_records()
        parts[1].data = order
        yield file(folder, order.decode() or "none", zip_bytes(parts), expected)


# ---------------------------------------------------------------- before the zip

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001


def sys_info(little_endian: bool = True) -> bytes:
    sizes = EMPTY_DICT + MARK + text("short") + number(2) + text("int") + number(4) + text("long") + number(4)
    values = text("protocol_version") + number(PROTOCOL)
    values += text("little_endian") + (b"\x88" if little_endian else b"\x89")
    return pickled(EMPTY_DICT + MARK + values + text("type_sizes") + sizes + SETITEMS + SETITEMS)


def legacy_bytes(
    tensors: dict[str, np.ndarray],
    magic: int = MAGIC,
    protocol: int = PROTOCOL,
    system: bytes = sys_info(),
    body: bytes | None = None,
    numel: int | None = None,
) -> bytes:
    """Five pickles, then each storage: its number of elements and its bytes."""
    out = pickled(number(magic)) + pickled(number(protocol)) + system
    out += pickled(state_dict(tensors, legacy=True)) if body is None else body
    keys = b"".join(text(str(i)) for i in range(len(tensors)))
    out += pickled(EMPTY_LIST + MARK + keys + APPENDS)
    for value in tensors.values():
        out += struct.pack("<q", value.size if numel is None else numel) + value.tobytes()
    return out


@case("P22", "an old file with another beginning")
def legacy_header(folder: Path) -> Iterator[Variant]:
    values = weights()
    yield file(folder, "another magic number", legacy_bytes(values, magic=MAGIC + 1), "FormatError")
    yield file(folder, "protocol 1002", legacy_bytes(values, protocol=1002), "FormatError")
    data = legacy_bytes(values, system=sys_info(little_endian=False))
    yield file(folder, "big-endian", data, "FormatError", "UnsupportedError")


@case("P23", "an old file whose storages end elsewhere")
def legacy_storages(folder: Path) -> Iterator[Variant]:
    values = weights()
    limits = ("TruncatedError", "ResourceLimitError")
    yield file(folder, "2^62 elements", legacy_bytes(values, numel=1 << 62), *limits)
    yield file(folder, "-1 elements", legacy_bytes(values, numel=-1), "FormatError", "ResourceLimitError")
    whole = legacy_bytes(values)
    for what, length in [("in the last storage", len(whole) - 1), ("in the pickle", 200), ("in a count", 0)]:
        if what == "in a count":
            last = list(values.values())[-1]
            length = len(whole) - last.nbytes - 3
        yield file(folder, what, whole[:length], *limits)


@case("P24", "an old file that calls os.system")
def legacy_call(folder: Path) -> Iterator[Variant]:
    body = pickled(call(name("os", "system"), text("true")))
    data = legacy_bytes(weights(), body=body)
    yield file(folder, "five pickles", data, "UnsafePickleError", says=("os.system",))
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for member, content in [
            ("sys_info", sys_info()),
            ("pickle", body),
            ("tensors", b""),
            ("storages", b""),
        ]:
            info = tarfile.TarInfo(member)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    yield file(folder, "a tar", archive.getvalue(), "UnsafePickleError")
    alone = pickled(call(name("os", "system"), text("true")))
    yield file(folder, "a pickle alone", alone, "UnsafePickleError", "FormatError")
