"""The pickles of torch.save, read without `pickle`.

A pickle is a program for a machine with a stack. This machine has the opcodes that torch writes and the few
names in `NAMES`. Each name makes plain data: a dict, a tuple, or a description of a tensor.

What this file promises: nothing is imported, no attribute is set, and only the functions in `NAMES` are
called. A pickle that needs more is an UnsafePickleError, which names it. A pickle with other faults is a
FormatError. The number of steps is limited, and nothing here recurses.
"""

import pickletools
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from types import FunctionType
from typing import Any, NoReturn

from ...errors import (
    FormatError,
    NumpyLlamaError,
    ResourceLimitError,
    TruncatedError,
    UnsafePickleError,
    UnsupportedError,
    escape,
)
from ..files import MappedFile

# A tensor takes 45 steps. A step makes one object at most, so this bounds time, stack, memo and memory.
MAX_STEPS = 1 << 19
MAX_BYTES = 1 << 24
MAX_STRING = 1 << 16  # bytes
MAX_DEPTH = 64  # open marks; torch writes three or four
MAX_AXES = 8


@dataclass(frozen=True)
class StorageType:
    """The type of a storage's elements."""

    name: str
    itemsize: int


@dataclass(frozen=True)
class Storage:
    """A sequence of elements. The container finds their bytes by `key`."""

    type: StorageType
    key: str
    numel: int

    @property
    def nbytes(self) -> int:
        return self.numel * self.type.itemsize


