"""Train a tiny model in each way, alone or on ranks, to the end or up to a step; a run in OUT is resumed.

    python trainings.py DATA OUT CUT [--until STEP] [--fault RANK FAULT]

Micro-batches are small, and cut for CUT ranks; 0: for those that there are. A fault comes in the fourth step.
"""

import argparse
import os
import signal
from pathlib import Path

from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.errors import NumericsError, UnsupportedError
from numpy_llama.training import finetune as finetuning
from numpy_llama.training import plan, pretrain, ranks
from numpy_llama.training.compute import c_compute, numpy_compute
from numpy_llama.training.data import read_data
from numpy_llama.training.lora import TARGETS, LoRA
from numpy_llama.training.models import new_args
from numpy_llama.training.objectives import NextToken
from numpy_llama.training.optimizer import Hyperparameters
from numpy_llama.training.run import Run, open_folder
from numpy_llama.training.trainer import Schedule, Trainer

STEPS = 5
WAYS = ("train", "train with numpy", "train on one row", "lora", "dpo", "full")


def begin(way: str, data: Path, out: Path) -> Run:
    compute = numpy_compute() if "numpy" in way else c_compute(1)
    how = Hyperparameters(1e-2), Schedule(STEPS, 1)
    with open_folder(out / way, (out / way).exists()) as folder:
        if way.startswith("train"):
            batch_size = 1 if "one" in way else 7
            corpus = read_data(data / "corpus.txt")
            options = {"vocab_size": 300, "seq_len": 24, "batch_size": batch_size, "seed": 3}
            shape = lambda vocab_size: new_args(32, 2, 4, 2, vocab_size, 24)  # noqa: E731
            return pretrain.pretrain(corpus, folder, shape, compute, *how, **options)[0]
        examples = read_data(data / f"{way}.jsonl")
        lora = LoRA(4, 8.0, False, [*TARGETS])
        source = open_checkpoint(data / "model.gguf")
        options = {"seq_len": 48, "batch_size": 6, "seed": 1}
        return finetuning.finetune(source, examples, folder, way, compute, *how, lora, **options)[0]


def with_fault(rank: int, fault: str) -> None:
    usual, gradients, seen = Trainer._compute, NextToken.gradients, []
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does

    def compute(self, group, n, found):
        here = int(os.environ.get("PMI_RANK", "0")) == rank and self.optimizer.t == 3 and found is not None
        if here and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if here and fault == "error":
            raise UnsupportedError("a kernel failed")
        if here and fault == "numerics":
            raise NumericsError("a score is NaN")
        if here and fault == "bug":
            raise ZeroDivisionError("two\nlines")
        if here and fault == "interrupted":
            signal.raise_signal(signal.SIGINT)
        if here and fault == "hung up" and not seen:
            seen.append(None)
            signal.raise_signal(signal.SIGHUP)
        return usual(self, group, n, found)

    def spoilt(self, learner, rows, n, found):
        share, numbers = gradients(self, learner, rows, n, found)
        at = [example.where for row in rows for example in row]
        return (float("nan") if any(where.endswith("line 9") for where in at) else share), numbers

    Trainer._compute = compute
    if fault == "nan":
        NextToken.gradients = spoilt
    if fault == "memory" and int(os.environ.get("PMI_RANK", "0")) == rank:
        ranks.available_memory = lambda: 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("cut", type=int)
    parser.add_argument("--ways", nargs="+", default=WAYS)
    parser.add_argument("--until", type=int)
    parser.add_argument("--fault", nargs=2)
    given = parser.parse_args()
    plan.MOST_TOKENS, ranks.PIECE = 60, 1000
    if given.cut:
        pretrain.n_ranks = finetuning.n_ranks = lambda: given.cut
    if given.fault:
        with_fault(int(given.fault[0]), given.fault[1])

    def stop(report) -> None:
        if report.step.number == given.until:
            raise KeyboardInterrupt

    for way in given.ways:
        try:
            begin(way, given.data, given.out).run(stop, eval_every=2, save_every=2)
        except KeyboardInterrupt:
            print("stopped")
        except NumericsError as error:
            print(error)


if __name__ == "__main__":
    main()
