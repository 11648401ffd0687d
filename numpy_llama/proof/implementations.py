"""Who is on trial: NumPy, PyTorch, the C kernels on each instruction set, or a file of the user's.

An `Implementation` is a name and its operations, under the names that they have in this package. It need not
have all of them: a law is tried where all its operations are.
"""

import importlib.util
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import numpy as np

from .. import cache, functional, model, quantize, sampling
from ..errors import BuildError

STORED = [f.name.lower() for f in quantize.FORMATS.values()]

# The operations that there are laws about, by the module that defines them.
OPERATIONS = {
    functional: (
        *("embedding", "linear", "rms_norm", "softmax", "silu", "swiglu", "attention"),
        *("precompute_freqs_cis", "scale_freqs", "freqs_cis_at", "apply_rotary_emb"),
        *("causal_mask", "repeat_kv"),
    ),
    sampling: ("greedy", "repetition_penalty", "apply_temperature", "top_k", "top_p", "min_p", "draw"),
    quantize: (
        *(f"dequantize_{name}" for name in STORED),
        *(f"quantize_{f.name.lower()}" for f in quantize.FORMATS.values() if f.quantize),
        "fixed_point",
    ),
    cache: ("KVCache",),
    model: ("Transformer",),
}
NAMES = [name for names in OPERATIONS.values() for name in names]


class Implementation:
    """Operations as attributes. Every call of a function is kept in `calls`, until the next example."""

    def __init__(self, name: str, operations: Mapping[str, Callable], dtype=np.float64):
        """`dtype`: the finest precision that it computes in."""
        self.name, self.operations, self.dtype = name, operations, np.dtype(dtype)
        self.calls: list[tuple[str, tuple, object]] = []

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, name: str) -> Callable:
        if name not in self.operations:
            raise AttributeError(f"{self.name} has no {name}")
        operation = self.operations[name]
        if isinstance(operation, type):
            return operation

        def kept(*arguments):
            self.calls.append((name, arguments, None))
            result = operation(*arguments)
            self.calls[-1] = name, arguments, result
            return result

        return kept


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
        from .. import kernels
    except BuildError:  # `numpy-llama doctor` is the place to wonder about it
        return []
    return [compiled(kernels, isa) for isa in kernels.available_isas()]


def compiled(kernels: ModuleType, isa: str) -> Implementation:
    twins = kernels.Kernels(2, exact=True)

    @contextmanager
    def chosen():
        before = kernels.isa()
        kernels.use_isa(isa)
        try:
            yield
        finally:
            kernels.use_isa(before)

    def in_c(function: Callable) -> Callable:
        def run(*arguments):
            with chosen():
                return function(*arguments)

        return run

    class Transformer:
        """model.py's, built of the kernels: each layer is one call."""

        def __init__(self, args, weights):
            from ..checkpoint import build

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
    """A user's own: what of our names it defines. Whatever it raises on import goes through."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = {name: getattr(module, name) for name in NAMES if callable(getattr(module, name, None))}
    return Implementation(path.name, found)


def all_implementations() -> list[Implementation]:
    return [numpy_implementation(), torch_implementation(), *compiled_implementations()]
