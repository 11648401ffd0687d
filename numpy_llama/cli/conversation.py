"""A conversation: questions and answers in turn, and commands that begin with a slash.

context     If less than a quarter of it is free for the answer, the oldest questions are dropped with their
            answers, until half of it is free. The system message and the last question stay.
loop        An answer that only repeats itself is ended, by the rule of generation/loops.py. The conversation
            keeps the repeated text once.
sampling    An option comes from the command line or /set, else from the model's files, else from DEFAULTS.
"""

import argparse
import json
import sys
from bisect import bisect_left
from collections import ChainMap
from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from .. import system
from ..errors import (
    ContextOverflowError,
    FormatError,
    ParameterError,
    TemplateError,
    TextError,
    escape,
    visible,
)
from ..generation.loops import repeated_ids
from ..generation.sampling import Sampler
from ..generation.transcript import Piece
from ..llama import Llama
from ..text.tokenizer import check_text
from ..training.data import read_jsonl
from ..training.examples import naming
from . import common
from .lines import Lines

Message = dict[str, Any]

DEFAULTS = {"temperature": 0.8, "top_k": 40, "top_p": 0.95, "min_p": 0.05}  # llama.cpp's
QUOTES = '"""'
COMMANDS = {
    "help": ("", "list the commands"),
    "clear": ("", "begin anew; the system message stays"),
    "system": ("[TEXT]", "show the system message, or change it"),
    "set": ("[NAME VALUE]", "show the sampling options, or change one; the value off leaves it out"),
    "regen": ("", "answer the last question again, with another seed"),
    "undo": ("", "drop the last question and its answer"),
    "save": ("FILE.jsonl", "add the conversation to a file that `finetune` reads"),
    "load": ("FILE.jsonl", "continue the last conversation in a file"),
    "speed": ("on|off", "print the tokens a second after each answer, or do not"),
    "quit": ("", f"end the conversation, as {system.END_OF_INPUT} does"),
}
HELP = f"""All other text is a question. If it begins with a slash, type a second one: //etc is a folder.
A question of several lines stands between {QUOTES} and {QUOTES}. Pasted lines are one question."""


