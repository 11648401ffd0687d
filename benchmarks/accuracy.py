"""The accuracy of the C kernels: `linear` in every format, then a whole model, compared with llama.cpp.

    python benchmarks/accuracy.py [-m MODEL] [-t THREADS]
        [--text wiki.test.raw [--ctx 512] [--windows 8] [--llama-cpp PYTHON]]

Two tables in Markdown. `linear` is compared with float64 arithmetic on the dequantized weights. The model is
compared with its exact mode, in its own file and in files that `convert` makes from it. Without --text the
model is left out. PYTHON is an interpreter with llama-cpp-python.

    NMSE      sum of squared errors / sum of squared results
    worst     the largest error, relative to the root mean square of its token's results
    KL        sum p log(p / q) over the vocabulary, p from the exact mode, mean over the scored tokens
"""

import argparse
import json
import math
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from make_weights import random_blocks

import numpy_llama as nl
from numpy_llama.backend.formats import FORMATS, QK_K, Format, StoredTensor
from numpy_llama.backend.kernels import Kernels, KernelWeight, available_cpus, isa
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.convert import convert
from numpy_llama.checkpoint.download import DEFAULT_MODEL, locate
from numpy_llama.inspect.perplexity import losses, windows

TOKENS = 64
DTYPES = ("bf16", "f16", "q8", "q4")
ROWS_AT_ONCE = 32  # of logits in float64


# ---------------------------------------------------------------- linear


