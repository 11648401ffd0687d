"""The sandbox of chat templates, which are code that came with a file and may be written to do harm.

What this file promises: a template reaches only the values that it is given. It ends after half a second of
CPU time, and the values that it makes stay within a budget. Jinja's own sandbox hides Python's internals.
This file adds lists of the allowed filters and methods, a deadline, and the budget.
"""

import json
import re
import time
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from string import Formatter
from types import CodeType
from typing import Any, NoReturn, TypeVar

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.filters import do_batch, do_indent, do_round, sync_do_slice
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 16  # characters of a template
MAX_NODES = 1 << 13  # nodes of its syntax tree: real ones have some hundreds, 8192 compile in a second
MAX_SECONDS = 0.5  # of CPU time; real templates take milliseconds
MAX_MADE = 1 << 18  # the budget: characters and items that all steps of a template make together
MADE_PER_CHARACTER = 64  # the budget grows by this for each character of the messages
MESSAGE_OVERHEAD = 64  # characters that each message counts in addition to its content
MAX_INT = 1 << 63
# Characters of an argument: the time of 'aa...'.strip('ba...') grows with the product of both lengths.
MAX_ARGUMENT = 1 << 10

MAX_WIDTH = 1 << 10  # of a padded value
# A field of form % values: perhaps the name of a value, then flags, width and precision, then a letter. A
# bracket in its place begins a name that has brackets itself.
CONVERSION = re.compile(r"%(?:\([^()]*\))?([^%a-zA-Z(]*)(.?)", re.DOTALL)

# The filters and methods of Jinja and of str whose result is little more than their inputs. Those that pad or
# repeat are below, with a limit. What is in neither list has no use in a template: attr, lipsum, xmlattr, ...
FILTERS = {
    "abs", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "filesizeformat",
    "first", "float", "forceescape", "groupby", "int", "items", "last", "length", "list", "lower", "map",
    "max", "min", "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string",
    "striptags", "title", "trim", "truncate", "unique", "upper", "urlencode", "wordcount",
}  # fmt: skip
METHODS = {
    "capitalize", "casefold", "copy", "count", "endswith", "find", "format", "get", "index", "isalnum",
    "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isprintable",
    "isspace", "istitle", "isupper", "items", "join", "keys", "lower", "lstrip", "partition",
    "removeprefix", "removesuffix", "replace", "rfind", "rindex", "rpartition", "rsplit", "rstrip",
    "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values",
}  # fmt: skip
PADDING = {"center", "expandtabs", "ljust", "rjust", "zfill"}  # methods with a width

