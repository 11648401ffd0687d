"""From ids to ids: read the prompt, then choose one token at a time. Knows nothing of text."""

from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from threading import RLock

import numpy as np

from ..errors import ContextOverflowError, NumericsError, ParameterError, check_has
from ..model import Transformer
from .sampling import Sampler

PREFILL_CHUNK = 512  # tokens a forward pass: large enough for full speed, small enough to report progress


class Session:
    """A KV cache and the ids whose keys and values it holds: what one conversation owns.

    A prompt that begins with those ids is only computed from where it differs.
    """

    def __init__(self, model: Transformer, max_seq_len: int | None = None):
        check_has("model", model, "new_cache", "a Transformer")
        self.cache = model.new_cache(batch=1, max_seq_len=max_seq_len)
        self.ids: list[int] = []
        self.user: object = None  # the generation that goes on in it now
        self._lock = RLock()  # held during a step

    def __deepcopy__(self, memo: dict) -> "Session":
        """A conversation that goes on in two ways."""
        twin = copy(self)
        twin.cache, twin.ids = deepcopy(self.cache, memo), list(self.ids)
        return twin

    def __getstate__(self) -> dict:
        """For a copy or a pickle: the conversation, not whoever uses it now."""
        return {"cache": self.cache, "ids": self.ids}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, user=None, _lock=RLock())

    @contextmanager
    def alone(self) -> Iterator[None]:
        """For the time of one step; any other thread that comes meanwhile is refused."""
        if not self._lock.acquire(blocking=False):
            raise ParameterError("the session is in use by another thread: each at a time needs its own")
        try:
            yield
        finally:
            self._lock.release()

    def keep_prefix_of(self, prompt: Sequence[int]) -> int:
        """Forget what is no prefix of `prompt`, and at least its last id, whose logits are wanted next."""
        same = 0
        while same < min(len(self.ids), len(prompt) - 1) and self.ids[same] == prompt[same]:
            same += 1
        del self.ids[same:]
        return same


def forward(model: Transformer, ids: Sequence[int], session: Session) -> np.ndarray:
    """Compute `ids` behind what the session holds; -> logits (V,) of what comes after the last."""
    start_pos = len(session.ids)
    with np.errstate(over="ignore", invalid="ignore"):  # what comes of it is looked at here and when sampling
        h = model.hidden(np.array([ids]), start_pos, session.cache)
        check_finite(h[0, -1], model, ids, start_pos, session.cache)
        session.ids.extend(ids)
        return model.logits(h[0, -1])


def check_finite(h: np.ndarray, model: Transformer, ids: Sequence[int], start_pos: int, cache) -> None:
    """NumericsError if h, which comes of the last of `ids`, is not finite.

    To say where that begins, the step is done again with a look at what each layer makes of it.
    """
    if np.isfinite(h).all():
        return

    def look(h, what):
        finite = np.isfinite(h[0]).all(axis=-1)  # (T,)
        if not finite.all():
            t = int(finite.argmin())
            raise NumericsError(f"position {start_pos + t}, token {ids[t]}: {what} is not finite")

    def checked(i, layer):
        def run(h, *rest):
            if i == 0:
                look(h, "its embedding")
            h = layer(h, *rest)
            look(h, f"what comes out of layer {i}, the first to go wrong,")
            return h

        return run

    layers = {f"layers.{i}": checked(i, layer) for i, layer in enumerate(model.layers)}
    model.with_parts(layers).hidden(np.array([ids]), start_pos, cache)
    last = start_pos + len(ids) - 1
    raise NumericsError(f"position {last}, token {ids[-1]}: the last layer's output was not finite, once")


class Request:
    """A prompt and what follows it: logits in, the next id out. `reason` tells what ends it, or ended it.

    It ends at an id in `stop_ids` (which is not returned): "stop"; or when `max_tokens` are made or the
    context is full: "length". Ids from `vocab_size` on are never chosen: rows that only pad the embedding, of
    which no token is told.
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
            self.left = min(self.left, max_tokens)  # ids that may yet be made
        self.sampler, self.rng = sampler, sampler.new_rng()
        self.stop_ids, self.vocab_size, self.reason = stop_ids, vocab_size, "length"
        with session.alone():
            session.user, self._session = self, session

    @contextmanager
    def step(self) -> Iterator[Session]:
        """The session, for the time of one step of this generation."""
        with self._session.alone():
            if self._session.user is not self:
                raise ParameterError(
                    "the session is in use by a later generation: each at a time needs its own"
                )
            yield self._session

    def choose(self, logits: np.ndarray) -> int | None:
        """The id that comes next; None where it ends."""
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
    """Read the prompt, as far as its session does not hold it yet; -> logits (V,) of what comes next."""
    prompt = request.ids
    with request.step() as session:
        for begin in range(session.keep_prefix_of(prompt), len(prompt), PREFILL_CHUNK):
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
    **options,
) -> Generator[int, None, str]:
    """Yield new ids until it ends: -> the reason. The options are those of `Request`.

    `on_prefill(done, total)` hears how far the prompt is read.
    """
    request = Request(prompt, session, sampler, **options)
    logits = prefill(model, request, on_prefill)
    while (token := request.choose(logits)) is not None:
        yield token
        if request.left:
            with request.step() as session:
                logits = forward(model, [token], session)
    return request.reason
