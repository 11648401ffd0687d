"""Speculative decoding: a drafter proposes the next ids, and one pass computes the logits after all of them.

    the text      . . . A B C      all but the last id C are in the KV cache
    the draft               D E F
    one pass              C D E F  every weight is read once for four tokens
    chosen                D E X    from the logits after C, D and E; X differs from the draft

`Request.choose` gets the logits that it would get without a draft, and uses the same random numbers. So the
text is the same for any sampler and seed. D is accepted with its probability p(D): min(1, p/q) of Leviathan
et al. (2023) and Chen et al. (2023) for a draft that is a single id, q = 1. Nothing is undone after X: the
session has no drafted id that was not chosen, and the next pass stores over the keys and values of F.

The kernels give a token the same bits alone and among up to MOST_TOKENS. NumPy's products do not: there a
text may differ where two ids are nearly as likely.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view

from ..config import Array, ModelArgs
from ..errors import MismatchError, NumericsError, escape
from ..model import Transformer
from ..text.tokenizer import Tokenizer
from .generate import Request, forward, generate
from .sampling import Sampler
from .session import Session

MOST_TOKENS = 8  # in a pass: NL_GEMV_TOKENS of csrc/kernels.h
EXTRA = 0.2  # the time of one more token in a pass, in passes of one token: measured with two to eight
START, STEP, DRIFT = 0.5, 1 / 8, 1 / 400  # of the estimated acceptance
NGRAMS = 3, 2  # ids that a lookup compares
PADDED = 128  # ids by which two sizes of the same vocabulary may differ


class Drafter(ABC):
    """A source of drafts. A bad draft costs time, and never changes the text."""

    cost = 0.0  # the time of one drafted id, in passes of the model

    @abstractmethod
    def propose(self, ids: Sequence[int], k: int) -> Sequence[int]:
        """At most k ids that may follow `ids`."""


class Lookup(Drafter):
    """What followed the last three ids, or else the last two, at their newest other place (Saxena 2023)."""

    def propose(self, ids: Sequence[int], k: int) -> Sequence[int]:
        text = np.array(ids)
        for n in NGRAMS:
            if n < len(ids):
                places = (sliding_window_view(text[:-1], n) == text[-n:]).all(axis=1).nonzero()[0]
                if places.size:
                    begin = int(places[-1]) + n
                    return ids[begin : begin + k]
        return []


class DraftModel(Drafter):
    """The likeliest ids by a smaller model. Its session computes only what is new in the text."""

    def __init__(self, model: Transformer, session: Session, cost: float, **limits: Any):
        """`limits`: stop_ids and vocab_size of a `Request`."""
        self.model, self.session, self.cost, self.limits = model, session, cost, limits

    def propose(self, ids: Sequence[int], k: int) -> Sequence[int]:
        if len(ids) >= self.session.cache.max_seq_len or max(ids) >= self.model.args.vocab_size:
            return []  # an id may be new in the larger of two vocabularies
        try:
            return [*generate(self.model, ids, self.session, Sampler(), max_tokens=k, **self.limits)]
        except NumericsError as error:
            raise NumericsError(f"the draft model: {error}") from None


@dataclass
class Drafts:
    """Counts of one generation. The first id comes from the prompt, and is in none of them."""

    passes: int = 0  # with and without a draft
    drafted: int = 0  # ids
    accepted: int = 0  # of the drafted ids


class Speculation:
    """`decode` with drafts, for one generation: the logits after the last id, from a pass of several ids."""

    def __init__(self, drafter: Drafter):
        self.drafter, self.drafts = drafter, Drafts()
        self.ahead: Iterator[tuple[int, Array]] = iter(())  # ids of the draft, and the logits after each
        self.acceptance = START  # the share of drafted ids that are accepted: a moving mean

    def __call__(self, model: Transformer, request: Request) -> np.ndarray:
        token = request.ids[-1]
        with request.step() as session:
            if (ahead := next(self.ahead, None)) is not None:
                drafted, logits = ahead
                self.acceptance += STEP * ((drafted == token) - self.acceptance)
                if drafted == token:
                    self.drafts.accepted += 1
                    session.ids.append(token)  # the cache has its keys and values
                    return logits
            return self._pass(model, token, self._draft(request), session)

    def _draft(self, request: Request) -> list[int]:
        k = best_length(self.acceptance, self.drafter.cost, min(MOST_TOKENS, request.left) - 1)
        if k == 0:
            self.acceptance += DRIFT  # until a draft is tried again
            return []
        return [*self.drafter.propose(request.ids, k)][:k]

    def _pass(self, model: Transformer, token: int, draft: list[int], session: Session) -> np.ndarray:
        """Compute the last id and a draft; -> logits (V,) after the last id."""
        self.ahead = iter(())
        self.drafts.passes += 1
        if draft:
            self.drafts.drafted += len(draft)
            try:
                logits = forward_all(model, [token, *draft], session)
            except NumericsError:
                pass  # perhaps only the draft's: without it an error is that of the text
            else:
                self.ahead = zip(draft, logits[1:], strict=True)
                return logits[0]
        return forward(model, [token], session)


def forward_all(model: Transformer, ids: Sequence[int], session: Session) -> np.ndarray:
    """Compute the next id and a draft; -> logits (T, V) after each. The session gets the first id only."""
    with np.errstate(over="ignore", invalid="ignore"):
        h = model.hidden(np.array([ids]), len(session.ids), session.cache)[0]
        if not np.isfinite(h).all():
            raise NumericsError("a layer's output is not finite")
        session.ids.append(ids[0])
        return model.logits(h)


def best_length(acceptance: float, cost: float, most: int) -> int:
    """The k <= `most` with the most ids in a unit of time: (1 + a + ... + a^k) / (1 + k (EXTRA + cost))."""
    k = np.arange(most + 1)
    return int(((acceptance**k).cumsum() / (1 + k * (EXTRA + cost))).argmax())


def relative_cost(draft: ModelArgs, args: ModelArgs) -> float:
    """The time of a pass of the draft model in passes of the model, by the numbers of their weights."""
    one, other = (
        a.dim * (a.n_layers * (2 * a.head_dim * (a.n_heads + a.n_kv_heads) + 3 * a.hidden_dim) + a.vocab_size)
        for a in (draft, args)
    )
    return one / other


def check_same_vocabulary(draft: Tokenizer, tokenizer: Tokenizer) -> int:
    """The number of ids that both have. MismatchError if one is other text, or one has many more ids."""
    ids = min(draft.n_used, tokenizer.n_used)
    for i in range(ids):
        if draft.meanings[i] != tokenizer.meanings[i]:
            raise MismatchError(
                f"id {i} is {escape(draft.meanings[i], 60)} in the draft model's vocabulary, and "
                f"{escape(tokenizer.meanings[i], 60)} in the model's: a draft model needs the same vocabulary"
            )
    if max(draft.n_used, tokenizer.n_used) - ids > PADDED:
        raise MismatchError(
            f"the draft model's vocabulary has {draft.n_used} ids, the model's {tokenizer.n_used}: a draft "
            "model needs the same vocabulary"
        )
    return ids
