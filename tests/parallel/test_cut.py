"""Which rows a rank has: every row is on one rank, in order; a cut weight is those rows, also as stored."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.kernels import real_weight
from helpers.tiny_models import float_weights, stored
from hypothesis import example, given, settings
from hypothesis import strategies as st

from numpy_llama.backend.formats import FORMATS, PackedTensor, StoredTensor, pack_rows
from numpy_llama.backend.fused import fused_weights
from numpy_llama.backend.kernels import Cut, Kernels, KernelWeight, lib
from numpy_llama.checkpoint.memory import BYTES_A_TOKEN, PYTHON, memory_plan
from numpy_llama.checkpoint.names import interleaved_rows
from numpy_llama.errors import ParameterError, UnsupportedError
from numpy_llama.model import Transformer
from numpy_llama.parallel.cut import UNIT, Plan, checked_shares, cut, rows_of, widths
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.window import PREFILL_CHUNK

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


blocks = st.integers(1, 4).map(lambda n: 32 * n)


@given(
    blocks, blocks, st.integers(1, 3), st.integers(2, 4), st.lists(st.integers(1, 5), min_size=2, max_size=4)
)
@example(32, 32, 3, 3, [1, 1, 1, 1])  # the heads are wider than F
@example(128, 32, 1, 2, [1, 1])
@example(32, 128, 1, 3, [1, 1, 1])
@settings(max_examples=20)
def test_the_plan_of_a_rank_covers_what_c_takes(dim, hidden_dim, n_kv_heads, n_rep, shares):
    """In a pass of a whole chunk: the scratch, what the ranks exchange, and x, y and the gathered y."""
    args = replace(
        TINY_BLOCKS,
        dim=dim,
        hidden_dim=hidden_dim,
        n_kv_heads=n_kv_heads,
        n_heads=n_kv_heads * n_rep,
        head_dim=64,
        n_layers=1,
    )
    plan, weights = Plan.of(args, shares[: args.n_heads]), stored(float_weights(args))
    for rank in range(len(plan.heads)):
        part, local = plan.weights(weights, rank), plan.local_args(rank)
        packed = {name: w.dequantize() if len(w.shape) == 1 else KernelWeight(w) for name, w in part.items()}
        w = fused_weights(Transformer(local, packed).layers[0], Kernels(1))
        heads = [n * args.head_dim for n in widths(plan.heads)]
        cut = Cut(rank, heads, widths(plan.dim), widths(plan.hidden_dim), lambda memory, nbytes: None)
        in_c = lib.nl_layers_bytes(w.struct, cut.struct, PREFILL_CHUNK)
        in_c += lib.nl_exchange_bytes(w.struct, PREFILL_CHUNK) + 3 * 4 * PREFILL_CHUNK * dim
        angles = 4 * args.max_seq_len * args.head_dim
        planned = plan.memory(part, rank, "c").scratch - PYTHON - BYTES_A_TOKEN * args.vocab_size - angles
        in_c -= 4 * lib.nl_activations_bytes(PREFILL_CHUNK, 0)  # in four copies; 64 bytes a token
        assert 0.99 * in_c <= planned <= 2 * in_c + 4 * args.vocab_size


def test_one_rank_has_the_plan_of_one_process():
    weights = stored(float_weights(TINY_BLOCKS))
    plan = Plan.of(TINY_BLOCKS, [1]).memory(weights, 0, "c", None, True, None)
    assert plan == memory_plan(TINY_BLOCKS, weights, "c", None, True, None)
