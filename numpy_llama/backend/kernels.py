"""The C twins of `linear` and `attention`: same names, same meaning, weights used in place.

What this file promises: every input is computed rightly, or refused with a clear error. C receives only
arguments that csrc/kernels.h allows. The extension is called here and in training.py.

    kernels = Kernels(threads=2)
    w = KernelWeight(stored)            # once
    y = kernels.linear(x, w)            # = functional.linear(x, stored.dequantize())
    out = kernels.attention(q, k, v)    # = functional.attention(q, k, v)
"""

import mmap
import os
import sys
import threading
import weakref
from collections.abc import Callable, Generator, Sequence
from functools import partial
from typing import Any

import numpy as np

from .. import system
from ..config import Array
from ..errors import (
    BuildError,
    MismatchError,
    ParameterError,
    UnsupportedError,
    check_whole,
    escape,
    is_whole,
)
from .formats import (
    CACHE_LINE,
    FORMATS,
    MAX_F16,
    QK,
    Format,
    InPlace,
    PackedTensor,
    StoredTensor,
    quantize_activations,
)
from .limits import available_cpus as available_cpus
from .limits import stack_bytes, too_many_threads, too_small_stack

# Between two steps of a layer GNU OpenMP's threads spin, by default for about 10 ms, and then sleep. A busy
# machine takes the CPU from a spinning thread first, and the next step waits for that thread. Beside two busy
# programs decoding was 7 times slower than with 3,000 turns (0.1 ms). There 20,000 turns cost no more than
# 3,000. They cover the wait for the slower of two threads: on an idle machine decoding is 7% faster than with
# 3,000. OpenMP reads the number when it is loaded; child processes do not inherit it. LLVM's OpenMP counts
# milliseconds, by default 200. Beside two busy programs decoding was 3 times slower with 200 than with 1.
STACK = stack_bytes(os.environ)  # of OpenMP's threads: also read when the library is loaded
_WAITS = {"GOMP_SPINCOUNT": "20000", "KMP_BLOCKTIME": "1"}
_ours = {name: value for name, value in _WAITS.items() if name not in os.environ}
os.environ.update(_ours)
try:
    from ._kernels import ffi, lib

    lib.nl_form_team(1, 1, 0, ffi.new("int64_t[2]"))  # LLVM's OpenMP reads its settings at its first use
except ImportError as error:
    raise BuildError(
        f"the C kernels are not built ({error}). Run `pip install .` in the project's folder, "
        "or choose the readable path: backend='numpy', on the command line --backend numpy"
    ) from None
finally:
    for _name in _ours:
        del os.environ[_name]

# A signal waits until a C call returns, so every call is short. This number of multiply-adds a thread takes
# a few milliseconds in vector code and about 100 in scalar code.
WORK_PER_CALL = 1 << 27
PANEL_ROWS = lib.NL_PANEL_ROWS  # each thread gets whole panels
# To wake a second thread takes a few microseconds: below this number of multiply-adds one thread is faster.
WORK_FOR_THREADS = 1 << 18
# Weights that `convert` unpacks and quantizes in one call, for each thread.
WEIGHTS_PER_CALL = 1 << 23
# csrc/attention.c packs keys and values once for a query block of this many rows (queries x the heads that
# share a key). ATTENTION_WORK makes its calls in vector code longer, so that they have whole blocks.
ATTENTION_ROWS, ATTENTION_WORK = lib.NL_QUERY_ROWS, 16
ACTIVATION_BITS = 8, 15  # the fast way, and the way of more accuracy
CONVERTIBLE = ("F32", "F16", "BF16", "Q8_0", "Q4_0")  # the formats that `convert` writes
MAX_HEAD_DIM = lib.NL_MAX_DH
# Bytes that the kernels need of a thread's stack; the panels of a GEMM take 120 KiB.
STACK_OF_KERNELS = 192 << 10
ATTENTION_STEP = lib.NL_ATTENTION
CACHED = {np.dtype(np.float32): "F32", np.dtype(np.float16): "F16", np.dtype(np.uint8): "Q8_0"}
F32, F16 = (FORMATS[name].code for name in ("F32", "F16"))

