"""JSON from untrusted files, read strictly.

Duplicate keys, NaN and Infinity, very deep nesting, numbers of thousands of digits, a byte order mark, other
encodings than UTF-8: each is a FormatError.
"""

import codecs
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from ..errors import ConfigError, FormatError, escape
from .files import MappedFile, mapped

MAX_BYTES = 1 << 20  # of a configuration file; real ones have a few thousand
MAX_LINE = 64 << 20  # bytes of a line of JSON


def parse_json(data: bytes, source: object, nonfinite: bool = False) -> Any:
    """The value of a JSON text. `source` is its name in messages.

    nonfinite: NaN and Infinity, as Python writes them, are numbers; the caller checks each one's range.
    """

    def refuse(what: object) -> NoReturn:
        raise FormatError(f"{source} is no JSON that can be read: {escape(what)}")

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            refuse(f"duplicate key {next(key for key in keys if keys.count(key) > 1)!r}")
        return found

    try:
        text = str(data, "utf-8")
        constant = float if nonfinite else lambda name: refuse(f"it has {name}")
        return json.loads(text, object_pairs_hook=unique, parse_constant=constant)
    except RecursionError:
        refuse("it is nested too deeply")
    except ValueError as error:  # not UTF-8, not JSON, or a number too long
        refuse(str(error))


def json_lines(path: Path, wanted: str) -> Iterator[tuple[Any, str]]:
    """The value on each line of a file, and the name of the line for messages. Empty lines are left out."""
    content = mapped(path, wanted)
    for number, line in enumerate(iter(content.readline, b""), 1):
        where = f"{path}, line {number}"
        if len(line) > MAX_LINE:
            raise FormatError(f"{where} has {len(line)} bytes, at most {MAX_LINE} are read")
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield parse_json(line, where, nonfinite=True), where


class JsonFile:
    """A file that holds one JSON object. `get` checks each value's type; its errors name file and key."""

    def __init__(
        self,
        path: Path,
        max_bytes: int = MAX_BYTES,
        values: dict[str, Any] | None = None,
        nonfinite: bool = False,
    ):
        self.path = path
        if values is None:
            file = MappedFile(path, "a JSON file")
            if file.size > max_bytes:
                raise FormatError(f"{path} has {file.size} bytes, at most {max_bytes} are read")
            values = parse_json(file.map[:], path, nonfinite)
        if not isinstance(values, dict):
            raise FormatError(f"{path} holds {escape(values, 60)}, wanted a JSON object")
        self.values = values

    def get(self, key: str, kind: type | tuple[type, ...], default: Any = None) -> Any:
        """The value of `key`, or `default` if it is absent or null. A whole number counts as a float too."""
        value = self.values.get(key)
        if value is None:
            return default
        if kind is float and type(value) is int:
            value = float(value) if abs(value) < 1 << 53 else value
        kinds = kind if isinstance(kind, tuple) else (kind,)
        if type(value) not in kinds:
            wanted = " or ".join(k.__name__ for k in kinds)
            raise ConfigError(f"{self.path}: {key} is {escape(value, 60)}, wanted {wanted}")
        return value

    def require(self, key: str, kind: type | tuple[type, ...]) -> Any:
        """Like `get`, but a missing value is a ConfigError."""
        value = self.get(key, kind)
        if value is None:
            raise ConfigError(f"{self.path} has no {key}")
        return value

    def part(self, key: str) -> "JsonFile | None":
        """An object inside this one, with the same checks."""
        value = self.get(key, dict)
        return None if value is None else JsonFile(self.path, values=value)
