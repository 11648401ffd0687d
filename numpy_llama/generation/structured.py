"""Structured output: a text that follows a JSON schema, a regular expression or a grammar.

At each step the ids that the grammar forbids get the logit -inf, and the sampler chooses among the others
(Willard and Louf 2023, section 3). llguidance, an extra, finds them: a parser walks along a trie of the bytes
of all tokens. An end id is allowed where the text may end, and nowhere else.

    the text so far     {"age":4
    allowed             2   20   }        any token that continues it to a valid JSON
    -inf                "   ,   .   Oslo

llguidance raises no errors, so its state is looked at after each step.
"""

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from copy import copy
from functools import lru_cache
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

import numpy as np

from ..config import Array
from ..errors import GrammarError, ParameterError, ResourceLimitError, UnsupportedError, check_kind, is_whole
from ..text.tokenizer import UNUSED, Tokenizer, check_text

TRY_GRAMMAR = Path(__file__).with_name("try_grammar.py")
NEEDS_VOCABULARY = "unknown special token|Token range end"
CRASHES = 0xC0000000  # and above: what Windows has in the place of signals
LONGEST_TRY = 60  # seconds: on Windows nothing else ends it
SHOWN = 300  # characters of a message of llguidance
Names = tuple[tuple[int, str], ...]  # special tokens: id and name


class Grammar:
    """A JSON schema, a regular expression or a grammar in llguidance's form of Lark: one of them, checked.

    A schema gives JSON without spaces, its properties in the order of the schema. GrammarError: it is broken,
    too large, or has a keyword that is not supported. A reference to another file is never followed.
    """

    def __init__(
        self,
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
    ):
        rules = {"json_schema": json_schema, "regex": regex, "grammar": grammar}
        given = [name for name, rule in rules.items() if rule is not None]
        if len(given) != 1:
            found = " and ".join(given) or "no rule"
            raise ParameterError(f"{found} for the text, it must be one of {', '.join(rules)}")
        [self.name] = given
        if regex is not None:
            self.source: str = library().LLMatcher.grammar_from_regex(check_text(regex))
        elif grammar is not None:
            self.source = json.dumps({"grammars": [{"lark_grammar": check_text(grammar)}]})
        else:
            check_kind("json_schema", json_schema, Mapping, "a dict, the schema")
            self.source = schema_source(cast(Mapping[str, Any], json_schema))
        fault = fault_of(self.source)
        if not re.search(NEEDS_VOCABULARY, fault):
            self.refuse(fault)

    def refuse(self, fault: str) -> None:
        """GrammarError if llguidance has found a fault."""
        if fault:
            raise GrammarError(f"{self.name} cannot be followed: {readable(fault)}")


class Constraint:
    """The ids that a grammar allows after those so far, for one generation. `copy` begins another."""

    def __init__(self, grammar: Grammar, tokenizer: Tokenizer):
        if not tokenizer.eos_ids:
            raise UnsupportedError(f"{tokenizer.source} has no end token, structured output needs one")
        if grammar.name == "grammar":  # which may name special tokens
            grammar.refuse(fault_of(grammar.source, special_tokens(tokenizer), tokenizer.n_used))
        self.grammar, self.end_ids = grammar, tokenizer.eos_ids
        limits = library().LLParserLimits(verbose_errors=False)
        self.matcher = library().LLMatcher(trie(tokenizer), grammar.source, log_level=0, limits=limits)
        grammar.refuse(self.matcher.get_error())
        copy(self)(np.zeros(tokenizer.n_used))  # an error now, if nothing can begin the text

    def __copy__(self) -> "Constraint":
        other = object.__new__(Constraint)
        other.grammar, other.end_ids, other.matcher = self.grammar, self.end_ids, self.matcher.deep_copy()
        return other

    def __call__(self, logits: Array) -> Array:
        """The logits (V,), with -inf for each id that is not allowed next."""
        bits = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        self.grammar.refuse(self.matcher.get_error())
        allowed = np.unpackbits(bits, count=len(logits), bitorder="little").view(bool)
        if not self.matcher.is_accepting():  # a grammar may name an end id where more must follow
            allowed[[i for i in self.end_ids if allowed[i] and not self.ends_with(i)]] = False
        if not allowed.any():
            self.grammar.refuse(NO_TOKEN)
        return np.where(allowed, logits, -np.inf)

    def ends_with(self, end_id: int) -> bool:
        after = self.matcher.deep_copy()
        return bool(after.consume_token(end_id) and after.is_accepting())

    def take(self, token: int) -> bool:
        """Continue after this id. Whether the text is complete: only its end may follow."""
        self.matcher.consume_token(token)
        self.grammar.refuse(self.matcher.get_error())
        return bool(self.matcher.is_stopped())


