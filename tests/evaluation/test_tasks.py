"""Tasks from files of questions: what a line may be, and the harness's metrics by their definition."""

import json
import math

import pytest
from helpers.tiny_models import LOOKED_INTO, float_weights
from helpers.tokenizers import byte_level
from hypothesis import given
from hypothesis import strategies as st

import numpy_llama as nl
from numpy_llama.errors import DownloadError, FormatError, ParameterError
from numpy_llama.evaluation import tasks
from numpy_llama.evaluation.harness import HarnessModel
from numpy_llama.evaluation.run import evaluate
from numpy_llama.evaluation.tasks import load_tasks, question, read_questions

GOOD = {"query": "The sky is", "choices": ["blue", "made of cheese"], "gold": 0}
WORDS = st.lists(st.sampled_from(["the", "fox", "12", "é", "isn't", "jumps over"]), min_size=1, max_size=4)


@pytest.fixture(scope="module")
def llama() -> nl.Llama:
    tokenizer = byte_level()
    args = nl.ModelArgs(**{**vars(LOOKED_INTO), "vocab_size": tokenizer.vocab_size})
    return nl.Llama(nl.Transformer(args, float_weights(args)), tokenizer)


@st.composite
def questions(draw) -> dict:
    choices = draw(st.lists(WORDS.map(" ".join), min_size=2, max_size=4, unique=True))
    return {
        "query": draw(WORDS.map(" ".join)),
        "choices": choices,
        "gold": draw(st.integers(0, len(choices) - 1)),
    }


def log_likelihood(llama: nl.Llama, context: str, continuation: str) -> float:
    """One pass of the whole text, without a cache."""
    ids = llama.tokenizer.encode(context + continuation)
    n, total = len(llama.tokenizer.encode(context)), 0.0
    for before, row in zip(range(1, len(ids)), llama.model([ids])[0].astype(float), strict=False):
        if before >= n:
            total += row[ids[before]] - math.log(sum(math.exp(x) for x in row))
    return total


@given(rows=st.lists(questions(), min_size=2, max_size=4))
def test_the_metrics_are_by_definition(rows, llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("tasks") / "mine.jsonl"
    path.write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    (result,) = evaluate(HarnessModel(llama), load_tasks([str(path)]))
    right: dict[str, list[float]] = {"acc": [], "acc_norm": []}
    for row in rows:
        found = [log_likelihood(llama, row["query"], f" {choice}") for choice in row["choices"]]
        per_character = [x / len(choice) for x, choice in zip(found, row["choices"], strict=True)]
        right["acc"].append(float(found.index(max(found)) == row["gold"]))
        right["acc_norm"].append(float(per_character.index(max(per_character)) == row["gold"]))
    assert (result.task, result.items, result.num_fewshot) == ("mine", len(rows), 0)
    for name, hits in right.items():
        mean = sum(hits) / len(hits)
        error = math.sqrt(sum((hit - mean) ** 2 for hit in hits) / (len(hits) - 1) / len(hits))
        assert result.metrics[name].value == pytest.approx(mean)
        assert result.metrics[name].standard_error == pytest.approx(error)


def test_examples_come_from_the_same_file_and_are_never_the_question(llama, tmp_path):
    path = tmp_path / "mine.jsonl"
    rows = [{"query": f"{i}?", "choices": ["yes", "no"], "gold": i % 2} for i in range(4)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked: list[str] = []

    class Asked(HarnessModel):
        def loglikelihood(self, requests, disable_tqdm=True):
            asked.extend(request.args[0] for request in requests[::2])
            return super().loglikelihood(requests)

    evaluate(Asked(llama), load_tasks([str(path)], num_fewshot=3), limit=2)
    assert len(asked) == 2
    for i, prompt in enumerate(asked):
        *examples, last = prompt.split("\n\n")
        others = {f"{k}? {('yes', 'no')[k % 2]}" for k in range(4) if k != i}
        assert (set(examples), last) == (others, f"{i}?")
    with pytest.raises(ParameterError, match="4 questions, too few for 4 examples"):
        load_tasks([str(path)], num_fewshot=4)


@pytest.mark.parametrize(
    "values, words",
    [
        ([], "holds [], wanted a JSON object"),
        ({"query": "a", "choices": ["b", "c"]}, "it needs gold too"),
        ({"context": "a", "choices": ["b", "c"], "gold": 0}, "it needs query too"),
        (GOOD | {"query": None}, "query is None, wanted a text"),
        (GOOD | {"choices": "blue"}, "choices is 'blue', wanted two or more texts"),
        (GOOD | {"choices": ["blue"]}, "wanted two or more texts"),
        (GOOD | {"choices": ["blue", ""]}, "wanted two or more texts"),
        (GOOD | {"choices": ["blue", 1]}, "wanted two or more texts"),
        (GOOD | {"gold": 2}, "gold is 2, wanted a place in 0..1"),
        (GOOD | {"gold": -1}, "gold is -1"),
        (GOOD | {"gold": True}, "gold is True"),
        (GOOD | {"gold": "A"}, "gold is 'A'"),
        (GOOD | {"query": "\ud800"}, "half a surrogate pair"),
    ],
)
def test_a_line_of_another_form_is_refused(values, words):
    assert question(GOOD | {"source": "sky"}, "f.jsonl, line 3") == GOOD
    with pytest.raises(FormatError) as caught:
        question(values, "f.jsonl, line 3")
    assert str(caught.value).startswith("f.jsonl, line 3") and words in str(caught.value)


def test_the_line_is_named(tmp_path):
    path = tmp_path / "mine.jsonl"
    for content, words in (
        (json.dumps(GOOD) + "\n\n{'query': 1}\n", "line 3 is no JSON"),
        ("", "has no questions"),
        ("\n \n", "has no questions"),
    ):
        path.write_text(content)
        with pytest.raises(FormatError, match=words):
            read_questions(path)
    with pytest.raises(FormatError, match="is not there"):
        load_tasks([str(tmp_path / "none.jsonl")])


def test_two_tasks_of_one_name_are_refused(tmp_path):
    (tmp_path / "hellaswag.jsonl").write_text(json.dumps(GOOD) + "\n")
    with pytest.raises(ParameterError, match="two tasks have the name 'hellaswag'"):
        load_tasks(["hellaswag", str(tmp_path / "hellaswag.jsonl")])


class Tasks:
    """The harness's list of tasks, without the ten seconds that it takes to read."""

    all_tasks = ("far_away",)

    def __init__(self, include_defaults: bool):
        assert include_defaults

    def load(self, names):
        raise ConnectionError("Couldn't reach 'far/away' on the Hub")


def test_a_name_that_does_not_exist_or_has_no_data_is_one_line(monkeypatch):
    monkeypatch.setattr(tasks, "TaskManager", Tasks)
    with pytest.raises(ParameterError, match=r"'nope' is no \.jsonl file and no task"):
        load_tasks(["nope"])
    with pytest.raises(
        DownloadError, match="far_away: a task cannot be loaded, ConnectionError: Couldn't reach"
    ):
        load_tasks(["far_away"])
