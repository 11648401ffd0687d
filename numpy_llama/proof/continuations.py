"""The operations of beams and drafts, as chapter 22 of the course asks for them."""

from collections.abc import Sequence

from ..config import Array
from ..generation.beam import Beam, extend
from ..generation.speculative import Lookup


def best_continuations(scores: Array, log_p: Array, k: int) -> list[tuple[int, int, float]]:
    """The k best of all beams with one more id, as (beam, id, score); scores (B,), log_p (B, V)."""
    beams = [Beam([], float(score)) for score in scores]
    return [(beam.parent, beam.ids[-1], beam.score) for beam in extend(beams, log_p, k)]


def lookup(ids: Sequence[int], k: int) -> Sequence[int]:
    """At most k ids that followed the last three ids, or else the last two, at their newest other place."""
    return Lookup().propose(ids, k)
