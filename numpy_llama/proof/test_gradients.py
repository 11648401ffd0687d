"""The gradient of each operation: against central differences, against autograd, and as a linear map.

f is the function, J its matrix of derivatives at x, and dy the gradient of the loss by y = f(x). An operation
`x_backward` computes J^T dy.
"""

import functools

import numpy as np
import pytest
from hypothesis import strategies as st

from . import laws, torch_ops
from .bounds import Miss, assert_same, assert_within
from .gradients import CASES, bound, case_of, central_differences, narrowed, widened
from .laws import assert_that, small_sizes, sources

law = functools.partial(laws.law, share=1 / 4)  # of the examples: the laws are many

sizes = st.one_of(st.integers(1, 9), st.sampled_from([16, 33, 65, 130]))
widths = st.one_of(st.integers(1, 9), st.sampled_from([16, 33]))
tiny_sizes = st.integers(1, 3)

# The error of a central difference of step 1e-5: its square times the third derivative, and u / step.
DIFFERENCE = 1e-7

each = pytest.mark.parametrize("name", CASES)


def gradients(ops, name, arguments):
    """The result as a tuple."""
    found = getattr(ops, name)(*arguments)
    return found if type(found) is tuple else (found,)


def expected(name, arguments):
    """PyTorch's, in float64."""
    found = getattr(torch_ops, name)(*(widened(x) for x in arguments))
    return found if type(found) is tuple else (found,)


def assert_all_within(found, wanted, bounds):
    """Each result within its bound. A miss names the result, if there are several."""
    for i, (one, other, allowed) in enumerate(zip(found, wanted, bounds, strict=True), 1):
        try:
            assert_within(one, other, allowed)
        except Miss as miss:
            miss.why += f" in result {i} of {len(found)}" if len(found) > 1 else ""
            raise


@each
@law("{name}", sources, tiny_sizes, tiny_sizes, small_sizes, share=1 / 5)
def test_it_is_the_slope(ops, name, source, a, b, c):
    """Each gradient is (loss(x + e) - loss(x - e)) / 2e, for a small change e of each number."""
    case = case_of(name, source, a, b, c)
    wanted, allowed = central_differences(case), bound(name, case.arguments, ops.dtype)
    slack = DIFFERENCE * (1 + max(np.abs(x).max() for x in wanted))
    assert_all_within(gradients(ops, name, case.arguments), wanted, [x + slack for x in allowed])


@each
@law("{name}", sources, sizes, widths, small_sizes)
def test_as_autograd(ops, name, source, a, b, c):
    """It gives what PyTorch's autograd gives, within the rounding of its sums."""
    arguments = case_of(name, source, a, b, c).arguments
    allowed = bound(name, arguments, ops.dtype)
    assert_all_within(gradients(ops, name, arguments), expected(name, arguments), [2 * x for x in allowed])


@each
@law("{name}", sources, sizes, widths, small_sizes, share=1 / 8)
def test_in_float32(ops, name, source, a, b, c):
    """The same in float32, against autograd in float64."""
    arguments = tuple(narrowed(x) for x in case_of(name, source, a, b, c).arguments)
    found = gradients(ops, name, arguments)
    assert_that(all(x.dtype == np.float32 for x in found), f"float32 went in, {found[0].dtype} came out")
    assert_all_within(found, expected(name, arguments), bound(name, arguments, np.float32))


@each
@law("{name}", sources, sizes, widths, small_sizes, share=1 / 8)
def test_it_is_the_transpose_of_the_derivative(ops, name, source, a, b, c):
    """<dy, J v> = <J^T dy, v> for any change v of the inputs."""
    case, step = case_of(name, source, a, b, c), 1e-5
    inputs = [widened(x) for x in case.inputs]
    changes = [source.rng.standard_normal(x.shape) for x in inputs]
    above, below = (
        case.f(*(x + sign * step * v for x, v in zip(inputs, changes, strict=True))) for sign in (1, -1)
    )
    terms = widened(case.arguments[0]) * (above - below) / (2 * step)
    products = [
        (x.astype(np.float64) * v).sum()
        for x, v in zip(gradients(ops, name, case.arguments), changes, strict=True)
    ]
    allowed = bound(name, case.arguments, ops.dtype)
    slack = sum((x * np.abs(v)).sum() for x, v in zip(allowed, changes, strict=True))
    size = 1 + np.abs(terms).sum() + np.abs(above * widened(case.arguments[0])).sum()
    assert_within(np.sum(products), terms.sum(), slack + DIFFERENCE * size)


