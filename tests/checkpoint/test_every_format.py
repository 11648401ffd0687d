"""One model of each generation in every format it can have: the same logits as transformers and PyTorch.

The files are written by the programs that write them in life: torch.save, transformers, gguf. The weights are
numbers that float16 and bfloat16 both hold exactly, so the format must not change the logits at all.
`pytest -s` prints the table of generations and formats.
"""

from functools import cache

import numpy as np
import pytest
import torch
from helpers.generations import FORMATS, GENERATIONS, IDS, hugging_face, weights_of

from numpy_llama.backend import build
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.proof import torch_llama

LOGITS = 5e-6  # of the largest logit: both sides compute in float32, over two layers


@cache
def expected(name: str) -> np.ndarray:
    """transformers' logits; the transcription in torch_llama.py must give the same."""
    with torch.no_grad():
        theirs = hugging_face(name)(torch.from_numpy(IDS)).logits.numpy()
    transcription = torch_llama.Transformer(GENERATIONS[name].args)
    transcription.load_state_dict({key: torch.from_numpy(w) for key, w in weights_of(name).items()})
    found = transcription(torch.from_numpy(IDS)).numpy()
    assert np.abs(found - theirs).max() <= LOGITS * np.abs(theirs).max()
    return theirs


# The writers: (name of the generation, an empty folder, ...) -> what to open


CASES = [
    (name, format)
    for name, generation in GENERATIONS.items()
    for format in FORMATS
    if not format.startswith("Meta") or int(format.split()[1]) in generation.shards
]
ERRORS: dict[tuple[str, str], float] = {}


@pytest.mark.parametrize("name, format", CASES, ids=lambda value: value.replace(" ", "_"))
def test_the_logits_are_those_of_transformers(name, format, tmp_path):
    wanted = expected(name)
    opened = open_checkpoint(FORMATS[format](name, tmp_path))
    assert opened.args == GENERATIONS[name].args
    for backend in ("numpy", "c"):
        found = build(opened.args, opened.weights(), backend=backend, exact=True)(IDS)
        error = np.abs(found - wanted).max() / np.abs(wanted).max()
        ERRORS[name, format] = max(error, ERRORS.get((name, format), 0))
    assert ERRORS[name, format] <= LOGITS


@pytest.mark.parametrize("name", GENERATIONS)
def test_no_format_changes_a_logit(name):
    """The table, in millionths of the largest logit, the worse of both paths: all of a row are equal."""
    errors = {format: error for (n, format), error in ERRORS.items() if n == name}
    print(f"\n{name}")
    for format, error in errors.items():
        print(f"  {format:<24} {1e6 * error:.2f}")
    assert len(set(errors.values())) <= 1
