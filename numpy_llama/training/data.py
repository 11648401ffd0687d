"""Files of training data, split into training, validation and test.

    a folder      train.jsonl, and perhaps valid.jsonl and test.jsonl
    FILE.jsonl    an example on each line; every twentieth is for validation
    FILE.txt      texts, with <|endoftext|> between them; every twentieth is for validation. If there are
                  fewer than twenty, it is the last twentieth of the characters

The keys of a line decide the kind of its example, and further keys are ignored:

    prompt, chosen, rejected    two answers, the better one first
    messages                    a conversation: the assistant's turns are trained
    prompt, completion          the completion is trained
    text                        all of it is trained

A prompt and an answer are texts, or lists of messages. A message has a role and a content.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..checkpoint.files import mapped
from ..checkpoint.json_file import json_lines
from ..errors import FormatError, TextError, escape

KINDS = {
    "preferences": ("prompt", "chosen", "rejected"),
    "messages": ("messages",),
    "completions": ("prompt", "completion"),
    "texts": ("text",),
}
TYPES: dict[str, type] = {"a text": str, "a list of messages": list}
HELD_OUT = 20  # one of so many examples is for validation
END_OF_TEXT = "<|endoftext|>"  # as in the files of TinyStories; it need not be a line of its own


@dataclass(frozen=True)
class Record:
    """An example as it was read: the values of the keys of its kind. `where` names file and line."""

    kind: str
    values: dict[str, Any]
    where: str


@dataclass(frozen=True)
class Data:
    """The records of a folder or a file, all of one kind."""

    kind: str
    train: list[Record]
    valid: list[Record] = field(default_factory=list)
    test: list[Record] = field(default_factory=list)


def read_data(path: Path) -> Data:
    """The data at `path`. A file of another form is a FormatError that names the line."""
    if path.is_dir():
        found = [path / f"{split}.jsonl" for split in ("train", "valid", "test")]
        if not found[0].is_file():
            raise FormatError(f"{path} has no train.jsonl; wanted a folder with train.jsonl, or one file")
        splits = [list(read_jsonl(file)) if file.is_file() else [] for file in found]
    elif path.suffix.lower() == ".txt":
        splits = split_texts(read_texts(path), path)
    elif path.suffix.lower() == ".jsonl" or not path.exists():
        splits = split_records(list(read_jsonl(path)))
    else:
        raise FormatError(f"{path} ends in {escape(path.suffix)}; wanted .jsonl or .txt, or a folder")
    if not splits[0]:
        raise FormatError(f"{path} has no examples for training")
    kind = splits[0][0].kind
    for record in (record for split in splits for record in split if record.kind != kind):
        keys, first = ", ".join(KINDS[record.kind]), ", ".join(KINDS[kind])
        raise FormatError(f"{record.where} has the keys {keys}; {splits[0][0].where} has {first}")
    return Data(kind, *splits)


def read_jsonl(path: Path) -> Iterator[Record]:
    """The records of a file with a JSON object on each line. Empty lines are left out."""
    return (record_of(values, where) for values, where in json_lines(path, "a file of examples"))


def record_of(values: Any, where: str) -> Record:
    """The record of one line. FormatError if its keys are those of no kind, or a value has another type."""
    if not isinstance(values, dict):
        raise FormatError(f"{where} holds {escape(values, 60)}, wanted a JSON object")
    kind = next((kind for kind, keys in KINDS.items() if values.keys() >= {*keys}), None)
    if kind is None:
        known = "; ".join(", ".join(keys) for keys in KINDS.values())
        raise FormatError(f"{where} has the keys {escape(sorted(values))}, wanted one of these sets: {known}")
    for key in KINDS[kind]:
        wanted = {"text": ["a text"], "messages": ["a list of messages"]}.get(key, [*TYPES])
        if not any(isinstance(values[key], TYPES[one]) for one in wanted):
            raise FormatError(f"{where}: {key} is {escape(values[key], 60)}, wanted {' or '.join(wanted)}")
    return Record(kind, {key: values[key] for key in KINDS[kind]}, where)


def read_texts(path: Path) -> list[Record]:
    """The texts of a plain file. `where` names the line on which each begins."""
    try:
        whole = str(mapped(path, "a text").read(), "utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at offset {error.start}"
        raise TextError(f"{path} is not UTF-8: {byte}") from None
    records, line = [], 1
    for text in whole.split(END_OF_TEXT):
        stripped = text.strip("\r\n")
        if stripped.strip():
            begin = line + text[: len(text) - len(text.lstrip("\r\n"))].count("\n")
            records.append(Record("texts", {"text": stripped}, f"{path}, line {begin}"))
        line += text.count("\n")
    return records


def split_records(records: list[Record]) -> list[list[Record]]:
    """Every twentieth record is for validation -> [training, validation, test]."""
    train = [record for i, record in enumerate(records, 1) if i % HELD_OUT]
    return [train, records[HELD_OUT - 1 :: HELD_OUT], []]


def split_texts(records: list[Record], path: Path) -> list[list[Record]]:
    """As `split_records`. With fewer texts the last twentieth of the characters is for validation."""
    if not records or len(records) >= HELD_OUT:
        return split_records(records)
    *others, last = records
    text = last.values["text"]
    held_out = min(sum(len(one.values["text"]) for one in records) // HELD_OUT, len(text) // 2)
    cut = len(text) - held_out
    parts = [Record("texts", {"text": text[a:b]}, last.where) for a, b in ((0, cut), (cut, None))]
    return [[*others, parts[0]], [part for part in parts[1:] if part.values["text"]], []]
