"""Hugging Face folders: as transformers writes them, and as nobody should."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from numpy_llama import errors
from numpy_llama.backend import build
from numpy_llama.checkpoint import huggingface
from numpy_llama.checkpoint.huggingface import HuggingFaceCheckpoint, chat_template, model_args
from numpy_llama.checkpoint.json_file import JsonFile
from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.checkpoint.rope_scalings import as_float32
from numpy_llama.config import LIMITS, ModelArgs
from numpy_llama.proof import tiny, torch_llama
from numpy_llama.proof.bounds import MODEL_32, MODEL_64, assert_near
from numpy_llama.proof.oracle import half_split
from numpy_llama.rope import (
    DynamicScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    longrope_length,
    yarn_length,
)
from numpy_llama.text.chat import ChatTemplate

# No two sizes are equal, so that none can stand for another.
TINY = {
    "vocab_size": 53,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
}
# The original context of 16 lets slow, fast and ramped turns all occur.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
GENERATIONS = {
    "mha": {"num_key_value_heads": 4},
    "gqa": {},
    "mqa": {"num_key_value_heads": 1},
    "tied": {"tie_word_embeddings": True},
    "head_dim": {"head_dim": 10},
    "theta": {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    "llama3": {"rope_parameters": LLAMA3 | {"rope_theta": 5e5}},
    "linear": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    "dynamic": {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
}
BACKENDS = ("numpy", "c")


def model_of(changes: dict, kind=LlamaForCausalLM, config=LlamaConfig, seed: int = 0):
    """A random model; norm weights away from 1, so that each of them counts."""
    torch.manual_seed(seed)
    model = kind(config(**TINY | changes, initializer_range=0.2, attn_implementation="eager")).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


def tokens_of(model, T: int | None = None):
    T = T or model.config.max_position_embeddings
    return torch.randint(model.config.vocab_size, (2, T), generator=torch.Generator().manual_seed(1))


def assert_same_logits(folder: Path, model, tolerance: float = MODEL_32):
    tokens = tokens_of(model)
    with torch.no_grad():
        expected = model(tokens).logits.float()
    checkpoint = HuggingFaceCheckpoint(folder)
    for backend in BACKENDS:
        logits = build(checkpoint.args, checkpoint.weights(), backend=backend, threads=1, exact=True)(
            tokens.numpy()
        )
        assert_near(logits, expected, tolerance)
    return checkpoint


def write_bin(model, folder: Path, shards: int = 1):
    """As transformers 4 did with safe_serialization=False."""
    model.config.save_pretrained(folder)
    state = model.state_dict()
    if shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    names = list(state)
    weight_map = {}
    for i in range(shards):
        file = f"pytorch_model-{i + 1:05}-of-{shards:05}.bin"
        part = {name: state[name].clone() for name in names[i::shards]}
        torch.save(part, folder / file)
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


CONTAINERS: dict[str, Callable] = {
    "single": lambda model, folder: model.save_pretrained(folder),
    "sharded": lambda model, folder: model.save_pretrained(folder, max_shard_size="8KB"),
    "bin": write_bin,
    "bin sharded": lambda model, folder: write_bin(model, folder, 3),
}


# --- against transformers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_logits_as_transformers(generation, container, tmp_path):
    model = model_of(GENERATIONS[generation])
    CONTAINERS[container](model, tmp_path)
    checkpoint = assert_same_logits(tmp_path, model)
    assert (len(checkpoint.files) > 2) == ("sharded" in container)
    assert checkpoint.args.max_seq_len == 32
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert shapes.items() >= {name: info.shape for name, info in checkpoint.tensors.items()}.items()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_stays_as_stored(dtype, tmp_path):
    model_of({}).to(dtype).save_pretrained(tmp_path)
    wide = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager")
    checkpoint = assert_same_logits(tmp_path, wide)
    assert {w.format.name for w in checkpoint.weights().values()} == {
        "F16" if dtype is torch.float16 else "BF16"
    }


@pytest.mark.parametrize("generation", ["theta", "llama3", "linear"])
def test_the_generations_differ(generation, tmp_path):
    """What is compared above shows in the logits: without it they would be others."""
    model = model_of(GENERATIONS[generation])
    model.save_pretrained(tmp_path)
    checkpoint = HuggingFaceCheckpoint(tmp_path)
    plain = replace(checkpoint.args, rope_theta=1e4, rope_scaling=None)
    tokens = tokens_of(model).numpy()
    logits = [build(args, checkpoint.weights(), backend="numpy")(tokens) for args in (checkpoint.args, plain)]
    assert np.abs(logits[0] - logits[1]).max() > 1e-2


def test_dynamic_scaling_begins_where_the_context_ends():
    """Up to max_position_embeddings it is no scaling at all, one token further it is."""
    dynamic, plain = model_of(GENERATIONS["dynamic"]), model_of({})
    with torch.no_grad():
        for T, same in [(32, True), (33, False)]:
            tokens = tokens_of(plain, T)
            assert torch.equal(dynamic(tokens).logits, plain(tokens).logits) == same


@pytest.mark.parametrize("window", [8, 32, 100, None])
def test_mistral_and_its_window(window, tmp_path):
    """One that is no shorter than the context hides nothing, and is none."""
    model = model_of({"sliding_window": window}, MistralForCausalLM, MistralConfig)
    model.save_pretrained(tmp_path)
    args = assert_same_logits(tmp_path, model).args
    assert (args.max_seq_len, args.sliding_window) == (32, 8 if window == 8 else None)


# --- against Meta's order of rows -------------------------------------------------------------------------


@given(
    n_kv_heads=st.integers(1, 3),
    n_rep=st.integers(1, 3),
    head_dim=st.integers(1, 8).map(lambda n: 2 * n),
    tied=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_of_q_and_k_come_out_in_metas_order(tmp_path_factory, n_kv_heads, n_rep, head_dim, tied, seed):
    rng, folder = np.random.default_rng(seed), tmp_path_factory.mktemp("hf")
    n_heads, sizes = n_kv_heads * n_rep, {"D": 24, "F": 40, "V": 53}
    config = TINY | {"model_type": "llama", "head_dim": head_dim, "tie_word_embeddings": tied}
    config |= {"num_attention_heads": n_heads, "num_key_value_heads": n_kv_heads}
    args = model_args(JsonFile(Path("config.json"), values=config))
    shapes = {name: shape_of(name, args, sizes) for name in tensor_names(args, "ours")}
    meta = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    if tied:
        meta["output.weight"] = meta["tok_embeddings.weight"]
    state = {}
    for ours, theirs in tensor_names(args, "hf").items():
        heads = {"wq": n_heads, "wk": n_kv_heads}.get(ours.split(".")[-2])
        state[theirs] = torch.from_numpy(
            meta[ours] if heads is None else half_split(meta[ours], heads).copy()
        )
    if tied:
        del state["lm_head.weight"]
    save_file(state, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))

    checkpoint = HuggingFaceCheckpoint(folder)
    weights = checkpoint.weights()
    assert weights.keys() == meta.keys()
    for name, weight in weights.items():
        np.testing.assert_array_equal(weight.dequantize(), meta[name])
        assert weight.in_place and not weight.data.flags.owndata  # the map itself
    assert (weights["output.weight"] is weights["tok_embeddings.weight"]) == tied
    tokens = rng.integers(53, size=(1, 9))
    reference = torch_llama.Transformer(args, torch.float64)
    reference.load_state_dict({name: torch.from_numpy(x.astype(np.float64)) for name, x in meta.items()})
    logits = build(args, weights, np.float64, backend="numpy")(tokens)
    assert_near(logits, reference(torch.from_numpy(tokens)), MODEL_64)


def shape_of(name: str, args: ModelArgs, sizes: dict) -> tuple[int, ...]:
    q, kv = args.n_heads * args.head_dim, args.n_kv_heads * args.head_dim
    D, F, V = sizes["D"], sizes["F"], sizes["V"]
    kinds = {"wq": (q, D), "wk": (kv, D), "wv": (kv, D), "wo": (D, q)}
    kinds |= {"w_gate": (F, D), "w_up": (F, D), "w_down": (D, F), "tok_embeddings": (V, D), "output": (V, D)}
    return kinds.get(name.split(".")[-2], (D,))


# --- config.json ------------------------------------------------------------------------------------------

CONFIG = TINY | {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
MISTRAL = CONFIG | {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
REMOVED = object()


def config_of(values: dict) -> JsonFile:
    return JsonFile(Path("config.json"), values={k: v for k, v in values.items() if v is not REMOVED})


def args_of(**changes) -> ModelArgs:
    return model_args(config_of(CONFIG | changes))


def test_what_a_config_leaves_out():
    wanted = replace(tiny.TINY, max_seq_len=32)
    assert args_of() == wanted
    assert (
        args_of(num_key_value_heads=REMOVED)
        == args_of(num_key_value_heads=None)
        == replace(wanted, n_kv_heads=4)
    )
    assert args_of(head_dim=None) == wanted
    assert args_of(head_dim=10, hidden_size=25) == replace(wanted, head_dim=10, dim=25)  # C08: honoured
    assert args_of(max_position_embeddings=REMOVED).max_seq_len == 2048
    assert args_of(max_position_embeddings=10**9).max_seq_len == LIMITS["max_seq_len"]
    assert args_of(rope_theta=500000).rope_theta == 5e5
    assert (
        args_of(architectures=REMOVED) == args_of(architectures=None) == args_of(model_type=REMOVED) == wanted
    )
    assert args_of(hidden_act="swish", attention_bias=False, mlp_bias=None, pretraining_tp=2) == wanted
    assert args_of(quantization_config=None, partial_rotary_factor=1.0, num_experts=0) == wanted
    assert args_of(quantization_config={}, compression_config={}) == wanted


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", ["rope_type", "type"])
def test_every_spelling_of_a_scaled_rope(key, kind):
    def scaling(**values):
        values[kind] = values.pop("is_of")
        return args_of(**{key: values}).rope_scaling

    scaled = {k: v for k, v in LLAMA3.items() if k != "rope_type"}
    assert scaling(is_of="llama3", **scaled) == Llama3Scaling(8.0, 1.0, 4.0, 16)
    assert scaling(is_of="llama3", **scaled | {"factor": 32}) == Llama3Scaling(32.0, 1.0, 4.0, 16)
    assert scaling(is_of="linear", factor=2) == LinearScaling(2.0)
    assert scaling(is_of="dynamic", factor=2.0) == DynamicScaling(2.0, 32)
    assert scaling(is_of="default") is None
    yarn, lists = without("rope_type", YARN), without("rope_type", LONGROPE)
    assert scaling(is_of="yarn", **yarn) == YarnScaling(4.0, 16, as_float32(yarn_length(4.0)))
    stretched = LongRopeScaling(*LISTS, 16, as_float32(longrope_length(2.0, 16)))  # 32 positions over 16
    assert scaling(is_of="longrope", **lists) == scaling(is_of="su", **lists) == stretched
    beside = args_of(**{key: {kind: "su"} | without("original_max_position_embeddings", lists)} | OVER_16)
    assert beside.rope_scaling == stretched  # as Phi-3 has it
    assert args_of(**{key: None}).rope_scaling is args_of(**{key: {}}).rope_scaling is None
    assert args_of(**{key: {"rope_theta": 5e5}}).rope_theta == 5e5
    both = {"type": "linear", "rope_type": "linear", "factor": 2.0, "rope_theta": 1e6}
    assert args_of(rope_scaling=both, rope_parameters=dict(both), rope_theta=1e6) == args_of(
        rope_theta=1e6, rope_scaling={"type": "linear", "factor": 2.0}
    )


CONFIG_ERROR, UNSUPPORTED = errors.ConfigError, errors.UnsupportedError
REQUIRED = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size", "vocab_size")
SIZES = (*REQUIRED, "num_key_value_heads", "head_dim", "max_position_embeddings")


def rope(error, message, **rope_scaling):
    return "C09", error, message, {"rope_scaling": rope_scaling}


def without(key, rope=LLAMA3):
    return {k: v for k, v in rope.items() if k != key}


OVER_16 = {"original_max_position_embeddings": 16}
YARN = {"rope_type": "yarn", "factor": 4.0} | OVER_16
FACTORS = ("short_factor", "long_factor")
LISTS = [tuple(np.float32(x).tolist()) for x in ([1.0, 1.1, 1.2], [1.0, 2.0, 4.0])]
LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 4.0],
} | OVER_16


BAD_CONFIGS = [
    *(("C01", CONFIG_ERROR, key, {key: n}) for key in SIZES for n in (0, -1, 2.5, "32", True, [4], {})),
    *(("C01", CONFIG_ERROR, "00000", {key: 10**40}) for key in REQUIRED),
    *(("C01", CONFIG_ERROR, f"has no {key}", {key: None}) for key in (*REQUIRED, "rms_norm_eps")),
    *(("C01", CONFIG_ERROR, f"has no {key}", {key: REMOVED}) for key in (*REQUIRED, "rms_norm_eps")),
    ("C02", CONFIG_ERROR, "hidden_size 25 cannot be divided among 4 heads", {"hidden_size": 25}),
    ("C02", CONFIG_ERROR, "multiple of n_kv_heads 3", {"num_key_value_heads": 3}),
    *(("C06", CONFIG_ERROR, "norm_eps", {"rms_norm_eps": x}) for x in (0, -1, "1e-5", 1, float("inf"))),
    *(("C07", CONFIG_ERROR, "rope_theta", {"rope_theta": x}) for x in (0, -1, 0.5, "1e4", float("inf"))),
    *(("C07", CONFIG_ERROR, "rope_theta", {"rope_parameters": {"rope_theta": x}}) for x in (0, -1, "x")),
    ("C08", CONFIG_ERROR, "head_dim is 5, RoPE turns pairs", {"head_dim": 5}),
    rope(CONFIG_ERROR, "rope_type is 'foo'", type="foo", factor=2.0),
    rope(CONFIG_ERROR, "rope_type is None", factor=2.0),
    rope(CONFIG_ERROR, "rope_type is 3, wanted str", rope_type=3, factor=2.0),
    rope(CONFIG_ERROR, "rope_type is given as 'linear' and 'dynamic'", rope_type="linear", type="dynamic"),
    *(rope(UNSUPPORTED, f"RoPE scaling '{kind}'", type=kind, factor=2.0) for kind in ("mrope", "axial")),
    rope(UNSUPPORTED, "has 'mrope_section', which is not known", type="default", mrope_section=[1, 1, 1]),
    rope(UNSUPPORTED, "has 'alpha', which is not known", type="dynamic", factor=2.0, alpha=1000.0),
    rope(UNSUPPORTED, "partial_rotary_factor is 0.5", type="linear", factor=2.0, partial_rotary_factor=0.5),
    rope(CONFIG_ERROR, "given as 32 and 16", type="dynamic", factor=2.0, **OVER_16),
    *(rope(CONFIG_ERROR, "has no original_max_position", type=kind, factor=2.0) for kind in ("yarn", "su")),
    rope(CONFIG_ERROR, "has no factor", type="yarn", **OVER_16),
    *(
        rope(CONFIG_ERROR, f"{key}.* is .*{value}", **YARN | {key: value})
        for key, value in [
            *(("factor", 0), ("factor", -4.0), ("factor", "4"), ("attention_factor", "1")),
            *(("beta_fast", -1.0), ("beta_slow", -1.0), ("mscale", -1.0), ("truncate", 1)),
        ]
    ),
    *(rope(CONFIG_ERROR, "length_factor is", **YARN | {"attention_factor": x}) for x in (0, -1.0)),
    rope(CONFIG_ERROR, "beta_fast is 1.0, it must be above beta_slow 1.0", **YARN | {"beta_fast": 1.0}),
    rope(CONFIG_ERROR, "original_max_seq_len is 0", **YARN | {"original_max_position_embeddings": 0}),
    rope(CONFIG_ERROR, "must be 2 or more", **LONGROPE | {"original_max_position_embeddings": 1}),
    *(rope(CONFIG_ERROR, f"has no {key}", **without(key, LONGROPE)) for key in FACTORS),
    *(
        rope(CONFIG_ERROR, message, **LONGROPE | {key: value})
        for key in FACTORS
        for value, message in [
            ([1.0, 1.0], f"{key} has 2 numbers, with head_dim 6 it must have 3"),
            ([1.0] * 100_000, f"{key} has 100000 numbers"),
            ([], f"{key} has 0 numbers"),
            (1.0, f"{key} is 1.0, wanted list"),
            ([1.0, 0, 1.0], rf"{key}\[1\] is 0"),
            ([1.0, 1.0, -1.0], rf"{key}\[2\] is -1"),
            ([float("nan"), 1.0, 1.0], rf"{key}\[0\] is nan"),
            ([1.0, float("inf"), 1.0], rf"{key}\[1\] is inf"),
            ([1.0, 10**400, 1.0], rf"{key}\[1\] is 1000"),
            ([1.0, True, 1.0], rf"{key}\[1\] is True"),
            ([1.0, "2", 1.0], rf"{key}\[1\] is '2'"),
            ([[1.0], 1.0, 1.0], rf"{key}\[0\] is \[1"),
        ]
    ),
    *(
        rope(
            CONFIG_ERROR,
            f"factor.* is {factor!r}",
            **(LLAMA3 if kind == "llama3" else {}) | {"rope_type": kind, "factor": factor},
        )
        for kind in ("linear", "dynamic", "llama3")
        for factor in (0, 0.0, -1, "2", True)
    ),
    rope(CONFIG_ERROR, "factor is inf", type="linear", factor=float("inf")),
    *(rope(CONFIG_ERROR, "has no factor", type=kind) for kind in ("linear", "dynamic", "llama3")),
    *(rope(CONFIG_ERROR, f"has no {key}", **without(key)) for key in LLAMA3 if key != "rope_type"),
    rope(CONFIG_ERROR, "must be above low_freq_factor 1.0", **LLAMA3 | {"high_freq_factor": 1.0}),
    rope(CONFIG_ERROR, "original_max_seq_len is 0", **LLAMA3 | {"original_max_position_embeddings": 0}),
    *(("C09", CONFIG_ERROR, "rope_scaling is", {"rope_scaling": value}) for value in ([], [8.0], "linear")),
    (
        "C09",
        CONFIG_ERROR,
        "rope_parameters and rope_scaling differ",
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": {"rope_type": "default"}},
    ),
    (
        "C09",
        CONFIG_ERROR,
        "rope_theta is given as 10000.0 and 500000.0",
        {"rope_theta": 1e4, "rope_parameters": {"rope_theta": 5e5}},
    ),
    ("C11", UNSUPPORTED, "MistralForCausalLM", {"architectures": ["MistralForCausalLM"]}),
    ("C11", UNSUPPORTED, "model_type 'bert'", {"model_type": "bert"}),
    ("C11", UNSUPPORTED, "model_type 'bert'", {"model_type": "bert", "architectures": None}),
    ("C11", UNSUPPORTED, "Qwen2ForCausalLM", {"architectures": ["LlamaForCausalLM", "Qwen2ForCausalLM"]}),
    ("C11", UNSUPPORTED, "model_type None", {"model_type": REMOVED, "architectures": []}),
    *(
        ("C11", UNSUPPORTED, "model_type 'mistral'", MISTRAL | changes)
        for changes in [
            {"sliding_window": REMOVED},
            {"architectures": None},
            {"architectures": ["LlamaForCausalLM"]},
        ]
    ),
    ("C11", UNSUPPORTED, "'MistralModel', a model without", MISTRAL | {"architectures": ["MistralModel"]}),
    *(("C11", CONFIG_ERROR, "sliding_window", MISTRAL | {"sliding_window": n}) for n in (0, -1, "8", True)),
    *(
        ("C11", UNSUPPORTED, f"quantized by '{method}'", {"quantization_config": {"quant_method": method}})
        for method in ("exl2", "aqlm", "hqq", "quip", "mxfp4")
    ),
    *(("C11", UNSUPPORTED, "quantized by", {"quantization_config": x}) for x in ([], "gptq", 8, False)),
    *(
        ("plain", UNSUPPORTED, f"{key} is", {key: value})
        for key, value in [
            ("attention_bias", True),
            ("attention_bias", "no"),
            ("mlp_bias", True),
            ("hidden_act", "gelu"),
            ("partial_rotary_factor", 0.5),
            ("num_experts", 8),
            ("num_local_experts", 8),
        ]
    ),
    ("plain", UNSUPPORTED, "factor is 0.5", {"rope_parameters": {"partial_rotary_factor": 0.5}}),
]


@pytest.mark.parametrize(
    "case, error, message, changes", BAD_CONFIGS, ids=[f"{c[0]}-{i}" for i, c in enumerate(BAD_CONFIGS)]
)
def test_configs_that_cannot_be_run(case, error, message, changes):
    with pytest.raises(errors.NumpyLlamaError, match=message) as caught:
        args_of(**changes)
    assert type(caught.value) is error
    assert str(caught.value).startswith("config.json") and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"a":' * 50_000, "nested too deeply"),
        (b" " * 2_000_000, "at most"),
        (b'{"hidden_size": 1, "hidden_size": 2}', "duplicate key"),
        (b'{"rms_norm_eps": NaN}', "NaN"),
        ('{"hidden_size": 1}'.encode("utf-16"), "no JSON"),
        (b'\xef\xbb\xbf{"hidden_size": 1}', "no JSON"),
        (b"[1, 2]", "wanted a JSON object"),
    ],
)
def test_configs_that_cannot_be_read(data, message, tmp_path):
    """C10."""
    (tmp_path / "config.json").write_bytes(data)
    with pytest.raises(errors.FormatError, match=message) as caught:
        HuggingFaceCheckpoint(tmp_path)
    assert "config.json" in str(caught.value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5)
    | st.sampled_from(["llama3", "linear", "dynamic", "type", 1, 2, 4, 8, 0.5]),
    lambda v: st.lists(v, max_size=3)
    | st.dictionaries(st.sampled_from([*LLAMA3, "type", "rope_theta"]) | st.text(max_size=3), v, max_size=6),
    max_leaves=8,
)  # fmt: skip
KEYS = [
    *CONFIG,
    "rope_scaling",
    "rope_parameters",
    "rope_theta",
    "head_dim",
    "quantization_config",
    "sliding_window",
]


@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3), st.booleans())
def test_any_config_gives_arguments_or_our_own_error(changes, mistral):
    try:
        args = model_args(config_of((MISTRAL if mistral else CONFIG) | changes))
    except errors.NumpyLlamaError as error:
        assert str(error).startswith("config.json")
    else:
        assert isinstance(args, ModelArgs)


# --- folders that are not what they say -------------------------------------------------------------------


def rewrite(path: Path, **changes):
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in values.items() if v is not REMOVED}))


@pytest.fixture(scope="module")
def state() -> dict:
    return {name: tensor.clone() for name, tensor in model_of({}).state_dict().items()}


@pytest.fixture
def folder(tmp_path, state) -> Path:
    """A plain model: CONFIG, one file."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(state, tmp_path / "model.safetensors")
    return tmp_path


