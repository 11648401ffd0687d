"""LoRA that learns in C, its update and its gradients, on every instruction set of this machine.

Whole numbers give exact sums, so they agree bit for bit with NumPy. Real numbers agree within the rounding of
the sums. Threads and cuts change no bit.
"""

import numpy as np
import pytest
from helpers.kernels import Guarded, bits, for_each, seeds, sizes, unaligned
from hypothesis import example, given
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama import lora
from numpy_llama.backend import kernels
from numpy_llama.backend.training import TrainingKernels
from numpy_llama.errors import MismatchError
from numpy_llama.proof.bounds import assert_within, g

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")
# csrc/lora.c: a chunk has 64 tokens, and a thread has four chunks at a time.
lengths = st.one_of(sizes, st.sampled_from([64, 65, 127, 128, 129, 520]))


class Case:
    """x (T, IN), dy and y (T, OUT), dx (T, IN), A (r, IN), B (OUT, r), all made by `numbers`."""

    def __init__(self, numbers, T, IN, OUT, r):
        shapes = {"x": (T, IN), "dx": (T, IN), "y": (T, OUT), "dy": (T, OUT), "a": (r, IN), "b": (OUT, r)}
        self.__dict__ = {name: numbers(shape) for name, shape in shapes.items()}

    def results(self, functions, scale=0.5):
        """y, dx, dA and dB."""
        y = functions.add_lora(self.y.copy(), self.x, self.a, self.b, scale)
        return y, *functions.lora_backward(self.dx.copy(), self.dy, self.x, self.a, self.b, scale)


@for_each
@given(T=lengths, IN=sizes, OUT=sizes, r=sizes, threads=st.integers(1, 4), by=st.integers(0, 15), seed=seeds)
@example(T=520, IN=33, OUT=97, r=8, threads=2, by=0, seed=0)
@example(T=3, IN=64, OUT=128, r=4, threads=1, by=1, seed=0)  # whole tiles of columns and ranks
def test_it_is_exact_on_exact_data(isa, T, IN, OUT, r, threads, by, seed):
    rng = np.random.default_rng(seed)
    c = Case(lambda shape: unaligned(rng.integers(-3, 4, shape).astype(np.float32), 4 * by), T, IN, OUT, r)
    for found, wanted in zip(c.results(TrainingKernels(threads)), c.results(lora), strict=True):
        np.testing.assert_array_equal(found, wanted)


@for_each
@given(T=lengths, IN=sizes, OUT=sizes, r=sizes, threads=st.integers(1, 4), seed=seeds)
def test_it_is_within_the_rounding_of_its_sums(isa, T, IN, OUT, r, threads, seed):
    rng = np.random.default_rng(seed)
    c = Case(lambda shape: rng.standard_normal(shape, dtype=np.float32), T, IN, OUT, r)
    found = c.results(TrainingKernels(threads))
    c.__dict__ = {name: x.astype(np.float64) for name, x in vars(c).items()}
    wanted = c.results(lora)
    c.__dict__ = {name: np.abs(x) for name, x in vars(c).items()}
    roundings = g(IN + r + 4), g(OUT + r + 4), g(OUT + T + 9), g(IN + T + 9)
    for one, exactly, size, rounding in zip(found, wanted, c.results(lora), roundings, strict=True):
        assert_within(one, exactly, rounding * size)


