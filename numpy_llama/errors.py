"""Every error that numpy_llama raises on purpose, under one root.

A message names the file, the offset or key, the value found and the value wanted.
`escape` is for text from a file, which may contain anything, even terminal codes.
"""

import re
from numbers import Integral
from typing import TypeGuard


class NumpyLlamaError(Exception):
    """The root: `except NumpyLlamaError` catches all errors of this package and no others.

    The text of an error is one printable line, even if the name of a file is not.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class FormatError(NumpyLlamaError):
    """The file breaks the rules of its own format."""


class TruncatedError(FormatError):
    """The file is shorter than its own header requires: most often, a download stopped."""


class UnsafePickleError(FormatError):
    """A pickled checkpoint contains more than tensors: it would import, call or set something."""


class FileChangedError(NumpyLlamaError):
    """A file was replaced, cut or written to while it was in use."""


class ResourceLimitError(NumpyLlamaError):
    """A count or a size is larger than the file, the machine or a limit of this package allows."""


class UnsupportedError(NumpyLlamaError):
    """The file or the request is well-formed, but this package does not support it."""


class MismatchError(NumpyLlamaError):
    """Two parts do not agree: weights and arguments, or tokenizer and embedding."""


class ConfigError(NumpyLlamaError):
    """The model's hyperparameters are missing or impossible."""


class TokenizerError(NumpyLlamaError):
    """The vocabulary cannot be used, or an id is outside it."""


class TemplateError(NumpyLlamaError):
    """The model's chat template is missing, fails, or exceeds its limits."""


class TextError(NumpyLlamaError):
    """Input text is invalid, for example not UTF-8."""


class ParameterError(NumpyLlamaError, ValueError):
    """An argument of a call is out of its range."""


class GrammarError(ParameterError):
    """A JSON schema, a regular expression or a grammar is broken, too large or not supported."""


class ContextOverflowError(NumpyLlamaError):
    """The context has no room for all the tokens."""


class NumericsError(NumpyLlamaError):
    """A number is NaN or infinite where it must be finite."""


class DownloadError(NumpyLlamaError):
    """A model could not be fetched, or the fetched file is not the right one."""


class ParallelError(NumpyLlamaError):
    """The processes that mpiexec has started cannot work together."""


class BuildError(NumpyLlamaError):
    """The compiled extension is missing or does not fit this package."""


def check_kind(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """ParameterError unless the argument `name` is of that kind."""
    if not isinstance(value, kind):
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}")


def check_has(name: str, value: object, attribute: str, wanted: str) -> None:
    """ParameterError unless the argument `name` has that attribute, as the real class and stand-ins do."""
    if not hasattr(value, attribute):
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}")


def is_whole(value: object) -> TypeGuard[int]:
    """Whether it is a whole number, of Python or NumPy. True is none, although Python's bool is an int."""
    return type(value) is int or (isinstance(value, Integral) and not isinstance(value, bool))


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """ParameterError unless the argument `name` is a whole number in that range."""
    if not is_whole(value) or not least <= value <= most:
        wanted = f"a whole number from {least} to {most}" if least < most else str(most)
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}")


def check_iterable(name: str, value: object, wanted: str) -> None:
    """ParameterError unless the argument `name` can be iterated over."""
    try:
        iter(value)  # type: ignore[call-overload]  # the question is whether it is iterable
    except TypeError:  # not by hasattr: an array of no axes has __iter__ too
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}") from None


def check_flag(name: str, value: object) -> bool:
    """The argument `name` as a bool; ParameterError if it has no truth value, such as an array of two."""
    try:
        return bool(value)
    except ValueError:
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be True or False") from None


def check_callable(name: str, value: object, wanted: str = "a function, or be left out") -> None:
    """ParameterError unless the argument `name` can be called. `wanted` is for one without a default."""
    if not callable(value):
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}")


def printable(text: str) -> str:
    """`text` with an escape for every character that is not printable, such as a control character."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# Control characters except newline and tab, and the characters that change the direction of writing.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str, spelling: str | None = None) -> str:
    """A text of several lines for a terminal: characters that control it are escaped, all others stay.

    Each character is escaped by itself, so a text may come in pieces. `spelling` is the form of an escape,
    for example that of JSON.
    """
    if spelling is None:
        return _CONTROLS.sub(lambda found: ascii(found[0])[1:-1], text)
    return _CONTROLS.sub(lambda found: spelling.format(ord(found[0])), text)


def escape(value: object, limit: int = 200) -> str:
    """Text from a file, safe to print: ASCII with escapes, at most `limit` characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
