"""A run on disk: what learns, AdamW's moments, the step, and the options that decide every later bit.

    parameter/NAME  first_moment/NAME  second_moment/NAME    arrays in float32
    run                                                      {"step": 120, "options": {...}} as JSON, in bytes

The file is a safetensors file. The order of the data is computed from the step (order.py), so nothing else is
needed to continue with the same bits on the same machine. Another instruction set adds in another order.

What this file promises: whenever the process is killed, the file is the old state or the whole new one.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..backend.formats import FORMATS, Format
from ..checkpoint.json_file import JsonFile, parse_json
from ..checkpoint.safetensors_file import SafetensorsFile
from ..checkpoint.safetensors_write import write_safetensors
from ..config import Array
from ..errors import MismatchError, escape
from .optimizer import AdamW

DIGESTS = ("data", "model")  # options whose values say nothing to a reader
F32, BYTES = FORMATS["F32"], Format("U8", -1, 1, 1, lambda rows: rows)


def arrays(optimizer: AdamW) -> Iterator[tuple[str, Array]]:
    """Every array of a run under its name in the file."""
    for group, of_group in (
        ("parameter", optimizer.parameters),
        ("first_moment", optimizer.m),
        ("second_moment", optimizer.v),
    ):
        yield from ((f"{group}/{name}", x) for name, x in of_group.items())


def save_state(path: Path, optimizer: AdamW, options: Mapping[str, Any]) -> None:
    """Replace the state at `path`. A full disk is an error, and the old state stands."""
    run = np.frombuffer(json.dumps({"step": optimizer.t, "options": dict(options)}).encode(), np.uint8)
    written = dict(arrays(optimizer))
    tensors = {name: (F32, x.shape) for name, x in written.items()} | {"run": (BYTES, run.shape)}
    written["run"] = run
    write_safetensors(path, tensors, lambda name: [written[name].reshape(-1).view(np.uint8)])


class State:
    """A saved run. `step` and `options` are read on opening, the arrays by `restore`."""

    def __init__(self, path: Path):
        self.path, self._file = path, SafetensorsFile(path)
        run = JsonFile(path, values=parse_json(self._bytes("run", None).tobytes(), f"{path}: run"))
        self.step: int = run.require("step", int)
        self.options: dict[str, Any] = run.require("options", dict)

    def restore(self, optimizer: AdamW) -> None:
        """Put the saved numbers into the parameters and the moments, in place. The file is closed then."""
        for name, x in arrays(optimizer):
            x[...] = self._bytes(name, x.shape).view("<f4").reshape(x.shape)
        optimizer.t = self.step
        del self._file  # Windows replaces no file that is mapped

    def check_options(self, options: Mapping[str, Any], free: tuple[str, ...] = ()) -> None:
        """MismatchError unless the run was begun with these options. Those in `free` may differ."""
        for name in (name for name in options if name not in free):
            then, now = self.options.get(name), options[name]
            if then != now:
                what = f"{name} {escape(then, 60)}, and is now to have {escape(now, 60)}: give the old value"
                if name in DIGESTS:
                    what = f"other {name}: give the old {name}"
                raise MismatchError(
                    f"{self.path}: the run was begun with {what}, or begin another run with another --out"
                )

    def _bytes(self, name: str, shape: tuple[int, ...] | None) -> Array:
        info = self._file.tensors.get(name)
        if info is None or (shape is not None and (info.type_name, info.shape) != ("F32", shape)):
            found = "nothing" if info is None else f"{info.type_name} of shape {info.shape}"
            wanted = "the state of this run" if shape is None else f"F32 of shape {shape}"
            raise MismatchError(f"{self.path} has {found} as {escape(name)}, wanted {wanted}")
        return self._file.file.bytes_at(info.offset, info.nbytes, escape(name))
