"""The Python interface: a model, its tokenizer and its chat format as one object for text.

llama = load("smollm2-135m-instruct")
llama.generate("Once upon a time", max_tokens=64).text
llama.chat([{"role": "user", "content": "Why is the sky blue?"}]).text
"""

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, cast

import numpy as np
from numpy.typing import DTypeLike

from . import checkpoint, parallel
from .backend import Progress, build, check_options
from .checkpoint.adapters import locate_adapters, read_adapters
from .checkpoint.download import DEFAULT_MODEL, checked_progress, locate
from .checkpoint.memory import available_memory, gib, memory_plan
from .checkpoint.session_file import load_session, save_session
from .config import LIMITS, ModelArgs
from .errors import (
    ParameterError,
    ResourceLimitError,
    TemplateError,
    UnsupportedError,
    check_callable,
    check_has,
    check_iterable,
    check_kind,
    check_whole,
    escape,
    is_whole,
)
from .generation.batch import generate_batch, naming, sessions_for, shared_prefix
from .generation.beam import Beam, BeamSearch, check_no_chance
from .generation.generate import Request, check_room, decode, generate_request, prefill
from .generation.sampling import Sampler
from .generation.scoring import Score, Scorer
from .generation.session import Session
from .generation.speculative import (
    Drafter,
    DraftModel,
    Speculation,
    check_same_vocabulary,
    relative_cost,
)
from .generation.structured import Constraint, Grammar
from .generation.transcript import Completion, Piece, StopTexts, Transcript, checked_texts
from .model import Transformer
from .rope import DynamicScaling
from .text.chat import ChatFormat, Extras
from .text.tokenizer import Tokenizer
from .window import positions_stored

Message = Mapping[str, Any]
DRY_BREAKERS = "\n", ":", '"', "*"  # llama.cpp's
NOT_IN_A_BATCH = "session", "on_prefill", "draft"  # options of `stream`
NOT_WITH_BEAMS = "session", "draft", "top_logprobs", "json_schema", "regex", "grammar"

# This thread's replacements of models, with the hooks of inspect/tracing.py: the model -> the hooked one.
STAND_INS: ContextVar[Mapping[Transformer, Transformer]]
STAND_INS = ContextVar("stand_ins", default=MappingProxyType({}))


def _silent(done: int, total: int) -> None:
    """No progress is shown."""


def _nothing() -> None:
    """The check of weights that come from no file."""


