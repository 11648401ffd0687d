"""Beam search (Lowerre 1976): it looks for the likeliest text, where greedy takes the likeliest id each time.

    step n      total (B, V) = the score of each running beam + log p(id | prompt, its ids)
    candidates  the best K of total, K = B * (1 + number of end ids): B of them have no end id
    finished    the first B candidates where they end, score / n^length_penalty; the best B of all steps stay
    running     the first B candidates that do not end

B is `beams`, and n counts the end id. The rules are those of transformers 5, and so are the results. The
sampler's penalties change log p, so that the sum of p over all ids is no longer 1.

All running beams advance in one pass, as a batch. The prompt is computed once, and its keys and values are
stored once. A beam goes on in the session of its parent; a second child of the parent gets a branch of it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

import numpy as np

from ..config import Array
from ..errors import ParameterError, check_whole, escape
from ..model import Transformer
from .batch import advance
from .generate import Request, check_finite
from .sampling import log_softmax
from .session import Session

MAX_BEAMS = 1024
MAX_PENALTY = 10  # n^10 is finite for every n


class Beam(NamedTuple):
    """A continuation: its new ids, with the end id, and its score. `parent` is a beam of the step before."""

    ids: list[int]
    score: float
    parent: int = 0


@dataclass(frozen=True)
class BeamSearch:
    """The search for the ids with the largest score, sum log p / n^length_penalty (Wu et al. 2016, 7).

    A length_penalty above 0 favors long texts, below 0 short ones. The search ends when `beams` texts are
    finished and, unless early_stopping is True, no running beam is better than the worst of them. A running
    beam is compared at its present length. With "never" it is compared at the length that gives it the best
    score: the longest possible one if length_penalty is above 0.
    """

    beams: int = 4
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1

    def __post_init__(self) -> None:
        check_whole("beams", self.beams, 1, MAX_BEAMS)
        check_whole("num_return_sequences", self.num_return_sequences, 1, self.beams)
        p, early = self.length_penalty, self.early_stopping
        if isinstance(p, bool) or not isinstance(p, Real) or not -MAX_PENALTY <= p <= MAX_PENALTY:
            wanted = f"a number from {-MAX_PENALTY} to {MAX_PENALTY}"
            raise ParameterError(f"length_penalty is {escape(p, 60)}, it must be {wanted}")
        object.__setattr__(self, "length_penalty", float(p))
        if not isinstance(early, bool) and not (isinstance(early, str) and early == "never"):
            raise ParameterError(f'early_stopping is {escape(early, 60)}, it must be True, False or "never"')

    def __call__(
        self,
        model: Transformer,
        request: Request,
        logits: Array,
        stopped: Callable[[list[int]], bool] = lambda ids: False,
    ) -> list[Beam]:
        """The best continuations, best first. `logits` (V,) follow the prompt.

        A beam ends with an end id, at the limit of `request`, and where `stopped(ids)` is true.
        """
        B, K, most = self.beams, self.beams * (1 + len(set(request.stop_ids))), request.left

        def ends(beam: Beam) -> bool:
            return len(beam.ids) == most or beam.ids[-1] in request.stop_ids or stopped(beam.ids)

        with request.step() as session:
            sessions, running, finished = [session], [Beam([], 0.0)], list[Beam]()
            logits = logits[None]  # (1, V)
            for n in range(1, most + 1):
                candidates = extend(running, log_probabilities(request, running, logits), K)
                over = [beam for beam in candidates[:B] if ends(beam)]
                finished += [beam._replace(score=beam.score / n**self.length_penalty) for beam in over]
                finished = sorted(finished, key=lambda beam: -beam.score)[:B]
                running = [beam for beam in candidates if not ends(beam)][:B]
                if not running or self.is_over(running[0].score, finished, n, most):
                    break
                sessions = follow(sessions, [beam.parent for beam in running])
                logits = forward_beams(model, running, sessions)  # (B, V)
        return (finished or running)[: self.num_return_sequences]

    def is_over(self, best: float, finished: Sequence[Beam], n: int, most: int) -> bool:
        """Whether no running beam needs to go on, after n ids. `best` is the highest of their scores."""
        if len(finished) < self.beams:
            return False
        length = most if self.early_stopping == "never" and self.length_penalty > 0 else n
        return self.early_stopping is True or best / length**self.length_penalty <= finished[-1].score


def check_no_chance(temperature: float, seed: int | None) -> None:
    """ParameterError unless these options of a sampler take the likeliest."""
    for name, found, wanted in (("temperature", temperature, 0), ("seed", seed, None)):
        if found != wanted:
            raise ParameterError(
                f"{name} is {found}, a beam search wants {wanted}, because nothing in it is random: "
                f"leave {name} out, or sample without beams"
            )


def log_probabilities(request: Request, running: Sequence[Beam], logits: Array) -> Array:
    """log p of each next id after each beam, (B, V) -> (B, vocab_size), with the sampler's penalties."""
    with np.errstate(invalid="ignore"):  # the sampler refuses NaN
        rows = [
            request.sampler.penalized(log_softmax(row)[: request.vocab_size], request.ids + beam.ids)
            for beam, row in zip(running, logits, strict=True)
        ]
    return np.stack(rows)


def extend(running: Sequence[Beam], log_p: Array, K: int) -> list[Beam]:
    """The best K of all beams with one more id, best first; among equals the first beam, the lowest id."""
    total = np.array([[beam.score] for beam in running]) + log_p  # (B, V)
    flat, V = total.ravel(), total.shape[1]
    floor = np.partition(total[0], -K)[-K] if K <= V else -np.inf  # one beam alone has K that are as good
    likely = np.flatnonzero((flat >= floor) & (flat > -np.inf))
    best = likely[np.argsort(-flat[likely], kind="stable")][:K].tolist()
    return [Beam([*running[i // V].ids, i % V], float(flat[i]), i // V) for i in best]


def follow(sessions: Sequence[Session], parents: Sequence[int]) -> list[Session]:
    """The session of each parent; a branch of it where an earlier child has taken it."""
    return [sessions[p].branch() if p in parents[:i] else sessions[p] for i, p in enumerate(parents)]


def forward_beams(model: Transformer, running: Sequence[Beam], sessions: Sequence[Session]) -> Array:
    """Compute the last id of each beam; -> logits (B, V) of the next ids."""
    tokens = [beam.ids[-1] for beam in running]
    with np.errstate(over="ignore", invalid="ignore"):  # checked here, and by the sampler
        h = advance(model, sessions, tokens)
        for row, token, session in zip(h, tokens, sessions, strict=True):
            check_finite(row, model, [token], len(session.ids), session.cache)
            session.ids.append(token)
        return model.logits(h)