class Conversation:
    """The messages so far, and the options of the next answer. Each method do_NAME is a command."""

    def __init__(self, llama: Llama, system: str | None, options: dict[str, Any]):
        self.llama, self.session, self.lines = llama, llama.new_session(), Lines()
        self.messages = [] if system is None else [{"role": "system", "content": system}]
        self.parser = _Parser(add_help=False, allow_abbrev=False)
        common.add_sampling_arguments(self.parser, max_tokens=None)
        known = vars(self.parser.parse_args([]))
        off = {field.name: field.default for field in fields(Sampler) if field.name in known}
        off["max_tokens"] = None
        self.names = list(off)
        given = {name: value for name, value in options.items() if value is not None}
        self.options = ChainMap(given, llama.sampling_defaults, DEFAULTS, off)
        self.tries, self.speed, self.ended = 0, False, False

    def run(self) -> None:
        print(
            f"Ctrl-C stops an answer, {system.END_OF_INPUT} ends the conversation, /help lists the commands.",
            file=sys.stderr,
        )
        while not self.ended:
            try:
                self.turn(check_text(self.lines.ask("> ")))
            except EOFError:
                print(file=sys.stdout if sys.stdout.isatty() else sys.stderr)
                return
            except UnicodeDecodeError:
                common.note("that is not UTF-8 text; try again")
            except (TextError, TemplateError, ContextOverflowError, ParameterError, FormatError) as error:
                if self.llama.chat_format is None:
                    raise
                common.note(str(error))  # the conversation is as it was before

    def turn(self, line: str) -> None:
        """A question or a command."""
        if line.startswith(QUOTES):
            self.say(self.block(line.removeprefix(QUOTES)))
        elif line.startswith("/") and not line.startswith("//"):
            name, text = [*line[1:].split(maxsplit=1), "", ""][:2]
            if name not in COMMANDS:
                listed = " ".join(f"/{name}" for name in COMMANDS)
                raise ParameterError(f"/{name} is no command: {listed}; //{name} is text for the model")
            getattr(self, f"do_{name}")(text.strip())
        else:
            self.say(line.removeprefix("/") if line.startswith("//") else line)

    def block(self, text: str) -> str:
        """A text of several lines, up to the next quotes."""
        while not text.rstrip().endswith(QUOTES):
            text += "\n" + check_text(self.lines.ask("... "))
        return text.rstrip().removesuffix(QUOTES).strip("\n")

    def say(self, question: str) -> None:
        if question.strip():
            self.tries = 0
            self.answer([*self.messages, {"role": "user", "content": question}])

    def answer(self, messages: list[Message]) -> None:
        """Print the answer to the last of `messages`. They and the answer are the conversation from now on.

        The session keeps the KV cache, so a turn computes only its new tokens.
        """
        messages, options, said = self.with_room(messages), dict(self.options), list[str]()
        if options["seed"] is not None:
            options["seed"] += self.tries
        try:
            with common.prefill_bar() as on_prefill:
                stream = self.llama.stream_chat(
                    messages, session=self.session, on_prefill=on_prefill, **options
                )
                self.show(stream, said, options["max_tokens"])
        except KeyboardInterrupt:
            common.await_ctrl_c()  # the answer so far stays in the conversation, which continues
        self.messages = [*messages, {"role": "assistant", "content": "".join(said)}]

    def show(self, stream: Iterator[Piece], said: list[str], max_tokens: int | None) -> None:
        """Print an answer as it arrives, and a remark if it has no proper end. `said` gets its texts."""
        ids, repeated = list[int](), 0
        with closing(common.written(common.collect(stream, said))) as pieces:
            for piece in pieces:
                ids += [] if piece.token is None else [piece.token]
                if repeated := repeated_ids(ids):
                    break
        if repeated:
            del said[-repeated:]  # with them the model repeats itself in its next answer too
            common.note("the answer repeats itself, so it was ended; the repetitions are dropped")
        elif (done := piece.completion) is not None:
            if done.finish_reason == "length" and len(ids) != max_tokens:
                common.note("the context is full, so the answer ends here")
            else:
                common.note_cut(done, self.options)
            if self.speed:
                common.print_speed(done)

    def with_room(self, messages: list[Message]) -> list[Message]:
        """The messages without the oldest questions, if the context has no room for them and an answer."""
        context = self.session.cache.max_seq_len
        turns = [i for i, message in enumerate(messages) if message["role"] == "user"]
        first = int(messages[0]["role"] == "system")

        def kept(dropped: int) -> list[Message]:
            return messages[:first] + messages[turns[dropped] if dropped else first :]

        def free(dropped: int) -> float:
            return 1 - len(self.llama.encode_chat(kept(dropped))) / context

        if free(0) >= 1 / 4 or len(turns) < 2:
            return messages
        if free(len(turns) - 1) <= 0:
            return kept(len(turns) - 1)  # the question alone is too long: an error, and nothing is dropped
        dropped = bisect_left(range(len(turns) - 1), True, key=lambda n: free(n) >= 1 / 2)
        what = "oldest question is" if dropped == 1 else f"{dropped} oldest questions are"
        common.note(f"the context of {context} tokens is nearly full: the {what} dropped, with the answer")
        return kept(dropped)

    def do_help(self, text: str) -> None:
        for name, (arguments, meaning) in COMMANDS.items():
            print(f"{f'/{name} {arguments}':<18} {meaning}", file=sys.stderr)
        print(HELP, file=sys.stderr)

    def do_quit(self, text: str) -> None:
        self.ended = True

    def do_clear(self, text: str) -> None:
        self.messages = self.messages[:1] if self.has_system() else []

    def do_system(self, text: str) -> None:
        if text:
            rest = self.messages[self.has_system() :]
            self.messages = [{"role": "system", "content": text}, *rest]
        else:
            shown = self.messages[0].get("content") if self.has_system() else "(the template's own, or none)"
            print(visible(str(shown)), file=sys.stderr)

    def has_system(self) -> bool:
        return bool(self.messages) and self.messages[0]["role"] == "system"

    def do_set(self, text: str) -> None:
        name, _, value = text.partition(" ")
        name = name.replace("-", "_")
        if name and name not in self.names:
            raise ParameterError(f"{escape(name)} is no option: {', '.join(self.names)}")
        if value:
            self.options[name] = self.parsed(name, value)
        for one in [name] if name else self.names:
            origin = next(i for i, options in enumerate(self.options.maps) if one in options)
            words = ("given", "the model's", "default", "")[origin]
            shown = "off" if self.options[one] is None else self.options[one]
            print(f"{one:<20}{shown!s:<7} {words}".rstrip(), file=sys.stderr)

    def parsed(self, name: str, value: str) -> Any:
        """The value of an option as the command line reads it."""
        if value.strip() == "off":
            return self.options.maps[-1][name]
        args = self.parser.parse_args([f"--{name.replace('_', '-')}={value}"])
        parsed = common.generation_options(args)[name]
        if name == "logit_bias":
            self.llama.new_sampler(logit_bias=parsed)  # the texts in it must be tokens
        return parsed

    def do_regen(self, text: str) -> None:
        turn = self.last_turn()
        if not self.options["temperature"]:
            common.note("at temperature 0 another seed changes nothing; /set temperature 0.8")
        self.tries += 1
        self.answer(self.messages[: turn + 1])

    def do_undo(self, text: str) -> None:
        self.messages = self.messages[: self.last_turn()]

    def last_turn(self) -> int:
        """The place of the last question."""
        for i in reversed(range(len(self.messages))):
            if self.messages[i]["role"] == "user":
                return i
        raise ParameterError("there is no question yet")

    def do_save(self, text: str) -> None:
        path = jsonl(text)
        self.last_turn()
        n = len(conversations(path)) if path.exists() else 0
        try:
            newline = "\n" if n and not path.read_bytes().endswith(b"\n") else ""  # an editor left it out
            with path.open("a", encoding="utf-8") as file:
                file.write(newline + json.dumps({"messages": self.messages}, ensure_ascii=False) + "\n")
        except OSError as error:
            raise ParameterError(f"{path} cannot be written: {error.strerror}") from None
        common.note(f"saved as conversation {n + 1} of {path}")

    def do_load(self, text: str) -> None:
        path = jsonl(text)
        if not (saved := conversations(path)):
            raise FormatError(f"{path} has no conversation")
        messages = saved[-1]
        with naming(str(path)):
            self.llama.encode_chat(messages, add_generation_prompt=False)
        self.messages = messages
        last = escape(messages[-1].get("content"), 60)
        common.note(f"loaded {len(messages)} messages; the last is {last}")

    def do_speed(self, text: str) -> None:
        if text not in ("on", "off"):
            raise ParameterError("wanted /speed on or /speed off")
        self.speed = text == "on"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ParameterError(message)


def jsonl(text: str) -> Path:
    """The file that a command names."""
    if not text.endswith(".jsonl"):
        raise ParameterError(f"{escape(text)} is no name of a file that ends in .jsonl")
    try:
        return common.path(text)
    except argparse.ArgumentTypeError as error:
        raise ParameterError(str(error)) from None


def conversations(path: Path) -> list[list[Message]]:
    """The conversations of a file, as training reads them."""
    records = list(read_jsonl(path))
    if other := next((record for record in records if record.kind != "messages"), None):
        raise FormatError(f"{other.where} is no conversation, wanted an object with messages")
    return [record.values["messages"] for record in records]
