"""Measure how well a model solves tasks, with EleutherAI's lm-evaluation-harness.

A task is a name that the harness knows, such as hellaswag. Its data come from the Hugging Face Hub. Or it is
a file of questions, FILE.jsonl, with {"query": "...", "choices": ["...", "..."], "gold": 0} on each line.
gold is the place of the right choice, from 0. The command prints each metric with its standard error.
--out keeps the results of all requests in a file, and the same command continues after an interruption. The
package lm-eval is needed: pip install "numpy_llama[eval]".
"""

import argparse
import os
import time
from contextlib import closing
from dataclasses import asdict
from typing import TYPE_CHECKING

from . import common

if TYPE_CHECKING:
    from ..evaluation.run import Result

COLUMNS = ("task", "items", "shots", "metric", "value", "standard error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tasks",
        type=lambda text: text.split(","),
        required=True,
        metavar="TASK,...",
        help="names of lm-eval, or .jsonl files of questions",
    )
    one = common.whole_number(1)
    parser.add_argument("--limit", type=one, metavar="N", help="only the first N items of each task [all]")
    parser.add_argument(
        "--num-fewshot",
        type=common.whole_number(0),
        metavar="N",
        help="solved examples before each question [the task's own number, most often 0]",
    )
    parser.add_argument(
        "--apply-chat-template", action="store_true", help="ask in the form of the model's chat template"
    )
    parser.add_argument(
        "--out",
        type=common.path,
        metavar="FILE",
        help="keep the result of each request in this file, and continue with those that it has",
    )
    common.add_model_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")


def run(args: argparse.Namespace) -> None:
    os.environ.update(TQDM_DISABLE="1")  # before the libraries with their many bars are imported
    from ..evaluation.harness import HarnessModel
    from ..evaluation.run import evaluate, quiet
    from ..evaluation.store import Store
    from ..evaluation.tasks import load_tasks

    with common.count_bar("tasks") as progress, quiet():
        tasks = load_tasks(args.tasks, args.num_fewshot, progress)
    llama = common.load_model(args)
    began = time.perf_counter()
    with common.count_bar("requests") as progress, closing(Store(llama.model, args.out)) as store:
        model = HarnessModel(llama, store, args.apply_chat_template, progress)
        try:
            results = evaluate(model, tasks, args.limit)
        except KeyboardInterrupt:
            if args.out is not None:
                common.note(f"{args.out} has {len(store.results)} results: the same command continues")
            raise
    llama.check_unchanged()
    seconds = time.perf_counter() - began
    if model.cut:
        common.note(
            f"{model.cut} of {model.requests} requests do not fit the context: they lose their first tokens"
        )
    if args.json:
        counts = {"requests": model.requests, "tokens": model.tokens, "computed": model.computed}
        print(
            common.results_json(
                {"results": [asdict(one) for one in results], **counts, "seconds": round(seconds, 3)}
            )
        )
        return
    for line in table(results):
        print(line)
    print(f"{model.requests} requests, {model.tokens} tokens, {model.computed} computed, {seconds:.1f} s")


def table(results: "list[Result]") -> "list[str]":
    rows = [COLUMNS]
    for one in results:
        first = one.task, str(one.items), "-" if one.num_fewshot is None else str(one.num_fewshot)
        for name, metric in one.metrics.items():
            error = metric.standard_error
            rows.append((*first, name, f"{metric.value:.4f}", "-" if error is None else f"{error:.4f}"))
            first = "", "", ""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = 1, 0, 0, 1, 0, 0  # texts stand at the left of their column, numbers at the right
    return [
        "  ".join(
            f"{cell:<{w}}" if at else f"{cell:>{w}}" for cell, w, at in zip(row, widths, left, strict=True)
        )
        for row in rows
    ]
