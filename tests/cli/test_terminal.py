"""No text of a model or of a file commands a terminal; in a pipe every byte stays as it is."""

import json
import os
import pty
import subprocess
import threading
import unicodedata
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers.command_line import PROGRAM, run
from helpers.gguf_writer import gguf_bytes, llama_metadata, llama_tensors
from helpers.terminal import Terminal
from helpers.tiny_models import float_weights
from hypothesis import given
from hypothesis import strategies as st

from numpy_llama.errors import visible
from numpy_llama.proof.tiny import TINY_BLOCKS
from numpy_llama.text.tokenizer import CONTROL, NORMAL, spelled

# Each is a token: sequences whole, cut into several tokens, and in the one character that C1 has for ESC [.
PIECES = [
    *("\x1b]0;title\x07", "ok ", "\x1b", "[2J", "\n", "\t", "\u202e", "\x9b31m", "\u2066", "\r"),
    "caf\u00e9 \u65e5\U0001f999",
]
SAID = "".join(PIECES)
SHOWN = r"\x1b]0;title\x07ok \x1b[2J" + "\n\t" + r"\u202e\x9b31m\u2066\r" + "caf\u00e9 \u65e5\U0001f999"
EVIL = "\x1b]0;name\x07\u202e\x9b31m.gguf"
COMMANDS = "\x1b]", "\x1b[2", "\x07", "\u202e", "\u2066", "\x9b"
END = "<|im_end|>"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """After "a" it says PIECES, one after the other, and ends; its file's name is no better."""
    said = [spelled(piece.encode()) for piece in PIECES]
    tokens = [*dict.fromkeys([*(spelled(bytes([b])) for b in range(256)), *said, END])]
    chain = [tokens.index(text) for text in ("a", *said, END)]
    args = replace(TINY_BLOCKS, n_layers=1, vocab_size=len(tokens), max_seq_len=64)
    weights = float_weights(args)
    weights["norm.weight"] = np.ones(64, np.float32)
    for name in ("attention.wo", "feed_forward.w_down"):
        weights[f"layers.0.{name}.weight"][:] = 0  # what a layer adds: nothing
    weights["output.weight"][:] = 0
    weights["output.weight"][chain[1:]] = weights["tok_embeddings.weight"][chain[:-1]]
    vocabulary = {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": tokens,
        "token_type": np.array([CONTROL if text == END else NORMAL for text in tokens], np.int32),
        "merges": [],
        "chat_template": "{{ messages[0].content }}",
    }
    metadata = llama_metadata(args) | {f"tokenizer.ggml.{key}": value for key, value in vocabulary.items()}
    metadata["tokenizer.chat_template"] = metadata.pop("tokenizer.ggml.chat_template")
    path = tmp_path_factory.mktemp("terminal") / EVIL
    path.write_bytes(gguf_bytes(metadata, llama_tensors(args, weights)))
    return path


def on_terminal(*arguments: str, code: int = 0) -> str:
    """What the program writes to a terminal; stderr is none, for bars on it are drawn by commands of ours."""
    master, slave = pty.openpty()
    seen: list[bytes] = []

    def read():
        try:
            while data := os.read(master, 4096):
                seen.append(data)
        except OSError:  # Linux's way to say that the other side is closed
            pass

    reader = threading.Thread(target=read)
    reader.start()
    streams = {"stdin": subprocess.DEVNULL, "stdout": slave, "stderr": subprocess.PIPE}
    done = subprocess.run([PROGRAM, *arguments], **streams)
    os.close(slave)
    reader.join(timeout=20)
    os.close(master)
    assert done.returncode == code, done.stderr
    assert not any(command in done.stderr.decode() for command in COMMANDS)
    return b"".join(seen).decode().replace("\r\n", "\n")


@pytest.mark.parametrize("verb", ["generate", "chat"])
def test_what_a_model_says_is_shown_and_not_obeyed(verb, model):
    assert on_terminal(verb, "-m", str(model), "a") == SHOWN + "\n"
    assert run(verb, "-m", str(model), "a").stdout == (SAID + "\n").encode()
    shown = on_terminal(verb, "-m", str(model), "--json", "a")
    assert json.loads(shown)["text"] == SAID and not any(command in shown for command in COMMANDS)
    assert json.loads(run(verb, "-m", str(model), "--json", "a").stdout)["text"] == SAID


def test_what_is_typed_in_a_conversation_is_answered_so(model):
    """On a terminal of its own, to the end of the answer."""
    terminal = Terminal("chat", "-m", str(model), "--temperature", "0")
    terminal.type(b"a\n")
    answer_end = terminal.wait_for("\U0001f999".encode())
    terminal.wait_for(b"> ", answer_end)
    terminal.type(b"\x04")
    assert terminal.end() == 0
    text = terminal.seen.decode().replace("\r\n", "\n")
    terminal.close()
    assert SHOWN in text
    assert not any(command in text for command in COMMANDS if command != "\x07")  # readline may ring


@pytest.mark.parametrize(
    "arguments",
    [
        ["info"],
        ["tokenize", "-m", "MODEL", "a" + SAID],
        ["lens", "-m", "MODEL", "a" + SAID],
        ["trace", "-m", "MODEL", "a", "layers.*.attention.scores"],
        ["attention", "-m", "MODEL", "a" + SAID],
        ["verify", "-m", "MODEL"],
        ["bench", "-m", "MODEL", "-p", "2", "-n", "1", "-r", "1"],
        ["convert", "MODEL", "OUT", "--dtype", "q8"],
    ],
    ids=lambda arguments: arguments[0],
)
def test_no_command_lets_a_file_command_the_terminal(arguments, model, tmp_path):
    places = {"MODEL": str(model), "OUT": str(tmp_path / EVIL)}
    arguments = [places.get(word, word) for word in arguments] + [str(model)] * (arguments == ["info"])
    shown = on_terminal(*arguments, code=3 if arguments[0] == "verify" else 0)  # a layer of zeros is odd
    assert not any(command in shown for command in COMMANDS)


@given(st.text(st.characters() | st.sampled_from("\x1b\x9b\r\u202e\u200d\u3000\xa0")))
def test_visible_is_what_it_says(text):
    """Control characters and those of direction are escaped; all else stays, joined emoji and spaces too."""
    direction = "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"

    def is_order(c):
        return c in direction or (unicodedata.category(c) in ("Cc", "Zl", "Zp") and c not in "\n\t")

    expected = "".join(ascii(c)[1:-1] if is_order(c) else c for c in text)
    assert visible(text) == expected
    assert "".join(map(visible, text)) == expected
