"""A real model, whole: SmolLM2-135M-Instruct on both paths, against PyTorch, in any cut, on any threads."""

import numpy as np
import pytest
import torch
from numpy_llama.backend._kernels import lib

import numpy_llama as nl
from numpy_llama.backend import build
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.proof.oracle import transformers_model

# Logits against PyTorch's, relative to the largest. Measured: at most 3e-6 for NumPy, 4e-6 for C.
LOGITS_NUMPY = 5e-5
LOGITS_C = 5e-5
# The C kernels against NumPy on the same weights: both compute in float32, only the order of sums differs.
LOGITS_C_NUMPY = 1e-5
# The C kernels with activations of 8 or 15 bits, keys and values of 11. Measured: at most 6e-2 and 1e-3.
LOGITS_ROUNDED = {8: 0.15, 15: 6e-3}
# NumPy: BLAS adds in another order for another number of rows.
CHUNKS_NUMPY = 1e-5

PROMPTS = [
    "The history of science is the study of the development of science, including both the natural "
    "and social sciences. Science is a body of empirical, theoretical, and practical knowledge about "
    "the natural world, produced by scientists who emphasize the observation, explanation, and "
    "prediction of real-world phenomena. Historiography of science, in contrast, studies the methods "
    "employed by historians of science.",
    "def fibonacci(n):\n"
    '    """Return the first n Fibonacci numbers."""\n'
    "    a, b = 0, 1\n"
    "    numbers = []\n"
    "    while len(numbers) < n:\n"
    "        numbers.append(a)\n"
    "        a, b = b, a + b\n"
    "    return numbers\n"
    "\n"
    "\n"
    "def main():\n"
    "    for i, x in enumerate(fibonacci(20)):\n"
    "        print(i, x)\n",
    "To bake a simple loaf of bread, mix 500 g of flour with 10 g of salt, 7 g of yeast and 320 ml "
    "of warm water. Knead the dough for ten minutes until it is smooth, let it rise for an hour "
    "under a cloth, shape it, let it rise once more for 45 minutes, and bake it at 220 degrees for "
    "half an hour until it is golden brown.",
    "Die Würde des Menschen ist unantastbar. Sie zu achten und zu schützen ist Verpflichtung aller "
    "staatlichen Gewalt. Das Deutsche Volk bekennt sich darum zu unverletzlichen und "
    "unveräußerlichen Menschenrechten als Grundlage jeder menschlichen Gemeinschaft, des Friedens "
    "und der Gerechtigkeit in der Welt.",
    "Once upon a time there was a little girl who lived with her grandmother at the edge of a dark "
    "forest. Every morning she walked to the river to fetch water, and every evening she told her "
    "grandmother what she had seen: a fox with a white tail, an owl that spoke in riddles, and 3 "
    "stars that fell at once into the lake.",
]


@pytest.fixture(scope="module")
def checkpoint(smollm2_path):
    return open_checkpoint(smollm2_path)


@pytest.fixture(scope="module")
def tokens(checkpoint):
    encoded = [checkpoint.tokenizer().encode(prompt) for prompt in PROMPTS]
    assert min(map(len, encoded)) >= 64
    return [np.array([ids]) for ids in encoded]


@pytest.fixture(scope="module")
def numpy_model(checkpoint):
    return build(checkpoint.args, checkpoint.weights(), backend="numpy")


@pytest.fixture(scope="module")
def c_model(checkpoint):
    return build(checkpoint.args, checkpoint.weights(), backend="c", exact=True)


@pytest.fixture(scope="module")
def rounded_models(checkpoint):
    return {
        bits: build(checkpoint.args, checkpoint.weights(), activation_bits=bits) for bits in LOGITS_ROUNDED
    }


@pytest.fixture(scope="module")
def default_model(rounded_models):
    """As it is loaded by default."""
    return rounded_models[8]


@pytest.fixture(scope="module")
def numpy_logits(numpy_model, tokens):
    return [numpy_model(t) for t in tokens]


