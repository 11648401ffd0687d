"""A model on several ranks has the bits of one process: for each format, cut evenly or not."""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.generations import GENERATIONS as EACH_GENERATION
from helpers.generations import with_tokenizer, write_source
from helpers.gguf_writer import byte_vocabulary, write_llama
from helpers.kernels import bits, real_weight
from helpers.quantized import VARIANTS, write_folder
from helpers.ranks import alone, on_ranks
from helpers.tiny_models import float_weights, write_tiny
from helpers.updates import every_matrix, random_updates

from numpy_llama.backend.formats import FORMATS, StoredTensor
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.adapters import write_gguf, write_peft
from numpy_llama.checkpoint.convert import convert
from numpy_llama.proof.bounds import assert_near
from numpy_llama.proof.tiny import GENERATIONS, TINY_BLOCKS

PASSES = str(Path(__file__).with_name("passes.py"))
# Three key/value heads, which two ranks share unevenly and four ranks cut. Rows are
# whole blocks of every format.
WIDE = replace(
    TINY_BLOCKS,
    dim=256,
    n_heads=12,
    n_kv_heads=3,
    head_dim=64,
    hidden_dim=512,
    vocab_size=600,
    max_seq_len=64,
)
NEAR = {"float32": 1e-5, "float64": 1e-13}  # of the largest logit
WINDOW = replace(WIDE, sliding_window=12)


def in_format(rng, args, format) -> dict[str, StoredTensor]:
    weights = {}
    for name, w in float_weights(args).items():
        kind = FORMATS["F32"] if w.ndim == 1 else format
        weights[name] = StoredTensor.quantize(w, kind) if kind.quantize else real_weight(rng, kind, *w.shape)
    return weights


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A folder of models: each format and generation, packed rows, windows, heads of odd sizes."""
    folder, rng = tmp_path_factory.mktemp("models"), np.random.default_rng(0)
    source = open_checkpoint(write_tiny(tmp_path_factory.mktemp("source") / "wide.gguf", "F32", args=WIDE))
    for name, format in FORMATS.items():
        convert(source, folder / f"{name}.gguf", None, weights=in_format(rng, WIDE, format))
    for name in ("Q4_0", "Q4_K"):
        packed = in_format(rng, WIDE, FORMATS[name])
        convert(source, folder / f"{name} packed.gguf", None, weights=packed, packed=True)
    write_tiny(folder / "window.gguf", args=WINDOW)
    for name in ("mqa", "llama2-70b", "llama3.2"):  # not fused: rows are no whole blocks
        args = replace(GENERATIONS[name], max_seq_len=64, vocab_size=256, rope_scaling=None)
        write_llama(folder / f"{name}.gguf", args, float_weights(args), **byte_vocabulary(256))
    (folder / "act-order").mkdir()
    write_folder(folder / "act-order", WIDE, VARIANTS["GPTQ act-order"])
    with_tokenizer(folder / "act-order")
    (folder / "Meta, 4 files").mkdir()
    write_source("Llama 3", "Meta, 4 files, F32", folder / "Meta, 4 files")
    for name in EACH_GENERATION:
        (folder / name).mkdir()
        write_source(name, "HF, safetensors, BF16", folder / name)
    return folder


def computed(models: Path, out: Path, ranks: int, **options) -> dict[str, np.ndarray]:
    """The logits of passes.py. No ranks: of one process."""
    arguments = sys.executable, PASSES, str(models), str(out), json.dumps(options)
    done = on_ranks(ranks, *arguments) if ranks else alone(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr.decode()
    with np.load(out) as found:
        return dict(found)


@pytest.fixture(scope="module")
def wanted(models, tmp_path_factory) -> dict[str, np.ndarray]:
    return computed(models, tmp_path_factory.mktemp("alone") / "logits.npz", 0)


@pytest.mark.parametrize(
    "ranks, options",
    [
        *((n, {}) for n in (1, 2, 3, 4)),
        *((2, {"shares": [3, 1]}), (4, {"shares": [1, 2, 3, 9]})),
        *((2, {"overlapping": True}), (3, {"shares": [2, 1, 1], "overlapping": True})),
    ],
)
def test_ranks_have_the_bits_of_one_process(ranks, options, models, wanted, tmp_path):
    """NumPy's BLAS sums in an order that depends on the size of a matrix: there the logits are near."""
    got = computed(models, tmp_path / "logits.npz", ranks, **options)
    assert got.keys() == wanted.keys() and len(got) > 70
    for name, logits in wanted.items():
        assert np.isfinite(logits).all() and logits.std() > 0.01, name
        if name.endswith(("float32", "float64")):
            assert_near(got[name], logits, NEAR[name[-7:]])
        else:
            assert (bits(got[name]) == bits(logits)).all(), name


@pytest.mark.parametrize("kind", ["fused", "not fused"])
def test_adapters_on_ranks(kind, tmp_path):
    """In every matrix: one in GGUF, half of one, one of PEFT. Four ranks share three key/value heads."""
    args = WIDE if kind == "fused" else replace(GENERATIONS["llama3.2"], max_seq_len=64, vocab_size=256)
    args, models = replace(args, rope_scaling=None), tmp_path / "models"
    models.mkdir()
    for name in ("F32", "Q4_0") if kind == "fused" else ("F32",):
        write_llama(
            models / f"{name}.gguf", args, float_weights(args), name, **byte_vocabulary(args.vocab_size)
        )
    updates = [random_updates(seed, every_matrix(r, args), args=args) for seed, r in ((1, 5), (2, 3))]
    write_gguf(tmp_path / "lora.gguf", updates[0], args)
    (tmp_path / "peft").mkdir()
    write_peft(tmp_path / "peft", updates[1], args)
    adapter = [str(tmp_path / "lora.gguf:0.5"), str(tmp_path / "peft")]
    wanted = computed(models, tmp_path / "alone.npz", 0, adapter=adapter)
    without = computed(models, tmp_path / "without.npz", 0)
    for ranks, shares in (2, [3, 1]), (4, None):
        got = computed(models, tmp_path / "logits.npz", ranks, shares=shares, adapter=adapter)
        assert got.keys() == wanted.keys()
        for name, logits in wanted.items():
            assert np.abs(without[name] - logits).max() > 0.1 * np.abs(logits).max()
            if name.endswith(("float32", "float64")):
                assert_near(got[name], logits, 10 * NEAR[name[-7:]])  # updates are large
            else:
                assert (bits(got[name]) == bits(logits)).all(), name
