"""Perplexity on WikiText-2 against llama.cpp's, on weights that both hold in float32."""

import pytest
from helpers.data import DATA

import numpy_llama as nl
from numpy_llama.inspect.perplexity import perplexity

LLAMA_CPP = 21.3722  # after two windows of 512 tokens, of the file dequantized to float32
ROUNDED = 1e-3  # it is given to 5e-5; activations in float32 in another order move it by less than this
# llama.cpp's activations of 8 bits move it by 0.1 and more.
EIGHT_BITS, FIFTEEN_BITS = 8e-2, 1e-2


@pytest.mark.parametrize(
    "options, tolerance",
    [
        ({"backend": "numpy"}, ROUNDED),
        ({"exact": True}, ROUNDED),
        ({}, EIGHT_BITS),
        ({"activation_bits": 15}, FIFTEEN_BITS),
    ],
)
def test_smollm2(options, tolerance, smollm2_path):
    llama = nl.load(smollm2_path, **options)
    text = (DATA / "text" / "wiki.test.raw").read_bytes()[:10_000].decode()
    *_, result = perplexity(llama.model, llama.tokenizer.encode(text), 512, most=2)
    print(f"{options}: {result.perplexity:.4f} +/- {result.standard_error:.4f}")
    assert (result.windows, result.tokens) == (2, 510)
    assert abs(result.perplexity - LLAMA_CPP) < tolerance