@each
@law("{name}", sources, sizes, widths, small_sizes, share=1 / 8)
def test_it_is_linear_in_dy(ops, name, source, a, b, c):
    """Twice dy gives twice the gradients, to the last bit; a sum gives the sum."""
    dy, *others = case_of(name, source, a, b, c).arguments
    more = source.array(*dy.shape)
    one, other, both, twice = (gradients(ops, name, (x, *others)) for x in (dy, more, dy + more, 2 * dy))
    for found, single in zip(twice, one, strict=True):
        assert_within(found, 2 * single, np.finfo(found.dtype).tiny)  # halves of smaller numbers are rounded
    allowed = [bound(name, (x, *others), ops.dtype) for x in (dy, more, dy + more)]
    sums = (x + y for x, y in zip(one, other, strict=True))
    assert_all_within(both, sums, (2 * (x + y + z) for x, y, z in zip(*allowed, strict=True)))


@each
@law("{name}", sources, small_sizes, small_sizes, small_sizes, share=1 / 10)
def test_without_dy_nothing_changes(ops, name, source, a, b, c):
    """dy = 0 gives gradients of 0."""
    dy, *others = case_of(name, source, a, b, c).arguments
    for x in gradients(ops, name, (np.zeros_like(dy), *others)):
        assert_same(x, np.zeros_like(x))


@each
@law("{name}", sources, small_sizes, small_sizes, small_sizes, share=1 / 10)
def test_it_takes_any_layout(ops, name, source, a, b, c):
    """Numbers that lie apart in memory, or in Fortran's order, give the same gradients."""
    arguments = case_of(name, source, a, b, c).arguments
    allowed = [2 * x for x in bound(name, arguments, ops.dtype)]
    wanted = gradients(ops, name, arguments)
    dy, *others = arguments
    apart = np.repeat(dy, 2, axis=0)[::2]
    assert_all_within(gradients(ops, name, (apart, *others)), wanted, allowed)
    if name != "apply_rotary_emb_backward":  # its pairs lie side by side
        turned = [np.asfortranarray(x) if isinstance(x, np.ndarray) else x for x in arguments]
        assert_all_within(gradients(ops, name, turned), wanted, allowed)


@each
@law("{name}", sources, small_sizes, small_sizes, small_sizes, share=1 / 10)
def test_it_has_no_memory(ops, name, source, a, b, c):
    """Called again it gives the same bits, in arrays of its own, and its arguments are what they were."""
    arguments = case_of(name, source, a, b, c).arguments
    arrays = [x for x in arguments if isinstance(x, np.ndarray)]
    before = [x.copy() for x in arrays]
    first = gradients(ops, name, arguments)
    kept = [x.copy() for x in first]
    for x in first:
        x[...] = np.nan
    for x, was in zip(arrays, before, strict=True):
        assert_same(x, was)
    for x, was in zip(gradients(ops, name, arguments), kept, strict=True):
        assert_same(x, was)


# --- each by itself ---------------------------------------------------------------------------------------


@law("linear_dx linear_dw", sources, small_sizes, small_sizes, small_sizes)
def test_whole_numbers_are_multiplied_exactly(ops, source, T, IN, OUT):
    """dx = dy W and dW = dy^T x: with small whole numbers every sum is exact, in any order."""
    dy, x, w = (source.rng.integers(-8, 9, n).astype(ops.dtype) for n in ((T, OUT), (T, IN), (OUT, IN)))
    assert_same(ops.linear_dx(dy, w), dy @ w)
    assert_same(ops.linear_dw(dy, x), dy.T @ x)


