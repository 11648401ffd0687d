"""From ids to ids: read the prompt, then choose one token at a time. Knows nothing of text."""

from collections.abc import Callable, Collection, Generator, Sequence

import numpy as np

from .errors import ContextOverflowError, NumericsError, ParameterError
from .model import Transformer
from .sampling import Sampler

PREFILL_CHUNK = 192  # tokens a forward pass: large enough for full speed, small enough to report progress


class Context:
    """A KV cache and the ids whose keys and values it holds: what one conversation owns.

    A prompt that begins with those ids is only computed from where it differs.
    """

    def __init__(self, model: Transformer, max_seq_len: int | None = None):
        self.cache = model.new_cache(batch=1, max_seq_len=max_seq_len)
        self.ids: list[int] = []

    def keep_prefix_of(self, prompt: Sequence[int]) -> int:
        """Forget what is no prefix of `prompt`, and at least its last id, whose logits are wanted next."""
        same = 0
        while same < min(len(self.ids), len(prompt) - 1) and self.ids[same] == prompt[same]:
            same += 1
        del self.ids[same:]
        return same


def forward(model: Transformer, ids: Sequence[int], context: Context) -> np.ndarray:
    """Compute `ids` behind what the context holds; -> logits (V,) of what comes after the last."""
    h = model.hidden(np.array([ids]), len(context.ids), context.cache)
    context.ids.extend(ids)
    return model.logits(h[0, -1])


def generate(
    model: Transformer,
    prompt: Sequence[int],
    context: Context,
    sampler: Sampler,
    *,
    max_tokens: int | None = None,
    stop_ids: Collection[int] = (),
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
) -> Generator[int, None, str]:
    """Yield new ids until one is in `stop_ids` (which is not yielded): -> "stop"; or until `max_tokens` are
    made or the context is full: -> "length". `on_prefill(done, total)` hears how far the prompt is read.
    """
    if not prompt:
        raise ParameterError("the prompt is empty: there is nothing to continue")
    if len(prompt) >= context.cache.max_seq_len:
        raise ContextOverflowError(
            f"the prompt has {len(prompt)} tokens, the context {context.cache.max_seq_len}: "
            "no room for an answer"
        )
    for begin in range(context.keep_prefix_of(prompt), len(prompt), PREFILL_CHUNK):
        on_prefill(begin, len(prompt))
        logits = forward(model, prompt[begin : begin + PREFILL_CHUNK], context)
    on_prefill(len(prompt), len(prompt))

    rng = sampler.new_rng()
    ids = list(prompt)
    room = context.cache.max_seq_len - len(prompt)
    for made in range(room if max_tokens is None else min(room, max_tokens)):
        if made:
            logits = forward(model, ids[-1:], context)
        try:
            token = sampler(logits, ids, rng)
        except NumericsError as error:
            raise NumericsError(f"after {len(ids)} tokens, the last of them {ids[-1]}: {error}") from None
        if token in stop_ids:
            return "stop"
        ids.append(token)
        yield token
    return "length"