# A forked child has none of its parent's OpenMP threads, and a team would wait for them forever. The child
# runs the same kernels on one thread, with the same bits.
_forked = False


def _after_fork() -> None:
    global _forked
    _forked = True


system.in_forked_child(_after_fork)


class _Team(threading.local):
    """The size of the calling thread's team of OpenMP threads; each calling thread has its own team."""

    size = 0


_team = _Team()


def team(threads: int) -> int:
    """Form a team of this size for the calling thread: -> `threads`. ResourceLimitError if that fails.

    An existing team of this size is used again. Work for a single thread keeps the existing team.
    """
    if _team.size != threads and not (threads == 1 and _team.size):
        _form_team(threads)
    return threads


def _form_team(threads: int) -> None:
    free_stack = ffi.new("int64_t[2]")
    made = lib.nl_form_team(threads, max(_team.size, 1), STACK, free_stack)
    if made < threads:
        raise too_many_threads(threads, made, STACK)
    for i, owner in enumerate(("the calling thread", "OpenMP's threads")):
        if free_stack[i] < STACK_OF_KERNELS:
            raise too_small_stack(owner, free_stack[i], STACK_OF_KERNELS)
    _team.size = threads


def available_isas() -> list[str]:
    """The instruction sets that this build and this CPU both have, fastest first."""
    names: list[str] = []
    while (name := lib.nl_isa_name(len(names))) != ffi.NULL:
        names.append(_text(name))
    return names


def _text(pointer: Any) -> str:
    """A string of C."""
    return str(ffi.string(pointer).decode())


def use_isa(name: str) -> None:
    """Run the kernels with this instruction set from now on (all models of this process)."""
    if lib.nl_use_isa(name.encode()) != 0:
        raise UnsupportedError(
            f"instruction set {name!r} is not available; there are {', '.join(available_isas())}"
        )


def isa() -> str:
    """The instruction set in use."""
    return _text(lib.nl_isa())


def openmp_version() -> int:
    """The date of the OpenMP standard of this build, for example 201511; 0 without OpenMP."""
    return int(lib.nl_openmp())


def compiler() -> str:
    """The version of the compiler that built the kernels."""
    return _text(lib.nl_compiler())


def _check(status: int, *formats: Format) -> None:
    """Raise if C does not compute with one of these formats."""
    if status == lib.NL_UNKNOWN_FORMAT:
        names = " to ".join(f.name for f in formats)
        raise UnsupportedError(
            f"the C kernels cannot compute with weights in {names}; "
            "choose the readable path: backend='numpy', on the command line --backend numpy"
        )


def quantizes_activations(format: Format, T: int) -> bool:
    """Whether `linear` rounds T tokens before it multiplies them with weights of that format."""
    return bool(lib.nl_quantizes_activations(format.code, T))


def rounded_activations(x: Array, format: Format, bits: int) -> Array:
    """x (..., IN) as `linear` multiplies it with weights of that format. 32 bits: as it is."""
    IN = x.shape[-1]
    if bits == 32 or not quantizes_activations(format, x.size // max(IN, 1)):
        return x
    padded = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -IN % QK)])  # as KernelWeight pads its rows
    return quantize_activations(padded, 14 if format.in_floats else bits)[..., :IN]


def read_probe(arrays: Sequence[Array], threads: int) -> int:
    """Read every byte once, as fast as possible: -> the exclusive or of all 32-bit numbers."""
    pieces = [ffi.from_buffer(array) for array in arrays]
    sizes = [array.nbytes for array in arrays]
    return int(lib.nl_read_probe(pieces, sizes, len(pieces), team(1 if _forked else threads)))


def fma_probe(operations: int, threads: int) -> float:
    """Compute this number of operations on each thread, all in registers: -> 24.0 a thread."""
    return float(lib.nl_fma_probe(operations, team(1 if _forked else threads)))


if _wanted_isa := os.environ.get("NUMPY_LLAMA_ISA"):
    use_isa(_wanted_isa)


