"""The table of published sizes: what was published, and that it makes the models it says."""

from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from numpy_llama.checkpoint.presets import PRESETS, n_parameters
from numpy_llama.proof.tiny import configurations, random_weights

seeds = st.integers(0, 2**32 - 1).map(np.random.default_rng)

# Counted by those who published the weights, or from the tensors in their files.
PUBLISHED = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-30b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "codellama-7b": 6_738_546_688,
    "codellama-13b": 13_016_028_160,
    "codellama-34b": 33_743_970_304,
    "codellama-70b": 68_976_910_336,
    "codellama-70b-instruct": 68_976_910_336,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "llama-3.3-70b": 70_553_706_496,
    "tinyllama-1.1b": 1_100_048_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm2-1.7b": 1_711_376_384,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.2": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
}


def test_parameters_as_published():
    assert {name: preset.n_parameters for name, preset in PRESETS.items()} == PUBLISHED


def test_parameters_as_transformers_counts_them():
    for name, preset in PRESETS.items():
        args = preset.args
        config = LlamaConfig(
            vocab_size=args.vocab_size,
            hidden_size=args.dim,
            intermediate_size=args.hidden_dim,
            num_hidden_layers=1,  # the layers are equal
            num_attention_heads=args.n_heads,
            num_key_value_heads=args.n_kv_heads,
            tie_word_embeddings=preset.tied,
        )
        with torch.device("meta"):
            model = LlamaForCausalLM(config)
        assert model.num_parameters() == n_parameters(replace(args, n_layers=1), preset.tied), name


@given(configurations(), seeds, st.booleans())
def test_parameters_are_what_the_weights_hold(args, rng, tied):
    weights = random_weights(rng, args, tied=tied)
    if tied:
        del weights["output.weight"]
    assert n_parameters(args, tied) == sum(x.size for x in weights.values())


# The params.json of three sizes: hidden_dim follows from multiple_of and ffn_dim_multiplier there.
@pytest.mark.parametrize(
    ("name", "multiple_of", "multiplier"),
    [
        ("llama-7b", 256, 1.0),
        ("llama-13b", 256, 1.0),
        ("llama-30b", 256, 1.0),
        ("llama-65b", 256, 1.0),
        ("llama-2-70b", 4096, 1.3),
        ("llama-3.1-8b", 1024, 1.3),
        ("llama-3.1-70b", 4096, 1.3),
        ("llama-3.1-405b", 4096, 1.2),
        ("llama-3.2-1b", 256, 1.5),
        ("llama-3.2-3b", 256, 1.0),
    ],
)
def test_hidden_dim_follows_from_metas_multiples(name, multiple_of, multiplier):
    args = PRESETS[name].args
    wanted = int(multiplier * int(2 * 4 * args.dim / 3))
    assert args.hidden_dim == -(-wanted // multiple_of) * multiple_of


def test_what_the_generations_differ_in():
    def of(start: str) -> list:
        return [preset.args for name, preset in PRESETS.items() if name.startswith(start)]

    def column(start: str, field: str) -> set:
        return {getattr(args, field) for args in of(start)}

    eps = {name: preset.args.norm_eps for name, preset in PRESETS.items()}
    older = {"llama-7b", "llama-13b", "llama-30b", "llama-65b"}
    assert {name for name in eps if eps[name] == 1e-6} == older - {"llama-65b"}
    assert {*eps.values()} == {1e-5, 1e-6}

    assert {PRESETS[name].args.rope_theta for name in older} == column("llama-2-", "rope_theta") == {1e4}
    assert column("llama-3-", "rope_theta") == column("llama-3.", "rope_theta") == {5e5}
    assert column("codellama", "rope_theta") == {1e6, 1e4}
    assert [args.rope_theta for args in of("mistral")] == [1e4, 1e6, 1e6]
    assert [args.rope_theta for args in of("smollm2")] == [1e5, 1e5, 1.3e5]
    assert column("tinyllama", "rope_theta") == {1e4}

    contexts = {"llama-2-": 4096, "llama-3-": 8192, "llama-3.1": 131072, "llama-3.2": 131072}
    contexts |= {"llama-3.3": 131072, "tinyllama": 2048, "smollm2": 8192}
    for start, context in contexts.items():
        assert column(start, "max_seq_len") == {context}
    assert {PRESETS[name].args.max_seq_len for name in older} == {2048}
    assert {args.max_seq_len for args in of("mistral")} == {32768}
    windows = {name: p.args.sliding_window for name, p in PRESETS.items() if p.args.sliding_window}
    assert windows == {"mistral-7b-v0.1": 4096}

    scaled = {name: p.args.rope_scaling for name, p in PRESETS.items() if p.args.rope_scaling}
    assert all(name.startswith(("llama-3.1", "llama-3.2", "llama-3.3")) for name in scaled)
    assert len(scaled) == 6
    for name, scaling in scaled.items():
        assert scaling.type == "llama3"
        assert scaling.factor == (32.0 if name.startswith("llama-3.2") else 8.0)
        assert (scaling.low_freq_factor, scaling.high_freq_factor) == (1.0, 4.0)
        assert scaling.original_max_seq_len == 8192

    tied = {name for name, preset in PRESETS.items() if preset.tied}
    assert tied == {"llama-3.2-1b", "llama-3.2-3b", "smollm2-135m", "smollm2-360m", "smollm2-1.7b"}
    grouped = {name: p.args.n_heads // p.args.n_kv_heads for name, p in PRESETS.items()}
    assert {grouped[name] for name in older} == {1} and grouped["llama-2-70b"] == 8
    assert grouped["llama-3.1-405b"] == 16 and grouped["llama-3.2-3b"] == grouped["smollm2-360m"] == 3
    assert {args.head_dim for args in of("llama-3.2-1b") + of("smollm2") + of("tinyllama")} == {64}


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        PRESETS["llama-7b"] = None
    with pytest.raises(FrozenInstanceError):
        PRESETS["llama-7b"].tied = True


def test_the_default_model_is_one_of_them(smollm2_path):
    from numpy_llama.checkpoint import open_checkpoint

    assert open_checkpoint(smollm2_path).args == PRESETS["smollm2-135m"].args
