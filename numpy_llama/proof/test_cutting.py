"""Cutting: a matrix and its heads cut for several ranks. The parts together are the whole."""

from itertools import pairwise

import numpy as np
from hypothesis import strategies as st

from .. import functional as F
from .bounds import EXACT_64, assert_near, assert_same, assert_within, g, unit
from .laws import assert_that, law, seeds, sizes, small_sizes, sources

shares = st.lists(st.sampled_from([1, 2, 3, 0.5]), min_size=1, max_size=6)
units = st.sampled_from([1, 2, 32])


def in_order(x, w):
    """y = x W^T, each sum from its first product to its last."""
    products = x[..., None, :] * w  # (..., OUT, IN)
    return np.add.accumulate(products, axis=-1)[..., -1] if w.shape[1] else products.sum(axis=-1)


class Watched:
    """`in_order`, with a record of its calls."""

    def __init__(self):
        self.seen = []

    def __repr__(self):
        return "linear"

    def __call__(self, x, w):
        self.seen.append((x.shape[-1], w.shape))
        return in_order(x, w)

    def had_each(self, wanted):
        """An error unless the calls were these, in any order: the length of x, the shape of w."""
        same = sorted(self.seen) == sorted(wanted)
        assert_that(same, f"linear had (x.shape[-1], w.shape) {self.seen}, wanted {wanted}")


def random_cuts(source, n, N):
    """0 .. n cut at random. No part is empty if n >= N."""
    N = min(N, n)
    ends = [0, *sorted((1 + source.permutation(n - 1)[: N - 1]).tolist()), n]
    return tuple(slice(a, b) for a, b in pairwise(ends))


def width(part):
    return part.stop - part.start


def numbers(parts):
    """The numbers of all parts, one part behind the other."""
    return [i for part in parts for i in range(part.start, part.stop)]


# --- where to cut -----------------------------------------------------------------------------------------


@law("cut", st.integers(0, 200), shares, units)
def test_no_row_is_lost_or_doubled(ops, n, shares, unit):
    """There is a part for each share, and the parts, one behind the other, are 0 .. n."""
    parts = ops.cut(n, shares, unit)
    assert_that(len(parts) == len(shares), f"{len(shares)} shares, {len(parts)} parts")
    assert_that(numbers(parts) == [*range(n)], f"{parts} are not 0 .. {n}")


@law("cut", st.integers(0, 200), shares, units)
def test_no_unit_is_cut(ops, n, shares, unit):
    """Every part ends at a multiple of `unit`, or at n."""
    parts = ops.cut(n, shares, unit)
    whole = [part.stop == n or part.stop % unit == 0 for part in parts]
    assert_that(all(whole), f"{parts}: units of {unit}")


@law("cut", st.integers(0, 200), shares, units)
def test_each_part_has_its_share(ops, n, shares, unit):
    """The width of a part differs from n share / sum(shares) by less than two units."""
    for part, share in zip(ops.cut(n, shares, unit), shares, strict=True):
        found, fair = width(part), n * share / sum(shares)
        assert_that(abs(found - fair) < 2 * unit, f"{part} has {found} of {n}, its share is {fair:.1f}")


# --- heads ------------------------------------------------------------------------------------------------


@law("cut_heads", small_sizes, small_sizes, shares)
def test_each_query_head_has_one_rank(ops, K, n_rep, shares):
    """The query heads of the ranks, one behind the other, are 0 .. H, and no rank has none."""
    shares = shares[: K * n_rep]
    heads, _ = ops.cut_heads(K * n_rep, K, shares)
    assert_that(len(heads) == len(shares), f"{len(shares)} ranks, {len(heads)} of them have heads")
    assert_that(numbers(heads) == [*range(K * n_rep)], f"{heads} are not 0 .. {K * n_rep}")
    assert_that(all(map(width, heads)), f"a rank of {heads} has no head")