def refused(folder: Path, message: str, error=errors.MismatchError):
    with pytest.raises(errors.NumpyLlamaError, match=message) as caught:
        HuggingFaceCheckpoint(folder).weights()
    assert type(caught.value) is error
    assert str(folder) in str(caught.value) and len(str(caught.value)) < 800


Q, K = "model.layers.1.self_attn.q_proj.weight", "model.layers.1.self_attn.k_proj.weight"


@pytest.mark.parametrize(
    "message, config, weights",
    [
        ("gate_proj.weight has the shape .40, 24., the arguments want .41", {"intermediate_size": 41}, {}),
        ("9 missing weights: 'model.layers.2.input_layernorm.weight", {"num_hidden_layers": 3}, {}),
        ("9 unknown weights: 'model.layers.1.input_layernorm.weight", {"num_hidden_layers": 1}, {}),
        ("embed_tokens.weight has the shape .53, 24., the arguments want .54", {"vocab_size": 54}, {}),
        ("k_proj.weight has the shape .12, 24., the arguments want .6,", {"num_key_value_heads": 1}, {}),
        ("q_proj.weight has the shape .24, 24., the arguments want .40,", {"head_dim": 10}, {}),
        ("q_proj.weight has the shape .20, 24.", {}, {Q: torch.ones(20, 24)}),
        ("k_proj.weight has the shape .24, 12., the arguments want .12, 24.", {}, {K: torch.ones(24, 12)}),
        ("'lm_head.weight'; if .*, write .tie_word_embeddings.: true", {}, {"lm_head.weight": None}),
        ("1 missing weights: 'lm_head.weight'", {"tie_word_embeddings": False}, {"lm_head.weight": None}),
        ("1 unknown weights: '.*q_proj.bias'", {}, {Q.replace("weight", "bias"): torch.ones(24)}),
        ("tie_word_embeddings is true, but", {"tie_word_embeddings": True}, {}),
        ("not the embedding", {"tie_word_embeddings": True}, {"lm_head.weight": torch.ones(3, 24)}),
    ],
)  # fmt: skip
def test_config_and_weights_disagree(message, config, weights, folder, state):
    """C12, C13."""
    rewrite(folder / "config.json", **config)
    changed = {name: tensor for name, tensor in (state | weights).items() if tensor is not None}
    save_file(changed, folder / "model.safetensors")
    refused(folder, message)


