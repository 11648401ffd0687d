"""Beam search on a small real model, against transformers."""

import pytest
from helpers.beams import assert_same, by_transformers, searches
from helpers.data import DATA
from transformers import LlamaForCausalLM

import numpy_llama as nl

FOLDER = DATA / "models/hf_stories260K"


@pytest.fixture(scope="module")
def expected():
    theirs = LlamaForCausalLM.from_pretrained(FOLDER, attn_implementation="eager").eval()
    tokenizer = nl.load_tokenizer(FOLDER)
    comma, stop, the = (tokenizer.encode(text, bos=False)[-1] for text in (",", ".", " the"))
    cases = searches(tokenizer.vocab_size, [[], [tokenizer.eos_ids[0], stop], [comma, stop, the]])
    return [(one, by_transformers(theirs, one)) for one in cases]


@pytest.mark.parametrize("backend", ["numpy", "c"])
def test_ids_and_scores_are_those_of_transformers(expected, backend):
    llama = nl.load(FOLDER, backend=backend, exact=True)
    for search, texts in expected:
        assert_same(llama.model, search, texts)
