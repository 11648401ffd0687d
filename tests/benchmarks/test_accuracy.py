"""benchmarks/accuracy.py: its tables are what they say."""

import numpy as np
import pytest
from helpers.benchmarks import script

from numpy_llama.backend.formats import FORMATS, ROUNDED_TABLES


@pytest.fixture(scope="module")
def accuracy():
    return script("accuracy")


def test_linear(accuracy):
    """Every format, with numbers that only the right sides of each comparison give."""
    _, _, *rows = list(accuracy.linear_table(threads=1, OUT=16, IN=512))
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [(name, kind) for name, kind, *_ in cells] == [
        (name, kind) for name in FORMATS for kind in ("normal", "outliers")
    ]
    for name, _, *numbers in cells:
        _, _, default, _, exact, worst, ggml, _ = map(float, numbers)
        assert 0 < exact < 1e-12 and 0 < worst < 1e-5, name
        times = 2.5 if name in ROUNDED_TABLES else 1.05  # the numbers of a table are rounded too
        assert exact <= default < (times * ggml if FORMATS[name].block > 1 else 1e-6), name
        assert ggml > (1e-6 if FORMATS[name].block > 1 else 0) or name == "F32", name


def test_the_score_of_a_contestant(accuracy, rng):
    reference, ids = rng.normal(size=(40, 30)).astype(np.float32), rng.integers(0, 30, 40).tolist()
    off = reference.copy()
    off[3, 7] += 2
    same, other = accuracy.Score(), accuracy.Score()
    same.add(reference, reference, ids)
    other.add(off, reference, ids)
    assert (same.error, same.kl, same.n) == (0, 0, 40)
    assert other.error == pytest.approx(2) and other.largest == np.abs(reference).max()
    p, q = (np.exp(x[3].astype(np.float64)) for x in (reference, off))
    p, q = p / p.sum(), q / q.sum()
    assert other.kl == pytest.approx((p * np.log(p / q)).sum(), rel=1e-6)
    logprobs = np.log(np.exp(off) / np.exp(off).sum(axis=-1, keepdims=True))
    assert other.nll == pytest.approx(-logprobs[np.arange(40), ids].sum(), rel=1e-5)