@dataclass(frozen=True)
class View:
    """A tensor: element (i, j) is number `offset + i * stride[0] + j * stride[1]` of its storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


class Unpickler:
    """Reads one pickle after another from `start` on, and none beyond `end`."""

    def __init__(self, file: MappedFile, start: int, end: int):
        self.file, self.map, self.at = file, file.map, start
        self.end = min(end, start + MAX_BYTES)
        self.storages: dict[str, Storage] = {}  # all storages that occurred, by key

    def load(self) -> Any:
        """The value of the next pickle."""
        self.stack: list[Any] = []
        self.marks: list[int] = []  # for each mark, the height of the stack below it
        self.memo: dict[int, Any] = {}
        for _ in range(MAX_STEPS):
            opcode = self.take(1)
            if (step := STEP_OF_BYTE.get(opcode)) is not None:
                step(self)
            elif opcode != b".":
                self.refuse(opcode)
            else:  # STOP
                value = self.pop()
                if self.stack or self.marks:
                    self.fail("the pickle stops before it is complete")
                return value
        self.fail(f"more than {MAX_STEPS} steps in a pickle", ResourceLimitError)

    def fail(self, problem: str, error: type[NumpyLlamaError] = FormatError) -> NoReturn:
        raise error(f"{self.file.path}: {problem} (before byte {self.at})")

    def refuse(self, opcode: bytes) -> NoReturn:
        known = OPCODES.get(opcode)
        if known is None:
            self.fail(f"no pickle has the opcode {opcode!r}")
        problem = f"the pickle has the opcode {known.name}, which torch.save does not write unless asked to"
        if known.name in CALLING:
            self.fail(f"{problem}: it imports or calls", UnsafePickleError)
        self.fail(problem, UnsupportedError if known.proto > 2 else FormatError)

    # Bytes and stack

    def take(self, n: int) -> bytes:
        start, self.at = self.at, self.at + n
        if self.at > self.end:
            if self.end == self.file.size:
                self.fail("the file ends within a pickle; incomplete copy or download?", TruncatedError)
            self.fail(f"the pickle goes beyond byte {self.end}")
        return self.map[start : self.at]

    def number(self, layout: struct.Struct) -> Any:
        return layout.unpack(self.take(layout.size))[0]

    def text(self, nbytes: int) -> str:
        data = self.take(nbytes)
        if nbytes > MAX_STRING:
            self.fail(f"a text of {nbytes} bytes, the limit is {MAX_STRING}", ResourceLimitError)
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            self.fail(f"a text is not UTF-8: {error.reason}")

    def line(self) -> str:
        end = self.map.find(b"\n", self.at, self.end)
        text = self.text(end - self.at if end >= 0 else self.end + 1 - self.at)
        self.at += 1
        return text

    def pop(self) -> Any:
        self.top()
        return self.stack.pop()

    def top(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            self.fail("the pickle takes from an empty stack")
        return self.stack[-1]

    def pop_to_mark(self) -> list[Any]:
        if not self.marks:
            self.fail("the pickle goes back to a mark that it never set")
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    # Steps

    def mark(self) -> None:
        if len(self.marks) == MAX_DEPTH:
            self.fail(f"more than {MAX_DEPTH} marks in a pickle", ResourceLimitError)
        self.marks.append(len(self.stack))

    def put(self, index: int) -> None:
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            self.fail(f"the pickle's memo has no entry {index}")
        self.stack.append(self.memo[index])

    def pack(self, n: int) -> None:
        self.stack.append(tuple([self.pop() for _ in range(n)][::-1]))

    def extend(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not list:
            self.fail(f"the pickle appends to a {kind(target)}, wanted a list", UnsafePickleError)
        target.extend(values)

    def update(self, values: list[Any]) -> None:
        target = self.top()
        if type(target) is not dict:
            self.fail(f"the pickle sets items of a {kind(target)}, wanted a dict", UnsafePickleError)
        if len(values) % 2:
            self.fail("the pickle sets an item without a value")
        for key, value in zip(values[::2], values[1::2], strict=True):
            if type(key) not in (str, int):  # the hash of nested tuples would recurse
                self.fail(f"the key of an item is a {kind(key)}, wanted a text or a number")
            if key in target:
                self.fail(f"duplicate key {escape(key)}")
            target[key] = value

    def find(self) -> None:
        """GLOBAL. `pickle` would import here."""
        module, name = self.line(), self.line()
        if (module, name) not in NAMES:
            what = escape(f"{module}.{name}")
            self.fail(f"the pickle asks for {what}, which no state dict needs", UnsafePickleError)
        self.stack.append(NAMES[module, name])

    def reduce(self) -> None:
        args, function = self.pop(), self.pop()
        if type(function) is not FunctionType:  # only `find` puts one there
            self.fail(f"the pickle calls a {kind(function)}", UnsafePickleError)
        if type(args) is not tuple:
            self.fail(f"the pickle calls with a {kind(args)}, wanted a tuple")
        self.stack.append(function(self, args))

    def build(self) -> None:
        """BUILD. `pickle` would set attributes here. A state dict has one, `_metadata`, which we ignore."""
        self.pop()
        if type(self.top()) is not dict:
            self.fail(f"the pickle sets attributes of a {kind(self.top())}", UnsafePickleError)

    def storage(self) -> None:
        """BINPERSID: ("storage", type, key, device, number of elements). The legacy container adds None."""
        value = self.pop()
        well_formed = (
            type(value) is tuple
            and len(value) in (5, 6)
            and value[0] == "storage"
            and [type(v) for v in value[1:4]] == [StorageType, str, str]
            and _whole(value[4:5])
        )
        if not well_formed:
            self.fail(f"the pickle refers to a {kind(value)} that describes no storage")
        if value[5:] not in ((), (None,)):
            self.fail("a storage is part of another, as PyTorch wrote before 0.4", UnsupportedError)
        found = Storage(value[1], value[2], value[4])
        if self.storages.setdefault(found.key, found) != found:
            self.fail(f"storage {escape(found.key)} is described in two ways")
        self.stack.append(found)

    # Replacements of torch's functions

    def make_dict(self, args: tuple[Any, ...]) -> dict[Any, Any]:
        if args:
            self.fail(f"an OrderedDict is made of {len(args)} arguments, wanted none")
        return {}

    def make_size(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        if [type(arg) for arg in args] != [tuple]:
            self.fail("a Size is made of something else than a tuple")
        return args[0]

    def make_parameter(self, args: tuple[Any, ...]) -> View:
        if not args or type(args[0]) is not View:
            self.fail("a Parameter is made of something else than a tensor")
        return args[0]

    def make_view(self, args: tuple[Any, ...]) -> View:
        """_rebuild_tensor_v2: (storage, offset, shape, stride, and two or three values for training)."""
        storage, offset, shape, stride, *_ = args if len(args) in (6, 7) else (None,) * 4
        if type(storage) is not Storage or not (_whole((offset,)) and _whole(shape) and _whole(stride)):
            self.fail(
                "a tensor is made of other things than a storage, and offset, shape and strides from 0 on"
            )
        if len(shape) != len(stride) or len(shape) > MAX_AXES:
            self.fail(f"a tensor has {len(shape)} axes and {len(stride)} strides, the limit is {MAX_AXES}")
        numel = prod(shape)
        last = (
            offset + sum((n - 1) * step for n, step in zip(shape, stride, strict=True))
            if numel
            else offset - 1
        )
        if last >= storage.numel:
            self.fail(f"a tensor goes up to element {last} of a storage that has {storage.numel}")
        if numel > storage.numel or any(n > 1 and not step for n, step in zip(shape, stride, strict=True)):
            self.fail(
                f"expanded tensor: shape {shape} with strides {stride} of {storage.numel} elements",
                ResourceLimitError,
            )
        return View(storage, offset, shape, stride)


def _whole(values: Any) -> bool:
    """Whether it is a tuple of whole numbers from 0 up that fit into torch's int64."""
    return type(values) is tuple and all(type(n) is int and 0 <= n < 1 << 63 for n in values)


