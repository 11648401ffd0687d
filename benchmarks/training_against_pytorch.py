"""The speed of training: numpy_llama and PyTorch on the same shapes, by turns in one run.

    python benchmarks/training_against_pytorch.py [SHAPE ...] [--pytorch PYTHON] [--bfloat16]
        [-t 2] [-r 5] [--json]

SHAPES name the model, the rows and the tokens of a row; lora trains rank 8 beside all matrices of the layers.
With qlora these matrices have 4 bits: Q4_0 here, and NF4 of bitsandbytes in PyTorch.
PYTHON is an interpreter with torch and transformers, by default this one. For lora it has peft too, and for
qlora bitsandbytes.

Both do the same work on random weights and ids, in float32: the forward pass, the gradients of all
parameters, the norm of the gradients with clipping, and AdamW. With --bfloat16 the products of PyTorch are in
bfloat16, by autocast. The first steps of each are not counted. A round is one turn of each, of as many steps
as fill about TURN seconds.

The share of the FMA peak is the operations of a step (training/plan.py) over what the probe makes beside each
turn: the fastest of all probes of the run. Peak memory is that of the process. A number is the median of the
rounds. A ratio above 1 says that numpy_llama is so much better.
"""

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack

from contestants import PYTORCH, TRAINING, Child

# dim, layers, heads, kv heads, head_dim, hidden_dim, vocabulary; rows, tokens of a row; the format of the
# weights that LoRA stands beside, or None if all weights learn
SHAPES = {
    "smollm2-135m": ((576, 30, 9, 3, 64, 1536, 49152), 1, 512, None),
    "smollm2-135m-lora": ((576, 30, 9, 3, 64, 1536, 49152), 1, 512, "F32"),
    "stories15m": ((288, 6, 6, 6, 48, 768, 32000), 2, 256, None),
    "stories260k": ((64, 5, 8, 4, 8, 172, 512), 8, 256, None),
    "llama-3.2-1b-qlora": ((2048, 16, 32, 8, 64, 8192, 128256), 1, 256, "Q4_0"),
}
TURN = 2.0
PAUSE = 0.05  # seconds before each turn: the threads of the last contestant have stopped spinning by then


def race(shape: str, options: argparse.Namespace) -> dict:
    """All measurements of one shape."""
    args, rows, length, base = SHAPES[shape]
    work, dtype = (args, rows, length, base, options.threads), "bfloat16" if options.bfloat16 else "float32"
    programs = {TRAINING: (sys.executable, *work), PYTORCH: (options.pytorch, *work, dtype)}
    speeds, peaks = {name: [] for name in programs}, []
    with ExitStack() as stack:
        racers = {name: stack.enter_context(Child(name, *program)) for name, program in programs.items()}
        seconds = {name: min(racer.ask("step") for _ in range(2)) for name, racer in racers.items()}
        for _ in range(options.repeat):
            for name, racer in racers.items():
                peaks.append(racers[TRAINING].ask("fma_peak"))
                time.sleep(PAUSE)
                steps = max(1, round(TURN / seconds[name]))
                took = statistics.median(racer.ask("step") for _ in range(steps))
                speeds[name].append(rows * length / took)
        about = [racer.ask("about") for racer in racers.values()]
        memory = {name: racer.ask("peak_memory") for name, racer in racers.items()}
        operations = racers[TRAINING].ask("operations")
    result = {"shape": shape, "rows": rows, "tokens": length, "about": about, "fma_peak": max(peaks)}
    for name in programs:
        median = statistics.median(speeds[name])
        share = operations / (rows * length) * median / max(peaks)
        own = {"tokens_a_second": median, "runs": speeds[name], "share_of_fma_peak": share}
        result[name] = own | {"peak_memory": memory[name]}
    return result | {"ratio": result[TRAINING]["tokens_a_second"] / result[PYTORCH]["tokens_a_second"]}


def row(result: dict) -> str:
    """The line of the table for one shape, in Markdown."""
    cells = [result["shape"], f"{result['rows']} x {result['tokens']}"]
    for name in (TRAINING, PYTORCH):
        one = result[name]
        cells += [f"{one['tokens_a_second']:.0f}", f"{one['share_of_fma_peak']:.0%}"]
        cells += [f"{one['peak_memory'] / 1e9:.2f} GB"]
    return f"| {' | '.join([*cells, format(result['ratio'], '.2f')])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("shapes", nargs="*", metavar="SHAPE", help=", ".join(SHAPES))
    parser.add_argument("--pytorch", metavar="PYTHON", default=sys.executable)
    parser.add_argument("--bfloat16", action="store_true", help="PyTorch's products are in bfloat16")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeat", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="print one JSON object a shape")
    options = parser.parse_args()
    if unknown := sorted(set(options.shapes) - set(SHAPES)):
        parser.error(f"there is no shape {unknown[0]}, the shapes are {', '.join(SHAPES)}")
    if min(options.threads, options.repeat) < 1:
        parser.error("-t and -r must be 1 or above")
    for i, shape in enumerate(options.shapes or SHAPES):
        result = race(shape, options)
        if options.json:
            print(json.dumps(result), flush=True)
            continue
        if i == 0:
            print("\n".join(result["about"]))
            print(f"{options.threads} threads, tokens/s, medians of {options.repeat}\n")
            titles = f"shape | rows | {TRAINING} | of peak | memory | {PYTORCH} | of peak | memory | ratio"
            print(f"| {titles} |\n|{'---|' * (titles.count('|') + 1)}")
        print(row(result), flush=True)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
