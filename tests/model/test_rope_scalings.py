"""Every kind of RoPE scaling: read as published, computed as transformers does, converted without loss.

`pytest -s` prints the largest errors. transformers chooses LongRoPE's list and dynamic NTK's theta by the
length of a text, we by the size of the context. Here both lie on the same side of the original context.
"""

import base64
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.gguf_writer import gguf_bytes, llama_metadata, llama_tensors
from helpers.tiny_models import float_weights
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

import numpy_llama as nl
from numpy_llama import cli
from numpy_llama.backend import build
from numpy_llama.checkpoint import convert, open_checkpoint
from numpy_llama.checkpoint.names import tensor_names
from numpy_llama.checkpoint.rope_scalings import as_float32
from numpy_llama.errors import ParameterError
from numpy_llama.functional import rope_freqs
from numpy_llama.proof.oracle import half_split
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.rope import (
    DynamicScaling,
    ExplicitScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    YarnScaling,
    longrope_length,
    yarn_length,
)

logging.disable_progress_bar()

LOGITS = 5e-6  # of the largest logit: both sides compute in float32, over two layers
ORIGINAL, LONGER = 32, 96  # positions

# The vocabulary is larger than the 512 ids of the smallest tokenizer.
ARGS = replace(TINY_BLOCKS, dim=128, head_dim=32, hidden_dim=160, vocab_size=576, max_seq_len=LONGER)
PAIRS = ARGS.head_dim // 2
SHORT = np.float32(1 + 0.02 * np.arange(PAIRS)).tolist()
LONG = np.float32(1 + 0.4 * np.arange(PAIRS) ** 1.3).tolist()
ANY = np.float32(np.random.default_rng(3).uniform(0.2, 40, PAIRS)).tolist()
OVER = {"original_max_position_embeddings": ORIGINAL}
LISTS = OVER | {"short_factor": SHORT, "long_factor": LONG}
YARN_4 = as_float32(yarn_length(4.0))
STRETCHED = as_float32(longrope_length(LONGER / ORIGINAL, ORIGINAL))

# What config.json says, and what is read from it.
KINDS = {
    "linear": ({"rope_type": "linear", "factor": 3.0}, LinearScaling(3.0)),
    "dynamic": ({"rope_type": "dynamic", "factor": 2.0}, DynamicScaling(2.0, ORIGINAL)),
    "llama3": (
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | OVER,
        Llama3Scaling(8.0, 1.0, 4.0, ORIGINAL),
    ),
    "yarn": ({"rope_type": "yarn", "factor": 4.0} | OVER, YarnScaling(4.0, ORIGINAL, YARN_4)),
    "yarn, attention_factor": (
        {"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.75} | OVER,
        YarnScaling(4.0, ORIGINAL, 0.75),
    ),
    "yarn, mscale": (
        {"rope_type": "yarn", "factor": 40.0, "mscale": 1.5, "mscale_all_dim": 0.5} | OVER,
        YarnScaling(40.0, ORIGINAL, as_float32(yarn_length(40.0, 1.5) / yarn_length(40.0, 0.5))),
    ),
    "yarn, betas": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "beta_slow": 0.5} | OVER,
        YarnScaling(4.0, ORIGINAL, YARN_4, 4.0, 0.5),
    ),
    "yarn, not truncated": (
        {"rope_type": "yarn", "factor": 4.0, "beta_fast": 4.0, "truncate": False} | OVER,
        YarnScaling(4.0, ORIGINAL, YARN_4, 4.0, truncate=False),
    ),
    "longrope": (
        {"rope_type": "longrope"} | LISTS,
        LongRopeScaling(tuple(SHORT), tuple(LONG), ORIGINAL, STRETCHED),
    ),
    "longrope, factor": (
        {"rope_type": "longrope", "factor": 16.0} | LISTS,
        LongRopeScaling(tuple(SHORT), tuple(LONG), ORIGINAL, as_float32(longrope_length(16.0, ORIGINAL))),
    ),
    "longrope, attention_factor": (
        {"rope_type": "longrope", "attention_factor": 1.19} | LISTS,
        LongRopeScaling(tuple(SHORT), tuple(LONG), ORIGINAL, 1.19),
    ),
}


