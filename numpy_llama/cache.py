"""The KV cache: keys and values of the positions so far, so that none is computed twice.

The caller owns it and the model keeps no state: two conversations are two caches and one model.
"""

import numpy as np
from numpy.typing import DTypeLike

from .config import Array, ModelArgs
from .errors import ContextOverflowError, NumericsError, ParameterError, check_kind, check_whole

MAX_BATCH = 1 << 20


class KVCache:
    """Room for `max_seq_len` positions of `batch` sequences: 2 * n_layers * K * Dh numbers each.

    In float16 it takes half the memory, and half the time to read. A number beyond float16 is an error.
    """

    def __init__(self, args: ModelArgs, batch: int, max_seq_len: int, dtype: DTypeLike = np.float32):
        check_kind("args", args, ModelArgs, "a ModelArgs")
        check_whole("max_seq_len", max_seq_len, 1, args.max_seq_len)
        check_whole("batch", batch, 0, MAX_BATCH)
        # The positions of one head are contiguous, because attention reads them one after another.
        shape = (args.n_layers, batch, args.n_kv_heads, max_seq_len, args.head_dim)
        self.k = np.empty(shape, dtype)
        self.v = np.empty(shape, dtype)
        self.batch, self.max_seq_len, self.head_dim = batch, max_seq_len, args.head_dim
        self.filled = [0] * args.n_layers  # positions stored so far, by layer
        self.dropped = [0] * args.n_layers  # of them, the first that are kept no longer: see window.py

    def update(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        """Store T new keys and values (B, T, K, Dh) at start_pos; return all S so far, (B, S, K, Dh)."""
        end = self.check(layer, start_pos, xk.shape[0], xk.shape[1])
        self.filled[layer] = start_pos  # until all are stored: an interrupted update does not count
        new = slice(start_pos - self.dropped[layer], end - self.dropped[layer])
        k, v = self.k[layer].swapaxes(1, 2), self.v[layer].swapaxes(1, 2)  # (B, max_seq_len, K, Dh)
        try:
            with np.errstate(over="raise"):  # an infinite key could pass unseen, by a score of -inf
                k[:, new], v[:, new] = xk, xv
        except FloatingPointError:
            raise NumericsError(
                f"layer {layer}, positions {start_pos}..{end - 1}: a key or value, "
                f"{max(np.abs(x).max() for x in (xk, xv)):.6g}, is beyond {np.finfo(k.dtype).max:.6g}, "
                f"the largest {k.dtype}: exact=True keeps a cache of float32"
            ) from None
        self.filled[layer] = end
        return k[:, : new.stop], v[:, : new.stop]

    def check(self, layer: int, start_pos: int, B: int, T: int) -> int:
        """The end of T new positions of B sequences at start_pos; an error if they have no place there."""
        end = start_pos + T
        if self.batch != B:
            raise ParameterError(f"{B} sequences do not fit a cache for {self.batch}")
        if not 0 <= start_pos <= end <= self.max_seq_len:
            raise ContextOverflowError(
                f"positions {start_pos}..{end - 1} do not fit a cache of {self.max_seq_len}"
            )
        if start_pos > self.filled[layer]:
            raise ParameterError(f"position {start_pos} comes after {self.filled[layer]} stored ones: a gap")
        return end