def watch(file_map: mmap.mmap, name: str) -> None:
    """If the mapped file is truncated, end the process with exit code 1 and one line, not by SIGBUS.

    `name` is the file's name in that line. At most 256 maps are watched at a time, each until it is closed.
    """
    # Only the address is kept: a buffer would keep the map alive.
    begin = ffi.cast("void *", int(ffi.cast("uintptr_t", ffi.from_buffer(file_map))))
    lib.nl_watch(begin, len(file_map), name.encode(errors="backslashreplace"))
    weakref.finalize(file_map, lib.nl_unwatch, begin)


class KernelWeight(InPlace):
    """A StoredTensor (OUT, IN) in the form that the kernels take: IN is a multiple of 32.

    Rows of a block format are packed (`pack_rows`), here or already in the file. Others are used in place,
    unless IN is not such a multiple: each row then gets zeros at its end. Rows and columns keep the order of
    the file; if the model's order is another one, `linear` reorders its outputs or its inputs.
    """

    def __init__(self, tensor: StoredTensor, threads: int = 1):
        if len(tensor.shape) != 2:
            raise MismatchError(f"a weight has 2 axes, this one has shape {tensor.shape}")
        made, tensor = not tensor.in_place, tensor.realize()
        self.tensor, self.shape, self.format = tensor, tensor.shape, tensor.format
        self.row_order, order = tensor.row_order, tensor.column_order
        self.columns = None if order is None else np.argsort(order)  # the model's column at each place
        pad = -tensor.shape[1] % QK
        self.width = tensor.shape[1] + pad
        if isinstance(tensor, PackedTensor):
            self.rows = tensor.packed
        else:
            rows = np.pad(tensor.data, ((0, 0), (0, self.format.row_bytes(pad)))) if pad else tensor.data
            self.rows = np.ascontiguousarray(rows)
            if packs(self.format):
                self.rows = pack(self.rows, self.format, threads)
                tensor.forget()
                if made and not pad:  # the bytes before packing are no longer needed
                    self.tensor = PackedTensor(self.format, self.shape, self.rows, self.row_order, order)
        self.pointer = ffi.from_buffer(self.rows)
        self.matrix = ffi.new("nl_matrix *", (self.pointer, self.format.code, self.shape[0], self.width))

    def __len__(self) -> int:
        return len(self.tensor)

    def __getitem__(self, index: Any) -> Array:
        """Rows in float32, as an embedding needs them."""
        return self.tensor[index]


def packs(format: Format) -> bool:
    """Whether the kernels take rows of this format packed."""
    return format.block > 1


def pack(rows: Array, format: Format, threads: int) -> Array:
    """= pack_rows(rows, format), at the rate of the memory. It begins on a cache line."""
    OUT, row_bytes = rows.shape
    IN = row_bytes // format.block_bytes * format.block
    room = np.empty(format.packed.nbytes((OUT, IN)) + CACHE_LINE, np.uint8)
    packed = room[-room.ctypes.data % CACHE_LINE :][: len(room) - CACHE_LINE]
    packed = packed.reshape(OUT + -OUT % format.packed.rows, row_bytes)
    if packed.size:
        to = ffi.from_buffer(packed, require_writable=True)
        threads = team(1 if _forked or packed.size < WORK_FOR_THREADS else threads)
        _check(lib.nl_pack(to, ffi.from_buffer(rows), format.code, OUT, IN, threads), format)
    return packed


