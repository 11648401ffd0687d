"""Layers in one C call (csrc/layer.c) against the layer of model.py, on every instruction set.

In exact mode both round alike, except for the order of a few sums. A quantized activation between two steps
may be rounded either way. A step is 1 / 8191 of the largest number of its block.
"""

import threading
from dataclasses import replace
from functools import partial
from itertools import combinations, pairwise

import numpy as np
import pytest
from helpers.kernels import HALVES, Guarded, bits, for_each, seeds, set_float32_scales
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from numpy_llama.backend._kernels import ffi, lib

from numpy_llama.backend import build, kernels
from numpy_llama.backend.formats import FORMATS, MAX_F16, QK, StoredTensor, quantize_q8_0
from numpy_llama.backend.fused import FusedBlock, fuse, fused_weights
from numpy_llama.backend.kernels import Cut, Kernels, KernelWeight
from numpy_llama.backend.quantized_cache import QuantizedKVCache, QuantizedWindowKVCache
from numpy_llama.cache import KVCache
from numpy_llama.config import ModelArgs
from numpy_llama.errors import ContextOverflowError, MismatchError, NumericsError, ParameterError
from numpy_llama.generation.batch import BatchCache, side_by_side
from numpy_llama.model import Transformer, TransformerBlock
from numpy_llama.parallel.cut import Plan, widths
from numpy_llama.proof.bounds import U16, assert_near
from numpy_llama.proof.tiny import TINY_BLOCKS, random_weights
from numpy_llama.window import WindowKVCache

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")

CONTEXT = 80
SMALL = replace(TINY_BLOCKS, head_dim=32, vocab_size=32, max_seq_len=CONTEXT)
# A layer in float32, relative to its largest output: the rounding of its sums, which the norms magnify.
LAYER_32 = 1e-5
# Some of the thousand numbers of a layer are rounded to the other side, each by one step or less.
ROUNDED = 4 / 127


