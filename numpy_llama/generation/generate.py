"""From ids to ids: compute the prompt, then choose one token at a time. No text occurs here."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import AbstractContextManager
from copy import copy
from typing import Any

import numpy as np

from ..cache import KVCache
from ..config import Array
from ..errors import ContextOverflowError, NumericsError, ParameterError
from ..model import Function, Transformer, TransformerBlock
from ..window import PREFILL_CHUNK
from .sampling import Logprobs, Sampler, logprobs
from .session import Session
from .structured import Constraint


def forward(model: Transformer, ids: Sequence[int], session: Session) -> np.ndarray:
    """Compute `ids` after those that the session holds; -> logits (V,) of the next token."""
    start_pos = len(session.ids)
    with np.errstate(over="ignore", invalid="ignore"):  # checked here, and again when sampling
        h = model.hidden(np.array([ids]), start_pos, session.cache)
        check_finite(h[0, -1], model, ids, start_pos, session.cache)
        session.ids.extend(ids)
        return model.logits(h[0, -1])


def check_finite(
    h: np.ndarray, model: Transformer, ids: Sequence[int], start_pos: int, cache: KVCache
) -> None:
    """NumericsError if h, the residual stream of the last of `ids`, is not finite.

    The pass then runs a second time with a check after each layer, to name the first layer that fails.
    """
    if np.isfinite(h).all():
        return

    def look(h: Array, what: str) -> None:
        finite = np.isfinite(h[0]).all(axis=-1)  # (T,)
        if not finite.all():
            t = int(finite.argmin())
            raise NumericsError(f"position {start_pos + t}, token {ids[t]}: {what} is not finite")

    def checked(i: int, layer: TransformerBlock) -> Function:
        def run(h: Array, start_pos: int, freqs_cis: Array, cache: KVCache) -> Array:
            if i == 0:
                look(h, "its embedding")
            h = layer(h, start_pos, freqs_cis, cache)
            look(h, f"what comes out of layer {i}, the first to go wrong,")
            return h

        return run

    layers = {f"layers.{i}": checked(i, layer) for i, layer in enumerate(model.layers)}
    last = start_pos + len(ids) - 1
    watched = model.with_parts(layers)
    watched.hidden(np.array([ids]), start_pos, cache)
    raise NumericsError(
        f"position {last}, token {ids[-1]}: the last layer's output was not finite in the first pass, "
        "but was in the second"
    )


def check_room(prompt: Sequence[int], room: int) -> None:
    """An error unless there is a prompt, and room for an answer."""
    if not prompt:
        raise ParameterError("the prompt is empty: there is nothing to continue")
    if len(prompt) >= room:
        raise ContextOverflowError(
            f"the prompt has {len(prompt)} tokens, the context {room}: no room for an answer"
        )


class Request:
    """A prompt and its continuation. `choose` takes logits and returns the next id.

    `reason` is "stop" after an id in `stop_ids`, which is not returned. It is "length" after `max_tokens`
    ids, or at the end of the context. Ids from `vocab_size` on are never chosen: they have no token, and
    their rows only pad the embedding. With a `constraint` only ids that it allows are chosen, and a text that
    is complete ends with "stop". With `top_logprobs`, `logprobs` has an entry for each new id, from the
    logits of the model as they were before sampling.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        session: Session,
        sampler: Sampler,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        vocab_size: int | None = None,
        top_logprobs: int | None = None,
        constraint: Constraint | None = None,
    ):
        room = session.cache.max_seq_len
        check_room(prompt, room)
        self.ids, self.left = list(prompt), room - len(prompt)
        if max_tokens is not None:
            self.left = min(self.left, max_tokens)  # ids that may still follow
        self.sampler, self.state = sampler, sampler.new_state()
        self.stop_ids, self.vocab_size, self.reason = stop_ids, vocab_size, "length"
        self.top_logprobs = top_logprobs or 0
        self.logprobs: list[Logprobs] | None = None if top_logprobs is None else []
        self.constraint = copy(constraint)  # its state is that of this request
        self._session, self._user = session, session.claim()

    def step(self) -> AbstractContextManager[Session]:
        """Hold the session during one step of this request."""
        return self._session.step(self._user)

    def choose(self, logits: np.ndarray) -> int | None:
        """The next id; None at the end."""
        if not self.left:
            return None
        logits = logits[: self.vocab_size]
        allowed = logits if self.constraint is None else self.constraint(logits)
        try:
            token = self.sampler(allowed, self.ids, self.state)
        except NumericsError as error:
            where = f"position {len(self.ids) - 1}, token {self.ids[-1]}"
            what = "every layer's output is finite, but"
            if np.isfinite(logits.max()):  # the model's own
                what = "the model's logits are finite, but after the constraint, logit_bias and the penalties"
            raise NumericsError(f"{where}: {what} {error}") from None
        if token in self.stop_ids:
            self.stop()
            return None
        if self.logprobs is not None:
            self.logprobs.append(logprobs(logits, token, self.top_logprobs))
        self.ids.append(token)
        self.left -= 1
        if self.constraint is not None and self.constraint.take(token):
            self.stop()
        return token

    def stop(self) -> None:
        self.left, self.reason = 0, "stop"


def prefill(
    model: Transformer,
    request: Request,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
) -> np.ndarray:
    """Compute the prompt, without the prefix that its session holds; -> logits (V,) of the next token."""
    prompt = request.ids
    with request.step() as session:
        for begin in range(session.keep_prefix_of(prompt, model), len(prompt), PREFILL_CHUNK):
            on_prefill(begin, len(prompt))
            logits = forward(model, prompt[begin : begin + PREFILL_CHUNK], session)
    on_prefill(len(prompt), len(prompt))
    return logits


def decode(model: Transformer, request: Request) -> np.ndarray:
    """Compute the last id of a request; -> logits (V,) of the next token."""
    with request.step() as session:
        return forward(model, request.ids[-1:], session)


Decode = Callable[[Transformer, Request], np.ndarray]


def generate(
    model: Transformer,
    prompt: Sequence[int],
    session: Session,
    sampler: Sampler,
    *,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
    decode: Decode = decode,
    **options: Any,
) -> Generator[int, None, str]:
    """Yield the new ids, and return the reason of the end. The options are those of `Request`.

    `on_prefill(done, total)` is called before each chunk of the prompt and at its end, with counts of tokens.
    `decode`: another way to the same logits, such as a `Speculation`.
    """
    request = Request(prompt, session, sampler, **options)
    return (yield from generate_request(model, request, on_prefill, decode))


def generate_request(
    model: Transformer,
    request: Request,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
    decode: Decode = decode,
) -> Generator[int, None, str]:
    """`generate` for a request that the caller keeps."""
    logits = prefill(model, request, on_prefill)
    while (token := request.choose(logits)) is not None:
        yield token
        if request.left:
            logits = decode(model, request)
    return request.reason
