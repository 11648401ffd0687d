"""Pre-training: a new model of a given shape learns to predict the next token of texts."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..checkpoint import load_tokenizer
from ..checkpoint.files import write_bytes
from ..checkpoint.memory import available_memory
from ..config import ModelArgs
from ..errors import ParameterError, TokenizerError
from ..text.tokenizer import Tokenizer, check_text
from .compute import Compute
from .data import Data
from .examples import Encoder, naming, rows_of
from .models import new_weights, parameter_count, trained_tokenizer
from .objectives import NextToken
from .optimizer import AdamW, Hyperparameters
from .order import Order
from .output import write_hugging_face
from .plan import TrainingPlan, Work, as_begun, training_plan
from .run import LOG, Run, open_folder
from .trainer import Schedule, Trainer

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # that a Hugging Face folder can have
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def pretrain(
    data: Data,
    out: Path,
    shape: Callable[[int], ModelArgs],
    compute: Compute,
    hyperparameters: Hyperparameters,
    schedule: Schedule,
    *,
    vocab_size: int | None = None,
    tokenizer_path: Path | None = None,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    resume: bool = False,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Run, TrainingPlan, Tokenizer]:
    """A run that is ready to begin, or to continue, in the folder `out`.

    shape(vocab_size) -> the hyperparameters of the model. The vocabulary is that of `tokenizer_path`, or has
    `vocab_size` pieces and is made from the training texts.
    """
    if data.kind != "texts":
        where = data.train[0].where
        raise ParameterError(f"{where}: training from scratch takes texts; `finetune` takes other examples")
    state = open_folder(out, resume)
    if state is None:
        (out / LOG).touch()  # from here on it is the folder of a run, which --resume begins anew
        _write_tokenizer(out, data, vocab_size, tokenizer_path)
    tokenizer = load_tokenizer(out)
    if vocab_size not in (None, tokenizer.vocab_size):
        found = f"the tokenizer of {out} has {tokenizer.vocab_size} tokens"
        raise ParameterError(f"--vocab-size is {vocab_size}, {found}: leave it out")
    args = shape(tokenizer.vocab_size)
    encoder = Encoder(tokenizer)
    train = rows_of(data.train, encoder, seq_len, lambda done, total: progress("reading", done, total))
    valid, test = (rows_of(records, encoder, seq_len) for records in (data.valid, data.test))
    if not train.rows:
        raise ParameterError(f"{data.train[0].where}: the texts have no tokens to learn")
    order = Order(len(train.rows), batch_size, seed)
    learned = parameter_count(args)
    sizes = seq_len, order.batch_size * seq_len, available_memory()
    plan = as_begun(training_plan(args, 4 * learned, learned, *sizes, "this model"), args, state)
    weights = new_weights(args, seed)
    learner = compute.learner(args, weights, plan.checkpointing)
    optimizer = AdamW(learner.parameters(), hyperparameters, compute.adamw)
    most, squares = plan.most_tokens, compute.squares
    trainer = Trainer(learner, optimizer, train.rows, order, NextToken(), schedule, most, squares)
    options: Mapping[str, Any] = {
        "seq_len": seq_len,
        **{name: value for name, value in asdict(args).items() if name != "rope_scaling"},
        "backend": compute.backend,
        "checkpointing": plan.checkpointing,
    }

    def write_result() -> None:
        write_hugging_face(out, args, weights, tokenizer)

    work = Work.of(args, all_learns=True)
    splits = valid.rows, test.rows
    run = Run(out, trainer, options, state, *splits, work.operations, write_result)
    return run, plan, tokenizer


def _write_tokenizer(out: Path, data: Data, vocab_size: int | None, path: Path | None) -> None:
    """Put the files of a tokenizer into the folder of the run. Those of an earlier attempt are removed."""
    for file in (*TOKENIZER_FILES, *BESIDE):
        (out / file).unlink(missing_ok=True)
    if path is None:
        texts = []
        for record in data.train:
            with naming(record.where):
                texts.append(check_text(record.values["text"]))
        write_bytes(out / "tokenizer.model", trained_tokenizer(texts, vocab_size or 512))
        return
    folder, names = (path, TOKENIZER_FILES) if path.is_dir() else (path.parent, (path.name,))
    name = next((name for name in names if name in TOKENIZER_FILES and (folder / name).is_file()), None)
    if name is None:
        wanted = " or ".join(TOKENIZER_FILES)
        raise TokenizerError(f"{path} is not a tokenizer that a new folder can have: wanted {wanted}")
    for file in (name, *BESIDE):
        if (folder / file).is_file():
            shutil.copyfile(folder / file, out / file)