def random_weight(rng, OUT: int, IN: int) -> StoredTensor:
    """In any format that has such rows; x @ w.T is about as large as x."""
    format = FORMATS[rng.choice([name for name, format in FORMATS.items() if IN % format.block == 0])]
    if format.quantize:
        return StoredTensor.quantize(rng.normal(scale=IN**-0.5, size=(OUT, IN)).astype(np.float32), format)
    blocks = rng.integers(0, 256, (OUT * IN // format.block, format.block_bytes), dtype=np.uint8)
    for at in HALVES.get(format.name, ()):
        blocks[:, at : at + 2] = rng.normal(scale=2**-13, size=(len(blocks), 1)).astype("<f2").view(np.uint8)
    set_float32_scales(rng, format, blocks, IN**-0.5)
    return StoredTensor(format, (OUT, IN), blocks.reshape(-1))


def mixed_weights(rng, args: ModelArgs, half_split: bool = False) -> dict[str, StoredTensor]:
    """Each weight in a format of its own; q and k, if so asked, with their rows in another order."""
    stored = {}
    for name, w in random_weights(rng, args, np.float32).items():
        w = StoredTensor.quantize(w, "F32") if w.ndim == 1 else random_weight(rng, *w.shape)
        if half_split and name.endswith(("wq.weight", "wk.weight")):
            w = StoredTensor(w.format, w.shape, w.data, rng.permutation(len(w)))
        stored[name] = w
    return stored


def two_models(args: ModelArgs, weights, threads: int, exact: bool) -> tuple[Transformer, Transformer]:
    """The same model, computed by csrc/layer.c and by the ordinary layers."""
    packed = {key: w.dequantize() if len(w.shape) == 1 else KernelWeight(w) for key, w in weights.items()}
    chosen = Kernels(threads, exact)
    return (
        fuse(Transformer(args, packed, chosen.linear, chosen.attention), chosen),
        Transformer(args, packed, chosen.linear, chosen.attention),
    )


@st.composite
def configurations(draw, heads_of=8):
    """Rows that are whole blocks, as C takes them; some of them whole blocks of K formats."""
    head_dims = [32, 40, 48, 64, 80, 96, 128, 256]
    head_dim = draw(st.sampled_from([n for n in head_dims if n % heads_of == 0]))
    n_kv_heads, n_rep = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    while n_kv_heads * n_rep * head_dim % 32:
        n_rep += 1
    dim, hidden_dim = draw(st.sampled_from([32, 96, 256])), draw(st.sampled_from([32, 160, 512]))
    sizes = {"dim": dim, "hidden_dim": hidden_dim, "head_dim": head_dim}
    return replace(SMALL, **sizes, n_layers=1, n_heads=n_kv_heads * n_rep, n_kv_heads=n_kv_heads)


def run(model: Transformer, x, lengths, dtype=np.float32) -> tuple[np.ndarray, KVCache]:
    """x (1, T, D) through the first layer, in chunks of these lengths."""
    kind = QuantizedKVCache if dtype == np.uint8 else KVCache
    cache, at, parts = kind(model.args, 1, CONTEXT, np.float32 if dtype == np.uint8 else dtype), 0, []
    for T in lengths:
        chunk = x[:, at : at + T]
        parts.append(model.layers[0](chunk, at, model.freqs_cis[at : at + T], cache))
        at += T
    assert cache.filled[0] == at
    return np.concatenate(parts, axis=1), cache


lengths = st.lists(st.one_of(st.just(1), st.integers(1, 20)), min_size=1, max_size=4)
scales = st.sampled_from([0.01, 1, 100])  # what swiglu's exp is given lies within +-2, or beyond +-88


@for_each
@given(configurations(), lengths, st.integers(1, 3), scales, st.booleans(), seeds)
@example(SMALL, [CONTEXT], 2, 1, True, 0)
@example(replace(SMALL, n_kv_heads=1, head_dim=128), [13, 1, 1], 3, 100, False, 1)
def test_a_layer_is_the_layer_of_the_model(isa, args, lengths, threads, scale, half_split, seed):
    rng = np.random.default_rng(seed)
    weights = mixed_weights(rng, args, half_split)
    up = weights["layers.0.ffn_norm.weight"]
    weights["layers.0.ffn_norm.weight"] = StoredTensor.quantize(up.dequantize() * np.float32(scale), "F32")
    compiled, ordinary = two_models(args, weights, threads, exact=True)
    x = rng.standard_normal((1, sum(lengths), args.dim), dtype=np.float32)
    (y, cache), (expected, other) = run(compiled, x, lengths), run(ordinary, x, lengths)
    assert type(compiled.layers[0]) is FusedBlock
    assert_near(y, expected, LAYER_32)
    T = sum(lengths)
    assert_near(cache.k[0, 0, :, :T], other.k[0, 0, :, :T], LAYER_32)
    assert_near(cache.v[0, 0, :, :T], other.v[0, 0, :, :T], LAYER_32)
    numpy = Transformer(args, {key: w.dequantize() for key, w in weights.items()})
    assert_near(y, run(numpy, x, lengths)[0], LAYER_32)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
@pytest.mark.parametrize("window", [1, 30, 300])
def test_a_layer_with_a_sliding_window(isa, rng, window, dtype):
    """Beyond the window and the room of its cache: as the parts, in pieces that change no bit."""
    args = replace(SMALL, n_layers=1, head_dim=32, max_seq_len=1500, sliding_window=window)
    weights = mixed_weights(rng, args)
    compiled, ordinary = two_models(args, weights, 2, exact=True)
    x = rng.standard_normal((1, 1400, args.dim), dtype=np.float32)
    kind = QuantizedWindowKVCache if dtype == np.uint8 else WindowKVCache
    found = []
    for model, lengths in (
        (ordinary, [512, 512, 376]),
        (compiled, [512, 512, 376]),
        (compiled, [400, 500] * 2),
    ):
        cache, at, parts = kind(args, 1, 1500, np.float32 if dtype == np.uint8 else dtype), 0, []
        for T in lengths:
            chunk, angles = x[:, at : at + T], model.freqs_cis[at : at + T]
            parts.append(model.layers[0](chunk, at, angles[: chunk.shape[1]], cache))
            at += chunk.shape[1]
        assert cache.dropped[0] > 0
        found.append(np.concatenate(parts, axis=1))
    assert_near(found[1], found[0], LAYER_32 if dtype == np.float32 else 3e-2)
    np.testing.assert_array_equal(bits(found[2]), bits(found[1]))


@for_each
@given(configurations(), lengths, st.integers(1, 3), st.booleans(), seeds)
def test_in_fixed_point_too(isa, args, lengths, threads, half_split, seed):
    rng = np.random.default_rng(seed)
    compiled, ordinary = two_models(args, mixed_weights(rng, args, half_split), threads, exact=False)
    x = rng.standard_normal((1, sum(lengths), args.dim), dtype=np.float32)
    assert_near(run(compiled, x, lengths)[0], run(ordinary, x, lengths)[0], ROUNDED)


@for_each
@given(configurations(), lengths, seeds)
def test_a_cache_of_float16(isa, args, lengths, seed):
    """What is stored is what NumPy would store, but where a number lies between two float16."""
    rng = np.random.default_rng(seed)
    compiled, ordinary = two_models(args, mixed_weights(rng, args), 2, exact=True)
    x = rng.standard_normal((1, sum(lengths), args.dim), dtype=np.float32)
    y, cache = run(compiled, x, lengths, np.float16)
    expected, other = run(ordinary, x, lengths, np.float16)
    assert_near(y, expected, 4 * U16)
    T = sum(lengths)
    for mine, theirs in [
        (cache.k[0, 0, :, :T], other.k[0, 0, :, :T]),
        (cache.v[0, 0, :, :T], other.v[0, 0, :, :T]),
    ]:
        assert_near(mine, theirs.astype(np.float32), 2 * U16)
        assert (mine != theirs).mean() < 0.05


# Half a step of Q8_0, of a block's largest number; and rounding d to float16 moves it by 127 times 2^-11.
HALF_STEP = 1 / 254 + U16


@for_each
@given(configurations(32), lengths, st.sampled_from([1e-38, 1e-5, 1, 1e6]), seeds)
@example(SMALL, [1, 9, 1], 1, 0)
def test_a_cache_of_8_bits(isa, args, lengths, scale, seed):
    """What is stored is what NumPy makes of the same float32 numbers, bit for bit; small and large ones."""
    rng = np.random.default_rng(seed)
    weights = mixed_weights(rng, args)
    wv = weights["layers.0.attention.wv.weight"]
    weights["layers.0.attention.wv.weight"] = StoredTensor.quantize(
        wv.dequantize() * np.float32(scale), "F32"
    )
    compiled, ordinary = two_models(args, weights, 2, exact=True)
    x = rng.standard_normal((1, T := sum(lengths), args.dim), dtype=np.float32)
    in_float32 = run(compiled, x, lengths)[1]
    assume(max(np.abs(a[0, 0, :, :T]).max() for a in (in_float32.k, in_float32.v)) < 127 * MAX_F16)
    y, cache = run(compiled, x, lengths, np.uint8)
    assert type(compiled.layers[0]) is FusedBlock and compiled.layers[0].fuses(cache)
    for mine, theirs in [(cache.k, in_float32.k), (cache.v, in_float32.v)]:
        expected = quantize_q8_0(theirs[0, 0, :, :T].reshape(-1, args.head_dim))
        np.testing.assert_array_equal(mine[0, 0, :, :T].reshape(expected.shape), expected)
    assert_near(y, run(ordinary, x, lengths, np.uint8)[0], 3 * HALF_STEP)


few = settings(max_examples=max(for_each.max_examples // 4, 2))


@few
@given(
    configurations(32),
    st.lists(st.integers(1, 30), min_size=2, max_size=4),
    st.integers(1, 3),
    st.sampled_from([(1, 1 << 27), (3, 1 << 27), (2, 1000)]),
    seeds,
)
def test_a_batch_in_8_bits_is_each_sequence_alone(isa, args, starts, T, threads_and_work, seed):
    """As in float32, below; with any number of threads, and in short calls."""
    rng = np.random.default_rng(seed)
    weights, (threads, work) = mixed_weights(rng, args), threads_and_work
    model, other = (two_models(args, weights, n, exact=True)[0] for n in (2, threads))
    x = rng.standard_normal((len(starts), max(starts) + T, args.dim), dtype=np.float32)
    rows = list(zip(x, starts, strict=True))
    new = np.concatenate([one[None, n : n + T] for one, n in rows])
    angles = np.stack([model.freqs_cis[n : n + T] for n in starts])
    alone = [run(model, one[None], [n, T], np.uint8)[0][:, n : n + T] for one, n in rows]
    caches = [run(model, one[None], [n], np.uint8)[1] for one, n in rows]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "WORK_PER_CALL", work)
        y = other.layers[0](new, np.array(starts), angles, BatchCache(caches))
    np.testing.assert_array_equal(bits(y), bits(np.concatenate(alone)))


def test_caches_of_two_kinds_go_the_ordinary_way(rng):
    """C takes the format of all of them from the first."""
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    kinds = QuantizedKVCache(SMALL, 1, 6), KVCache(SMALL, 1, 6, np.float16), KVCache(SMALL, 1, 6)
    assert all(model.layers[0].fuses(one) for one in kinds)
    assert not any(model.layers[0].fuses(BatchCache(two)) for two in combinations(kinds, 2))


@for_each
@given(configurations(), lengths, st.booleans(), st.booleans(), seeds)
def test_threads_and_short_calls_never_change_a_bit(isa, args, lengths, exact, half_split, seed):
    rng = np.random.default_rng(seed)
    weights = mixed_weights(rng, args, half_split)
    x = rng.standard_normal((1, sum(lengths), args.dim), dtype=np.float32)
    results = []
    for threads, work in [(1, 1 << 27), (2, 1 << 27), (5, 1 << 27), (2, 1000), (3, 1 << 15)]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "WORK_PER_CALL", work)
            results.append(run(two_models(args, weights, threads, exact)[0], x, lengths)[0])
    for other in results[1:]:
        np.testing.assert_array_equal(bits(results[0]), bits(other))


@for_each
@given(configurations(), lengths, st.sampled_from([1 << 27, 1 << 15, 1000]), st.booleans(), seeds)
def test_layers_in_one_call_are_each_alone(isa, args, lengths, work, exact, seed):
    """To the bit, in calls of any length."""
    rng = np.random.default_rng(seed)
    model, _ = two_models(replace(args, n_layers=3), mixed_weights(rng, replace(args, n_layers=3)), 2, exact)
    x = rng.standard_normal((2, sum(lengths), args.dim), dtype=np.float32)
    caches = [KVCache(model.args, 2, CONTEXT) for _ in range(2)]
    at = 0
    for T in lengths:
        alone = x[:, at : at + T]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "WORK_PER_CALL", work)
            together = model.run_layers(alone, at, model.freqs_cis[at : at + T], caches[0])
        for layer in model.layers:
            alone = layer(alone, at, model.freqs_cis[at : at + T], caches[1])
        np.testing.assert_array_equal(bits(together), bits(alone))
        at += T
    assert caches[0].filled == caches[1].filled == [at] * 3
    for mine, theirs in zip((caches[0].k, caches[0].v), (caches[1].k, caches[1].v), strict=True):
        np.testing.assert_array_equal(bits(mine[..., :at, :]), bits(theirs[..., :at, :]))


def test_a_pass_is_one_call(rng, monkeypatch):
    """A layer with an exchanged part, or of another size, has a call of its own."""
    args = replace(SMALL, n_layers=5)
    model, _ = two_models(args, mixed_weights(rng, args), 2, exact=False)
    wide, _ = two_models(
        *(lambda a: (a, mixed_weights(rng, a)))(replace(args, hidden_dim=96)), 2, exact=False
    )
    calls, layers = [], Kernels.layers
    monkeypatch.setattr(Kernels, "layers", lambda k, w, *rest: calls.append(len(w)) or layers(k, w, *rest))
    other = model.layers[1].attention.wq
    for parts, expected in [
        ({}, [5]),
        ({"layers.1.attention.wq": lambda x: other(x)}, [1, 3]),
        ({"layers.3": wide.layers[3]}, [3, 1, 1]),
        ({"layers.2": lambda h, *rest: h}, [2, 2]),
    ]:
        calls.clear()
        model.with_parts(parts).hidden([[1, 2, 3]])
        assert calls == expected


def test_a_gate_far_below_zero_is_shut(isa, rng):
    """silu(-1e36) is -0: with nothing from attention either, y is x."""
    weights = mixed_weights(rng, SMALL)
    D, hidden = SMALL.dim, SMALL.hidden_dim
    for name, shape, value in [
        ("attention.wo", (D, SMALL.n_heads * SMALL.head_dim), 0),
        ("ffn_norm", (D,), 1),
        ("feed_forward.w_gate", (hidden, D), -1e36 / D),
        ("feed_forward.w_up", (hidden, D), 1),
        ("feed_forward.w_down", (D, hidden), 1),
    ]:
        weights[f"layers.0.{name}.weight"] = StoredTensor.quantize(np.full(shape, value, np.float32), "F32")
    x = np.ones((1, 2, D), np.float32)
    np.testing.assert_array_equal(run(two_models(SMALL, weights, 2, exact=True)[0], x, [2])[0], x)


def in_q8_0(x: np.ndarray) -> np.ndarray:
    return quantize_q8_0(x.reshape(-1, x.shape[-1])).reshape(*x.shape[:-1], -1)


@pytest.mark.parametrize("at_end", [True, False])
@pytest.mark.parametrize("exact", [True, False])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_a_layer_touches_nothing_beside_its_arrays(isa, dtype, exact, at_end, rng):
    for T, start, head_dim, half_split in [(1, 0, 32, False), (3, 5, 40, True), (6, 2, 16, False)]:
        head_dim = -(-head_dim // QK) * QK if dtype == np.uint8 else head_dim
        args = replace(SMALL, n_heads=4, head_dim=head_dim)
        weights = mixed_weights(rng, args, half_split)
        guarded, chosen = Guarded(), Kernels(2, exact)

        def guard(w, guarded=guarded):
            data = guarded.copy(w.data, at_end)
            return w.dequantize() if len(w.shape) == 1 else StoredTensor(w.format, w.shape, data, w.row_order)

        weights = {key: guard(w) for key, w in weights.items()}
        model = Transformer(args, {k: KernelWeight(w) if isinstance(w, StoredTensor) else w
                                   for k, w in weights.items()}, chosen.linear, chosen.attention)  # fmt: skip
        layer = fused_weights(model.layers[0], chosen)
        norms = [guarded.copy(norm, at_end) for norm in layer.kept[1]]
        layer.struct.attention_norm, layer.struct.ffn_norm = (ffi.from_buffer("float[]", n) for n in norms)
        x = rng.standard_normal((1, T, args.dim), dtype=np.float32)
        caches = [rng.standard_normal((2, start + T, head_dim), dtype=np.float32) for _ in "kv"]
        caches = [in_q8_0(cache) if dtype == np.uint8 else cache.astype(dtype) for cache in caches]
        angles = model.freqs_cis[start : start + T]
        expected = chosen.layers([layer], x, [start], angles, *([cache[None].copy()] for cache in caches))
        arrays = np.full_like(x, np.nan), x, np.ascontiguousarray(angles, np.complex64), *caches
        scratch = np.zeros(lib.nl_layers_bytes(layer.struct, ffi.NULL, T), np.uint8)
        y, x, angles, k, v, scratch = (guarded.copy(a, at_end) for a in (*arrays, scratch))
        y_, x_, angles_, k_, v_, scratch_ = (
            ffi.cast("void *", a.ctypes.data) for a in (y, x, angles, k, v, scratch)
        )
        pointers = ffi.new("void *[]", [k_]), ffi.new("void *[]", [v_])
        head_stride, starts = ffi.new("int64_t[]", [(start + T) * head_dim]), ffi.new("int64_t[]", [start])
        structs = ffi.new("nl_layer_weights *[]", [layer.struct])
        layer_stride, dropped = ffi.new("int64_t[1]"), ffi.new("int64_t[1]")
        code = FORMATS[kernels.CACHED[np.dtype(dtype)]].code
        arguments = ffi.new("nl_layers_args *")
        arguments.y, arguments.x, arguments.freqs_cis = y_, x_, angles_
        arguments.weights, arguments.scratch, arguments.B, arguments.T = structs, scratch_, 1, T
        arguments.cache = [*pointers, code, head_dim, head_stride, layer_stride, starts, dropped]
        status = lib.nl_layers(arguments, 0, lib.NL_STEPS, 0, 1, 2)
        assert status == 0
        np.testing.assert_array_equal(bits(y), bits(expected))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.uint8])
