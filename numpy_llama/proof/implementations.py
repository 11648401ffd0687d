"""The tested implementations: NumPy, PyTorch, the C kernels on each instruction set, or a file of the user's.

An `Implementation` is a name and its operations, under the names that they have in this package. It may lack
some: a law runs on every implementation that has all the operations of the law.
"""

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from .. import backward, cache, functional, learner, model, window
from ..backend import formats
from ..config import Array, ModelArgs
from ..errors import BuildError
from ..generation import sampling, scoring
from ..parallel import cut
from ..text import bpe
from ..training import lora, objectives, optimizer
from . import continuations, cutting

if TYPE_CHECKING:
    from ..backend.kernels import Kernels

Operation = Callable[..., Any]
STORED = [f.name.lower() for f in formats.FORMATS.values()]

# The operations that have laws, by the module that defines them.
OPERATIONS = {
    bpe: ("merge",),
    functional: (
        *("embedding", "linear", "rms_norm", "softmax", "silu", "swiglu"),
        *("attention", "attention_scores", "weighted_values"),
        *("precompute_freqs_cis", "freqs_cis_at", "apply_rotary_emb"),
        *("causal_mask", "repeat_kv"),
    ),
    sampling: (
        *("greedy", "repetition_penalty", "apply_temperature", "top_k", "top_p", "min_p", "sample"),
        *("logit_bias", "presence_penalty", "frequency_penalty", "dry"),
        *("top_n_sigma", "typical_p", "xtc", "mirostat", "surprise", "log_softmax"),
    ),
    formats: (
        *(f"dequantize_{name}" for name in STORED),
        *(f"quantize_{f.name.lower()}" for f in formats.FORMATS.values() if f.quantize),
        "quantize_activations",
    ),
    cache: ("KVCache",),
    window: ("WindowKVCache",),
    model: ("Transformer",),
    backward: (
        *("linear_dx", "linear_dw", "embedding_backward", "rms_norm_backward"),
        *("apply_rotary_emb_backward", "swiglu_backward", "attention_saving", "attention_backward"),
        *("cross_entropy", "cross_entropy_backward", "head_loss", "log_probs"),
        *("block_forward", "block_backward"),
    ),
    learner: ("Learner",),
    optimizer: ("adamw",),
    lora: ("TrainedLoRA",),
    objectives: ("dpo",),
    cut: ("cut",),
    cutting: ("cut_heads", "linear_by_rows", "linear_by_columns"),
    scoring: ("log_likelihood",),
    continuations: ("best_continuations", "lookup"),
}
# `windowed_attention` is `attention` with its window.
NAMES = [*(name for names in OPERATIONS.values() for name in names), "windowed_attention"]
# Operations whose results are this number of arrays, in the precision of the arguments.
ARRAYS = dict.fromkeys({*OPERATIONS[functional], "windowed_attention", *OPERATIONS[sampling]}, 1)
for name in ("greedy", "sample", "log_softmax"):  # ids, and always float64
    del ARRAYS[name]
ARRAYS |= dict.fromkeys(("quantize_activations", *OPERATIONS[backward][:5], "log_probs"), 1)
ARRAYS |= dict.fromkeys(("linear_by_rows", "linear_by_columns"), 1)
ARRAYS |= {"cross_entropy_backward": 1, "attention_backward": 3, "dpo": 2}
ARRAYS |= dict.fromkeys(("rms_norm_backward", "swiglu_backward", "attention_saving", "cross_entropy"), 2)


class Call(NamedTuple):
    """A call: its function, copies of its arguments, its result, and the arguments that it wrote into."""

    name: str
    function: Operation
    arguments: tuple[Any, ...]
    result: Any = None
    written: tuple[int, ...] = ()


class Implementation:
    """Operations as attributes. `calls` has every call of the current example."""

    def __init__(self, name: str, operations: Mapping[str, Operation], dtype: DTypeLike = np.float64):
        """`dtype`: the finest precision that it computes in."""
        self.name, self.operations, self.dtype = name, operations, np.dtype(dtype)
        self.calls: list[Call] = []

    def __repr__(self) -> str:
        return self.name

    def __getattr__(self, name: str) -> Operation:
        if name not in self.operations:
            raise AttributeError(f"{self.name} has no {name}")
        return self.kept(name, self.operations[name])

    def kept(self, name: str, operation: Operation) -> Operation:
        """The operation, with a record of every call. Arrays are copied, because they may change later."""

        def call(*arguments: Any) -> Any:
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
    """An object of a tested class, a cache or a model, with a record of the calls of its methods."""

    def __init__(self, by: Implementation, name: str, object: Any):
        self._by, self._name, self._object = by, name, object

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._object, name)
        return self._by.kept(f"{self._name}.{name}", found) if inspect.ismethod(found) else found

    def __call__(self, *arguments: Any) -> Any:
        return self._by.kept(self._name, self._object)(*arguments)


def copied(x: Any) -> Any:
    if type(x) is tuple:
        return tuple(copied(part) for part in x)
    return x.copy() if isinstance(x, np.ndarray) else x


def is_other(x: object, was: Any) -> bool:
    """Whether the bits of an array have changed. NaN with the same bits has not."""
    return isinstance(x, np.ndarray) and x.tobytes() != was.tobytes()


