"""Talk with a model.

Without QUESTION, a conversation begins on the terminal: Ctrl-C stops an answer, and Ctrl-D ends the
conversation. With QUESTION, or with a question on standard input, the command prints one answer. Under
mpiexec each line of standard input is a question of one conversation.
"""

import argparse
import contextlib
import sys
from typing import Any

from .. import parallel
from ..checkpoint.huggingface import template_file
from ..errors import ContextOverflowError, ParameterError, TextError
from ..llama import Llama
from ..text.chat import CHAT_FORMATS, ChatFormat, ChatTemplate
from ..text.tokenizer import check_text
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "question", nargs="?", metavar="QUESTION", help="print the answer to this question and end"
    )
    parser.add_argument(
        "--system", metavar="TEXT", help="the system message: instructions for the model [the template's]"
    )
    parser.add_argument(
        "--chat-format",
        metavar="FORMAT",
        help=f"the form of the conversation: {', '.join(CHAT_FORMATS)}, or a file of a Jinja template "
        "[the model's template]",
    )
    common.add_model_arguments(parser)
    common.add_sampling_arguments(parser, max_tokens=None)


def chat_format(text: str) -> ChatFormat:
    """A format by its name, or a template in a file."""
    if text in CHAT_FORMATS:
        return CHAT_FORMATS[text]
    if not (path := common.path(text)).is_file():
        raise ParameterError(f"--chat-format {text}: no file, and not one of {', '.join(CHAT_FORMATS)}")
    return ChatTemplate(template_file(path))


def run(args: argparse.Namespace) -> None:
    options = common.generation_options(args)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    question = None if args.question is None else common.without_mark(args.question, "the question")
    # mpiexec gives rank 0 a pipe even on a terminal, so there a pipe may have somebody at its other end.
    talks = sys.stdin.isatty() or (parallel.ranks() is not None and not args.json)
    if question is None and not talks:
        question = common.read_stdin()
    if question is None:
        if args.json:
            raise ParameterError("--json prints one answer: give a question")
        converse(load_model(args), messages, options)
        return
    if not question.strip():
        raise ParameterError("the question is empty")
    llama = load_model(args)
    messages.append({"role": "user", "content": question})
    with common.prefill_bar() as on_prefill:
        stream = llama.stream_chat(messages, on_prefill=on_prefill, **options)
        common.run_stream(stream, args.json, llama.tokenizer)


def load_model(args: argparse.Namespace) -> Llama:
    chosen = None if args.chat_format is None else chat_format(args.chat_format)
    llama = common.load_model(args)
    llama.chat_format = llama.chat_format if chosen is None else chosen
    return llama


def converse(llama: Llama, messages: list[dict[str, str]], options: dict[str, Any]) -> None:
    """Question and answer in turn. The session keeps the KV cache, so a turn computes only its new tokens."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  input() then has line editing and a history
    session = llama.new_session()
    print("Ctrl-D ends the conversation, Ctrl-C an answer.", file=sys.stderr)
    while True:
        try:
            question = check_text(ask())
        except EOFError:
            print(file=sys.stdout if sys.stdout.isatty() else sys.stderr)
            return
        except (TextError, UnicodeDecodeError):
            common.note("that is not UTF-8 text; try again")
            continue
        if not question.strip():
            continue
        messages.append({"role": "user", "content": question})
        answer: list[str] = []
        try:
            with common.prefill_bar() as on_prefill:
                stream = llama.stream_chat(messages, session=session, on_prefill=on_prefill, **options)
                common.show(common.collect(stream, answer))
        except KeyboardInterrupt:
            common.await_ctrl_c()  # the answer so far stays in the conversation, which continues
        except TextError as error:
            common.note(str(error))
            del messages[-1]
            continue
        except ContextOverflowError as error:
            raise ContextOverflowError(f"{error}; begin a new conversation") from None
        messages.append({"role": "assistant", "content": "".join(answer)})


def ask() -> str:
    """The next line of standard input, without its end, after a mark that is not part of the answers."""
    typed = sys.stdin.isatty()
    if typed and sys.stdout.isatty():
        return input("> ")
    if not typed:
        parallel.await_reader(1)  # mpiexec could show the mark before the end of the answer
    print("> ", end="", file=sys.stderr, flush=True)
    if typed:
        return input()
    if not (line := sys.stdin.buffer.readline()):  # sys.stdin would decode more than a line at once
        raise EOFError
    return line.decode().removesuffix("\n").removesuffix("\r")