@law("cut_heads", small_sizes, small_sizes, shares)
def test_a_rank_has_the_key_heads_that_it_reads(ops, K, n_rep, shares):
    """The query heads h of a rank read the key heads h // n_rep: it has these, and no others."""
    heads, kv_heads = ops.cut_heads(K * n_rep, K, shares[: K * n_rep])
    for rank, (own, kv) in enumerate(zip(heads, kv_heads, strict=True)):
        read = sorted({h // n_rep for h in numbers([own])})
        assert_that(numbers([kv]) == read, f"rank {rank} reads the key heads {read}, and has {numbers([kv])}")


@law("cut_heads", seeds, small_sizes, small_sizes, shares)
def test_attention_is_that_of_all_heads(ops, seed, K, n_rep, shares):
    """The attentions of the ranks, each of its own heads alone, are side by side that of all heads."""
    rng, heads = np.random.default_rng(seed), ops.cut_heads(K * n_rep, K, shares[: K * n_rep])
    q, (k, v) = rng.normal(size=(1, 2, K * n_rep, 4)), rng.normal(size=(2, 1, 3, K, 4))
    for own, kv in zip(*heads, strict=True):
        fits = width(kv) and width(own) % width(kv) == 0
        assert_that(fits, f"{width(own)} query heads cannot share {width(kv)} key heads alike")
    parts = [F.attention(q[:, :, own], k[:, :, kv], v[:, :, kv]) for own, kv in zip(*heads, strict=True)]
    assert_near(np.concatenate(parts, axis=2), F.attention(q, k, v), EXACT_64)


# --- by rows, by columns ----------------------------------------------------------------------------------


@law("linear_by_rows", sources, small_sizes, small_sizes, sizes, sizes, small_sizes)
def test_the_union_of_the_row_parts_is_the_whole(ops, source, B, T, IN, OUT, N):
    """The row parts side by side are the whole, bit for bit: each output is one sum, in one order."""
    x, w = source.array(B, T, IN), source.array(OUT, IN)
    assert_same(ops.linear_by_rows(x, w, random_cuts(source, OUT, N), Watched()), in_order(x, w))


@law("linear_by_rows", sources, small_sizes, small_sizes, sizes, small_sizes)
def test_a_rank_multiplies_its_rows_alone(ops, source, T, IN, OUT, N):
    """`linear` is called once for each rank, with all of x and the rows of that rank."""
    x, w, cuts, linear = source.array(T, IN), source.array(OUT, IN), random_cuts(source, OUT, N), Watched()
    ops.linear_by_rows(x, w, cuts, linear)
    wanted = [(IN, (width(part), IN)) for part in cuts]
    linear.had_each(wanted)


@law("linear_by_columns", sources, small_sizes, small_sizes, sizes, sizes, small_sizes)
def test_the_sum_of_the_column_parts_is_near_the_whole(ops, source, B, T, IN, OUT, N):
    """|sum of the parts - x W^T| <= g(IN + N) sum |x_i w_i|: N more roundings, in another order."""
    x, w = source.array(B, T, IN), source.array(OUT, IN)
    y = ops.linear_by_columns(x, w, random_cuts(source, IN, N), Watched())
    allowed = g(IN + N, u=unit(x.dtype)) * (np.abs(x) @ np.abs(w).T)
    assert_within(y, x.astype(np.longdouble) @ w.T, allowed)


@law("linear_by_columns", sources, small_sizes, sizes, sizes, small_sizes)
def test_the_ranks_are_added_in_their_order(ops, source, T, IN, OUT, N):
    """((rank 0 + rank 1) + rank 2) + ...: any other order has other bits."""
    x, w, cuts = source.array(T, IN), source.array(OUT, IN), random_cuts(source, IN, N)
    wanted = in_order(x[:, cuts[0]], w[:, cuts[0]])
    for part in cuts[1:]:
        wanted = wanted + in_order(x[:, part], w[:, part])
    assert_same(ops.linear_by_columns(x, w, cuts, Watched()), wanted)


@law("linear_by_columns", sources, small_sizes, sizes, small_sizes, small_sizes)
def test_a_rank_multiplies_its_columns_alone(ops, source, T, IN, OUT, N):
    """`linear` is called once for each rank, with the columns of that rank, of x as of w."""
    x, w, cuts, linear = source.array(T, IN), source.array(OUT, IN), random_cuts(source, IN, N), Watched()
    ops.linear_by_columns(x, w, cuts, linear)
    wanted = [(width(part), (OUT, width(part))) for part in cuts]
    linear.had_each(wanted)
