"""A model as lm-eval calls it: texts in, log-likelihoods and texts out.

What this file promises: each request has the ids that lm-eval's own model `hf` gives it, so the results are
its results up to rounding.

    boundary     encode(context + continuation)[len(encode(context)) :], by count. Spaces at the end of the
                 context belong to the continuation
    no context   BOS, or else EOS, stands before the continuation
    too long     (context + continuation)[-(max_length + 1) :][:-1] is computed: the first ids are left out
    until        a generation ends before these texts, the text of EOS among them, or after 256 tokens

BOS stands before a text if the tokenizer puts it there, and only once. The name of a control token is read as
that token only if the prompts come from the chat template, whose result is a text for the harness.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from ..errors import (
    ContextOverflowError,
    ParameterError,
    ResourceLimitError,
    TemplateError,
    UnsupportedError,
    escape,
)
from ..generation.batch import shared_prefix
from ..generation.scoring import Scorer
from ..llama import Llama
from .store import Store, key_of

GENERATED = 256  # tokens, if a task does not say how many
SIDE_BY_SIDE = 16  # prompts that are continued at once
SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "seed")
MARK = "THE ANSWER CONTINUES HERE "  # with the space it shows whether a template trims messages
Progress = Callable[[str, int, int], None]


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no annotations for mypy
    """`llama` for `lm_eval.evaluate`. progress(what, done, total) counts requests.

    chat: the prompts come from the chat template. After use, `requests` has the number of requests, `tokens`
    those of a pass for each, `computed` those that were computed, and `cut` the requests that were too long.
    """

    def __init__(
        self,
        llama: Llama,
        store: Store | None = None,
        chat: bool = False,
        progress: Progress = lambda what, done, total: None,
    ):
        super().__init__()
        self.llama, self.chat, self.progress = llama, chat, progress
        self.store = Store(llama.model) if store is None else store
        self.requests = self.tokens = self.computed = self.cut = 0

    @property
    def eot_token_id(self) -> int:
        if not (ends := self.llama.tokenizer.eos_ids):
            raise UnsupportedError("the vocabulary has no EOS, and lm-eval ends generations with it")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        bos = self.llama.tokenizer.bos_id
        return self.eot_token_id if bos is None else bos

    @property
    def max_length(self) -> int:
        return self.llama.max_context

    @property
    def tokenizer_name(self) -> str:
        return self.llama.tokenizer.source

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        tokenizer = self.llama.tokenizer
        bos = tokenizer.add_bos and add_special_tokens is not False
        return tokenizer.encode(string, bos=bos, special=self.chat)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The conversation as one text. Without a generation prompt it ends inside the last message."""
        if not add_generation_prompt:
            *before, last = chat_history
            chat_history = [*before, {**last, "content": last["content"] + MARK}]
        tokenizer, names = self.llama.tokenizer, self.llama.tokenizer.control_tokens
        ids = self.llama.encode_chat(chat_history, add_generation_prompt)
        text = "".join(
            "".join(map(tokenizer.piece, run)) if named else tokenizer.decode(run)
            for named, run in groupby(ids, key=lambda i: tokenizer.tokens[i] in names)
        )
        if add_generation_prompt:
            return text
        if (at := text.rfind(MARK.strip())) < 0:
            raise TemplateError(
                "the chat template leaves out the last message, which the answer is to continue"
            )
        return text[:at] if text[at:].startswith(MARK) else text[:at].rstrip()

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        return super().loglikelihood(requests, disable_tqdm=True)  # the bar is ours

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        pairs = []
        for texts, context, continuation in requests:
            if not continuation:  # the boundary by count can leave none
                raise ParameterError(f"the choice {escape(texts[1], 60)} adds no token to its context")
            pairs.append(self._within_context(context, continuation))
        keys = [key_of(*pair) for pair in pairs]
        self.requests += len(pairs)
        self.tokens += sum(len(context) + len(continuation) - 1 for context, continuation in pairs)
        left = {key: pair for key, pair in zip(keys, pairs, strict=True) if key not in self.store.results}
        names, known = list(left), len(set(keys)) - len(left)
        self.progress("log-likelihoods", known, known + len(left))
        if left:
            room = max(len(context) + len(continuation) - 1 for context, continuation in left.values())
            scorer = Scorer(self.llama.model, self.llama.new_session(room))
            for done, (i, score) in enumerate(scorer.each(list(left.values())), known + 1):
                self.store.add(names[i], [score.log_likelihood, score.is_greedy])
                self.progress("log-likelihoods", done, known + len(left))
            self.computed += scorer.computed
        return [tuple(self.store.results[key]) for key in keys]

    def _within_context(self, context: list[int], continuation: list[int]) -> tuple[list[int], list[int]]:
        """The request without the first ids, if all of them do not fit the context."""
        room, n = self.max_length + 1, len(continuation)
        if n >= room:
            raise ContextOverflowError(f"a continuation has {n} tokens, the context {self.max_length}")
        self.cut += len(context) + n > room
        whole = [*(context or [self.prefix_token_id]), *continuation][-room:]
        return whole[:-n], whole[-n:]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = True) -> list[float]:
        """The log-likelihood of whole texts, in windows of the context. No two predict the same token."""
        windows = [
            [make_disjoint_window(window) for window in self._windows(request.args[0])]
            for request in requests
        ]
        found = iter(self._loglikelihood_tokens([(None, *window) for one in windows for window in one]))
        return [sum(next(found)[0] for _ in one) for one in windows]

    def _windows(self, text: str) -> Iterable[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text)
        return get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        """Continue each context. Those with the same options and the same beginning run side by side."""
        texts: list[str] = [""] * len(requests)
        prompts, keys, waiting = [], [], dict[str, list[int]]()
        for i, request in enumerate(requests):
            context, kwargs = request.args
            options = self._options(kwargs)
            prompts.append(self._prompt(context, options["max_tokens"]))
            keys.append(key_of(prompts[i], options))
            if keys[i] in self.store.results:
                texts[i] = self.store.results[keys[i]]
            else:
                waiting.setdefault(json.dumps(options), []).append(i)
        done = len(requests) - sum(map(len, waiting.values()))
        self.requests += len(requests)
        for shown, group in waiting.items():
            options = json.loads(shown)
            group.sort(key=prompts.__getitem__)
            for begin in range(0, len(group), SIDE_BY_SIDE):
                chunk = group[begin : begin + SIDE_BY_SIDE]
                self.progress("generations", done, len(requests))
                for i, text in zip(chunk, self._continued([prompts[i] for i in chunk], options), strict=True):
                    texts[i] = text
                    if options["temperature"] == 0:  # samples of one prompt differ
                        self.store.add(keys[i], text)
                done += len(chunk)
        self.progress("generations", done, len(requests))
        return texts

    def _options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options of `Llama.generate` for those of a task."""
        given: dict[str, Any] = {**normalize_gen_kwargs(kwargs, GENERATED)}
        name = self.llama.tokenizer.piece(self.eot_token_id)
        options: dict[str, Any] = {
            "stop": [text for text in handle_stop_sequences(given.pop("until"), name) if text],
            "max_tokens": given.pop("max_gen_toks"),
            "temperature": 0.0,
        }
        del given["do_sample"]  # without it the temperature is 0 by now
        if given.get("num_beams") == 1:
            del given["num_beams"]
        options |= {name: given.pop(name) for name in SAMPLING if name in given}
        if given:
            raise UnsupportedError(
                f"a task asks for {', '.join(given)} in generation_kwargs, which does not exist here"
            )
        return options

    def _prompt(self, context: str, max_tokens: int) -> list[int]:
        """The ids of a context, without the first of them if the answer would have no room."""
        if (room := self.max_length - max_tokens) <= 0:
            wanted = f"the context has {self.max_length}: give a larger --max-seq-len if the model allows it"
            raise ContextOverflowError(f"a task asks for {max_tokens} new tokens, {wanted}")
        ids = self.tok_encode(context) or [self.prefix_token_id]
        self.cut += len(ids) > room
        return ids[-room:]

    def _continued(self, prompts: list[list[int]], options: dict[str, Any]) -> list[str]:
        """The texts behind some prompts, of as many at once as memory has room for."""
        try:
            made = self.llama.generate_batch(prompts, **options)
        except ResourceLimitError:
            if len(prompts) == 1:
                raise
            half = len(prompts) // 2
            return self._continued(prompts[:half], options) + self._continued(prompts[half:], options)
        self.tokens += (n := sum(len(one.prompt_tokens) + len(one.tokens) for one in made))
        self.computed += n - (len(prompts) - 1) * shared_prefix(prompts)
        return [one.text for one in made]