class FusedWeights(InPlace):
    """A TransformerBlock's sizes and weights in the struct that nl_layers takes, made once."""

    def __init__(
        self,
        weights: Sequence[KernelWeight],
        norms: Sequence[Array],
        eps: float,
        head_dim: int,
        activation_bits: int,
        updates: Sequence[tuple[Array, Array] | None] = (None,) * 7,
        window: int | None = None,
    ):
        """updates: of each weight LoRA's A (r, IN) and scale * B^T (r, OUT) in float32, or None."""
        wq, wk, _, _, w_gate, _, _ = weights
        (H_Dh, D), K_Dh, F = wq.shape, len(wk), len(w_gate)
        orders = [None if w.row_order is None else w.row_order.astype(np.int64) for w in (wq, wk)]
        self.D, self.K, self.Dh, self.window = D, K_Dh // head_dim, head_dim, window
        columns = [None if w.columns is None else w.columns.astype(np.int64) for w in weights]
        self.kept = weights, norms, orders, columns, updates  # what the struct points to
        self.formats = [w.format for w in weights]
        self.struct = ffi.new("nl_layer_weights *")
        self.struct.D, self.struct.F, self.struct.Dh = D, F, head_dim
        self.struct.H, self.struct.K = H_Dh // head_dim, K_Dh // head_dim
        self.struct.eps, self.struct.activation_bits = eps, activation_bits
        self.struct.weight = [w.matrix[0] for w in weights]
        ranks = [0 if pair is None else len(pair[0]) for pair in updates]
        self.struct.rank = max(ranks)
        for i, pair in enumerate(updates):
            if pair is not None:
                a, b = (ffi.from_buffer("float[]", x) for x in pair)
                self.struct.lora[i] = {"a": a, "b": b, "r": ranks[i]}
        self.struct.attention_norm, self.struct.ffn_norm = (
            ffi.from_buffer("float[]", norm) for norm in norms
        )
        self.struct.q_order, self.struct.k_order = (
            ffi.NULL if order is None else ffi.from_buffer("int64_t[]", order) for order in orders
        )
        self.struct.columns = [
            ffi.NULL if order is None else ffi.from_buffer("int64_t[]", order) for order in columns
        ]
        # Layers of one call have these in common, because they share the scratch of the first.
        sorts = any(order is not None for order in columns)
        self.sizes = D, F, H_Dh, K_Dh, head_dim, max(ranks), sorts, window
        # Multiply-adds of a step for each token; of NL_ATTENTION for each position that a token sees.
        work = [sum(w.shape) * r + w.shape[0] * w.shape[1] for w, r in zip(weights, ranks, strict=True)]
        work_of_step = {
            lib.NL_QKV: sum(work[:3]),
            lib.NL_ATTENTION: 2 * H_Dh,
            lib.NL_WO_ADD_RESIDUAL: work[3],
            lib.NL_GATE_UP_SWIGLU: sum(work[4:6]),
            lib.NL_W_DOWN_ADD_RESIDUAL: work[6],
        }
        self.steps = [work_of_step.get(step, 0) for step in range(lib.NL_STEPS)]

    def work(self, tokens: int, visible: int) -> list[int]:
        """Multiply-adds of each step for `tokens`, which see `visible` positions in total."""
        work = [amount * tokens for amount in self.steps]
        work[ATTENTION_STEP] = self.steps[ATTENTION_STEP] * visible
        return work


Pieces = Generator[Callable[[], None], None, Array | None]  # it yields gathers, and returns y


def finished(pieces: Pieces) -> Array | None:
    """All pieces, one after another, and the gathers between them."""
    while True:
        try:
            next(pieces)()
        except StopIteration as end:
            result: Array | None = end.value
            return result


