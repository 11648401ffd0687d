"""What a conversation keeps from one request to the next."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import copy, deepcopy
from functools import partial
from threading import RLock
from typing import Any
from weakref import ref

from ..errors import ParameterError, check_has
from ..model import Transformer
from .branch import branch


class Session:
    """A KV cache and the ids whose keys and values it holds: the memory of one conversation.

    A new prompt is computed only from the first id that differs. Another model computes all of it.
    """

    def __init__(self, model: Transformer, max_seq_len: int | None = None):
        check_has("model", model, "new_cache", "a Transformer")
        self.cache = model.new_cache(batch=1, max_seq_len=max_seq_len)
        self._model: ref[Transformer] | None = ref(model)  # whose keys these are; None after a pickle
        self.ids: list[int] = []
        self.user: object = None  # made by `claim` for who uses it now
        self._lock = RLock()  # held during a step

    def __deepcopy__(self, memo: dict[int, Any]) -> "Session":
        """A second session with the same positions, to continue the conversation in two ways."""
        other = copy(self)
        other.cache, other.ids, other._model = deepcopy(self.cache, memo), list(self.ids), self._model
        return other

    def branch(self) -> "Session":
        """A second session that continues from here. The positions so far are shared, not copied.

        Both go on independently. The first branch copies the positions once, so that all later ones share
        them. Where a session stores a new position, it gets a page of 4 KiB of its own: see branch.py.
        """
        with self.alone():
            other = copy(self)
            other.cache = getattr(self.cache, "branch", partial(branch, self.cache))()
            other.ids, other._model = list(self.ids), self._model
        return other

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy or a pickle: the conversation, without who uses it now."""
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

    def claim(self) -> object:
        """Use the session from now on, by `step` with what is returned. Earlier users get an error there."""
        with self.alone():
            self.user = object()
            return self.user

    @contextmanager
    def step(self, user: object) -> Iterator["Session"]:
        """Hold the session during one step of a user that has claimed it."""
        with self.alone():
            if self.user is not user:
                raise ParameterError("the session is in use by a later generation: give each its own session")
            yield self

    def is_of(self, model: Transformer) -> bool:
        """Whether this model may have computed its keys and values. After a pickle no model is known."""
        return self._model is None or self._model() is model

    def keep_prefix_of(self, prompt: Sequence[int], model: Transformer) -> int:
        """Keep the ids that `prompt` begins with, if this model computed them. Return their number.

        The last id of `prompt` is never kept, because the next pass computes its logits.
        """
        if self._model is None or not self.is_of(model):
            args, (layers, _, heads, *_) = model.args, self.cache.k.shape
            heads = getattr(self.cache, "n_kv_heads", heads)  # on several ranks k has a part of them
            found, wanted = (
                (layers, heads, self.cache.head_dim),
                (args.n_layers, args.n_kv_heads, args.head_dim),
            )
            if found != wanted:
                sizes = f"has (n_layers, n_kv_heads, head_dim) = {found}, the model has {wanted}"
                raise ParameterError(f"the session {sizes}: begin one with `new_session`")
        if not self.is_of(model):
            self.ids.clear()
        self._model = ref(model)
        same = 0
        while same < min(len(self.ids), len(prompt) - 1) and self.ids[same] == prompt[same]:
            same += 1
        if same < getattr(self.cache, "least_start", 0):  # a sliding window's cache has dropped what it saw
            same = 0
        del self.ids[same:]
        return same
