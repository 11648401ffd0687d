"""benchmarks/make_weights.py: what it writes is what such a model comes in."""

import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.benchmarks import script
from helpers.generations import LLAMA_31

import numpy_llama as nl
from numpy_llama.backend.formats import FORMATS
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.convert import convert
from numpy_llama.checkpoint.presets import Preset

WIDE = replace(LLAMA_31, dim=256, n_heads=16, n_kv_heads=4, head_dim=16, hidden_dim=512)  # for K formats
PRESETS = {
    "tiny": Preset(LLAMA_31),
    "tied": Preset(LLAMA_31, True),
    "wide": Preset(WIDE),
    "wide, tied": Preset(WIDE, True),
    "many words": Preset(replace(LLAMA_31, vocab_size=9000)),
    "wordless": Preset(replace(LLAMA_31, vocab_size=258)),
}
SPREAD = 0.1  # how far the deviation of some 100,000 random weights, in a few thousand blocks, may be off


@pytest.fixture
def make_weights(monkeypatch):
    module = script("make_weights")
    monkeypatch.setattr(module, "PRESETS", PRESETS)
    for name, number in (("SHARD_BYTES", 300_000), ("POOL", 1 << 18), ("PIECE", 1 << 12)):
        monkeypatch.setattr(module, name, number)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["make_weights.py", *map(str, arguments)])
        module.main()

    return run


@pytest.mark.parametrize(
    "arguments, format", [(["tiny"], "Hugging Face"), (["tied"], "Hugging Face"), (["tiny", "meta"], "Meta")]
)
def test_it_can_be_run(arguments, format, make_weights, tmp_path):
    preset, *kind = arguments
    make_weights(preset, tmp_path / "m", *(["--format", *kind] if kind else []))
    opened = open_checkpoint(tmp_path / "m")
    assert (opened.format, opened.args.rope_scaling) == (format, LLAMA_31.rope_scaling)
    assert all(w.in_place and w.format.name == "BF16" for w in opened.weights().values())
    # So scaled that what goes through the layers neither dies nor grows.
    llama = nl.load(tmp_path / "m")
    logits = llama.model(np.array([[1, 2, 3, 4]]))
    assert 0.1 < logits.std() < 10
    assert len(llama.generate([1, 2, 3], max_tokens=5).tokens) <= 5


def test_convert_takes_a_large_vocabulary(make_weights, tmp_path):
    """A GGUF file lists merges, and they make every word."""
    make_weights("many words", tmp_path / "m")
    convert(open_checkpoint(tmp_path / "m"), tmp_path / "m.gguf", "bf16")
    text = "Once upon a time"
    for path in (tmp_path / "m", tmp_path / "m.gguf"):
        tokenizer = nl.load_tokenizer(path)
        assert tokenizer.decode(tokenizer.encode(text)) == text and len(tokenizer.encode(text)) == len(text)


def test_pytorch_reads_the_meta_file(make_weights, tmp_path):
    make_weights("tiny", tmp_path / "m", "--format", "meta")
    state = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    ours = open_checkpoint(tmp_path / "m").weights()["layers.1.feed_forward.w_down.weight"]
    theirs = state["layers.1.feed_forward.w2.weight"].float().numpy()
    np.testing.assert_array_equal(ours.dequantize(), theirs)


@pytest.mark.parametrize("dtype", [*FORMATS, "Q4_K_M"])
def test_a_gguf_file_in_every_format(dtype, make_weights, tmp_path):
    make_weights("wide", tmp_path / "m.gguf", "--format", "gguf", "--dtype", dtype, "--layers", 3)
    opened = open_checkpoint(tmp_path / "m.gguf")
    assert opened.args == replace(WIDE, n_layers=3)
    for name, w in opened.weights().items():
        if len(w.shape) == 1:
            np.testing.assert_array_equal(w.dequantize(), 1)
            continue
        assert dtype == "Q4_K_M" or w.format.name == dtype
        x = w.dequantize() * w.shape[1] ** 0.5
        assert abs(x.std() - 1) < SPREAD and abs(x.mean()) < 0.15, name  # Q4_0's mean is half a step off
        assert len(np.unique(x[:8], axis=0)) == 8
    llama = nl.load(tmp_path / "m.gguf")
    assert llama.tokenizer.decode(llama.tokenizer.encode("Llama")).endswith("Llama")
    assert 0.1 < llama.model(np.array([[1, 2, 3, 4]])).std() < 10


@pytest.mark.parametrize("preset", ["wide", "wide, tied"])
def test_q4_k_m_is_the_mixture_of_llama_cpp(preset, make_weights, tmp_path):
    make_weights(preset, tmp_path / "m.gguf", "--format", "gguf", "--dtype", "Q4_K_M", "--layers", 8)
    weights = open_checkpoint(tmp_path / "m.gguf").weights()
    tied = weights["output.weight"] is weights["tok_embeddings.weight"]
    assert tied == (preset == "wide, tied")
    better = {
        f"layers.{i}.{name}.weight" for i in (0, 3, 6, 7) for name in ("attention.wv", "feed_forward.w_down")
    }
    better |= {"output.weight", "tok_embeddings.weight"} if tied else {"output.weight"}
    assert {name for name, w in weights.items() if w.format.name == "Q6_K"} == better
    assert {w.format.name for w in weights.values()} == {"Q4_K", "Q6_K", "F32"}


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["tiny", "--format", "gguf", "--dtype", "Q4_K"], "has rows of 128; Q4_K needs a multiple of 256"),
        (["wordless", "--format", "gguf"], "258 tokens"),
        (["tiny", "--dtype", "Q4_0"], "--format gguf"),
        (["tiny", "--layers", "0"], "1 or above"),
    ],
)
def test_what_cannot_be_made_is_refused(arguments, message, make_weights, tmp_path, capsys):
    preset, *options = arguments
    with pytest.raises(SystemExit) as refused:
        make_weights(preset, tmp_path / "m", *options)
    assert message in f"{refused.value} {capsys.readouterr().err}"
    assert not (tmp_path / "m").exists()
