"""torch.save's files: what torch wrote is read back, and what no state dict needs is refused by name."""

import io
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import tracemalloc
import warnings
from pathlib import Path

import pytest
import torch
from helpers.torch_writer import (
    APPEND,
    APPENDS,
    BINPERSID,
    BUILD,
    EMPTY_DICT,
    EMPTY_LIST,
    EMPTY_TUPLE,
    MARK,
    NONE,
    ORDERED_DICT,
    POP,
    POP_MARK,
    PROTO,
    REDUCE,
    SETITEM,
    SETITEMS,
    STOP,
    TRUE,
    TUPLE,
    Record,
    call,
    legacy_bytes,
    named,
    number,
    pickled,
    records,
    saved,
    state_dict,
    storage,
    tensor,
    text,
    zip_bytes,
)
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama import errors
from numpy_llama.checkpoint.pytorch import pickle as torch_pickle
from numpy_llama.checkpoint.pytorch.file import TorchFile

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
OPENING_SECONDS = 0.05  # of CPU time; it takes a fifth of that on an idle machine
FUZZ_BYTES = 4 << 20  # of extra memory at most; the files have some kilobytes


def opened(data: bytes, use=lambda file: file):
    """`use(TorchFile)` of a file that holds `data`; it is unlinked at once, the map lives on."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.pth"
        path.write_bytes(data)
        return use(TorchFile(path))


def torch_saved(value, zip: bool = True) -> bytes:
    out = io.BytesIO()
    torch.save(value, out, _use_new_zipfile_serialization=zip)
    return out.getvalue()


def whole(file: TorchFile):
    """All that there is to read in a file."""
    file.verify()
    return {
        name: file.tensor(name).data.tobytes()
        for name, info in file.tensors.items()
        if info.type_name in DTYPES and info.shape and info.nbytes
    }


def bits(x: torch.Tensor) -> bytes:
    dense = x.detach().clone(memory_format=torch.contiguous_format)
    return dense.flatten().view(torch.uint8).numpy().tobytes()


# What torch wrote is read back


@given(
    format=st.sampled_from(sorted(DTYPES)),
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
    zip=st.booleans(),
    data=st.data(),
)
def test_tensors_round_trip(format, shape, seed, zip, data):
    """Dense ones, and every kind of view of one storage: slices, steps, transposes."""
    torch.manual_seed(seed)
    x = torch.randn(shape).to(DTYPES[format])
    axes = data.draw(st.permutations(range(len(shape))))
    start, step = data.draw(st.integers(0, shape[0] - 1)), data.draw(st.integers(1, 3))
    state = {"x": x, "part": x[start::step], "turned": x.permute(axes), "same": x, "other": x + 1}
    state["parameter"] = torch.nn.Parameter(x[start:])
    file = opened(torch_saved(state, zip))
    assert list(file.tensors) == list(state)
    for name, written in state.items():
        info, read = file.tensors[name], file.tensor(name)
        assert (info.name, info.type_name, info.shape) == (name, format, tuple(written.shape))
        assert (info.nbytes, info.dense) == (written.nbytes, written.is_contiguous())
        assert read.shape == info.shape
        assert read.data.tobytes() == bits(written)
        assert read.in_place == written.is_contiguous()
        if read.in_place:
            assert not read.data.flags.owndata and not read.data.flags.writeable  # the map itself
    assert file.tensors["x"].offset == file.tensors["same"].offset != file.tensors["other"].offset
    if zip:
        file.verify()


def test_the_state_dict_of_a_module():
    """It is an OrderedDict with an attribute, and has buffers."""
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).half()
    state = module.state_dict()
    for zip in (True, False):
        file = opened(torch_saved(state, zip))
        assert list(file.tensors) == list(state)
        assert file.tensor("0.weight").data.tobytes() == bits(state["0.weight"])
        assert file.tensors["1.num_batches_tracked"].type_name == "I64"
        with pytest.raises(errors.UnsupportedError, match=r"x\.pth: '1.num.*' is stored as I64"):
            file.tensor("1.num_batches_tracked")


@pytest.mark.parametrize("dtype", [t for t in torch_pickle.NAMES.values() if hasattr(t, "itemsize")])
def test_every_type_is_described(dtype):
    types = {"U": "uint", "I": "int", "F": "float", "BF": "bfloat"}
    name = (
        "bool" if dtype.name == "BOOL" else types[dtype.name.rstrip("0123456789")] + dtype.name.lstrip("UIBF")
    )
    x = torch.ones(3, 2, dtype=getattr(torch, name))
    info = opened(torch_saved({"x": x})).tensors["x"]
    assert (info.type_name, info.nbytes, info.shape, info.stride) == (dtype.name, x.nbytes, (3, 2), (2, 1))


def test_what_is_no_weight_is_not_used_as_one():
    file = opened(torch_saved({"number": torch.tensor(1.0), "empty": torch.ones(0, 3), "x": torch.ones(2)}))
    for name, shape in [("number", r"\(\)"), ("empty", r"\(0, 3\)")]:
        with pytest.raises(errors.UnsupportedError, match=f"'{name}' has the shape {shape}"):
            file.tensor(name)
    with pytest.raises(errors.MismatchError, match="there is no tensor 'y'"):
        file.tensor("y")


@pytest.mark.parametrize("key", ["model", "state_dict"])
def test_a_state_dict_within_another(key):
    x = torch.arange(6.0)
    extra = {
        "step": 3,
        "name": "a",
        "nothing": None,
        "rate": 0.5,
        "big": 1 << 40,
        "optimizer": {"lr": [1, 2]},
    }
    for zip in (True, False):
        file = opened(torch_saved({key: {"x": x}} | extra, zip))
        assert list(file.tensors) == ["x"] and file.tensor("x").data.tobytes() == bits(x)
        assert list(opened(torch_saved({"x": x} | extra, zip)).tensors) == ["x"]


@pytest.mark.parametrize(
    "value, error, message",
    [
        (
            {"a": {"x": torch.ones(1)}, "b": {"x": torch.ones(1)}},
            "UnsupportedError",
            "holds 2 dicts of tensors",
        ),
        ({"a": {"x": torch.ones(1)}, "x": torch.ones(1)}, "UnsupportedError", "holds 2 dicts of tensors"),
        ({"a": {"b": {"x": torch.ones(1)}}}, "UnsupportedError", "holds 0 dicts of tensors"),
        ({}, "UnsupportedError", "holds 0 dicts of tensors"),
        ([torch.ones(1)], "FormatError", "holds a list, wanted a state dict"),
        (torch.ones(1), "FormatError", "holds a View, wanted a state dict"),
        ({3: torch.ones(1)}, "FormatError", "the name of a weight is the number 3"),
        ({(1, 2): torch.ones(1)}, "FormatError", "the key of an item is a tuple"),
        ({"x": torch.ones(1).to_sparse()}, "UnsafePickleError", r"'torch\._utils\._rebuild_sparse_tensor'"),
        ({"x": {1, 2}}, "UnsafePickleError", "set"),
        ({"x": torch.bfloat16}, "UnsafePickleError", r"'torch\.bfloat16'"),
        ({"x": torch.device("cpu")}, "UnsafePickleError", r"'torch\.device'"),
        ({"x": torch.ones(1, dtype=torch.float8_e4m3fn)}, "UnsafePickleError", "_rebuild_tensor_v3"),
        ({"x": b"bytes"}, "UnsafePickleError", "encode"),
        (torch.nn.Linear(1, 1), "UnsafePickleError", r"'torch\.nn\.modules\.linear\.Linear'"),
    ],
)
@pytest.mark.parametrize("zip", [True, False])
def test_what_is_no_state_dict_is_refused(value, error, message, zip):
    refused(torch_saved(value, zip), error, message)


def test_records_of_an_old_or_a_repacked_file():
    """Neither byteorder nor alignment, other flags, sizes before the data or behind: all that people have."""
    x = torch.arange(4.0)
    body = pickled(state_dict({"x": tensor(storage("0", 4), (4,), (1,))}))
    plain = [Record("m/data.pkl", body), Record("m/data/0", bits(x)), Record("m/version", b"3\n")]
    for long in [(), (0,), (1,), (2,), (0, 1), (0, 1, 2)]:  # as where there are more than 4 GB
        assert whole(opened(zip_bytes(plain, long))) == {"x": bits(x)}
    later = [Record(r.name, r.data, flags=0x808, size_here=0) for r in plain]
    assert whole(opened(zip_bytes(later))) == {"x": bits(x)}


def test_more_records_than_an_old_zip_can_count(tmp_path):
    """Beyond 65,535 only the zip64 numbers count."""
    path, n = tmp_path / "many.pth", 65_600
    body = pickled(state_dict({"x": tensor(storage("7", 4), (4,), (1,))}))
    writer = torch._C.PyTorchFileWriter(str(path))
    writer.write_record("data.pkl", body, len(body))
    for i in range(n):
        data = bits(torch.arange(4.0)) if i == 7 else b""
        writer.write_record(f"data/{i}", data, len(data))
    writer.write_end_of_file()
    file = TorchFile(path)
    assert len(file.records) > n and file.tensor("x").dequantize().tolist() == [0, 1, 2, 3]


def test_opening_takes_milliseconds(tmp_path):
    """As many tensors as a 7B has: their number is what counts, for none of them is read."""
    path = tmp_path / "7b.pth"
    state = {f"layers.{i}.attention.wq.weight": torch.ones(2, 2, dtype=torch.bfloat16) for i in range(291)}
    torch.save(state, path)
    seconds = []
    for _ in range(5):  # the best of five: a busy machine is not what is tested
        start = time.process_time()
        file = TorchFile(path)
        seconds.append(time.process_time() - start)
    assert len(file.tensors) == 291 and min(seconds) < OPENING_SECONDS


# Broken files: the cases of the catalogue, each with the error it must give

SIXTEEN = {"0": bytes(16)}
X = tensor(storage("0", 4), (4,), (1,))
SYSTEM = call(named("os", "system"), text("touch /nonexistent/canary"))


def program(body: bytes) -> bytes:
    """A zip whose pickle is in order up to what `body` does at its end."""
    return zip_bytes(records(PROTO + state_dict({"x": X}) + body + STOP, SIXTEEN))


def one(value: bytes) -> bytes:
    return saved(state_dict({"x": value}), SIXTEEN)


def changed(i: int, **changes) -> bytes:
    """A file of data.pkl, byteorder, data/0 and version, of which record i is changed."""
    parts = records(pickled(state_dict({"x": X})), SIXTEEN)
    for key, value in changes.items():
        setattr(parts[i], key, value)
    return zip_bytes(parts)


def more(*others: Record) -> bytes:
    return zip_bytes([*records(pickled(state_dict({"x": X})), SIXTEEN), *others])


def overlapping() -> bytes:
    """A record within the bytes of another, header and all, as zip bombs have it."""
    inner = zip_bytes([Record("archive/data/1", bytes(8))])
    inner = inner[: inner.index(b"PK\1\2")]
    parts = [*records(pickled(state_dict({"x": X})), {}), Record("archive/data/0", bytes(64) + inner)]
    start = zip_bytes(parts).index(inner)
    return zip_bytes([*parts, Record("archive/data/1", bytes(8), header=start)])


def overlapping_by_a_byte() -> bytes:
    """The last byte of a record is the first one of the next header."""
    parts = records(pickled(state_dict({"x": X})), SIXTEEN | {"1": bytes(7) + b"P", "2": b"x"})[:-1]
    data = zip_bytes(parts)
    header, directory = data.rindex(b"PK\3\4"), data.index(b"PK\1\2")
    data = data[:header] + data[header + 1 :]
    for place in (header, directory):
        data = data.replace(struct.pack("<I", place), struct.pack("<I", place - 1))
    return data


def cut_zip64() -> bytes:
    """The zip64 field says 16 bytes, and 12 are left of the entry."""
    whole, cut = (struct.pack("<4H", *fields) for fields in ((0x4246, 0, 1, 8), (1, 16, 1, 8)))
    return zip_bytes([Record("a/x", b"")], (2,)).replace(whole, cut)


def tar() -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        info = tarfile.TarInfo("pickle")
        info.size = len(pickled(SYSTEM))
        archive.addfile(info, io.BytesIO(pickled(SYSTEM)))
    return out.getvalue()


def old(**changes) -> bytes:
    stored = tensor(storage("0", 4, "FloatStorage", NONE), (4,), (1,))
    return legacy_bytes(**({"body": state_dict({"x": stored}), "storages": SIXTEEN} | changes))


FOREIGN = [
    ("builtins", "eval"), ("builtins", "getattr"), ("builtins", "__import__"), ("pip", "main"),
    ("torch.jit", "_script.load"), ("torch.hub", "load"), ("torch._utils.x", "__globals__"),
    ("torch", "_utils._rebuild_tensor_v2"), ("torch._utils", "_rebuild_tensor_v2.__globals__"),
    ("builtins", "bytearray"), ("builtins", "set"), ("builtins", "complex"), ("collections", "Counter"),
    ("_codecs", "encode"), ("torch", "device"), ("torch._utils", "_rebuild_sparse_tensor"),
    ("torch._tensor", "_rebuild_from_type_v2"), ("torch._utils", "_rebuild_qtensor"),
]  # fmt: skip

HOSTILE = [
    ("P01", "UnsafePickleError", r"'os\.system'", program(SYSTEM)),
    *(
        ("P02-P04", "UnsafePickleError", re.escape(f"asks for '{m}.{name}'"), program(named(m, name)))
        for m, name in FOREIGN
    ),
    *(
        ("P05", "UnsafePickleError", f"items of a {kind}", program(target + NONE + NONE + SETITEM))
        for target, kind in [(EMPTY_LIST, "list"), (EMPTY_TUPLE, "tuple"), (number(1), "int")]
    ),
    ("P05", "UnsafePickleError", "items of a list", program(EMPTY_LIST + MARK + SETITEMS)),
    ("P05", "UnsafePickleError", "appends to a dict", program(EMPTY_DICT + NONE + APPEND)),
    ("P05", "UnsafePickleError", "appends to a tuple", program(EMPTY_TUPLE + MARK + APPENDS)),
    ("P06", "FormatError", "storage size mismatch", one(tensor(storage("0", 10**9), (10**9,), (1,)))),
    ("P06", "FormatError", "storage size mismatch", one(tensor(storage("0", 3), (3,), (1,)))),
    ("P06", "FormatError", "no record 'data/7'", one(tensor(storage("7", 4), (4,), (1,)))),
    (
        "P06",
        "FormatError",
        r"no record 'data/\.\./data.pkl'",
        one(tensor(storage("../data.pkl", 4), (4,), (1,))),
    ),
    ("P07", "ResourceLimitError", "expanded tensor", one(tensor(storage("0", 4), (10**12,), (0,)))),
    ("P07", "ResourceLimitError", "expanded tensor", one(tensor(storage("0", 4), (2, 2), (0, 1)))),
    ("P07", "ResourceLimitError", "expanded tensor", one(tensor(storage("0", 4), (3, 2), (1, 1)))),
    *(
        ("P08", "FormatError", message, one(tensor(storage("0", 4), shape, stride, offset)))
        for message, shape, stride, offset in [
            ("from 0 on", (2,), (1,), -1),
            ("from 0 on", (2,), (-1,), 3),
            ("from 0 on", (-1,), (1,), 0),
            ("from 0 on", (1 << 63,), (1,), 0),
            ("element 4 of a storage that has 4", (4,), (1,), 1),
            ("element 4 of a storage that has 4", (5,), (1,), 0),
            ("element 4 of a storage that has 4", (2, 2), (3, 1), 0),
            ("element 4 of a storage that has 4", (0,), (1,), 5),
            ("2 axes and 1 strides", (2, 2), (1,), 0),
            ("9 axes", (1,) * 9, (1,) * 9, 0),
        ]
    ),
    ("P09", "UnsafePickleError", "attributes of a View", program(X + EMPTY_DICT + BUILD)),
    ("P09", "UnsafePickleError", "attributes of a list", program(EMPTY_LIST + EMPTY_DICT + BUILD)),
    *(
        ("P10", "FormatError", message, zip_bytes(records(pickled(body), SIXTEEN)))
        for message, body in [
            ("empty stack", REDUCE),
            ("empty stack", EMPTY_TUPLE + REDUCE),
            ("empty stack", b""),
            ("empty stack", EMPTY_LIST + NONE + MARK + POP),
            ("empty stack", b"q\0"),
            ("empty stack", SETITEM),
            ("empty stack", BINPERSID),
            ("a mark that it never set", POP_MARK),
            ("a mark that it never set", TUPLE),
            ("no entry 7", b"h\7"),
            ("no entry 4294967295", b"j\xff\xff\xff\xff"),
            ("before it is complete", NONE + NONE),
            ("before it is complete", MARK + NONE),
            ("without a value", EMPTY_DICT + MARK + NONE + SETITEMS),
        ]
    ),
    *(
        ("P11", "UnsupportedError", f"opcode {name}", program(body))
        for name, body in [
            ("FRAME", b"\x80\4\x95" + bytes(8)),
            ("STACK_GLOBAL", text("os") + text("system") + b"\x93"),
            ("MEMOIZE", NONE + b"\x94"),
            ("BYTEARRAY8", b"\x96" + bytes(8)),
            ("NEXT_BUFFER", b"\x97"),
            ("SHORT_BINUNICODE", b"\x8c\1a"),
        ]
    ),
    *(
        ("P12", "UnsafePickleError", f"opcode {name},", program(body))
        for name, body in [
            ("INST", MARK + b"ios\nsystem\n"),
            ("OBJ", MARK + named("collections", "OrderedDict") + b"o"),
            ("EXT1", b"\x82\1"),
            ("EXT4", b"\x84" + bytes(4)),
            ("PERSID", b"P1\n"),
            ("NEWOBJ", named("collections", "OrderedDict") + EMPTY_TUPLE + b"\x81"),
            ("NEWOBJ_EX", named("collections", "OrderedDict") + EMPTY_TUPLE + EMPTY_DICT + b"\x92"),
        ]
    ),
    ("P12", "FormatError", "opcode DUP,", program(b"2")),
    *(
        ("P13", "FormatError", message, zip_bytes(records(body, SIXTEEN)))
        for message, body in [
            ("goes beyond byte", PROTO + state_dict({"x": X})),
            ("goes beyond byte", PROTO + b"J\0\0"),
            ("goes beyond byte", PROTO + b"X\xff\xff\xff\xffabc."),
            ("goes beyond byte", PROTO + b"cos\nsystem"),
            ("goes on after its pickle", pickled(state_dict({"x": X})) + b"garbage"),
            ("no pickle has the opcode", PROTO + b"\xff."),
            ("not UTF-8", PROTO + b"X\1\0\0\0\xff."),
        ]
    ),
    ("P13", "UnsafePickleError", r"'os\.system'", zip_bytes(records(PROTO + SYSTEM + b"\xff", SIXTEEN))),
    ("P14", "UnsupportedError", "compressed record 'data/0'", changed(2, method=8, size=1 << 30)),
    ("P15", "FormatError", "overlapping records", overlapping()),
    ("P15", "FormatError", "'archive/data/1' goes beyond byte", overlapping_by_a_byte()),
    ("P15", "FormatError", "differs from the zip directory", changed(3, header=0)),
    *(
        ("P16", "FormatError", "wanted a path below one folder", more(Record(name, b"x")))
        for name in [
            b"archive/../../x",
            b"/etc/x",
            b"archive\\x",
            b"archive/a\\b",
            b"archive/a\0b",
            b"archive/./x",
            b"archive//x",
            b"archive/",
            b"data.pkl",
            b"other/x",
            b"archive/\xff",
            b"../x",
            b"",
        ]
    ),
    ("P16", "FormatError", "two records are called 'version'", more(Record("archive/version", b"3\n"))),
    ("P17", "FormatError", "differs from the zip directory", changed(0, name_here=b"archive/dada.pkl")),
    ("P17", "FormatError", "differs from the zip directory", changed(2, name_here=b"archive/data/1")),
    ("P17", "FormatError", "differs from the zip directory", changed(2, size_here=99)),
    ("P18", "FormatError", "flags 0x0001; is it encrypted", changed(2, flags=1)),
    ("P18", "FormatError", "flags 0x2000", changed(0, flags=0x2000)),
    ("P18", "FormatError", "differs from the zip directory", changed(0, flags_here=1)),
    ("P18", "FormatError", "differs from the zip directory", changed(0, flags_here=0x808)),
    ("P19", "FormatError", "'data.pkl' at byte 64 has CRC", changed(0, crc=1)),
    ("P19", "FormatError", "'byteorder' at byte .* has CRC", changed(1, crc=1)),
    ("P20", "UnsupportedError", "a TorchScript program", more(Record("archive/constants.pkl", b"x"))),
    ("P20", "UnsupportedError", "a TorchScript program", more(Record("archive/code/x.py", b"x"))),
    ("P21", "UnsupportedError", "byteorder is b'big'", changed(1, data=b"big")),
    ("P21", "FormatError", "byteorder is b'xyz'", changed(1, data=b"xyz")),
    ("P22", "FormatError", "the magic number of a legacy file is 0x7b", old(magic=number(123))),
    ("P22", "FormatError", "the magic number of a legacy file is a dict", old(magic=EMPTY_DICT)),
    ("P22", "FormatError", "the protocol of a legacy file is 0x3ea", old(protocol=1002)),
    ("P22", "FormatError", "not little-endian", old(little_endian=b"\x89")),
    ("P22", "UnsafePickleError", r"'os\.system'", old(magic=SYSTEM)),
    ("P23", "TruncatedError", "storage '0' at byte", old(counts={"0": 1 << 62})),
    ("P23", "TruncatedError", "storage '0' at byte", old(counts={"0": -1})),
    ("P23", "TruncatedError", "storage '0' at byte", old()[:-1]),
    ("P23", "TruncatedError", "the size of a storage at byte", old()[:-17]),
    ("P23", "TruncatedError", "ends within a pickle", old()[:100]),
    ("P23", "FormatError", "storage size mismatch", old(storages={"0": bytes(12)})),
    ("P23", "FormatError", "the last storage ends at byte", old() + b"x"),
    ("P23", "FormatError", "there is no storage '0'", old(storages={})),
    ("P23", "FormatError", "listed twice", old(keys=["0", "0"])),
    ("P23", "FormatError", "listed twice, or for no tensor", old(keys=["1"])),
    ("P24", "UnsafePickleError", r"'os\.system'", old(body=SYSTEM)),
    ("P24", "UnsafePickleError", r"a \.tar", tar()),
    # Not in the catalogue: our own limits, and what an inert constructor is given
    ("limit", "ResourceLimitError", "steps in a pickle", program(NONE + POP + (NONE + POP) * (1 << 18))),
    ("limit", "ResourceLimitError", "more than 64 marks", program(MARK * 65)),
    ("limit", "ResourceLimitError", "a text of 65537 bytes", program(text("x" * 65537))),
    ("limit", "ResourceLimitError", "data.pkl has 16777217 bytes", changed(0, data=bytes(2**24 + 1))),
    (
        "limit",
        "ResourceLimitError",
        "the zip has 100001 records",
        zip_bytes([Record("a/x", b"")], (2,), count=100_001),
    ),
    ("zip", "FormatError", "without data.pkl", zip_bytes([Record("a/x", b"")])),
    ("zip", "FormatError", "has no b'PK", zip_bytes([Record("a/x", b"")], count=2)),
    ("zip", "FormatError", "has no b'PK", cut_zip64()),
    (
        "zip",
        "FormatError",
        "goes on after its last entry",
        zip_bytes([Record("a/x", b""), Record("a/y", b"")], count=1),
    ),
    ("zip", "TruncatedError", "does not end with its directory", saved(state_dict({"x": X}), SIXTEEN) + b"x"),
    (
        "zip",
        "TruncatedError",
        "does not end with its directory",
        zip_bytes([Record("a/x", b"")], comment=b"x"),
    ),
    ("args", "FormatError", "duplicate key 'x'", program(text("x") + NONE + SETITEM)),
    ("args", "FormatError", "the key of an item is a tuple", program(EMPTY_TUPLE + NONE + SETITEM)),
    ("args", "FormatError", "the key of an item is a bool", program(TRUE + NONE + SETITEM)),
    (
        "args",
        "UnsafePickleError",
        "the pickle calls a StorageType",
        program(call(named("torch", "HalfStorage"))),
    ),
    ("args", "UnsafePickleError", "the pickle calls a str", program(call(text("os.system")))),
    ("args", "FormatError", "calls with a dict", program(named("torch", "Size") + EMPTY_DICT + REDUCE)),
    ("args", "FormatError", "a Size is made", program(call(named("torch", "Size"), number(1)))),
    (
        "args",
        "FormatError",
        "an OrderedDict is made",
        program(call(named("collections", "OrderedDict"), NONE)),
    ),
    (
        "args",
        "FormatError",
        "a Parameter is made",
        program(call(named("torch._utils", "_rebuild_parameter"), NONE)),
    ),
    (
        "args",
        "FormatError",
        "a tensor is made",
        program(call(named("torch._utils", "_rebuild_tensor_v2"), NONE)),
    ),
    ("args", "FormatError", "a tensor is made", program(tensor(NONE, (1,), (1,)))),
    ("args", "FormatError", "describes no storage", program(NONE + BINPERSID)),
    ("args", "FormatError", "describes no storage", program(storage("0", -4))),
    ("args", "FormatError", "described in two ways", program(storage("0", 8, "HalfStorage"))),
    ("args", "UnsupportedError", "part of another", program(storage("0", 4, "FloatStorage", EMPTY_TUPLE))),
    ("begin", "FormatError", "is a Git LFS pointer", b"version https://git-lfs.github.com/spec/v1"),
    ("begin", "TruncatedError", "0 bytes", b""),
]


@pytest.mark.parametrize(
    "case, error, message, data", HOSTILE, ids=[f"{c[0]}-{i}" for i, c in enumerate(HOSTILE)]
)
def test_hostile_files_are_refused(case, error, message, data):
    refused(data, error, message)


def refused(data: bytes, error: str, message: str) -> None:
    start = time.process_time()
    with pytest.raises(errors.NumpyLlamaError, match=message) as caught:
        opened(data)
    assert type(caught.value).__name__ == error
    assert "x.pth" in str(caught.value) and len(str(caught.value)) < 600
    assert str(caught.value).isascii() and str(caught.value).isprintable()
    assert time.process_time() - start < 2


CHILD = """
import sys
from numpy_llama.checkpoint.pytorch.file import TorchFile
watched = []
sys.addaudithook(lambda event, args: watched.append(event))
for i in range(int(sys.argv[1])):
    watched.clear()
    try:
        TorchFile(f"{i}/x.pth")
        print("accepted")
    except Exception as error:
        print(type(error).__name__)
    forbidden = ("import", "exec", "compile", "pickle.", "os.system", "subprocess.", "socket.")
    print(*(event for event in watched if event.startswith(forbidden)), end="", sep="\\n")
