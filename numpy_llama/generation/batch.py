"""Several sequences side by side: every weight that is fetched serves all of them.

One sequence alone uses each weight once a token, so that decoding waits for the memory. With B sequences a
step fetches the same bytes and makes B tokens. Prompts are read one after another: there each weight serves
many tokens already.

    tokens      (B, 1)                     one new id of each sequence
    start_pos   (B,)                       each at a position of its own
    linear      (B, 1, IN)                 all of them at once
    attention   q (1, 1, H, Dh)            each by itself, on its own keys and values where they lie:
                k, v (1, S_b, K, Dh)       nothing is padded, masked or copied

The model is unchanged: it is given another cache and, through `with_parts`, another `attention`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

import numpy as np

from ..cache import KVCache
from ..errors import NumpyLlamaError
from ..model import Attention, Function, Transformer, TransformerBlock
from .generate import Request, check_finite, prefill


class BatchCache:
    """The caches of B sequences, each of its own length, where the model expects one cache."""

    def __init__(self, caches: Sequence[KVCache]):
        self.caches = caches

    def update(self, layer, start_pos, xk, xv):
        """Store each sequence's new keys and values (B, T, K, Dh); return B times (1, S_b, K, Dh) of both."""
        rows = zip(self.caches, start_pos.tolist(), xk[:, None], xv[:, None], strict=True)
        return zip(*(cache.update(layer, start, k, v) for cache, start, k, v in rows), strict=True)


def one_by_one(attention: Function) -> Function:
    """`attention` for sequences of different lengths: q (B, T, H, Dh); B times k and v, (1, S_b, K, Dh)."""

    def each(q, keys, values):
        return np.concatenate([attention(*one) for one in zip(q[:, None], keys, values, strict=True)])

    return each


def side_by_side(model: Transformer, cache: BatchCache) -> Transformer:
    """The same model for the sequences of a `BatchCache`: each attends to its own keys and values."""
    return model.with_parts(
        {
            f"layers.{i}.attention.attention": one_by_one(layer.attention.attention)
            for i, layer in enumerate(model.layers)
            if not takes_batches(layer, cache)
        }
    )


def takes_batches(layer: Callable, cache: BatchCache) -> bool:
    """Whether a layer reads such a cache by itself, as a fused block does."""
    fuses: Callable[[BatchCache], bool] | None = getattr(layer, "fuses", None)
    return fuses is not None and fuses(cache)


def hidden_states(model: Transformer, tokens, start_pos, cache: BatchCache) -> np.ndarray:
    """`model.hidden` of one new id of each sequence: (B, 1) ids -> (B, 1, D).

    A foreign layer or attention may read a KVCache only: then one sequence runs after another.
    """
    if all(
        takes_batches(layer, cache)
        or (isinstance(layer, TransformerBlock) and isinstance(layer.attention, Attention))
        for layer in model.layers
    ):
        hidden: Function = side_by_side(model, cache).hidden
        return hidden(tokens, start_pos, cache)
    rows = zip(tokens[:, None], start_pos.tolist(), cache.caches, strict=True)
    return np.concatenate([model.hidden(*row) for row in rows])


def forward_batch(model: Transformer, going: Mapping[int, Request]) -> np.ndarray:
    """The last id of each behind what its session holds; -> logits (B, V) of what comes next."""
    with (
        ExitStack() as steps,
        np.errstate(over="ignore", invalid="ignore"),
    ):  # looked at here and when sampling
        sessions = [steps.enter_context(one.step()) for one in going.values()]
        tokens = np.array([one.ids[-1:] for one in going.values()])  # (B, 1)
        start_pos = np.array([len(session.ids) for session in sessions])
        cache = BatchCache([session.cache for session in sessions])
        h = hidden_states(model, tokens, start_pos, cache)[:, -1]
        for i, session, token, row in zip(going, sessions, tokens.tolist(), h, strict=True):
            with naming(i):
                check_finite(row, model, token, len(session.ids), session.cache)
            session.ids.extend(token)
        return model.logits(h)


def generate_batch(model: Transformer, sequences: Sequence[Request]) -> Iterator[tuple[int, int]]:
    """Yield (i, a new id of sequence i), until all have ended; `stop` of a sequence ends it earlier.

    Each gets the ids that `generate` gives it alone, where `linear` gives a row the same bits alone and among
    others: all else is its own, cache, attention and chances.
    """
    logits: Sequence[np.ndarray] | np.ndarray = []
    for i, one in enumerate(sequences):
        with naming(i):
            logits = [*logits, prefill(model, one)]
    going = {i: one for i, one in enumerate(sequences)}
    while going:
        for (i, one), row in zip(going.items(), logits, strict=True):
            with naming(i):
                token = one.choose(row)
            if token is not None:
                yield i, token
        if going := {i: one for i, one in going.items() if one.left}:
            logits = forward_batch(model, going)


@contextmanager
def naming(i: int) -> Iterator[None]:
    """What goes wrong in here is said of prompt i."""
    try:
        yield
    except NumpyLlamaError as error:
        raise type(error)(f"prompts[{i}]: {error}") from None
