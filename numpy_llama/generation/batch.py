"""Several sequences in one forward pass: each weight is read once for all of them.

Decoding one sequence reads every weight for one token, so it waits for the memory. With B sequences a step
reads the same bytes and makes B tokens. Prompts are computed one after another, because a prompt uses each
weight for many tokens already. What all of them begin with is computed and stored once.

    tokens      (B, 1)                     one new id of each sequence
    start_pos   (B,)                       the position of each
    linear      (B, 1, IN)                 all sequences in one call
    attention   q (1, 1, H, Dh)            one call for each sequence, on its own keys and values in place:
                k, v (1, S_b, K, Dh)       nothing is padded, masked or copied

The model is unchanged. It gets another cache and, through `with_parts`, another `attention`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import takewhile

import numpy as np

from ..cache import KVCache
from ..config import Array
from ..errors import NumpyLlamaError
from ..model import Attention, Function, Transformer, TransformerBlock
from ..window import PREFILL_CHUNK
from .generate import Request, check_finite, forward, prefill
from .session import Session

LEAST_SHARED = 32  # ids: a pass for a few takes as long as it saves
OWN = 9  # ids at the end of a prompt: fewer in one pass would have other bits


class BatchCache:
    """The caches of B sequences of different lengths, with the interface of one cache."""

    def __init__(self, caches: Sequence[KVCache]):
        self.caches = caches

    def update(self, layer: int, start_pos: Array, xk: Array, xv: Array) -> Iterator[tuple[Array, ...]]:
        """Store the new keys and values (B, T, K, Dh). -> B keys and B values, each (1, S_b, K, Dh)."""
        rows = zip(self.caches, start_pos.tolist(), xk[:, None], xv[:, None], strict=True)
        return zip(*(cache.update(layer, start, k, v) for cache, start, k, v in rows), strict=True)


def one_by_one(attention: Function) -> Function:
    """`attention` for sequences of different lengths: q (B, T, H, Dh), B keys and values (1, S_b, K, Dh)."""

    def each(q: Array, keys: Sequence[Array], values: Sequence[Array]) -> Array:
        return np.concatenate([attention(*one) for one in zip(q[:, None], keys, values, strict=True)])

    return each


def side_by_side(model: Transformer, cache: BatchCache) -> Transformer:
    """The same model for a `BatchCache`: each sequence attends to its own keys and values."""
    return model.with_parts(
        {
            f"layers.{i}.attention.attention": one_by_one(layer.attention.attention)
            for i, layer in enumerate(model.layers)
            if not takes_batches(layer, cache)
        }
    )


def takes_batches(layer: Callable[..., Array], cache: BatchCache) -> bool:
    """Whether a layer reads a `BatchCache` without `one_by_one`, as a fused block does."""
    fuses: Callable[[BatchCache], bool] | None = getattr(layer, "fuses", None)
    return fuses is not None and fuses(cache)


def hidden_states(model: Transformer, tokens: Array, start_pos: Array, cache: BatchCache) -> np.ndarray:
    """`model.hidden` of one new id of each sequence: (B, 1) ids -> (B, 1, D).

    An exchanged layer or attention may read only a KVCache. Then the sequences run one after another.
    """
    if all(
        takes_batches(layer, cache)
        or (isinstance(layer, TransformerBlock) and isinstance(layer.attention, Attention))
        for layer in model.layers
    ):
        # A Function, because the signatures of model.py are those of one KVCache and one start_pos.
        hidden: Function = side_by_side(model, cache).hidden
        return hidden(tokens, start_pos, cache)
    rows = zip(tokens[:, None], start_pos.tolist(), cache.caches, strict=True)
    return np.concatenate([model.hidden(*row) for row in rows])


def advance(model: Transformer, sessions: Sequence[Session], tokens: Sequence[int]) -> np.ndarray:
    """Compute one new id of each session; -> the residual stream (B, D). The ids of a session stay."""
    start_pos = np.array([len(session.ids) for session in sessions])
    cache = BatchCache([session.cache for session in sessions])
    return hidden_states(model, np.array(tokens)[:, None], start_pos, cache)[:, -1]


def forward_batch(model: Transformer, running: Mapping[int, Request]) -> np.ndarray:
    """Compute the last id of each request; -> logits (B, V) of the next tokens."""
    with (
        ExitStack() as steps,
        np.errstate(over="ignore", invalid="ignore"),  # checked here, and again when sampling
    ):
        sessions = [steps.enter_context(request.step()) for request in running.values()]
        tokens = [request.ids[-1] for request in running.values()]
        h = advance(model, sessions, tokens)
        for i, session, token, row in zip(running, sessions, tokens, h, strict=True):
            with naming(i):
                check_finite(row, model, [token], len(session.ids), session.cache)
            session.ids.append(token)
        return model.logits(h)


def shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """The number of ids that all prompts begin with, but OWN of each; 0 where they are too few to share."""
    if len(prompts) < 2:
        return 0
    alike = takewhile(lambda ids: len({*ids}) == 1, zip(*prompts, strict=False))
    n = min(sum(1 for _ in alike), min(map(len, prompts)) - OWN)
    return n if n >= LEAST_SHARED else 0


def sessions_for(model: Transformer, prompts: Sequence[Sequence[int]], rooms: Sequence[int]) -> list[Session]:
    """A session for each prompt. Each holds what all begin with, which is computed and stored once."""
    n = shared_prefix(prompts)
    if not n:
        return [Session(model, room) for room in rooms]
    first = Session(model, max(rooms))
    for begin in range(0, n, PREFILL_CHUNK):
        forward(model, prompts[0][begin : min(begin + PREFILL_CHUNK, n)], first)
    return [first, *(first.branch() for _ in prompts[1:])]


def generate_batch(model: Transformer, sequences: Sequence[Request]) -> Iterator[tuple[int, int]]:
    """Yield (i, a new id of sequence i) until all have ended. `stop` of a request ends it earlier.

    Each sequence has its own cache, attention and random numbers. So it gets the ids of `generate` if
    `linear` gives a row the same bits alone and among others.
    """
    logits: Sequence[np.ndarray] | np.ndarray = []
    for i, request in enumerate(sequences):
        with naming(i):
            logits = [*logits, prefill(model, request)]
    running = {i: request for i, request in enumerate(sequences)}
    while running:
        for (i, request), row in zip(running.items(), logits, strict=True):
            with naming(i):
                token = request.choose(row)
            if token is not None:
                yield i, token
        if running := {i: request for i, request in running.items() if request.left}:
            logits = forward_batch(model, running)


@contextmanager
def naming(i: int) -> Iterator[None]:
    """Name prompt i in the message of any error that is raised here."""
    try:
        yield
    except NumpyLlamaError as error:
        raise type(error)(f"prompts[{i}]: {error}") from None
