"""Meta's folders: however a model is cut and stored, weights and logits are those that were written."""

import json
import os
import shutil
import time
import tracemalloc
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.torch_writer import meta_params, write_meta
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama import errors
from numpy_llama.backend import build
from numpy_llama.checkpoint.files import MappedFile
from numpy_llama.checkpoint.json_file import JsonFile
from numpy_llama.checkpoint.meta import MetaCheckpoint, model_args
from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.proof import torch_ops
from numpy_llama.proof.bounds import MODEL_32, assert_near
from numpy_llama.proof.tiny import GENERATIONS, TINY, random_tokens, random_weights
from numpy_llama.rope import Llama3Scaling

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Every axis that is cut has 8 parts.
ARGS = replace(TINY, dim=32, n_heads=8, n_kv_heads=8, head_dim=4, hidden_dim=48, vocab_size=56)
GROUPED = replace(ARGS, n_heads=16, head_dim=2)
ARGS_FAST_SECONDS = 0.1


def written(w: np.ndarray, dtype: torch.dtype) -> bytes:
    return torch.from_numpy(np.ascontiguousarray(w)).to(dtype).view(torch.uint8).numpy().tobytes()


@given(
    args=st.sampled_from([ARGS, GROUPED]),
    n_shards=st.sampled_from([1, 2, 4, 8]),
    format=st.sampled_from(sorted(DTYPES)),
    embedding_axis=st.sampled_from([0, 1]),
    zip=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_weights_are_those_that_were_cut(tmp_path_factory, args, n_shards, format, embedding_axis, zip, seed):
    weights = random_weights(np.random.default_rng(seed), args, np.float32)
    folder = tmp_path_factory.mktemp("meta")
    write_meta(folder, args, weights, n_shards, DTYPES[format], embedding_axis, zip)
    checkpoint = MetaCheckpoint(folder)
    assert checkpoint.args == args
    found = checkpoint.weights()
    assert found.keys() == weights.keys()
    names = tensor_names(args, "meta")
    for name, w in weights.items():
        assert (found[name].format.name, found[name].shape) == (format, w.shape)
        assert found[name].data.tobytes() == written(w, DTYPES[format]), name
        info = checkpoint.tensors[names[name]]
        assert (info.type_name, info.shape, info.nbytes) == (format, w.shape, found[name].nbytes)
        if n_shards == 1 and zip:
            assert found[name].in_place and not found[name].data.flags.owndata  # nothing was copied
    assert len(checkpoint.files) == n_shards
    checkpoint.check_unchanged()


@pytest.mark.parametrize("n_shards", [1, 2])
@pytest.mark.parametrize("before", ["", "attention."])
def test_names_as_torch_compile_writes_them(before, n_shards, tmp_path, rng):
    """_orig_mod. at the beginning of every name, or before the compiled parts."""
    weights = random_weights(rng, ARGS, np.float32)
    write_meta(tmp_path, ARGS, weights, n_shards)
    for path in tmp_path.glob("*.pth"):
        state = torch.load(path)
        renamed = {
            name.replace(before, f"_orig_mod.{before}") if before else f"_orig_mod.{name}": x
            for name, x in state.items()
        }
        torch.save(renamed, path)
    checkpoint = MetaCheckpoint(tmp_path)
    assert checkpoint.args == ARGS
    for name, w in checkpoint.weights().items():
        np.testing.assert_array_equal(w.dequantize(), weights[name])
    for path in tmp_path.glob("*.pth"):
        torch.save(torch.load(path) | state, path)
    with pytest.raises(errors.MismatchError, match=r"has .*_orig_mod\..* and .*; wanted one of them"):
        MetaCheckpoint(tmp_path).weights()


@pytest.mark.parametrize("n_shards", [1, 2, 4, 8])
@pytest.mark.parametrize("generation", ["llama1", "llama2", "llama2-70b", "llama3"])
def test_logits_as_torch(tmp_path, rng, generation, n_shards):
    base = GROUPED if generation in ("llama2-70b", "llama3") else ARGS
    same = {key: getattr(GENERATIONS[generation], key) for key in ("norm_eps", "rope_theta")}
    args = replace(base, **same)
    weights = random_weights(rng, args, np.float32)
    axis = 0 if generation == "llama3" else 1
    checkpoint = MetaCheckpoint(write_meta(tmp_path / "x", args, weights, n_shards, embedding_axis=axis))
    tokens = random_tokens(rng, args)
    expected = torch_ops.Transformer(args, weights)(tokens)
    for backend in ("numpy", "c"):
        model = build(checkpoint.args, checkpoint.weights(), backend=backend, exact=True)
        assert_near(model(tokens), expected, MODEL_32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_scaled_rope(tmp_path, rng, factor):
    args = replace(GROUPED, rope_theta=5e5, rope_scaling=Llama3Scaling(factor))
    weights = random_weights(rng, args, np.float32)
    folder = write_meta(tmp_path, args, weights, use_scaled_rope=True, rope_scaling_factor=factor)
    checkpoint = MetaCheckpoint(folder)
    assert checkpoint.args == args
    tokens = random_tokens(rng, args)
    model = build(checkpoint.args, checkpoint.weights(), backend="numpy")
    assert_near(model(tokens), torch_ops.Transformer(args, weights)(tokens), MODEL_32)


def test_weights_are_joined_one_at_a_time(tmp_path, rng, monkeypatch):
    """Opening and asking for all weights takes no memory of their size; the parts of one are let go of."""
    args = replace(ARGS, dim=512, head_dim=64, hidden_dim=1024, vocab_size=2048)
    weights = random_weights(rng, args, np.float32)
    folder = write_meta(tmp_path, args, weights, 4)
    del weights
    forgotten = []
    monkeypatch.setattr(MappedFile, "forget", lambda file, start, nbytes: forgotten.append(nbytes))
    tracemalloc.start()
    checkpoint = MetaCheckpoint(folder)
    found = checkpoint.weights()
    opened = tracemalloc.get_traced_memory()[1]
    largest = found["output.weight"].nbytes
    forgotten.clear()
    for w in found.values():
        assert w.data.nbytes == w.nbytes
    assert sum(forgotten) == sum(w.nbytes for w in found.values() if len(w.shape) == 2)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert opened < largest / 4
    assert peak < 1.5 * largest


# What params.json says, and what it leaves


def args_of(tmp_path: Path, vocab_rows=None, hidden_rows=None, **values):
    path = tmp_path / "params.json"
    path.write_text(json.dumps({key: value for key, value in values.items() if value is not None}))
    return model_args(JsonFile(path, nonfinite=True), vocab_rows, hidden_rows)


LLAMA1 = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-06, "vocab_size": -1}
LLAMA2_70B = {
    "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8,
    "n_layers": 80, "norm_eps": 1e-05, "vocab_size": -1,
}  # fmt: skip
LLAMA3 = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA32_1B = LLAMA3 | {
    "dim": 2048, "n_layers": 16, "ffn_dim_multiplier": 1.5, "multiple_of": 256, "use_scaled_rope": True,
}  # fmt: skip
LLAMA32_3B = LLAMA32_1B | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0}


