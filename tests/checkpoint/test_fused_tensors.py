"""Weights that are rows of one quantized tensor, as in Phi-3: each is made without the rows of the others."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from helpers import quantized, quantized_floats
from helpers.quantized import write_folder

from numpy_llama.backend.formats import StoredTensor
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.proof.tiny import TINY_BLOCKS

VARIANTS = quantized.VARIANTS | quantized_floats.VARIANTS
ARGS = replace(TINY_BLOCKS, dim=192, n_heads=24, n_kv_heads=2, head_dim=16, hidden_dim=384, n_layers=1)
# Rows of 25 numbers of 4 bits: every second row begins in the middle of a byte.
ODD = replace(TINY_BLOCKS, dim=25, n_layers=1)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_of_fused_tensors_bit_for_bit(name, tmp_path):
    wanted = write_folder(tmp_path, ARGS, VARIANTS[name], fused=True)
    for ours, w in open_checkpoint(tmp_path).weights().items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)


def peak_of(w: StoredTensor) -> int:
    """The most bytes that are in use while the bytes of a weight are made."""
    tracemalloc.start()
    try:
        assert w.data.nbytes == w.nbytes
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("name", VARIANTS)
def test_a_part_is_made_without_the_others(name, tmp_path):
    """Both are rows of qkv_proj. wq has 12 times the rows of wv, and takes several times its memory."""
    write_folder(tmp_path, ARGS, VARIANTS[name], fused=True)
    weights = open_checkpoint(tmp_path).weights()
    wq, wv = (weights[f"layers.0.attention.{part}.weight"] for part in ("wq", "wv"))
    assert 4 * peak_of(wv) < peak_of(wq)


ODD_ROWS = [name for name in VARIANTS if name.startswith(("nf4", "fp4"))]  # others have whole words


@pytest.mark.parametrize("name, args", [*((n, ARGS) for n in VARIANTS), *((n, ODD) for n in ODD_ROWS)])
def test_any_rows_of_a_weight(name, args, tmp_path):
    """Rows that begin in the middle of a word, or of a byte."""
    write_folder(tmp_path, args, VARIANTS[name])
    w = open_checkpoint(tmp_path).weights()["layers.0.feed_forward.w_up.weight"]
    whole = w.dequantize()
    for rows in (slice(0, 1), slice(3, 20), slice(17, len(w))):
        part = w.part(rows, None)
        assert part.shape == (rows.stop - rows.start, w.shape[1])
        np.testing.assert_array_equal(part.dequantize(), whole[rows])
    np.testing.assert_array_equal(w.part(slice(7, 23), None).part(slice(2, 9), None)[4], whole[13])
