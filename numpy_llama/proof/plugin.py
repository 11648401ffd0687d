"""Runs the laws: pytest loads this by itself, wherever the package is installed.

It adds `--ops FILE`, hands each law the implementations that have its operations, and tells what a user's
file got wrong in plain words: the law, the smallest input found, what came out and what should have.
"""

import inspect
from collections import Counter
from pathlib import Path

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("numpy_llama")
    group.addoption(
        "--ops",
        metavar="FILE",
        help="hold the functions of this Python file to the laws of numpy_llama.proof",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "law(operations): a law about these operations")
    if config.getoption("--ops"):
        on_trial(config)  # what is wrong with the file is said before anything else


def on_trial(config: pytest.Config) -> list:
    """The user's file, or else all that we have."""
    from . import implementations

    if config.stash.get(TRIAL, None) is None:
        file = config.getoption("--ops")
        if not file:
            config.stash[TRIAL] = implementations.all_implementations()
        else:
            config.stash[TRIAL] = [implementation_of(Path(file))]
    return config.stash[TRIAL]


TRIAL = pytest.StashKey[list]()


def implementation_of(path: Path):
    from . import implementations

    if not path.is_file():
        raise pytest.UsageError(f"--ops: there is no file {path}")
    try:
        found = implementations.implementation_of_file(path)
    except Exception as error:
        at = [f"line {line}" for name, line in _frames(error) if name == str(path)]
        told = ", ".join([str(path), *at[-1:]])
        raise pytest.UsageError(f"--ops: {told}: {type(error).__name__}: {error}") from None
    if not found.operations:
        known = ", ".join(implementations.NAMES[:5])
        raise pytest.UsageError(f"--ops: {path} defines no operation that there is a law about: {known}, ...")
    return found


def pytest_report_header(config: pytest.Config) -> str | None:
    if not config.getoption("--ops"):
        return None
    (mine,) = on_trial(config)
    return f"on trial: {mine.name}: {', '.join(mine.operations)}"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if metafunc.definition.get_closest_marker("law"):
        metafunc.parametrize("ops", on_trial(metafunc.config), ids=str)


def operations(item) -> list[str]:
    """What a law is about, first what it is about most; "{name}" stands for a parameter of the test."""
    return [name.format(**item.callspec.params) for name in item.get_closest_marker("law").args]


def pytest_collection_modifyitems(config: pytest.Config, items: list) -> None:
    """A law about what an implementation has not is no test of it."""

    def concerns(item) -> bool:
        return not item.get_closest_marker("law") or set(operations(item)) <= set(
            item.callspec.params["ops"].operations
        )

    if others := [item for item in items if not concerns(item)]:
        if config.getoption("--ops"):
            config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if concerns(item)]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    report = yield
    if item.get_closest_marker("law") and call.when == "call":
        report.operation, report.sentence = operations(item)[0], sentence(item.function)
        if report.failed and item.config.getoption("--ops"):
            report.longrepr = told(item, call.excinfo.value, Path(item.config.getoption("--ops")))
    return report


def sentence(law) -> str:
    """The law in words: what its docstring begins with."""
    return " ".join((inspect.getdoc(law) or law.__name__).split("\n\n")[0].split())


def told(item, error: BaseException, path: Path) -> str:
    """What went wrong, for whoever wrote the operations."""
    from .bounds import Miss, shown

    ops = item.callspec.params["ops"]
    lines = [f"{operations(item)[0]} does not keep this law:", f"  {sentence(item.function)}", ""]
    lines += ["The smallest input found that breaks it:"]
    gave = getattr(error, "actual", None)
    for name, arguments, result in ops.calls[-3:]:
        lines += [f"  {call_of(name, arguments, ops.operations[name])}"]
        if result is not None and shown(result) != shown(gave):
            lines += [f"    = {_indented(shown(result), 6)}"]
    frames = [(file, line) for file, line in _frames(error) if file == str(path.resolve())]
    if frames:
        lines += [f"  raised {type(error).__name__}: {error}", f"  in {path.name}, line {frames[-1][1]}"]
    elif isinstance(error, Miss):
        lines += [f"  gave   {_indented(shown(error.actual), 9)}"]
        lines += [f"  wanted {_indented(shown(error.expected), 9)}", f"  {error.why}"]
    else:
        lines += [f"  {error}" if isinstance(error, AssertionError) else f"  {type(error).__name__}: {error}"]
    return "\n".join(lines)


def call_of(name: str, arguments: tuple, function) -> str:
    """The call as one would write it, with the names of its parameters."""
    from .bounds import shown

    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        names = []
    names += [""] * (len(arguments) - len(names))
    parts = [
        f"{key} = {shown(value)}" if key else shown(value)
        for key, value in zip(names, arguments, strict=False)
    ]
    one_line = f"{name}({', '.join(parts)})"
    if len(one_line) <= 100 and "\n" not in one_line:
        return one_line
    return f"{name}(" + "".join(f"\n      {_indented(part, 10)}," for part in parts) + ")"


def _indented(text: str, by: int) -> str:
    return text.replace("\n", "\n" + " " * by)


def _frames(error: BaseException):
    """(file, line) of each call on the way to an error, from the outermost."""
    if isinstance(error, SyntaxError):
        yield error.filename, error.lineno
    trace = error.__traceback__
    while trace:
        yield trace.tb_frame.f_code.co_filename, trace.tb_lineno
        trace = trace.tb_next


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if not config.getoption("--ops"):
        return
    tried: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for outcome in ("passed", "failed"):
        for report in terminalreporter.getreports(outcome):
            if operation := getattr(report, "operation", None):
                tried[operation] += 1
                held[operation] += outcome == "passed"
    terminalreporter.section("laws that hold")
    for operation, n in tried.items():
        whole = "" if held[operation] == n else "   <--"
        terminalreporter.line(f"{operation:<24} {held[operation]:>3} of {n}{whole}")
