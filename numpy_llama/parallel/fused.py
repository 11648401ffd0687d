"""Cut blocks in C: from one gather to the next each is one call, with the numbers of CutBlock.

csrc/layer.c computes the pieces. What wo and w_down round anyway travels rounded, which halves its bytes.
"""

from functools import partial
from typing import Any

from ..backend.fused import FusedBlock, fuse
from ..backend.kernels import Cut, FusedWeights, Kernels
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

    def __init__(self, plan: Plan, ranks: Ranks):
        heads = [n * plan.args.head_dim for n in widths(plan.heads)]
        self.ranks = ranks
        super().__init__(ranks.rank, heads, widths(plan.dim), widths(plan.hidden_dim), ranks.gather_in_place)

    def exchange(self, w: FusedWeights, tokens: int, step: int) -> None:
        if tokens > 1 and step == self.ENDS[0]:  # a token by itself is soon done
            self.ranks.stop_if_asked()
        super().exchange(w, tokens, step)


def fused(part: Transformer, kernels: Kernels, plan: Plan, ranks: Ranks) -> Transformer:
    """The same part of a model with its blocks in C, where the kernels take their sizes."""
    return fuse(part, kernels, partial(FusedCutBlock, cut=RanksCut(plan, ranks)))