def test_what_is_not_finite_stays_so(isa, rng, dtype):
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=True)
    x = rng.standard_normal((1, 3, SMALL.dim), dtype=np.float32)
    for bad in (np.nan, np.inf):
        x[0, 1, 5] = bad
        y, _ = run(model, x, [3], dtype)
        assert np.isfinite(y[0, 0]).all() and not np.isfinite(y[0, 1]).any()


def test_the_cache_refuses_what_it_always_refused(rng):
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    layer, x = model.layers[1], rng.standard_normal((1, 4, SMALL.dim), dtype=np.float32)
    cache = KVCache(SMALL, 1, 6)
    layer(x, 0, model.freqs_cis[:4], cache)
    k, v = cache.k.copy(), cache.v.copy()
    with pytest.raises(ContextOverflowError, match=r"positions 4\.\.7 do not fit a cache of 6"):
        layer(x, 4, model.freqs_cis[4:8], cache)
    with pytest.raises(ContextOverflowError):
        layer(x, -1, model.freqs_cis[:4], cache)
    with pytest.raises(ParameterError, match="position 5 comes after 4 stored ones: a gap"):
        layer(x[:, :1], 5, model.freqs_cis[5:6], cache)
    with pytest.raises(ParameterError, match="1 sequences do not fit a cache for 2"):
        layer(x, 0, model.freqs_cis[:4], KVCache(SMALL, 2, 6))
    assert cache.filled == [0, 4]
    np.testing.assert_array_equal(cache.k, k)
    np.testing.assert_array_equal(cache.v, v)


