"""The checks of a real checkpoint, layer by layer: are the operations right, and is the file itself right?

operations.py   C and PyTorch against NumPy
weights.py      faults found in the weights alone
diagnosis.py    faults found with a sample text, or with the published hyperparameters
compare.py      faults found with another copy of the model
bounds.py       how far two right results of an operation may differ
"""

from dataclasses import dataclass, field
from itertools import groupby

from ..backend import Progress
from ..checkpoint.base import Checkpoint
from ..errors import TokenizerError
from .compare import compare
from .diagnosis import Reading, Sample, published
from .operations import Error, operation_errors
from .weights import Census

PROMPT = 24  # tokens that go through the operations: enough for the GEMM kernels


@dataclass
class Report:
    """The findings. `faults`: a description of each fault, in the order of the forward pass."""

    errors: list[Error] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    compared: list[str] = field(default_factory=list)
    reading: Reading | None = None

    @property
    def verdict(self) -> str:
        return self.faults[0] if self.faults else "nothing wrong found"

    def worst(self) -> dict[tuple[int | None, str], Error]:
        """The largest error of each operation of each layer."""
        worst: dict[tuple[int | None, str], Error] = {}
        for error in self.errors:
            key = error.layer, error.operation
            if key not in worst or _badness(error) > _badness(worst[key]):
                worst[key] = error
        return worst

    def implementations(self) -> dict[str, Error]:
        """The error nearest to its bound, for each implementation."""
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
    """All checks of a model.

    The sample text is read only if the other checks find no fault. It relies on right kernels, and it names a
    fault less precisely.
    """
    report, weights = Report(), opened.weights()
    census, sample = Census(weights), None
    ids = [i * opened.args.vocab_size // PROMPT for i in range(PROMPT)]  # if there is no tokenizer
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
    if reference is not None:
        report.faults, report.compared = compare(opened, reference, progress)
    if missed := [error for error in report.errors if error.share > 1]:
        report.faults.append(first_miss(missed))
    if reference is None or not report.faults:  # a comparison is surer than the census
        report.faults += census.findings
    if sample is not None and not report.faults:
        could_be = runs(opened, census)
        report.reading = sample.read(weights, could_be, progress)
        report.faults += reading_faults(report.reading)
        if report.reading.inconclusive:
            report.notes.append(
                "the sample text shows nothing: the model does not predict English, as it is or repaired"
            )
            unlike = [name for name, run in could_be.items() if run in census.runs()]
            report.faults += [
                f"{name} are unlike the others: of another model, or corrupt" for name in unlike
            ]
    if fault := published(opened.args):
        report.faults.append(fault)
    return report


def first_miss(missed: list[Error]) -> str:
    """The first operation beyond its bound, and the implementations that miss there."""
    first = missed[0]
    where = "after the last layer" if first.layer is None else f"in layer {first.layer}"
    who = ", ".join(dict.fromkeys(e.implementation for e in missed if _place(e) == _place(first)))
    worst = max((e for e in missed if _place(e) == _place(first)), key=_share)
    places = len({_place(error) for error in missed})
    size = f"{who} against NumPy: {worst.error:.1e}, {worst.share:.3g} times what rounding allows"
    return f"the error starts {where}, at {first.operation} ({size}); {places} places miss in all"


def _place(error: Error) -> tuple[int | None, str]:
    return error.layer, error.operation


def runs(opened: Checkpoint, census: Census) -> dict[str, range]:
    """Layers that may belong to another model: those of each file, and those that are unlike the others."""
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


def reading_faults(reading: Reading) -> list[str]:
    if reading.fault is None:
        return []
    losses = f"{reading.loss:.2f} nats a token as it is, {reading.repaired:.2f} repaired"
    return [f"{reading.fault} (a sample text: {losses}, standard error {reading.standard_error:.2f})"]
