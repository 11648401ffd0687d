"""Ranks as threads of one process, for chapter 21: the parts of numpy_llama.parallel without MPI."""

import threading

import numpy as np

from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.download import pull
from numpy_llama.parallel.cut import Plan, widths
from numpy_llama.parallel.load import LoadOrder, load_part


class Rank:
    """A rank that meets the others in memory, with the methods of parallel/ranks.py that a model calls."""

    def __init__(self, rank, parts, meeting):
        self.rank, self.size, self.where = rank, len(parts), f"thread {rank}"
        self.local = self.size
        self.parts, self.meeting, self.sent = parts, meeting, 0

    def inside(self):
        return True

    def check_inside(self):
        """All ranks run the same steps."""

    def everywhere(self, step):
        return step()

    def exchange(self, value):
        return [value]

    def gather(self, part, widths):
        """The parts of all ranks side by side. Each rank sends its part to every other rank."""
        self.sent += part.nbytes * (self.size - 1)
        return self.gather_on_first(part, widths)

    def gather_in_place(self, memory, nbytes):
        """The bytes of all ranks one behind the other, as MPI has them."""
        begins = np.cumsum([0, *nbytes])
        own = slice(begins[self.rank], begins[self.rank + 1])
        memory[: begins[-1]] = self.gather(memory[own].copy(), nbytes)

    def stop_if_asked(self):
        """There are no signals here."""

    def gather_on_first(self, part, widths):
        self.parts[self.rank] = part
        self.meeting.wait()  # all parts are there
        whole = np.concatenate(self.parts, axis=-1)
        self.meeting.wait()  # all ranks have read them
        return whole


def load(name, shares):
    """The model of each rank, in the default mode of the C backend. Each has all logits."""
    path = pull(name)
    args = open_checkpoint(path).args
    parts, meeting = [None] * len(shares), threading.Barrier(len(shares), timeout=60)
    order = LoadOrder(path, args, shares, None, "c", 1, False, 8, None)
    vocab = widths(Plan.of(args, shares).vocab)

    def part(rank):
        model = load_part(rank, order)[0]
        own = model.output
        return model.with_parts(
            {"output": lambda x: rank.gather_on_first(own(x)[..., : vocab[rank.rank]], vocab)}
        )

    return [part(Rank(rank, parts, meeting)) for rank in range(len(shares))]


def on_all(models, step):
    """step(model) on every rank, at the same time: the results."""
    found = [None] * len(models)

    def run(rank):
        found[rank] = step(models[rank])

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(models))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found
