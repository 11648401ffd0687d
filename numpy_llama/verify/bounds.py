"""How far two right results of an operation may differ, from the probable bound of its sums: `g_probable`."""

import math

import numpy as np

from ..backend.formats import X_MAX, Format
from ..config import Array
from ..proof.bounds import LAMBDA, U32, g_probable

# A block's parts, d * q and m, and its largest weight are larger than its weights are on average.
IN_BLOCKS = 4.0
# A whole layer in one call, exact: the errors of its sums add up. Relative to the layer's output minus its
# input.
LAYER_EXACT = 1e-5
# Activations of 8 bits and a cache of 11: about a thousand roundings. Measured: up to 2 steps of 8 bits.
LAYER_QUANTIZED = 8 / 127


def linear(x: Array, w: Array, format: Format, rounded: bool) -> Array:
    """(T, IN), (OUT, IN) -> (T, OUT): g_probable |x| |w|.

    `rounded`: weights that are multiplied as floats were rounded to 14 bits in blocks, too.
    """
    error = g_probable(w.shape[1])
    if format.block > 1:
        error *= IN_BLOCKS
    if rounded and format.in_floats:
        error += IN_BLOCKS * LAMBDA / math.sqrt(12 * w.shape[1]) / float(X_MAX[14])
    return error * np.outer(lengths(x), lengths(w))


def lengths(rows: Array) -> Array:
    """The length |row| of each row."""
    return np.sqrt(np.einsum("ij,ij->i", rows, rows))


def norm(expected: Array) -> Array:
    """A sum of squares, a root, a division and a product: relative to each result."""
    return (g_probable(expected.shape[-1]) + 8 * U32) * np.abs(expected)


def rope(turned: Array, angles: Array) -> Array:
    """An angle a is rounded by about a u, and a pair by that share of its length.

    (B, T, H, Dh), the largest angle of each position (T,) -> (B, T, H, Dh).
    """
    pairs = turned.reshape(*turned.shape[:-1], -1, 2)
    lengths = np.repeat(np.sqrt((pairs.astype(np.float64) ** 2).sum(axis=-1)), 2, axis=-1)
    return (8 * angles[:, None, None] + 8) * U32 * lengths


def attention(q: Array, k: Array, v: Array) -> Array:
    """A score errs by g_probable(Dh) |q| |k| / sqrt(Dh). The relative error after softmax is twice that."""
    (H, Dh), (S, K) = q.shape[2:], k.shape[1:3]
    k, v = (np.repeat(x.astype(np.float64), H // K, axis=2) for x in (k, v))
    longest = np.sqrt((k**2).sum(axis=-1)).max(axis=1)[:, None]  # (B, 1, H)
    scores = np.sqrt((q.astype(np.float64) ** 2).sum(axis=-1)) * longest / math.sqrt(Dh)  # (B, T, H)
    largest = np.abs(v).max(axis=1)[:, None]  # (B, 1, H, Dh)
    return (4 * (g_probable(Dh) + U32) * scores + 2 * g_probable(S))[..., None] * largest


def swiglu(expected: Array) -> Array:
    """exp to 3 ulp, an addition, a division, two products. Below 1e-37 numbers lose their digits."""
    return 16 * U32 * np.abs(expected) + 1e-37


def layer(x: Array, expected: Array, exact: bool) -> Array:
    """A whole layer: relative to its largest update, and to the residual stream that it updates."""
    added = np.abs(expected.astype(np.float64) - x).max()
    return (LAYER_EXACT if exact else LAYER_QUANTIZED) * added + 4 * U32 * np.abs(expected)
