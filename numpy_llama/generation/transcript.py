"""From the ids of one generation to its text: whole characters, cut where a stop text begins."""

import time
from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import ParameterError, check_iterable, escape
from ..text.tokenizer import StreamDecoder, Tokenizer
from .sampling import Logprobs
from .speculative import Drafts


@dataclass(frozen=True)
class Completion:
    """The result of one request. `finish_reason` is "stop" (an end token or a stop text) or "length"."""

    text: str
    tokens: list[int]  # the new ones
    prompt_tokens: list[int]
    finish_reason: str
    prefill_seconds: float  # until the first new token
    decode_seconds: float  # for all tokens after the first
    logprobs: list[Logprobs] | None = None  # of each new token, if `top_logprobs` was given
    drafts: Drafts | None = None  # counts of a generation with the option `draft`
    score: float | None = None  # of a beam search: sum log p / n^length_penalty

    @property
    def decode_tokens_per_second(self) -> float:
        return max(len(self.tokens) - 1, 0) / self.decode_seconds if self.decode_seconds else 0.0


@dataclass(frozen=True)
class Piece:
    """A piece of the stream: whole characters, perhaps none. The last piece holds the completion."""

    text: str
    token: int | None = None
    completion: Completion | None = None
    logprobs: Logprobs | None = None  # of this token, if `top_logprobs` was given


def checked_texts(name: str, value: Iterable[str]) -> list[str]:
    """The argument `name` as a list. ParameterError unless it consists of texts that are not empty."""
    wanted = "a list of texts, none of them empty"
    check_iterable(name, value, wanted)
    texts = list(value)
    if isinstance(value, str) or not all(isinstance(s, str) and s for s in texts):
        raise ParameterError(f"{name} is {escape(value)}, it must be {wanted}")
    return texts


class StopTexts:
    """Cuts a stream of text at the stop text that is complete first; it may straddle any number of pieces."""

    def __init__(self, stop: Iterable[str] | None):
        self.stop, self.held, self.found = checked_texts("stop", () if stop is None else stop), "", False

    def push(self, text: str) -> str:
        """The text that is certain to come before any stop text; sets `found` at the first one."""
        self.held += text
        complete = [(at + len(s), at) for s in self.stop if (at := self.held.find(s)) >= 0]
        self.found = bool(complete)
        end = min(complete)[1] if complete else len(self.held) - self._possible_start()
        certain, self.held = self.held[:end], self.held[end:]
        return certain

    def _possible_start(self) -> int:
        """The length of the longest end of `held` that begins a stop text."""
        longest = max((len(s) - 1 for s in self.stop), default=0)
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(s.startswith(self.held[-n:]) for s in self.stop):
                return n
        return 0


class Transcript:
    """The text of one generation as its ids come: whole characters, cut where a stop text begins."""

    def __init__(self, tokenizer: Tokenizer, stop_texts: StopTexts, at_start: bool):
        self.decoder, self.stop_texts = StreamDecoder(tokenizer, at_start), stop_texts
        self.texts: list[str] = []
        self.tokens: list[int] = []
        self.began = time.perf_counter()

    @property
    def stopped(self) -> bool:
        return self.stop_texts.found

    def push(self, token: int) -> str:
        """The text that is certain after this id. Nothing follows when `stopped` is true."""
        self.last = time.perf_counter()
        if not self.tokens:
            self.first = self.last
        self.tokens.append(token)
        self.texts.append(self.stop_texts.push(self.decoder.push(token)))
        return self.texts[-1]

    def read(self, tokens: Iterable[int]) -> "Transcript":
        """Push each of these ids."""
        for token in tokens:
            self.push(token)
        return self

    def finish(
        self,
        prompt: list[int],
        reason: str,
        logprobs: list[Logprobs] | None = None,
        drafts: Drafts | None = None,
    ) -> Piece:
        """The text held back so far, with the completion. `reason`: why the ids ended."""
        text = ""
        if not self.stopped:
            text = self.stop_texts.push(self.decoder.flush())
            text += "" if self.stopped else self.stop_texts.held
        if not self.tokens:
            self.first = self.last = time.perf_counter()
        seconds = self.first - self.began, self.last - self.first
        reason = "stop" if self.stopped else reason
        logprobs = None if logprobs is None else logprobs[: len(self.tokens)]
        shown = "".join(self.texts) + text, self.tokens, prompt, reason, *seconds
        return Piece(text, None, Completion(*shown, logprobs, drafts))
