"""A genuine file of Meta's layout, as another project's torch.save left it."""

import torch
from helpers.data import DATA

from numpy_llama.checkpoint.pytorch.file import TorchFile

PATH = DATA / "models/torchtune_tiny_fair_checkpoint.pt"


def test_same_as_torch():
    file, expected = TorchFile(PATH), torch.load(PATH, weights_only=True)
    file.verify()
    assert list(file.tensors) == list(expected) and len(expected) == 21
    for name, tensor in expected.items():
        assert file.tensors[name].shape == tuple(tensor.shape)
        assert torch.equal(torch.from_numpy(file.tensor(name).dequantize().copy()), tensor), name
        assert file.tensor(name).in_place


def test_all_layers_are_there():
    shapes = {name: info.shape for name, info in TorchFile(PATH).tensors.items()}
    assert shapes["tok_embeddings.weight"] == shapes["output.weight"] == (500, 32)
    assert sum(name.startswith("layers.1.") for name in shapes) == 9
