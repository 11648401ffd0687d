"""A second KV cache that goes on from the positions of a first one. They are shared, not copied.

    a file in memory     the positions at the time of the first branch; nobody writes to it afterwards
    each cache           a private mapping of it: a read shares its pages, a write copies one page of 4 KiB

The operating system keeps them apart (MAP_PRIVATE, on Windows FILE_MAP_COPY). So each cache is an ordinary
one: an update, or C, stores into it as into any other. Positions behind those of the file cost their memory
once more, whichever number of caches has them, because the file has empty pages there.
"""

import os
import tempfile
from collections.abc import Iterable, Sequence
from copy import copy
from mmap import ACCESS_COPY, ACCESS_WRITE, mmap
from typing import IO, Any, TypeVar
from weakref import finalize

import numpy as np

from ..cache import KVCache
from ..config import Array
from ..errors import ResourceLimitError

Cache = TypeVar("Cache", bound=KVCache)


class Snapshot:
    """The positions of a cache in a file without a name, which ends with its last mapping."""

    def __init__(self, cache: KVCache):
        self.dropped = list(cache.dropped)
        self.shape, self.dtype = (2, *cache.k.shape), cache.k.dtype
        self.nbytes = cache.k.nbytes + cache.v.nbytes
        try:
            self.file = _file_in_memory()
            finalize(self, self.file.close)
            self.file.truncate(self.nbytes)
        except OSError as error:
            raise _refused(error) from None
        copy_positions(cache, self._map(ACCESS_WRITE), cache.dropped)

    def map(self) -> Array:
        """Keys and values, (2, n_layers, batch, K, positions, ...). What is stored into them is private."""
        return self._map(ACCESS_COPY)

    def _map(self, access: int) -> Array:
        try:
            pages = mmap(self.file.fileno(), self.nbytes, access=access)
        except OSError as error:
            raise _refused(error) from None
        return np.frombuffer(pages, self.dtype).reshape(self.shape)


def _file_in_memory() -> IO[bytes]:
    if hasattr(os, "memfd_create"):
        return open(os.memfd_create("numpy_llama"), "r+b", buffering=0)
    return tempfile.TemporaryFile()


def _refused(error: OSError) -> ResourceLimitError:
    return ResourceLimitError(
        f"no further branch of the session, {error.strerror}: each takes a file descriptor and the "
        "addresses of a whole cache; drop branches that have ended"
    )


class Filled(list[int]):
    """`filled` of a cache that maps a snapshot. The cache has stored no position before `kept` again."""

    def __init__(self, filled: Iterable[int], snapshot: Snapshot, kept: Iterable[int]):
        super().__init__(filled)
        self.snapshot, self.kept = snapshot, list(kept)

    def __setitem__(self, layers: Any, filled: Any) -> None:
        super().__setitem__(layers, filled)
        self.kept = [*map(min, self.kept, self)]  # every update first sets `filled` to where it begins

    def __reduce__(self) -> tuple[type[list[int]], tuple[list[int]]]:
        return list, ([*self],)  # a copy of the arrays, or a pickle, maps nothing


def branch(cache: Cache) -> Cache:
    """A second cache with the same positions. What one stores from now on, the other does not see.

    The cache gets a new snapshot if less than half of its positions are in the one that it maps.
    """
    first = first_own(cache)
    if not isinstance(cache.filled, Filled) or 2 * positions(cache, first) > positions(cache, cache.dropped):
        snapshot, first = Snapshot(cache), list(cache.filled)
        cache.k, cache.v = snapshot.map()
        cache.filled = Filled(cache.filled, snapshot, first)
    snapshot = cache.filled.snapshot
    other = object.__new__(type(cache))
    vars(other).update({name: copy(value) for name, value in vars(cache).items() if name not in ("k", "v")})
    both = snapshot.map()
    copy_positions(cache, both, first)
    other.k, other.v = both
    other.filled = Filled(cache.filled, snapshot, first)
    return other


def first_own(cache: KVCache) -> list[int]:
    """The first position of each layer that the cache does not share with its snapshot."""
    if not isinstance(cache.filled, Filled):
        return cache.dropped
    then = cache.filled.snapshot.dropped  # a sliding window's cache moves the others when it drops some
    both = zip(cache.filled.kept, cache.dropped, then, strict=True)
    return [max(kept, now) if now == at_that_time else now for kept, now, at_that_time in both]


def positions(cache: KVCache, first: Sequence[int]) -> int:
    """The number of stored positions from `first` on, of all layers together."""
    return sum(max(end - begin, 0) for begin, end in zip(first, cache.filled, strict=True))


def copy_positions(cache: KVCache, to: Array, first: Sequence[int]) -> None:
    """Copy the stored positions from `first` on: no memory that was never used is touched."""
    for layer, (begin, end, dropped) in enumerate(zip(first, cache.filled, cache.dropped, strict=True)):
        new = slice(max(begin - dropped, 0), max(end - dropped, 0))
        for stored, copied in zip((cache.k, cache.v), to, strict=True):
            copied[layer, :, :, new] = stored[layer, :, :, new]