@pytest.mark.parametrize("before", ["model.", "self_attn.", "lm_head."])
def test_names_as_torch_compile_writes_them(folder, state, before):
    expected = HuggingFaceCheckpoint(folder).weights()
    renamed = {name.replace(before, f"_orig_mod.{before}"): tensor for name, tensor in state.items()}
    save_file(renamed, folder / "model.safetensors")
    found = HuggingFaceCheckpoint(folder).weights()
    assert found.keys() == expected.keys()
    for name, weight in found.items():
        np.testing.assert_array_equal(weight.dequantize(), expected[name].dequantize())
    save_file({name: x.clone() for name, x in (renamed | state).items()}, folder / "model.safetensors")
    refused(folder, f"has .*{before}.* and .*{before}.*; wanted one of them")


def test_a_tied_model_may_hold_its_embedding_twice(folder, state, monkeypatch):
    monkeypatch.setattr(huggingface, "ROWS_COMPARED", 7)
    rewrite(folder / "config.json", tie_word_embeddings=True)
    same = state["model.embed_tokens.weight"].clone()
    save_file(state | {"lm_head.weight": same}, folder / "model.safetensors")
    weights = HuggingFaceCheckpoint(folder).weights()
    assert weights["output.weight"] is weights["tok_embeddings.weight"]
    same[-1, -1] += 1
    save_file(state | {"lm_head.weight": same}, folder / "model.safetensors")
    refused(folder, "not the embedding")
    # The same bytes in another format are other numbers.
    embedding = state["model.embed_tokens.weight"].bfloat16()
    both = {"model.embed_tokens.weight": embedding, "lm_head.weight": embedding.clone().view(torch.float16)}
    save_file(state | both, folder / "model.safetensors")
    refused(folder, "not the embedding")


