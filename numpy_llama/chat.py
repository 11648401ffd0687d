"""A conversation to token ids: Meta's formats for Llama 2 and 3 as code, any other as its Jinja template.

    messages  --template-->  one string  --cut at its control tokens-->  ids

What this file promises: whatever a message says, it is ordinary text. It cannot end a turn, begin one,
or speak in another's name. Where turns are marked by plain text, as in Llama 2, `Llama2Chat` refuses
messages that have the marks; a template says nothing about its marks, so there nobody can know them.
A template is code that came with a file: it runs in a sandbox that shows it the messages and nothing
else, for half a second at most, and with room for so much.
"""

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cached_property, wraps
from itertools import islice
from traceback import walk_tb
from types import CodeType
from typing import Any, NoReturn, Protocol

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from .errors import MismatchError, ParameterError, TemplateError, TextError, escape
from .tokenizer import Tokenizer, check_text

ROLES = ("system", "user", "assistant", "tool")
MAX_SOURCE = 1 << 16  # characters of a template,
MAX_NODES = 1 << 13  # and of its syntax tree: real ones have some hundreds, and this many compile in a second
MAX_SECONDS = 0.5  # real templates take milliseconds
MAX_MADE = 1 << 18  # characters and items that all its steps make together,
MADE_PER_CHARACTER = 64  # beyond so many for each character of the messages,
MESSAGE_OVERHEAD = 64  # of which each message counts as having so many more
MAX_INT = 1 << 63
MAX_ARGUMENT = 1 << 10  # characters: 'aa...'.strip('ba...') takes the product of both lengths

# What real templates use. Jinja has more: filters and methods that make gigabytes out of a number.
FILTERS = {
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "trim",
    "unique", "upper",
}  # fmt: skip
METHODS = {
    "capitalize", "casefold", "count", "endswith", "find", "get", "index", "isalnum", "isalpha",
    "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "items", "join", "keys",
    "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values",
}  # fmt: skip

Messages = Sequence[Mapping[str, str]]


class ChatFormat(Protocol):
    """How a conversation is written for a model."""

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]: ...


class Llama2Chat:
    """Meta's format of Llama 2 and Code Llama (llama/generation.py, chat_completion): questions in brackets.

        <s>[INST] <<SYS>>\n system \n<</SYS>>\n\n question [/INST] answer </s><s>[INST] question [/INST]

    The tags are plain text: who types one could speak as another. Meta's program refuses that, so does this.
    """

    TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        check_messages(messages)
        bos, eos = _control_ids(tokenizer, "<s>", "</s>")
        for i, message in enumerate(messages):
            if tag := next((tag for tag in self.TAGS if tag in message["content"]), None):
                raise TextError(f"messages[{i}] has the tag {tag}, which only the chat format may write")

        roles = [message["role"] for message in messages]
        turns = [message["content"] for message in messages]
        with_system = roles[0] == "system"
        wanted = ["system"] * with_system + ["user", "assistant"] * len(roles)
        by_user = roles[-1] == "user" or (roles[-1] == "assistant" and not add_generation_prompt)
        if roles != wanted[: len(roles)] or not by_user:
            wish = "user and assistant in turn, the last from user, perhaps after one from system"
            raise ParameterError(f"the roles are {', '.join(roles)}; Llama 2 wants {wish}")
        if with_system:
            turns[:2] = [f"<<SYS>>\n{turns[0]}\n<</SYS>>\n\n{turns[1]}"]

        ids: list[int] = []
        for i in range(0, len(turns), 2):
            question, *answer = (turn.strip() for turn in turns[i : i + 2])
            text = f"[INST] {question} [/INST]" + "".join(f" {a} " for a in answer)
            ids += [bos, *tokenizer.encode(text), *[eos for _ in answer]]
        return ids


