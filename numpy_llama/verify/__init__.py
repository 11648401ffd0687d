"""The proof on a real checkpoint, layer by layer: are the operations right, and is the file itself?

operations.py   C against NumPy against PyTorch
weights.py      what the weights tell by themselves
diagnosis.py    what a text tells, and what was published
compare.py      what another copy tells
"""

from dataclasses import dataclass, field
from itertools import groupby

from ..backend import Progress
from ..checkpoint import Checkpoint
from ..errors import TokenizerError
from .compare import compare
from .diagnosis import Reading, Sample, published
from .operations import Error, operation_errors
from .weights import Census

PROMPT = 24  # tokens that go through the operations: more than the kernels take row by row


@dataclass
class Report:
    """What was found. `faults`: each names what is wrong, the first place first."""

    errors: list[Error] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    reading: Reading | None = None

    @property
    def verdict(self) -> str:
        return self.faults[0] if self.faults else "nothing wrong found"

    def worst(self) -> dict[tuple[int | None, str], Error]:
        """The worst of each operation of each layer."""
        worst: dict[tuple[int | None, str], Error] = {}
        for error in self.errors:
            key = error.layer, error.operation
            if key not in worst or _badness(error) > _badness(worst[key]):
                worst[key] = error
        return worst

    def implementations(self) -> dict[str, Error]:
        """Of each implementation, the error nearest to its bound."""
        names = dict.fromkeys(error.implementation for error in self.errors)
        return {name: max((e for e in self.errors if e.implementation == name), key=_share) for name in names}


def _badness(error: Error) -> tuple[bool, float]:
    return error.share > 1, error.error


def _share(error: Error) -> float:
    return error.share


def examine(
    opened: Checkpoint,
    reference: Checkpoint | None = None,
    threads: int | None = None,
    progress: Progress = lambda what, done, total: None,
) -> Report:
    """Everything that can be told of a model.

    The text is read only where nothing else was found wrong: it takes the kernels for right, and tells less.
    """
    report, weights = Report(), opened.weights()
    census, sample = Census(weights), None
    ids = [i * opened.args.vocab_size // PROMPT for i in range(PROMPT)]  # where there are no words
    try:
        tokenizer = opened.tokenizer()
    except TokenizerError as error:
        report.notes.append(f"no text was read, for there is no tokenizer ({error})")
    else:
        sample = Sample(opened.args, tokenizer, threads)
        ids = sample.ids[:PROMPT]
    ids = ids[: opened.args.max_seq_len]
    report.errors = list(operation_errors(opened, ids, threads, progress, census.look))
    census.end()
    if reference is not None:  # which knows, where all else infers
        report.faults, report.compared = compare(opened, reference, progress)
    if missed := [error for error in report.errors if error.share > 1]:
        report.faults.append(first_miss(missed))
    if reference is None or not report.faults:  # what a reference names need not be inferred
        report.faults += census.findings
    if sample is not None and not report.faults:
        could_be = runs(opened, census)
        report.reading = sample.read(weights, could_be, progress)
        report.faults += told_by_text(report.reading)
        if report.reading.says_nothing:
            report.notes.append(
                "the sample text says nothing: neither as it is nor repaired does the model know English"
            )
            unlike = [what for what, run in could_be.items() if run in census.runs()]
            report.faults += [
                f"{what} are unlike the others: of another model, or corrupt" for what in unlike
            ]
    if fault := published(opened.args):
        report.faults.append(fault)
    return report


def first_miss(missed: list[Error]) -> str:
    """Where the error starts: the first operation in the order of the forward pass, and who misses there."""
    first = missed[0]
    where = "after the last layer" if first.layer is None else f"in layer {first.layer}"
    who = ", ".join(dict.fromkeys(e.implementation for e in missed if _place(e) == _place(first)))
    worst = max((e for e in missed if _place(e) == _place(first)), key=_share)
    places = len({_place(error) for error in missed})
    what = f"{who} against NumPy: {worst.error:.1e}, {worst.share:.3g} times what rounding allows"
    return f"the error starts {where}, at {first.operation} ({what}); {places} places miss in all"


def _place(error: Error) -> tuple[int | None, str]:
    return error.layer, error.operation


def runs(opened: Checkpoint, census: Census) -> dict[str, range]:
    """Layers that could be of another model: those of each file, and those that are unlike the others."""
    holders, found = opened.holders(), dict[str, range]()
    files = [holders.get(f"layers.{i}.attention.wq.weight") for i in range(opened.args.n_layers)]
    if len(set(files)) > 1:
        for path, layers in groupby(range(len(files)), lambda i: files[i]):
            held = list(layers)
            first, last = held[0], held[-1]
            found[f"the weights of {path.name} (layers {first}..{last})"] = range(first, last + 1)
    for run in census.runs():
        if run not in found.values():
            found[f"the weights of layers {run.start}..{run.stop - 1}"] = run
    return found


def told_by_text(reading: Reading) -> list[str]:
    if reading.fault is None:
        return []
    better = f"{reading.loss:.2f} nats a token as it is, {reading.repaired:.2f} repaired"
    return [f"{reading.fault} (a sample text: {better}, standard error {reading.standard_error:.2f})"]
