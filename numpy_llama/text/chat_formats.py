"""The common formats of conversations as Jinja templates, for models that come without one.

Each format is a template and its marks. A mark that is no control token of the vocabulary is plain text, so a
message that has it could take another role: `NamedFormat` refuses such a message. BOS is put first by the
tokenizer, where the model wants one.
"""

# Every message alike: before it a line with the role, after it an end.
_LINES = """
{%- for message in messages %}
    {{- BEFORE + message['role'] + AFTER + message['content'] + END }}
{%- endfor %}
{%- if add_generation_prompt %}{{ BEFORE + 'assistant' + AFTER }}{% endif %}"""


def _lines(before: str, after: str, end: str) -> str:
    values = {"BEFORE": before, "AFTER": after, "END": end}
    return "".join(f"{{% set {name} = {value} %}}" for name, value in values.items()) + _LINES


# A name and a colon, or a headline, before each message. SYSTEM, USER, ASSISTANT, and what follows each.
_NAMED = """
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{{ SYSTEM[0] + message['content'] + SYSTEM[1] }}
    {%- elif message['role'] == 'user' %}{{ USER[0] + message['content'] + USER[1] }}
    {%- elif message['role'] == 'assistant' %}{{ ASSISTANT[0] + message['content'] + ASSISTANT[1] }}
    {%- else %}{{ raise_exception('this format has no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ PROMPT }}{% endif %}"""


def _named(system: str, user: str, assistant: str, prompt: str) -> str:
    values = {"SYSTEM": system, "USER": user, "ASSISTANT": assistant, "PROMPT": prompt}
    return "".join(f"{{% set {name} = {value} %}}" for name, value in values.items()) + _NAMED


_MISTRAL = """
{%- set first = namespace(text='') %}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}{% set first.text = message['content'] + '\n\n' %}
    {%- elif message['role'] == 'user' %}
        {{- '[INST] ' + first.text + message['content'] + ' [/INST]' }}{% set first.text = '' %}
    {%- elif message['role'] == 'assistant' %}{{ ' ' + message['content'] + eos_token }}
    {%- else %}{{ raise_exception('this format has no role ' + message['role']) }}
    {%- endif %}
{%- endfor %}"""
_ALPACA = """
{%- if messages[0]['role'] != 'system' %}
    {{- 'Below is an instruction that describes a task. ' }}
    {{- 'Write a response that appropriately completes the request.\n\n' }}
{%- endif %}""" + _named(
    r"('', '\n\n')",
    r"('### Instruction:\n', '\n\n')",
    r"('### Response:\n', eos_token + '\n\n')",
    r"'### Response:\n'",
)

TEMPLATES: dict[str, tuple[str, tuple[str, ...]]] = {
    "chatml": (_lines("'<|im_start|>'", r"'\n'", r"'<|im_end|>\n'"), ("<|im_start|>", "<|im_end|>")),
    "mistral": (_MISTRAL, ("[INST]", "[/INST]")),
    "zephyr": (
        _lines("'<|'", r"'|>\n'", r"eos_token + '\n'"),
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "phi3": (
        _lines("'<|'", r"'|>\n'", r"'<|end|>\n'"),
        ("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
    ),
    "tulu": (
        _named(
            r"('<|system|>\n', '\n')",
            r"('<|user|>\n', '\n')",
            r"('<|assistant|>\n', eos_token + '\n')",
            r"'<|assistant|>\n'",
        ),
        ("<|system|>", "<|user|>", "<|assistant|>"),
    ),
    "vicuna": (
        _named("('', ' ')", "('USER: ', ' ')", "('ASSISTANT: ', eos_token)", "'ASSISTANT:'"),
        ("USER:", "ASSISTANT:"),
    ),
    "alpaca": (_ALPACA, ("### Instruction:", "### Response:")),
    "solar": (
        _named(
            r"('### System:\n', '\n\n')",
            r"('### User:\n', '\n\n')",
            r"('### Assistant:\n', '\n\n')",
            r"'### Assistant:\n'",
        ),
        ("### System:", "### User:", "### Assistant:"),
    ),
    "openchat": (
        _named(
            "('', '<|end_of_turn|>')",
            "('GPT4 Correct User: ', '<|end_of_turn|>')",
            "('GPT4 Correct Assistant: ', '<|end_of_turn|>')",
            "'GPT4 Correct Assistant:'",
        ),
        ("GPT4 Correct User:", "GPT4 Correct Assistant:", "<|end_of_turn|>"),
    ),
    "deepseek": (
        _named(
            r"('', '\n\n')",
            r"('User: ', '\n\n')",
            "('Assistant: ', eos_token)",
            "'Assistant:'",
        ),
        ("User:", "Assistant:"),
    ),
}
