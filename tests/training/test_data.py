"""Files of training data: kinds by keys, splits by a stated rule, and errors that name the line."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.errors import FormatError, NumpyLlamaError, TextError
from numpy_llama.training.data import HELD_OUT, read_data, read_texts, record_of, split_records

MESSAGES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


def lines(*values) -> str:
    return "".join(json.dumps(value) + "\n" for value in values)


@pytest.mark.parametrize(
    "kind, values",
    [
        ("messages", {"messages": MESSAGES}),
        ("completions", {"prompt": "2 + 2 =", "completion": " 4"}),
        ("completions", {"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}),
        ("texts", {"text": "Once upon a time"}),
        ("preferences", {"prompt": "Hi", "chosen": "Ho", "rejected": "Go away"}),
        ("preferences", {"prompt": "Hi", "chosen": MESSAGES, "rejected": MESSAGES, "messages": MESSAGES}),
    ],
)
def test_the_keys_decide_the_kind_and_others_are_ignored(kind, values):
    record = record_of(values | {"id": 7, "score": None}, "here")
    assert record.kind == kind
    assert record.values.items() <= values.items()


@pytest.mark.parametrize(
    "line, found",
    [
        ("{", "no JSON"),
        ("[1, 2]", "wanted a JSON object"),
        ('{"prompt": "a"}', r"has the keys \['prompt'\], wanted one of these sets"),
        ('{"text": 3}', "text is 3, wanted a text"),
        ('{"text": ["a"]}', "wanted a text"),
        ('{"messages": "a"}', "messages is 'a', wanted a list of messages"),
        ('{"prompt": "a", "completion": 3}', "wanted a text or a list of messages"),
        ('{"text": "a", "text": "b"}', "duplicate key"),
        ('{"prompt": "a", "completion": "b"}', "has the keys prompt, completion; .*line 1 has text"),
    ],
)
def test_an_error_names_file_and_line(line, found, tmp_path):
    path = tmp_path / "odd.jsonl"
    path.write_text(lines({"text": "a"}) + "\n" + line + "\n")
    with pytest.raises(FormatError, match=f"odd.jsonl, line 3.*{found}"):
        read_data(path)


@pytest.mark.parametrize(
    "name, content, found",
    [
        ("none.jsonl", None, "none.jsonl is not there; wanted a file of examples"),
        ("empty.jsonl", "", "empty.jsonl has no examples for training$"),
        ("empty.txt", "", "empty.txt has no examples for training$"),
        ("blank.jsonl", "\n\n", "no examples"),
        ("table.csv", "a,b", "wanted .jsonl or .txt, or a folder"),
        ("blank.txt", " \n", "no examples"),
        ("folder", {}, "no train.jsonl"),
        ("folder", {"train.jsonl": "\n"}, "no examples for training"),
        ("folder", {"train.jsonl": lines({"text": "a"}), "test.jsonl": "{}"}, "test.jsonl, line 1"),
    ],
)
def test_what_cannot_be_data_is_refused(name, content, found, tmp_path):
    path = tmp_path / name
    if isinstance(content, dict):
        path.mkdir()
        for file, text in content.items():
            (path / file).write_text(text)
    elif content is not None:
        path.write_text(content)
    with pytest.raises(NumpyLlamaError, match=found):
        read_data(path)


def test_a_text_that_is_not_utf_8_is_named(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(TextError, match=r"latin.txt is not UTF-8: byte 0xe9 at offset 3"):
        read_data(tmp_path / "latin.txt")


def test_files_of_windows_are_read(tmp_path):
    """A byte order mark, lines that end in CRLF, names in capital letters."""
    (tmp_path / "DATA.JSONL").write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b\\r\\nc"}\r\n')
    assert [one.values["text"] for one in read_data(tmp_path / "DATA.JSONL").train] == ["a", "b\r\nc"]
    (tmp_path / "DATA.TXT").write_bytes(
        b"\xef\xbb\xbfOne.\r\nTwo.\r\n<|endoftext|>\r\n\r\nThree, the last and longest.\r\n<|endoftext|>\r\n"
    )
    data = read_data(tmp_path / "DATA.TXT")
    first, last = data.train
    assert (first.values["text"], first.where[-6:], last.where[-6:]) == (
        *("One.\r\nTwo.", "line 1", "line 5"),
    )
    assert last.values["text"] + data.valid[0].values["text"] == "Three, the last and longest."


def test_a_folder_has_its_own_splits(tmp_path):
    for split, n in (("train", 3), ("valid", 2), ("test", 1)):
        (tmp_path / f"{split}.jsonl").write_text(lines(*({"text": f"{split} {i}"} for i in range(n))))
    data = read_data(tmp_path)
    assert data.kind == "texts" and (len(data.train), len(data.valid), len(data.test)) == (3, 2, 1)
    assert data.valid[1].values == {"text": "valid 1"} and data.valid[1].where.endswith("valid.jsonl, line 2")


@given(st.integers(0, 70))
def test_every_twentieth_record_is_for_validation(n):
    train, valid, test = split_records([*range(n)])
    assert sorted(train + valid) == [*range(n)] and test == []
    assert valid == [i for i in range(n) if i % HELD_OUT == HELD_OUT - 1]


def test_a_corpus_is_one_text_whose_end_is_for_validation(tmp_path):
    text = "".join(chr(97 + i % 26) for i in range(2000))
    (tmp_path / "corpus.txt").write_text(text)
    data = read_data(tmp_path / "corpus.txt")
    (train,), (valid,) = data.train, data.valid
    assert train.values["text"] + valid.values["text"] == text and len(valid.values["text"]) == 100


def test_texts_end_at_their_marks(tmp_path):
    stories = [f"\nStory {i}.\nThe end.\n" for i in range(25)]
    (tmp_path / "stories.txt").write_text("<|endoftext|>\n".join(stories) + "<|endoftext|>")
    data = read_data(tmp_path / "stories.txt")
    assert [record.values["text"] for record in data.train[:2]] == [
        story.strip("\n") for story in stories[:2]
    ]
    assert [record.where.rpartition(" ")[2] for record in data.train[:3]] == ["2", "6", "10"]
    assert (len(data.train), len(data.valid)) == (24, 1)


@pytest.mark.parametrize(
    "end", ["<|endoftext|>", "\n<|endoftext|>\n", "\r\n<|endoftext|>\r\n", " <|endoftext|>\n\n"]
)
def test_a_mark_ends_a_text_wherever_it_stands(end, tmp_path):
    """In a line too, as when texts were joined by it. The mark itself is never trained."""
    (tmp_path / "texts.txt").write_bytes(end.join(["One.", "Two.", "Three."]).encode())
    found = read_texts(tmp_path / "texts.txt")
    assert [record.values["text"].strip() for record in found] == ["One.", "Two.", "Three."]
    lines = end.count("\n")
    assert [record.where.rpartition(" ")[2] for record in found] == [str(1 + i * lines) for i in range(3)]