class Llama:
    """A model with its tokenizer and chat format. Use never changes it: a `Session` holds a conversation.

    `sampling_defaults` are the options of `Sampler` that the model's files recommend. Only a conversation on
    the command line uses them by itself; `llama.chat(messages, **llama.sampling_defaults)` does too.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        chat_format: ChatFormat | None = None,
        max_context: int | None = None,
        check_unchanged: Callable[[], None] = _nothing,
        sampling_defaults: Mapping[str, Any] | None = None,
    ):
        """`max_context`: the positions that memory has room for, if the model allows more.

        `check_unchanged` is called before each use, and raises an error if the files of the weights were
        changed.
        """
        check_has("tokenizer", tokenizer, "vocab_size", "a Tokenizer")
        check_callable("check_unchanged", check_unchanged)
        if max_context is not None:
            check_whole("max_context", max_context, 0, sys.maxsize)
        kinds = Mapping, type(None)
        check_kind("sampling_defaults", sampling_defaults, kinds, "a mapping, or be left out")
        self.check_unchanged, self.sampling_defaults = check_unchanged, dict(sampling_defaults or {})
        self.tokenizer, self.chat_format, self._room_in_memory = tokenizer, chat_format, max_context
        self.model = model

    @property
    def model(self) -> Transformer:
        """The model. In the thread of a block of `trace` or `edit`, it is the model with hooks."""
        return STAND_INS.get().get(self._model, self._model)

    @model.setter
    def model(self, model: Transformer) -> None:
        check_has("model", model, "args", "a Transformer")
        self.tokenizer.check_rows(model.args.vocab_size)
        self._model, most = model, model.args.max_seq_len
        self.max_context = min(most, self._room_in_memory or most)

    def new_session(self, max_seq_len: int | None = None) -> Session:
        """A session for one conversation. Its context is the model's, or as much as fits into memory."""
        if max_seq_len is not None:
            check_whole("max_seq_len", max_seq_len, 1, self.model.args.max_seq_len)
        if max_seq_len is not None and self.max_context < max_seq_len:
            raise ResourceLimitError(
                f"a context of {max_seq_len} tokens was asked for, memory has room for {self.max_context}"
            )
        return Session(self.model, self.max_context if max_seq_len is None else max_seq_len)

    def new_drafter(self, llama: "Llama") -> DraftModel:
        """A drafter for the option `draft` of this model: a smaller one with the same vocabulary.

        It keeps a session of its own, for one conversation. A MismatchError names the first id that differs.
        """
        check_kind("llama", llama, Llama, "a Llama")
        llama.check_unchanged()
        ids = check_same_vocabulary(llama.tokenizer, self.tokenizer)
        limits = {"stop_ids": self.tokenizer.eos_ids, "vocab_size": ids}
        return DraftModel(
            llama.model, llama.new_session(), relative_cost(llama.model.args, self.model.args), **limits
        )

    def save_session(self, session: Session, path: str | os.PathLike[str]) -> None:
        """Write a session to a file, which is replaced when the new one is whole. See `load_session`."""
        check_kind("session", session, Session, "a Session")
        self._session_file(save_session, path, session)

    def load_session(self, path: str | os.PathLike[str], max_seq_len: int | None = None) -> Session:
        """The session in a file of `save_session`, with the same bits. `max_seq_len` as in `new_session`.

        MismatchError unless the weights, the tokenizer and the cache are those with which it was saved.
        """
        session = self.new_session(max_seq_len)
        self._session_file(load_session, path, session)
        return session

    def _session_file(self, run: Callable[..., None], path: str | os.PathLike[str], session: Session) -> None:
        if not is_file_name(path):
            raise ParameterError(f"path is {escape(path, 60)}, it must be the path of a file")
        if parallel.launched() > 1:
            raise UnsupportedError(
                "a session on several ranks has no file, because each rank has a part of its cache: "
                "start without mpiexec"
            )
        self.check_unchanged()
        run(Path(path), session, self.model, self.tokenizer)

    def generate(self, prompt: str | Sequence[int], **options: Any) -> Completion:
        """Continue a text, or ids. The options are those of `stream`."""
        return finish(self.stream(prompt, **options))

    def chat(self, messages: Sequence[Message], **options: Any) -> Completion:
        """The assistant's next message in a conversation. The options are those of `stream_chat`."""
        return finish(self.stream_chat(messages, **options))

    def stream(
        self, prompt: str | Sequence[int], *, special: bool = False, **options: Any
    ) -> Iterator[Piece]:
        """Like `generate`, one piece at a time.

        special: names of control tokens in the prompt become those tokens, as in `Tokenizer.encode`.
        max_tokens: default None, until an end token or the end of the context. stop: texts to end before.
        session: a `Session` to continue. on_prefill(done, total): called as the prompt is computed.
        draft: `Lookup()`, or `new_drafter(...)`: the same text in fewer passes, if drafted ids are accepted.
        One of json_schema, regex, grammar: the text follows it, but max_tokens may cut it. They are a JSON
        schema as a dict, a regular expression for the whole text, a grammar in llguidance's form of Lark.
        top_logprobs: give `logprobs` to pieces and completion: the log probability of each new token, and the
        N likeliest ids with theirs. They are the model's own, before any step of sampling.
        The options of `Sampler` too: temperature, top_k, top_p, min_p, repetition_penalty, seed, typical_p,
        top_n_sigma, xtc_probability, xtc_threshold, mirostat_tau, mirostat_eta, presence_penalty,
        frequency_penalty, penalty_window, dry_multiplier, dry_base, dry_allowed_length. logit_bias: a mapping
        from ids, or from texts that are one token, to numbers that are added to their logits; -inf bans one.
        dry_breakers: texts; DRY's repeats never contain a token with one of them in it.
        """
        return self._stream(self._encode(prompt, special), at_start=False, **options)

    def stream_chat(
        self,
        messages: Sequence[Message],
        *,
        tools: Extras = None,
        documents: Extras = None,
        **options: Any,
    ) -> Iterator[Piece]:
        """Like `chat`, one piece at a time. The options are those of `stream`, and those of `encode_chat`."""
        ids = self.encode_chat(messages, tools=tools, documents=documents)
        return self._stream(ids, at_start=True, **options)

    def generate_batch(self, prompts: Sequence[str | Sequence[int]], **options: Any) -> list[Completion]:
        """Continue several texts, or lists of ids, at once: faster than one after another.

        The options are those of `stream`, without `session`, `on_prefill` and `draft`. What all prompts begin
        with, such as a system message, is computed and stored once. Each prompt is continued as if it were
        alone, with its own random numbers from the same seed. So equal prompts get equal texts. The kernels
        give each prompt the same bits as alone, but not with F16, BF16 and FP8 weights: more than eight
        tokens at once round them. That changes the logits a little, and a text may differ where two tokens
        are nearly as likely.
        """
        check_iterable("prompts", prompts, "a list of texts or of lists of ids")
        if isinstance(prompts, str | bytes):
            raise ParameterError("the prompts are one text, they must be a list of texts or of lists of ids")
        return self._batch(prompts, self._encode, at_start=False, **options)

    def chat_batch(self, conversations: Sequence[Sequence[Message]], **options: Any) -> list[Completion]:
        """The assistant's next message in each of several conversations. See `generate_batch`."""
        check_iterable("conversations", conversations, "a list of lists of messages")
        return self._batch(conversations, self.encode_chat, at_start=True, **options)

    def beam_search(
        self,
        prompt: str | Sequence[int],
        *,
        special: bool = False,
        beams: int = 4,
        length_penalty: float = 1.0,
        early_stopping: bool | str = False,
        num_return_sequences: int = 1,
        max_tokens: int | None = None,
        stop: Iterable[str] | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        **sampling: Any,
    ) -> list[Completion]:
        """The likeliest continuations of a text, or of ids, as whole texts. The best is the first.

        Completion.score is sum log p / n^length_penalty; n counts the end token. The ids and scores are those
        of transformers' `generate(num_beams=beams)`. early_stopping: True, False or "never", as in
        `BeamSearch`. A beam that completes a text of `stop` is finished; its score counts the tokens of that
        text. A repetition penalty changes log p. temperature and seed are refused: nothing is random. Each
        completion has the seconds of the whole search.
        """
        search = BeamSearch(beams, length_penalty, early_stopping, num_return_sequences)
        sampling = without(
            NOT_WITH_BEAMS, sampling, "a beam search", "leave it out, or generate without beams"
        )
        options, stop = self._request_options(max_tokens, **sampling), StopTexts(stop).stop
        check_no_chance(options["sampler"].temperature, options["sampler"].seed)
        on_prefill = _silent if on_prefill is None else on_prefill
        check_callable("on_prefill", on_prefill)
        ids = self._encode(prompt, special)
        room = self._room(ids, max_tokens)
        self._check_memory([room, *[room - len(ids)] * (beams - 1)])  # the prompt is stored once
        request = Request(ids, self.new_session(room), **options)

        def transcript(new: list[int]) -> Transcript:
            return Transcript(self.tokenizer, StopTexts(stop), at_start=False).read(new)

        def completion(beam: Beam) -> Completion:
            tokens = [token for token in beam.ids if token not in request.stop_ids]
            last = transcript(tokens).finish(ids, "length" if tokens == beam.ids else "stop")
            one = cast(Completion, last.completion)
            return replace(one, score=beam.score, prefill_seconds=first - began, decode_seconds=end - first)

        self.check_unchanged()
        began = time.perf_counter()
        logits = prefill(self.model, request, on_prefill)
        first = time.perf_counter()
        found = search(self.model, request, logits, lambda new: bool(stop) and transcript(new).stopped)
        end = time.perf_counter()
        return [completion(beam) for beam in found]

    def log_likelihoods(
        self, context: str | Sequence[int], continuations: Sequence[str | Sequence[int]]
    ) -> list[Score]:
        """log p of each continuation after the context, and whether it is what temperature 0 would choose.

        A continuation in text has the ids that context and continuation have together, without as many as
        the context has alone: so lm-evaluation-harness cuts them. The context is computed once.
        """
        check_iterable("continuations", continuations, "a list of texts or of lists of ids")
        if isinstance(continuations, str | bytes):
            raise ParameterError("the continuations are one text, they must be a list of texts or of ids")
        ids = self._encode(context)
        requests = [(ids, self._encode_after(context, ids, one)) for one in continuations]
        room = max([1, *(len(ids) + len(one) for _, one in requests)])
        self.check_unchanged()
        return Scorer(self.model, self.new_session(min(room, self.max_context))).score(requests)

    def _encode_after(
        self, context: str | Sequence[int], ids: list[int], continuation: str | Sequence[int]
    ) -> list[int]:
        """The ids of a continuation of a context that has those ids."""
        if not isinstance(continuation, str):
            return self._encode(continuation)
        if not isinstance(context, str):
            return self.tokenizer.encode(continuation)
        return self._encode(context + continuation)[len(ids) :]

    def encode_chat(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Extras = None,
        documents: Extras = None,
    ) -> list[int]:
        """The ids of a conversation in the model's own format. Text in it never becomes a control token.

        tools, documents: lists for the model's template, as transformers' `apply_chat_template` takes them.
        Then a message may have further keys, such as tool_calls.
        """
        if self.chat_format is None:
            raise TemplateError("this model has no chat template; `generate` continues plain text with it")
        extras = {name: values for name, values in (("tools", tools), ("documents", documents)) if values}
        return self.chat_format.encode(self.tokenizer, messages, add_generation_prompt, **extras)

    def _encode(self, prompt: str | Sequence[int], special: bool = False) -> list[int]:
        """The ids of a prompt. A list of ids is only checked."""
        is_array = isinstance(prompt, np.ndarray) and prompt.ndim > 0
        if not (is_array or isinstance(prompt, str | bytes | Sequence)):
            found = escape(prompt, 60)
            raise ParameterError(f"the prompt is {found}, it must be a text or a list of token ids")
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, bos=self.tokenizer.add_bos, special=special)
        if isinstance(prompt, bytes) or not all(map(is_whole, prompt)):
            raise ParameterError("the prompt must be a text or a list of token ids")
        if wrong := [i for i in prompt if not 0 <= i < self.model.args.vocab_size]:
            last = self.model.args.vocab_size - 1
            raise ParameterError(f"token id {wrong[0]} lies outside the vocabulary, 0..{last}")
        return [int(i) for i in prompt]

    def _room(self, prompt: list[int], max_tokens: int | None) -> int:
        """The positions for this prompt and its answer."""
        if max_tokens is None:
            return self.max_context
        if not is_whole(max_tokens):
            raise ParameterError(f"max_tokens is {max_tokens!r}, it must be a whole number")
        if max_tokens < 0:
            raise ParameterError(f"max_tokens is {max_tokens!r}, it must be 0 or above")
        return min(self.max_context, len(prompt) + max(max_tokens, 1))

    def new_sampler(
        self, logit_bias: Any = None, dry_breakers: Iterable[str] = DRY_BREAKERS, **sampling: Any
    ) -> Sampler:
        """The `Sampler` of these options of `stream`: texts of tokens become ids of this vocabulary."""
        if isinstance(logit_bias, Mapping):
            logit_bias = {self._one_token(key): value for key, value in logit_bias.items()}
        breakers = [text.encode() for text in checked_texts("dry_breakers", dry_breakers)]
        ids = frozenset[int]()
        if sampling.get("dry_multiplier"):
            tokens = enumerate(self.tokenizer.meanings[: self.tokenizer.n_used])
            ids = frozenset(i for i, data in tokens if any(text in data for text in breakers))
        return Sampler(logit_bias=logit_bias, dry_breakers=ids, **sampling)

    def _one_token(self, key: object) -> object:
        """The id of a key of `logit_bias`: an id, or a text that is one token."""
        if isinstance(key, str):
            ids = self.tokenizer.encode(key)
            if len(ids) != 1:
                found = f"{escape(key, 60)} is {len(ids)} tokens: {', '.join(map(str, ids[:9]))}"
                raise ParameterError(f"logit_bias: {found}; a text must be one token, or give ids")
            return ids[0]
        if is_whole(key) and key >= self.tokenizer.n_used:
            raise ParameterError(f"logit_bias has id {key}, the last one is {self.tokenizer.n_used - 1}")
        return key

    def _request_options(
        self,
        max_tokens: int | None = None,
        top_logprobs: int | None = None,
        json_schema: Mapping[str, Any] | None = None,
        regex: str | None = None,
        grammar: str | None = None,
        **sampling: Any,
    ) -> dict[str, Any]:
        """The options of `Request` for those of `stream`."""
        ends, n_used = self.tokenizer.eos_ids, self.tokenizer.n_used
        options = {"sampler": self.new_sampler(**sampling), "max_tokens": max_tokens, "stop_ids": ends}
        if top_logprobs is not None:
            check_whole("top_logprobs", top_logprobs, 0, n_used)
        constraint = None
        if any(rule is not None for rule in (json_schema, regex, grammar)):
            constraint = Constraint(Grammar(json_schema, regex, grammar), self.tokenizer)
        return options | {"vocab_size": n_used, "top_logprobs": top_logprobs, "constraint": constraint}

    def _stream(
        self,
        prompt: list[int],
        *,
        at_start: bool,
        stop: Iterable[str] | None = None,
        session: Session | None = None,
        on_prefill: Callable[[int, int], None] | None = None,
        draft: Drafter | None = None,
        **options: Any,
    ) -> Iterator[Piece]:
        on_prefill = _silent if on_prefill is None else on_prefill
        check_callable("on_prefill", on_prefill)
        check_kind("session", session, (Session, type(None)), "a Session, or be left out")
        check_kind("draft", draft, (Drafter, type(None)), "Lookup() or what new_drafter() makes")
        stop_texts, options = StopTexts(stop), self._request_options(**options)
        room = self._room(prompt, options["max_tokens"])
        session = self.new_session(room) if session is None else session
        return self._pieces(prompt, session, stop_texts, at_start, options, on_prefill, draft)

    def _pieces(
        self,
        prompt: list[int],
        session: Session,
        stop_texts: StopTexts,
        at_start: bool,
        options: dict[str, Any],
        on_prefill: Callable[[int, int], None],
        draft: Drafter | None,
    ) -> Iterator[Piece]:
        self.check_unchanged()
        transcript = self._transcript(stop_texts, at_start, options)
        request = Request(prompt, session, **options)
        speculation = None if draft is None else Speculation(draft)
        ids = generate_request(self.model, request, on_prefill, speculation or decode)
        reason = "stop"
        while not transcript.stopped:
            try:
                token = next(ids)
            except StopIteration as end:
                reason = end.value
                break
            n, text = len(transcript.tokens), transcript.push(token)
            yield Piece(text, token, None, request.logprobs[n] if request.logprobs else None)
        drafts = None if speculation is None else speculation.drafts
        yield transcript.finish(prompt, reason, request.logprobs, drafts)

    def _batch(
        self,
        prompts: Iterable[Any],
        encode: Callable[..., list[int]],
        *,
        at_start: bool,
        stop: Iterable[str] | None = None,
        **options: Any,
    ) -> list[Completion]:
        options = without(NOT_IN_A_BATCH, options, "a batch", "give each prompt to `generate` by itself")
        stop, options = StopTexts(stop).stop, self._request_options(**options)
        encoded, rooms = [], []
        for i, prompt in enumerate(prompts):
            with naming(i):
                encoded.append(encode(prompt))
                rooms.append(self._room(encoded[i], options["max_tokens"]))
                check_room(encoded[i], rooms[i])
        n = shared_prefix(encoded)
        self._check_memory([*rooms[:1], *(room - n for room in rooms[1:])])
        self.check_unchanged()
        sessions = sessions_for(self.model, encoded, rooms)
        sequences = [Request(*one, **options) for one in zip(encoded, sessions, strict=True)]
        transcripts = [self._transcript(StopTexts(stop), at_start, options) for _ in encoded]
        for i, token in generate_batch(self.model, sequences):
            transcripts[i].push(token)
            if transcripts[i].stopped:
                sequences[i].stop()
        ended = zip(transcripts, encoded, sequences, strict=True)
        return [cast(Completion, t.finish(prompt, s.reason, s.logprobs).completion) for t, prompt, s in ended]

    def _transcript(self, stop_texts: StopTexts, at_start: bool, options: Mapping[str, Any]) -> Transcript:
        """With a constraint the text has every byte of its tokens: SentencePiece's first space stays too."""
        return Transcript(self.tokenizer, stop_texts, at_start and options["constraint"] is None)

    def _check_memory(self, rooms: Sequence[int]) -> None:
        """ResourceLimitError unless there is memory for KV caches of these sizes in positions."""
        one = self.model.new_cache(batch=1, max_seq_len=1)
        positions = sum(positions_stored(self.model.args, room) for room in rooms)
        nbytes, available = positions * (one.k.nbytes + one.v.nbytes), available_memory()
        if nbytes > available:
            raise ResourceLimitError(
                f"{len(rooms)} sequences of up to {max(rooms)} tokens need {gib(nbytes)} of KV cache, "
                f"{gib(available)} are available; set a lower max_tokens, or take fewer at once"
            )


