"""Runs with the C kernels: NumPy's losses, the same bits on any number of threads, a quantized base."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.gguf_writer import byte_vocabulary, write_llama
from helpers.tiny_models import LOOKED_INTO, float_weights
from helpers.training import CORPUS, begin, finish

from numpy_llama.backend.kernels import KernelWeight
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.training.compute import c_compute, numpy_compute
from numpy_llama.training.data import read_data
from numpy_llama.training.finetune import LoRA, finetune
from numpy_llama.training.lora import TARGETS
from numpy_llama.training.optimizer import Hyperparameters
from numpy_llama.training.run import open_folder
from numpy_llama.training.trainer import Schedule


def losses(out: Path) -> np.ndarray:
    return np.array([float(line.split(",")[1]) for line in (out / "log.csv").read_text().splitlines()[1:]])


def pretrained(out: Path, corpus: Path, compute) -> Path:
    finish(begin(out, corpus, compute=compute, dim=64))
    return out


def test_a_run_has_numpys_losses_and_the_same_bits_on_any_number_of_threads(
    tmp_path, threads_even_for_little_work
):
    (corpus := tmp_path / "corpus.txt").write_text(CORPUS)
    one, two = (pretrained(tmp_path / f"run{n}", corpus, c_compute(n)) for n in (1, 2))
    numpys = pretrained(tmp_path / "numpy", corpus, numpy_compute())
    assert (one / "state.safetensors").read_bytes() == (two / "state.safetensors").read_bytes()
    # float32 with sums in another order; AdamW divides by the size of gradients that may be tiny
    np.testing.assert_allclose(losses(one), losses(numpys), rtol=1e-3)


@pytest.mark.parametrize("format", ["Q8_0", "Q4_0", "BF16"])
def test_lora_beside_weights_that_stay_as_they_are_stored(format, tmp_path):
    path = tmp_path / "model.gguf"
    args = replace(LOOKED_INTO, n_layers=1)
    write_llama(path, args, float_weights(args), format, **byte_vocabulary(args.vocab_size))
    facts = [{"prompt": chr(33 + i), "completion": chr(43 - i)} for i in range(4)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(fact) + "\n" for fact in facts))

    def trained(name: str, compute, steps: int = 3, resume: bool = False) -> Path:
        with open_folder(tmp_path / name, resume) as folder:
            run = finetune(
                open_checkpoint(path),
                read_data(tmp_path / "data.jsonl"),
                folder,
                "lora",
                compute,
                Hyperparameters(1e-2),
                Schedule(3),
                LoRA(4, 8.0, False, [*TARGETS]),
                seq_len=16,
                batch_size=2,
            )[0]
        base = run.trainer.learner.layers[0].attention.wq.base
        assert isinstance(base.weight, KernelWeight) == (compute.backend == "c")
        for _ in range(steps):
            run.log.add({"step": run.trainer.optimizer.t + 1, "loss": run.trainer.step().loss})
        run.save()
        return tmp_path / name

    whole = trained("whole", c_compute())
    np.testing.assert_allclose(losses(whole), losses(trained("numpy", numpy_compute())), rtol=1e-3)
    trained("cut", c_compute(), steps=1)
    cut = trained("cut", c_compute(), steps=2, resume=True)
    for name in ("state.safetensors", "adapter_model.safetensors"):
        assert (whole / name).read_bytes() == (cut / name).read_bytes()