"""


def test_hostile_files_are_refused_without_asserts_and_run_nothing(tmp_path):
    for i, (*_, data) in enumerate(HOSTILE):
        (tmp_path / str(i)).mkdir()
        (tmp_path / str(i) / "x.pth").write_bytes(data)
    command = [sys.executable, "-O", "-W", "error", "-c", CHILD, str(len(HOSTILE))]
    child = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert child.stdout.split() == [error for _, error, *_ in HOSTILE], child.stderr


def test_state_of_a_dict_is_ignored():
    """torch puts `_metadata` there; whatever else there is has no more effect."""
    state = state_dict({"__class__": NONE, "update": NONE, "_metadata": ORDERED_DICT})
    file = opened(program(state + BUILD))
    assert list(file.tensors) == ["x"]


def test_checksums_of_storages_are_held_when_asked_for():
    file = opened(changed(2, crc=1))
    assert file.tensor("x").dequantize().tolist() == [0] * 4
    with pytest.raises(
        errors.FormatError, match=r"x\.pth: 'data/0' at byte \d+ has CRC [0-9a-f]{8}, .* 00000001"
    ):
        file.verify()


def test_what_others_misuse_is_on_no_list_of_ours():
    from torch._weights_only_unpickler import _get_allowed_globals

    torch_allows = set(_get_allowed_globals())
    ours = {f"{module}.{name}" for module, name in torch_pickle.NAMES}
    assert ours <= torch_allows and len(ours) == 15


@pytest.fixture(scope="module")
def files() -> list[bytes]:
    torch.manual_seed(0)
    x = torch.randn(6, 4)
    state = torch.nn.Linear(4, 3).state_dict()
    state |= {"x": x.half(), "turned": x.T, "parameter": torch.nn.Parameter(x[2:]), "step": 7}
    return [torch_saved(state), torch_saved(state, zip=False), torch_saved({"model": dict(state)})]


def test_every_prefix_of_a_file_is_truncated(files):
    for data in files:
        for n in range(4, len(data), 7):
            with pytest.raises(errors.TruncatedError):
                opened(data[:n])
        opened(data)


@given(
    which=st.integers(0, 2),
    changes=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=4),
    cut=st.one_of(st.none(), st.integers(0, 10**6)),
)
def test_damaged_files_give_our_errors_or_none(files, which, changes, cut):
    damaged = bytearray(files[which])
    for at, byte in changes:
        damaged[at % len(damaged)] = byte
    fuzz(bytes(damaged if cut is None else damaged[: cut % len(damaged) + 1]))


@given(st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 255)), min_size=1, max_size=3))
def test_damaged_pickles_give_our_errors_or_none(files, changes):
    """With a checksum that is right again, so that the damage is read."""
    body = bytearray(
        pickled(state_dict({"x": X, "y": tensor(storage("0", 4), (2, 2), (1, 2)), "z": SYSTEM[:0] + NONE}))
    )
    for at, byte in changes:
        body[at % len(body)] = byte
    fuzz(zip_bytes(records(bytes(body), SIXTEEN)))


def fuzz(data: bytes) -> None:
    tracemalloc.start()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            opened(data, whole)
    except errors.NumpyLlamaError as error:
        assert str(error).isprintable()
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < FUZZ_BYTES
