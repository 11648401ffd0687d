"""The validation loss of a new model: `numpy-llama train`, and the same training in PyTorch.

    python benchmarks/validation_loss_against_pytorch.py CORPUS [--iters 500] [--seeds 3] [-t 2]

CORPUS is what `numpy-llama train` takes. The shape and the recipe are those of stories260K. The trainer in
PyTorch follows those of nanoGPT and llama2.c: LLaMA of transformers, AdamW with decay of the matrices, a
warm-up, a cosine to 0, clipping at 1. It has the same vocabulary and first weights, and the same rows in the
same order. A row is one sequence there: if the corpus has several texts, each sees the texts before it.

For each seed the trainers take turns. Seconds are those of the steps alone, the median of the seeds.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from numpy_llama import load_tokenizer
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.training.batch import batch_of, inputs
from numpy_llama.training.data import read_data
from numpy_llama.training.examples import Encoder, Row, rows_of
from numpy_llama.training.log import read_log
from numpy_llama.training.models import new_weights
from numpy_llama.training.optimizer import learning_rate
from numpy_llama.training.order import Order
from numpy_llama.training.output import write_hugging_face
from numpy_llama.training.run import LOG, VALIDATION_ROWS

HIDDEN_DIM = 172  # of stories260K; its other sizes, and its recipe, are the defaults of `numpy-llama train`
ROWS, LENGTH = 8, 256  # rows of a step, tokens of a row
LR, BETAS, DECAY = 1e-3, (0.9, 0.99), 0.01


def ours(corpus: Path, out: Path, seed: int, iters: int, threads: int) -> tuple[float, float]:
    """`numpy-llama train` in the folder `out` -> its validation loss, the seconds of all steps."""
    numbers = f"--hidden-dim {HIDDEN_DIM} --seq-len {LENGTH} --batch-size {ROWS} --iters {iters}"
    numbers += f" --eval-every {iters} --save-every {iters} --seed {seed} -t {threads}"
    command = [sys.executable, "-m", "numpy_llama", "train", corpus, "--out", out, *numbers.split()]
    if code := subprocess.run(command, stdout=sys.stderr).returncode:
        sys.exit(f"numpy-llama train failed, its exit code is {code}")
    log = read_log(out / LOG)
    return float(log[-1]["valid_loss"]), sum(float(row["seconds"]) for row in log)


def rows_of_run(corpus: Path, out: Path) -> tuple[list[Row], list[Row]]:
    """The rows that `numpy-llama train` has trained in the folder `out`, and those of its validation."""
    data, encoder = read_data(corpus), Encoder(load_tokenizer(out))
    train, valid = (rows_of(records, encoder, LENGTH).rows for records in (data.train, data.valid))
    return train, valid[:VALIDATION_ROWS]


def first_model(out: Path, seed: int) -> LlamaForCausalLM:
    """The model that `numpy-llama train` began with in the folder `out`."""
    args = open_checkpoint(out).args
    with tempfile.TemporaryDirectory() as folder:
        write_hugging_face(Path(folder), args, new_weights(args, seed), load_tokenizer(out))
        return LlamaForCausalLM.from_pretrained(folder)


def theirs(
    model: LlamaForCausalLM, train: Sequence[Row], valid: Sequence[Row], seed: int, iters: int
) -> tuple[float, float]:
    """The same training in PyTorch -> its validation loss, the seconds of all steps."""
    parameters = list(model.parameters())
    matrices, vectors = ([p for p in parameters if p.ndim == n] for n in (2, 1))
    groups = [{"params": matrices, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    order, seconds = Order(len(train), ROWS, seed), 0.0
    for step in range(iters):
        began = time.perf_counter()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, iters, LR, iters // 20)
        loss(model, [train[i] for i in order(step)]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seconds += time.perf_counter() - began
    with torch.no_grad():
        return float(loss(model, valid)), seconds


def loss(model: LlamaForCausalLM, rows: Sequence[Row]) -> torch.Tensor:
    """The mean of -log p over all targets of these rows. The last row of a corpus may be shorter."""
    total = torch.zeros(())
    for length in {inputs([row]) for row in rows}:
        batch = batch_of([row for row in rows if inputs([row]) == length])
        ids, targets = (torch.from_numpy(x).long() for x in (batch.tokens, batch.targets))
        logits = model(input_ids=ids, use_cache=False).logits.flatten(0, 1)
        total = total + torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")
    return total / inputs(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("corpus", type=Path, metavar="CORPUS")
    parser.add_argument("--iters", type=int, default=500)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int, default=2)
    options = parser.parse_args()
    if min(options.iters, options.seeds, options.threads) < 1:
        parser.error("--iters, --seeds and -t must be 1 or above")
    corpus, iters = options.corpus, options.iters
    torch.set_num_threads(options.threads)
    results = {"numpy-llama train": [], "PyTorch": []}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(options.seeds):
            out = Path(folder) / str(seed)
            results["numpy-llama train"].append(ours(corpus, out, seed, iters, options.threads))
            train, valid = rows_of_run(corpus, out)
            results["PyTorch"].append(theirs(first_model(out, seed), train, valid, seed, iters))
    print(f"{corpus.name}, {iters} steps of {ROWS} x {LENGTH} tokens, {options.threads} threads")
    print(f"validation loss on {inputs(valid):,} tokens, by seed\n")
    seeds = "".join(f" seed {seed} |" for seed in range(options.seeds))
    print(f"| trainer |{seeds} mean | seconds |\n|{'---|' * (options.seeds + 3)}")
    for name, found in results.items():
        losses, seconds = zip(*found, strict=True)
        cells = [f"{x:.4f}" for x in (*losses, statistics.mean(losses))]
        print(f"| {name} | {' | '.join(cells)} | {statistics.median(seconds):.0f} |")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
