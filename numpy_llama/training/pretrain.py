"""Pre-training: a new model of a given shape learns to predict the next token of texts."""

from collections.abc import Callable
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

from ..checkpoint import load_tokenizer
from ..checkpoint.files import write_bytes
from ..checkpoint.memory import available_memory
from ..config import ModelArgs
from ..errors import FormatError, MismatchError, ParameterError, TokenizerError
from ..text.tokenizer import Tokenizer, check_text
from .compute import Compute
from .data import Data
from .examples import Encoder, naming, rows_of
from .models import new_weights, parameter_count, trained_tokenizer
from .optimizer import Hyperparameters
from .order import Order
from .output import write_hugging_face
from .plan import TrainingPlan, Work, largest, training_plan
from .ranks import least_memory, n_ranks, trainer_of
from .recipe import Recipe
from .run import LOG, VALIDATION_ROWS, Folder, Run
from .trainer import Schedule

TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # that a Hugging Face folder can have
METHOD = "train"  # beside the methods of finetune.py
BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")


def pretrain(
    data: Data,
    folder: Folder,
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
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Run, TrainingPlan, Tokenizer]:
    """A run that is ready to begin, or to continue, in its folder.

    shape(vocab_size) -> the hyperparameters of the model. The vocabulary is that of `tokenizer_path`, or has
    `vocab_size` pieces and is made from the training texts.
    """
    if data.kind != "texts":
        where = data.train[0].where
        raise ParameterError(f"{where}: training from scratch takes texts; `finetune` takes other examples")
    out, state = folder.path, folder.state
    given = None if tokenizer_path is None else tokenizer_files(tokenizer_path)
    if state is None:
        files = given or {"tokenizer.model": _new_tokenizer(data, vocab_size)}
        write_bytes(out / LOG, b"")  # from here on it is the folder of a run, which --resume begins anew
        _write_tokenizer(out, files)
    else:
        state.check_options({"method": METHOD})
        if given is not None and given != tokenizer_files(out):
            what = f"{tokenizer_path} is not the tokenizer that the run was begun with"
            raise MismatchError(f"{out}: {what}: leave out --tokenizer, or give another --out")
    tokenizer = load_tokenizer(out)
    if vocab_size not in (None, tokenizer.vocab_size):
        found = f"the tokenizer of {out} has {tokenizer.vocab_size} tokens"
        raise ParameterError(f"--vocab-size is {vocab_size}, {found}: leave it out")
    args = shape(tokenizer.vocab_size)
    encoder = Encoder(tokenizer)
    train = rows_of(data.train, encoder, seq_len, lambda done, total: progress("reading", done, total))
    valid, test = (rows_of(records, encoder, seq_len).rows for records in (data.valid, data.test))
    valid = valid[:VALIDATION_ROWS]
    if not train.rows:
        raise ParameterError(f"{data.train[0].where}: the texts have no tokens to learn")
    order = Order(len(train.rows), batch_size, seed)
    learned = parameter_count(args)
    longest, step_tokens = largest(train.rows, chain(valid, test), order.batch_size)
    available = least_memory(available_memory())
    sizes = longest, step_tokens, available, "this model", state, n_ranks()
    plan = training_plan(args, 4 * learned, learned, *sizes)
    weights = new_weights(args, seed)
    recipe = Recipe(args, plan, hyperparameters, schedule)
    trainer = trainer_of(recipe, compute, weights, train.rows, order)
    options: dict[str, Any] = {
        "method": METHOD,
        "seq_len": seq_len,
        **{name: value for name, value in asdict(args).items() if value is not None},
        "backend": compute.backend,
        "checkpointing": plan.checkpointing,
    }

    def write_result() -> None:
        write_hugging_face(out, args, weights, tokenizer)

    work = Work.of(args, all_learns=True)
    run = Run(folder, trainer, options, valid, test, work.operations, write_result)
    return run, plan, tokenizer


def tokenizer_files(path: Path) -> dict[str, bytes]:
    """The files of a tokenizer, which is named by its folder or its file: their names and contents."""
    folder, names = (path, TOKENIZER_FILES) if path.is_dir() else (path.parent, (path.name,))
    name = next((name for name in names if name in TOKENIZER_FILES and (folder / name).is_file()), None)
    if name is None:
        wanted = " or ".join(TOKENIZER_FILES)
        raise TokenizerError(f"{path} is not a tokenizer that a new folder can have: wanted {wanted}")
    try:
        return {file: (folder / file).read_bytes() for file in (name, *BESIDE) if (folder / file).is_file()}
    except OSError as error:
        raise FormatError(f"{path} cannot be read: {error.strerror}") from None


def _new_tokenizer(data: Data, vocab_size: int | None) -> bytes:
    texts = []
    for record in data.train:
        with naming(record.where):
            texts.append(check_text(record.values["text"]))
    return trained_tokenizer(texts, vocab_size or 512)


def _write_tokenizer(out: Path, files: dict[str, bytes]) -> None:
    """Put the files of a tokenizer into the folder of the run. Those of an earlier attempt are removed."""
    for name in (*TOKENIZER_FILES, *BESIDE):
        (out / name).unlink(missing_ok=True)
    for name, content in files.items():
        write_bytes(out / name, content)
