"""A conversation to token ids: Meta's formats for Llama 2 and 3 as code, all others as Jinja templates.

    messages  --template-->  one string  --cut at its control tokens-->  ids

What this file promises: the content of a message is ordinary text. It cannot end a turn, begin one, or take
another role. Llama 2 marks turns by plain text, so `Llama2Chat` refuses messages that have the marks. A
template may use plain-text marks too, but does not declare them, so nothing can be refused there.
A template is code that came with a file: it runs in the sandbox of sandbox.py.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from itertools import islice
from traceback import walk_tb
from types import CodeType
from typing import Any, Protocol

import jinja2

from ..errors import MismatchError, ParameterError, TemplateError, TextError, check_kind, escape
from .added import Parts
from .chat_formats import TEMPLATES
from .sandbox import MADE_PER_CHARACTER, MAX_MADE, MESSAGE_OVERHEAD, Sandbox
from .tokenizer import Tokenizer, check_text

MAX_DEPTH = 64  # of lists and objects in a message
ROLES = ("system", "user", "assistant", "tool")
Messages = Sequence[Mapping[str, Any]]
Extras = Sequence[Mapping[str, Any]] | None  # tools or documents, as JSON has them


class ChatFormat(Protocol):
    """The form of a conversation that a model was trained on."""

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Extras = None,
        documents: Extras = None,
    ) -> list[int]: ...


class Llama2Chat:
    """Meta's format for Llama 2 and Code Llama (llama/generation.py, chat_completion): questions in brackets.

        <s>[INST] <<SYS>>\n system \n<</SYS>>\n\n question [/INST] answer </s><s>[INST] question [/INST]

    The tags are plain text, so a message with a tag could take another role. Meta's program refuses such
    messages, and so does this class.
    """

    TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Extras = None,
        documents: Extras = None,
    ) -> list[int]:
        check_messages(messages)
        _check_no_extras(tools, documents)
        bos, eos = _control_ids(tokenizer, "<s>", "</s>")
        _check_marks(messages, self.TAGS)
        roles = [message["role"] for message in messages]
        turns = [message["content"] for message in messages]
        with_system = roles[0] == "system"
        wanted = ["system"] * with_system + ["user", "assistant"] * len(roles)
        by_user = roles[-1] == "user" or (roles[-1] == "assistant" and not add_generation_prompt)
        if roles != wanted[: len(roles)] or not by_user:
            rule = "user and assistant in turn, the last from user, perhaps after one from system"
            raise ParameterError(f"the roles are {', '.join(roles)}; Llama 2 wants {rule}")
        if with_system:
            turns[:2] = [f"<<SYS>>\n{turns[0]}\n<</SYS>>\n\n{turns[1]}"]

        ids: list[int] = []
        for i in range(0, len(turns), 2):
            question, *answer = (turn.strip() for turn in turns[i : i + 2])
            text = f"[INST] {question} [/INST]" + "".join(f" {a} " for a in answer)
            ids += [bos, *tokenizer.encode(text), *[eos for _ in answer]]
        return ids


class Llama3Chat:
    """Meta's format since Llama 3 (llama3/tokenizer.py, ChatFormat): each message under a header.

        <|begin_of_text|>  <|start_header_id|> role <|end_header_id|> \n\n content <|eot_id|>  ...

    Llama 3, 3.1, 3.2 and 3.3 share it. The templates of models from 3.1 on also write dates and instructions
    for tools into a system message. The models work without them.
    """

    CONTROL = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Extras = None,
        documents: Extras = None,
    ) -> list[int]:
        check_messages(messages)
        _check_no_extras(tools, documents)
        bos, start, end, eot = _control_ids(tokenizer, *self.CONTROL)

        def header(role: str) -> list[int]:
            return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

        ids = [bos]
        for message in messages:
            role = "ipython" if message["role"] == "tool" else message["role"]  # Meta's name for it
            ids += [*header(role), *tokenizer.encode(message["content"].strip()), eot]
        return ids + header("assistant") if add_generation_prompt else ids


def format_for(tokenizer: Tokenizer) -> ChatFormat | None:
    """The format of Meta's chat models with this vocabulary: for models that have no template.

    None if the vocabulary is neither Llama 3's nor Llama 2's: ChatML and others come as templates.
    """
    names = tokenizer.control_tokens.keys()
    if names >= {*Llama3Chat.CONTROL}:
        return CHAT_FORMATS["llama3"]
    others = {"[INST]", "<|im_start|>"}  # Mistral's since v0.3, and ChatML's
    if tokenizer.add_space and names >= {"<s>", "</s>"} and not names & others:
        return CHAT_FORMATS["llama2"]
    return None


def _control_ids(tokenizer: Tokenizer, *names: str) -> list[int]:
    if missing := [name for name in names if name not in tokenizer.control_tokens]:
        raise MismatchError(f"the chat format needs the control token {missing[0]}, which this model lacks")
    return [tokenizer.control_tokens[name] for name in names]


class ChatTemplate:
    """A Jinja template, run as Hugging Face's `apply_chat_template` runs it.

    tool_use: the template that takes its place when tools are given, an empty list too.
    """

    def __init__(self, source: str, tool_use: str | None = None):
        check_kind("the chat template", source, str, "a text")
        self.source = source
        self.tool_use = None if tool_use is None else ChatTemplate(tool_use)

    @cached_property
    def code(self) -> CodeType:
        return Sandbox().compiled(self.source)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "code"}  # which no pickle takes

    def render(
        self,
        messages: Messages,
        tokenizer: Tokenizer,
        add_generation_prompt: bool = True,
        tools: Extras = None,
        documents: Extras = None,
        ascii: str = "",
    ) -> str:
        if tools is not None and self.tool_use:
            return self.tool_use.render(messages, tokenizer, add_generation_prompt, tools, documents, ascii)
        context: dict[str, Any] = {"bos_token": "", "eos_token": "", **tokenizer.named_tokens}
        context |= {"tools": tools, "documents": documents}
        context |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        size = _size([messages, tools, documents])
        try:
            code = self.code
            return Sandbox(MAX_MADE + MADE_PER_CHARACTER * size, ascii).run(code, context)
        except Exception as error:  # a template may raise anything, RecursionError and MemoryError too
            files = {frame.f_code.co_filename: line for frame, line in walk_tb(error.__traceback__)}
            line = getattr(error, "lineno", files.get("<template>", "unknown"))
            what = escape(str(error) or type(error).__name__)
            way_out = "; --chat-format has the common formats, or takes a file of a template"
            way_out = "" if type(error) is jinja2.TemplateError else way_out  # the template's own words
            raise TemplateError(f"the model's chat template, line {line}: {what}{way_out}") from None

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Extras = None,
        documents: Extras = None,
    ) -> list[int]:
        """The ids of a conversation.

        BOS stands where the template writes it, as in Hugging Face's. If the template writes none, and the
        tokenizer adds BOS to a text, BOS comes first, once.

        Before the template runs, each control token's name in a message is replaced by one unused character.
        So the template trims and searches real text, and every name in its result is its own. The result is
        cut at these names, the messages' names are put back, and the text between is encoded as text.
        """
        check_messages(messages, further=True)
        check_extras("tools", tools)
        check_extras("documents", documents)
        messages = [{key: value for key, value in m.items() if value is not None} for m in messages]
        control = tokenizer.control_tokens
        names = tokenizer.control_names
        source = self.source if tools is None or not self.tool_use else self.tool_use.source
        used = set(source).union(*control, *_texts([messages, tools, documents]))
        private_use = map(chr, range(0xF0000, 0x110000))
        unused = (c for c in private_use if c not in used)
        spare = list(islice(unused, len(control) + 1))
        if len(spare) <= len(control):
            raise TextError("the messages leave no private-use character unused")
        stand_in, blank = dict(zip(control, spare, strict=False)), spare[-1]
        original = {ord(character): name for name, character in stand_in.items()}

        def hidden(text: str) -> str:
            return names.sub(lambda match: stand_in[match[0]], text)

        def blanked(text: str) -> str:
            return re.sub(r"\S", blank, text)

        def parts(change: Callable[[str], str]) -> Parts:
            kept = _changed([messages, tools, documents], hidden)
            for message in kept[0]:
                if "content" in message:
                    message["content"] = change(message["content"])
            shown = kept[0], tokenizer, add_generation_prompt, kept[1], _changed(kept[2], change)
            return tokenizer.cut(self.render(*shown, ascii="".join(spare)), special=True)

        def made(parts: Parts) -> Parts:
            return [part for part in parts if part in tokenizer.added.control]

        found = parts(hidden)
        # A template could still join the parts of a name, or turn <|IM_END|> to lower case. Then the names
        # differ from those of the same messages with blanked text.
        if made(found) != made(parts(blanked)):
            raise TemplateError("the model's chat template makes control tokens out of the text of a message")
        ids = tokenizer.encode_parts([p if isinstance(p, int) else p.translate(original) for p in found])
        if tokenizer.add_bos and tokenizer.bos_id not in ids:
            ids = tokenizer.encode("", bos=True) + ids
        return ids


class NamedFormat(ChatTemplate):
    """A common format. A message with one of its plain-text marks could take another role, and is refused."""

    def __init__(self, source: str, marks: Sequence[str]):
        super().__init__(source)
        self.marks = marks

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Messages,
        add_generation_prompt: bool = True,
        tools: Extras = None,
        documents: Extras = None,
    ) -> list[int]:
        check_messages(messages)
        _check_no_extras(tools, documents)
        _check_marks(messages, [mark for mark in self.marks if mark not in tokenizer.control_tokens])
        return super().encode(tokenizer, messages, add_generation_prompt)


CHAT_FORMATS: dict[str, ChatFormat] = {
    "llama2": Llama2Chat(),
    "llama3": Llama3Chat(),
    **{name: NamedFormat(source, marks) for name, (source, marks) in TEMPLATES.items()},
}


def _check_marks(messages: Messages, marks: Sequence[str]) -> None:
    for i, message in enumerate(messages):
        if mark := next((mark for mark in marks if mark in message["content"]), None):
            raise TextError(f"messages[{i}] has the tag {mark}, which only the chat format may write")


def check_messages(messages: Messages, further: bool = False) -> None:
    """A conversation is a non-empty list of {"role": one of ROLES, "content": text}.

    `further`: a message may have further keys, such as tool_calls, and then needs no content.
    """
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ParameterError(f"messages is {escape(messages)}, it must be a list with a message or more")
    for i, message in enumerate(messages):
        keys = {"role", "content"}
        known = isinstance(message, Mapping) and (message.keys() == keys or (further and _is_json(message)))
        content = message.get("content") if known else None
        absent = content is None and known and further and message.keys() - keys
        if not known or message.get("role") not in ROLES or not (isinstance(content, str) or absent):
            wanted = f"it must have a role, one of {', '.join(ROLES)}, and a content, a text"
            raise ParameterError(f"messages[{i}] is {escape(message)}, {wanted}")
        for text in _texts(message):
            check_text(text)


def check_extras(name: str, values: Extras) -> None:
    """Tools and documents are lists of objects, as JSON has them."""
    if values is None:
        return
    if not isinstance(values, (list, tuple)) or not all(
        isinstance(x, Mapping) and _is_json(x) for x in values
    ):
        raise ParameterError(f"{name} is {escape(values)}, it must be a list of objects as in JSON")
    for text in _texts(values):
        check_text(text)


def _check_no_extras(tools: Extras, documents: Extras) -> None:
    if tools or documents:
        raise ParameterError("this chat format has no place for tools or documents; a model's template may")


def _is_json(value: Any, depth: int = 0) -> bool:
    if depth > MAX_DEPTH:
        return False
    if isinstance(value, Mapping):
        return all(type(key) is str and _is_json(one, depth + 1) for key, one in value.items())
    if isinstance(value, list | tuple):
        return all(_is_json(one, depth + 1) for one in value)
    return value is None or type(value) in (str, int, float, bool)


def _texts(value: Any) -> list[str]:
    """Every text in a JSON value, keys too."""
    if isinstance(value, str):
        return [value]
    inside = [*value, *value.values()] if isinstance(value, Mapping) else value
    return [text for one in inside for text in _texts(one)] if isinstance(inside, list | tuple) else []


def _size(value: Any) -> int:
    """The characters of a JSON value, for a template's budget."""
    if isinstance(value, str):
        return len(value)
    inside = [*value, *value.values()] if isinstance(value, Mapping) else value
    return MESSAGE_OVERHEAD + sum(map(_size, inside)) if isinstance(inside, list | tuple) else 8


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    """A JSON value with each of its texts changed."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {change(key): _changed(one, change) for key, one in value.items()}
    return [_changed(one, change) for one in value] if isinstance(value, list | tuple) else value