def hugging_face(rope: dict, max_seq_len: int) -> LlamaForCausalLM:
    """The random model of ARGS with this RoPE, as transformers runs it."""
    config = LlamaConfig(
        vocab_size=ARGS.vocab_size,
        hidden_size=ARGS.dim,
        intermediate_size=ARGS.hidden_dim,
        num_hidden_layers=ARGS.n_layers,
        num_attention_heads=ARGS.n_heads,
        num_key_value_heads=ARGS.n_kv_heads,
        head_dim=ARGS.head_dim,
        rms_norm_eps=ARGS.norm_eps,
        max_position_embeddings=max_seq_len,
        rope_parameters=rope | {"rope_theta": ARGS.rope_theta},
        attn_implementation="eager",
    )
    model, weights = LlamaForCausalLM(config).eval(), float_weights(ARGS, 7)
    heads = {"wq": ARGS.n_heads, "wk": ARGS.n_kv_heads}
    model.load_state_dict(
        {
            theirs: torch.from_numpy(half_split(w, heads[kind]) if kind in heads else w)
            for ours, theirs in tensor_names(ARGS, "hf").items()
            for w, kind in [(weights[ours], ours.split(".")[-2])]
        }
    )
    return model


def written(model: LlamaForCausalLM, folder):
    """The folder that transformers writes, with the smallest tokenizer."""
    model.save_pretrained(folder)
    lines = (f"{base64.b64encode(bytes([b])).decode()} {b}\n" for b in range(256))
    (folder / "tokenizer.model").write_text("".join(lines))
    return open_checkpoint(folder)


@pytest.mark.parametrize("head_dim", [64, 96, 128])
@pytest.mark.parametrize("theta", [1e4, 5e5])
def test_the_angles_are_those_of_pytorch_to_the_last_bit(head_dim, theta):
    """Position 100,000 multiplies an error by as much. PyTorch's own powers may have one, of 1 ulp."""
    theirs = 1.0 / theta ** (torch.arange(0, head_dim, 2).float() / head_dim)
    ours = rope_freqs(head_dim, theta, np.float32)
    np.testing.assert_array_max_ulp(ours, theirs.numpy(), 2)
    assert (ours == theirs.numpy()).mean() > 0.9


def error_against(model: LlamaForCausalLM, opened, context: int, T: int, backends=("numpy", "c")) -> float:
    """The largest error of a logit, of all `backends`, relative to the largest logit."""
    ids = np.random.default_rng(1).integers(0, ARGS.vocab_size, (2, T))
    with torch.no_grad():
        wanted = model(torch.from_numpy(ids)).logits.numpy()
    args, worst = replace(opened.args, max_seq_len=context), 0.0
    for backend in backends:
        found = build(args, opened.weights(), backend=backend, exact=True)(ids)
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    return worst


@pytest.mark.parametrize("T", [ORIGINAL, LONGER], ids=["short", "long"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "_"))
def test_every_kind_is_that_of_transformers(kind, T, tmp_path):
    rope, scaling = KINDS[kind]
    model = hugging_face(rope, ORIGINAL if kind == "dynamic" else LONGER)
    opened = written(model, tmp_path)
    assert opened.args.rope_scaling == scaling
    error = error_against(model, opened, T, T)
    print(f"\n{kind:<28} {T:>3} positions: {1e6 * error:.2f}e-6")
    assert error <= LOGITS
    # Without the scaling it would be another model: this test can fail.
    plain = replace(opened.args, rope_scaling=None, max_seq_len=LONGER)
    same = kind == "dynamic" and T == ORIGINAL
    opened.__dict__["args"] = plain
    assert (error_against(model, opened, T, T, ["numpy"]) <= LOGITS) == same


