"""What the tests of the kernels share: weights in every format, and arrays with guarded ends."""

import ctypes
import mmap
import os

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st

from numpy_llama.backend.formats import QK, StoredTensor

# Where in a block its float16 numbers lie: the scale, and the minimum (or its scale) if there is one.
HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q4_Z": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2),
    "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,),
}  # fmt: skip
FLOAT32_D = ("INT8", "LLM_INT8", "FP8", "NF4", "FP4")  # a block begins with a float32 scale
# Codes whose numbers are 0 or plus or minus a power of two.
POWERS = {"NF4": (0, 7, 15), "FP4": (0, 3, 5, 7, 8, 11, 13, 15)}
ODD_SIZES = [1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 33, 63, 65]
sizes = st.one_of(st.integers(1, 20), st.sampled_from(ODD_SIZES))
seeds = st.integers(0, 2**32 - 1)
# What runs for every format on every instruction set runs more than thirty times: fewer examples each.
for_each = settings(max_examples=settings().max_examples // 4)


def unaligned(x: np.ndarray, by: int) -> np.ndarray:
    """A copy of x whose first byte lies `by` bytes behind a multiple of 64."""
    room = np.empty(x.nbytes + 128, np.uint8)
    start = -room.ctypes.data % 64 + by
    copy = room[start : start + x.nbytes].view(x.dtype).reshape(x.shape)
    copy[...] = x
    return copy


def exact_weight(rng, format, OUT: int, IN: int) -> StoredTensor:
    """Small whole numbers times powers of two, as stored: with them no sum below is ever rounded."""
    if format.block == 1:
        return StoredTensor.quantize(rng.integers(-8, 9, (OUT, IN)).astype(np.float32), format)
    blocks = rng.integers(0, 256, (OUT * IN // format.block, format.block_bytes), dtype=np.uint8)
    if format.name in FLOAT32_D:
        return StoredTensor(format, (OUT, IN), _exact_float32_blocks(rng, format, blocks).reshape(-1))
    small = {"Q8_0": slice(2, 34), "Q6_K": slice(192, 208)}.get(format.name)  # signed bytes
    if small:
        blocks[:, small] = rng.integers(-8, 9, blocks[:, small].shape).astype(np.int8).view(np.uint8)
    k = format.block > QK
    if format.name in ("Q4_K", "Q5_K"):
        blocks[:, 4:12] &= 15  # scales and minima of 4 bits
    d = 2.0 ** rng.integers(0 if k else -2, 2 if k else 3, (len(blocks), 1))
    m = rng.integers(-2, 3, d.shape) if k else rng.integers(-8, 9, d.shape)
    for at, half in zip(HALVES[format.name], (d, m), strict=False):
        blocks[:, at : at + 2] = half.astype("<f2").view(np.uint8)
    return StoredTensor(format, (OUT, IN), blocks.reshape(-1))


def _exact_float32_blocks(rng, format, blocks: np.ndarray) -> np.ndarray:
    d = 2.0 ** rng.integers(-2, 3, (len(blocks), 1))
    if format.name == "LLM_INT8":
        d *= 127
    blocks[:, :4] = d.astype("<f4").view(np.uint8)
    codes = blocks[:, 4:]
    if format.name == "FP8":  # a sign, and 2^-3 .. 2^3 with one bit of fraction
        codes[...] = codes & 0x84 | rng.integers(4, 11, codes.shape).astype(np.uint8) << 3
    elif format.name in POWERS:
        high, low = rng.choice(np.uint8(POWERS[format.name]), (2, *codes.shape))
        codes[...] = high << 4 | low
    else:
        codes[...] = rng.integers(-8, 9, codes.shape).astype(np.int8).view(np.uint8)
    return blocks


def real_weight(rng, format, OUT: int, IN: int) -> StoredTensor:
    """Weights around 1. A format that nobody here can write: any bytes, with reasonable scales."""
    if format.quantize:
        return StoredTensor.quantize(rng.standard_normal((OUT, IN), dtype=np.float32), format)
    blocks = rng.integers(0, 256, (OUT * IN // format.block, format.block_bytes), dtype=np.uint8)
    for at in HALVES.get(format.name, ()):
        half = rng.normal(scale=2**-9, size=(len(blocks), 1))
        if format.name == "Q4_Z" and at == 2:  # its zero
            half = rng.integers(0, 16, half.shape)
        blocks[:, at : at + 2] = half.astype("<f2").view(np.uint8)
    set_float32_scales(rng, format, blocks, 1)
    return StoredTensor(format, (OUT, IN), blocks.reshape(-1))


def set_float32_scales(rng, format, blocks: np.ndarray, size: float) -> None:
    """Random scales for blocks of random bytes that begin with one: the weights are about `size`."""
    if format.name in FLOAT32_D:
        mean = {"INT8": 74, "FP8": 130}.get(format.name, 0.6)  # of the numbers of random codes
        d = rng.normal(scale=size / mean, size=(len(blocks), 1))
        blocks[:, :4] = d.astype("<f4").view(np.uint8)


def whole_blocks(format, n: int) -> int:
    """n, or the next number of weights that rows of this format can have."""
    return -(-n // format.block) * format.block


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


class Guarded:
    """Arrays hard against a page which may not be touched, before their first or after their last byte."""

    libc = ctypes.CDLL(None, use_errno=True)

    def __init__(self):
        self.maps = []  # they live as long as this object

    def copy(self, x: np.ndarray, at_end: bool) -> np.ndarray:
        page = mmap.PAGESIZE
        room = -(-max(x.nbytes, 1) // page) * page
        area = mmap.mmap(-1, room + 2 * page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(area))
        for guard in (address, address + page + room):
            assert self.libc.mprotect(ctypes.c_void_p(guard), page, 0) == 0, os.strerror(ctypes.get_errno())
        self.maps.append(area)
        start = page + (room - x.nbytes if at_end else 0)
        copy = np.frombuffer(area, np.uint8, x.nbytes, start).view(x.dtype).reshape(x.shape)
        copy[...] = x
        return copy
