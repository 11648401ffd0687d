"""Small mechanical changes of the files that define the operations: one operator, number or name each.

Docstrings, error messages and annotations are not changed, because they do not compute anything.
"""

import ast
import random
from pathlib import Path

from bugs import LAWS, Bug

# The tests that should fail after a change of each file, the likeliest first.
JUDGES = {
    "numpy_llama/functional.py": " ".join(
        f"{LAWS}test_{name}.py"
        for name in ("rms_norm", "softmax", "swiglu", "embedding", "linear", "rope", "attention", "model")
    )
    + " tests/model/test_model.py",
    "numpy_llama/backward.py": " ".join(
        f"{LAWS}test_{name}.py" for name in ("gradients", "loss", "attention_backward", "learning")
    )
    + " tests/model/test_learner.py",
    "numpy_llama/rope.py": f"{LAWS}test_rope.py tests/model/test_rope_scalings.py",
    "numpy_llama/generation/sampling.py": f"{LAWS}test_sampling.py tests/generation/test_sampling.py",
    "numpy_llama/backend/formats.py": f"{LAWS}test_quantisation.py "
    "tests/kernels/test_quantize.py tests/kernels/test_pack.py",
}

OPERATORS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.FloorDiv: "*", ast.Mod: "*", ast.Pow: "*",
    ast.LShift: ">>", ast.RShift: "<<", ast.BitAnd: "|", ast.BitOr: "&", ast.MatMult: "*",
}  # fmt: skip
COMPARISONS = {
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
}  # fmt: skip
NAMES = {
    "max": "min", "min": "max", "cos": "sin", "sin": "cos", "argmax": "argmin", "cumsum": "cumprod",
    "searchsorted": "digitize", "maximum": "minimum", "minimum": "maximum", "sum": "max", "mean": "sum",
    "trunc": "ceil", "rint": "trunc", "real": "imag", "low": "high", "high": "low", "abs": "square",
    "ones_like": "zeros_like", "zeros_like": "ones_like", "exp": "expm1", "sqrt": "cbrt",
    "float64": "float32",
}  # fmt: skip
# Functions whose first two arguments can be exchanged without effect. A reshape keeps the order in memory,
# and a later reshape gives each of these results its shape.
SYMMETRIC = ("min", "max", "np.minimum", "np.maximum", "rows.reshape")
SYMMETRIC += ("blocks[:, 16:].reshape", "blocks[:, 48:].reshape", "blocks[:, :128].reshape")


def mutations(root: Path, count: int, seed: int) -> list[Bug]:
    """A random sample of `count` of all possible changes."""
    every = [bug for file in JUDGES for bug in changes_of(file, (root / file).read_text())]
    return sorted(random.Random(seed).sample(every, count), key=lambda bug: bug.name)


def changes_of(file: str, source: str) -> list[Bug]:
    """Every change of a file. `before` and `after` are the whole text, so `before` occurs once."""
    lines = source.splitlines(keepends=True)
    starts = [sum(map(len, lines[:i])) for i in range(len(lines))]
    found = []

    def at(node):
        line = lines[node.lineno - 1]
        return starts[node.lineno - 1] + len(line.encode()[: node.col_offset].decode())

    def end(node):
        line = lines[node.end_lineno - 1]
        return starts[node.end_lineno - 1] + len(line.encode()[: node.end_col_offset].decode())

    def change(begin, stop, new):
        old = source[begin:stop]
        number = source.count("\n", 0, begin) + 1
        name = f"{Path(file).name}:{number}: {' '.join(old.split())} -> {new.strip()}"
        found.append(Bug(name, "", file, source, source[:begin] + new + source[stop:], JUDGES[file]))

    for node in relevant(ast.parse(source)):
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATORS:
            change(
                end(node.left),
                at(node.right),
                between(source, end(node.left), at(node.right), OPERATORS[type(node.op)]),
            )
        elif isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARISONS:
            right = node.comparators[0]
            change(
                end(node.left),
                at(right),
                between(source, end(node.left), at(right), COMPARISONS[type(node.ops[0])]),
            )
        elif isinstance(node, ast.BoolOp):
            one, other = node.values[:2]
            word = "or" if isinstance(node.op, ast.And) else "and"
            change(end(one), at(other), between(source, end(one), at(other), word))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.Not | ast.Invert):
            change(at(node), at(node.operand), "")
        elif isinstance(node, ast.Constant) and type(node.value) in (int, float):
            change(at(node), end(node), repr(node.value + 1))
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            change(at(node), end(node), repr(not node.value))
        elif isinstance(node, ast.Attribute) and node.attr in NAMES:
            change(end(node) - len(node.attr), end(node), NAMES[node.attr])
        elif isinstance(node, ast.Call) and len(node.args) >= 2 and not is_symmetric(node.func):
            one, other = node.args[:2]
            swapped = (
                source[at(other) : end(other)] + source[end(one) : at(other)] + source[at(one) : end(one)]
            )
            change(at(one), end(other), swapped)
    return found


def is_symmetric(function: ast.expr) -> bool:
    return ast.unparse(function) in SYMMETRIC or getattr(function, "attr", "") == "swapaxes"


def between(source: str, begin: int, stop: int, operator: str) -> str:
    """The text between two operands with another operator. Brackets stay."""
    gap = source[begin:stop]
    old = gap.strip(" ()\n")
    return gap.replace(old, operator, 1)


def relevant(tree: ast.AST):
    """All nodes, except errors, annotations, docstrings, assignments of the module, and the -1 of a reshape.

    Any number below 0 has the meaning of that -1.
    """
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.UnaryOp) and ast.unparse(node) == "-1" and is_reshape(tree):
            continue
        if isinstance(node, ast.ClassDef):  # only the methods that are formulas
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "divisors":
                    yield from relevant(method)
            continue
        if isinstance(node, ast.Raise | ast.AnnAssign | ast.arg | ast.JoinedStr | ast.alias):
            continue
        if isinstance(node, ast.Assign) and isinstance(tree, ast.Module):
            continue
        yield node
        yield from relevant(node)


def is_reshape(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "reshape"
