"""The GGUF reader on real files, against the reference reader and ggml's own dequantization."""

import numpy as np
import pytest
from gguf import GGUFReader, dequantize
from helpers.data import DATA

from numpy_llama.backend.formats import FORMATS, OURS
from numpy_llama.checkpoint.gguf.file import GGUFFile
from numpy_llama.checkpoint.gguf.model import model_args, weights
from numpy_llama.errors import MismatchError

FILES = sorted(p for folder in ("models", "quants", "tokenizers") for p in (DATA / folder).glob("*.gguf"))
LONG = 50_000  # elements; the reference reader takes seconds to decode a longer array
EXPANDED = {"IQ4_XS", "Q2_K"}  # read through the gguf package


def test_the_files_are_there():
    assert len(FILES) == 15
    of_ggml = {name for name, format in FORMATS.items() if format.code < OURS}
    assert {p.stem.split("-")[-1] for p in FILES} >= EXPANDED | of_ggml - {"F32", "Q5_1", "Q5_K"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_same_as_the_reference(path):
    reference, file = GGUFReader(path), GGUFFile(path)
    fields = {key: field for key, field in reference.fields.items() if not key.startswith("GGUF.")}
    assert list(fields) == list(file.metadata)
    for key, field in fields.items():
        found = file.metadata[key]
        if len(field.data) < LONG:
            assert (found.tolist() if isinstance(found, np.ndarray) else found) == field.contents(), key
        else:
            assert len(found) == len(field.data), key
            assert found[-1] == field.contents(-1), key
    assert [t.name for t in reference.tensors] == list(file.tensors)
    for tensor in reference.tensors:
        info = file.tensors[tensor.name]
        assert (info.type_name, info.offset) == (tensor.tensor_type.name, tensor.data_offset)
        assert info.type_name in FORMATS.keys() | EXPANDED
        found, wanted = file.tensor(tensor.name), dequantize(tensor.data, tensor.tensor_type)
        assert found.in_place == (info.type_name in FORMATS)
        assert found.shape == wanted.shape
        assert found.dequantize().tobytes() == np.ascontiguousarray(wanted, np.float32).tobytes(), tensor.name


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_each_is_a_model_or_a_vocabulary(path):
    file = GGUFFile(path)
    if not file.tensors:
        with pytest.raises(MismatchError, match="a vocabulary without a model"):
            model_args(file)
        return
    args = model_args(file)
    assert args.vocab_size == len(file.metadata["tokenizer.ggml.tokens"])
    assert len(weights(file, args)) == 3 + 9 * args.n_layers
