"""From ids to ids: compute the prompt, then choose one token at a time. No text occurs here."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from threading import RLock
from typing import Any
from weakref import ref

import numpy as np

from ..cache import KVCache
from ..config import Array
from ..errors import ContextOverflowError, NumericsError, ParameterError, check_has
from ..model import Function, Transformer, TransformerBlock
from ..window import PREFILL_CHUNK
from .sampling import Sampler


class Session:
    """A KV cache and the ids whose keys and values it holds: the memory of one conversation.

    A new prompt is computed only from the first id that differs. Another model computes all of it.
    """

    def __init__(self, model: Transformer, max_seq_len: int | None = None):
        check_has("model", model, "new_cache", "a Transformer")
        self.cache = model.new_cache(batch=1, max_seq_len=max_seq_len)
        self._model: ref[Transformer] | None = ref(model)  # whose keys these are; None after a pickle
        self.ids: list[int] = []
        self.user: object = None  # the request that uses it now
        self._lock = RLock()  # held during a step

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        """A second session with the same positions, to continue the conversation in two ways."""
        other = copy(self)
        other.cache, other.ids, other._model = deepcopy(self.cache, memo), list(self.ids), self._model
        return other

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle: the conversation, without the request that uses it now."""
        return {"cache": self.cache, "ids": self.ids}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, user=None, _lock=RLock(), _model=None)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Hold the session during one step. Another thread gets a ParameterError meanwhile."""
        if not self._lock.acquire(blocking=False):
            raise ParameterError("the session is in use by another thread: give each its own session")
        try:
            yield
        finally:
            self._lock.release()

    def keep_prefix_of(self, prompt: Sequence[int], model: Transformer) -> int:
        """Keep the ids that `prompt` begins with, if this model computed them. Return their number.

        The last id of `prompt` is never kept, because the next pass computes its logits.
        """
        if self._model is None or self._model() is not model:
            args, (layers, _, heads, *_) = model.args, self.cache.k.shape
            heads = getattr(self.cache, "n_kv_heads", heads)  # on several ranks k has a part of them
            found, wanted = (
                (layers, heads, self.cache.head_dim),
                (args.n_layers, args.n_kv_heads, args.head_dim),
            )
            if found != wanted:
                sizes = f"has (n_layers, n_kv_heads, head_dim) = {found}, the model has {wanted}"
                raise ParameterError(f"the session {sizes}: begin one with `new_session`")
        if self._model is not None and self._model() is not model:
            self.ids.clear()
        self._model = ref(model)
        same = 0
        while same < min(len(self.ids), len(prompt) - 1) and self.ids[same] == prompt[same]:
            same += 1
        if same < getattr(self.cache, "least_start", 0):  # a sliding window's cache has dropped what it saw
            same = 0
        del self.ids[same:]
        return same


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


class Request:
    """A prompt and its continuation. `choose` takes logits and returns the next id.

    `reason` is "stop" after an id in `stop_ids`, which is not returned. It is "length" after `max_tokens`
    ids, or at the end of the context. Ids from `vocab_size` on are never chosen: they have no token, and
    their rows only pad the embedding.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        session: Session,
        sampler: Sampler,
        max_tokens: int | None = None,
        stop_ids: Collection[int] = (),
        vocab_size: int | None = None,
    ):
        if not prompt:
            raise ParameterError("the prompt is empty: there is nothing to continue")
        room = session.cache.max_seq_len
        if len(prompt) >= room:
            raise ContextOverflowError(
                f"the prompt has {len(prompt)} tokens, the context {room}: no room for an answer"
            )
        self.ids, self.left = list(prompt), room - len(prompt)
        if max_tokens is not None:
            self.left = min(self.left, max_tokens)  # ids that may still follow
        self.sampler, self.rng = sampler, sampler.new_rng()
        self.stop_ids, self.vocab_size, self.reason = stop_ids, vocab_size, "length"
        with session.alone():
            session.user, self._session = self, session

    @contextmanager
    def step(self) -> Iterator[Session]:
        """Hold the session during one step of this request."""
        with self._session.alone():
            if self._session.user is not self:
                raise ParameterError("the session is in use by a later generation: give each its own session")
            yield self._session

    def choose(self, logits: np.ndarray) -> int | None:
        """The next id; None at the end."""
        if not self.left:
            return None
        try:
            token = self.sampler(logits[: self.vocab_size], self.ids, self.rng)
        except NumericsError as error:
            where = f"position {len(self.ids) - 1}, token {self.ids[-1]}"
            raise NumericsError(f"{where}: every layer's output is finite, but {error}") from None
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


def generate(
    model: Transformer,
    prompt: Sequence[int],
    session: Session,
    sampler: Sampler,
    *,
    on_prefill: Callable[[int, int], None] = lambda done, total: None,
    **options: Any,
) -> Generator[int, None, str]:
    """Yield the new ids, and return the reason of the end. The options are those of `Request`.

    `on_prefill(done, total)` is called before each chunk of the prompt and at its end, with counts of tokens.
    """
    request = Request(prompt, session, sampler, **options)
    logits = prefill(model, request, on_prefill)
    while (token := request.choose(logits)) is not None:
        yield token
        if request.left:
            with request.step() as session:
                logits = forward(model, [token], session)
    return request.reason
