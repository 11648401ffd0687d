"""Perplexity, how well a model predicts a text: the exponential of the mean negative log-likelihood a token.

The definition is llama.cpp's, so that the numbers compare. The text is cut into windows of `ctx` tokens
without overlap. Each window is computed from its own beginning, and only its second half is scored. So every
scored token is predicted from more than ctx / 2 tokens. If a model begins texts with BOS, BOS replaces the
first token of every window. Tokens after the last whole window are left out.

    window       x_0 or BOS ... x_ctx/2  |  x_ctx/2+1 ... x_ctx-1: scored, 255 of 512
    nll_i        -log softmax(logits after x_0 ... x_i-1)[x_i]
    perplexity   exp(mean nll)
    its error    perplexity * sd(nll) / sqrt(n - 1): one standard error, as if tokens were independent
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..cache import KVCache
from ..errors import NumericsError, ParameterError
from ..model import Transformer
from ..window import PREFILL_CHUNK

LEAST_CTX = 8  # a shorter window would score too few tokens


@dataclass(frozen=True)
class Perplexity:
    """The estimate after some windows."""

    windows: int
    tokens: int  # scored
    nll: float  # their mean
    perplexity: float
    standard_error: float


def windows(ids: Sequence[int], ctx: int, bos_id: int | None = None) -> list[list[int]]:
    """The whole windows of a text. Each begins with `bos_id`, if one is given."""
    if ctx < LEAST_CTX:
        raise ParameterError(f"ctx is {ctx}, a window has at least {LEAST_CTX} tokens")
    if len(ids) < ctx:
        raise ParameterError(f"the text has {len(ids)} tokens, a window takes {ctx}")
    begin = [] if bos_id is None else [bos_id]
    return [[*begin, *ids[start + len(begin) : start + ctx]] for start in range(0, len(ids) - ctx + 1, ctx)]


def nll(model: Transformer, ids: Sequence[int], first: int, cache: KVCache | None = None) -> np.ndarray:
    """-log p of each of ids[first:], predicted from all ids before it: -> (len(ids) - first,) float64.

    `cache` is overwritten; the default is a new one.
    """
    if not 0 < first < len(ids):
        raise ParameterError(f"first is {first}, it must lie in 1..{len(ids) - 1}")
    cache = cache or model.new_cache(max_seq_len=len(ids))
    parts = []
    for start in range(0, len(ids) - 1, PREFILL_CHUNK):
        end = min(start + PREFILL_CHUNK, len(ids) - 1)  # nothing is predicted after the last id
        with np.errstate(over="ignore", invalid="ignore"):  # `losses` checks the logits
            h = model.hidden(np.array([ids[start:end]]), start, cache)
            begin = max(start, first - 1)
            if begin < end:
                parts.append(losses(model.logits(h[0, begin - start :]), ids[begin + 1 : end + 1]))
    return np.concatenate(parts)


def losses(logits: np.ndarray, ids: Sequence[int]) -> np.ndarray:
    """log sum exp - logits[id], row by row: (n, V), n ids -> (n,) float64. The sum is kept in float64."""
    highest = logits.max(axis=-1, keepdims=True)
    if not np.isfinite(highest).all():
        found = highest[~np.isfinite(highest)][0]
        raise NumericsError(f"the largest logit is {found}, it must be a finite number")
    shifted = logits - highest
    chosen = shifted[np.arange(len(ids)), ids]
    return np.log(np.exp(shifted, out=shifted).sum(axis=-1, dtype=np.float64)) - chosen


def perplexity(
    model: Transformer, ids: Sequence[int], ctx: int = 512, bos_id: int | None = None, most: int | None = None
) -> Iterator[Perplexity]:
    """The estimate after each window, up to `most` windows. `bos_id`: if the model begins texts with BOS."""
    n, total, squares = 0, 0.0, 0.0
    cuts, cache = windows(ids, ctx, bos_id)[:most], model.new_cache(max_seq_len=ctx)
    for i, window in enumerate(cuts):
        scored = nll(model, window, ctx // 2 + 1, cache)
        n, total, squares = n + len(scored), total + scored.sum(), squares + (scored**2).sum()
        mean = total / n
        value = math.exp(mean) if mean < 700 else math.inf
        variance = max(squares / n - mean**2, 0)
        yield Perplexity(i + 1, n, mean, value, value * math.sqrt(variance / (n - 1)))