@pytest.mark.parametrize(
    "params, hidden_dim, context, scaling",
    [
        (LLAMA1, 11008, 2048, None),
        (LLAMA1 | {"dim": 5120, "n_heads": 40, "n_layers": 40}, 13824, 2048, None),
        (LLAMA1 | {"dim": 6656, "n_heads": 52, "n_layers": 60}, 17920, 2048, None),
        (LLAMA1 | {"dim": 8192, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5}, 22016, 2048, None),
        (LLAMA1 | {"norm_eps": 1e-5}, 11008, 4096, None),
        (LLAMA2_70B, 28672, 4096, None),
        (LLAMA1 | {"norm_eps": 1e-5, "rope_theta": 1000000, "vocab_size": 32016}, 11008, 16384, None),
        (LLAMA3, 14336, 8192, None),
        (LLAMA3 | {"use_scaled_rope": False}, 14336, 8192, None),
        (LLAMA3 | {"use_scaled_rope": True}, 14336, 131072, Llama3Scaling(8.0)),
        (LLAMA32_1B, 8192, 131072, Llama3Scaling(32.0)),
        (LLAMA32_3B, 8192, 131072, Llama3Scaling(32.0)),
        (LLAMA32_1B | {"rope_scaling_factor": 16}, 8192, 131072, Llama3Scaling(16.0)),
        (LLAMA3 | {"max_seq_len": 512}, 14336, 512, None),
    ],
)
def test_published_models(tmp_path, params, hidden_dim, context, scaling):
    args = args_of(tmp_path, 32000, **params)
    assert (args.hidden_dim, args.max_seq_len, args.rope_scaling) == (hidden_dim, context, scaling)
    assert args.head_dim == args.dim // args.n_heads
    assert args.n_kv_heads == params.get("n_kv_heads", args.n_heads)
    assert args.vocab_size == (32000 if params["vocab_size"] == -1 else params["vocab_size"])
    assert args.rope_theta == params.get("rope_theta", 10000.0)
    assert args.norm_eps == params["norm_eps"]


