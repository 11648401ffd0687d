"""Decoding and prefill of several files by turns, such as one model in several formats.

    python benchmarks/formats.py FILE... [-r ROUNDS] [-t THREADS] [-p 256] [-n 16]

The table has medians, and the ratio of each round to the first file. "by bytes" is the ratio of the weights'
bytes that a second of decoding reads.
"""

import argparse
from operator import truediv
from statistics import median

from contestants import Ours


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("files", nargs="+", metavar="FILE")
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-p", "--prompt", type=int, default=256, help="tokens of a prompt")
    parser.add_argument("-n", "--new", type=int, default=16, help="tokens that are decoded")
    options = parser.parse_args()
    room = max(options.prompt, options.new)
    models = [Ours(file, options.threads, 0, room) for file in options.files]
    nbytes = [model.cost("tg", options.new)[0] for model in models]
    seconds = [([], []) for _ in models]
    for turn in range(1 + options.rounds):
        for model, (decode, prefill) in zip(models, seconds, strict=True):
            decode.append(model.run("tg", options.new))
            prefill.append(model.run("pp", options.prompt))
            if turn == 0:  # does not count
                decode.clear(), prefill.clear()
    print(f"{models[0].about()}, {options.threads} threads, medians of {options.rounds} rounds by turns")
    print(f"| file | tg{options.new} | ratio | by bytes | pp{options.prompt} | ratio |")
    print("|---|---|---|---|---|---|")
    for file, size, (decode, prefill) in zip(options.files, nbytes, seconds, strict=True):
        rates = options.new / median(decode), options.prompt / median(prefill)
        ratios = [median(map(truediv, *pair)) for pair in zip(seconds[0], (decode, prefill), strict=True)]
        by_bytes = ratios[0] * size / nbytes[0]
        cells = (
            f"{rates[0]:.1f}",
            f"{ratios[0]:.2f}",
            f"{by_bytes:.2f}",
            f"{rates[1]:.0f}",
            f"{ratios[1]:.2f}",
        )
        print(f"| {file} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
