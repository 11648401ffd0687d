"""Contents of blocks for laws and tests: all numbers of 16 bits, and the scales of the K formats."""

import numpy as np

from ..config import Array

ALL_16_BITS = np.arange(2**16, dtype=np.uint16)


def packed_scales(sc: Array, m: Array) -> Array:
    """(blocks, 8) numbers of 6 bits each -> (blocks, 12) bytes, bit by bit in the layout of formats.py."""
    place = {}  # (array, sub-block, bit): (byte, bit)
    for j in range(4):
        for bit in range(6):
            place["sc", j, bit] = (j, bit)
            place["m", j, bit] = (j + 4, bit)
        for bit in range(4):
            place["sc", j + 4, bit] = (j + 8, bit)
            place["m", j + 4, bit] = (j + 8, bit + 4)
        for bit in range(4, 6):
            place["sc", j + 4, bit] = (j, bit + 2)
            place["m", j + 4, bit] = (j + 4, bit + 2)
    packed = np.zeros((len(sc), 12), np.uint8)
    for (name, j, bit), (byte, to) in place.items():
        packed[:, byte] |= (({"sc": sc, "m": m}[name][:, j] >> bit & 1) << to).astype(np.uint8)
    return packed


def all_pairs_of_scales() -> tuple[Array, Array]:
    """Two arrays (4096, 8): at every place of a block, every pair of two 6-bit numbers."""
    pair = (np.arange(4096)[:, None] + 509 * np.arange(8)) % 4096
    return pair // 64, pair % 64