@pytest.mark.parametrize("T", [ORIGINAL, LONGER], ids=["short", "long"])
def test_any_divisors_are_those_of_transformers(T, tmp_path):
    """A GGUF file's rope_freqs.weight; in transformers it is a LongRoPE with two equal lists."""
    lists = {"short_factor": ANY, "long_factor": ANY, "attention_factor": 1.0}
    model = hugging_face(
        {"rope_type": "longrope", "original_max_position_embeddings": LONGER} | lists, LONGER
    )
    tensors = llama_tensors(ARGS, float_weights(ARGS, 7))
    divisors = convert.StoredTensor.quantize(np.float32(ANY), "F32")
    (tmp_path / "x.gguf").write_bytes(
        gguf_bytes(llama_metadata(ARGS), tensors | {"rope_freqs.weight": divisors})
    )
    opened = open_checkpoint(tmp_path / "x.gguf")
    assert opened.args.rope_scaling == ExplicitScaling(tuple(ANY))
    error = error_against(model, opened, LONGER, T)
    print(f"\n{'explicit':<28} {T:>3} positions: {1e6 * error:.2f}e-6")
    assert error <= LOGITS


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.replace(" ", "_"))
def test_every_kind_survives_conversion(kind, tmp_path):
    old = written(hugging_face(KINDS[kind][0], LONGER), tmp_path)
    new = open_checkpoint(convert.convert(old, tmp_path / "out.gguf", "f32"))
    assert new.args == old.args
    ids = np.random.default_rng(1).integers(0, ARGS.vocab_size, (1, LONGER))
    logits = [build(c.args, c.weights(), exact=True)(ids) for c in (old, new)]
    np.testing.assert_array_equal(*logits)


def test_the_size_of_the_context_chooses():
    """Up to the original context the short list and the old theta, above it the others."""
    longrope = KINDS["longrope"][1]
    for context, which in [(1, SHORT), (ORIGINAL, SHORT), (ORIGINAL + 1, LONG), (LONGER, LONG)]:
        np.testing.assert_array_equal(longrope.divisors(np.ones(PAIRS), 1e4, context), which)
    assert "short factors, because the context of 32 is not above 32" in longrope.describe(ORIGINAL)
    assert "long factors, because the context of 33 is above 32" in longrope.describe(ORIGINAL + 1)
    dynamic = KINDS["dynamic"][1]
    assert (dynamic.divisors(np.ones(PAIRS), 1e4, ORIGINAL) == 1).all()
    assert dynamic.divisors(np.ones(PAIRS), 1e4, 2 * ORIGINAL)[-1] == 3.0


def test_whoever_loads_a_model_chooses_its_context(tmp_path):
    """A smaller one takes LongRoPE's short list. Only with a dynamic scaling may it be larger."""
    for kind in ("longrope", "dynamic"):
        (tmp_path / kind).mkdir()
        written(hugging_face(KINDS[kind][0], LONGER if kind == "longrope" else ORIGINAL), tmp_path / kind)
    for context, which in [(None, LONG), (LONGER, LONG), (ORIGINAL, SHORT)]:
        args = nl.load(tmp_path / "longrope", max_seq_len=context, backend="numpy").model.args
        freqs = rope_freqs(ARGS.head_dim, ARGS.rope_theta)
        found = args.rope_scaling.divisors(freqs, args.rope_theta, args.max_seq_len)
        np.testing.assert_array_equal(found, which)
    for context in (None, 7, 4 * ORIGINAL):
        args = nl.load(tmp_path / "dynamic", max_seq_len=context, backend="numpy").model.args
        assert args.max_seq_len == context or (context, args.max_seq_len) == (None, ORIGINAL)
    for kind, wrong in [
        ("longrope", LONGER + 1),
        ("dynamic", (1 << 20) + 1),
        *(("longrope", x) for x in BAD),
    ]:
        with pytest.raises(ParameterError, match=r"max_seq_len is .* allows a whole number from 1 to"):
            nl.load(tmp_path / kind, max_seq_len=wrong)


BAD = (0, -1, 2.5, "32", True)


def test_info_says_which_angles_a_model_has(tmp_path, capsys):
    for kind, line in [
        ("longrope", "longrope, its long factors, because the context of 96 is above 32"),
        ("dynamic", "dynamic, factor 2, as trained, because the context of 96 is not above 96"),
        ("yarn", "yarn, factor 4, original context 32"),
    ]:
        written(hugging_face(KINDS[kind][0], LONGER), tmp_path)
        assert cli.main(["info", str(tmp_path)]) == 0
        assert f"rope_scaling     {line}\n" in capsys.readouterr().out
