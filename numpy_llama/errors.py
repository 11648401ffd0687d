"""Every error that numpy_llama raises on purpose, under one root.

A message names the file, the offset or key, the value found and the value wanted.
Text from a file goes through `escape`, because it may contain anything, even terminal codes.
"""

import re
from numbers import Integral


class NumpyLlamaError(Exception):
    """The root: `except NumpyLlamaError` catches all of ours and nothing else.

    Its text is one printable line, even if a file's name is not printable.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class FormatError(NumpyLlamaError):
    """The file breaks the rules of its own format."""


class TruncatedError(FormatError):
    """The file is shorter than its header requires: most often a download that stopped."""


class UnsafePickleError(FormatError):
    """A pickled checkpoint would import, call or set more than tensors need."""


class FileChangedError(NumpyLlamaError):
    """A file was replaced, cut or written to while it was in use."""


class ResourceLimitError(NumpyLlamaError):
    """A count or a size is larger than the file, the machine's memory, or one of our limits."""


class UnsupportedError(NumpyLlamaError):
    """A well-formed file or request that this program cannot run."""


class MismatchError(NumpyLlamaError):
    """Two parts that must agree do not: weights and arguments, or tokenizer and embedding."""


class ConfigError(NumpyLlamaError):
    """The model's hyperparameters are missing or impossible."""


class TokenizerError(NumpyLlamaError):
    """The vocabulary cannot be used, or an id lies outside it."""


class TemplateError(NumpyLlamaError):
    """The model's chat template is missing, or fails, or goes beyond its limits."""


class TextError(NumpyLlamaError):
    """Input text cannot be read, for example because it is not UTF-8."""


class ParameterError(NumpyLlamaError, ValueError):
    """An argument of a call is out of its range."""


class ContextOverflowError(NumpyLlamaError):
    """There are more tokens than the context has room for."""


class NumericsError(NumpyLlamaError):
    """A number that must be finite is NaN or infinite."""


class DownloadError(NumpyLlamaError):
    """A model could not be fetched, or the fetched file is another one."""


class BuildError(NumpyLlamaError):
    """The compiled extension is missing or does not fit this package."""


def check_kind(name: str, value: object, kind: type | tuple[type, ...], wanted: str) -> None:
    """ParameterError unless the argument `name` is of that kind."""
    if not isinstance(value, kind):
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}")


def check_has(name: str, value: object, attribute: str, wanted: str) -> None:
    """ParameterError unless the argument `name` has that attribute. A stand-in for the class is fine."""
    if not hasattr(value, attribute):
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}")


def check_whole(name: str, value: object, least: int, most: int) -> None:
    """ParameterError unless the argument `name` is a whole number, of Python or NumPy, in that range."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise ParameterError(
            f"{name} is {escape(value, 60)}, it must be a whole number from {least} to {most}"
        )


def check_iterable(name: str, value: object, wanted: str) -> None:
    """ParameterError unless the argument `name` is iterable."""
    try:
        iter(value)  # type: ignore[call-overload]
    except TypeError:  # an array without axes has __iter__ too, but it fails
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be {wanted}") from None


def check_flag(name: str, value: object) -> bool:
    """Whether the argument `name` is true. ParameterError if it is neither, like an array."""
    try:
        return bool(value)
    except ValueError:
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be True or False") from None


def check_callable(name: str, value: object) -> None:
    """ParameterError unless the argument `name` can be called."""
    if not callable(value):
        raise ParameterError(f"{name} is {escape(value, 60)}, it must be a function, or be left out")


def printable(text: str) -> str:
    """`text` with an escape for each character that a terminal does not show or would execute."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


# What a terminal obeys: control characters but newline and tab, and those of the direction of writing.
_ORDERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")


def visible(text: str, spelling: str | None = None) -> str:
    """A text of several lines for a terminal: what it would obey is escaped, any other character stays.

    Each character is escaped by itself, so that a text may come in pieces. `spelling`: JSON's, for example.
    """
    if spelling is None:
        return _ORDERS.sub(lambda order: ascii(order[0])[1:-1], text)
    return _ORDERS.sub(lambda order: spelling.format(ord(order[0])), text)


def escape(value: object, limit: int = 200) -> str:
    """Text from a file, safe to print: ASCII with escapes, at most `limit` characters."""
    text = ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
