"""A full disk, at each file that `train` and `finetune` write: one line, and the old files stand."""

import json
from pathlib import Path

import pytest
from helpers.full_disk import fill_disk
from helpers.tiny_models import write_speaker
from helpers.training import CORPUS

from numpy_llama.cli import runs

SHORT = ["--seq-len", "16", "--batch-size", "4", "--backend", "numpy", "--iters", "4", "--save-every", "2"]
MODEL = ["--dim", "16", "--layers", "1", "--heads", "2", "--kv-heads", "1", "--vocab-size", "300"]
ADAPTER = ("state.safetensors", "adapter_model.safetensors", "adapter_config.json")
RESULTS = {
    "train": ("state.safetensors", "config.json", "model.safetensors"),
    "lora": ADAPTER,
    "dpo": ADAPTER,
    "full": ("state.safetensors", "model.gguf"),
}
# A run saves twice. The other files are written once.
CASES = [(method, name, time) for method, names in RESULTS.items() for name in names for time in (1, 2)]
CASES += [(method, name, 1) for method in RESULTS for name in ("log.csv", "loss.png")]
CASES += [("train", "tokenizer.model", 1)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("disk")
    (folder / "train.txt").write_text(CORPUS)
    facts = [{"prompt": f"{i} is", "completion": f" {i + 1}"} for i in range(4)]
    pairs = [{"prompt": f"{i}?", "chosen": "yes", "rejected": "no"} for i in range(4)]
    for method, records in (("lora", facts), ("full", facts), ("dpo", pairs)):
        (folder / f"{method}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in records))
    write_speaker(folder / "model.gguf")
    return folder


@pytest.fixture
def train(folder, main, monkeypatch):
    """train(method, out) -> the exit code of the command."""
    monkeypatch.setattr(runs.Machine, "fma_peak", lambda self: 1.0)

    def run(method: str, out: Path) -> int:
        rest = ["--out", str(out), *SHORT, "--resume"]
        if method == "train":
            return main(["train", str(folder / "train.txt"), *MODEL, *rest])
        data, model = str(folder / f"{method}.jsonl"), str(folder / "model.gguf")
        rank = [] if method == "full" else ["--rank", "2"]
        return main(["finetune", data, "-m", model, "--method", method, *rank, *rest])

    return run


@pytest.mark.parametrize("method, name, time", CASES)
def test_the_run_ends_with_one_line_and_can_go_on(
    method, name, time, train, folder, tmp_path, capsys, monkeypatch
):
    """Its files are then those of a run on a disk with room."""
    out, whole = tmp_path / "run", folder / method
    if not whole.exists():
        assert train(method, whole) == 0
    with monkeypatch.context() as patch:
        fill_disk(patch, name, time)
        assert train(method, out) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last == f"numpy-llama: {out / name} was not written: No space left on device; nothing was changed"
    files = [path.name for path in out.glob("*")]  # none if not even the log was written
    assert not [path for path in files if path.startswith(".")]
    assert (name in files) == (time == 2)
    assert train(method, out) == 0
    for path in RESULTS[method]:
        assert (out / path).read_bytes() == (whole / path).read_bytes(), path
