"""The same again: an operation has no memory, and nothing but its arguments decides what it gives."""

from typing import Any

import numpy as np
import pytest

from .bounds import assert_same
from .laws import law, small_sizes, sources

# Arguments of each: arrays of these shapes, and what follows them.
ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "linear": ([(3, 40), (5, 40)],),
    "rms_norm": ([(3, 8), (8,)], 1e-5),
    "softmax": ([(3, 8)],),
    "silu": ([(3, 8)],),
    "swiglu": ([(3, 8), (3, 8)],),
    "attention": ([(1, 3, 4, 8), (1, 5, 2, 8), (1, 5, 2, 8)],),
    "repeat_kv": ([(1, 3, 2, 4)], 2),
}


@pytest.mark.parametrize("name", ARGUMENTS)
@law("{name}", sources, small_sizes)
def test_twice_the_same(ops, name, source, times):
    """Called again with the same arguments, whatever was computed in between, it gives the same bits."""
    shapes, *more = ARGUMENTS[name]
    arrays = [source.array(*shape) for shape in shapes]
    function = getattr(ops, name)
    first = function(*arrays, *more).copy()
    for _ in range(times):
        function(*(array + 1 for array in arrays), *more)
    assert_same(function(*arrays, *more), first)


@pytest.mark.parametrize("name", ARGUMENTS)
@law("{name}", sources)
def test_the_result_is_an_array_of_its_own(ops, name, source):
    """Writing into what came out changes neither the arguments nor the next result."""
    shapes, *more = ARGUMENTS[name]
    arrays = [source.array(*shape) for shape in shapes]
    before = [array.copy() for array in arrays]
    function = getattr(ops, name)
    out = function(*arrays, *more)
    kept = out.copy()
    out[...] = np.nan
    for array, was in zip(arrays, before, strict=True):
        assert_same(array, was)
    assert_same(function(*arrays, *more), kept)
