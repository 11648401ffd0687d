"""A run in its folder: it trains, writes log.csv, saves its state and its result, and can be continued.

state.safetensors    everything that a resume needs (state.py)
log.csv, loss.png    the numbers of each step, and their curve
the result           a model or an adapter, written by `write_result`
"""

import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .. import parallel, system
from ..backend.signals import delayed_signals
from ..checkpoint.files import remove_left
from ..errors import FormatError, NumericsError, ParameterError
from ..generation.generate import generate
from ..generation.sampling import Sampler
from ..generation.session import Session
from ..model import Transformer
from ..text.tokenizer import Tokenizer
from .examples import Example, Row
from .log import Log, curve, picture
from .optimizer import norm
from .state import State, save_state
from .trainer import Step, Trainer

STATE, LOG, PICTURE = "state.safetensors", "log.csv", "loss.png"
FREE = ("iters", "warmup_iters")  # options that may differ when a run is resumed
VALIDATION_ROWS = 64  # at most so many are used: validation takes a small part of the time
SAMPLE_TOKENS = 64


@dataclass(frozen=True)
class Folder:
    """The folder of a run, and the state that the run continues with; a new run has none."""

    path: Path
    state: State | None


@contextmanager
def open_folder(out: Path, resume: bool) -> Iterator[Folder]:
    """A new folder, or one with a saved state to resume. Until the end of the block no other run may use it.

    With `resume` and without a state the run begins anew: it was killed before it saved one. A new folder
    that is still empty at the end is removed.
    """
    parallel.ranks()  # all ranks but 0 serve from here on
    is_new = not out.exists()
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FormatError(f"{out} cannot be made: {error.strerror}") from None
    try:
        with alone(out):
            yield Folder(out, _state(out, resume))
    finally:
        if is_new:
            with suppress(OSError):  # it has files
                out.rmdir()


def _state(out: Path, resume: bool) -> State | None:
    """The state in the folder. ParameterError if the folder has files that this run must not replace."""
    remove_left(out)  # by a run that was killed while it wrote, perhaps its first file
    names = [name for name in os.listdir(out) if name[0] != "."]  # not Windows' .lock, not macOS' .DS_Store
    if names and not {STATE, LOG} & {*names}:
        raise ParameterError(f"{out} has files, and no run that can be resumed: give another --out")
    if names and not resume:
        then = "continues its run" if STATE in names else "begins its run anew, which saved no step"
        raise ParameterError(f"{out} has files already: --resume {then}, or give another --out")
    return State(out / STATE) if STATE in names else None


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """ParameterError if another run trains in this folder: each would replace the files of the other."""
    with ExitStack() as stack:
        try:
            stack.enter_context(system.locked(out, wait=False))
        except BlockingIOError:
            raise ParameterError(
                f"{out}: a run trains in it now: wait for its end, or give another --out"
            ) from None
        except OSError as error:
            raise FormatError(f"{out} cannot be read: {error.strerror}") from None
        yield


@dataclass(frozen=True)
class Report:
    """A step, and the loss of validation if it was computed after it."""

    step: Step
    valid_loss: float | None
    operations: int

    def values(self) -> dict[str, Any]:
        """A row of log.csv."""
        s = self.step
        values = {
            "step": s.number,
            "loss": s.loss,
            "lr": s.lr,
            "grad_norm": s.norm,
            "tokens": s.tokens,
            "targets": s.targets,
            "seconds": round(s.seconds, 6),
            "tokens_per_second": round(s.tokens / s.seconds, 3),
            "gflops": round(self.operations / s.seconds / 1e9, 3),
        }
        return values | s.numbers | ({} if self.valid_loss is None else {"valid_loss": self.valid_loss})


COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "targets", "seconds", "tokens_per_second", "gflops")


def options_of(trainer: Trainer) -> dict[str, Any]:
    """The options that a trainer has, whatever it trains."""
    return {
        "data": digest(trainer.rows),
        "batch_size": trainer.order.batch_size,
        "seed": trainer.order.seed,
        "iters": trainer.schedule.steps,
        "warmup_iters": trainer.schedule.warmup,
        "most_tokens": trainer.most_tokens,
        **({"n_ranks": trainer.n_ranks} if trainer.n_ranks > 1 else {}),
        **asdict(trainer.optimizer.hyperparameters),
    }


