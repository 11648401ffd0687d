"""A conversation to token ids: Meta's formats for Llama 2 and 3 as code, any other as its Jinja template.

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
from typing import Protocol

from ..errors import MismatchError, ParameterError, TemplateError, TextError, check_kind, escape
from .added import Parts
from .sandbox import MADE_PER_CHARACTER, MAX_MADE, MESSAGE_OVERHEAD, Sandbox
from .tokenizer import Tokenizer, check_text

ROLES = ("system", "user", "assistant", "tool")
Messages = Sequence[Mapping[str, str]]


class ChatFormat(Protocol):
    """The form of a conversation that a model was trained on."""

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]: ...


class Llama2Chat:
    """Meta's format for Llama 2 and Code Llama (llama/generation.py, chat_completion): questions in brackets.

        <s>[INST] <<SYS>>\n system \n<</SYS>>\n\n question [/INST] answer </s><s>[INST] question [/INST]

    The tags are plain text, so a message with a tag could take another role. Meta's program refuses such
    messages, and so does this class.
    """

    TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        check_messages(messages)
        bos, eos = _control_ids(tokenizer, "<s>", "</s>")
        for i, message in enumerate(messages):
            if tag := next((tag for tag in self.TAGS if tag in message["content"]), None):
                raise TextError(f"messages[{i}] has the tag {tag}, which only the chat format may write")

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
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        check_messages(messages)
        bos, start, end, eot = _control_ids(tokenizer, *self.CONTROL)

        def header(role: str) -> list[int]:
            return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

        ids = [bos]
        for message in messages:
            role = "ipython" if message["role"] == "tool" else message["role"]  # Meta's name for it
            ids += [*header(role), *tokenizer.encode(message["content"].strip()), eot]
        return ids + header("assistant") if add_generation_prompt else ids


CHAT_FORMATS: dict[str, ChatFormat] = {"llama2": Llama2Chat(), "llama3": Llama3Chat()}


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
    """A Jinja template, run as Hugging Face's `apply_chat_template` runs it."""

    def __init__(self, source: str):
        check_kind("the chat template", source, str, "a text")
        self.source = source

    @cached_property
    def code(self) -> CodeType:
        return Sandbox().compiled(self.source)

    def render(self, messages: Messages, tokenizer: Tokenizer, add_generation_prompt: bool = True) -> str:
        bos = "" if tokenizer.bos_id is None else tokenizer.piece(tokenizer.bos_id)
        eos = tokenizer.piece(tokenizer.eos_ids[0]) if tokenizer.eos_ids else ""
        context = {"messages": messages, "add_generation_prompt": add_generation_prompt}
        context |= {"bos_token": bos, "eos_token": eos, "tools": None, "documents": None}
        size = sum(MESSAGE_OVERHEAD + len(message["content"]) for message in messages)
        try:
            code = self.code
            return Sandbox(MAX_MADE + MADE_PER_CHARACTER * size).run(code, context)
        except Exception as error:  # a template may raise anything, RecursionError and MemoryError too
            files = {frame.f_code.co_filename: line for frame, line in walk_tb(error.__traceback__)}
            line = getattr(error, "lineno", files.get("<template>", "unknown"))
            what = escape(str(error) or type(error).__name__)
            raise TemplateError(f"the model's chat template, line {line}: {what}") from None

    def encode(
        self, tokenizer: Tokenizer, messages: Messages, add_generation_prompt: bool = True
    ) -> list[int]:
        """The ids of a conversation.

        BOS stands where the template writes it, as in Hugging Face's. If the template writes none, and the
        tokenizer adds BOS to a text, BOS comes first, once.

        Before the template runs, each control token's name in a message is replaced by one unused character.
        So the template trims and searches real text, and every name in its result is its own. The result is
        cut at these names, the messages' names are put back, and the text between is encoded as text.
        """
        check_messages(messages)
        control = tokenizer.control_tokens
        names = tokenizer.control_names
        used = set(self.source).union(*control, *(message["content"] for message in messages))
        private_use = map(chr, range(0xF0000, 0x110000))
        unused = (c for c in private_use if c not in used)
        spare = list(islice(unused, len(control) + 1))
        if len(spare) <= len(control):
            raise TextError("the messages leave no private-use character unused")
        stand_in, blank = dict(zip(control, spare, strict=False)), spare[-1]
        original = {ord(character): name for name, character in stand_in.items()}

        def parts(change: Callable[[str], str]) -> Parts:
            changed = [{"role": m["role"], "content": change(m["content"])} for m in messages]
            return tokenizer.cut(self.render(changed, tokenizer, add_generation_prompt), special=True)

        def made(parts: Parts) -> Parts:
            return [part for part in parts if part in tokenizer.added.control]

        found = parts(lambda text: names.sub(lambda match: stand_in[match[0]], text))
        # A template could still join the parts of a name, or turn <|IM_END|> to lower case. Then the names
        # differ from those of the same messages with blanked text.
        if made(found) != made(parts(lambda text: re.sub(r"\S", blank, text))):
            raise TemplateError("the model's chat template makes control tokens out of the text of a message")
        ids = tokenizer.encode_parts([p if isinstance(p, int) else p.translate(original) for p in found])
        if tokenizer.add_bos and tokenizer.bos_id not in ids:
            ids = tokenizer.encode("", bos=True) + ids
        return ids


def check_messages(messages: Messages) -> None:
    """A conversation is a non-empty list of {"role": one of ROLES, "content": text}."""
    if not isinstance(messages, (list, tuple)) or not messages:
        raise ParameterError(f"messages is {escape(messages)}, it must be a list with a message or more")
    for i, message in enumerate(messages):
        known = isinstance(message, Mapping) and message.keys() == {"role", "content"}
        if not known or message["role"] not in ROLES or not isinstance(message["content"], str):
            wanted = f"it must have a role, one of {', '.join(ROLES)}, and a content, a text"
            raise ParameterError(f"messages[{i}] is {escape(message)}, {wanted}")
        check_text(message["content"])
