"""benchmarks/make_weights.py: what it writes is what such a model comes in."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from test_every_format import LLAMA_31

import numpy_llama as nl
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.presets import Preset

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "make_weights.py"


@pytest.fixture
def make_weights(monkeypatch):
    spec = importlib.util.spec_from_file_location("make_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "PRESETS", {"tiny": Preset(LLAMA_31), "tied": Preset(LLAMA_31, True)})
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


def test_pytorch_reads_the_meta_file(make_weights, tmp_path):
    make_weights("tiny", tmp_path / "m", "--format", "meta")
    state = torch.load(tmp_path / "m" / "consolidated.00.pth", weights_only=True)
    ours = open_checkpoint(tmp_path / "m").weights()["layers.1.feed_forward.w_down.weight"]
    theirs = state["layers.1.feed_forward.w2.weight"].float().numpy()
    np.testing.assert_array_equal(ours.dequantize(), theirs)
