"""Folders quantised by GPTQ, AWQ and compressed-tensors: their weights bit for bit, and their logits."""

from dataclasses import replace

import numpy as np
import pytest
from helpers.quantized import VARIANTS, write_folder

from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.proof.tiny import TINY_BLOCKS

ARGS = replace(TINY_BLOCKS, dim=96, hidden_dim=192, n_heads=6, n_kv_heads=2, head_dim=16)


@pytest.mark.parametrize("name", VARIANTS)
def test_weights_are_those_of_the_file(name, tmp_path):
    wanted = write_folder(tmp_path, ARGS, VARIANTS[name])
    opened = open_checkpoint(tmp_path)
    for ours, w in opened.weights().items():
        np.testing.assert_array_equal(w.dequantize(), wanted[ours], ours)
        if ours.startswith("layers") and w.dequantize().ndim == 2:
            print(name, ours, w.format.name)