Value = TypeVar("Value")


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with Hugging Face's settings, a deadline, and a budget of `room` characters and items.

    Every value that a template makes goes through `weigh`. A step that makes much out of little is refused,
    or the size of its result is checked before it runs. Every other step makes little more than its inputs.
    """

    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, room: int = MAX_MADE, ascii: str = "") -> None:
        """`ascii`: characters that JSON in ASCII keeps as they are, because they stand for other texts."""
        extensions = ["jinja2.ext.loopcontrols", Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
        own = {name: getattr(self, name) for name in ("join", "replace", "tojson", "round", "sum")}
        own |= {"center": self.center, "indent": self.indent, "format": self.percent}
        own |= {"batch": self.limited(do_batch), "slice": self.limited(sync_do_slice)}
        self.not_ascii = re.compile(rf"[^\x00-\x7f{re.escape(ascii)}]")
        self.filters = {name: self.weighed(self.filters[name]) for name in FILTERS} | own
        self.tests = {name: self.weighed(test) for name, test in self.tests.items()}
        del self.globals["lipsum"]
        self.globals["namespace"] = _Namespace
        self.globals["raise_exception"] = self.fail
        self.globals["strftime_now"] = self.strftime_now
        self.room, self.deadline = room, time.thread_time() + MAX_SECONDS

    def compiled(self, source: str) -> CodeType:
        if len(source) > MAX_SOURCE:
            self.fail(f"it has {len(source)} characters, at most {MAX_SOURCE} are allowed")
        tree = self.parse(source)
        if (n := sum(1 for _ in tree.find_all(nodes.Node))) > MAX_NODES:
            self.fail(f"it has {n} parts, at most {MAX_NODES} are allowed")
        return self.compile(_Weighing().visit(tree))

    def run(self, code: CodeType, context: dict[str, Any]) -> str:
        return "".join(jinja2.Template.from_code(self, code, self.make_globals(None)).generate(context))

    def weigh(self, value: Value) -> Value:
        """`value` itself, if it is within the deadline and the budget.

        The value's own length is taken from the budget. The rest must have room for everything inside it.
        The list [[x, x], [x, x]] is small, but its text has x four times: so x is counted four times.
        """
        if time.thread_time() > self.deadline:
            self.fail(f"it takes longer than {MAX_SECONDS} s")
        size = 0
        inside: list[Any] = [value]
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

    def weighed(self, function: Any) -> Callable[..., Any]:
        """A filter or a test whose results are weighed: `map` and `select` call one on every item."""

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
            elif name == "format":
                function, args = self.braces, (owner, *args)
            elif name in PADDING:
                width = max([8, *(x for x in (*args, *kwargs.values()) if isinstance(x, int))])
                self.check_width(width)
                self.make_room(width * (owner.count("\t") + 1))
            elif any(isinstance(x, str) and len(x) > MAX_ARGUMENT for x in args):
                self.fail(f"the method {name} has an argument of more than {MAX_ARGUMENT} characters")
        value = super().call(context, function, *args, **kwargs)
        return value if owner is self else self.weigh(value)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """10**10**9, 'a' * 10**10 and '%1000000000d' % 1 are one step each, which no deadline can stop."""
        if operator == "%" and isinstance(left, str):
            return self.formatted(left, right)
        size = [len(x) if hasattr(x, "__len__") else x for x in (left, right)]
        too_much = operator == "*" and size != [left, right] and size[0] * size[1] > self.room
        power = operator == "**" and not (isinstance(left, int | float) and right in range(64))
        if too_much or power:
            self.fail(f"operator {operator} is not allowed, or not on such values")
        return self.weigh(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> None:
        """None: `call` gives str.format to `braces`."""

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        plain = isinstance(obj, str | int | float | list | tuple | dict | type)
        allowed = attr in METHODS or (isinstance(obj, str) and attr in PADDING)
        return (not plain or allowed) and super().is_safe_attribute(obj, attr, value)

    def check_width(self, *values: Any) -> None:
        if any(isinstance(x, int) and abs(x) > MAX_WIDTH for x in values):
            self.fail(f"a width of more than {MAX_WIDTH}")

    def limited(self, cut: Callable[..., Any]) -> Callable[..., list[Any]]:
        """The filters batch and slice: lists of `number` items, or `number` lists."""

        def run(values: Any, number: int, fill_with: Any = None) -> list[Any]:
            self.check_width(number)
            return [self.weigh(part) for part in cut(values, number, fill_with)]

        return run

    def center(self, value: Any, width: int = 80) -> str:
        self.check_width(width)
        return self.weigh(str(value).center(width))

    def indent(self, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
        self.check_width(width, len(width) if isinstance(width, str) else 0)
        self.make_room((str(text).count("\n") + 1) * (len(width) if isinstance(width, str) else width))
        return self.weigh(do_indent(str(text), width, first, blank))

    def round(self, value: float, precision: int = 0, method: Any = "common") -> float:
        self.check_width(precision)
        return self.weigh(do_round(value, precision, method))

    def sum(self, values: Any, attribute: str | None = None, start: Any = 0) -> Any:
        values = [value if attribute is None else self.getitem(value, attribute) for value in values]
        if not all(isinstance(value, int | float) for value in [*values, start]):
            self.fail("the filter sum adds numbers only")
        return self.weigh(sum(values, start))

    def percent(self, form: Any, *args: Any, **kwargs: Any) -> str:
        """The filter format."""
        return self.formatted(str(form), kwargs or args)

    def formatted(self, form: str, values: Any) -> str:
        """form % values: a tuple, a dict, or one value. Widths have at most three digits."""
        for field in CONVERSION.finditer(form):
            if re.search(r"\*|\d{4}", field[1]) or field[2] == "(":
                self.fail("operator % is not allowed with such a width or name")
        inside = values if isinstance(values, tuple) else (values,)
        inside += tuple(values.values()) if isinstance(values, dict) else ()
        self.make_room(form.count("%") * self.most(*inside))
        return self.weigh(form % values)

    def braces(self, form: str, *args: Any, **kwargs: Any) -> str:
        """form.format(...) without attributes of the values, and with widths of at most three digits."""
        for _, field, spec, _ in Formatter().parse(form):
            if re.search(r"[.\[]", field or "") or re.search(r"[{]|\d{4}", spec or ""):
                self.fail("the method format is not allowed with such a field")
        self.make_room(form.count("{") * self.most(*args, *kwargs.values()))
        return self.weigh(form.format(*args, **kwargs))

    def most(self, *values: Any) -> int:
        """The characters that one field may make of these values."""
        return max([1000, *(len(self.weigh(str(value))) for value in values)])

    def join(self, values: Any, d: str = "", attribute: str | None = None) -> str:
        if attribute is not None:
            values = (self.getitem(value, attribute) for value in values)
        texts = [str(value) for value in values]
        self.make_room(len(texts) * len(d))
        return self.weigh(d.join(texts))

    def replace(self, text: str, old: str, new: str, count: int = -1) -> str:
        self.make_room(str(text).count(old) * len(new))
        return self.weigh(str(text).replace(old, new, count))

    def tojson(
        self,
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        """`value` as JSON, without the escapes for HTML that Jinja's own filter writes."""
        self.check_width(indent, *map(len, separators or ()))
        encoder = json.JSONEncoder(
            ensure_ascii=False, indent=indent, separators=separators, sort_keys=sort_keys
        )
        text = "".join(map(self.weigh, encoder.iterencode(value)))
        if not ensure_ascii:
            return text
        return self.weigh(self.not_ascii.sub(lambda match: json.dumps(match[0])[1:-1], text))

    def strftime_now(self, form: str) -> str:
        if len(form) > MAX_ARGUMENT:
            self.fail(f"a form of {len(form)} characters for the date")
        return self.weigh(datetime.now().strftime(form))

    def fail(self, message: str) -> NoReturn:
        raise jinja2.TemplateError(message)


class Generation(Extension):
    """{% generation %}: Hugging Face's tag around what the model writes. It changes no text."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class _Weighing(NodeTransformer):
    """Adds calls of `weigh` and `text` to a template where Jinja makes a value without calling `Sandbox`.

    A loop or a macro can take long and make nothing, so its body begins with a call. The condition of a loop
    is not part of its body, so it has a call too.
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

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call("weigh", node, node)

    visit_Dict = visit_List

    def visit_For(self, node: nodes.For | nodes.Macro) -> nodes.Node:
        self.generic_visit(node)
        node.body.insert(0, nodes.ExprStmt(_call("weigh", node, nodes.Const(None)), lineno=node.lineno))
        if isinstance(node, nodes.For) and node.test is not None:
            node.test = _call("weigh", node, node.test)
        return node

    visit_Macro = visit_For


def _call(method: str, at: nodes.Node, *arguments: Any) -> nodes.Call:
    function = nodes.EnvironmentAttribute(method)
    return nodes.Call(function, list(arguments), [], None, None, lineno=at.lineno)


class _Namespace(Namespace):
    """Jinja's namespace with a short text: namespaces can contain each other to any depth."""

    def __repr__(self) -> str:
        return "<namespace>"
