"""Talk with a model.

Without QUESTION, a conversation begins on the terminal: Ctrl-C stops an answer, Ctrl-D (on Windows Ctrl-Z and
Enter) ends the conversation, and /help lists its commands. It samples as the model's own files recommend, or
else with temperature 0.8, top-k 40, top-p 0.95 and min-p 0.05. With QUESTION, or with a question on standard
input, the command prints one answer, and takes the likeliest token each time. Under mpiexec each line of
standard input belongs to one conversation.
"""

import argparse
import sys

from .. import parallel
from ..checkpoint.huggingface import template_file
from ..errors import ParameterError
from ..llama import Llama
from ..text.chat import CHAT_FORMATS, ChatFormat, ChatTemplate
from . import common
from .conversation import Conversation


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
    common.add_sampling_arguments(parser, max_tokens=None, temperature="0; in a conversation as above")


def chat_format(text: str) -> ChatFormat:
    """A format by its name, or a template in a file."""
    if text in CHAT_FORMATS:
        return CHAT_FORMATS[text]
    try:
        path = common.path(text)
    except argparse.ArgumentTypeError as error:
        raise ParameterError(f"--chat-format {error}") from None
    if not path.is_file():
        raise ParameterError(f"--chat-format {text}: no file, and not one of {', '.join(CHAT_FORMATS)}")
    return ChatTemplate(template_file(path))


def run(args: argparse.Namespace) -> None:
    options = common.generation_options(args)
    question = None if args.question is None else common.without_mark(args.question, "the question")
    # mpiexec gives rank 0 a pipe even on a terminal, so there a pipe may have somebody at its other end.
    talks = sys.stdin.isatty() or (parallel.ranks() is not None and not args.json)
    if question is None and not talks:
        question = common.read_stdin()
    if question is None:
        if args.json:
            raise ParameterError("--json prints one answer: give a question")
        llama = load_model(args)
        options["draft"] = common.drafter(args, llama)
        Conversation(llama, args.system, options).run()
        return
    if not question.strip():
        raise ParameterError("the question is empty")
    common.note_filters(options)
    llama = load_model(args)
    options["draft"] = common.drafter(args, llama)
    messages = [] if args.system is None else [{"role": "system", "content": args.system}]
    messages.append({"role": "user", "content": question})
    with common.prefill_bar() as on_prefill:
        stream = llama.stream_chat(messages, on_prefill=on_prefill, **options)
        completion = common.run_stream(stream, args.json, llama.tokenizer)
    common.note_cut(completion, options)


def load_model(args: argparse.Namespace) -> Llama:
    chosen = None if args.chat_format is None else chat_format(args.chat_format)
    llama = common.load_model(args)
    llama.chat_format = llama.chat_format if chosen is None else chosen
    return llama