@pytest.mark.parametrize("name", ["wk", "wv"])
@pytest.mark.parametrize(
    "kind, dtype, scale", [(KVCache, np.float16, 1e8), (QuantizedKVCache, np.float32, 1e9)]
)
def test_what_float16_cannot_hold_is_refused(isa, rng, name, kind, dtype, scale):
    """The number itself, or a scale of Q8_0, which is a number by 127."""
    weights = mixed_weights(rng, SMALL)
    key = f"layers.0.attention.{name}.weight"
    weights[key] = StoredTensor.quantize(weights[key].dequantize() * np.float32(scale), "F32")
    model, _ = two_models(SMALL, weights, 2, exact=False)
    cache = kind(SMALL, 1, 6, dtype)
    with pytest.raises(NumericsError, match=r"layer 0, positions 0\.\.2"):
        model.layers[0](
            rng.standard_normal((1, 3, SMALL.dim), dtype=np.float32), 0, model.freqs_cis[:3], cache
        )
    assert cache.filled == [0, 0]


def test_the_layer_is_named_that_float16_cannot_hold(isa, rng):
    """Of a pass that is one call."""
    weights, key = mixed_weights(rng, SMALL), "layers.1.attention.wv.weight"
    weights[key] = StoredTensor.quantize(weights[key].dequantize() * np.float32(1e6), "F32")
    model, cache = two_models(SMALL, weights, 2, exact=False)[0], KVCache(SMALL, 1, 6, np.float16)
    with pytest.raises(NumericsError, match=r"layer 1, positions 0\.\.2"):
        model.hidden([[1, 2, 3]], 0, cache)
    assert cache.filled == [3, 0]


