"""Which rows a rank has: every row is on one rank, in order; a cut weight is those rows, also as stored."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.kernels import real_weight
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.backend.formats import FORMATS, PackedTensor, StoredTensor, pack_rows
from numpy_llama.checkpoint.names import interleaved_rows
from numpy_llama.errors import ParameterError, UnsupportedError
from numpy_llama.parallel.cut import UNIT, Plan, checked_shares, cut, rows_of, widths
from numpy_llama.proof.tiny import TINY_BLOCKS

shares = st.lists(st.floats(0.01, 100), min_size=1, max_size=9)


@given(st.integers(0, 10**6), shares, st.sampled_from([1, UNIT]))
def test_the_parts_are_the_whole_and_in_proportion(n, shares, unit):
    parts = cut(n, shares, unit)
    assert [i for part in parts for i in (part.start, part.stop)][1:-1:2] == [
        part.start for part in parts[1:]
    ]
    assert (parts[0].start, parts[-1].stop, len(parts)) == (0, n, len(shares))
    for part, share in zip(parts, shares, strict=True):
        assert 0 <= part.start <= part.stop and part.start % unit in (0, n % unit)
        assert abs(part.stop - part.start - n * share / sum(shares)) <= 2 * unit  # each end by one


@given(st.integers(1, 8), st.integers(1, 6), shares)
def test_each_rank_has_whole_heads_and_their_keys(n_kv_heads, n_rep, shares):
    args = replace(TINY_BLOCKS, n_heads=n_kv_heads * n_rep, n_kv_heads=n_kv_heads)
    if len(shares) > args.n_heads:
        with pytest.raises(UnsupportedError, match=f"start at most {args.n_heads}"):
            Plan.of(args, shares)
        return
    plan = Plan.of(args, shares)
    assert sum(widths(plan.heads)) == args.n_heads
    for rank, (heads, kv) in enumerate(zip(plan.heads, plan.kv_heads, strict=True)):
        local = plan.local_args(rank)
        for i in range(heads.start, heads.stop):  # by GQA's rule, alone and on its rank
            assert i // n_rep == kv.start + (i - heads.start) // (local.n_heads // local.n_kv_heads)
        assert heads.start == (0 if rank == 0 else plan.heads[rank - 1].stop)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("kind", ["stored", "made", "packed"])
@pytest.mark.parametrize("rows", [slice(0, 32), slice(32, 75), slice(16, 24), slice(75, 75)], ids=str)
@pytest.mark.parametrize("ordered", ["rows", "heads", "any", "columns"])
def test_a_cut_weight_is_its_rows(format, kind, rows, ordered, rng):
    kind = "stored" if format.block == 1 else kind  # only block formats are packed
    whole = real_weight(rng, format, 75, 256)
    order = {"heads": np.concatenate([interleaved_rows(9, 8), [72, 73, 74]]), "any": rng.permutation(75)}
    orders = order.get(ordered), rng.permutation(256) if ordered == "columns" else None
    of_kind = PackedTensor if kind == "packed" else StoredTensor
    data = {"stored": whole.data, "made": lambda rows: whole.data[rows]}.get(kind)
    data = pack_rows(whole.data, format) if data is None else data
    tensor = of_kind(format, whole.shape, data, *orders)
    got = rows_of(tensor, rows)
    np.testing.assert_array_equal(got.dequantize(), tensor.dequantize()[rows])
    in_place = kind != "made" and (kind != "packed" or rows in (slice(0, 32), slice(32, 75)))
    if ordered in ("rows", "columns") and rows.stop > rows.start and in_place:
        of, part = (tensor.packed, got.packed) if kind == "packed" else (tensor.data, got.data)
        assert np.shares_memory(of, part)


@pytest.mark.parametrize(
    "shares", [[1], [1, 2, 3], [1, 0], [1, -1], [1, float("nan")], [1, "2"], "12", 3, [1, True], [1, 1e300]]
)
def test_shares_are_numbers_above_0(shares):
    with pytest.raises(ParameterError, match="they must be 2 numbers above 0, one for each rank"):
        checked_shares(shares, 2)
