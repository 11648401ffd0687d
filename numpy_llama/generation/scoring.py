"""How likely a model finds given continuations: the sums of log probabilities that evaluations compare.

    ids           context | continuation
    computed      all but the last id, of which nothing is predicted
    scored        the logits after the last id of the context .. the last but one

Requests run in the order of their ids, so each shares the most with the one before it. A prefix that requests
share is computed once, and its residual stream is kept for those whose continuation begins within it.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from ..config import Array
from ..errors import ContextOverflowError, NumericsError, ParameterError
from ..model import Transformer
from ..window import PREFILL_CHUNK
from .generate import check_finite
from .sampling import log_softmax
from .session import Session

Scored = tuple[Sequence[int], Sequence[int]]  # the ids of a context, and those of its continuation


class Score(NamedTuple):
    """log p(continuation | context), and whether each of its ids is the likeliest at its place."""

    log_likelihood: float
    is_greedy: bool


def log_likelihood(logits: Array, ids: Sequence[int]) -> Score:
    """sum_i log softmax(logits_i)[id_i] in float64, and whether each id is the likeliest; (n, V), n ids."""
    highest = logits.max(axis=-1, initial=-np.inf)  # (n,)
    if not np.isfinite(highest).all():
        i = int(np.isfinite(highest).argmin())
        raise NumericsError(f"before id {ids[i]}: the largest logit is {highest[i]}, not finite")
    rows = zip(ids, map(log_softmax, logits), strict=True)
    likeliest = logits.argmax(axis=-1).tolist() if len(logits) else []
    return Score(float(sum(row[token] for token, row in rows)), likeliest == [*ids])


class Scorer:
    """Scores of continuations by a model. `computed` counts the ids that a forward pass computed."""

    def __init__(self, model: Transformer, session: Session):
        self.model, self.session, self._user = model, session, session.claim()
        self.computed = 0
        self._h: list[Array] = []  # the residual stream (D,) of each position that the session holds
        session.ids.clear()

    def score(self, requests: Sequence[Scored]) -> list[Score]:
        """The score of each request."""
        scores = dict(self.each(requests))
        return [scores[i] for i in range(len(requests))]

    def each(self, requests: Sequence[Scored]) -> Iterator[tuple[int, Score]]:
        """Yield (i, the score of request i) when it is computed, in the order of their ids."""
        all_ids = [[*context, *continuation] for context, continuation in requests]
        self._check(requests, all_ids)
        for i in sorted(range(len(requests)), key=all_ids.__getitem__):
            yield i, self._score(all_ids[i], len(requests[i][0]))

    def _check(self, requests: Sequence[Scored], all_ids: Sequence[list[int]]) -> None:
        """An error that names the first request that cannot be computed."""
        room, V = self.session.cache.max_seq_len, self.model.args.vocab_size
        for i, ((context, _), ids) in enumerate(zip(requests, all_ids, strict=True)):
            if not len(context):
                raise ParameterError(f"requests[{i}]: the context is empty, it needs an id, such as BOS")
            if wrong := [token for token in ids if not 0 <= token < V]:
                raise ParameterError(
                    f"requests[{i}]: token id {wrong[0]} lies outside the vocabulary, 0..{V - 1}"
                )
            if len(ids) - 1 > room:
                raise ContextOverflowError(
                    f"requests[{i}]: {len(ids) - 1} ids are to be computed, the session has room for {room}"
                )

    def _score(self, ids: list[int], first: int) -> Score:
        """The score of ids[first:], each predicted from all ids before it."""
        total, is_greedy = 0.0, True
        if first == len(ids):
            return Score(total, is_greedy)
        with self.session.step(self._user), np.errstate(over="ignore", invalid="ignore"):  # checked below
            self._compute(ids)
            for begin in range(first, len(ids), PREFILL_CHUNK):
                chosen = ids[begin : begin + PREFILL_CHUNK]
                rows = np.array(self._h[begin - 1 : begin - 1 + len(chosen)])
                found = log_likelihood(self.model.logits(rows), chosen)
                total, is_greedy = total + found.log_likelihood, is_greedy and found.is_greedy
        return Score(total, is_greedy)

    def _compute(self, ids: list[int]) -> None:
        """The residual stream of all but the last id, from the first one that differs from the session's."""
        del self._h[self.session.keep_prefix_of(ids, self.model) :]
        for begin in range(len(self._h), len(ids) - 1, PREFILL_CHUNK):
            new, cache = ids[begin : min(begin + PREFILL_CHUNK, len(ids) - 1)], self.session.cache
            h = self.model.hidden(np.array([new]), begin, cache)[0]
            check_finite(h, self.model, new, begin, cache)
            self._h.extend(h)
            self.session.ids.extend(new)
            self.computed += len(new)