def test_a_cache_that_is_only_an_interface_runs_the_parts(rng):
    class Other:
        def __init__(self, cache):
            self.update = cache.update

    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=True)
    expected = model.hidden([[1, 2, 3]], 0, KVCache(SMALL, 1, 6))
    assert_near(model.hidden([[1, 2, 3]], 0, Other(KVCache(SMALL, 1, 6))), expected, LAYER_32)


@pytest.mark.parametrize("change", [{"n_layers": 1}, {"n_kv_heads": 1}, {"head_dim": 16}])
def test_a_cache_of_another_model_is_refused(rng, change):
    """Before C is called, which would write beyond it."""
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    with pytest.raises(MismatchError, match="a cache of"):
        model.hidden([[1, 2, 3]], 0, KVCache(replace(SMALL, **change), 1, 6))


@pytest.mark.parametrize("B, T", [(1, 0), (0, 2)])
def test_no_token_is_refused(rng, B, T):
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    with pytest.raises(ParameterError, match="there is no token"):
        model.run_layers(
            np.zeros((B, T, SMALL.dim), np.float32), 0, model.freqs_cis[:T], KVCache(SMALL, B, 6)
        )


@for_each
@given(configurations(), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.integers(1, 3), seeds)
def test_a_batch_is_each_sequence_alone(isa, args, starts, T, seed):
    """Ragged or all of one length, to the bit: in exact mode a row among others is the row alone."""
    rng = np.random.default_rng(seed)
    model, ordinary = two_models(args, mixed_weights(rng, args), 2, exact=True)
    x = rng.standard_normal((len(starts), max(starts) + T, args.dim), dtype=np.float32)
    alone = np.concatenate(
        [run(model, one[None], [n, T])[0][:, n : n + T] for one, n in zip(x, starts, strict=True)]
    )
    caches = [run(model, one[None], [n])[1] for one, n in zip(x, starts, strict=True)]
    new = np.concatenate([one[None, n : n + T] for one, n in zip(x, starts, strict=True)])
    angles = np.stack([model.freqs_cis[n : n + T] for n in starts])
    y = model.layers[0](new, np.array(starts), angles, BatchCache(caches))
    np.testing.assert_array_equal(bits(y), bits(alone))
    assert [cache.filled[0] for cache in caches] == [n + T for n in starts]
    together, apart = KVCache(args, len(x), CONTEXT), [KVCache(args, 1, CONTEXT) for _ in x]
    y = model.layers[0](x, 0, model.freqs_cis[: x.shape[1]], together)
    for b, cache in enumerate(apart):
        one = model.layers[0](x[[b]], 0, model.freqs_cis[: x.shape[1]], cache)
        np.testing.assert_array_equal(bits(y[[b]]), bits(one))
    assert_near(y, ordinary.layers[0](x, 0, model.freqs_cis[: x.shape[1]], together), LAYER_32)


