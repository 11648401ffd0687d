"""Tokens a second, compared with the limits of this machine.

    pp512            prefill of 512 tokens, in the chunks of `generate`
    tg128            decode of 128 tokens, one after another
    tg32 b8          decode of 32 tokens in each of 8 sequences at once
    tg128 @ d4096    decode of 128 tokens after 4096 positions in the cache

A decode pass reads every weight, and all keys and values so far, once. Its limit is the read bandwidth.
Prefill multiplies every weight with every token, two operations each. The limit of a float32 kernel is the
peak of FMAs. Both limits are measured again before each run, because other programs on the machine change
them.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend.limits import available_cpus
from ..cache import KVCache
from ..checkpoint.memory import MemoryPlan, gib
from ..errors import BuildError, ContextOverflowError, ResourceLimitError
from ..model import Linear, Transformer
from ..window import PREFILL_CHUNK

READ_BYTES = 1 << 30  # of the weights for one probe: more than any cache holds, but soon done
PAUSE = 0.1  # seconds before a probe: threads of NumPy's BLAS still spin for a while after their last product
FMA_OPERATIONS = 384 << 22  # on each thread, for one probe: 10 to 200 ms


@dataclass(frozen=True)
class Task:
    """`length` new positions in each of `batch` sequences, after `depth` old ones: prefill or decode."""

    kind: str  # "pp" or "tg"
    length: int
    depth: int = 0
    batch: int = 1

    def __str__(self) -> str:
        batch = f" b{self.batch}" if self.batch > 1 else ""
        return f"{self.kind}{self.length}{batch}" + (f" @ d{self.depth}" if self.depth else "")

    @property
    def steps(self) -> list[tuple[int, int]]:
        """The positions of each forward pass: (begin, end)."""
        step, end = PREFILL_CHUNK if self.kind == "pp" else 1, self.depth + self.length
        return [(begin, min(begin + step, end)) for begin in range(self.depth, end, step)]

    def check(self, plan: MemoryPlan, available: int, source: object) -> None:
        """An error with the numbers, if neither the model's context nor memory has room for this."""
        positions = self.depth + self.length
        if positions > plan.max_seq_len:
            raise ContextOverflowError(
                f"{self} takes {positions} positions, the context of {source} has {plan.max_seq_len}"
            )
        peak = plan.peak(positions, self.batch)
        if peak > available:
            raise ResourceLimitError(
                f"{self} does not fit: {source} and its KV cache take {gib(peak)}; "
                f"{gib(available)} are available"
            )


@dataclass(frozen=True)
class Cost:
    """The work of a task, counted and not measured."""

    operations: int  # two for each weight and token; the output matrix takes one token a step
    nbytes: int  # the matrices, once a step, and the keys and values of all positions that are seen


def cost(model: Transformer, task: Task, kv_per_position: int) -> Cost:
    *layers, output = (math.prod(linear.weight.shape) for linear in matrices(model))
    steps, window = task.steps, model.args.sliding_window or model.args.max_seq_len
    weights = sum(stored(linear).nbytes for linear in matrices(model))
    multiplied = sum(layers) * task.length + output * len(steps)
    read = weights * len(steps) + task.batch * kv_per_position * sum(
        min(end, window + end - begin) for begin, end in steps
    )
    return Cost(2 * task.batch * multiplied, read)


def matrices(model: Transformer) -> Iterator[Linear]:
    """Every matrix that tokens are multiplied with, the output last. The embedding is not multiplied."""
    for layer in model.layers:
        a, f = layer.attention, layer.feed_forward
        yield from (a.wq, a.wk, a.wv, a.wo, f.w_gate, f.w_up, f.w_down)
    yield model.output


def stored(linear: Linear) -> np.ndarray:
    """The array that the model reads: float numbers, or the bytes as stored."""
    return linear.weight if isinstance(linear.weight, np.ndarray) else linear.weight.rows


def formats(model: Transformer) -> str:
    """The formats of the matrices, the one with the most bytes first: "Q4_K+Q6_K"."""
    nbytes: Counter[str] = Counter()
    for linear in matrices(model):
        is_array = isinstance(linear.weight, np.ndarray)
        nbytes["F32" if is_array else linear.weight.format.name] += stored(linear).nbytes
    return "+".join(name for name, _ in nbytes.most_common())


