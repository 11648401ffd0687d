"""The two backends on one model in one run: tokens a second of prefill (pp) and of decode (tg).

    python benchmarks/c_against_numpy.py [-m MODEL] [-p 512] [-n 128] [-r 3] [-t THREADS]

The backends take turns, so that other programs on the machine slow down both. Medians are printed.
"""

import argparse
import statistics
import time

import numpy as np

import numpy_llama as nl
from numpy_llama.backend import kernels
from numpy_llama.checkpoint.download import DEFAULT_MODEL
from numpy_llama.generation.generate import forward
from numpy_llama.generation.session import Session
from numpy_llama.window import PREFILL_CHUNK


def measure(model: nl.Transformer, prompt: list[int], n: int) -> tuple[float, float]:
    """Seconds of prefill, and of decode of n tokens after it."""
    session = Session(model, len(prompt) + n)
    began = time.perf_counter()
    for begin in range(0, len(prompt), PREFILL_CHUNK):
        logits = forward(model, prompt[begin : begin + PREFILL_CHUNK], session)
    middle = time.perf_counter()
    for _ in range(n):
        logits = forward(model, [int(logits.argmax())], session)
    return middle - began, time.perf_counter() - middle


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL)
    parser.add_argument("-p", "--prompt", type=int, default=512)
    parser.add_argument("-n", "--new", type=int, default=128)
    parser.add_argument("-r", "--repeat", type=int, default=3)
    parser.add_argument("-t", "--threads", type=int)
    options = parser.parse_args()

    paths = {
        "C": nl.load(options.model, threads=options.threads).model,
        "NumPy": nl.load(options.model, backend="numpy").model,
    }
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, paths["C"].args.vocab_size, options.prompt).tolist()
    seconds = {name: [] for name in paths}
    for model in paths.values():
        measure(model, prompt[:8], 2)  # pages in, threads up
    for _ in range(options.repeat):
        for name, model in paths.items():
            seconds[name].append(measure(model, prompt, options.new))

    threads = options.threads or kernels.available_cpus()
    print(f"{options.model}; C: {kernels.isa()}, {threads} threads; NumPy {np.__version__}, float32 weights")
    columns = f"{f'pp{options.prompt}':>12}{f'tg{options.new}':>12}"
    print(f"{'path':<8}{columns}   tokens/s, median of {options.repeat}")
    for name, runs in seconds.items():
        prefill, decode = (statistics.median(one) for one in zip(*runs, strict=True))
        print(f"{name:<8}{options.prompt / prefill:>12.1f}{options.new / decode:>12.1f}")


if __name__ == "__main__":
    main()