@law("linear_dx linear_dw", sources, small_sizes, small_sizes)
def test_no_tokens_have_no_gradient(ops, source, IN, OUT):
    """Without rows dx has none, and dW is 0."""
    w = source.array(OUT, IN)
    assert_same(ops.linear_dx(np.zeros((0, OUT), ops.dtype), w), np.zeros((0, IN)))
    none = np.zeros((0, OUT), ops.dtype), np.zeros((0, IN), ops.dtype)
    assert_same(ops.linear_dw(*none), np.zeros((OUT, IN)))


@law("embedding_backward", sources, small_sizes, small_sizes, st.integers(2, 9))
def test_a_token_that_occurs_twice_learns_twice(ops, source, T, D, V):
    """Each row of the table gets the sum of the dx of its token, and the others 0."""
    dx, token = source.rng.integers(-8, 9, (1, T, D)).astype(ops.dtype), source.ids(V)
    found = ops.embedding_backward(dx, np.full((1, T), token), V)
    wanted = np.zeros((V, D))
    wanted[token] = dx[0].sum(axis=0)
    assert_same(found, wanted)


@law("rms_norm_backward", sources, small_sizes, st.integers(2, 33))
def test_a_longer_x_changes_nothing(ops, source, T, D):
    """Without eps the norm forgets the length of x: dx has no part in the direction of x."""
    x, weight, dy = source.positive(T, D), source.positive(D), source.array(T, D)
    dx, _ = ops.rms_norm_backward(dy, x, weight, 0.0)
    allowed = bound("rms_norm_backward", (dy, x, weight, 0.0), ops.dtype)[0]
    assert_within((dx.astype(np.float64) * x).sum(-1), np.zeros(T), 2 * (allowed * x).sum(-1))


@law(
    "apply_rotary_emb_backward apply_rotary_emb", sources, small_sizes, small_sizes, small_sizes, share=1 / 4
)
def test_turning_back_undoes_the_turn(ops, source, T, H, half):
    """The gradient of a turned vector is turned back: backward(forward(x)) = x, where no scaling is."""
    freqs_cis = np.exp(1j * source.rng.uniform(-9, 9, (T, half)))
    x = source.array(1, T, H, 2 * half)
    back = ops.apply_rotary_emb_backward(ops.apply_rotary_emb(x, freqs_cis), freqs_cis)
    assert_within(back, x, 16 * np.finfo(ops.dtype).eps * np.abs(x).max())


@law("apply_rotary_emb_backward", sources, small_sizes, small_sizes, small_sizes)
def test_each_row_may_have_its_own_angles(ops, source, T, H, half):
    """freqs_cis (B, T, Dh / 2) gives each row what it gets alone: packed rows count their own positions."""
    freqs_cis = np.exp(1j * source.rng.uniform(-9, 9, (2, T, half))).astype(np.result_type(ops.dtype, 1j))
    dy = source.array(2, T, H, 2 * half)
    found = ops.apply_rotary_emb_backward(dy, freqs_cis)
    alone = [ops.apply_rotary_emb_backward(dy[[b]], freqs_cis[b]) for b in (0, 1)]
    assert_within(found, np.concatenate(alone), 8 * np.finfo(ops.dtype).eps * np.abs(dy).max())


@pytest.mark.filterwarnings("error")
@law("swiglu_backward")
def test_the_ends_of_swiglu(ops):
    """Far right dgate = up, far left 0; nothing overflows on the way, and NaN stays NaN."""
    gate = np.array([-3e38, -1e4, -104, 0, 104, 1e4, 3e38, np.nan], ops.dtype)
    ones = np.ones_like(gate)
    dgate, dup = ops.swiglu_backward(ones, gate, 2 * ones)
    assert_within(dgate[:-1], [0, 0, 0, 1, 2, 2, 2], 1e-30)
    assert_within(dup[:-1], np.maximum(gate, 0)[:-1], 1e-30)
    assert_that(np.isnan(dgate[-1]) and np.isnan(dup[-1]), "NaN was lost")
