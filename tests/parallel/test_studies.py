"""What looks into a model or exchanges its parts runs on ranks too, and sees the bits of one process."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import PROGRAM
from helpers.ranks import alone, on_ranks
from helpers.tiny_models import SPEAKER, write_speaker

from numpy_llama.proof.bounds import assert_near

STUDIES = str(Path(__file__).with_name("studies.py"))
ARGS = replace(SPEAKER, n_layers=3, n_heads=6, n_kv_heads=2)  # three ranks share two key/value heads
MODELS = {"Q8_0": ARGS, "F32": replace(ARGS, sliding_window=6)}


@pytest.fixture(scope="module", params=MODELS)
def path(request, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return write_speaker(folder / f"{request.param}.gguf", MODELS[request.param], request.param)


def seen(path: Path, out: Path, ranks: int) -> dict[str, np.ndarray]:
    """What studies.py sees. No ranks: in one process."""
    arguments = sys.executable, STUDIES, str(path), str(out)
    done = on_ranks(ranks, *arguments) if ranks else alone(*arguments)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b""), done.stderr.decode()
    with np.load(out) as found:
        return dict(found)


@pytest.fixture(scope="module")
def wanted(path, tmp_path_factory) -> dict[str, np.ndarray]:
    return seen(path, tmp_path_factory.mktemp("alone") / "seen.npz", 0)


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_is_seen_has_the_bits_of_one_process(ranks, path, wanted, tmp_path):
    got = seen(path, tmp_path / "seen.npz", ranks)
    assert got.keys() == wanted.keys() and len(got) > 300
    for name, array in wanted.items():
        assert got[name].dtype == array.dtype and got[name].shape == array.shape, name
        if name.startswith("float64"):  # NumPy's BLAS sums in an order that depends on the size of a matrix
            finite = np.isfinite(array)  # scores of later positions are not
            assert (finite == np.isfinite(got[name])).all(), name
            assert_near(got[name][finite], array[finite], 1e-12)
        else:
            assert np.array_equal(got[name], array, equal_nan=True), name


def test_each_exchange_changes_the_logits(wanted):
    without = wanted["default, unchanged"]
    exchanged = [array for name, array in wanted.items() if name.startswith("default, exchanged")]
    assert len(exchanged) == 22
    assert all(not np.array_equal(array, without) for array in exchanged)


@pytest.mark.parametrize(
    "command",
    [
        ["trace", "hello", "layers.*.attention.*", "output", "--json"],
        ["attention", "hello", "--layer", "1", "--head", "5"],
        ["lens", "hello", "--json"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_look_into_a_model(command, path):
    arguments = PROGRAM, *command, "-m", str(path), "-t", "1"
    wanted, done = alone(*arguments), on_ranks(3, *arguments)
    assert wanted.returncode == 0 and len(wanted.stdout) > 100
    assert (done.returncode, done.stdout, done.stderr) == (0, wanted.stdout, b"")


def test_verify_runs_on_rank_0(tmp_path):
    """It reads the file itself, layer by layer."""
    path = write_speaker(tmp_path / "model.gguf", ARGS)
    arguments = PROGRAM, "verify", "-m", str(path), "-t", "1"
    wanted, done = alone(*arguments), on_ranks(2, *arguments)
    assert (done.returncode, done.stderr) == (wanted.returncode, b"")

    def lines(text: bytes) -> list[bytes]:
        return [line for line in text.splitlines() if not line.startswith(b"took ")]

    assert lines(done.stdout) == lines(wanted.stdout) and b"verdict" in done.stdout