def check_kind(name: str, arguments: tuple[Any, ...], result: Any) -> None:
    """Raise an error that names the operation if its result is no array, or has another precision."""
    if name not in ARRAYS:
        return
    results, n = (result,) if ARRAYS[name] == 1 else result, ARRAYS[name]
    if type(results) is not tuple or len(results) != n or not all(map(is_array, results)):
        what = "one array" if is_array(result) else f"a {type(result).__name__}"
        what = "nothing (is a return missing?)" if result is None else what
        raise AssertionError(f"{name} gave {what}, {'an array is' if n == 1 else f'{n} arrays are'} wanted")
    floats = {x.dtype for x in arguments if isinstance(x, np.ndarray) and x.dtype.kind == "f"}
    for one in results:
        if len(floats) == 1 and one.dtype.kind == "f" and one.dtype not in floats:
            raise AssertionError(f"{floats.pop()} went in, {one.dtype} came out")


def is_array(x: object) -> bool:
    return isinstance(x, np.ndarray | np.generic)


def numpy_implementation(
    name: str = "numpy", modules: Mapping[ModuleType, tuple[str, ...]] = OPERATIONS
) -> Implementation:
    """The functions of this package, which are the definition."""
    found = {one: getattr(module, one) for module, names in modules.items() for one in names}
    found["windowed_attention"] = functional.attention
    return Implementation(name, found | {"Learner": Learner})


class Learner(learner.Learner):
    """A learner of these weights."""

    def __init__(
        self,
        args: ModelArgs,
        weights: Mapping[str, Array],
        functions: learner.Functions | None = None,
        frozen: bool = False,
    ):
        super().__init__(model.Transformer(args, weights), functions, frozen)


def torch_implementation() -> Implementation:
    from . import torch_ops

    return Implementation("torch", {name: f for name, f in vars(torch_ops).items() if name in NAMES})


def compiled_implementations() -> list[Implementation]:
    """The C kernels, float32 throughout, once for each instruction set that this machine has."""
    try:
        from ..backend import kernels
    except BuildError:  # `numpy-llama doctor` reports it
        return []
    # In float32 avx_vnni has the functions of avx2.
    return [compiled(isa) for isa in kernels.available_isas() if isa != "avx_vnni"]


def compiled(isa: str) -> Implementation:
    from ..backend import kernels as module
    from ..backend.training import TrainingKernels

    kernels, training = module.Kernels(2, exact=True), TrainingKernels(2)

    @contextmanager
    def chosen() -> Iterator[None]:
        before = module.isa(), module.WORK_FOR_THREADS
        module.use_isa(isa)
        module.WORK_FOR_THREADS = 0  # two threads even for little work
        try:
            yield
        finally:
            module.use_isa(before[0])
            module.WORK_FOR_THREADS = before[1]

    def in_c(function: Operation) -> Operation:
        def run(*arguments: Any) -> Any:
            with chosen():
                return function(*arguments)

        return run

    class Transformer:
        """The model on the C backend: all layers are one call."""

        def __init__(self, args: ModelArgs, weights: Mapping[str, Array]):
            from ..backend import build

            stored = {name: formats.StoredTensor.quantize(w, "F32") for name, w in weights.items()}
            self.built = build(args, stored, threads=1, exact=True)
            self.new_cache = self.built.new_cache

        def __call__(self, *arguments: Any) -> Array:
            with chosen():
                return self.built(*arguments)

    def apply_rotary_emb_backward(dy: Array, freqs_cis: Array) -> Array:
        return training.apply_rotary_emb(dy, freqs_cis.conj())

    def TrainedLoRA(
        base: Any, lora_a: Array, lora_b: Array, scale: float, functions: learner.Functions
    ) -> lora.TrainedLoRA:
        """The part, with its update and its gradients in C."""
        in_c_too = {name: in_c(getattr(training, name)) for name in ("add_lora", "lora_backward")}
        return lora.TrainedLoRA(base, lora_a, lora_b, scale, replace(functions, **in_c_too))

    operations = {name: in_c(getattr(training, name)) for name in TRAINING_IN_C}
    operations |= {
        "apply_rotary_emb_backward": in_c(apply_rotary_emb_backward),
        "linear": in_c(kernels.linear),
        "attention": in_c(kernels.attention),
        "windowed_attention": in_c(kernels.attention),
        "Transformer": Transformer,
        "KVCache": cache.KVCache,
    }
    operations["TrainedLoRA"] = TrainedLoRA
    if isa == "scalar":  # all instruction sets share the conversions
        operations |= conversions(kernels)
    return Implementation(f"c-{isa}", operations, np.float32)


TRAINING_IN_C = (
    *("linear_dx", "linear_dw", "rms_norm_backward", "swiglu_backward"),
    *("attention_saving", "attention_backward", "head_loss", "block_forward", "block_backward", "adamw"),
)


def conversions(kernels: "Kernels") -> dict[str, Operation]:
    """The C conversions between formats, under the names of backend/formats.py."""
    F32 = formats.FORMATS["F32"]

    def expand(format: formats.Format) -> Operation:
        def dequantize(rows: Array) -> Array:
            n = rows.shape[1] // format.block_bytes * format.block
            return kernels.convert(formats.StoredTensor(format, (len(rows), n), rows), F32).view(np.float32)

        return dequantize

    def shrink(format: formats.Format) -> Operation:
        return lambda x: kernels.convert(formats.StoredTensor.quantize(x, F32), format)

    every = formats.FORMATS.values()
    return {f"dequantize_{f.name.lower()}": expand(f) for f in every} | {
        f"quantize_{name.lower()}": shrink(formats.FORMATS[name]) for name in ("F16", "BF16", "Q8_0", "Q4_0")
    }


def implementation_of_file(path: Path) -> Implementation:
    """The user's functions that have one of our names. An error of the import is not caught.

    As for a script, modules in the file's folder can be imported.
    """
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
