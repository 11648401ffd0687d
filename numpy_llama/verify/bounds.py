"""How far two right results may lie apart, each bound with its reason. u = 2^-24, half an ulp of 1.

K roundings in a row err by K u at most, but they go up and down: by more than LAMBDA sqrt(K) u with a chance
of 2 exp(-LAMBDA^2 / 2) (Higham & Mary 2019), 1e-21 here. The sure bound would let a real fault pass: at
K = 14336 it is a tenth of a usual result.
"""

import math

import numpy as np

from ..backend.formats import X_MAX, Format

U32 = 2.0**-24
LAMBDA = 10.0
# What a block is made of, d * q and m, and its largest weight, are larger than its weights are on average.
IN_BLOCKS = 4.0
# A whole layer in one call, exact: its sums one behind the other, relative to what the layer adds.
LAYER_EXACT = 1e-5
# With activations of 14 bits and a cache of 11: some thousand roundings. Measured: up to 8 steps.
LAYER_QUANTIZED = 32 / float(X_MAX)


def g(K: int) -> float:
    """Of a dot product of length K, summed in any order on both sides, relative to |a| |b|."""
    return (LAMBDA * math.sqrt(K) + 16) * U32


def linear(x, w, format: Format, rounded: bool):
    """(T, IN), (OUT, IN) -> (T, OUT): g |x| |w|.

    `rounded`: weights that are single numbers were rounded to 14 bits in blocks, too.
    """
    error, single = g(w.shape[1]), format.block == 1
    if not single:
        error *= IN_BLOCKS
    elif rounded:
        error += IN_BLOCKS * LAMBDA / math.sqrt(12 * w.shape[1]) / float(X_MAX)
    return error * np.outer(lengths(x), lengths(w))


def lengths(rows):
    """|row| of each."""
    return np.sqrt(np.einsum("ij,ij->i", rows, rows))


def norm(expected):
    """One sum of squares, a root, a division, a product: relative to each result."""
    return (g(expected.shape[-1]) + 8 * U32) * np.abs(expected)


def rope(turned, angles):
    """An angle a is rounded by some a u, and the pair that it turns by that share of its length.

    (B, T, H, Dh), the largest angle of each position (T,) -> (B, T, H, Dh).
    """
    pairs = turned.reshape(*turned.shape[:-1], -1, 2)
    lengths = np.repeat(np.sqrt((pairs.astype(np.float64) ** 2).sum(axis=-1)), 2, axis=-1)
    return (8 * angles[:, None, None] + 8) * U32 * lengths


def attention(q, k, v):
    """A score errs by g(Dh) |q| |k| / sqrt(Dh), what softmax makes of it by twice that, relatively."""
    (H, Dh), (S, K) = q.shape[2:], k.shape[1:3]
    k, v = (np.repeat(x.astype(np.float64), H // K, axis=2) for x in (k, v))
    longest = np.sqrt((k**2).sum(axis=-1)).max(axis=1)[:, None]  # (B, 1, H)
    scores = np.sqrt((q.astype(np.float64) ** 2).sum(axis=-1)) * longest / math.sqrt(Dh)  # (B, T, H)
    largest = np.abs(v).max(axis=1)[:, None]  # (B, 1, H, Dh)
    return (4 * (g(Dh) + U32) * scores + 2 * g(S))[..., None] * largest


def swiglu(expected):
    """exp to 3 ulp, an addition, a division, two products; below 1e-37 numbers lose their digits."""
    return 16 * U32 * np.abs(expected) + 1e-37


def layer(x, expected, exact: bool):
    """A whole layer: relative to the most that it adds, and to the stream that it adds it to."""
    added = np.abs(expected.astype(np.float64) - x).max()
    return (LAYER_EXACT if exact else LAYER_QUANTIZED) * added + 4 * U32 * np.abs(expected)
