"""```{laws}``` lists every law of numpy_llama.proof: the chapter, the operations, what it says."""

import ast
from importlib.resources import files

from docutils import nodes
from docutils.parsers.rst import Directive


class Laws(Directive):
    def run(self):
        made = []
        for path in sorted(files("numpy_llama.proof").iterdir(), key=lambda path: path.name):
            if path.name.startswith("test_"):
                made.append(chapter(path.name, ast.parse(path.read_text())))
        return made


def chapter(name, module):
    operation = name.removeprefix("test_").removesuffix(".py").replace("_", " ")
    section = nodes.section(ids=[f"laws-of-{operation.replace(' ', '-')}"], names=[f"laws of {operation}"])
    section += nodes.title("", operation)
    section += nodes.paragraph("", ast.get_docstring(module).partition("\n\n")[0])
    laws = nodes.bullet_list()
    for function in module.body:
        if isinstance(function, ast.FunctionDef) and needs(function):
            first, _, _ = (ast.get_docstring(function) or function.name).partition("\n\n")
            item = nodes.paragraph("", "", nodes.literal("", needs(function)), nodes.Text(f": {first}"))
            laws += nodes.list_item("", item)
    section += laws
    return section


def needs(function):
    """The operations that a law is about, or "" where the function is none."""
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and getattr(decorator.func, "id", "") in ("law", "whole"):
            return ", ".join(decorator.args[0].value.split())
    return ""


def setup(app):
    app.add_directive("laws", Laws)
    return {"parallel_read_safe": True}