class Vocabulary:
    """The tokens for llguidance: the bytes of each, and 0xff with its name for a special token."""

    is_tokenizer_wrapper, bos_token_id, special_token_ids = True, None, ()

    def __init__(self, tokenizer: Tokenizer):
        self.eos_token_id, self.encode_part = tokenizer.eos_ids[0], tokenizer.encode_part
        n, kinds = tokenizer.n_used, tokenizer.entries["tokenizer.ggml.token_type"].tolist()
        # llguidance never chooses a token without bytes. No text has the byte 0xff.
        self.tokens = [
            data if kind != UNUSED and data[:1] != b"\xff" else b""
            for data, kind in zip(tokenizer.meanings[:n], kinds, strict=False)
        ]
        self.ids = {data: i for i, data in enumerate(self.tokens)}
        self.longest = max(map(len, self.tokens))
        for i, name in special_tokens(tokenizer):
            self.tokens[i] = b"\xff" + name.encode()

    def __call__(self, text: str) -> list[int]:
        """The ids of a text that the grammar leaves no choice about, as `Tokenizer.encode` would have them.

        Where it adds a space or has no token for a character, the longest tokens follow one another.
        """
        ids, rest = self.encode_part(text, False), text.encode()
        if b"".join(self.tokens[i] for i in ids) == rest:
            return ids
        ids = []
        while longest := next((rest[:n] for n in range(self.longest, 0, -1) if rest[:n] in self.ids), b""):
            ids.append(self.ids[longest])
            rest = rest[len(longest) :]
        return ids


_TRIES: WeakKeyDictionary[Tokenizer, Any] = WeakKeyDictionary()


def trie(tokenizer: Tokenizer) -> Any:
    """llguidance's trie of a vocabulary. It is made once, in half a second for 128,256 tokens."""
    if tokenizer not in _TRIES:
        vocabulary, ends = Vocabulary(tokenizer), list(tokenizer.eos_ids)
        _TRIES[tokenizer] = library().LLTokenizer(vocabulary, eos_token=ends)
    return _TRIES[tokenizer]


def special_tokens(tokenizer: Tokenizer) -> Names:
    return tuple((i, name) for name, i in tokenizer.control_tokens.items() if i < tokenizer.n_used)


def schema_source(schema: Mapping[str, Any]) -> str:
    """A schema in llguidance's form. Options for llguidance in it are replaced: one ignores keywords.

    llguidance counts a property twice if its name comes twice, which `required` alone excludes. So a
    minProperties that relies on it is refused.
    """
    # Weak models fill a text with spaces where they may.
    schema = {**schema, "x-guidance": {"whitespace_flexible": False}}
    try:
        source = json.dumps({"grammars": [{"json_schema": schema}]}, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise GrammarError(f"json_schema cannot be written as JSON: {error}") from None
    values: list[Any] = [schema]
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            least, required = value.get("minProperties"), value.get("required")
            named = len(required) if isinstance(required, list | tuple) else 0
            if is_whole(least) and least > named + 1:
                found = f"minProperties is {least} and {named} properties are required"
                raise GrammarError(f"json_schema: {found}, others might repeat a name: require more of them")
            values += value.values()
        elif isinstance(value, list | tuple):
            values += value
    return source


NO_TOKEN = "NoExtensionBias"  # llguidance's name for it
KILLED = -9  # by the system: the limits of the process send other signals
TOO_LARGE = "it is too large, or nested too deeply, to be compiled"


@lru_cache(maxsize=64)
def fault_of(source: str, special: Names = (), size: int = 0) -> str:
    """llguidance's message on a grammar, or "". try_grammar.py compiles it, so this process stays alive."""
    library()
    asked = json.dumps([source, special, size])
    command = [sys.executable, "-X", "utf8", str(TRY_GRAMMAR)]
    try:
        tried = subprocess.run(
            command, input=asked, capture_output=True, encoding="utf-8", timeout=LONGEST_TRY
        )
    except subprocess.TimeoutExpired:
        return TOO_LARGE
    if tried.returncode == KILLED:
        raise ResourceLimitError("the process that compiles the grammar was killed: has the system memory?")
    if 0 < tried.returncode < CRASHES:
        return f"it was not compiled: {tried.stderr}"
    return TOO_LARGE if tried.returncode else tried.stdout


def readable(fault: str) -> str:
    """llguidance's message on one line, without the lines that repeat the grammar and mark a place in it."""
    if fault.startswith(NO_TOKEN):
        return "no token of the vocabulary can come next"
    lines = [line.strip() for line in fault.partition("<backtrace>")[0].splitlines()]
    text = " ".join(line for line in lines if not re.fullmatch(r"\d+ \|.*|\^*|<non-verbose/>", line))
    text = re.sub(r"^(?:at )?(\d+)\((\d+)\)", r"line \1, column \2", text)
    text = text.replace("Enable 'coerce_one_of' option to approximate oneOf with anyOf", "Use anyOf")
    return text if len(text) <= SHOWN else f"{text[: SHOWN // 2]} ... {text[-SHOWN // 2 :]}"


def library() -> Any:
    try:
        import llguidance
    except ImportError:
        wanted = 'pip install "numpy_llama[structured]"'
        raise UnsupportedError(f"structured output needs llguidance: {wanted}") from None
    return llguidance