@dataclass(frozen=True)
class Result:
    """The runs of a task, and the limits of the machine at that time. A limit without a probe is NaN."""

    task: Task
    cost: Cost
    seconds: Sequence[float]
    read_bandwidth: float  # bytes a second: the median of the probes before the runs
    fma_peak: float  # operations a second, in float32

    @property
    def rates(self) -> list[float]:
        """Tokens a second of each run."""
        return [self.task.batch * self.task.length / seconds for seconds in self.seconds]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.rates)

    @property
    def sd(self) -> float:
        return statistics.stdev(self.rates) if len(self.rates) > 1 else 0.0

    @property
    def operations(self) -> float:
        return self.cost.operations * self._runs_a_second

    @property
    def nbytes(self) -> float:
        return self.cost.nbytes * self._runs_a_second

    @property
    def _runs_a_second(self) -> float:
        return self.mean / (self.task.batch * self.task.length)


class Machine:
    """The limits of this machine with `threads` threads (default: all CPUs). NaN without the C extension."""

    def __init__(self, threads: int | None = None):
        try:
            from ..backend import kernels  # only here: NumPy's path runs without a compiler
        except BuildError:
            self.kernels, self.isa, self.threads = None, None, threads or available_cpus()
        else:
            self.kernels, self.isa = kernels, kernels.isa()
            self.threads = kernels.Kernels(threads).threads  # an impossible number is its ParameterError

    def read_bandwidth(self, pieces: Sequence[np.ndarray]) -> float:
        """Bytes a second."""
        if self.kernels is None:
            return math.nan
        began = time.perf_counter()
        self.kernels.read_probe(pieces, self.threads)
        return sum(piece.nbytes for piece in pieces) / (time.perf_counter() - began)

    def fma_peak(self) -> float:
        """Operations a second, in float32."""
        if self.kernels is None:
            return math.nan
        began = time.perf_counter()
        self.kernels.fma_probe(FMA_OPERATIONS, self.threads)
        return self.threads * FMA_OPERATIONS / (time.perf_counter() - began)


def measure(
    model: Transformer,
    task: Task,
    machine: Machine,
    repetitions: int = 5,
    on_run: Callable[[int, int], None] = lambda done, total: None,
) -> Result:
    """Warm up, then run the task `repetitions` times. The limits are measured before each run."""
    rng = np.random.default_rng(0)
    ids = rng.integers(0, model.args.vocab_size, (task.batch, task.length))
    cache, pieces = filled_cache(model, task, rng), probed(model)
    once(model, ids, cache, task, task.steps[:1])
    machine.read_bandwidth(pieces), machine.fma_peak()
    seconds, read, fma = [], [], []
    for done in range(repetitions):
        on_run(done, repetitions)
        time.sleep(PAUSE)
        read.append(machine.read_bandwidth(pieces))
        fma.append(machine.fma_peak())
        if task.depth < getattr(cache, "least_start", 0):  # the last run has dropped what this one sees
            cache = filled_cache(model, task, rng)
        seconds.append(once(model, ids, cache, task, task.steps))
    kv_per_position = (cache.k.nbytes + cache.v.nbytes) // (task.batch * cache.k.shape[3])
    limits = statistics.median(read), statistics.median(fma)
    return Result(task, cost(model, task, kv_per_position), seconds, *limits)


def filled_cache(model: Transformer, task: Task, rng: np.random.Generator) -> KVCache:
    """A cache with room for the task, which holds `depth` positions of random numbers.

    Reading them takes as long as reading a prompt's keys and values. Computing those would take minutes.
    """
    args, cache = model.args, model.new_cache(task.batch, task.depth + task.length)
    kv = rng.standard_normal((task.batch, task.depth, args.n_kv_heads, args.head_dim), dtype=np.float32)
    for layer in range(args.n_layers):
        cache.update(layer, 0, kv, kv)
    return cache


def once(
    model: Transformer, ids: np.ndarray, cache: KVCache, task: Task, steps: Iterable[tuple[int, int]]
) -> float:
    """Seconds for these steps of the task. Positions of the cache after `depth` are overwritten."""
    began = time.perf_counter()
    for begin, end in steps:
        h = model.hidden(ids[:, begin - task.depth : end - task.depth], begin, cache)
        model.logits(h[:, -1])
    return time.perf_counter() - began


def probed(model: Transformer) -> list[np.ndarray]:
    """Weights of READ_BYTES or a little more, so that memory is measured and not a cache.

    A smaller model gives all its weights.
    """
    pieces: list[np.ndarray] = []
    for linear in matrices(model):
        if sum(piece.nbytes for piece in pieces) < READ_BYTES:
            pieces.append(stored(linear))
    return pieces