class Cut(InPlace):
    """How layers are cut for several ranks: the struct nl_cut, and the memory that the ranks exchange.

    `gather` takes that memory and the number of bytes of each rank, which lie one behind the other. It sends
    this rank's, and receives all others in place.
    """

    ENDS = lib.NL_ATTENTION, lib.NL_WO_ADD_RESIDUAL, lib.NL_GATE_UP_SWIGLU, lib.NL_W_DOWN_ADD_RESIDUAL

    def __init__(
        self,
        rank: int,
        heads: Sequence[int],
        dim: Sequence[int],
        hidden_dim: Sequence[int],
        gather: Callable[[Array, Sequence[int]], None],
    ):
        """The widths of each rank's part: of attention's output, of D and of F."""
        self.gather, self.memory, self.dim = gather, np.empty(0, np.uint8), dim
        self.kept = [ffi.new("int64_t[]", widths) for widths in (heads, dim, hidden_dim)]
        self.widths = dict(zip(self.ENDS, (heads, dim, hidden_dim, dim), strict=True))
        self.struct = ffi.new("nl_cut *", {"ranks": len(dim), "rank": rank, "widths": self.kept})

    def for_tokens(self, w: FusedWeights, tokens: int) -> Any:
        """The struct, with memory for that many tokens."""
        if len(self.memory) < (nbytes := lib.nl_exchange_bytes(w.struct, tokens)):
            self.memory = np.empty(nbytes, np.uint8)
            self.struct.exchange = ffi.from_buffer(self.memory, require_writable=True)
        return self.struct

    def calls(self, layers: int) -> list[tuple[int, int, int]]:
        """The calls of nl_layers: from one gather to the next."""
        ends = [layer * lib.NL_STEPS + end + 1 for layer in range(layers) for end in self.ENDS]
        return [(first, last, 1) for first, last in zip([0, *ends], ends, strict=False)]

    def exchange(self, w: FusedWeights, tokens: int, step: int) -> None:
        """The gather behind a step."""
        bytes_of_32 = lib.nl_part_bytes(w.struct, self.struct, tokens, step, QK)
        self.gather(self.memory, [width * bytes_of_32 // QK for width in self.widths[step]])

    def layers(self, kernels: "Kernels", *arguments: Any) -> Array | None:
        """`Kernels.layers` on all ranks."""
        pieces: Callable[..., Pieces] = kernels.pieces
        return finished(pieces(*arguments, cut=self))

    def gathered(self, y: Array) -> Array:
        """y, whose parts the ranks have gathered behind the last step."""
        at, flat = 0, self.memory.view(np.float32)
        rows = y.reshape(-1, y.shape[-1])
        for part in np.split(rows, np.cumsum(self.dim)[:-1], axis=1):
            part[:] = flat[at : at + part.size].reshape(part.shape)
            at += part.size
        return y


class Kernels(InPlace):
    """The C functions, bound to a number of threads. The number never changes a result.

    `exact` multiplies weights and activations in float32. Otherwise activations are quantized to 8 bits, or
    to 15 (csrc/linear.c): linear(x rounded, w). The tables of NF4 and FP4 are rounded to bytes. With F16,
    BF16 and FP8 weights and more than eight tokens, both are rounded to 14 bits, and with fewer tokens
    nothing is. With F32 weights nothing is rounded.
    """

    def __init__(
        self, threads: int | None = None, exact: bool = False, activation_bits: int = ACTIVATION_BITS[0]
    ):
        if threads is None:
            threads = available_cpus()
        check_whole("threads", threads, 1, 1024)
        if not is_whole(activation_bits) or activation_bits not in ACTIVATION_BITS:
            found, wanted = escape(activation_bits, 60), " or ".join(map(str, ACTIVATION_BITS))
            raise ParameterError(f"activation_bits is {found}, it must be {wanted}")
        self.threads, self.exact = int(threads), exact
        self.activation_bits = 32 if exact else int(activation_bits)
        self._share(WORK_FOR_THREADS)  # an impossible number fails before any weight is loaded
        self._scratch: list[Any] = []  # of `layers`: one for each call that ran at the same time

    def _share(self, work: int) -> int:
        """The number of threads for `work` multiply-adds."""
        return team(1 if _forked or work < WORK_FOR_THREADS else self.threads)

    def linear(self, x: Array, w: KernelWeight | StoredTensor | Array) -> Array:
        """y = x W^T: (..., IN) float32, (OUT, IN) as stored -> (..., OUT) float32."""
        if not isinstance(w, KernelWeight):
            w = KernelWeight(w if isinstance(w, StoredTensor) else StoredTensor.quantize(w, "F32"))
        if x.shape[-1] != w.shape[1]:
            raise MismatchError(f"x has {x.shape[-1]} columns, the weight {w.shape[1]}")
        if w.columns is not None:
            x = x.take(w.columns, axis=-1)
        if w.width != w.shape[1]:
            x = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, w.width - w.shape[1])])
        x = np.ascontiguousarray(x, np.float32)
        OUT = w.shape[0]
        y = np.empty((*x.shape[:-1], OUT), np.float32)
        if y.size == 0:
            return y
        if w.width == 0:
            y[...] = 0
            return y
        T = x.size // w.width
        threads = self._share(T * OUT * w.width)
        multiply = lib.nl_linear_exact if self.exact else lib.nl_linear
        operand = ffi.from_buffer("float[]", x)
        if not self.exact and quantizes_activations(w.format, T):
            multiply, operand = lib.nl_linear_quantized, self._quantize_activations(operand, w, T, threads)
        y_pointer = ffi.from_buffer("float[]", y, require_writable=True)
        rows = max(WORK_PER_CALL // (T * w.width * PANEL_ROWS), 1) * PANEL_ROWS * threads
        for begin in range(0, OUT, rows):
            end = min(begin + rows, OUT)
            _check(multiply(y_pointer, operand, T, w.matrix, begin, end, threads), w.format)
        return y if w.row_order is None else y.take(w.row_order, axis=-1)  # contiguous, for RoPE

    def _quantize_activations(self, x: Any, w: KernelWeight, T: int, threads: int) -> Any:
        """x quantized, in the layout that the loops over this weight's format read."""
        buffer = np.empty(lib.nl_activations_bytes(T, w.width), np.uint8)
        activations = ffi.from_buffer(buffer, require_writable=True)
        code, bits = w.format.code, self.activation_bits
        _check(lib.nl_quantize_activations(activations, x, code, bits, T, w.width, threads), w.format)
        return activations

    def attention(self, q: Array, k: Array, v: Array, window: int | None = None) -> Array:
        """softmax(q k^T / sqrt(Dh) + causal mask) v: q (B, T, H, Dh); k, v (B, S, K, Dh) -> (B, T, H, Dh)."""
        return self._attend(q, k, v, window)[0]

    def _attend(self, q: Array, k: Array, v: Array, window: int | None = None) -> tuple[Array, Array]:
        """`attention`, and the log of the sum of each softmax: -> (B, T, H, Dh), (B, H, T)."""
        B, T, H, Dh = q.shape
        S, K = k.shape[1:3]
        if k.shape != (B, S, K, Dh) or v.shape != k.shape or T > S or K == 0 or H % K:
            raise MismatchError(f"q {q.shape}, k {k.shape} and v {v.shape} do not fit each other")
        if window is not None:
            check_whole("window", window, 1, sys.maxsize)
        if Dh > MAX_HEAD_DIM:
            raise UnsupportedError(f"head_dim is {Dh}, the C kernel goes up to {MAX_HEAD_DIM}")
        if k.dtype != v.dtype:
            k, v = k.astype(np.float32), v.astype(np.float32)
        q = np.ascontiguousarray(q, np.float32)
        k, v = _dense_heads(k), _dense_heads(v)
        out, lse = np.empty_like(q), np.empty((B, H, T), np.float32)
        if out.size == 0:
            return out, lse
        seen = S if window is None else min(S, window + T)  # at most, by one of the queries or another
        threads = self._share(2 * B * T * seen * H * Dh)
        # A struct of cffi keeps addresses only. The local names of the arrays keep them alive.
        arguments = ffi.new(
            "nl_attention_args *",
            {
                "out": ffi.from_buffer("float[]", out, require_writable=True),
                "q": ffi.from_buffer("float[]", q),
                "k": ffi.cast("void *", k.ctypes.data),
                "v": ffi.cast("void *", v.ctypes.data),
                "format": F16 if k.dtype == np.float16 else F32,
                **{"B": B, "T": T, "S": S, "H": H, "K": K, "Dh": Dh},
                "k_strides": [stride // k.itemsize for stride in k.strides[:3]],
                "v_strides": [stride // v.itemsize for stride in v.strides[:3]],
                "lse": ffi.from_buffer("float[]", lse, require_writable=True),
                "window": window or 0,
            },
        )
        work = WORK_PER_CALL * (1 if isa() == "scalar" else ATTENTION_WORK)
        queries, block = max(work // (B * seen * H * Dh), 1) * threads, max(ATTENTION_ROWS * K // H, 1)
        queries = max(queries // block * block, min(queries, block))
        for begin in range(0, T, queries):
            arguments.begin, arguments.end = begin, min(begin + queries, T)
            if lib.nl_attention(arguments, threads) != 0:
                raise MemoryError("no memory for the scratch of the attention kernel")
        return out, lse

    def layers(
        self,
        weights: Sequence[FusedWeights],
        x: Array,
        starts: Sequence[int],
        freqs_cis: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
        dropped: Sequence[int] = (),
    ) -> Array | None:
        """TransformerBlocks, one after another: x (B, T, D) -> (B, T, D). They have the same sizes.

        The T positions of sequence b begin at starts[b]. keys, values: the cache of each sequence, with space
        for T more positions. It begins behind dropped[b] positions, by default none, which no token sees. It
        is (layers, K, max_seq_len, Dh) float32 or float16, or (layers, K, max_seq_len, bytes of a head) in
        Q8_0. The result is None if float16 cannot hold a new key or value, or its scale.
        """
        return finished(self.pieces(weights, x, starts, freqs_cis, keys, values, dropped))

    def pieces(
        self,
        weights: Sequence[FusedWeights],
        x: Array,
        starts: Sequence[int],
        freqs_cis: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
        dropped: Sequence[int] = (),
        cut: Cut | None = None,
    ) -> Pieces:
        """`layers`, piece by piece. With a cut these weights and caches are those of one rank.

        All ranks call this together. Between two pieces they make the gather that is yielded.
        """
        x, freqs_cis = np.ascontiguousarray(x, np.float32), np.ascontiguousarray(freqs_cis, np.complex64)
        y, (B, T, _), w = np.empty_like(x), x.shape, weights[0]
        format = FORMATS[CACHED[keys[0].dtype]]
        if freqs_cis.shape not in ((T, w.Dh // 2), (B, T, w.Dh // 2)) or x.shape[2] != w.D:
            raise MismatchError(f"x {x.shape} and freqs_cis {freqs_cis.shape} do not fit the layer")
        dropped = dropped or [0] * B
        if not len(starts) == len(keys) == len(values) == len(dropped) == B:
            raise MismatchError(
                f"{B} sequences, {len(starts)} starts, {len(keys)} keys, {len(values)} values"
            )
        if any(other.sizes != w.sizes for other in weights):
            raise MismatchError("the layers of one call must have the same sizes")
        wanted = len(weights), w.K, format.row_bytes(w.Dh)
        for one in (*keys, *values):
            if (*one.shape[:2], one.shape[3] * one.itemsize) != wanted or one.dtype != keys[0].dtype:
                raise MismatchError(
                    f"a cache of shape {one.shape} and {one.dtype} does not fit {len(weights)} layers "
                    f"with n_kv_heads {w.K} and head_dim {w.Dh}"
                )
        seen = sum(start if w.window is None else min(start, w.window) for start in starts)
        work = w.work(B * T, T * (seen + B * T)) * len(weights)
        threads = self._share(sum(work))
        try:
            scratch = self._scratch.pop()
        except IndexError:  # none is left: the first call, or others run
            scratch = b""
        in_ranks = ffi.NULL if cut is None else cut.for_tokens(w, B * T)
        if len(scratch) < (nbytes := lib.nl_layers_bytes(w.struct, in_ranks, B * T)):
            scratch = ffi.new("char[]", nbytes)
        # A struct of cffi keeps addresses only. The local names keep the arrays alive until C returns, and
        # the caller keeps the caches alive.
        structs = ffi.new("nl_layer_weights *[]", [one.struct for one in weights])
        key_pointers = ffi.new("void *[]", [ffi.from_buffer(k[0]) for k in keys])
        value_pointers = ffi.new("void *[]", [ffi.from_buffer(v[0]) for v in values])
        layer_strides = ffi.new("int64_t[]", [_numbers(k.strides[0], format) for k in keys])
        head_strides = ffi.new("int64_t[]", [_numbers(k.strides[1], format) for k in keys])
        start_positions, dropped_positions = ffi.new("int64_t[]", starts), ffi.new("int64_t[]", dropped)
        arguments = ffi.new("nl_layers_args *")
        arguments.y = ffi.from_buffer("float[]", y, require_writable=True)
        arguments.x = ffi.from_buffer("float[]", x)
        arguments.weights, arguments.scratch = structs, scratch
        arguments.B, arguments.T, arguments.cut = B, T, in_ranks
        arguments.freqs_cis = ffi.from_buffer("float[]", freqs_cis)
        arguments.freqs_cis_stride = 0 if freqs_cis.ndim == 2 else 2 * freqs_cis[0].size
        cache = arguments.cache
        cache.keys, cache.values = key_pointers, value_pointers
        cache.format = format.code
        cache.position_stride, cache.head_stride = _numbers(keys[0].strides[2], format), head_strides
        cache.layer_stride, cache.start = layer_strides, start_positions
        cache.dropped, cache.window = dropped_positions, w.window or 0
        calls = _short_calls(work, WORK_PER_CALL * threads) if cut is None else cut.calls(len(weights))
        for first, last, parts in calls:
            for part in range(parts):
                status = lib.nl_layers(arguments, first, last, part, parts, threads)
                if status == lib.NL_F16_OVERFLOW:
                    return None
                if status == lib.NL_NO_MEMORY:
                    raise MemoryError("no memory for the scratch of the attention kernel")
                if status != 0:
                    _check(status, *(format for one in weights for format in one.formats))
            if cut is not None:
                layer, step = divmod(last - 1, lib.NL_STEPS)
                yield partial(cut.exchange, weights[layer], B * T, step)
        self._scratch.append(scratch)
        return y if cut is None else cut.gathered(y)

    def convert(
        self, tensor: StoredTensor, format: Format, begin_row: int = 0, end_row: int | None = None
    ) -> Array:
        """Rows of a tensor in another format: -> (rows, bytes a row) uint8, in the model's order of rows.

        = StoredTensor.quantize(tensor[begin_row:end_row], format).data. Call `realize` before, for a tensor
        that is not in place: each call would compute all of its bytes.
        """
        if format.name not in CONVERTIBLE:
            raise UnsupportedError(f"cannot convert to {format.name}, only to {', '.join(CONVERTIBLE)}")
        IN = tensor.shape[-1]
        if len(tensor.shape) != 2 or IN % format.block:
            raise MismatchError(f"a tensor of shape {tensor.shape} cannot be stored in {format.name}")
        rows = range(len(tensor))[begin_row:end_row]
        if tensor.column_order is not None:
            tensor = StoredTensor.quantize(tensor[rows.start : rows.stop], "F32")
            return self.convert(tensor, format)
        src = np.ascontiguousarray(tensor.stored_rows(slice(rows.start, rows.stop)))
        dst = np.empty((len(rows), format.row_bytes(IN)), np.uint8)
        if dst.size == 0:
            return dst
        threads = self._share(dst.size)
        step = max(WEIGHTS_PER_CALL // IN, 1) * threads
        for begin in range(0, len(rows), step):
            part = slice(begin, begin + step)
            bad = lib.nl_convert(
                ffi.from_buffer(dst[part], require_writable=True),
                format.code,
                ffi.from_buffer(src[part]),
                tensor.format.code,
                len(dst[part]),
                IN,
                threads,
            )
            _check(bad, tensor.format, format)
            if bad:
                raise ParameterError(
                    f"row {rows[begin] + bad - 1}: NaN or a weight beyond {MAX_F16} "
                    f"cannot be stored in {format.name}"
                )
        return dst


def _short_calls(work: list[int], limit: int) -> list[tuple[int, int, int]]:
    """Steps with these multiply-adds as calls (first, last, parts), each of up to `limit` if it can be.

    Neighbouring steps share a call. A step beyond the limit is a call for each of its parts.
    """
    if sum(work) <= limit:
        return [(0, len(work), 1)]
    calls, begin, together = [], 0, 0
    for step, amount in enumerate(work):
        if step % lib.NL_STEPS == ATTENTION_STEP and isa() != "scalar":
            amount //= ATTENTION_WORK
        if together + amount > limit and begin < step:
            calls.append((begin, step, 1))
            begin, together = step, 0
        together += amount
        if amount > limit:
            calls.append((step, step + 1, -(-amount // limit)))
            begin, together = step + 1, 0
    return [*calls, (begin, len(work), 1)] if begin < len(work) else calls


def _numbers(nbytes: int, format: Format) -> int:
    """How many numbers take this many bytes."""
    return nbytes // format.block_bytes * format.block


def _dense_heads(x: Array) -> Array:
    """x in float32 or float16, in the machine's byte order, with the Dh numbers of a head side by side.

    A view of a cache is returned unchanged.
    """
    if x.dtype not in (np.float32, np.float16) or not x.dtype.isnative:
        x = x.astype(np.float32)
    dense = x.strides[-1] == x.itemsize or x.shape[-1] == 1
    aligned_strides = all(stride % x.itemsize == 0 for stride in x.strides)
    return x if dense and aligned_strides else np.ascontiguousarray(x)
