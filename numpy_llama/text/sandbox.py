"""Where a chat template runs: code that came with a file, and may have been written to do harm.

What this file promises: it reaches nothing but what it is shown, ends within half a second, and has room for
so much. Jinja's own sandbox keeps it from Python's insides; the rest is here: allow-lists of filters and
methods, and a budget for all that its steps make.
"""

import json
import time
from collections.abc import Callable
from datetime import datetime
from functools import wraps
from types import CodeType
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_SOURCE = 1 << 16  # characters of a template,
MAX_NODES = 1 << 13  # and of its syntax tree: real ones have some hundreds, and this many compile in a second
MAX_SECONDS = 0.5  # of CPU time; real templates take milliseconds
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


class Sandbox(ImmutableSandboxedEnvironment):
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

    def weigh(self, value: Any = None) -> Any:
        """`value` itself, if there are time and room for it: for its own length, and once for all within.

        [[x, x], [x, x]] is small, but as a text it has all four: so each is counted where it is seen.
        """
        if time.thread_time() > self.deadline:
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
