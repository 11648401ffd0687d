"""Greedy ids against llama.cpp's, on weights that both hold in float32: equal up to the first near tie."""

import json

import numpy as np
import pytest
from helpers.data import DATA

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.checkpoint import open_checkpoint

# Where the two likeliest tokens are closer than this (in nat), two correct programs may choose differently.
NEAR_TIE = 2e-3
# Log-probabilities of the ten likeliest: six digits are given, both sides compute in float32.
LOGPROBS = 2e-3
GOLDEN = DATA / "golden"


def log_softmax(logits):
    logits = logits.astype(np.float64)
    logits = logits - logits.max()
    return logits - np.log(np.exp(logits).sum())


def compare(llama: nl.Llama, case: dict, near_tie: float = NEAR_TIE) -> int:
    """Follow the golden ids step by step; -> how many steps were compared before a near tie, if any."""
    ids = llama.tokenizer.encode(case["prompt"], bos=llama.tokenizer.add_bos)
    cache = llama.model.new_cache(max_seq_len=len(ids) + len(case["tokens"]))
    logits = llama.model(np.array([ids]), 0, cache)[0, -1]
    for i, (token, step) in enumerate(zip(case["tokens"], case["steps"], strict=True)):
        logprobs = log_softmax(logits)
        for other, expected in step:
            assert abs(logprobs[other] - expected) < LOGPROBS, (i, other)
        if step[0][1] - step[1][1] < near_tie:
            return i
        assert int(logits.argmax()) == token, f"step {i}"
        logits = llama.model(np.array([[token]]), len(ids) + i, cache)[0, -1]
    return len(case["tokens"])


@pytest.mark.parametrize("backend", ["numpy", "c"])
def test_smollm2(backend, smollm2_path):
    golden = json.loads((GOLDEN / "smollm2_dequantf32_llamacpp.json").read_text())
    llama = nl.load(smollm2_path, backend=backend, exact=True)
    compared = [compare(llama, case) for case in golden["cases"]]
    print(f"{backend}: steps compared {compared}")
    assert compared == [golden["n_predict"]] * len(golden["cases"])


@pytest.mark.parametrize("backend", ["numpy", "c"])
def test_stories260k(backend):
    golden = json.loads((GOLDEN / "stories260K_llamacpp_f32.json").read_text())
    llama = nl.load(DATA / "models" / "stories260K.gguf", backend=backend, exact=True)
    compared = [compare(llama, case) for case in golden["cases"]]
    print(f"{backend}: steps compared {compared}")
    assert sum(compared) > 0.9 * golden["n_predict"] * len(compared)


@pytest.mark.parametrize("model", ["stories260K.gguf", "stories260K.bin", "hf_stories260K"])
def test_the_published_story_comes_word_for_word(model):
    llama = nl.load(DATA / "models" / model)
    completion = llama.generate([llama.tokenizer.bos_id], max_tokens=200)
    expected = (GOLDEN / "stories260K_expected_stdout_200.txt").read_text()
    assert completion.text.strip() == expected.strip()


GOLDEN_QUANTS = json.loads((GOLDEN / "quants_golden.json").read_text())


@pytest.mark.parametrize("backend", ["numpy", "c"])
@pytest.mark.parametrize("name", GOLDEN_QUANTS)
def test_every_format(name, backend):
    """llama.cpp ran these on dequantized weights; so do we, by definition or by kernel."""
    golden = GOLDEN_QUANTS[name]
    llama = nl.load(DATA / "quants" / name, backend=backend, exact=True)
    ids = llama.tokenizer.encode(golden["prompt"], bos=True) if golden["prompt"] else golden["ids"]
    assert ids == golden["ids"]
    assert min(golden["gap"]) > 1e-3  # in nat, a hundred times what the rounding of both sides can do
    assert llama.generate(ids, max_tokens=len(golden["greedy"])).tokens == golden["greedy"]


def test_there_is_a_golden_file_for_every_format():
    files = {path.name for path in (DATA / "quants").glob("*.gguf")}
    assert files == GOLDEN_QUANTS.keys()


def test_tinyrand_in_float32():
    name = "tinyrand256-F32.gguf"
    file = open_checkpoint(DATA / "quants" / name)
    numpy_model, c_model = (build(file.args, file.weights(), backend=b, exact=True) for b in ("numpy", "c"))
    ids = np.array([GOLDEN_QUANTS[name]["ids"] if name in GOLDEN_QUANTS else list(range(1, 40))])
    expected = numpy_model(ids)
    assert np.abs(c_model(ids) - expected).max() < 1e-5 * np.abs(expected).max()


def test_mean_loss_of_tiny_stories():
    """The mean negative log-likelihood of five stories, as llama.cpp computes it."""
    golden = json.loads((GOLDEN / "stories260K_nll_tinystories5.json").read_text())
    llama = nl.load(DATA / "models" / "stories260K.gguf", exact=True)
    texts = (DATA / "text" / "tinystories_sample_5.txt").read_text().split("<|endoftext|>")
    stories = [text.strip() for text in texts if text.strip()]
    for story, expected in zip(stories, golden["docs"], strict=True):
        ids = llama.tokenizer.encode(story, bos=True)[:512]
        assert len(ids) == expected["n_tokens"] and ids[: len(expected["ids_head"])] == expected["ids_head"]
        logits = llama.model(np.array([ids]))[0]
        losses = [-log_softmax(row)[token] for row, token in zip(logits[:-1], ids[1:], strict=True)]
        assert abs(np.mean(losses) - expected["mean_nll"]) < 1e-5
