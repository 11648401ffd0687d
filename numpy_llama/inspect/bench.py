"""Tokens a second, beside what this machine can do at best.

    pp512            read a prompt of 512 tokens, in chunks, as `generate` reads it
    tg128            make 128 tokens, one after another
    tg32 b8          the same in 8 sequences at once
    tg128 @ d4096    the same behind 4096 positions that the cache already holds

To make a token, every weight and all keys and values so far are read once: the read bandwidth is the limit.
To read a prompt, each weight is multiplied with every token: two operations, and the peak of FMAs is the
limit of whoever computes in floats. Both limits are measured again beside every run, for on a machine that
does other work too they change from one second to the next.
"""

import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend.limits import available_cpus
from ..cache import KVCache
from ..checkpoint.memory import MemoryPlan, gib
from ..errors import BuildError, ContextOverflowError, ResourceLimitError
from ..generation.generate import PREFILL_CHUNK
from ..model import Linear, Transformer

READ_BYTES = 1 << 30  # of the weights, by one probe: more than any cache, and over before Ctrl-C is missed
PAUSE = 0.1  # seconds before a probe: threads of NumPy's BLAS still spin for a while after their last product
FMA_OPERATIONS = 384 << 22  # by one probe, on each thread: 10 to 200 ms


@dataclass(frozen=True)
class Task:
    """`length` new positions of each of `batch` sequences, behind `depth` old ones: read, or made singly."""

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
        peak = plan.peak(self.batch * positions)
        if peak > available:
            raise ResourceLimitError(
                f"{self} does not fit: {source} and its KV cache take {gib(peak)}; "
                f"{gib(available)} are available"
            )


@dataclass(frozen=True)
class Cost:
    """What a task takes, whoever does it: counted, not measured."""

    operations: int  # two for each number of a matrix and token; of the output matrix, one token a step
    nbytes: int  # of the matrices, once a step, and of the keys and values of all positions so far


def cost(model: Transformer, task: Task, kv_per_position: int) -> Cost:
    *layers, output = (math.prod(linear.weight.shape) for linear in matrices(model))
    steps, weights = task.steps, sum(stored(linear).nbytes for linear in matrices(model))
    multiplied = sum(layers) * task.length + output * len(steps)
    read = weights * len(steps) + task.batch * kv_per_position * sum(end for _, end in steps)
    return Cost(2 * task.batch * multiplied, read)


def matrices(model: Transformer) -> Iterator[Linear]:
    """What every token is multiplied with: all weights but the embedding and the norms, the output last."""
    for layer in model.layers:
        a, f = layer.attention, layer.feed_forward
        yield from (a.wq, a.wk, a.wv, a.wo, f.w_gate, f.w_up, f.w_down)
    yield model.output


def stored(linear: Linear) -> np.ndarray:
    """The weight's numbers, or bytes, as this model reads them."""
    return linear.weight if isinstance(linear.weight, np.ndarray) else linear.weight.rows


def formats(model: Transformer) -> str:
    """In which formats the matrices are, that with the most bytes first: "Q4_K+Q6_K"."""
    nbytes: Counter[str] = Counter()
    for linear in matrices(model):
        is_array = isinstance(linear.weight, np.ndarray)
        nbytes["F32" if is_array else linear.weight.format.name] += stored(linear).nbytes
    return "+".join(name for name, _ in nbytes.most_common())


@dataclass(frozen=True)
class Result:
    """One task, done once or more, and what the machine could do at that time; NaN where nobody could ask."""

    task: Task
    cost: Cost
    seconds: Sequence[float]
    read_bandwidth: float  # bytes: the median of the probes beside the runs
    fma_peak: float  # operations, in float32

    @property
    def rates(self) -> list[float]:
        """Tokens of each run."""
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
    """This machine at its best, with so many threads; default all CPUs. NaN where no kernels are built."""

    def __init__(self, threads: int | None = None):
        try:
            from ..backend import kernels  # only here: NumPy's path runs without a compiler
        except BuildError:
            self.kernels, self.isa, self.threads = None, None, threads or available_cpus()
        else:
            self.kernels, self.isa = kernels, kernels.isa()
            self.threads = threads or available_cpus()

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
    """Warm up, then do it that often, and ask the machine each time."""
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
        seconds.append(once(model, ids, cache, task, task.steps))
    kv_per_position = (cache.k.nbytes + cache.v.nbytes) // (task.batch * cache.max_seq_len)
    limits = statistics.median(read), statistics.median(fma)
    return Result(task, cost(model, task, kv_per_position), seconds, *limits)


def filled_cache(model: Transformer, task: Task, rng: np.random.Generator) -> KVCache:
    """A cache with room for the task, which holds `depth` positions. What lies there is random: to read it
    takes as long as to read what a prompt leaves there, and to compute that would take minutes."""
    args, cache = model.args, model.new_cache(task.batch, task.depth + task.length)
    kv = rng.standard_normal((task.batch, task.depth, args.n_kv_heads, args.head_dim), dtype=np.float32)
    for layer in range(args.n_layers):
        cache.update(layer, 0, kv, kv)
    return cache


def once(model: Transformer, ids: np.ndarray, cache: KVCache, task: Task, steps) -> float:
    """Seconds for these steps of the task. What the cache holds behind `depth` is forgotten."""
    began = time.perf_counter()
    for begin, end in steps:
        h = model.hidden(ids[:, begin - task.depth : end - task.depth], begin, cache)
        model.logits(h[:, -1])
    return time.perf_counter() - began


def probed(model: Transformer) -> list[np.ndarray]:
    """Enough of the model's own weights to see the memory behind the caches; all of a smaller model's."""
    pieces: list[np.ndarray] = []
    for linear in matrices(model):
        if sum(piece.nbytes for piece in pieces) < READ_BYTES:
            pieces.append(stored(linear))
    return pieces