def test_what_the_weights_say(tmp_path):
    args = args_of(tmp_path, 77, 99, **LLAMA1 | {"multiple_of": None, "vocab_size": None})
    assert (args.vocab_size, args.hidden_dim) == (77, 99)
    args = args_of(tmp_path, 77, 99, **LLAMA1 | {"hidden_dim": 123, "head_dim": 64})
    assert (args.hidden_dim, args.head_dim) == (123, 64)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "case, key, value, rule",
    [
        *(("C01", "n_heads", value, "from 1 to 65536") for value in (0, -1)),
        *(("C01", "n_heads", value, "wanted int") for value in (2.5, "32", True)),
        ("C01", "n_heads", None, "has no n_heads"),
        ("C02", "n_heads", 3, "dim is 4096, it must be a multiple of n_heads 3"),
        ("C02", "n_kv_heads", 3, "must be a multiple of n_kv_heads 3"),
        ("C02", "n_kv_heads", 64, "must be a multiple of n_kv_heads 64"),
        *(("C04", "vocab_size", value, "from 1 to 16777216") for value in (0, -2, 1 << 40)),
        ("C05", "n_layers", 10**9, "from 1 to 512"),
        ("C05", "dim", 1 << 31, "from 1 to 1048576"),
        ("C05", "multiple_of", 0, "from 1 to"),
        *(("C05", "ffn_dim_multiplier", v, "finite number above 0") for v in (-1, 0, NAN, INF, -INF)),
        ("C05", "ffn_dim_multiplier", 1e308, "must not make hidden_dim exceed"),
        *(("C06", "norm_eps", value, "finite number above 0") for value in (0, -1, NAN, INF)),
        ("C06", "norm_eps", "1e-5", "wanted float"),
        ("C06", "norm_eps", None, "has no norm_eps"),
        ("C06", "norm_eps", 1.5, "below 1"),
        *(("C07", "rope_theta", value, "finite number above 0") for value in (0, -1, NAN, INF)),
        ("C07", "rope_theta", 1e-300, "from 1 to 1e15"),
        ("key", "use_scaled_rope", "yes", "wanted bool"),
        ("key", "rope_scaling_factor", 0, "finite number above 0"),
        ("key", "max_seq_len", 1 << 30, "from 1 to 1048576"),
        ("key", "head_dim", 7, "it must be even"),
        ("key", "hidden_dim", -1, "from 1 to 16777216"),
    ],
)
def test_bad_params(tmp_path, case, key, value, rule):
    """They are refused before the weights are looked at: there are none."""
    values = LLAMA3 | {key: value}
    (tmp_path / "params.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    start = time.process_time()
    with pytest.raises(errors.ConfigError) as caught:
        MetaCheckpoint(tmp_path)
    assert time.process_time() - start < ARGS_FAST_SECONDS
    message = str(caught.value)
    assert str(tmp_path / "params.json") in message and key in message and rule in message
    if value is not None:
        assert json.dumps(value).strip('"').lower() in message.lower()


def test_vocab_size_of_a_real_file_is_accepted(tmp_path, rng):  # C03
    folder = write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32), vocab_size=-1)
    assert MetaCheckpoint(folder).args.vocab_size == ARGS.vocab_size