def kind(value: object) -> str:
    """The type's name for messages. The value itself may be nested too deeply to print."""
    return type(value).__name__


# All names that a pickle may use, by module and name. torch's own list of safe names is longer. It has names
# that LLaMA does not need and attacks can use: bytearray, set, encode, _rebuild_from_type_v2 and more.
NAMES: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): Unpickler.make_dict,
    ("torch", "Size"): Unpickler.make_size,
    ("torch.nn.parameter", "Parameter"): Unpickler.make_parameter,
    ("torch._utils", "_rebuild_parameter"): Unpickler.make_parameter,
    ("torch._utils", "_rebuild_tensor_v2"): Unpickler.make_view,
    ("torch", "FloatStorage"): StorageType("F32", 4),
    ("torch", "HalfStorage"): StorageType("F16", 2),
    ("torch", "BFloat16Storage"): StorageType("BF16", 2),
    ("torch", "DoubleStorage"): StorageType("F64", 8),
    ("torch", "LongStorage"): StorageType("I64", 8),
    ("torch", "IntStorage"): StorageType("I32", 4),
    ("torch", "ShortStorage"): StorageType("I16", 2),
    ("torch", "CharStorage"): StorageType("I8", 1),
    ("torch", "ByteStorage"): StorageType("U8", 1),
    ("torch", "BoolStorage"): StorageType("BOOL", 1),
}

# Opcodes that import or call, which could reach code outside the pickle. GLOBAL, REDUCE, BUILD and BINPERSID
# are among the steps below, with checks.
CALLING = {"INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID"}


U8, U16, U32, I32, F64 = map(struct.Struct, ("<B", "<H", "<I", "<i", ">d"))
STEPS: dict[str, Callable[[Unpickler], Any]] = {
    "PROTO": lambda u: u.take(1),  # the protocol is not needed: every opcode is checked
    "MARK": Unpickler.mark,
    "NONE": lambda u: u.stack.append(None),
    "NEWTRUE": lambda u: u.stack.append(True),
    "NEWFALSE": lambda u: u.stack.append(False),
    "BININT1": lambda u: u.stack.append(u.number(U8)),
    "BININT2": lambda u: u.stack.append(u.number(U16)),
    "BININT": lambda u: u.stack.append(u.number(I32)),
    "LONG1": lambda u: u.stack.append(int.from_bytes(u.take(u.number(U8)), "little", signed=True)),
    "BINFLOAT": lambda u: u.stack.append(u.number(F64)),
    "SHORT_BINSTRING": lambda u: u.stack.append(u.text(u.number(U8))),
    "BINUNICODE": lambda u: u.stack.append(u.text(u.number(U32))),
    "EMPTY_TUPLE": lambda u: u.stack.append(()),
    "EMPTY_LIST": lambda u: u.stack.append([]),
    "EMPTY_DICT": lambda u: u.stack.append({}),
    "POP": Unpickler.pop,  # torch does not write POP and POP_MARK; they are harmless, they only remove values
    "POP_MARK": Unpickler.pop_to_mark,
    "TUPLE": lambda u: u.stack.append(tuple(u.pop_to_mark())),
    "TUPLE1": lambda u: u.pack(1),
    "TUPLE2": lambda u: u.pack(2),
    "TUPLE3": lambda u: u.pack(3),
    "APPEND": lambda u: u.extend([u.pop()]),
    "APPENDS": lambda u: u.extend(u.pop_to_mark()),
    "SETITEM": lambda u: u.update([u.pop(), u.pop()][::-1]),
    "SETITEMS": lambda u: u.update(u.pop_to_mark()),
    "BINPUT": lambda u: u.put(u.number(U8)),
    "LONG_BINPUT": lambda u: u.put(u.number(U32)),
    "BINGET": lambda u: u.get(u.number(U8)),
    "LONG_BINGET": lambda u: u.get(u.number(U32)),
    "GLOBAL": Unpickler.find,
    "BINPERSID": Unpickler.storage,
    "REDUCE": Unpickler.reduce,
    "BUILD": Unpickler.build,
}
OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
STEP_OF_BYTE = {byte: STEPS[opcode.name] for byte, opcode in OPCODES.items() if opcode.name in STEPS}
