"""What a run on several machines will take: the time of a token, by arithmetic.

    t = W / b + L (4 latency + s / rate)

W bytes of weights on a rank, b bytes a second from its memory, L layers of four gathers, in which a rank
receives s bytes. The slowest rank sets the pace. Arithmetic of the machines is left out.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..backend.formats import Format, StoredTensor
from ..checkpoint.memory import available_memory
from .cut import Cuts, Plan, widths

FLOAT32, ROUNDED = 4.0, 2 + 4 / 32  # bytes a number; rounded to 15 bits, with a scale for each 32
PAYLOAD = 1460 / 1538  # of the bytes on a cable
PROBE, LEAST_PROBE = 1 << 29, 1 << 20  # bytes: more than any cache holds, if there is memory for it


@dataclass(frozen=True)
class Network:
    """A message of few bytes arrives after `latency` seconds; `rate` bytes a second."""

    name: str
    latency: float
    rate: float


NETWORKS = (
    Network("1 GbE", 60e-6, 1e9 / 8),
    Network("2.5 GbE", 60e-6, 2.5e9 / 8),
    Network("10 GbE", 30e-6, 10e9 / 8),
    Network("25 GbE", 15e-6, 25e9 / 8),
)


def bytes_sent(format: Format, tokens: int) -> float:
    """The bytes of a number that only the next linear layer reads. Where C rounds it, it is sent rounded.

    Parts of a rank that are no whole blocks, and the input of an adapter, are sent as they are. This
    arithmetic leaves them out.
    """
    as_it_is = format.name == "F32" or (format.in_floats and tokens == 1)
    return FLOAT32 if as_it_is else ROUNDED


def received(plan: Plan, rank: int, into_linear: float = ROUNDED) -> float:
    """The bytes that a rank receives for a layer and a token. `into_linear`: see bytes_sent."""

    def others(cuts: Cuts) -> int:
        return sum(widths(cuts)) - widths(cuts)[rank]

    rounded = plan.args.head_dim * others(plan.heads) + others(plan.hidden_dim)
    return into_linear * rounded + FLOAT32 * 2 * others(plan.dim)


def read_a_token(weights: Mapping[str, StoredTensor]) -> int:
    """Bytes of the weights that a pass of one token reads: all, and one row of the embedding."""
    return sum(w.nbytes for name, w in weights.items() if name != "tok_embeddings.weight")


def decode_seconds(
    plan: Plan,
    read: Sequence[float],
    bandwidth: float,
    network: Network,
    into_linear: float = ROUNDED,
) -> float:
    """The time of one token. `read`: the bytes of each rank's weights.

    Most of the network's time is latency. So the headers on the cable, PAYLOAD, are left out: they are 2% of
    the time of a 70B on eight ranks and 1 GbE.
    """
    memory = max(read) / bandwidth
    if len(read) == 1:
        return memory
    most = max(received(plan, rank, into_linear) for rank in range(len(read)))
    return memory + plan.args.n_layers * (4 * network.latency + most / network.rate)


def prefill_limit(plan: Plan, network: Network, into_linear: float = ROUNDED) -> float:
    """The tokens a second of a prompt that the network carries, however fast the machines are."""
    most = max(received(plan, rank, into_linear) for rank in range(len(plan.heads)))
    return network.rate * PAYLOAD / (plan.args.n_layers * most) if most else float("inf")


def measured_bandwidth(threads: int, ranks: int = 1) -> float:
    """Bytes a second that this process reads from memory now. BuildError without the C kernels.

    All `ranks` of a machine measure at the same time, and take at most a quarter of what is available.
    """
    from ..backend.kernels import read_probe  # imported here: NumPy's path runs without a compiler

    nbytes = max(min(PROBE, available_memory() // (4 * ranks)), LEAST_PROBE)
    pieces, seconds = [np.ones(nbytes, np.uint8)], []
    for _ in range(3):
        began = time.perf_counter()
        read_probe(pieces, threads)
        seconds.append(time.perf_counter() - began)
    return nbytes / min(seconds)
