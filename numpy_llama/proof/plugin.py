"""Runs the laws: pytest loads this plugin by itself wherever the package is installed.

It adds `--ops FILE` and runs each law on the implementations that have its operations. A failure in a user's
file is reported as a short text: the law, the smallest input found, the result, and the wanted result. The
plugin does nothing in the tests of other projects.
"""

import importlib.util
import inspect
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TypeGuard, cast

import pytest

if TYPE_CHECKING:
    from .implementations import Call, Implementation

ASKED = "NUMPY_LLAMA_PROOF"  # pytest-xdist's processes inherit it, but not the command line
PRINTED = 10  # the last lines that a user's functions print are shown for each failed law


def pytest_addoption(parser: pytest.Parser) -> None:
    if any("numpy_llama" in argument for argument in sys.argv[1:]):
        os.environ[ASKED] = "yes"
    if ASKED in os.environ:  # otherwise --ops may be another project's option
        group = parser.getgroup("numpy_llama")
        meaning = "test the functions of this Python file with the laws of numpy_llama.proof"
        group.addoption("--ops", metavar="FILE", dest="numpy_llama_ops", help=meaning)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "numpy_llama_law(operations): a law about these operations")
    if file_of(config):
        for needed in ("hypothesis", "torch", "transformers", "gguf"):
            if importlib.util.find_spec(needed) is None:
                raise pytest.UsageError(f'--ops needs {needed}: pip install "numpy_llama[test]"')
        on_trial(config)  # an error in the file is reported first


def file_of(config: pytest.Config) -> Path | None:
    """The user's file, if there is one."""
    file = config.getoption("numpy_llama_ops", None)
    return Path(file).absolute() if file else None


def is_law(item: pytest.Item) -> TypeGuard[pytest.Function]:
    return item.get_closest_marker("numpy_llama_law") is not None


def on_trial(config: pytest.Config) -> "list[Implementation]":
    """The user's file, or else all implementations."""
    from . import implementations

    if config.stash.get(TRIAL, None) is None:
        file = file_of(config)
        config.stash[TRIAL] = [implementation_of(file)] if file else implementations.all_implementations()
    return config.stash[TRIAL]


TRIAL = pytest.StashKey[list["Implementation"]]()


def implementation_of(path: Path) -> "Implementation":
    from . import implementations

    if not path.is_file():
        what = "is a folder" if path.is_dir() else "does not exist"
        raise pytest.UsageError(f"--ops: {path.name} {what}; wanted a Python file")
    try:
        found = implementations.implementation_of_file(path)
    except (Exception, SystemExit) as error:
        at = [f"line {line}" for name, line in _frames(error) if name == str(path)]
        place = ", ".join([path.name, *at[-1:]])
        raise pytest.UsageError(f"--ops: {place}: {type(error).__name__}: {error}") from None
    if not found.operations:
        known = ", ".join(implementations.NAMES[:5])
        raise pytest.UsageError(
            f"--ops: {path.name} defines no operation that there is a law about: {known}, ..."
        )
    return found


def pytest_report_header(config: pytest.Config) -> str | None:
    if not file_of(config):
        return None
    (mine,) = on_trial(config)
    return f"on trial: {mine.name}: {', '.join(mine.operations)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if is_law(metafunc.definition):
        metafunc.parametrize("ops", on_trial(metafunc.config), ids=str)


def operations(item: pytest.Function) -> list[str]:
    """The operations of a law, the most important first. "{name}" is a parameter of the test."""
    mark = item.get_closest_marker("numpy_llama_law")
    return [name.format(**item.callspec.params) for name in mark.args] if mark else []


def ops_of(item: pytest.Function) -> "Implementation":
    """The implementation that a law runs on."""
    return cast("Implementation", item.callspec.params["ops"])


