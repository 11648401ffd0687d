"""Who is on trial: NumPy, PyTorch, the C kernels on each instruction set, or a file of the user's.

An `Implementation` is a name and its operations, under the names that they have in this package. It need not
have all of them: a law is tried where all its operations are.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import numpy as np

from .. import cache, functional, model
from ..backend import formats as quantize
from ..errors import BuildError
from ..generation import sampling
from ..text import bpe as merging

STORED = [f.name.lower() for f in quantize.FORMATS.values()]

# The operations that there are laws about, by the module that defines them.
OPERATIONS = {
    merging: ("merge",),
    functional: (
        *("embedding", "linear", "rms_norm", "softmax", "silu", "swiglu"),
        *("attention", "attention_scores", "weighted_values"),
        *("precompute_freqs_cis", "freqs_cis_at", "apply_rotary_emb"),
        *("causal_mask", "repeat_kv"),
    ),
    sampling: ("greedy", "repetition_penalty", "apply_temperature", "top_k", "top_p", "min_p", "draw"),
    quantize: (
        *(f"dequantize_{name}" for name in STORED),
        *(f"quantize_{f.name.lower()}" for f in quantize.FORMATS.values() if f.quantize),
        "quantize_activations",
    ),
    cache: ("KVCache",),
    model: ("Transformer",),
}
NAMES = [name for names in OPERATIONS.values() for name in names]
# Whose result is an array, in the precision of its arguments.
ARRAYS = {*OPERATIONS[functional], *OPERATIONS[sampling], "quantize_activations"} - {"greedy", "draw"}


class Call(NamedTuple):
    """What was called, what it was given (as it was then), what it gave, which arguments it wrote into."""

    name: str
    function: Callable
    arguments: tuple
    result: object = None
    written: tuple[int, ...] = ()


class Implementation:
    """Operations as attributes. Every call is kept in `calls`, until the next example."""

    def __init__(self, name: str, operations: Mapping[str, Callable], dtype=np.float64):
        """`dtype`: the finest precision that it computes in."""
        self.name, self.operations, self.dtype = name, operations, np.dtype(dtype)
        self.calls: list[Call] = []

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, name: str) -> Callable:
        if name not in self.operations:
            raise AttributeError(f"{self.name} has no {name}")
        return self.kept(name, self.operations[name])

    def kept(self, name: str, operation: Callable) -> Callable:
        """The operation, every call of which is remembered as it was: arrays may be written to later."""

        def call(*arguments):
            given = tuple(copied(x) for x in arguments)
            self.calls.append(Call(name, operation, given))
            result = operation(*arguments)
            if isinstance(operation, type):
                return Kept(self, name, result)
            check_kind(name, arguments, result)
            written = tuple(i for i, x in enumerate(arguments) if is_other(x, given[i]))
            self.calls[-1] = Call(name, operation, given, copied(result), written)
            return result

        return call


class Kept:
    """An object of a class on trial, a cache or a model: the calls of its methods are remembered too."""

    def __init__(self, by: Implementation, name: str, object: object):
        self._by, self._name, self._object = by, name, object

    def __getattr__(self, name: str):
        found = getattr(self._object, name)
        return self._by.kept(f"{self._name}.{name}", found) if inspect.ismethod(found) else found

    def __call__(self, *arguments):
        return self._by.kept(self._name, self._object)(*arguments)


def copied(x):
    return x.copy() if isinstance(x, np.ndarray) else x


def is_other(x, was) -> bool:
    """Whether an array's bits are not what they were; NaN is like itself."""
    return isinstance(x, np.ndarray) and x.tobytes() != was.tobytes()


def check_kind(name: str, arguments: tuple, result) -> None:
    """Refuse at once, by name, what would only fail later: no array, or one of another precision."""
    if name in ARRAYS and not isinstance(result, np.ndarray | np.generic):
        what = "nothing (is a return missing?)" if result is None else f"a {type(result).__name__}"
        raise AssertionError(f"{name} gave {what}, an array is wanted")
    floats = {x.dtype for x in arguments if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    if name in ARRAYS and len(floats) == 1 and result.dtype.kind == "f" and result.dtype not in floats:
        raise AssertionError(f"{floats.pop()} went in, {result.dtype} came out")


def numpy_implementation(name: str = "numpy", modules: Mapping[ModuleType, tuple] = OPERATIONS):
    """The definition: the functions of this package."""
    return Implementation(
        name, {one: getattr(module, one) for module, names in modules.items() for one in names}
    )


def torch_implementation() -> Implementation:
    from . import torch_ops

    return Implementation("torch", {name: f for name, f in vars(torch_ops).items() if name in NAMES})


def compiled_implementations() -> list[Implementation]:
    """The C kernels, float32 throughout, once for each instruction set that this machine has."""
    try:
        from ..backend import kernels
    except BuildError:  # `numpy-llama doctor` is the place to wonder about it
        return []
    return [compiled(kernels, isa) for isa in kernels.available_isas()]


def compiled(kernels: ModuleType, isa: str) -> Implementation:
    twins = kernels.Kernels(2, exact=True)

    @contextmanager
    def chosen():
        before = kernels.isa(), kernels.WORK_FOR_THREADS
        kernels.use_isa(isa)
        kernels.WORK_FOR_THREADS = 0  # two threads even for little work
        try:
            yield
        finally:
            kernels.use_isa(before[0])
            kernels.WORK_FOR_THREADS = before[1]

    def in_c(function: Callable) -> Callable:
        def run(*arguments):
            with chosen():
                return function(*arguments)

        return run

    class Transformer:
        """model.py's, built of the kernels: each layer is one call."""

        def __init__(self, args, weights):
            from ..backend import build

            stored = {name: quantize.StoredTensor.quantize(w, "F32") for name, w in weights.items()}
            self.built = build(args, stored, threads=1, exact=True)
            self.new_cache = self.built.new_cache

        def __call__(self, *arguments):
            with chosen():
                return self.built(*arguments)

    operations = {
        "linear": in_c(twins.linear),
        "attention": in_c(twins.attention),
        "Transformer": Transformer,
        "KVCache": cache.KVCache,
    }
    if isa == "scalar":  # the conversions are the same on all
        operations |= conversions(twins)
    return Implementation(f"c-{isa}", operations, np.float32)


def conversions(twins) -> dict[str, Callable]:
    """quantize.c, under the names of quantize.py."""
    F32 = quantize.FORMATS["F32"]

    def expand(format):
        def dequantize(rows):
            n = rows.shape[1] // format.block_bytes * format.block
            return twins.convert(quantize.StoredTensor(format, (len(rows), n), rows), F32).view(np.float32)

        return dequantize

    def shrink(format):
        return lambda x: twins.convert(quantize.StoredTensor.quantize(x, F32), format)

    formats = quantize.FORMATS.values()
    return {f"dequantize_{f.name.lower()}": expand(f) for f in formats} | {
        f"quantize_{name.lower()}": shrink(quantize.FORMATS[name]) for name in ("F16", "BF16", "Q8_0", "Q4_0")
    }


def implementation_of_file(path: Path) -> Implementation:
    """A user's own: what of our names it defines. Whatever it raises on import goes through. Like a script's,
    its imports are first looked for beside it."""
    sys.path.insert(0, str(path.parent))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: getattr(module, name) for name in NAMES if callable(getattr(module, name, None))}
    return Implementation(path.name, found)


def all_implementations() -> list[Implementation]:
    return [numpy_implementation(), torch_implementation(), *compiled_implementations()]