def test_frequencies_of_old_files_are_passed_over(folder, state):
    names = ["model.layers.0.self_attn.rotary_emb.inv_freq", "model.rotary_emb.inv_freq"]
    save_file(state | {name: torch.ones(3) for name in names}, folder / "model.safetensors")
    checkpoint = HuggingFaceCheckpoint(folder)
    assert len(checkpoint.weights()) == 3 + 2 * 9 and set(names) <= checkpoint.tensors.keys()


def test_dtypes_that_are_not_run(folder, state):
    save_file(state | {Q: state[Q].double()}, folder / "model.safetensors")
    refused(folder, "q_proj.weight' is stored as F64", errors.UnsupportedError)


def test_safetensors_before_bin(folder, state):
    torch.save({name: 0 * tensor for name, tensor in state.items()}, folder / "pytorch_model.bin")
    expected = state["model.embed_tokens.weight"]
    weights = HuggingFaceCheckpoint(folder).weights()
    np.testing.assert_array_equal(weights["tok_embeddings.weight"].dequantize(), expected)
    (folder / "model.safetensors").unlink()
    assert not HuggingFaceCheckpoint(folder).weights()["tok_embeddings.weight"].dequantize().any()


def test_folders_without_what_it_takes(folder):
    (folder / "model.safetensors").unlink()
    refused(folder, "has no weights; looked for model.safetensors, ", errors.FormatError)
    (folder / "model.safetensors").symlink_to(folder / "gone")  # a cache that was cleaned
    refused(folder, "model.safetensors is no regular file", errors.FormatError)
    (folder / "config.json").unlink()
    refused(folder, "config.json is not there", errors.FormatError)
    refused(folder / "nowhere", "config.json is not there", errors.FormatError)