def random_weight(format: Format, OUT: int, IN: int, rng: np.random.Generator) -> StoredTensor:
    """Normal weights. For a format that cannot be written: random bytes with fitting scales."""
    if format.quantize:
        return StoredTensor.quantize(rng.standard_normal((OUT, IN), np.float32), format)
    blocks = random_blocks(format, OUT * IN // format.block, 1.0, rng)
    return StoredTensor(format, (OUT, IN), blocks.reshape(OUT, -1))


def activations(kind: str, T: int, IN: int, rng: np.random.Generator) -> np.ndarray:
    """Normal numbers. "outliers": one column in 512 is 100 times as large, the same column in all tokens."""
    x = rng.standard_normal((T, IN), np.float32)
    if kind == "outliers":
        x[:, rng.permutation(IN)[: max(IN // 512, 1)]] *= 100
    return x


def as_ggml(x: np.ndarray, format: Format) -> np.ndarray:
    """Activations rounded as in ggml: to 8 bits for quantized weights, to the weights' format for others."""
    if format.block == 1:
        return StoredTensor.quantize(x, format).dequantize()
    if format.block < QK_K:
        return StoredTensor.quantize(x, "Q8_0").dequantize()
    blocks = x.reshape(-1, QK_K)
    d = np.abs(blocks).max(axis=-1, keepdims=True) / 127  # Q8_K
    return (np.round(blocks / d) * d).reshape(x.shape)


def errors(y: np.ndarray, expected: np.ndarray) -> str:
    """NMSE and worst error, as two cells."""
    off = y - expected
    rms = np.sqrt(np.mean(expected**2, axis=-1, keepdims=True))
    return f"{(off**2).sum() / (expected**2).sum():.1e} | {np.abs(off / rms).max():.1e}"


def linear_table(threads: int, OUT: int = 512, IN: int = 4096) -> Iterator[str]:
    contestants = ["default, 1 token", f"default, {TOKENS}", f"exact, {TOKENS}", "ggml's activations"]
    yield "| format | x | " + " | ".join(f"{name}: NMSE | worst" for name in contestants) + " |"
    yield "|---" * (2 + 2 * len(contestants)) + "|"
    rng = np.random.default_rng(0)
    default, exact = (Kernels(threads, exact=mode).linear for mode in (False, True))
    for format in FORMATS.values():
        w = random_weight(format, OUT, IN, rng)
        packed, in_full = KernelWeight(w), w.dequantize(np.float64)
        for kind in ("normal", "outliers"):
            x = activations(kind, TOKENS, IN, rng)
            expected = x.astype(np.float64) @ in_full.T
            alone = np.concatenate([default(row[None], packed) for row in x])  # each token by itself
            rounded = as_ggml(x, format).astype(np.float64) @ in_full.T
            cells = [errors(y, expected) for y in (alone, default(x, packed), exact(x, packed), rounded)]
            yield f"| {format.name} | {kind} | " + " | ".join(cells) + " |"


# ---------------------------------------------------------------- a model


class LlamaCpp:
    """A child process that computes logits. Its input is ids, so that both sides have the same input."""

    def __init__(self, python: str, path: Path, ctx: int, threads: int):
        script = Path(__file__).with_name("llama_cpp_logits.py")
        command = [python, script, path, str(ctx), str(threads)]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def logits(self, ids: list[int], first: int, vocab_size: int) -> np.ndarray:
        self.process.stdin.write(json.dumps({"ids": ids, "first": first}).encode() + b"\n")
        self.process.stdin.flush()
        n = 4 * vocab_size * (len(ids) - first)
        data = self.process.stdout.read(n)
        if len(data) < n:
            sys.exit(f"llama.cpp ended after {len(data)} of {n} bytes")
        return np.frombuffer(data, np.float32).reshape(-1, vocab_size)

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


class Score:
    """The sums of one contestant over all windows."""

    def __init__(self) -> None:
        self.n, self.nll, self.kl, self.error, self.largest = 0, 0.0, 0.0, 0.0, 0.0

    def add(self, logits: np.ndarray, reference: np.ndarray, ids: list[int]) -> None:
        self.n += len(ids)
        self.nll += losses(logits, ids).sum()
        self.error = max(self.error, float(np.abs(logits - reference).max()))
        self.largest = max(self.largest, float(np.abs(reference).max()))
        for i in range(0, len(ids), ROWS_AT_ONCE):
            p, q = (log_softmax(x[i : i + ROWS_AT_ONCE].astype(np.float64)) for x in (reference, logits))
            self.kl += float((np.exp(p) * (p - q)).sum())

    def row(self) -> str:
        value = f"{math.exp(self.nll / self.n):.4f}"
        return f"{self.error / self.largest:.1e} | {max(self.kl / self.n, 0):.1e} | {value} |"


def log_softmax(x: np.ndarray) -> np.ndarray:
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def scored_logits(model: nl.Transformer, ids: list[int], first: int) -> np.ndarray:
    """The logits that predict ids[first:]: (len(ids) - first, V)."""
    return model.logits(model.hidden(np.array([ids]))[0, first - 1 : -1])


def compare(path: Path, cuts: list[list[int]], threads: int, python: str | None) -> dict[str, Score]:
    """The score of each way to compute one file."""
    first = len(cuts[0]) // 2 + 1
    modes = {"exact": {"exact": True}, "default": {}, "cache in q8": {"cache_dtype": "q8"}}
    models = {name: nl.load(path, threads=threads, **mode).model for name, mode in modes.items()}
    other = LlamaCpp(python, path, len(cuts[0]), threads) if python else None
    scores = {name: Score() for name in [*models, *(["llama.cpp"] if other else [])]}
    for done, ids in enumerate(cuts):
        print(f"{path.name}: window {done + 1} of {len(cuts)}", file=sys.stderr)
        logits = {name: scored_logits(model, ids, first) for name, model in models.items()}
        if other:
            logits["llama.cpp"] = other.logits(ids, first, logits["exact"].shape[1])
        for name, score in scores.items():
            score.add(logits[name], logits["exact"], ids[first:])
    if other:
        other.close()
    return scores


def model_table(options: argparse.Namespace) -> Iterator[str]:
    own = locate(options.model, lambda what, done, total: None)
    tokenizer = nl.load_tokenizer(own)
    ids = tokenizer.encode(options.text.read_text("utf-8"), bos=tokenizer.add_bos)
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    cuts = windows(ids, options.ctx, bos_id)[: options.windows]
    yield "| weights | computed by | largest logit error / largest logit | KL | perplexity |"
    yield "|---|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        for dtype in ("its own", *DTYPES):
            path = own
            if dtype in DTYPES:
                path = convert(open_checkpoint(own), Path(folder) / f"{dtype}.gguf", dtype, options.threads)
            for name, score in compare(path, cuts, options.threads, options.llama_cpp).items():
                yield f"| {dtype} | {name} | {score.row()}"
            if path != own:
                path.unlink()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL)
    parser.add_argument("-t", "--threads", type=int, default=available_cpus())
    parser.add_argument("--text", type=Path)
    parser.add_argument("--ctx", type=int, default=512)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--llama-cpp", metavar="PYTHON")
    options = parser.parse_args()
    print(f"`linear`, {isa()}, {options.threads} threads, 512 rows of 4,096 weights:\n")
    for line in linear_table(options.threads):
        print(line, flush=True)
    if options.text:
        print(f"\n{options.model}, {options.text.name}, {options.windows} windows of {options.ctx} tokens:\n")
        for line in model_table(options):
            print(line, flush=True)


if __name__ == "__main__":
    main()
