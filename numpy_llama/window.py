"""The KV cache of a model with a sliding window (Beltagy et al. 2020; Mistral 7B v0.1, Phi-3-mini-4k).

A token sees the last `sliding_window` positions, its own included. An older one is never read again, so the
cache drops it:

    positions    0 . . . . . . dropped | window - 1 older ones, or some more | the new ones | . . .
                 no longer stored      `-------------- at most `room` --------------'

The stored positions lie in order, as attention reads them. When the room is full, the oldest BLOCKs go and
the others move to the front: once in BLOCK tokens.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import DTypeLike

from .cache import KVCache
from .config import Array, ModelArgs
from .errors import ParameterError, check_kind, check_whole

PREFILL_CHUNK = 512  # tokens a forward pass: large enough for full speed, small enough to report progress
BLOCK = 128  # positions that are dropped together: csrc/attention.c reads blocks of this many


def positions_stored(args: ModelArgs, max_seq_len: int) -> int:
    """The most positions of a sequence of `max_seq_len` that a cache stores at a time."""
    if args.sliding_window is None:
        return max_seq_len
    return min(max_seq_len, args.sliding_window + PREFILL_CHUNK + BLOCK)


class WindowKVCache(KVCache):
    """A KVCache with room for the window and the new positions: `positions_stored` for each sequence."""

    def __init__(self, args: ModelArgs, batch: int, max_seq_len: int, dtype: DTypeLike = np.float32):
        check_kind("args", args, ModelArgs, "a ModelArgs")
        check_whole("max_seq_len", max_seq_len, 1, args.max_seq_len)
        self.room, self.window = positions_stored(args, max_seq_len), args.sliding_window or max_seq_len
        super().__init__(args, batch, self.room, dtype)
        self.max_seq_len = max_seq_len

    @property
    def least_start(self) -> int:
        """Where the next update of all layers may begin, or later. It may always begin at 0."""
        return max(map(self._least_start, range(len(self.dropped))))

    def _least_start(self, layer: int) -> int:
        return self.dropped[layer] + self.window - 1 if self.dropped[layer] else 0

    def update(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        """Store T new keys and values (B, T, K, Dh) at start_pos; return those that they see, and them.

        -> (B, S, K, Dh), S = T + window - 1 at most. They are copies if T is above PREFILL_CHUNK.
        """
        B, T = xk.shape[:2]
        self.check(layer, start_pos, B, T)
        if not self.make_room([layer], start_pos, T):
            return self._update_by_chunks(layer, start_pos, xk, xv)
        keys, values = super().update(layer, start_pos, xk, xv)
        first = max(keys.shape[1] - T - self.window + 1, 0)
        return keys[:, first:], values[:, first:]

    def _update_by_chunks(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        keys, values = list[Array](), list[Array]()
        for i in range(0, xk.shape[1], PREFILL_CHUNK):
            new = slice(i, i + PREFILL_CHUNK)
            pair = WindowKVCache.update(self, layer, start_pos + i, xk[:, new], xv[:, new])
            for x, parts in zip(pair, (keys, values), strict=True):
                older = x.shape[1] - xk[:, new].shape[1] if parts else 0
                parts.append(x[:, older:].copy())  # before the next chunk moves it
        return np.concatenate(keys, axis=1), np.concatenate(values, axis=1)

    def check(self, layer: int, start_pos: int, B: int, T: int) -> int:
        """As in KVCache; and an error if a position that is needed was dropped."""
        end = super().check(layer, start_pos, B, T)
        if 0 < start_pos < self._least_start(layer):
            raise ParameterError(
                f"position {start_pos} sees positions that are no longer stored, with a sliding window of "
                f"{self.window}: go on from position {self._least_start(layer)} or later, or begin at 0"
            )
        return end

    def make_room(self, layers: Sequence[int], start_pos: int, T: int) -> bool:
        """Drop old positions until T more have room at start_pos, in these layers as many in each.

        False: T is above PREFILL_CHUNK, and has no room at once.
        """
        for layer in layers:
            if start_pos < self._least_start(layer):  # at 0: another text begins
                self.dropped[layer] = self.filled[layer] = 0
        dropped = max(self.dropped[layer] for layer in layers)
        excess = start_pos + T - dropped - self.room
        if excess > 0 and T > PREFILL_CHUNK:
            return False
        dropped += 0 if excess <= 0 else excess + -excess % BLOCK
        for layer in layers:
            self._drop(layer, dropped)
        return True

    def _drop(self, layer: int, dropped: int) -> None:
        if by := dropped - self.dropped[layer]:
            self.dropped[layer] = self.max_seq_len  # after an interruption nothing is left
            for stored in (self.k[layer], self.v[layer]):
                for head in stored.reshape(-1, *stored.shape[2:]):  # each alone: NumPy copies what moves
                    head[:-by] = head[by:]
            self.dropped[layer] = dropped
