"""Tasks for the harness: by the names that it has for them, or from a file of questions.

    {"query": "The sky is", "choices": ["blue", "made of cheese"], "gold": 0}    a line of FILE.jsonl

A file is a multiple-choice task with the name of the file. As in the harness's own tasks, a choice stands
behind the query and a space, and the answer is the choice with the highest log-probability (acc), or with the
highest one per character (acc_norm). `gold` is the place of the right choice, from 0. Other keys are ignored.
Examples for --num-fewshot come from the same file.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from lm_eval.tasks import TaskManager

from ..checkpoint.json_file import json_lines
from ..errors import DownloadError, FormatError, ParameterError, escape, is_whole

SUFFIX = ".jsonl"
SEED = 1234  # of the examples for --num-fewshot: the harness's own
METRICS = ("acc", "acc_norm")


def load_tasks(
    names: Sequence[str],
    num_fewshot: int | None = None,
    progress: Callable[[str, int, int], None] = lambda what, done, total: None,
) -> Any:
    """The harness's tasks with these names. `num_fewshot`: None is the task's own, most often 0."""
    try:
        files = [Path(name).expanduser() for name in names if name.endswith(SUFFIX)]
    except RuntimeError as error:  # such as ~nobody/
        raise ParameterError(f"{', '.join(map(escape, names))}: {error}") from None
    known = [name for name in names if not name.endswith(SUFFIX)]
    wanted = [*known, *(path.stem for path in files)]
    if twice := next((name for name in wanted if wanted.count(name) > 1), None):
        raise ParameterError(f"two tasks have the name {escape(twice)}: rename a file, or leave one out")
    of_files = []
    for path in files:
        rows = read_questions(path)
        if num_fewshot is not None and num_fewshot >= len(rows):
            found = f"{path} has {len(rows)} questions, too few for {num_fewshot} examples"
            raise ParameterError(f"{found} before each: give a smaller --num-fewshot")
        of_files.append(config_of(path.stem, rows))
    if known:
        progress("reading the list of tasks", 0, len(names))
    manager = TaskManager(include_defaults=bool(known))
    for done, name in enumerate(known):
        if name not in manager.all_tasks:
            raise ParameterError(
                f"{escape(name)} is no {SUFFIX} file and no task of lm-eval: `lm-eval ls tasks` lists these"
            )
        progress(f"loading {name}", done, len(names))
    try:
        loaded = manager.load([*known, *of_files])
    except Exception as error:  # of the network, of a package that a task needs, ...
        raise DownloadError(
            f"{', '.join(known)}: a task cannot be loaded, {type(error).__name__}: {error}; "
            f"its data come from the Hugging Face Hub, and only a {SUFFIX} file needs no network"
        ) from error
    for task in loaded["tasks"].values():
        usual = task.get_config("num_fewshot")
        if usual != 0:  # a task that allows no examples has 0 in its file
            task.set_config("num_fewshot", (usual or 0) if num_fewshot is None else num_fewshot)
        task.set_fewshot_seed(SEED)
    return loaded


def config_of(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """The task of some questions, in the harness's form."""
    return {
        "task": name,
        "custom_dataset": lambda **options: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "fewshot_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "query",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS],
    }


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a file. FormatError: a line has another form; it is named."""
    rows = [question(values, where) for values, where in json_lines(path, f"a {SUFFIX} file of questions")]
    if not rows:
        raise FormatError(f"{path} has no questions, wanted a JSON object on each line")
    return rows


def question(values: Any, where: str) -> dict[str, Any]:
    if not isinstance(values, dict):
        raise FormatError(f"{where} holds {escape(values, 60)}, wanted a JSON object")
    if missing := [key for key in ("query", "choices", "gold") if key not in values]:
        raise FormatError(f"{where} has the keys {escape(sorted(values))}, it needs {missing[0]} too")
    query, choices, gold = values["query"], values["choices"], values["gold"]
    if not isinstance(query, str):
        raise FormatError(f"{where}: query is {escape(query, 60)}, wanted a text")
    if (
        not isinstance(choices, list)
        or len(choices) < 2
        or not all(c and isinstance(c, str) for c in choices)
    ):
        raise FormatError(f"{where}: choices is {escape(choices, 60)}, wanted two or more texts")
    try:
        "".join([query, *choices]).encode()
    except UnicodeEncodeError:
        raise FormatError(f"{where} has half a surrogate pair, wanted text that UTF-8 can hold") from None
    if not is_whole(gold) or not 0 <= gold < len(choices):
        raise FormatError(f"{where}: gold is {escape(gold, 60)}, wanted a place in 0..{len(choices) - 1}")
    return {"query": query, "choices": choices, "gold": gold}
