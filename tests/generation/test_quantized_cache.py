"""The KV cache of 8 bits: its numbers, sessions, batches, traces and memory, on both backends."""

import copy
import pickle
from dataclasses import replace

import numpy as np
import pytest
from helpers.command_line import assert_refused, run
from helpers.tiny_models import LOOKED_INTO as ARGS
from helpers.tiny_models import float_weights, stored, write_speaker, write_tiny

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.backend.formats import StoredTensor, dequantize_q8_0
from numpy_llama.backend.quantized_cache import QuantizedKVCache
from numpy_llama.checkpoint.memory import memory_plan
from numpy_llama.errors import ContextOverflowError, NumericsError, ParameterError, UnsupportedError
from numpy_llama.inspect import bench

PER_POSITION = 2 * ARGS.n_layers * ARGS.n_kv_heads * ARGS.head_dim  # numbers
PROMPT = "The sea is blue"


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_tiny(tmp_path_factory.mktemp("q8") / "m.gguf")


@pytest.fixture(scope="module", params=["c", "numpy"])
def llama(request, path):
    return nl.load(path, backend=request.param, cache_dtype="q8")


def keys_and_values(rng, T, scale=1.0):
    return scale * rng.standard_normal((2, 1, T, ARGS.n_kv_heads, ARGS.head_dim), dtype=np.float32)


def rounded(x):
    """By the definition of the format, a row at a time."""
    return StoredTensor.quantize(x.reshape(-1, x.shape[-1]), "Q8_0").dequantize().reshape(x.shape)


def test_update_returns_the_rounded_numbers(rng):
    new, cache = keys_and_values(rng, 9), QuantizedKVCache(ARGS, 1, 9)
    cache.update(1, 0, *new[:, :, :4])
    keys, values = cache.update(1, 4, *new[:, :, 4:])
    assert keys.dtype == np.float32 and cache.filled == [0, 9, 0]
    np.testing.assert_array_equal(keys, rounded(new[0]))
    np.testing.assert_array_equal(values, rounded(new[1]))
    in_double = QuantizedKVCache(ARGS, 1, 9, np.float64).update(1, 0, *new)
    assert in_double[0].dtype == np.float64
    np.testing.assert_array_equal(in_double, np.stack([keys, values]))
    for empty in (QuantizedKVCache(ARGS, 0, 9).update(0, 0, *new[:, :0]), cache.update(1, 0, *new[:, :, :0])):
        assert empty[0].size == empty[1].size == 0


def test_update_refuses_what_a_cache_refuses(rng):
    new, cache = keys_and_values(rng, 3), QuantizedKVCache(ARGS, 1, 4)
    with pytest.raises(ContextOverflowError, match=r"positions 2\.\.4 do not fit a cache of 4"):
        cache.update(0, 2, *new)
    with pytest.raises(ParameterError, match="position 1 comes after 0 stored ones: a gap"):
        cache.update(0, 1, *new)
    assert cache.filled == [0, 0, 0]


@pytest.mark.parametrize("which", [0, 1])
def test_a_scale_beyond_float16_is_refused(rng, which):
    new, cache = keys_and_values(rng, 3), QuantizedKVCache(ARGS, 1, 7)
    new[which, 0, 1, 0, 0] = -8.32e6  # by 127 it is rounded to 65504
    cache.update(1, 0, *new)
    new[which, 0, 1, 0, 0] = -8.33e6
    with pytest.raises(
        NumericsError, match=r"layer 1, positions 3\.\.5: .* 8\.33e\+06, is beyond 8\.31901e\+06"
    ):
        cache.update(1, 3, *new)
    assert cache.filled[1] == 3


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_spoils_its_block_alone(rng, bad):
    new = keys_and_values(rng, 3)
    new[0, 0, 1, 0, 7] = bad
    keys, values = QuantizedKVCache(ARGS, 1, 7).update(0, 0, *new)
    assert np.isnan(keys[0, 1, 0]).all() and np.isnan(keys).sum() == 32 and np.isfinite(values).all()


def test_each_model_makes_such_caches(llama):
    cache = llama.model.new_cache(2, 10)
    assert type(cache) is QuantizedKVCache and cache.k.shape == (3, 2, ARGS.n_kv_heads, 10, 34)
    others = llama.model.with_parts({"layers": list(llama.model.layers[:2])})
    assert others.new_cache(1, 10).k.shape[0] == 2


def test_logits_are_near_those_of_the_whole_numbers(path, llama):
    """Far nearer than 8 bits would be by chance, and not equal."""
    ids = np.array([llama.tokenizer.encode(PROMPT)])
    exact = nl.load(path, backend="numpy").model(ids)
    found = llama.model(ids)
    error = np.abs(found - exact).max() / np.abs(exact).max()
    assert 1e-6 < error < 0.05


