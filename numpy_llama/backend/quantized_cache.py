"""A KV cache of 8 bits: keys and values in blocks of Q8_0, as formats.py defines them.

    32 numbers of a head      34 bytes: a float16 scale d, and 32 signed bytes q. A number is d * q

It takes 17/32 of the bytes of a cache in float16. llama.cpp has the same blocks under `-ctk q8_0 -ctv q8_0`.
"""

import numpy as np
from numpy.typing import DTypeLike

from ..cache import KVCache
from ..config import Array, ModelArgs
from ..errors import NumericsError, UnsupportedError
from ..window import WindowKVCache
from .formats import FORMATS, MAX_F16, dequantize_q8_0, quantize_q8_0

Q8_0 = FORMATS["Q8_0"]


class QuantizedKVCache(KVCache):
    """A KVCache whose k and v are bytes: (n_layers, batch, K, max_seq_len, bytes of a head).

    `update` expands them to `dtype`. A number whose scale is beyond float16 is an error.
    """

    def __init__(self, args: ModelArgs, batch: int, max_seq_len: int, dtype: DTypeLike = np.float32):
        super().__init__(args, batch, max_seq_len, np.uint8)
        if args.head_dim % Q8_0.block:
            raise UnsupportedError(
                f"head_dim is {args.head_dim}, a cache in q8 needs a multiple of {Q8_0.block}: "
                "leave out cache_dtype, on the command line --cache-dtype"
            )
        shape = (*self.k.shape[:-1], Q8_0.row_bytes(args.head_dim))
        self.k, self.v = np.empty(shape, np.uint8), np.empty(shape, np.uint8)
        self.dtype = np.dtype(dtype)

    def update(self, layer: int, start_pos: int, xk: Array, xv: Array) -> tuple[Array, Array]:
        """Store T new keys and values (B, T, K, Dh) at start_pos; return all S so far, (B, S, K, Dh)."""
        end = self.check(layer, start_pos, xk.shape[0], xk.shape[1])
        try:
            with np.errstate(over="raise"):
                new = self._quantize(xk), self._quantize(xv)
        except FloatingPointError:
            raise NumericsError(
                f"layer {layer}, positions {start_pos}..{end - 1}: a key or value, "
                f"{max(np.abs(x).max() for x in (xk, xv)):.6g}, is beyond {127 * MAX_F16:.6g}, "
                "the largest in q8: exact=True keeps a cache of float32"
            ) from None
        keys, values = super().update(layer, start_pos, *new)
        return self._dequantize(keys), self._dequantize(values)

    def _quantize(self, x: Array) -> Array:
        """(..., Dh) -> (..., bytes of a head). A NaN or an infinity makes its block NaN."""
        stored = np.empty((*x.shape[:-1], self.k.shape[-1]), np.uint8)
        if x.size:
            with np.errstate(invalid="ignore"):
                rows = np.asarray(x, np.float32).reshape(-1, self.head_dim)
                stored[...] = quantize_q8_0(rows).reshape(stored.shape)
        return stored

    def _dequantize(self, stored: Array) -> Array:
        """(..., bytes of a head) -> (..., Dh)."""
        x = np.empty((*stored.shape[:-1], self.head_dim), self.dtype)
        if x.size:
            with np.errstate(invalid="ignore"):
                rows = np.ascontiguousarray(stored).reshape(-1, stored.shape[-1])
                x[...] = dequantize_q8_0(rows).reshape(x.shape)
        return x


class QuantizedWindowKVCache(QuantizedKVCache, WindowKVCache):
    """A cache of 8 bits for a model with a sliding window."""
