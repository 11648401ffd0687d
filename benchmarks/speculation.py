"""Speculative decoding beside plain decoding: the same ids, and the seconds of both.

    python benchmarks/speculation.py same [-m MODEL] [-n 24] [-r 200]
    python benchmarks/speculation.py lookup [-m MODEL] [-n 200]
    python benchmarks/speculation.py draft -m MODEL [--draft MODEL] [-n 48] [--rates 0.6,0.8,0.9]

same     random prompts, samplers and seeds: every text must be equal with a lookup and with a draft model
lookup   three tasks whose answers repeat more or less of their text
draft    a draft model that is accepted at a given rate: the ids are those of the model, with errors put in,
         and the draft model runs for its time. So random weights in the shape of a model are enough

Both ways take turns, so that other programs on the machine slow down both.
"""

import argparse
import time
from collections.abc import Sequence

import numpy as np

import numpy_llama as nl
from numpy_llama.checkpoint.download import DEFAULT_MODEL
from numpy_llama.generation.generate import decode, generate
from numpy_llama.generation.speculative import Drafter, DraftModel, Speculation, relative_cost

ARTICLE = (
    "The octopus is a soft-bodied, eight-limbed mollusc of the order Octopoda. The order has some 300 "
    "species and is grouped within the class Cephalopoda with squids, cuttlefish, and nautiloids. An octopus "
    "can radically deform its shape, enabling it to squeeze through small gaps. The siphon is used for "
    "breathing and for locomotion. Octopuses have a complex nervous system and excellent sight."
)
PROGRAM = """def load_rows(path, limit):
    rows = []
    with open(path) as file:
        for line in file:
            name, value = line.split(",")
            rows.append((name, float(value)))
            if len(rows) == limit:
                break
    return rows
"""
TASKS = {
    "summary": f"Summarise this text:\n\n{ARTICLE}",
    "program": f"Rename rows to records in this program, and print all of it:\n\n{PROGRAM}",
    "chat": "What are the planets of the solar system? Give one fact about each.",
}


class Rated(Drafter):
    """Proposes the ids that will come, each with probability `rate` and else another one."""

    def __init__(self, text: Sequence[int], rate: float, model: DraftModel):
        self.text, self.rate, self.model, self.cost = text, rate, model, model.cost
        self.rng = np.random.default_rng(0)

    def propose(self, ids: Sequence[int], k: int) -> Sequence[int]:
        rows = self.model.model.args.vocab_size
        self.model.propose([i % rows for i in ids], k)  # only for its time
        right = self.rng.random(k) < self.rate
        return [i if yes else i ^ 1 for i, yes in zip(self.text[len(ids) :], right, strict=False)]


def ids_and_seconds(
    llama: nl.Llama, prompt: Sequence[int], n: int, drafter: Drafter | None, **sampling: float
) -> tuple[list[int], float, Speculation | None]:
    """The new ids, the seconds after the first of them, and what speculation counted."""
    speculation = None if drafter is None else Speculation(drafter)
    session = llama.new_session(len(prompt) + n)
    options = {"decode": speculation or decode, "max_tokens": n, "stop_ids": llama.tokenizer.eos_ids}
    steps = generate(llama.model, prompt, session, nl.Sampler(**sampling), **options)
    ids, began = [next(steps)], time.perf_counter()
    return [*ids, *steps], time.perf_counter() - began, speculation


def compare(name: str, llama: nl.Llama, prompt: Sequence[int], n: int, drafter: Drafter) -> None:
    wanted, plain, _ = ids_and_seconds(llama, prompt, n, None)
    ids, seconds, speculation = ids_and_seconds(llama, prompt, n, drafter)
    _, again, _ = ids_and_seconds(llama, prompt, n, None)
    drafts, equal = speculation.drafts, "equal" if ids == wanted else "DIFFERENT"
    print(
        f"{name:<10} {len(ids):>4} tokens {drafts.passes:>4} passes {drafts.accepted:>4} of {drafts.drafted} "
        f"drafted accepted  {(plain + again) / 2 / seconds:.2f} times as fast, {equal}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["same", "lookup", "draft"])
    parser.add_argument("-m", "--model", default=DEFAULT_MODEL)
    parser.add_argument("--draft", default=DEFAULT_MODEL)
    parser.add_argument("-n", "--new", type=int, default=48)
    parser.add_argument("-r", "--repeat", type=int, default=200)
    parser.add_argument("-t", "--threads", type=int)
    parser.add_argument("--rates", type=lambda text: [*map(float, text.split(","))], default=[0.6, 0.8, 0.9])
    options = parser.parse_args()
    llama, n = nl.load(options.model, threads=options.threads), options.new
    rng = np.random.default_rng(0)
    if options.what == "lookup":
        for name, task in TASKS.items():
            compare(name, llama, llama.encode_chat([{"role": "user", "content": task}]), n, nl.Lookup())
        return
    small = nl.load(options.draft, threads=options.threads)
    cost = relative_cost(small.model.args, llama.model.args)
    own = DraftModel(small.model, small.new_session(1024), cost)
    prompts = rng.integers(
        0, min(llama.tokenizer.n_used, small.tokenizer.n_used), (options.repeat, 16)
    ).tolist()
    if options.what == "draft":
        text = ids_and_seconds(llama, prompts[0], n, None)[0]
        for rate in options.rates:
            compare(f"rate {rate}", llama, prompts[0], n, Rated([*prompts[0], *text], rate, own))
        return
    different = 0
    for i, prompt in enumerate(prompts):
        sampling = {"temperature": (0, 0.5, 1.5)[i % 3], "repetition_penalty": (1, 1.2)[i % 2], "seed": i}
        wanted, *_ = ids_and_seconds(llama, prompt, n, None, **sampling)
        for drafter in (nl.Lookup(), Rated([*prompt, *wanted], 0.7, own)):
            different += ids_and_seconds(llama, prompt, n, drafter, **sampling)[0] != wanted
    print(f"{different} of {2 * len(prompts)} texts are different")


if __name__ == "__main__":
    main()
