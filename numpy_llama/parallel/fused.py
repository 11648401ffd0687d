"""Cut blocks in C: from one gather to the next each is one call, with the numbers of CutBlock.

csrc/layer.c computes the pieces. What wo and w_down round anyway travels rounded, which halves its bytes.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np

from ..backend.fused import FusedBlock, fuse
from ..backend.kernels import Cut, FusedWeights, Kernels, Pieces
from ..config import Array
from ..model import Transformer
from .cut import Plan, widths
from .model import CutBlock
from .ranks import Ranks


class FusedCutBlock(FusedBlock, CutBlock):
    """A CutBlock that calls csrc/layer.c."""

    def __init__(self, block: CutBlock, kernels: Kernels, weights: FusedWeights, cut: Cut):
        super().__init__(block, kernels, weights)
        self.cut = cut

    def fuses(self, cache: Any) -> bool:
        """As CutBlock."""
        return True


class RanksCut(Cut):
    """A Cut whose gathers are those of the ranks."""

    def __init__(self, plan: Plan, ranks: Ranks, gather: Callable[[Array, Sequence[int]], None]):
        heads = [n * plan.args.head_dim for n in widths(plan.heads)]
        super().__init__(ranks.rank, heads, widths(plan.dim), widths(plan.hidden_dim), gather)
        self.ranks = ranks

    def exchange(self, w: FusedWeights, tokens: int, step: int) -> None:
        if tokens > 1 and step == self.ENDS[0]:  # a token by itself is soon done
            self.ranks.stop_if_asked()
        super().exchange(w, tokens, step)

    def layers(self, *arguments: Any) -> Array | None:
        self.ranks.check_inside()
        return super().layers(*arguments)


class OverlappingCut(RanksCut):
    """A RanksCut that computes a prompt in two halves. While one half is sent, the other is computed.

    The halves are as two chunks of a prompt, so they have the same bits: each has more tokens than a GEMV.
    """

    LEAST = 64  # tokens: with fewer, the latency counts, which two halves have twice

    def __init__(self, plan: Plan, ranks: Ranks):
        super().__init__(plan, ranks, ranks.gather_at_once)
        self.halves = [RanksCut(plan, ranks, ranks.gather_napping) for _ in range(2)]

    def layers(
        self,
        kernels: Kernels,
        weights: Sequence[FusedWeights],
        x: Array,
        starts: Sequence[int],
        angles: Array,
        keys: Sequence[Array],
        values: Sequence[Array],
        dropped: Sequence[int] = (),
    ) -> Array | None:
        T = x.shape[1]
        if T < self.LEAST:
            return super().layers(kernels, weights, x, starts, angles, keys, values, dropped)
        self.ranks.check_inside()
        half, later = T // 2, [start + T // 2 for start in starts]
        first = x[:, :half], starts, angles[..., :half, :]
        second = x[:, half:], later, angles[..., half:, :]
        found = overlapped(
            [
                kernels.pieces(weights, *part, keys, values, dropped, cut)
                for part, cut in zip((first, second), self.halves, strict=True)
            ]
        )
        made = [y for y in found if y is not None]
        return np.concatenate(made, axis=1) if len(made) == len(found) else None


def overlapped(halves: Sequence[Pieces]) -> list[Array | None]:
    """The halves by turns: a piece of one is computed while another thread makes the gather of the other."""
    found = list[Array | None]()
    with ThreadPoolExecutor(1) as sender:  # all ranks make their gathers in the same order
        sent = [sender.submit(next(pieces)) for pieces in halves]
        while not found:
            for i, pieces in enumerate(halves):
                sent[i].result()
                try:
                    sent[i] = sender.submit(next(pieces))
                except StopIteration as end:
                    found.append(end.value)
                    if end.value is None:  # the other ranks make another gather now
                        return found
    return found


def fused(part: Transformer, kernels: Kernels, plan: Plan, ranks: Ranks) -> Transformer:
    """The same part of a model with its blocks in C, where the kernels take their sizes."""
    return fuse(part, kernels, partial(FusedCutBlock, cut=cut_for(plan, ranks)))


def cut_for(plan: Plan, ranks: Ranks) -> Cut:
    """On one machine a gather is a copy, and nothing is gained by sending while computing."""
    if ranks.local == ranks.size:
        return RanksCut(plan, ranks, ranks.gather_in_place)
    return OverlappingCut(plan, ranks)
