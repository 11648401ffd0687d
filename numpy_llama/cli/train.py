"""Train a new model on texts.

DATA is a plain text, a JSON-lines file with a "text" on each line, or a folder with train.jsonl and
valid.jsonl. Without --tokenizer a vocabulary is made from the texts by SentencePiece. The result is a Hugging
Face folder: numpy-llama generate -m FOLDER "..." runs it. The folder has the numbers of each step in log.csv
too. Ctrl-C saves the run, and --resume continues it, on the same machine with the same bits.
"""

import argparse

from .. import system
from ..config import ModelArgs
from ..training.compute import compute_of
from ..training.data import read_data
from ..training.models import new_args
from ..training.pretrain import pretrain
from ..training.run import open_folder
from . import common, runs


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", metavar="DATA", type=common.path, help="a file of texts, or a folder")
    runs.add_run_arguments(parser, iters=300, batch_size=32, seq_len=256)
    group = parser.add_argument_group("model")
    one = common.whole_number(1)
    for name, default, what in (
        ("--dim", 64, "the width of the model"),
        ("--layers", 5, "transformer blocks"),
        ("--heads", 8, "query heads"),
        ("--kv-heads", 4, "key/value heads"),
    ):
        group.add_argument(name, type=one, default=default, metavar="N", help=f"{what} [{default}]")
    group.add_argument(
        "--hidden-dim", type=one, metavar="N", help="the width of the FFN [8/3 of --dim, rounded up]"
    )
    group.add_argument("--vocab-size", type=one, metavar="N", help="tokens of the new vocabulary [512]")
    group.add_argument(
        "--tokenizer", type=common.path, metavar="FILE", help="a tokenizer.model or tokenizer.json to use"
    )
    group.add_argument("--lr", type=runs.number(0), default=1e-3, metavar="X", help="learning rate [0.001]")


def run(args: argparse.Namespace) -> None:
    def shape(vocab_size: int) -> ModelArgs:
        sizes = args.dim, args.layers, args.heads, args.kv_heads, vocab_size, args.seq_len
        return new_args(*sizes, args.hidden_dim)

    shape(args.vocab_size or 512)  # an impossible shape is an error before any file is read
    data = read_data(args.data)
    with open_folder(args.out, args.resume) as folder:
        with common.count_bar("texts") as progress:
            training, plan, tokenizer = pretrain(
                data,
                folder,
                shape,
                compute_of(args.backend, args.threads),
                runs.hyperparameters_of(args, args.lr, beta2=0.99),
                runs.schedule_of(args),
                vocab_size=args.vocab_size,
                tokenizer_path=args.tokenizer,
                seq_len=args.seq_len,
                batch_size=args.batch_size,
                seed=args.seed,
                progress=progress,
            )
        model = training.trainer.learner.args
        size = sum(p.size for p in training.trainer.optimizer.parameters.values())
        tokens = sum(len(example) for row in training.trainer.rows for example in row)
        common.note(
            f"{size:,} parameters, {model.vocab_size} tokens in the vocabulary, {tokens:,} in the data"
        )
        sampled = (training.valid or training.trainer.rows)[0]
        runs.carry_out(training, plan, tokenizer, args, sampled, temperature=0.8)
        common.note(f'{args.out} is a model: numpy-llama generate -m {system.quote(str(args.out))} "..."')
