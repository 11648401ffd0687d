"""Blocks with LoRA in one C call: the same as their parts, with the same bits for any threads and chunks."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.tiny_models import float_weights

from numpy_llama.backend import build
from numpy_llama.backend.formats import StoredTensor
from numpy_llama.backend.fused import FusedBlock
from numpy_llama.backend.kernels import KernelWeight
from numpy_llama.checkpoint.names import expected_shape
from numpy_llama.lora import LowRank
from numpy_llama.model import RMSNorm
from numpy_llama.proof.tiny import TINY_BLOCKS

pytestmark = pytest.mark.usefixtures("threads_even_for_little_work")

# K * Dh = 24 is no multiple of a register.
ARGS = replace(TINY_BLOCKS, n_layers=3, n_kv_heads=1, head_dim=24, max_seq_len=40)
IDS = np.random.default_rng(1).integers(0, ARGS.vocab_size, (2, 30))
NAMES = ["attention.wq", "attention.wk", "attention.wv", "attention.wo"]
NAMES += ["feed_forward.w_gate", "feed_forward.w_up", "feed_forward.w_down"]
NEAR = 2e-5  # logits in float32, relative to the largest: each step rounds its sums in another order


def weights(format: str) -> dict[str, StoredTensor]:
    """Weights of one format. The rows of wq and wk lie in another order, as in a folder of Hugging Face."""
    rng, found = np.random.default_rng(4), {}
    for name, w in float_weights(ARGS).items():
        found[name] = one = StoredTensor.quantize(w, format if w.ndim == 2 else "F32")
        if name.split(".")[-2] in ("wq", "wk"):
            found[name] = StoredTensor(one.format, one.shape, one.data, rng.permutation(len(one)))
    return found


def updates(rng: np.random.Generator, names: list[str], ranks: tuple[int, ...]) -> dict[str, LowRank]:
    found = {}
    for i, name in enumerate(names):
        (OUT, IN), r = expected_shape(f"{name}.weight", ARGS), ranks[i % len(ranks)]
        a, b = rng.normal(size=(r, IN), scale=IN**-0.5), rng.normal(size=(OUT, r), scale=r**-0.5)
        found[f"{name}.weight"] = LowRank(a.astype(np.float32), b.astype(np.float32), 0.4)
    return found


def with_lora(chosen: dict[int, list[str]], format: str = "Q8_0", **options):
    """A model with updates of these weights in each layer. Neighbouring weights have other ranks."""
    names = [f"layers.{layer}.{name}" for layer, some in chosen.items() for name in some]
    adapters = [updates(np.random.default_rng(5), names, (3, 40, 8))]
    return build(ARGS, weights(format), adapters=adapters, **options)


EVERY = dict.fromkeys(range(3), NAMES)
CHOSEN = {"every": EVERY, "one layer": {1: NAMES}} | {name: {0: [name], 2: [name]} for name in NAMES}


@pytest.mark.parametrize("chosen", CHOSEN)
def test_a_fused_block_is_its_parts(chosen, isa):
    model, plain = with_lora(CHOSEN[chosen], exact=True), with_lora({}, exact=True)
    assert all(type(layer) is FusedBlock for layer in model.layers)
    parts = {f"layers.{i}.ffn_norm": RMSNorm(b.ffn_norm.weight, 1e-5) for i, b in enumerate(model.layers)}
    unfused = model.with_parts(parts)
    expected = unfused(IDS)
    assert np.abs(model(IDS) - expected).max() < NEAR * np.abs(expected).max()
    assert np.abs(plain(IDS) - expected).max() > 1e-2 * np.abs(expected).max()


@pytest.mark.parametrize("format", ["F32", "BF16", "Q4_0", "Q5_1"])
def test_every_format_has_the_same_update(format, isa):
    exact = with_lora(EVERY, format, exact=True)(IDS)
    numpy = with_lora(EVERY, format, backend="numpy")(IDS)
    assert np.abs(exact - numpy).max() < NEAR * np.abs(numpy).max()


@pytest.mark.parametrize("options", [{"exact": True}, {}], ids=str)
def test_threads_and_chunks_change_no_bit(options, isa):
    expected = with_lora(EVERY, threads=1, **options)(IDS)
    np.testing.assert_array_equal(with_lora(EVERY, threads=3, **options)(IDS), expected)
    model = with_lora(EVERY, threads=2, exact=True)
    cache, found = model.new_cache(2, 30), []
    for begin, end in [(0, 1), (1, 9), (9, 10), (10, 30)]:
        found.append(model(IDS[:, begin:end], begin, cache))
    np.testing.assert_array_equal(np.concatenate(found, axis=1), model(IDS))


CHANGES = {
    "lora_a": lambda part, other: KernelWeight(StoredTensor.quantize(-part.lora_a[:], "F32")),
    "lora_b": lambda part, other: KernelWeight(StoredTensor.quantize(-part.lora_b[:], "F32")),
    "scale": lambda part, other: 0.0,
    "base": lambda part, other: other.base,
    "base.weight": lambda part, other: other.base.weight,
}


@pytest.mark.parametrize("attribute", CHANGES)
def test_an_assigned_attribute_is_used(attribute):
    model = with_lora(EVERY)
    before, part, other = model(IDS), model.layers[1].attention.wq, model.layers[2].attention.wq
    changed, value = part, CHANGES[attribute](part, other)
    *steps, last = attribute.split(".")
    for step in steps:
        changed = getattr(changed, step)
    setattr(changed, last, value)
    assert np.abs(model(IDS) - before).max() > 1e-2 * np.abs(before).max()
