"""Random JSON schemas, and texts that a constraint and random logits make."""

from copy import copy

import numpy as np
from hypothesis import strategies as st

from numpy_llama.generation.sampling import Sampler
from numpy_llama.generation.structured import Constraint
from numpy_llama.text.tokenizer import Tokenizer

NAMES = st.sampled_from(
    ["a", "name", "full name", "größe", 'x"y', "日本", "\u2581", "\\", "n\n", "🦙", "$ref"]
)
WORDS = st.text('ab c"\\\n\té🦙\u2581日', max_size=6)
CONSTANTS = st.none() | st.booleans() | st.integers(-999, 999) | WORDS
PATTERNS = st.sampled_from(
    ["^[a-z]{2,5}$", "^(ab|cd)+$", "^\\d{4}-\\d{2}$", "x", '^[^"]{0,4}$', "^é+🦙?$", "^a{3}|b$", '^\\\\?"$']
)


def sizes(least: str, most: str, largest: int) -> st.SearchStrategy[dict]:
    """The two keywords of a range, one of them, or none."""
    pairs = st.tuples(st.integers(0, largest), st.integers(0, largest)).map(sorted)
    both = pairs.map(lambda pair: {least: pair[0], most: pair[1]})
    return both | both.map(lambda d: {least: d[least]}) | both.map(lambda d: {most: d[most]}) | st.just({})


def merged(*parts: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    return st.tuples(*parts).map(lambda found: {key: value for part in found for key, value in part.items()})


def typed(name: str) -> st.SearchStrategy[dict]:
    return st.just({"type": name})


STRINGS = (
    merged(typed("string"), sizes("minLength", "maxLength", 8))
    | merged(typed("string"), PATTERNS.map(lambda pattern: {"pattern": pattern}))
    | st.sampled_from(["date", "time", "uuid", "ipv4", "email"]).map(
        lambda f: {"type": "string", "format": f}
    )
)
NUMBERS = merged(
    st.sampled_from([{"type": "integer"}, {"type": "number"}]), sizes("minimum", "maximum", 500)
) | st.integers(1, 40).map(lambda n: {"type": "integer", "multipleOf": n})
SIMPLE = (
    STRINGS
    | NUMBERS
    | typed("boolean")
    | typed("null")
    | st.lists(CONSTANTS, min_size=1, max_size=4).map(lambda values: {"enum": values})
    | CONSTANTS.map(lambda value: {"const": value})
    | st.just({"type": ["string", "null"], "maxLength": 5})
    | st.just({"$ref": "#/$defs/leaf"})
)
# Keywords that llguidance does not support. A schema with one is refused.
UNSUPPORTED = [
    {"not": {"type": "null"}},
    {"type": "array", "uniqueItems": True},
    {"type": "array", "contains": {"const": 1}},
    {"if": {"type": "string"}, "then": {"minLength": 3}},
    {"type": "object", "propertyNames": {"maxLength": 2}},
    {"type": "object", "dependentRequired": {"a": ["b"]}},
    {"type": "string", "format": "idn-email"},
    {"type": "string", "pattern": "(?=a)b"},
    {"type": "object", "minProperties": 3},
    {"$ref": "https://example.org/schema.json"},
    {"oneOf": [{"minimum": 3}, {"maximum": 5}]},
    {"unevaluatedProperties": False},
]


def objects(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    properties = st.dictionaries(NAMES, inner, max_size=4)
    required = properties.flatmap(
        lambda found: (
            st.lists(st.sampled_from([*found]), unique=True).map(
                lambda names: {"properties": found, "required": names}
            )
            if found
            else st.just({})
        )
    )
    others = inner.map(lambda schema: {"additionalProperties": schema, "maxProperties": 3})
    return merged(typed("object"), required, st.just({"additionalProperties": False})) | merged(
        typed("object"), others
    )


def arrays(inner: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    items = inner.map(lambda schema: {"items": schema})
    tuples = st.lists(inner, min_size=1, max_size=3).map(lambda found: {"prefixItems": found, "items": False})
    return merged(typed("array"), items, sizes("minItems", "maxItems", 4)) | merged(typed("array"), tuples)


def all_of(found: list[dict]) -> dict:
    """llguidance refuses maxProperties beside properties that are not required, so there it stands alone."""
    return {"allOf": found[:1] if "maxProperties" in str(found) else found}


def schemas(leaves: st.SearchStrategy[dict]) -> st.SearchStrategy[dict]:
    """Schemas of these leaves, with the definition that they may refer to."""
    some = lambda inner: st.lists(inner, min_size=1, max_size=3)  # noqa: E731
    nested = st.recursive(
        leaves,
        lambda inner: (
            objects(inner)
            | arrays(inner)
            | some(inner).map(lambda found: {"anyOf": found})
            | some(inner).map(all_of)
        ),
        max_leaves=8,
    )
    return nested.map(lambda schema: {**schema, "$defs": {"leaf": {"type": "integer", "minimum": -3}}})


SUPPORTED = schemas(SIMPLE)


def random_text(
    constraint: Constraint, tokenizer: Tokenizer, seed: int, most: int = 400, closing: float = 4.0
) -> tuple[str, str]:
    """-> (a text, "stop" or "length"). Only the constraint decides what is right: the logits are random.

    `closing` is added to the logits of end ids and of short tokens with a quote or a closing bracket, or
    few texts would end.
    """
    ends = [bool({*data} & {*b'"]}'}) and len(data) < 3 for data in tokenizer.meanings[: tokenizer.n_used]]
    more = closing * np.array(ends, np.float32)
    more[list(tokenizer.eos_ids)] = closing
    constraint, rng, ids = copy(constraint), np.random.default_rng(seed), []
    sampler = Sampler(temperature=1.0, seed=seed)
    state, reason = sampler.new_state(), "length"
    for _ in range(most):
        logits = rng.normal(size=len(more)).astype(np.float32) + more
        token = sampler(constraint(logits), ids, state)
        if token in tokenizer.eos_ids:
            reason = "stop"
            break
        ids.append(token)
        if constraint.take(token):
            reason = "stop"
            break
    return tokenizer.decode(ids, start_of_text=False), reason