@pytest.mark.parametrize(
    "key, value",
    [
        ("quantization_args", {"scheme": "int8"}),
        ("lora_args", {"rank": 16}),
        ("moe_args", {}),
        ("vision_chunk_size", 448),
        ("sliding_window", 4096),
        ("use_qk_norm", True),
    ],
)
def test_another_model_is_refused_by_name(tmp_path, key, value):
    with pytest.raises(errors.UnsupportedError, match=f"params.json: '{key}' is "):
        args_of(tmp_path, **LLAMA3, **{key: value})


def test_other_keys_are_ignored(tmp_path):
    harmless = {"max_batch_size": 32, "vision_chunk_size": -1, "moe": None, "use_qk_norm": False, "note": "x"}
    assert args_of(tmp_path, **LLAMA3, **harmless) == args_of(tmp_path, **LLAMA3)


# Params, shards and weights that do not fit each other


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"vocab_size": 57},
            r"tok_embeddings.weight has the shape \(56, 32\), the arguments want \(57, 32\)",
        ),
        ({"multiple_of": 32}, r"w1.weight has the shape \(48, 32\), the arguments want \(96, 32\)"),
        ({"n_layers": 3}, "9 missing weights: 'layers.2.attention.wk.weight"),
        ({"n_layers": 1}, "9 unknown weights: 'layers.1.attention.wk.weight"),
        ({"n_kv_heads": 4}, r"wk.weight has the shape \(32, 32\), the arguments want \(16, 32\)"),
    ],
)
@pytest.mark.parametrize("n_shards", [1, 2])
def test_params_are_held_against_the_weights(tmp_path, rng, changes, message, n_shards):
    write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32), n_shards, **changes)
    with pytest.raises(errors.MismatchError, match=message):
        MetaCheckpoint(tmp_path).args  # noqa: B018


@pytest.mark.parametrize(
    "present, missing",
    [([], "00"), ([0, 1, 2], "03"), ([0, 2, 3], "01"), ([1], "00"), ([0, 1, 2, 3, 4, 6, 7], "05")],
)
def test_a_missing_shard_is_named(tmp_path, rng, present, missing):
    write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32), 8)
    for i in range(8):
        if i not in present:
            os.remove(tmp_path / f"consolidated.{i:02}.pth")
    with pytest.raises(
        errors.TruncatedError, match=rf"{len(present)} files .*; consolidated\.{missing}\.pth is"
    ):
        MetaCheckpoint(tmp_path)


def test_too_many_shards(tmp_path, rng):
    write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32), 8)
    for i in range(8, 16):
        (tmp_path / f"consolidated.{i:02}.pth").write_bytes(b"")
    with pytest.raises(errors.UnsupportedError, match="16 shards; Meta's models have 1, 2, 4 or 8"):
        MetaCheckpoint(tmp_path)


def changed_shard(folder: Path, i: int, change) -> Path:
    path = folder / f"consolidated.{i:02}.pth"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    return folder