class Llama3Chat:
    """Meta's format since Llama 3 (llama3/tokenizer.py, ChatFormat): each message under a header.

        <|begin_of_text|>  <|start_header_id|> role <|end_header_id|> \n\n content <|eot_id|>  ...

    The same in 3, 3.1, 3.2 and 3.3. The templates that come with models from 3.1 on also put dates and
    instructions for tools into a system message: that is their matter, the models do without.
    """

    CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        check_messages(messages)
        bos, start, end, eot = _control_ids(tokenizer, *self.CONTROL)

        def header(role: str) -> list[int]:
            return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

        ids = [bos]
        for message in messages:
            role = "ipython" if message["role"] == "tool" else message["role"]  # Meta's name for it
            ids += [*header(role), *tokenizer.encode(message["content"].strip()), eot]
        return ids + header("assistant") if add_generation_prompt else ids


CHAT_FORMATS: dict[str, ChatFormat] = {"llama2": Llama2Chat(), "llama3": Llama3Chat()}


def format_for(tokenizer: Tokenizer) -> ChatFormat | None:
    """How Meta's chat models with such a vocabulary are spoken to: for models that bring no template.

    None where a vocabulary points to neither Llama 3 nor Llama 2: ChatML and others come as templates.
    """
    names = tokenizer.control_tokens.keys()
    if names >= {*Llama3Chat.CONTROL}:
        return CHAT_FORMATS["llama3"]
    others = {"[INST]", "<|im_start|>"}  # Mistral's, since its v0.3, and ChatML's
    if tokenizer.add_space and names >= {"<s>", "</s>"} and not names & others:
        return CHAT_FORMATS["llama2"]
    return None


def _control_ids(tokenizer: Tokenizer, *names: str) -> list[int]:
    if missing := [name for name in names if name not in tokenizer.control_tokens]:
        raise MismatchError(f"the chat format needs the control token {missing[0]}, which this model has not")
    return [tokenizer.control_tokens[name] for name in names]


