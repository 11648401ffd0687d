"""From ids to ids: read the prompt, then choose one token at a time. Knows nothing of text."""

from collections.abc import Callable, Collection, Generator, Sequence

import numpy as np

from .errors import ContextOverflowError, NumericsError, ParameterError
from .model import Transformer
from .sampling import Sampler

PREFILL_CHUNK = 512  # tokens a forward pass: large enough for full speed, small enough to report progress


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


class Continuation:
    """A prompt and what follows it: logits in, the next id out. `reason` tells what ends it, or ended it.

    It ends at an id in `stop_ids` (which is not returned): "stop"; or when `max_tokens` are made or the
    context is full: "length". Ids from `vocab_size` on are never chosen: rows that only pad the embedding, of
    which no token is told.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        context: Context,
        sampler: Sampler,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        vocab_size: int | None = None,
    ):
        if not prompt:
            raise ParameterError("the prompt is empty: there is nothing to continue")
        room = context.cache.max_seq_len
        if len(prompt) >= room:
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens, the context {room}: no room for an answer"
            )
        self.ids, self.left = list(prompt), room - len(prompt)
        if max_tokens is not None:
            self.left = min(self.left, max_tokens)  # ids that may yet be made
        self.sampler, self.rng = sampler, sampler.new_rng()
        self.stop_ids, self.vocab_size, self.reason = stop_ids, vocab_size, "length"
        context.user, self._context = self, context

    @property
    def context(self) -> Context:
        if self._context.user is not self:
            raise ParameterError("the context is in use by a later generation: each at a time needs its own")
        return self._context

    def choose(self, logits: np.ndarray) -> int | None:
        """The id that comes next; None where it ends."""
        if not self.left:
            return None
        try:
            token = self.sampler(logits[: self.vocab_size], self.ids, self.rng)
        except NumericsError as error:
            made = f"after {len(self.ids)} tokens, the last of them {self.ids[-1]}"
            raise NumericsError(f"{made}: {error}") from None
        if token in self.stop_ids:
            self.stop()
            return None
        self.ids.append(token)
        self.left -= 1
        return token

    def stop(self) -> None:
        self.left, self.reason = 0, "stop"


def prefill(
    model: Transformer,
    continuation: Continuation,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Read the prompt, as far as its context does not hold it yet; -> logits (V,) of what comes next."""
    prompt = continuation.ids
    for begin in range(continuation.context.keep_prefix_of(prompt), len(prompt), PREFILL_CHUNK):
        on_prefill(begin, len(prompt))
        logits = forward(model, prompt[begin : begin + PREFILL_CHUNK], continuation.context)
    on_prefill(len(prompt), len(prompt))
    return logits


def generate(
    model: Transformer,
    prompt: Sequence[int],
    context: Context,
    sampler: Sampler,
    *,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
    **options,
) -> Generator[int, None, str]:
    """Yield new ids until it ends: -> the reason. The options are those of `Continuation`.

    `on_prefill(done, total)` hears how far the prompt is read.
    """
    this = Continuation(prompt, context, sampler, **options)
    logits = prefill(model, this, on_prefill)
    while (token := this.choose(logits)) is not None:
        yield token
        if this.left:
            logits = forward(model, [token], this.context)
    return this.reason
