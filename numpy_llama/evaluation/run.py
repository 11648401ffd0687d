"""From tasks and a model to the results: the harness builds the requests and computes the metrics."""

import io
import logging
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate as lm_evaluate

from ..errors import NumpyLlamaError, UnsupportedError
from .harness import HarnessModel

SEEDS = 0, 1234  # of Python's and NumPy's random numbers: the harness's own


@dataclass(frozen=True)
class Metric:
    """The value of a metric. There is no standard error of one item, and of some metrics."""

    value: float
    standard_error: float | None


@dataclass(frozen=True)
class Result:
    """The metrics of a task, or of a group of tasks, which has no `num_fewshot` of its own."""

    task: str
    items: int
    num_fewshot: int | None
    metrics: dict[str, Metric]


def evaluate(model: HarnessModel, tasks: Any, limit: int | None = None) -> list[Result]:
    """The results of tasks, from `load_tasks`, on their first `limit` items."""
    random.seed(SEEDS[0])
    np.random.seed(SEEDS[1])
    with quiet():
        try:
            found = lm_evaluate(
                model,
                tasks,
                limit=limit,
                log_samples=False,
                apply_chat_template=model.chat,
                fewshot_as_multiturn=model.chat,
            )
        except NumpyLlamaError:
            raise
        except Exception as error:  # of a task's own code, which may need further packages
            raise UnsupportedError(f"lm-eval fails, {type(error).__name__}: {error}") from error
    results = [result_of(task, found) for task in found["results"]]
    return [result for result in results if result.metrics]  # a group may have none of its own


def result_of(task: str, found: Mapping[str, Any]) -> Result:
    values, metrics = found["results"][task], {}
    for name, value in values.items():
        metric, _, filtered = name.partition(",")
        if filtered and not metric.endswith("_stderr") and isinstance(value, float | int | np.number):
            error = values.get(f"{metric}_stderr,{filtered}")
            shown = metric if filtered == "none" else name
            metrics[shown] = Metric(float(value), float(error) if isinstance(error, float) else None)
    return Result(task, values.get("sample_len", 0), found["n-shot"].get(task), metrics)


@contextmanager
def quiet() -> Iterator[None]:
    """Nothing that the harness or its libraries print or log is shown in this block."""
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "huggingface_hub", "evaluate")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
