"""A conversation to token ids, through the model's own chat template.

    messages  --template-->  one string  --cut at its control tokens-->  ids

What this file promises: whatever a message says, it is ordinary text. It cannot end a turn, begin one,
or speak in another's name. The template is code that came with a file: it runs in a sandbox that shows
it the messages and nothing else, for a second at most.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from itertools import islice
from traceback import walk_tb
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

from .errors import ParameterError, TemplateError, TextError, escape
from .tokenizer import Tokenizer, check_text

ROLES = ("system", "user", "assistant", "tool")
MAX_SOURCE = 1 << 18  # characters of a template
MAX_OUTPUT = 1 << 20  # characters that it may write, beyond four times those of the messages
MAX_PRODUCT = 1 << 26  # of two numbers, or of a number and a length
MAX_SECONDS = 1.0  # real templates take milliseconds

# What real templates use. Jinja has more: filters and methods that make gigabytes out of a number.
FILTERS = {
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "int", "items", "join", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "round", "safe", "select", "selectattr", "sort", "string", "sum", "title",
    "trim", "unique", "upper",
}  # fmt: skip
PADDING = {"center", "expandtabs", "format", "format_map", "ljust", "rjust", "zfill"}

Messages = Sequence[Mapping[str, str]]


class ChatFormat(Protocol):
    """How a conversation is written for a model."""

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]: ...


class ChatTemplate:
    """A Jinja template, run as Hugging Face's `apply_chat_template` runs it."""

    def __init__(self, source: str):
        self.source = source

    def render(self, messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = True) -> str:
        bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
        eos = tokenizer.piece(tokenizer.eos_ids[0]) if tokenizer.eos_ids else ""
        context = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        context |= {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        room = MAX_OUTPUT + 4 * sum(len(message["content"]) for message in messages)
        sandbox, out = _Sandbox(), []
        try:
            for piece in sandbox.compiled(self.source).generate(context):
                out.append(piece)
                if (room := room - len(piece)) < 0:
                    sandbox.fail("it writes too much")
        except Exception as error:  # a file's code may raise anything, RecursionError and MemoryError too
            files = {frame.f_code.co_filename: line for frame, line in walk_tb(error.__traceback__)}
            line = getattr(error, "lineno", files.get("<template>", "unknown"))
            what = escape(str(error) or type(error).__name__)
            raise TemplateError(f"the model's chat template, line {line}: {what}") from None
        return "".join(out)

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation; BOS once, at its start, if the model wants one.

        In what the template sees, one unused character stands for each control token's name that a message
        has. So trimming and searching work on real text, and all names in the outcome are the template's: cut
        there, and with the messages' names put back, the text between is encoded as text.
        """
        check_messages(messages)
        control = tokenizer.control_tokens
        names = re.compile(f"({'|'.join(map(re.escape, sorted(control, key=len, reverse=True))) or '(?!)'})")
        used = set(self.source).union(*control, *(message["content"] for message in messages))
        unused = (
            c for c in map(chr, range(0xF0000, 0x110000)) if c not in used
        )  # for private use, all of them
        spare = list(islice(unused, len(control) + 1))
        if len(spare) <= len(control):
            raise TextError("the messages leave no private-use character unused")
        stand_in, blank = dict(zip(control, spare, strict=False)), spare[-1]
        original = {ord(character): name for name, character in stand_in.items()}

        def parts(change: Callable[[str], str]) -> list[str]:
            changed = [{"role": m["role"], "content": change(m["content"])} for m in messages]
            return names.split(self.render(changed, tokenizer, add_generation_prompt))

        found = parts(lambda text: names.sub(lambda match: stand_in[match[0]], text))
        # A template could still put a name together, or turn <|IM_END|> to lower case. Blanked messages tell.
        if found[1::2] != parts(lambda text: re.sub(r"\S", blank, text))[1::2]:
            raise TemplateError("the model's chat template makes control tokens out of what a message says")
        ids: list[int] = []
        for i, part in enumerate(found):
            ids += [control[part]] if i % 2 else tokenizer.encode(part.translate(original))
        if tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]:
            ids = tokenizer.encode("", bos=True) + ids
        return ids


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with Hugging Face's settings, a deadline, and without what makes most out of least."""

    intercepted_binops = frozenset(["*", "**", "%"])

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        self.filters = {name: self.filters[name] for name in FILTERS}
        self.filters["tojson"] = self.tojson
        self.filters["replace"] = self.replace
        del self.globals["lipsum"]
        self.globals["raise_exception"] = self.fail
        self.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
        self.deadline = time.monotonic() + MAX_SECONDS

    def compiled(self, source: str) -> jinja2.Template:
        """The template, with a look at the clock in every loop and macro: they need not write anything."""
        if len(source) > MAX_SOURCE:
            self.fail(f"it has {len(source)} characters, at most {MAX_SOURCE} are allowed")
        tree = self.parse(source)
        node: Any
        for node in tree.find_all((nodes.For, nodes.Macro)):
            look = nodes.Call(nodes.EnvironmentAttribute("look_at_clock"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(look, lineno=node.lineno))
        return jinja2.Template.from_code(self, self.compile(tree), self.make_globals(None))

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would lend templates a safe str.format, which pads all the same: `PADDING` refuses it."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in PADDING and super().is_safe_attribute(obj, attr, value)

    def tojson(self, value: Any, indent: int | None = None) -> str:
        """Jinja's own escapes what means something in HTML."""
        return json.dumps(value, ensure_ascii=False, indent=None if indent is None else min(indent, 8))

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        if str(text).count(old) * len(new) > MAX_OUTPUT:
            self.fail("the filter replace makes too much")
        return str(text).replace(old, new, count)

    def look_at_clock(self) -> None:
        if time.monotonic() > self.deadline:
            self.fail(f"it takes longer than {MAX_SECONDS} s")

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """10**10**9, 'a' * 10**10 and '%1000000000d' % 1 are one step each: no clock would stop them."""
        size = [len(x) if hasattr(x, "__len__") else abs(x) for x in (left, right)]
        too_much = operator == "*" and size[0] * size[1] > MAX_PRODUCT
        if too_much or operator == "**" or (operator == "%" and isinstance(left, str)):
            self.fail(f"operator {operator} is not allowed, or not on such values")
        return super().call_binop(context, operator, left, right)

    def fail(self, message: str) -> NoReturn:
        raise jinja2.TemplateError(message)


def check_messages(messages: Messages) -> None:
    """A conversation is a non-empty list of {"role": one of ROLES, "content": text}."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ParameterError(f"messages is {escape(messages)}, it must be a list with a message or more")
    for i, message in enumerate(messages):
        known = isinstance(message, Mapping) and message.keys() == {"role", "content"}
        if not known or message["role"] not in ROLES or not isinstance(message["content"], str):
            wanted = f"it must have a role, one of {', '.join(ROLES)}, and a content, a text"
            raise ParameterError(f"messages[{i}] is {escape(message)}, {wanted}")
        check_text(message["content"])