def pytest_itemcollected(item: pytest.Item) -> None:
    """-k selects laws by the names of their operations too."""
    if is_law(item):
        item.extra_keyword_matches.update(operations(item))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A law does not run on an implementation that lacks one of its operations."""

    def concerns(item: pytest.Item) -> bool:
        return not is_law(item) or set(operations(item)) <= set(ops_of(item).operations)

    if others := [item for item in items if not concerns(item)]:
        if file_of(config):
            config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if concerns(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if is_law(item) and call.when == "call":
        vars(report).update(operation=operations(item)[0], sentence=sentence(item.function))
        if report.failed and call.excinfo and (file := file_of(item.config)):
            report.longrepr = failure_text(item, call.excinfo.value, file)
            report.sections = [(title, _end_of(text)) for title, text in report.sections]
    return report


def sentence(law: Callable[..., object]) -> str:
    """The law as a text: the first paragraph of its docstring."""
    return " ".join((inspect.getdoc(law) or law.__name__).split("\n\n")[0].split())


def failure_text(item: pytest.Function, error: BaseException, path: Path) -> str:
    """The report of a failed law for the author of the operations."""
    from .bounds import Miss, shown
    from .laws import NotWritten

    ops = ops_of(item)
    if isinstance(error, NotWritten):
        return f"{ops.calls[-1].name} is not written yet"
    lines = [f"{operations(item)[0]} does not keep this law:", f"  {sentence(item.function)}", ""]
    lines += ["The smallest input found that breaks it:"]
    for call in ops.calls[-3:]:
        lines += [f"  {written_out(call)}"]
        for i in call.written:
            lines += [f"    it wrote into {parameters(call)[i] or f'its argument {i + 1}'}"]
        if call.result is not None and shown(call.result) != getattr(error, "gave", ""):
            lines += [f"    = {_indented(shown(call.result), 6)}"]
    frames = [(file, line) for file, line in _frames(error) if file == str(path)]
    if frames:
        lines += [f"  raised {type(error).__name__}: {_indented(str(error), 2)}"]
        lines += [f"  in {path.name}, line {frames[-1][1]}"]
    elif isinstance(error, Miss):
        lines += [f"  gave   {_indented(error.gave, 9)}", f"  wanted {_indented(error.wanted, 9)}"]
        lines += [f"  {error.why}"]
    else:
        lines += [f"  {error}" if isinstance(error, AssertionError) else f"  {type(error).__name__}: {error}"]
        if isinstance(error, TypeError) and ops.calls and not takes(ops.calls[-1]):
            lines += [f"  it is called as {wanted(ops.calls[-1].name)}"]
    return "\n".join(lines)


def written_out(call: "Call") -> str:
    """The call as Python code, with the names of its parameters."""
    from .bounds import shown

    parts = [
        f"{key} = {shown(value)}" if key else shown(value)
        for key, value in zip(parameters(call), call.arguments, strict=False)
    ]
    one_line = f"{call.name}({', '.join(parts)})"
    if len(one_line) <= 100 and "\n" not in one_line:
        return one_line
    lines = [_indented(part, 6 + (part.index(" = ") + 3 if " = " in part[:20] else 0)) for part in parts]
    return f"{call.name}(" + "".join(f"\n      {line}," for line in lines) + ")"


def signature(function: Callable[..., object]) -> inspect.Signature | None:
    """The signature; None for functions without one, as some in C are."""
    try:
        return inspect.signature(function)
    except (TypeError, ValueError):
        return None


def parameters(call: "Call") -> list[str]:
    """A name for each argument; "" where there is none."""
    known = signature(call.function)
    return [*(known.parameters if known else ()), *[""] * len(call.arguments)]


def takes(call: "Call") -> bool:
    """Whether the function's signature accepts these arguments. Without a signature, true."""
    try:
        if known := signature(call.function):
            known.bind(*call.arguments)
    except TypeError:
        return False
    return True


def wanted(name: str) -> str:
    """An operation, or a method, with the parameters that it has in this package."""
    from .implementations import numpy_implementation

    operation, *method = name.split(".")
    ours = numpy_implementation().operations[operation]
    names = inspect.signature(getattr(ours, *method) if method else ours).parameters
    return f"{name}({', '.join(one for one in names if one != 'self')})"


def _end_of(text: str) -> str:
    """The last printed lines: those of the smallest input, which Hypothesis runs last."""
    lines = text.splitlines(keepends=True)
    return "".join(["...\n", *lines[-PRINTED:]] if len(lines) > PRINTED else lines)


def _indented(text: str, by: int) -> str:
    return "\n".join(line.rstrip() for line in text.replace("\n", "\n" + " " * by).split("\n"))


def _frames(error: BaseException) -> Iterator[tuple[str | None, int | None]]:
    """(file, line) of each call on the way to an error, from the outermost."""
    if isinstance(error, SyntaxError):
        yield error.filename, error.lineno
    trace = error.__traceback__
    while trace:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


def pytest_terminal_summary(terminalreporter: "pytest.TerminalReporter", config: pytest.Config) -> None:
    if not file_of(config):
        return
    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if operation := getattr(report, "operation", None):
                tried[operation] += 1
                held[operation] += outcome == "passed"
    terminalreporter.section("laws that hold")
    if not tried:
        terminalreporter.line("no law was tried: pytest --pyargs numpy_llama.proof --ops FILE")
    for operation, n in tried.items():
        whole = "" if held[operation] == n else "   <--"
        terminalreporter.line(f"{operation:<24} {held[operation]:>3} of {n}{whole}")
