"""From records to token ids, and the targets among them that are trained.

    text                       BOS text EOS                      all is trained, except BOS
    prompt, completion         BOS prompt completion EOS         completion and EOS are trained
    messages                   as the chat format writes them    the assistant's turns are trained

BOS stands only where the tokenizer puts it before a prompt too. If the model has a chat format, a prompt that
is a text is a message of the user, and an answer is one of the assistant. A turn is trained up to the token
that stops generation, and with it.

What this file promises: the trained targets come from ids, and no text is searched for a mark. The beginning
of a conversation must have the ids that the whole conversation begins with. A template that writes other ids
is refused.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..config import Array
from ..errors import NumpyLlamaError, ParameterError, TemplateError, UnsupportedError, escape
from ..text.chat import ChatFormat, check_messages
from ..text.tokenizer import Tokenizer
from .data import Record


@dataclass(frozen=True, eq=False)
class Example:
    """n + 1 token ids: n inputs, and the n targets that follow them."""

    ids: Array  # (n + 1,)
    trained: Array  # (n,) bool: which of ids[1:] are trained
    where: str  # file and line

    def __len__(self) -> int:
        """The number of inputs."""
        return len(self.trained)

    def cut(self, seq_len: int) -> "Example":
        """The first `seq_len` inputs, with their targets."""
        return Example(self.ids[: seq_len + 1], self.trained[:seq_len], self.where)


Row = tuple[Example, ...]  # that a step takes together: packed texts, or one example, or two answers


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors in this block begin with `where`."""
    try:
        yield
    except NumpyLlamaError as error:
        raise type(error)(f"{where}: {error}") from None


class Encoder:
    """The ids of records for one model: its tokenizer, and its chat format if it has one."""

    def __init__(self, tokenizer: Tokenizer, chat_format: ChatFormat | None = None):
        self.tokenizer, self.chat_format = tokenizer, chat_format

    def text(self, record: Record) -> Example:
        """BOS text EOS, whole."""
        tokenizer = self.tokenizer
        with naming(record.where):
            text = record.values["text"]
            ids = tokenizer.encode(text, bos=tokenizer.add_bos, eos=bool(tokenizer.eos_ids))
        return Example(np.array(ids, np.int32), np.ones(max(0, len(ids) - 1), bool), record.where)

    def answers(self, record: Record) -> Row:
        """The examples of a record of any other kind: one, or chosen and rejected."""
        values = record.values
        with naming(record.where):
            if record.kind == "messages":
                return (self._conversation(values["messages"], 0, record.where),)
            answers = ("chosen", "rejected") if record.kind == "preferences" else ("completion",)
            return tuple(self._answer(values["prompt"], values[key], record.where) for key in answers)

    def _answer(self, prompt: Any, answer: Any, where: str) -> Example:
        """A prompt with its answer, each a text or a list of messages."""
        if self.chat_format is None and isinstance(prompt, str) and isinstance(answer, str):
            return self._completion(prompt, answer, where)
        before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return self._conversation([*before, *after], len(before), where)

    def _completion(self, prompt: str, completion: str, where: str) -> Example:
        """BOS prompt completion EOS. The ids of the prompt are those that `generate` begins with.

        SentencePiece with its added space reads both as one text: a second one would get a space too. Then
        the completion begins at the first id that is not the prompt's.
        """
        tokenizer = self.tokenizer
        before = tokenizer.encode(prompt, bos=tokenizer.add_bos)
        if tokenizer.add_space:
            ids = tokenizer.encode(prompt + completion, bos=tokenizer.add_bos)
            begin = _same(before, ids)
        else:
            ids, begin = before + tokenizer.encode(completion), len(before)
        ids += tokenizer.eos_ids[:1]
        if not begin:
            raise ParameterError("the prompt is empty, and no BOS is put before it: nothing predicts")
        return Example(np.array(ids, np.int32), np.arange(1, len(ids)) >= begin, where)

    def _conversation(self, messages: Sequence[Any], first: int, where: str) -> Example:
        """A conversation; the turns of the assistant from messages[first] on are trained."""
        chat, tokenizer = self.chat_format, self.tokenizer
        if chat is None:
            raise UnsupportedError("the model has no chat format; wanted texts: text, or prompt + completion")
        check_messages(messages)
        turns = [i for i, one in enumerate(messages) if i >= first and one["role"] == "assistant"]
        if not turns or turns[0] == 0:
            found = "begin with a" if turns else "have no"
            raise ParameterError(f"the messages {found} turn of the assistant; wanted one after another's")
        whole = chat.encode(tokenizer, messages[: turns[-1] + 1], False)
        trained = np.zeros(len(whole), bool)

        def end_of(n: int, with_prompt: bool) -> int:
            """The number of ids of the first n messages. TemplateError unless `whole` begins with them."""
            ids = chat.encode(tokenizer, messages[:n], with_prompt)
            if (at := _same(ids, whole)) < len(ids):
                then = tokenizer.piece(whole[at]) if at < len(whole) else "the end"
                raise TemplateError(
                    f"the chat template writes the first {n} messages in another way when more follow: token "
                    f"{at} is {escape(tokenizer.piece(ids[at]))}, and then {escape(then)}; where there are "
                    "several answers, give each an example of its own, as prompt + completion"
                )
            return len(ids)

        for i in turns:
            begin, end = end_of(i, True), end_of(i + 1, False)
            stop = next((at for at in range(begin, end) if whole[at] in tokenizer.eos_ids), None)
            if stop is None:
                names = ", ".join(map(tokenizer.piece, tokenizer.eos_ids)) or "the vocabulary has none"
                raise TemplateError(
                    f"the chat template ends messages[{i}] without a token that stops generation ({names}): "
                    "the model would not learn to stop"
                )
            trained[begin : stop + 1] = True
        return Example(np.array(whole, np.int32), trained[1:], where)