@pytest.fixture
def sharded(tmp_path) -> Path:
    model_of({}).save_pretrained(tmp_path, max_shard_size="8KB")
    return tmp_path


INDEX = "model.safetensors.index.json"


def test_shards_that_are_missing_are_named(sharded):
    shards = sorted(sharded.glob("*.safetensors"))
    shards[1].unlink()
    shards[2].unlink()
    pattern = f"2 of {len(shards)} files are missing: '{shards[1].name}, {shards[2].name}'; incomplete copy"
    refused(sharded, re.escape(pattern), errors.TruncatedError)


@pytest.mark.parametrize(
    "name",
    ["/etc/passwd", "../x.safetensors", "a/b", "a\\b", "", "a\0b", "\ud800", "a b", None, 3, ["a"], {}],
)
def test_an_index_reaches_no_other_folder(name, sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"] | {Q: name}
    rewrite(sharded / INDEX, weight_map=weight_map)
    refused(sharded, "weight_map has .* which is no plain file name", errors.FormatError)


@pytest.mark.parametrize("name", [".", ".."])
def test_an_index_names_no_folder(name, sharded):
    weight_map = json.loads((sharded / INDEX).read_text())["weight_map"] | {Q: name}
    rewrite(sharded / INDEX, weight_map=weight_map)
    refused(sharded, "1 of .* files are missing", errors.TruncatedError)


@pytest.mark.parametrize("weight_map", [REMOVED, None, {}, [], "model.safetensors"])
def test_an_index_without_a_map(weight_map, sharded):
    rewrite(sharded / INDEX, weight_map=weight_map)
    refused(sharded, "has no weight_map, or an empty one", errors.FormatError)


def test_an_index_that_is_wrong_about_its_files(sharded):
    right = json.loads((sharded / INDEX).read_text())["weight_map"]
    other = next(name for name in right.values() if name != right[Q])
    for changes in ({Q: other}, {"extra": other}):
        rewrite(sharded / INDEX, weight_map=right | changes)
        refused(
            sharded,
            f"disagree: . tensors are in only one of the two: '{next(iter(changes))}'".replace(
                "disagree: .", "disagree: 1"
            ),
        )
    rewrite(sharded / INDEX, weight_map={name: file for name, file in right.items() if name != Q})
    refused(sharded, f"{right[Q]} and {INDEX} disagree: 1 tensors are in only one of the two: '{Q}'")


@pytest.mark.parametrize("container", ["sharded", "bin sharded"])
def test_each_of_many_shards_is_checked(container, tmp_path):
    """Any one that is missing, that lacks a tensor, or that is a copy of any other."""
    CONTAINERS[container](model_of({}), tmp_path)
    shards = sorted(p for p in tmp_path.iterdir() if re.search(r"-of-\d+\.", p.name))
    assert len(shards) >= 3
    for shard in shards:
        whole = shard.read_bytes()
        shard.unlink()
        refused(tmp_path, f"1 of {len(shards)} files are missing: '{shard.name}'", errors.TruncatedError)
        for other in set(shards) - {shard}:
            shard.write_bytes(other.read_bytes())
            message = f"{shard.name} has the tensors of {other.name}: is it a copy of that file?"
            refused(tmp_path, re.escape(message))
        shard.write_bytes(whole)
        index = next(tmp_path.glob("*.index.json"))
        weight_map = json.loads(index.read_text())["weight_map"]
        rewrite(index, weight_map=weight_map | {"extra": shard.name})
        refused(tmp_path, f"{shard.name} and {index.name} disagree: 1 tensors .*: 'extra'")
        rewrite(index, weight_map=weight_map)
    assert HuggingFaceCheckpoint(tmp_path).weights()


def test_files_that_change_are_noticed(sharded):
    checkpoint = HuggingFaceCheckpoint(sharded)
    checkpoint.check_unchanged()
    last = sorted(sharded.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes() + b"x")
    with pytest.raises(errors.FileChangedError, match=last.name):
        checkpoint.check_unchanged()


# --- chat templates ---------------------------------------------------------------------------------------


def test_where_a_chat_template_may_be(folder):
    assert chat_template(folder) is None
    config = folder / "tokenizer_config.json"
    for value, expected in [
        (None, None),
        ("one", "one"),
        ([], None),
        ([{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "two"}], "two"),
        ([{"name": "tool_use", "template": "tools"}], None),
    ]:
        config.write_text(json.dumps({"chat_template": value}))
        assert chat_template(folder) == expected
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "three"}))
    assert chat_template(folder) == "three"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert chat_template(folder) == "one"
    (folder / "chat_template.jinja").write_text("naïve {{ messages }}", "utf-8")
    assert chat_template(folder) == "naïve {{ messages }}"
    found = HuggingFaceCheckpoint(folder).chat_format()
    assert isinstance(found, ChatTemplate) and found.source == "naïve {{ messages }}"