@for_each
@given(T=lengths, IN=sizes, OUT=sizes, r=sizes, cut=st.integers(0, 300), seed=seeds)
@example(T=520, IN=96, OUT=48, r=8, cut=0, seed=0)
def test_it_gives_the_same_bits_however_it_is_split(isa, T, IN, OUT, r, cut, seed):
    rng = np.random.default_rng(seed)
    c = Case(lambda shape: rng.standard_normal(shape, dtype=np.float32), T, IN, OUT, r)
    one = c.results(TrainingKernels(1))
    with pytest.MonkeyPatch.context() as patch:
        for work in (kernels.WORK_PER_CALL, 1):  # 1: a call for each chunk
            patch.setattr(kernels, "WORK_PER_CALL", work)
            for threads in (1, 2, 3):
                for same, wanted in zip(c.results(TrainingKernels(threads)), one, strict=True):
                    np.testing.assert_array_equal(bits(same), bits(wanted))
    k, parts = TrainingKernels(2), (slice(cut), slice(cut, None))
    y = [k.add_lora(c.y[here], c.x[here], c.a, c.b, 0.5) for here in parts]
    np.testing.assert_array_equal(bits(np.concatenate(y)), bits(one[0]))


def test_it_adds_in_place(isa, rng):
    c = Case(lambda shape: rng.standard_normal(shape, dtype=np.float32), 9, 20, 30, 3)
    k, wanted = TrainingKernels(2), c.results(lora)
    c.x, c.dy = c.x.astype(np.float64), np.asfortranarray(c.dy)  # they are only read
    assert k.add_lora(c.y, c.x, c.a, c.b, 0.5) is c.y
    assert k.lora_backward(c.dx, c.dy, c.x, c.a, c.b, 0.5)[0] is c.dx
    np.testing.assert_allclose(c.y, wanted[0], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(c.dx, wanted[1], rtol=1e-4, atol=1e-5)


def test_no_token_has_no_gradient(isa):
    c = Case(lambda shape: np.ones(shape, np.float32), 0, 5, 6, 2)
    y, dx, da, db = c.results(TrainingKernels(2))
    assert y.shape == (0, 6) and dx.shape == (0, 5) and da.shape == (2, 5) and db.shape == (6, 2)
    assert not da.any() and not db.any()


@pytest.mark.parametrize("name", ["x", "y", "a", "b", "dx"])
@pytest.mark.parametrize("less", [(slice(-1), slice(None)), (slice(None), slice(-1))], ids=["row", "column"])
def test_it_refuses_what_does_not_fit(name, less):
    c = Case(lambda shape: np.ones(shape, np.float32), 4, 5, 6, 2)
    setattr(c, name, getattr(c, name)[less])
    with pytest.raises(MismatchError, match="do not fit"):
        TrainingKernels(1).lora_backward(c.dx, c.y, c.x, c.a, c.b, 1.0)
    if name != "dx":
        with pytest.raises(MismatchError, match="do not fit"):
            TrainingKernels(1).add_lora(c.y, c.x, c.a, c.b, 1.0)


@pytest.mark.parametrize("at_end", [True, False])
def test_it_touches_nothing_beside_its_arrays(isa, at_end, rng):
    for T, IN, OUT, r in [(1, 1, 1, 1), (70, 33, 47, 5), (5, 64, 96, 8), (130, 7, 3, 2)]:
        guarded = Guarded()

        def numbers(shape, guarded=guarded):
            return guarded.copy(rng.integers(-3, 4, shape).astype(np.float32), at_end)

        c = Case(numbers, T, IN, OUT, r)
        da, db = (guarded.copy(np.zeros(s, np.float32), at_end) for s in ((r, IN), (OUT, r)))
        wanted = c.results(lora)
        address = {name: ffi.cast("float *", x.ctypes.data) for name, x in vars(c).items()}
        part = ffi.new("nl_lora_part *", (address["a"], address["b"], 0.5, r, IN, OUT))
        assert lib.nl_add_lora(address["y"], address["x"], part, T, 2) == 0
        to = [address["dx"], *(ffi.cast("float *", x.ctypes.data) for x in (da, db))]
        gradients = ffi.new("nl_lora_gradients *", [*to, address["dy"], address["x"]])
        assert lib.nl_lora_backward(gradients, part, T, 2) == 0
        for found, one in zip((c.y, c.dx, da, db), wanted, strict=True):
            np.testing.assert_array_equal(found, one)