def _same(left: Sequence[int], right: Sequence[int]) -> int:
    """The number of ids with which both begin."""
    pairs = zip(left, right, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(left), len(right)))


@dataclass(frozen=True)
class Rows:
    """The rows of a split, and what --seq-len did to them."""

    rows: list[Row]
    cut: int = 0  # of these rows: an example was longer than seq_len
    without_target: int = 0  # rows that are left out: no trained target is left

    @property
    def tokens(self) -> int:
        return sum(len(example) for row in self.rows for example in row)


def rows_of(
    records: Sequence[Record],
    encoder: Encoder,
    seq_len: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Rows:
    """The rows of a split. Texts are packed into rows of `seq_len` inputs, other examples are cut.

    progress(done, total) counts records.
    """

    def counted() -> Iterator[Record]:
        for i, record in enumerate(records):
            progress(i, len(records))
            yield record
        progress(len(records), len(records))

    if records and records[0].kind == "texts":
        return Rows(packed((encoder.text(record) for record in counted()), seq_len))
    kept, cut = [], 0
    for record in counted():
        whole = encoder.answers(record)
        row = tuple(example.cut(seq_len) for example in whole)
        if all(example.trained.any() for example in row):
            kept.append(row)
            cut += any(len(example) > seq_len for example in whole)
    return Rows(kept, cut, len(records) - len(kept))


def packed(examples: Iterator[Example], seq_len: int) -> list[Row]:
    """Texts one behind the other in rows of `seq_len` inputs; the last row may be shorter.

    A text that does not fit is cut, and continues in the next row with its next target. So each target is
    trained once. The texts of a row stay examples of their own, which cannot see each other.
    """
    rows: list[Row] = []
    row: list[Example] = []
    room = seq_len
    for example in examples:
        at = 0
        while at < len(example):
            n = min(room, len(example) - at)
            row.append(Example(example.ids[at : at + n + 1], example.trained[at : at + n], example.where))
            at, room = at + n, room - n
            if not room:
                rows.append(tuple(row))
                row, room = [], seq_len
    return [*rows, tuple(row)] if row else rows
