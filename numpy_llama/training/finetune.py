"""Fine-tuning a model that is given: LoRA beside its frozen weights, all weights, or preferences by DPO.

lora    A and B learn; the weights stay as they are stored, in 4 bits or 8 too (Dettmers et al. 2023)
dpo     the same, from pairs of answers; the reference is the model without A and B
full    a float32 copy of all weights learns
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict
from itertools import chain

from ..backend.formats import StoredTensor
from ..checkpoint.adapters import write_peft
from ..checkpoint.base import Checkpoint
from ..checkpoint.memory import available_memory
from ..config import ModelArgs
from ..errors import ContextOverflowError, ParameterError
from .compute import Compute
from .data import Data
from .examples import Encoder, Rows, rows_of
from .lora import LoRA, highest_rank, lora_count, low_ranks
from .models import float_weights, frozen_weights
from .optimizer import Hyperparameters
from .order import Order
from .output import write_gguf
from .plan import TrainingPlan, Work, largest, training_plan
from .ranks import least_memory, n_ranks, trainer_of
from .recipe import Recipe
from .run import VALIDATION_ROWS, Folder, Run
from .trainer import Schedule

METHODS = ("lora", "full", "dpo")
RESULT = "model.gguf"  # of full fine-tuning


def finetune(
    source: Checkpoint,
    data: Data,
    folder: Folder,
    method: str,
    compute: Compute,
    hyperparameters: Hyperparameters,
    schedule: Schedule,
    lora: LoRA,
    *,
    beta: float = 0.1,
    seq_len: int,
    batch_size: int,
    seed: int = 0,
    base: str | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> tuple[Run, TrainingPlan, Rows]:
    """A run that is ready to begin, or to continue, in its folder. `Rows` are those for training.

    base: the name of the model, for the adapter's config.
    """
    args, stored = source.args, source.weights()
    out, state = folder.path, folder.state
    if state is not None:
        state.check_options({"method": method})
    if (method == "dpo") != (data.kind == "preferences"):
        wanted = "prompt, chosen and rejected" if method == "dpo" else "examples without preferences"
        raise ParameterError(f"{data.train[0].where} has {data.kind}; --method {method} takes {wanted}")
    if seq_len > args.max_seq_len:
        raise ContextOverflowError(
            f"--seq-len is {seq_len}, the context of {source.path} has {args.max_seq_len} tokens"
        )
    if args.sliding_window is not None and seq_len > args.sliding_window:
        raise ParameterError(
            f"--seq-len is {seq_len}, {source.path} has a sliding window of {args.sliding_window} tokens, "
            "and training computes texts up to its length"
        )
    if method != "full" and lora.rank > (highest := highest_rank(args, lora.targets)):
        raise ParameterError(f"--rank is {lora.rank}, the matrices of --targets have ranks up to {highest}")
    encoder = Encoder(source.tokenizer(), source.chat_format())
    train = rows_of(data.train, encoder, seq_len, lambda done, total: progress("reading", done, total))
    valid, test = (rows_of(records, encoder, seq_len).rows for records in (data.valid, data.test))
    valid = valid[:VALIDATION_ROWS]
    if not train.rows:
        what = f"no example has a target within --seq-len {seq_len}"
        raise ParameterError(f"{data.train[0].where}: {what}, in all {len(data.train)}")
    order = Order(len(train.rows), batch_size, seed)
    all_learns = method == "full"
    different = {id(w): w for w in stored.values()}  # a tied weight has two names
    if all_learns:
        learned = sum(math.prod(w.shape) for w in different.values())
        nbytes = 4 * learned
    else:
        learned = lora_count(args, lora.targets, lora.rank)
        nbytes = sum(map(compute.frozen_bytes, different.values())) + 4 * learned
    longest, step_tokens = largest(train.rows, chain(valid, test), order.batch_size)
    available = least_memory(available_memory())
    sizes = longest, step_tokens, available, source.path, state, n_ranks()
    plan = training_plan(args, nbytes, learned, *sizes)

    source.watch()
    weights = float_weights(stored) if all_learns else frozen_weights(stored, compute)
    chosen = None if all_learns else lora, beta if method == "dpo" else None, seed
    recipe = Recipe(args, plan, hyperparameters, schedule, *chosen)
    trainer = trainer_of(recipe, compute, weights, train.rows, order, None if all_learns else source)
    options = {
        "method": method,
        "model": fingerprint(args, stored),
        "seq_len": seq_len,
        "backend": compute.backend,
        "checkpointing": plan.checkpointing,
        **({} if all_learns else asdict(lora) | {"targets": list(lora.targets)}),
        **({"beta": beta} if method == "dpo" else {}),
    }

    def write_result() -> None:
        source.check_unchanged()
        if all_learns:
            write_gguf(out / RESULT, source, weights)
        else:
            write_peft(out, low_ranks(trainer.learner), args, base)

    work = Work.of(args, all_learns, dpo=method == "dpo")
    return Run(folder, trainer, options, valid, test, work.operations, write_result), plan, train


def fingerprint(args: ModelArgs, stored: Mapping[str, StoredTensor]) -> str:
    """A short name of a model: its hyperparameters, and the format and the first bytes of each weight."""
    found = hashlib.blake2b(repr(args).encode(), digest_size=16)
    for name, w in sorted(stored.items()):
        found.update(f"{name} {w.format.name} {w.shape}".encode() + w.stored_rows(slice(0, 1)).tobytes())
    return found.hexdigest()