def test_a_batch_is_checked_like_each_alone(rng):
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    caches = BatchCache([KVCache(SMALL, 1, 6), KVCache(SMALL, 1, 3)])
    tokens = rng.integers(0, SMALL.vocab_size, (2, 2))
    with pytest.raises(ParameterError, match="position 1 comes after 0 stored ones: a gap"):
        side_by_side(model, caches).hidden(tokens, np.array([0, 1]), caches)
    with pytest.raises(ContextOverflowError, match=r"positions 2\.\.3 do not fit a cache of 3"):
        side_by_side(model, caches).hidden(tokens, np.array([0, 2]), caches)
    assert [cache.filled for cache in caches.caches] == [[0, 0], [0, 0]]


def filled_caches(model, tokens) -> list[KVCache]:
    caches = [KVCache(SMALL, 1, 8, np.float16) for _ in tokens]
    for row, cache in zip(tokens, caches, strict=True):
        model.hidden(row[None], 0, cache)
    assert [cache.filled for cache in caches] == [[tokens.shape[1]] * 2] * len(tokens)
    return caches


def test_rewound_caches_count_no_position_behind(rng):
    """One alone and several side by side: what lies behind the last update is stored no longer."""
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    tokens, starts = rng.integers(0, SMALL.vocab_size, (5, 6)), [4, 0, 2, 5, 1]
    caches = filled_caches(model, tokens)
    model.hidden(tokens[:1, :1], starts[0], caches[0])
    others = BatchCache(caches[1:])
    side_by_side(model, others).hidden(tokens[1:, :1], np.array(starts[1:]), others)
    assert [cache.filled for cache in caches] == [[start + 1] * 2 for start in starts]
    for cache, start in zip(caches, starts, strict=True):
        with pytest.raises(ParameterError, match=f"position {start + 2} comes after {start + 1} stored"):
            model.hidden(tokens[:1, :1], start + 2, cache)