@pytest.mark.parametrize("odd, n_shards", [(i, n) for n in (2, 4, 8) for i in range(n)])
def test_each_shard_must_fit_all_others(tmp_path, rng, odd, n_shards):
    """Any one that lacks a tensor, has another shape or format, or other numbers in what all hold alike."""
    weights = random_weights(rng, ARGS, np.float32)
    path = write_meta(tmp_path, ARGS, weights, n_shards) / f"consolidated.{odd:02}.pth"
    whole, wq = path.read_bytes(), "layers.0.attention.wq.weight"

    def refused(message, change):
        changed_shard(tmp_path, odd, change)
        with pytest.raises(errors.MismatchError, match=message):
            MetaCheckpoint(tmp_path).weights()
        path.write_bytes(whole)

    refused("differ in having 'layers.0.attention.wq.weight'", lambda state: state.pop(wq))
    refused("differ in having 'more'", lambda state: state.update(more=state[wq]))
    refused("wq.weight' is .* in one shard, .* in another", lambda state: state.update({wq: state[wq][1:]}))
    refused("F16.* in another|F16.* in one", lambda state: state.update({wq: state[wq].half()}))
    named = f"consolidated.{odd or 1:02}.pth"  # all are held against the first
    for name in ("norm.weight", "layers.0.attention_norm.weight", "layers.1.ffn_norm.weight"):
        message = f"'{name}' must be the same in all shards, it is another in {named}"
        refused(message, lambda state, name=name: state[name][-1].add_(1))
    assert MetaCheckpoint(tmp_path).weights().keys() == weights.keys()


@pytest.mark.parametrize("n_shards", [2, 4, 8])
@pytest.mark.parametrize("zip", [True, False])
def test_a_shard_that_is_a_copy_is_refused(tmp_path, rng, n_shards, zip):
    """Any of them, of any other; saved again it is a copy still."""
    write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32), n_shards, zip=zip)
    paths = [tmp_path / f"consolidated.{i:02}.pth" for i in range(n_shards)]
    for one, other in combinations(paths, 2):
        for source, target in ((one, other), (other, one)):
            whole = target.read_bytes()
            target.write_bytes(source.read_bytes())
            with pytest.raises(errors.MismatchError, match=f"{other.name} is a copy of {one.name}"):
                MetaCheckpoint(tmp_path)
            torch.save(torch.load(source), target)
            with pytest.raises(errors.MismatchError, match=f"{other.name} is a copy of {one.name}"):
                MetaCheckpoint(tmp_path)
            target.write_bytes(whole)
    MetaCheckpoint(tmp_path)


def test_shards_that_begin_alike_are_no_copies(tmp_path, rng):
    """One number in one matrix makes two of them."""
    write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32), 4)
    shutil.copy(tmp_path / "consolidated.01.pth", tmp_path / "consolidated.03.pth")
    changed_shard(tmp_path, 3, lambda state: state["layers.1.feed_forward.w2.weight"][-1, -1].add_(1))
    MetaCheckpoint(tmp_path)


def test_too_few_shards_do_not_pass_for_all(tmp_path, rng):
    write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32), 4)
    for i in (2, 3):
        os.remove(tmp_path / f"consolidated.{i:02}.pth")
    with pytest.raises(errors.MismatchError, match="has the shape"):
        MetaCheckpoint(tmp_path).args  # noqa: B018


def test_the_output_matrix_is_never_taken_for_tied(tmp_path, rng):
    folder = write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32))
    changed_shard(folder, 0, lambda state: state.pop("output.weight"))
    with pytest.raises(errors.MismatchError, match=r"1 missing weights: 'output\.weight'"):
        MetaCheckpoint(folder).args  # noqa: B018


def test_frequencies_of_old_files_are_ignored(tmp_path, rng):
    folder = write_meta(tmp_path, ARGS, random_weights(rng, ARGS, np.float32))
    old = {f"layers.{i}.attention.inner_attention.rope.freqs": torch.rand(2) for i in range(2)}
    changed_shard(folder, 0, lambda state: state.update(old))
    assert MetaCheckpoint(folder).weights().keys() == tensor_names(ARGS, "ours").keys()


def test_a_folder_without_params_is_refused(tmp_path):
    with pytest.raises(errors.FormatError, match=r"params\.json"):
        MetaCheckpoint(tmp_path)
    assert meta_params(ARGS)["vocab_size"] == -1  # so the writer above is one of real files