@pytest.fixture(scope="module")
def torch_logits(checkpoint, tokens):
    """transformers' LlamaForCausalLM holding the same dequantized weights."""
    args, weights = checkpoint.args, checkpoint.weights()
    model = transformers_model(args, {name: w.dequantize() for name, w in weights.items()})
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second pool of OpenMP threads beside ours would only disturb both
    with torch.no_grad():
        logits = [model(torch.from_numpy(t)).logits.numpy() for t in tokens]
    torch.set_num_threads(threads)
    return logits


def difference(a: np.ndarray, b: np.ndarray) -> float:
    """The largest difference, relative to the largest number."""
    return float(np.abs(a - b).max() / np.abs(b).max())


@pytest.mark.parametrize("i", range(len(PROMPTS)))
def test_logits_are_those_of_pytorch(i, tokens, numpy_logits, c_model, torch_logits):
    numpy_error, c_logits = difference(numpy_logits[i], torch_logits[i]), c_model(tokens[i])
    c_error, between = difference(c_logits, torch_logits[i]), difference(c_logits, numpy_logits[i])
    print(
        f"prompt {i}: NumPy - PyTorch {numpy_error:.1e}, C - PyTorch {c_error:.1e}, C - NumPy {between:.1e}"
    )
    assert numpy_error < LOGITS_NUMPY and c_error < LOGITS_C and between < LOGITS_C_NUMPY


def in_chunks(model: nl.Transformer, tokens: np.ndarray, size: int) -> np.ndarray:
    cache = model.new_cache(batch=1, max_seq_len=tokens.shape[1])
    starts = range(0, tokens.shape[1], size)
    return np.concatenate([model(tokens[:, i : i + size], i, cache) for i in starts], axis=1)


@pytest.mark.parametrize("size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 7])
def test_a_prompt_in_chunks_is_the_prompt_at_once(size, tokens, numpy_model, c_model, numpy_logits):
    numpy_error = difference(in_chunks(numpy_model, tokens[0], size), numpy_logits[0])
    chunked, whole = in_chunks(c_model, tokens[0], size), c_model(tokens[0])
    print(f"chunks of {size}: NumPy {numpy_error:.1e}, C {difference(chunked, whole)}")
    assert numpy_error < CHUNKS_NUMPY
    np.testing.assert_array_equal(chunked, whole)


@pytest.mark.parametrize("i", range(len(PROMPTS)))
@pytest.mark.parametrize("bits", LOGITS_ROUNDED)
def test_with_rounded_activations_logits_are_almost_those_of_numpy(
    i, bits, tokens, numpy_logits, rounded_models
):
    error = difference(rounded_models[bits](tokens[i]), numpy_logits[i])
    print(f"prompt {i}: {bits} bits - NumPy {error:.1e}")
    assert error < LOGITS_ROUNDED[bits]


@pytest.mark.parametrize("size", [1, 2, 7, 14])
def test_by_default_chunks_change_no_bit_except_in_decode(size, tokens, default_model):
    """One to eight tokens give the same among each other; attention has another kernel for more."""
    some = tokens[0][:, : tokens[0].shape[1] // 14 * 14]
    chunked, whole = in_chunks(default_model, some, size), default_model(some)
    if size <= lib.NL_GEMV_TOKENS:
        assert difference(chunked, whole) < LOGITS_ROUNDED[8]
        np.testing.assert_array_equal(chunked, in_chunks(default_model, some, 1))
    else:
        np.testing.assert_array_equal(chunked, whole)


@pytest.mark.parametrize("exact", [True, False])
def test_threads_change_no_bit(exact, checkpoint, tokens, c_model, default_model):
    expected = (c_model if exact else default_model)(tokens[1])
    for threads in (1, 2, 3):
        model = build(checkpoint.args, checkpoint.weights(), threads=threads, exact=exact)
        np.testing.assert_array_equal(model(tokens[1]), expected)


def test_a_batch_changes_no_bit(tokens, c_model):
    """Sequences side by side give what each gives alone."""
    length = min(t.shape[1] for t in tokens)
    batch = np.concatenate([t[:, :length] for t in tokens[:3]])
    alone = np.concatenate([c_model(row[None]) for row in batch])
    np.testing.assert_array_equal(c_model(batch), alone)