def test_the_backends_agree(path):
    ids = np.array([[7, 50, 200, 3, 90, 41, 18, 33, 250, 6, 1, 2]])
    made = [
        build(ARGS, stored(float_weights(ARGS), "F32"), backend=b, cache_dtype="q8") for b in ("c", "numpy")
    ]
    caches = [model.new_cache(1, 12) for model in made]
    logits = [np.concatenate([m(ids[:, :9], 0, c), m(ids[:, 9:10], 9, c), m(ids[:, 10:], 10, c)], axis=1)
              for m, c in zip(made, caches, strict=True)]  # fmt: skip
    assert np.abs(logits[0] - logits[1]).max() < 0.01 * np.abs(logits[1]).max()
    assert (caches[0].k[0] != caches[1].k[0]).mean() < 0.01  # a number between two steps may go either way


def test_a_session_rewinds_and_is_copied(llama):
    fresh = [llama.generate(text, max_tokens=6).tokens for text in (PROMPT, PROMPT[:9] + " was red")]
    session = llama.new_session(64)
    found = [llama.generate(PROMPT, max_tokens=6, session=session).tokens]
    twin = copy.deepcopy(session)
    found.append(llama.generate(PROMPT[:9] + " was red", max_tokens=6, session=session).tokens)
    assert found == fresh
    for other in (twin, pickle.loads(pickle.dumps(twin))):
        assert llama.generate(PROMPT, max_tokens=6, session=other).tokens == fresh[0]


def test_a_session_of_another_size_is_refused(llama, path):
    wider = replace(ARGS, head_dim=64)
    other = build(wider, stored(float_weights(wider), "F32"), backend="numpy", cache_dtype="q8")
    with pytest.raises(
        ParameterError, match=r"\(n_layers, n_kv_heads, head_dim\) = \(3, 2, 64\), .* \(3, 2, 32\)"
    ):
        llama.generate(PROMPT, max_tokens=1, session=pickle.loads(pickle.dumps(nl.Session(other, 64))))


def test_a_batch_gets_what_each_gets_alone(llama):
    prompts = [PROMPT, "a", "Once upon a time there was"]
    together = llama.generate_batch(prompts, max_tokens=7)
    assert [one.tokens for one in together] == [llama.generate(p, max_tokens=7).tokens for p in prompts]


def test_a_trace_has_the_numbers_as_stored(llama):
    ids = np.array([llama.tokenizer.encode(PROMPT)])
    with nl.trace(llama, "layers.*.attention.k") as seen:
        cache = llama.model.new_cache(1, ids.shape[1])
        llama.model(ids, 0, cache)
    rows = np.ascontiguousarray(cache.k[1, 0].swapaxes(0, 1))
    expected = dequantize_q8_0(rows.reshape(-1, 34)).reshape(1, ids.shape[1], ARGS.n_kv_heads, 32)
    np.testing.assert_array_equal(seen["layers.1.attention.k"], expected)


@pytest.mark.parametrize("backend", ["c", "numpy"])
def test_the_memory_of_a_position(backend):
    weights = stored(float_weights(ARGS))
    plan = memory_plan(ARGS, weights, backend, cache_dtype="q8")
    assert plan.kv_per_position == PER_POSITION * 34 // 32
    usual = memory_plan(ARGS, weights, backend).kv_per_position
    assert usual == PER_POSITION * (2 if backend == "c" else 4)
    model = build(ARGS, weights, backend=backend, cache_dtype="q8")
    task, machine = bench.Task("tg", 2, depth=5), bench.Machine(1)
    weights_read = sum(bench.stored(linear).nbytes for linear in bench.matrices(model))
    found = bench.measure(model, task, machine, 1).cost.nbytes - 2 * weights_read
    assert found == plan.kv_per_position * (6 + 7)


def test_what_cannot_be_is_refused(path, tmp_path):
    with pytest.raises(ParameterError, match="cache_dtype is 'q4', it must be None or 'q8'"):
        nl.load(path, cache_dtype="q4")
    for backend in ("c", "numpy"):
        with pytest.raises(
            ParameterError, match="cache_dtype is 'q8', but exact keeps keys and values in float32"
        ):
            nl.load(path, backend=backend, exact=True, cache_dtype="q8")
        with pytest.raises(
            UnsupportedError, match="head_dim is 16, a cache in q8 needs a multiple of 32: leave"
        ):
            nl.load(write_speaker(tmp_path / "m.gguf"), backend=backend, cache_dtype="q8")


def test_the_command_line_has_it(path, tmp_path):
    command = ["generate", "-m", str(path), "-n", "6", PROMPT, "--cache-dtype"]
    expected = nl.load(path, cache_dtype="q8").generate(PROMPT, max_tokens=6).text
    done = run(*command, "q8")
    assert (done.returncode, done.stderr) == (0, b"") and done.stdout.decode().rstrip(
        "\n"
    ) == expected.rstrip("\n")
    assert_refused(run(*command, "q8", "--exact"), 2, "cache_dtype is 'q8', but exact keeps")
    assert_refused(run(*command, "q4"), 2, "--cache-dtype", "q8")