def test_an_interrupted_call_counts_nothing(rng, monkeypatch):
    """C may have written some of it: the positions from its start on are stored no longer."""
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    caches = filled_caches(model, rng.integers(0, SMALL.vocab_size, (5, 6)))

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Kernels, "layers", interrupt)
    x = np.zeros((4, 1, SMALL.dim), np.float32)
    with pytest.raises(KeyboardInterrupt):
        model.layers[1](x[:1], 4, model.freqs_cis[:1], caches[0])
    with pytest.raises(KeyboardInterrupt):
        model.layers[0](x, np.array([0, 2, 5, 6]), model.freqs_cis[:4, None], BatchCache(caches[1:]))
    assert [cache.filled for cache in caches] == [[6, 4], [0, 6], [2, 6], [5, 6], [6, 6]]
    with pytest.raises(KeyboardInterrupt):
        model.hidden([[1]], 3, caches[4])
    assert caches[4].filled == [3, 3]


def test_what_does_not_fit_is_refused(rng):
    """Before C is called, which would read and write beyond it."""
    model, _ = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    layer, x = model.layers[0], rng.standard_normal((3, 2, SMALL.dim), dtype=np.float32)
    with pytest.raises(ValueError):
        layer(x, np.array([0, 0]), model.freqs_cis[:2], BatchCache([KVCache(SMALL, 1, 6) for _ in range(2)]))
    with pytest.raises(MismatchError, match="freqs_cis"):
        layer(x, 0, model.freqs_cis[:1], KVCache(SMALL, 3, 6))
    with pytest.raises(MismatchError, match="do not fit the layer"):
        layer(x[..., :-1], 0, model.freqs_cis[:2], KVCache(SMALL, 3, 6))
    with pytest.raises(MismatchError, match="3 sequences, 1 starts"):
        model.layers[0].kernels.layers(
            [layer.weights], x, [0], model.freqs_cis[:2], *KVCache(SMALL, 3, 6).k[:, :1, None]
        )


def test_a_cache_of_float64_goes_the_ordinary_way(rng):
    compiled, ordinary = two_models(SMALL, mixed_weights(rng, SMALL), 2, exact=False)
    tokens = rng.integers(0, SMALL.vocab_size, (1, 5))
    double = [model.hidden(tokens, 0, KVCache(SMALL, 1, 6, np.float64)) for model in (compiled, ordinary)]
    np.testing.assert_array_equal(double[0], double[1])


@pytest.mark.parametrize("odd", [{"dim": 40}, {"hidden_dim": 33}, {"head_dim": 10}, {"head_dim": 288}])
def test_sizes_that_c_does_not_take_stay_ordinary(rng, odd):
    args = replace(SMALL, **odd)
    model, _ = two_models(args, mixed_weights(rng, args), 1, exact=False)
    assert all(type(layer) is TransformerBlock for layer in model.layers)