def without(names: Iterable[str], options: dict[str, Any], what: str, way_out: str) -> dict[str, Any]:
    """The options but those with these names, which must be None."""
    if found := next((name for name in names if options.pop(name, None) is not None), None):
        raise ParameterError(f"{what} takes no `{found}`: {way_out}")
    return options


def is_file_name(path: Any) -> bool:
    """Whether a file can have this path."""
    try:
        return b"\0" not in os.fsencode(path) and Path(path).name != ""
    except (TypeError, UnicodeEncodeError):
        return False


def finish(stream: Iterable[Piece]) -> Completion:
    """Run a stream to its end."""
    *_, last = stream
    return cast(Completion, last.completion)


def load(
    model: str | os.PathLike[str] = DEFAULT_MODEL,
    dtype: DTypeLike | None = None,
    backend: str = "c",
    threads: int | None = None,
    progress: Progress | None = None,
    exact: bool = False,
    max_seq_len: int | None = None,
    activation_bits: int = 8,
    cache_dtype: str | None = None,
    adapter: str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | None = None,
    shares: Sequence[float] | str | None = None,
) -> Llama:
    """Load a model from a file or a folder, or by a name of `pull` or hf:OWNER/REPO, fetched on first use.

    dtype: None keeps the weights as they are stored. numpy.float32, or numpy.float64 with backend "numpy",
    expands them. backend: "c", or "numpy" for the readable path. threads: of the C kernels; default all CPUs.
    activation_bits: the C kernels multiply block formats with activations of 8 bits, or of 15, which is more
    accurate and slower. cache_dtype: "q8" keeps keys and values in 8 bits, about half the memory of the C
    kernels' float16. exact: they use unrounded float32 activations and a float32 cache, for reference work.
    The NumPy backend is always exact, except for a cache in "q8". max_seq_len: a context smaller than the
    file's; with a dynamic RoPE scaling it may be larger. Its size chooses between LongRoPE's two sets of
    angles (`numpy-llama info` prints which). adapter: a LoRA adapter that runs beside the model, a path or
    hf:OWNER/REPO, or a list whose updates are added; "PATH:0.5" takes half of one. progress(what, done,
    total): called with counts of bytes. A model that does not fit into memory is a ResourceLimitError before
    loading begins.

    Under mpiexec the model is cut for all processes, evenly or by `shares`, such as [3, 1], or "auto": by
    the measured speed of each memory. All processes but rank 0 serve, and do not return from here.
    """
    check_options(dtype, backend, exact, cache_dtype)
    progress, ranks = checked_progress(progress), parallel.ranks()
    if ranks is None and shares is not None:
        raise ParameterError("shares are for a model on several ranks: start with mpiexec")
    opened = checkpoint.open_checkpoint(locate(model, progress))
    args, weights = opened.args, opened.weights()
    about = opened.check_unchanged, opened.sampling_defaults()
    if max_seq_len is not None:
        args = with_context(args, max_seq_len, opened.path)
    if ranks is not None:
        tokenizer = opened.tokenizer()
        located = locate_adapters(adapter, progress)
        how = dtype, backend, threads, exact, activation_bits, cache_dtype, located
        transformer, room = parallel.load(ranks, opened, args, shares, how, progress)
        return Llama(transformer, tokenizer, opened.chat_format(), room, *about)
    adapters = read_adapters(adapter, args, weights, progress)
    plan = memory_plan(args, weights, backend, dtype, exact, cache_dtype).beside(adapters)
    available = available_memory(plan.mapped)
    plan.check(available, opened.path)
    tokenizer = opened.tokenizer()
    opened.watch()
    options = exact, activation_bits, cache_dtype, adapters
    transformer = build(args, weights, dtype, backend, threads, progress, *options)
    room = plan.context_within(available)
    return Llama(transformer, tokenizer, opened.chat_format(), room, *about)


def with_context(args: ModelArgs, max_seq_len: int, source: Path) -> ModelArgs:
    """The same model with a smaller context, or with any context if its RoPE scaling is dynamic."""
    most, scaling = args.max_seq_len, args.rope_scaling
    if isinstance(scaling, DynamicScaling) and most >= scaling.original_max_seq_len:
        most = LIMITS["max_seq_len"]
    if not is_whole(max_seq_len) or not 0 < max_seq_len <= most:
        found = escape(max_seq_len, 60)
        raise ParameterError(f"max_seq_len is {found}, {source} allows a whole number from 1 to {most}")
    return replace(args, max_seq_len=int(max_seq_len))


def load_tokenizer(path: str | os.PathLike[str]) -> Tokenizer:
    """Only the tokenizer, from a model, or from a file or folder without weights."""
    return checkpoint.load_tokenizer(locate(path, wanted="tokenizer"))