def test_where_the_template_for_tools_may_be(folder):
    config, more = folder / "tokenizer_config.json", folder / "additional_chat_templates"
    both = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "one"}]
    config.write_text(json.dumps({"chat_template": both}))
    assert (chat_template(folder), chat_template(folder, "tool_use")) == ("one", "tools")
    found = HuggingFaceCheckpoint(folder).chat_format()
    assert isinstance(found, ChatTemplate) and (found.source, found.tool_use.source) == ("one", "tools")
    (folder / "chat_template.jinja").write_text("two")  # in the place of all templates of the config
    assert (chat_template(folder), chat_template(folder, "tool_use")) == ("two", None)
    more.mkdir()
    (more / "tool_use.jinja").write_text("more tools")
    assert (chat_template(folder), chat_template(folder, "tool_use")) == ("two", "more tools")


def test_chat_templates_that_are_none(folder):
    for value, error in [
        (3, errors.ConfigError),
        ({"default": "x"}, errors.ConfigError),
        ([{"name": "default", "template": 3}], errors.TemplateError),
    ]:
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": value}))
        with pytest.raises(error):
            chat_template(folder)
    jinja = folder / "chat_template.jinja"
    for data, message in [(b"\xff", "byte 0 is not UTF-8"), (b" " * (1 << 21), "at most")]:
        jinja.write_bytes(data)
        with pytest.raises(errors.TemplateError, match=rf"chat_template\.jinja.*{message}"):
            chat_template(folder)