def test_two_python_threads_may_use_one_model(rng):
    model, _ = two_models(
        replace(SMALL, dim=256), mixed_weights(rng, replace(SMALL, dim=256)), 2, exact=False
    )
    x = rng.standard_normal((4, 1, 48, 256), dtype=np.float32)
    alone, together = [run(model, one, [48])[0] for one in x], {}

    def often(i):
        together[i] = [run(model, x[i], [48])[0] for _ in range(30)]

    threads = [threading.Thread(target=often, args=(i,)) for i in range(len(x))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, one in enumerate(alone):
        for other in together[i]:
            np.testing.assert_array_equal(bits(one), bits(other))


def test_the_c_backend_is_built_of_such_layers(rng):
    weights = mixed_weights(rng, SMALL)
    assert {type(layer) for layer in build(SMALL, weights).layers} == {FusedBlock}
    assert {type(layer) for layer in build(SMALL, weights, backend="numpy").layers} == {TransformerBlock}


def half_split_rows(w: StoredTensor, args: ModelArgs) -> StoredTensor:
    """The same numbers as rows in the order of Hugging Face: first the first halves of all pairs."""
    heads = np.arange(len(w)).reshape(-1, 2, args.head_dim // 2).swapaxes(1, 2)
    return StoredTensor(w.format, w.shape, w.data, heads.reshape(-1))


class Together:
    """A gather among threads of this process, which stand for ranks."""

    def __init__(self, ranks: int):
        self.memories, self.barrier = [None] * ranks, threading.Barrier(ranks, timeout=60)

    def gather(self, rank: int, memory: np.ndarray, nbytes: list[int]) -> None:
        self.memories[rank] = memory
        self.barrier.wait()
        ends = np.cumsum([0, *nbytes])
        for other, (begin, end) in enumerate(pairwise(ends)):
            if other != rank:
                memory[begin:end] = self.memories[other][begin:end]
        self.barrier.wait()


class GuardedCut(Cut):
    """A Cut whose memory ends at a page that may not be touched, and has no byte too much."""

    def for_tokens(self, w, tokens: int):
        self.guarded = Guarded()
        self.memory = self.guarded.copy(np.zeros(lib.nl_exchange_bytes(w.struct, tokens), np.uint8), True)
        self.struct.exchange = ffi.cast("void *", self.memory.ctypes.data)
        return self.struct


def on_ranks(args: ModelArgs, weights, shares, how, x, lengths, dtype) -> list[tuple[np.ndarray, KVCache]]:
    """The layers on ranks, in chunks of these lengths: of each rank the result, and its cache."""
    plan, together, done = Plan.of(args, shares), Together(len(shares)), {}
    angles = Transformer(args, {name: w.dequantize() for name, w in weights.items()}).freqs_cis

    def one(rank: int) -> None:
        try:
            local, chosen = plan.local_args(rank), Kernels(*how)
            packed = {
                name: w.dequantize() if len(w.shape) == 1 else KernelWeight(w)
                for name, w in plan.weights(weights, rank).items()
            }
            model = Transformer(local, packed, chosen.linear, chosen.attention)
            heads = [n * args.head_dim for n in widths(plan.heads)]
            three = heads, widths(plan.dim), widths(plan.hidden_dim)
            cut = GuardedCut(rank, *three, partial(together.gather, rank))
            layers = [fused_weights(layer, chosen) for layer in model.layers]
            cache, at, parts = KVCache(local, 1, CONTEXT, dtype), 0, []
            for T in lengths:
                kv = [cache.k[:, 0], cache.v[:, 0]]
                chunk = x[:, at : at + T]
                parts.append(
                    cut.layers(chosen, layers, chunk, [at], angles[at : at + T], *([one] for one in kv))
                )
                at += T
            done[rank] = np.concatenate(parts, axis=1), cache
        except BaseException:
            together.barrier.abort()
            raise

    threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(shares))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [done[rank] for rank in range(len(shares))]


@for_each
@given(
    configurations(),
    lengths,
    st.lists(st.integers(1, 9), min_size=1, max_size=4),
    st.sampled_from([(1, False), (2, False), (1, False, 15), (1, True)]),
    st.booleans(),
    seeds,
)
@example(SMALL, [13, 1, 1], [1, 1, 1], (2, False), True, 0)
@example(replace(SMALL, n_heads=4, n_kv_heads=1, head_dim=40), [9, 2], [1, 3], (1, False), False, 1)
def test_layers_on_ranks_have_the_bits_of_whole_ones(isa, args, lengths, shares, how, half_split, seed):
    """Any shares; heads that are no whole blocks, so that they are sent in float32; a rank without rows."""
    rng = np.random.default_rng(seed)
    args, shares = replace(args, n_layers=2), shares[: args.n_heads]
    weights = mixed_weights(rng, args, half_split=False)
    if half_split:  # the order of rows is that of Hugging Face: within heads
        weights = {
            name: half_split_rows(w, args) if name.endswith(("wq.weight", "wk.weight")) else w
            for name, w in weights.items()
        }
    x = rng.standard_normal((1, sum(lengths), args.dim), dtype=np.float32)
    packed = {key: w.dequantize() if len(w.shape) == 1 else KernelWeight(w) for key, w in weights.items()}
    chosen = Kernels(*how)
    model = Transformer(args, packed, chosen.linear, chosen.attention)
    layers = [fused_weights(layer, chosen) for layer in model.layers]
    dtype = np.float32 if how[1] else np.float16
    cache, at, parts = KVCache(args, 1, CONTEXT, dtype), 0, []
    for T in lengths:
        angles, kv = model.freqs_cis[at : at + T], ([cache.k[:, 0]], [cache.v[:, 0]])
        parts.append(chosen.layers(layers, x[:, at : at + T], [at], angles, *kv))
        at += T
    expected, plan = np.concatenate(parts, axis=1), Plan.of(args, shares)
    for rank, (y, local) in enumerate(on_ranks(args, weights, shares, how, x, lengths, dtype)):
        np.testing.assert_array_equal(bits(y), bits(expected))
        for mine, whole in ((local.k, cache.k), (local.v, cache.v)):
            of_heads = whole[:, :, plan.kv_heads[rank], :at]
            np.testing.assert_array_equal(mine[:, :, :, :at].view(np.uint8), of_heads.copy().view(np.uint8))
