"""J: chat templates, which are programs that come with a file."""

from collections.abc import Iterator
from pathlib import Path

import numpy_llama as nl

from .case import MiB, Variant, case
from .gguf import llama_bytes

MESSAGES = [{"role": "user", "content": "hi"}]


class Templates:
    """Makes variants, each with a tokenizer and a message."""

    def __init__(self, folder: Path):
        self.path = folder / "model.gguf"
        self.path.write_bytes(llama_bytes())

    def __call__(self, name: str, source: str, *says: str, **options) -> Variant:
        def run() -> None:
            nl.ChatTemplate(source).encode(nl.load_tokenizer(self.path), MESSAGES)

        defaults = {"expected": ("TemplateError",), "names": "template", "seconds": 1.0}
        return Variant(name, run, says=says, compiles=True, **defaults | options)


@case("J01", "a way to every class")
def classes(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    popen = "{{ cycler.__init__.__globals__.os.popen('true').read() }}"
    yield template("subclasses", "{{ ''.__class__.__mro__[1].__subclasses__() }}")
    yield template("os.popen", popen)
    yield template("in a loop", "{% for x in ().__class__.__base__.__subclasses__() %}{{ x }}{% endfor %}")
    yield template("a function's code", "{{ raise_exception.__func__.__globals__ }}")
    yield template("of a message", "{{ messages.__class__.__base__ }}")


@case("J02", "the same by filters and brackets")
def attributes(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    yield template("attr", "{{ messages|attr('__class__') }}")
    yield template("brackets", "{{ ''['__class__']['__mro__'] }}")
    yield template("map", "{{ [{}]|map(attribute='__class__.__base__')|list|first }}")
    yield template("format and attr", "{{ (''|attr('format'))('{0.__class__}', x) }}")


@case("J03", "the same by formats")
def formats(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    yield template("format", "{{ '{0.__class__}'.format(messages) }}")
    yield template("format_map", "{{ '{a.__class__}'.format_map({'a': messages}) }}")
    yield template("an index", "{{ '{0[role]}'.format(messages[0]) }}")
    yield template("an attribute of an attribute", "{{ '{0.a.__class__}'.format(messages) }}")
    yield template("stored", "{% set f = '{0.__class__}'.format %}{{ f(messages) }}")
    yield template(
        "by a filter", "{{ ['{0.__class__}'.format]|map('string')|list }}{{ '{0}'|format(messages) }}"
    )


@case("J04", "loops without end")
def loops(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    yield template("10^9", "{% for i in range(10**9) %}{% endfor %}")
    yield template("10^9, spelled", "{% for i in range(1000000000) %}{% endfor %}")
    two = "{% for a in r %}{% for b in r %}{% for c in r %}x{% endfor %}{% endfor %}{% endfor %}"
    yield template("loops in loops", "{% set r = range(99999) %}" + two)
    yield template("and silent", "{% set r = range(99999) %}" + two.replace("x", ""))


@case("J05", "texts and numbers without end")
def sizes(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    for name, source in [
        ("'a' * 10^10", "{{ 'a' * 10000000000 }}"),
        ("10^10 * 'a'", "{{ 10000000000 * 'a' }}"),
        ("%1000000000d", "{{ '%1000000000d' % 1 }}"),
        ("%(x)1000000000d", "{{ '%(x)1000000000d' % {'x': 1} }}"),
        ("%(x)1000000000d by the filter", "{{ '%(x)1000000000d' | format(x=1) }}"),
        ("%(a(b)c)1000000000d", "{{ '%(a(b)c)1000000000d' % {'a(b)c': 1} }}"),
        ("10 ** 10 ** 9", "{{ 10 ** 10 ** 9 }}"),
        (
            "doubled",
            "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
        ),
        (
            "added",
            "{% set ns = namespace(s='a') %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
        ),
        ("center", "{{ 'a'|center(1000000000) }}"),
        ("ljust", "{{ 'a'.ljust(1000000000) }}"),
        ("indent", "{{ 'a\nb'|indent(1000000000) }}"),
        ("tojson", "{{ [1]|tojson(indent=1000000000) }}{{ 'a' * 10000000000 }}"),
        ("zfill", "{{ '1'.zfill(1000000000) }}"),
        ("expandtabs", "{{ ('\t' * 100000).expandtabs(1000) }}"),
        ("batch", "{{ [1]|batch(1000000000, 0)|list }}"),
        ("slice", "{{ [1]|slice(1000000000)|list }}"),
        ("a width in a format", "{{ '{:1000000000}'.format(1) }}"),
        ("a width in a width", "{{ '{:{}}'.format(1, 1000000000) }}"),
        ("a width as an argument", "{{ '%*d' % (1000000000, 1) }}"),
        ("many formats", "{{ ('{0}' * 10000).format('a' * 10000) }}"),
        ("a separator", "{{ [1, 2]|tojson(separators=('a' * 100000, '')) }}"),
        ("a power", "{{ [0] * 2 ** 60 }}"),
        ("a list", "{% set l = [1] * 10000000000 %}"),
        (
            "squared",
            "{% set ns = namespace(n=10) %}{% for i in range(60) %}{% set ns.n = ns.n * ns.n %}{% endfor %}",
        ),
        ("replaced", "{{ ('a' * 60000000)|replace('', 'aaaa') }}"),
    ]:
        yield template(name, source, room=256 * MiB)


@case("J06", "other files")
def files(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    for statement in (
        "include '/etc/passwd'",
        "import '/etc/passwd' as x",
        "from '/etc/passwd' import x",
        "extends '/etc/passwd'",
        "include ['a', 'b']",
    ):
        yield template(statement, "{% " + statement + " %}")


@case("J07", "too deep, too long")
def deep(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    yield template("a macro that calls itself", "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}")
    ifs = "{% if true %}" * 10_000 + "{% endif %}" * 10_000
    yield template("10,000 ifs", ifs)
    yield template("3,000 ifs", "{% if true %}" * 3_000 + "{% endif %}" * 3_000)
    yield template("brackets", "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}")
    yield template("a list in a list", "{{ " + "[" * 5_000 + "]" * 5_000 + " }}")
    yield template("5 MB", "a" * 5_000_000)
    yield template("not not not", "{{ " + "not " * 20_000 + "true }}")


@case("J08", "errors of its own")
def errors(folder: Path) -> Iterator[Variant]:
    template = Templates(folder)
    yield template("syntax", "a\n{% if %}", "line 2")
    yield template("an unknown tag", "a\n{% nothing %}", "line 2")
    yield template("an unknown filter", "a\n{{ 1|nothing }}", "line 2")
    yield template("undefined", "a\nb\n{{ nothing.at.all }}", "line 3", "nothing")
    yield template("undefined, called", "a\nb\n{{ nothing() }}", "line 3", "nothing")
    yield template("raise_exception", "a\n{{ raise_exception('\x1b[31mno\u202e') }}", "line 2", "no")
    yield template("divided by zero", "a\n{{ 1 / 0 }}", "line 2")
    yield template("a key that is missing", "a\n{{ messages[0]['nothing']['at all'] }}", "line 2")