class ChatTemplate:
    """A Jinja template, run as Hugging Face's `apply_chat_template` runs it."""

    def __init__(self, source: str):
        self.source = source

    @cached_property
    def code(self) -> CodeType:
        return _Sandbox().compiled(self.source)

    def render(self, messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = True) -> str:
        bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
        eos = tokenizer.piece(tokenizer.eos_ids[0]) if tokenizer.eos_ids else ""
        context = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        context |= {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        size = sum(MESSAGE_OVERHEAD + len(message["content"]) for message in messages)
        try:
            code = self.code
            return _Sandbox(MAX_MADE + MADE_PER_CHARACTER * size).run(code, context)
        except Exception as error:  # a file's code may raise anything, RecursionError and MemoryError too
            files = {frame.f_code.co_filename: line for frame, line in walk_tb(error.__traceback__)}
            line = getattr(error, "lineno", files.get("<template>", "unknown"))
            what = escape(str(error) or type(error).__name__)
            raise TemplateError(f"the model's chat template, line {line}: {what}") from None

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
    """Jinja's sandbox with Hugging Face's settings, a deadline, and room for what a template makes.

    Every value that is made goes through `weigh`. Steps that make much out of little are refused or weighed
    before they are done; all others make little more than they are given.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, room: int = MAX_MADE) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        own = {"join": self.join, "replace": self.replace, "tojson": self.tojson}
        self.filters = {name: self.weighed(self.filters[name]) for name in FILTERS} | own
        self.tests = {name: self.weighed(test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = self.fail
        self.globals["strftime_now"] = self.strftime_now
        self.room, self.deadline = room, time.monotonic() + MAX_SECONDS

    def compiled(self, source: str) -> CodeType:
        if len(source) > MAX_SOURCE:
            self.fail(f"it has {len(source)} characters, at most {MAX_SOURCE} are allowed")
        tree = self.parse(source)
        if (n := sum(1 for _ in tree.find_all(nodes.Node))) > MAX_NODES:
            self.fail(f"it has {n} parts, at most {MAX_NODES} are allowed")
        return self.compile(_Weighing().visit(tree))

    def run(self, code: CodeType, context: dict[str, Any]) -> str:
        return "".join(jinja2.Template.from_code(self, code, self.make_globals(None)).generate(context))

    def weigh(self, value: Any = None) -> Any:
        """`value` itself, if there are time and room for it: for its own length, and once for all within.

        [[x, x], [x, x]] is small, but as a text it has all four: so each is counted where it is seen.
        """
        if time.monotonic() > self.deadline:
            self.fail(f"it takes longer than {MAX_SECONDS} s")
        size, inside = 0, [value]
        while inside and size <= self.room:
            item = inside.pop()
            size += len(item) if isinstance(item, str) else 1
            if isinstance(item, list | tuple | dict):
                inside += item
            if isinstance(item, dict):
                inside += item.values()
            if isinstance(item, int) and abs(item) > MAX_INT:
                self.fail(f"it computes a number beyond {MAX_INT}")
        self.make_room(size)
        self.room -= len(value) if isinstance(value, str | list | tuple | dict) else 0
        return value

    def weighed(self, function: Any) -> Callable:
        """A filter or a test, its outcomes weighed: `map` and `select` call one on item after item."""

        @wraps(function)  # Jinja marks functions that want its context
        def run(*args: Any, **kwargs: Any) -> Any:
            return self.weigh(function(*args, **kwargs))

        return run

    def make_room(self, size: int) -> None:
        if size > self.room:
            self.fail("it writes too much, or makes too much on the way")

    def text(self, *values: Any) -> str:
        return "".join([self.weigh(str(value)) for value in values])

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
        if isinstance(owner, str):
            if name == "join":
                function, args = self.join, (*args, owner)
            elif name == "replace":
                function, args = self.replace, (owner, *args)
            elif any(isinstance(x, str) and len(x) > MAX_ARGUMENT for x in args):
                self.fail(f"the method {name} has an argument of more than {MAX_ARGUMENT} characters")
        value = super().call(context, function, *args, **kwargs)
        return value if owner is self else self.weigh(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """10**10**9, 'a' * 10**10 and '%1000000000d' % 1 are one step each: no clock would stop them."""
        size = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
        too_much = operator == "*" and size != [left, right] and size[0] * size[1] > self.room
        if too_much or operator == "**" or (operator == "%" and isinstance(left, str)):
            self.fail(f"operator {operator} is not allowed, or not on such values")
        return self.weigh(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        """Jinja would lend templates a safe str.format, which pads all the same: not one of METHODS."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        plain = isinstance(obj, str | int | float | list | tuple | dict | type)
        return (not plain or attr in METHODS) and super().is_safe_attribute(obj, attr, value)

    def join(self, values: Any, d: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            values = (self.getitem(value, attribute) for value in values)
        texts = [str(value) for value in values]
        self.make_room(len(texts) * len(d))
        return self.weigh(d.join(texts))

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        self.make_room(str(text).count(old) * len(new))
        return self.weigh(str(text).replace(old, new, count))

    def tojson(self, value: Any, indent: int | None = None) -> str:
        """Jinja's own escapes what means something in HTML."""
        encoder = json.JSONEncoder(ensure_ascii=False, indent=None if indent is None else min(indent, 8))
        return "".join(map(self.weigh, encoder.iterencode(value)))

    def strftime_now(self, form: str) -> str:
        if len(form) > MAX_ARGUMENT:
            self.fail(f"a form of {len(form)} characters for the date")
        return self.weigh(datetime.now().strftime(form))

    def fail(self, message: str) -> NoReturn:
        raise jinja2.TemplateError(message)


class _Weighing(NodeTransformer):
    """Puts calls into a template: wherever Jinja does not ask its environment, something may be made.

    Loops and macros need not make anything to take long, and a loop's condition is no part of its body.
    """

    def visit_Output(self, node: nodes.Output) -> nodes.Node:
        self.generic_visit(node)
        node.nodes = [_call("text", child, child) for child in node.nodes]
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("text", node, *node.nodes)

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("weigh", node, node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("weigh", node, node) if node.ctx == "load" else node

    def visit_List(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        return _call("weigh", node, node)

    visit_Dict = visit_List

    def visit_For(self, node: Any) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("weigh", node), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = _call("weigh", node, node.test)
        return node

    visit_Macro = visit_For


def _call(method: str, at: nodes.Node, *arguments: Any) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method)
    return nodes.Call(function, list(arguments), [], None, None, lineno=at.lineno)


class _Namespace(Namespace):
    """Jinja's, without its text: a namespace can hold another, and so any number of them in each other."""

    def __repr__(self) -> str:
        return "<namespace>"


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
