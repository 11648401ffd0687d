"""Exchange parts of a model without a change of the model: only the path to each part is copied.

A part is reached by a path of attributes and of places in a list, such as "layers.0.attention.wq".
"""

from collections.abc import Iterator, Mapping
from copy import copy
from difflib import get_close_matches
from typing import Any, TypeVar

from .errors import ParameterError, check_kind, escape

Whole = TypeVar("Whole")


def with_parts(whole: Whole, parts: Mapping[str, Any]) -> Whole:
    """A copy of `whole` with other parts at these paths; both share the rest. `*` is every place of a list.

    Errors: ParameterError if a path leads to no part, or if the new part cannot be called as the old one.
    """
    check_kind("parts", parts, Mapping, 'a dict such as {"layers.0.attention.wq": part}')
    for name, part in parts.items():
        check_kind("the name of a part", name, str, 'a text such as "layers.0.attention.wq"')
        whole = _exchanged(whole, name, 0, part)
    return whole


def _exchanged(whole: Any, name: str, depth: int, part: Any) -> Any:
    """`whole`, which the first `depth` steps of the name lead to, with the part at the end of the name."""
    steps = name.split(".")
    if depth == len(steps):
        wanted = "a part that can be called" if callable(whole) else "a list of parts"
        if callable(part) < callable(whole) or isinstance(part, list) < isinstance(whole, list):
            raise ParameterError(f"{name} is {escape(part, 60)}, it must be {wanted}")
        return part
    new, first = copy(whole), steps[depth]
    children: Any = new if isinstance(new, list) else vars(new) if hasattr(new, "__dict__") else {}
    places = dict(_places(children))
    for place in places.values() if first == "*" and isinstance(new, list) else [places.get(first)]:
        if place is None:
            raise ParameterError(_no_part(name, depth, list(places)))
        children[place] = _exchanged(children[place], name, depth + 1, part)
    return new


def _places(children: Any) -> Iterator[tuple[str, Any]]:
    """The name of each child, and its place in a list or in the dict of attributes."""
    return ((str(i), i) for i in (range(len(children)) if isinstance(children, list) else children))


def _no_part(name: str, depth: int, places: list[str]) -> str:
    """The message for a name that leads to no part after `depth` steps."""
    *before, wrong = name.split(".")[: depth + 1]
    where = f"in {'.'.join(before)!r}" if before else "in the model"
    if near := get_close_matches(wrong, places, 1, cutoff=0.5):
        hint = f'is it "{".".join([*before, near[0]])}"?'
    else:
        hint = f"there are {', '.join(places) if len(places) < 30 else f'{places[0]} to {places[-1]}'}"
    return f"{escape(name, 80)}: there is no part {wrong!r} {where}; {hint if places else 'it has no parts'}"
