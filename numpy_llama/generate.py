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
        self.user: object = None  # the generation that goes on in it now

    def keep_prefix_of(self, prompt: Sequence[int]) -> int:
        """Forget what is no prefix of `prompt`, and at least its last id, whose logits are wanted next."""
        same = 0
        while same < min(len(self.ids), len(prompt) - 1) and self.ids[same] == prompt[same]:
            same += 1
        del self.ids[same:]
        return same


def forward(model: Transformer, ids: Sequence[int], context: Context) -> np.ndarray:
    """Compute `ids` behind what the context holds; -> logits (V,) of what comes after the last."""
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at here and when sampling
        h = model.hidden(np.array([ids]), len(context.ids), context.cache)
        context.ids.extend(ids)
        if not np.isfinite(h[0, -1]).all():
            raise NumericsError(f"position {len(context.ids) - 1}: the last layer's output is not finite")
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
    vocab_size: int | None = None,
) -> Generator[int, None, str]:
    """Yield new ids until one is in `stop_ids` (which is not yielded): -> "stop"; or until `max_tokens` are
    made or the context is full: -> "length". `on_prefill(done, total)` hears how far the prompt is read.
    Ids from `vocab_size` on are never chosen: rows that only pad the embedding, of which no token is told.
    """
    context.user = me = object()

    def step(ids: Sequence[int]) -> np.ndarray:
        if context.user is not me:
            raise ParameterError("the context is in use by a later generation: each at a time needs its own")
        return forward(model, ids, context)

    if not prompt:
        raise ParameterError("the prompt is empty: there is nothing to continue")
    if len(prompt) >= context.cache.max_seq_len:
        raise ContextOverflowError(
            f"the prompt has {len(prompt)} tokens, the context {context.cache.max_seq_len}: "
            "no room for an answer"
        )
    for begin in range(context.keep_prefix_of(prompt), len(prompt), PREFILL_CHUNK):
        on_prefill(begin, len(prompt))
        logits = step(prompt[begin : begin + PREFILL_CHUNK])
    on_prefill(len(prompt), len(prompt))

    rng = sampler.new_rng()
    ids = list(prompt)
    room = context.cache.max_seq_len - len(prompt)
    for made in range(room if max_tokens is None else min(room, max_tokens)):
        if made:
            logits = step(ids[-1:])
        try:
            token = sampler(logits[:vocab_size], ids, rng)
        except NumericsError as error:
            raise NumericsError(f"after {len(ids)} tokens, the last of them {ids[-1]}: {error}") from None
        if token in stop_ids:
            return "stop"
        ids.append(token)
        yield token
    return "length"