class Run:
    """A trainer with its folder, in the block of `open_folder`.

    `options` and the trainer's own decide the bits of the run: a resumed run must have the same.
    """

    def __init__(
        self,
        folder: Folder,
        trainer: Trainer,
        options: Mapping[str, Any],
        valid: Sequence[Row],
        test: Sequence[Row],
        operations: Callable[[Sequence[Row]], int],
        write_result: Callable[[], None],
    ):
        self.out, self.trainer, self.valid, self.test = folder.path, trainer, valid, test
        self.options = {**options, **options_of(trainer)}
        self.operations, self.write_result = operations, write_result
        if (state := folder.state) is not None:
            state.check_options(self.options, FREE)
            if trainer.schedule.steps < state.step:
                found = f"{self.out} has made {state.step} steps, --iters is {trainer.schedule.steps}"
                raise ParameterError(f"{found}: a larger --iters continues")
            state.restore(trainer.optimizer)
        self.saved = -1  # by this process: one that was killed may have saved its state without the result
        columns = (*COLUMNS, *trainer.objective.numbers, "valid_loss")
        self.log = Log(self.out / LOG, columns, after=trainer.optimizer.t)

    def run(self, on_step: Callable[[Report], None], eval_every: int, save_every: int) -> None:
        """Train to the end. Ctrl-C and other signals, and a closed output, leave a saved state."""
        try:
            self._train(on_step, eval_every, save_every)
            self.save()
        except (KeyboardInterrupt, SystemExit, BrokenPipeError):
            self.save()
            raise
        picture(self.out / PICTURE, self.log.series("loss"), self.log.series("valid_loss"))

    def _train(self, on_step: Callable[[Report], None], eval_every: int, save_every: int) -> None:
        trainer, last = self.trainer, self.trainer.schedule.steps
        for step in trainer.steps():
            due = step.number % eval_every == 0 or step.number == last
            if due:
                self._check_weights()
            loss = trainer.evaluate(self.valid)[0] if due and self.valid else None
            report = self._record(step, loss)
            if step.number % save_every == 0:
                self.save()
            on_step(report)

    def _record(self, step: Step, valid_loss: float | None = None) -> Report:
        """Write the row of a step to the log."""
        rows = [self.trainer.rows[i] for i in self.trainer.order(step.number - 1)]
        report = Report(step, valid_loss, self.operations(rows))
        with delayed_signals():
            self.log.add(report.values())
        return report

    def save(self) -> None:
        """Write the state and then the result, unless they are those of this step already."""
        if self.saved != self.trainer.optimizer.t:
            self._check_weights()
            made = self.trainer.made
            if made is not None and made.number > self.log.last:  # a signal came before its row was written
                self._record(made)
            save_state(self.out / STATE, self.trainer.optimizer, self.options)
            self.write_result()
            self.saved = self.trainer.optimizer.t

    def _check_weights(self) -> None:
        """NumericsError if a weight is not finite: no loss has shown it yet."""
        optimizer = self.trainer.optimizer
        if not math.isfinite(norm(optimizer.parameters.values(), self.trainer.squares)):
            what = f"after step {optimizer.t} a weight is not finite, and this step is not saved"
            raise NumericsError(f"{self.out}: {what}: begin again with a lower --lr")

    def curve(self) -> str:
        return curve(self.log.series("loss"), self.log.series("valid_loss"))


def digest(rows: Iterable[Row]) -> str:
    """A short name of the rows, which other rows do not have."""
    found = hashlib.blake2b(digest_size=16)
    for row in rows:
        for example in row:
            found.update(len(example).to_bytes(8, "little"))
            found.update(example.ids.astype("<i4").tobytes() + example.trained.tobytes())
    return found.hexdigest()


def prompt_of(example: Example) -> list[int]:
    """The ids before the first trained target."""
    begin = int(example.trained.argmax()) + 1
    return [int(i) for i in example.ids[:begin]]


def sample(
    model: Transformer, tokenizer: Tokenizer, prompt: Sequence[int], temperature: float = 0.0, seed: int = 0
) -> str:
    """A continuation of these ids by the model as it is now."""
    room = min(model.args.max_seq_len, len(prompt) + SAMPLE_TOKENS)
    if len(prompt) >= room:
        return ""
    sampler, session = Sampler(temperature=temperature, seed=seed), Session(model, room)
    ends, n_used = tokenizer.eos_ids, tokenizer.n_used
    ids = list(generate(model, prompt, session, sampler, stop_ids=ends, vocab_size=n_used))
    return tokenizer.decode(ids, start_of_text=tokenizer.bos_id == prompt[-1])
