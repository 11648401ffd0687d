"""The parts that `train` and `finetune` share: options of a run, its table of steps, samples, the curve."""

import argparse
import math
from collections.abc import Callable

from .. import parallel
from ..checkpoint.memory import gib, peak_memory
from ..inspect.bench import Machine
from ..text.tokenizer import Tokenizer
from ..training.examples import Row
from ..training.optimizer import Hyperparameters
from ..training.plan import TrainingPlan
from ..training.ranks import n_ranks
from ..training.run import LOG, PICTURE, Report, Run, prompt_of, sample
from ..training.trainer import Schedule
from . import common

# The columns of the table and their widths.
COLUMNS = {"step": 7, "loss": 9, "valid": 9, "lr": 10, "norm": 8, "tokens/s": 10, "of FMA": 8, "left": 10}


def number(least: float, below: float = math.inf) -> Callable[[str], float]:
    """An argument type: a number from `least` up, below `below`."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not least <= value < below:
            upper = "" if below == math.inf else f" and below {below:g}"
            raise argparse.ArgumentTypeError(f"{text!r} is not a number, {least:g} or above{upper}")
        return value

    return parse


def add_run_arguments(parser: argparse.ArgumentParser, iters: int, batch_size: int, seq_len: int) -> None:
    """The options of every run, with these defaults."""
    one = common.whole_number(1)
    parser.add_argument(
        "--out", type=common.path, required=True, metavar="FOLDER", help="the folder of the run, a new one"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in --out; the other options stay as they were"
    )
    group = parser.add_argument_group("training")
    for name, kind, default, what in (
        ("--iters", one, iters, "steps of the optimizer"),
        ("--batch-size", one, batch_size, "examples, or rows of packed texts, in a step"),
        ("--seq-len", one, seq_len, "tokens of an example, or of a row of packed texts"),
        ("--warmup-iters", common.whole_number(0), None, "steps in which the learning rate rises"),
        ("--weight-decay", number(0), 0.01, "AdamW's decay of the matrices"),
        ("--grad-clip", number(0), 1.0, "the largest length of the gradients; 0: any"),
        ("--seed", common.whole_number(0), 0, "of the order of the data, and of all random numbers"),
    ):
        shown = "a twentieth of --iters" if default is None else default
        group.add_argument(name, type=kind, default=default, metavar="N", help=f"{what} [{shown}]")
    for name, default, what in (
        ("--report-every", 10, "print a line every N steps"),
        ("--eval-every", 100, "compute the validation loss, and print a sample, every N steps"),
        ("--save-every", 100, "save the run every N steps"),
    ):
        group.add_argument(name, type=one, default=default, metavar="N", help=f"{what} [{default}]")
    group.add_argument("-t", "--threads", type=one, metavar="N", help="threads of the C kernels [all CPUs]")
    group.add_argument(
        "--backend", choices=["c", "numpy"], default="c", help="the C kernels, or plain NumPy [c]"
    )


def schedule_of(args: argparse.Namespace) -> Schedule:
    warmup = args.iters // 20 if args.warmup_iters is None else args.warmup_iters
    return Schedule(args.iters, warmup)


def hyperparameters_of(args: argparse.Namespace, lr: float, beta2: float) -> Hyperparameters:
    return Hyperparameters(lr, beta2=beta2, weight_decay=args.weight_decay, max_norm=args.grad_clip)


def carry_out(
    run: Run,
    plan: TrainingPlan,
    tokenizer: Tokenizer,
    args: argparse.Namespace,
    sampled: Row,
    temperature: float,
) -> None:
    """Train to the end, and print a table of steps, samples and the curve."""
    trainer = run.trainer
    last, begun = trainer.schedule.steps, trainer.optimizer.t
    common.note(f"memory{'' if (n := n_ranks()) == 1 else f' of each of {n} ranks'}: {plan}")
    if begun:
        end = "" if begun < last else ": all steps are made; a larger --iters continues"
        common.note(f"resumed after step {begun} of {last}{end}")
    elif args.resume:
        common.note(f"{run.out} has no saved step: the run begins anew")
    peak = fma_peak(args.threads)
    if begun < last:
        print("".join(f"{title:>{width}}" for title, width in COLUMNS.items()), flush=True)
    recent: list[Report] = []

    def on_step(report: Report) -> None:
        number = report.step.number
        recent.append(report)
        if number % args.report_every == 0 or number in (begun + 1, last) or report.valid_loss is not None:
            bar.close()
            print(row(recent, last, peak), flush=True)
            recent.clear()
        if number % args.eval_every == 0 or number == last:
            bar.close()
            text = sample(trainer.learner, tokenizer, prompt_of(sampled[0]), temperature, args.seed)
            print(f"        sample: {text.strip()}", flush=True)
        bar.show(f"loss {report.step.loss:.4f}", number, last)

    with common.step_bar() as bar:
        try:
            run.run(on_step, args.eval_every, args.save_every)
        except (KeyboardInterrupt, SystemExit, BrokenPipeError):
            if run.saved >= 0:  # a second Ctrl-C can end the first save
                common.note(f"stopped after step {run.saved}, which is saved: --resume continues")
            raise
    print(run.curve(), flush=True)
    if run.test:
        loss, numbers = trainer.evaluate(run.test)
        shown = [f"{name} {x:.4f}" for name, x in {"loss": loss, **numbers}.items()]
        print(f"test: {', '.join(shown)}, on {len(run.test)} rows", flush=True)
    files = ", ".join(str(run.out / name) for name in (LOG, PICTURE) if (run.out / name).exists())
    used = peak_memory()
    common.note(f"the numbers are in {files}" + ("" if used is None else f"; peak memory {gib(used)}"))


def fma_peak(threads: int | None) -> float:
    """Operations a second of this process, or of all ranks, if each has the machine of this one."""
    if (ranks := parallel.ranks()) is None:
        return Machine(threads).fma_peak()
    return ranks.size * Machine(threads or ranks.threads()).fma_peak()


def row(reports: list[Report], last: int, peak: float) -> str:
    """One line of the table: the means of some steps, and the newest of the other numbers."""
    step, valid = reports[-1].step, reports[-1].valid_loss
    seconds = sum(one.step.seconds for one in reports)
    share = sum(one.operations for one in reports) / seconds / peak
    left = (last - step.number) * seconds / len(reports)
    cells = [
        str(step.number),
        f"{sum(one.step.loss for one in reports) / len(reports):.4f}",
        "" if valid is None else f"{valid:.4f}",
        f"{step.lr:.2e}",
        f"{step.norm:.3f}",
        f"{sum(one.step.tokens for one in reports) / seconds:.0f}",
        "-" if math.isnan(share) else f"{share:.0%}",
        f"{int(left) // 3600}:{int(left) // 60 % 60:02}:{int(left) % 60:02}",
    ]
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, COLUMNS.values(), strict=True))
