"""The results of requests in a file, a JSON object on each line. A later run goes on from there.

    {"results of": "SIGNATURE"}                     the model, by its logits after a few tokens
    {"request": "KEY", "result": [-12.3, false]}    KEY is a hash of the request's token ids

What this file promises: a file of another model, or with other content, is an error and stays as it was. A
last line that was cut off when the process was killed is removed.
"""

import json
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from ..checkpoint.json_file import parse_json
from ..errors import FormatError, MismatchError, escape
from ..model import Transformer


class Store:
    """Results by the key of their request: in memory, and in a file if there is a `path`."""

    def __init__(self, model: Transformer, path: Path | None = None):
        self.results: dict[str, Any] = {}
        self.file = None
        if path is None:
            return
        head = json.dumps({"results of": signature(model)}).encode() + b"\n"
        try:
            content = path.read_bytes() if path.exists() else b""
            if not head.startswith(content[: len(head)]):
                raise MismatchError(f"{path} {_other(content)}; give another --out")
            whole = content[: content.rfind(b"\n") + 1]
            for number, line in enumerate(whole.splitlines()[1:], 2):
                self._read(line, f"{path}, line {number}")
            self.file = path.open("ab")
            self.file.truncate(len(whole))
        except OSError as error:
            raise FormatError(f"{path} cannot be used for results: {error.strerror}") from None
        if not whole:
            self._write(head)

    def add(self, key: str, result: Any) -> None:
        self.results[key] = result
        self._write(json.dumps({"request": key, "result": result}).encode() + b"\n")

    def close(self) -> None:
        if self.file is not None:
            self.file.close()

    def _read(self, line: bytes, where: str) -> None:
        found = parse_json(line, where, nonfinite=True)
        if not isinstance(found, dict) or not isinstance(found.get("request"), str) or "result" not in found:
            raise FormatError(f"{where} is {escape(found, 60)}, wanted an object with request and result")
        self.results[found["request"]] = found["result"]

    def _write(self, line: bytes) -> None:
        if self.file is not None:
            self.file.write(line)
            self.file.flush()


def signature(model: Transformer) -> str:
    """A short name of a model with its arithmetic: a hash of its logits after eight ids."""
    ids = np.linspace(0, model.args.vocab_size - 1, min(8, model.args.max_seq_len)).astype(int)
    return blake2b(np.ascontiguousarray(model(ids[None])).tobytes(), digest_size=16).hexdigest()


def key_of(*request: Any) -> str:
    """A short name of a request."""
    return blake2b(json.dumps(request).encode(), digest_size=16).hexdigest()


def _other(content: bytes) -> str:
    """What a file is that does not begin as one of this model's results."""
    if content.startswith(b'{"results of"'):
        return "has the results of another model, or of other arithmetic such as --exact"
    return f"begins with {escape(content[:40])}, so it holds no results of `eval`"
