"""Fine-tune a model on examples of your own.

DATA is a JSON-lines file, a folder with train.jsonl and valid.jsonl, or a plain text. The keys of a line
decide its kind: messages; prompt and completion; text; or prompt, chosen and rejected for --method dpo. The
default method, lora, trains an adapter beside the weights of MODEL. Its result is a folder as PEFT writes it.
--method full trains all weights, in float32, into model.gguf. Ctrl-C saves the run; --resume continues it.
"""

import argparse

from .. import system
from ..checkpoint import open_checkpoint
from ..checkpoint.download import DEFAULT_MODEL
from ..errors import ParameterError
from ..training.compute import compute_of
from ..training.data import read_data
from ..training.finetune import METHODS, RESULT, finetune
from ..training.lora import TARGETS, LoRA
from ..training.run import open_folder
from . import common, runs

LEARNING_RATES = {"lora": 2e-4, "full": 2e-5, "dpo": 5e-6}
# The options that only some methods read.
OF_METHODS = {
    **dict.fromkeys(("rank", "alpha", "rslora", "targets"), ("lora", "dpo")),
    "beta": ("dpo",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=common.path, help="a file of examples, or a folder")
    parser.add_argument(
        "-m",
        "--model",
        default=DEFAULT_MODEL,
        metavar="MODEL",
        help="a file, a folder, hf:OWNER/REPO, or a name that `pull` lists [%(default)s]",
    )
    parser.add_argument("--method", choices=METHODS, default="lora", help="what learns, and from what [lora]")
    runs.add_run_arguments(parser, iters=100, batch_size=4, seq_len=512)
    shown = ", ".join(f"{method} {rate:g}" for method, rate in LEARNING_RATES.items())
    parser.add_argument("--lr", type=runs.number(0), metavar="X", help=f"learning rate [{shown}]")
    group = parser.add_argument_group("adapter")
    rank = common.whole_number(1)
    group.add_argument("--rank", type=rank, metavar="R", help="the rank of A and B [8]")
    group.add_argument(
        "--alpha", type=runs.number(0), metavar="X", help="the scale is alpha / rank [twice the rank]"
    )
    rslora = "the scale is alpha / sqrt(rank)"
    group.add_argument("--rslora", action="store_true", default=None, help=rslora)
    group.add_argument(
        "--targets",
        metavar="NAME,...",
        help=f"the matrices of a layer that it stands beside [{','.join(TARGETS)}]",
    )
    group.add_argument(
        "--beta",
        type=runs.number(0),
        metavar="X",
        help="DPO: the price of leaving the reference [0.1]",
    )


def run(args: argparse.Namespace) -> None:
    for name, methods in OF_METHODS.items():
        if getattr(args, name) is not None and args.method not in methods:
            raise ParameterError(
                f"--{name} is for --method {' or '.join(methods)}, the method is {args.method}"
            )
    rank = args.rank or 8
    alpha = 2.0 * rank if args.alpha is None else args.alpha
    targets = args.targets.split(",") if args.targets is not None else [*TARGETS]
    lora = LoRA(rank, alpha, bool(args.rslora), targets)
    data = read_data(args.data)
    with common.transfer_bar() as progress:
        source = open_checkpoint(common.located(args.model, progress))
    rate = LEARNING_RATES[args.method] if args.lr is None else args.lr
    with open_folder(args.out, args.resume) as folder:
        with common.count_bar("examples") as progress:
            training, plan, rows = finetune(
                source,
                data,
                folder,
                args.method,
                compute_of(args.backend, args.threads),
                runs.hyperparameters_of(args, rate, beta2=0.999),
                runs.schedule_of(args),
                lora,
                beta=0.1 if args.beta is None else args.beta,
                seq_len=args.seq_len,
                batch_size=args.batch_size,
                seed=args.seed,
                base=args.model,
                progress=progress,
            )
        learned = sum(p.size for p in training.trainer.optimizer.parameters.values())
        common.note(f"{learned:,} numbers learn, from {len(rows.rows)} rows of {rows.tokens:,} tokens")
        if rows.cut:
            common.note(f"{rows.cut} examples are longer than --seq-len {args.seq_len} and are cut")
        if rows.without_target:
            common.note(f"{rows.without_target} examples have no target within --seq-len and are left out")
        sampled = (training.valid or training.trainer.rows)[0]
        runs.carry_out(training, plan, source.tokenizer(), args, sampled, temperature=0.0)
    if args.method == "full":
        result = args.out / RESULT
        common.note(f"the model is {result}: numpy-llama chat -m {system.quote(str(result))}")
    else:
        model = "" if args.model == DEFAULT_MODEL else f" -m {system.quote(args.model)}"
        command = f"numpy-llama chat{model} --adapter {system.quote(str(args.out))}"
        common.note(f"{args.out} is an adapter: {command}")
