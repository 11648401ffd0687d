"""T: vocabularies that are wrong, and texts that are meant to be."""

import base64
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

import numpy_llama as nl

from .case import ACCEPTED, MiB, Variant, case, tokenizer
from .gguf import llama_bytes, metadata
from .models import (
    BYTE,
    NORMAL,
    UNKNOWN,
    byte_ranks,
    merges,
    printable,
    sentencepiece_model,
    sentencepieces,
)

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def written(folder: Path, data: bytes, name: str = "tokenizer.model") -> Path:
    """A file of that name in a folder of its own."""
    folder.mkdir()
    (folder / name).write_bytes(data)
    return folder / name


def check(holds: object, problem: object) -> None:
    """Not `assert`: this runs under -O too."""
    if not holds:
        raise ValueError(f"wrong: {problem}")


def encodes(tokenizer) -> None:
    """It gives a text back."""
    text = "a b\u00e9 \u4e16 \U0001f600  aaaa"
    found = tokenizer.decode(tokenizer.encode(text))
    check(found == text, repr(found))


# ---------------------------------------------------------------- SentencePiece


def pieces(folder: Path, name: str, data: bytes, *expected: str, **options) -> Variant:
    path = written(folder / f"{sum(1 for _ in folder.iterdir())}", data)
    reference = options.pop("reference", "sentencepiece")
    return tokenizer(name, path, *expected, use=encodes, reference=reference and (reference, path), **options)


@case("T01", "no tokenizer at all")
def no_tokenizer(folder: Path) -> Iterator[Variant]:
    yield pieces(folder, "empty", b"", "TokenizerError")
    noise = random.Random(0).randbytes(5000)
    yield pieces(folder, "noise", noise, "TokenizerError")
    yield pieces(folder, "JSON", b'{"version": "1.0"}', "TokenizerError", says=("json",))


@case("T02", "protobuf that is none")
def protobuf(folder: Path) -> Iterator[Variant]:
    good = sentencepiece_model()
    says = ("protobuf",)
    for name, bad in [
        ("a number of 11 bytes", b"\x08" + b"\xff" * 10 + b"\x01"),
        ("a length of 2^63", b"\x0a" + b"\x80" * 9 + b"\x01"),
        ("field number 0", b"\x02\x01x"),
        ("wire type 3", b"\x0b"),
        ("wire type 4", b"\x0c"),
        ("wire type 6", b"\x0e"),
        ("wire type 7", b"\x0f"),
        ("a length beyond the end", b"\x0a\x7f"),
    ]:
        yield pieces(folder, name, good + bad, "TokenizerError", says=says)


@case("T03", "no pieces, and far too many")
def piece_count(folder: Path) -> Iterator[Variant]:
    errors = ("TokenizerError", "ResourceLimitError")
    yield pieces(folder, "none", sentencepiece_model([]), *errors)
    yield pieces(folder, "2^24 empty ones", b"\x0a\0" * (1 << 24), *errors)


@case("T04", "pieces that cannot be")
def bad_pieces(folder: Path) -> Iterator[Variant]:
    good = sentencepieces()
    for name, changed in [
        ("one twice", [*good, good[-1]]),
        ("an empty one", [*good, ("", -99.0, NORMAL)]),
        ("two UNKNOWN", [*good, ("<unk2>", 0.0, UNKNOWN)]),
    ]:
        yield pieces(folder, name, sentencepiece_model(changed), "TokenizerError")
    # All 256 bytes are there, so nothing is unknown.
    yield pieces(folder, "no UNKNOWN", sentencepiece_model(good[1:]), ACCEPTED)


@case("T05", "bytes that are missing or none")
def byte_pieces(folder: Path) -> Iterator[Variant]:
    good = sentencepieces()
    without = [piece for piece in good if piece[0] != "<0x7F>"]
    yield pieces(folder, "255 of 256", sentencepiece_model(without), "TokenizerError")
    changed = [("<0xGG>", 0.0, BYTE) if piece[0] == "<0x7F>" else piece for piece in good]
    yield pieces(folder, "<0xGG>", sentencepiece_model(changed), "TokenizerError", says=("<0xGG>",))


@case("T06", "scores that are no numbers")
def scores(folder: Path) -> Iterator[Variant]:
    for score in (float("nan"), float("inf"), float("-inf")):
        changed = [(text, score if text == "aa" else s, kind) for text, s, kind in sentencepieces()]
        yield pieces(folder, str(score), sentencepiece_model(changed), "TokenizerError", says=("score",))
    changed = [(text, -0.0 if text == "aa" else s, kind) for text, s, kind in sentencepieces()]
    # -0.0 orders as 0.0 does: it is refused, or it is the number that it is.
    yield pieces(folder, "-0.0", sentencepiece_model(changed), "TokenizerError", ACCEPTED)


# ---------------------------------------------------------------- tiktoken


def tiktoken_model(lines: list[bytes] | None = None) -> bytes:
    return b"".join(line + b"\n" for line in (tiktoken_lines() if lines is None else lines))


def tiktoken_lines() -> list[bytes]:
    return [base64.b64encode(data) + b" %d" % rank for rank, data in enumerate(byte_ranks())]


def ranks(folder: Path, name: str, lines: list[bytes], *expected: str, **options) -> Variant:
    path = written(folder / f"{sum(1 for _ in folder.iterdir())}", tiktoken_model(lines))
    return tokenizer(name, path, *expected, use=encodes, reference=("tiktoken", path), **options)


@case("T07", "a line that is no token")
def bad_lines(folder: Path) -> Iterator[Variant]:
    good = tiktoken_lines()
    at = 258
    for name, line in [
        ("no space", base64.b64encode(b"--")),
        ("no base64", b"!?=a 258"),
        ("rank -1", base64.b64encode(b"--") + b" -1"),
        ("a rank twice", base64.b64encode(b"--") + b" 257"),
        ("rank 2^40", base64.b64encode(b"--") + b" 1099511627776"),
        ("a gap", base64.b64encode(b"--") + b" 9999"),
        ("a rank of 5,000 digits", base64.b64encode(b"--") + b" " + b"9" * 5000),
        ("a token twice", base64.b64encode(b"aa") + b" 258"),
    ]:
        says = ("line 259",)
        yield ranks(folder, name, [*good[:at], line, *good[at + 1 :]], "TokenizerError", says=says)


@case("T08", "a byte that is missing")
def missing_byte(folder: Path) -> Iterator[Variant]:
    tokens = [data for data in byte_ranks() if data != b"\x7f"]
    lines = [base64.b64encode(data) + b" %d" % rank for rank, data in enumerate(tokens)]
    yield ranks(folder, "0x7F", lines, "TokenizerError")


# ---------------------------------------------------------------- tokenizer.json


def tokenizer_json(**changes) -> bytes:
    """Byte-level BPE as Llama 3's; `changes` replace parts of "model", or "added_tokens"."""
    vocabulary = {printable(data): i for i, data in enumerate(byte_ranks())}
    n = len(vocabulary)
    added = [
        {"id": n + i, "content": text, "special": True, "single_word": False, "lstrip": False,
         "rstrip": False, "normalized": False}
        for i, text in enumerate(["<|begin_of_text|>", "<|end_of_text|>"])
    ]  # fmt: skip
    value = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": changes.pop("added_tokens", added),
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": LLAMA3}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": vocabulary,
            "merges": [f"{printable(a)} {printable(b)}" for a, b in merges()],
        }
        | changes,
    }  # fmt: skip
    return json.dumps(value).encode()


@case("T09", "a tokenizer.json that cannot be")
def bad_tokenizer_json(folder: Path) -> Iterator[Variant]:
    good = json.loads(tokenizer_json())
    vocabulary, added = good["model"]["vocab"], good["added_tokens"]
    n = len(vocabulary)
    a, b = printable(b"a"), printable(b"b")  # each is given the other's id
    circle = [added[0] | {"id": vocabulary[a], "content": b}, added[1] | {"id": vocabulary[b], "content": a}]
    for name, changes in [
        ("a merge of unknown pieces", {"merges": ["zz yy"]}),
        ("a merge of three", {"merges": ["a a a"]}),
        ("a merge that is a number", {"merges": [7]}),
        ("10^7 merges", {"merges": ["<many>"]}),
        ("ids in a circle", {"added_tokens": circle}),
        ("an added id twice", {"added_tokens": [added[0], added[1] | {"id": n}]}),
        ("an added id of 2^31", {"added_tokens": [added[0] | {"id": 1 << 31}]}),
        ("an added id after a gap", {"added_tokens": [added[0], added[1] | {"id": n + 9}]}),
        ("an option that is a number", {"added_tokens": [added[0] | {"lstrip": 1}]}),
        ("an added token without a text", {"added_tokens": [added[0] | {"content": ""}]}),
        ("an added token of 10^5 characters", {"added_tokens": [added[0] | {"content": "x" * 10**5}]}),
        ("a gap of 2^21 ids", {"vocab": vocabulary | {"zz": 1 << 21}, "added_tokens": []}),
        ("an id of 2^31", {"vocab": vocabulary | {"zz": 1 << 31}}),
        ("an id of -1", {"vocab": vocabulary | {"zz": -1}}),
        ("an id twice", {"vocab": vocabulary | {"zz": 0}}),
        ("a vocabulary that is a list", {"vocab": list(vocabulary)}),
    ]:  # fmt: skip
        # `tokenizers` needs some 5 s for 10^7 merges: its answer would be that of the clock.
        reference = None if changes.get("merges") == ["<many>"] else "tokenizers"
        data = tokenizer_json(**changes).replace(b'"<many>"', b'"a a",' * (10**7 - 1) + b'"a a"')
        path = written(folder / name.replace(" ", "-"), data, "tokenizer.json")
        yield tokenizer(name, path, "TokenizerError", use=encodes, reference=reference and (reference, path))


# ---------------------------------------------------------------- texts


def every_tokenizer(folder: Path) -> list[tuple[str, Path]]:
    """The same vocabulary, more or less, in each of its files."""
    paths = {
        "SentencePiece": written(folder / "sp", sentencepiece_model()),
        "tiktoken": written(folder / "tiktoken", tiktoken_model()),
        "tokenizer.json": written(folder / "json", tokenizer_json(), "tokenizer.json"),
        "GGUF, SentencePiece": written(folder / "gguf-sp", llama_bytes(), "model.gguf"),
        "GGUF, byte-level": written(folder / "gguf-bpe", llama_bytes(byte_level=True), "model.gguf"),
    }
    return list(paths.items())


def used(name: str, path: Path, use: Callable, *expected: str, **options) -> Variant:
    """The tokenizer of a good file, loaded and used; the message is about what it is given, not the file."""
    return tokenizer(name, path, *expected, use=use, **{"names": ""} | options)


@case("T10", "a million times the same character")
def repeated(folder: Path) -> Iterator[Variant]:
    for name, path in every_tokenizer(folder):
        for character, n in [("a", 10**6), ("^", 10**6), (" ", 10**6), ("-", 524_288)]:

            def use(tokenizer, character=character, n=n) -> None:
                began = time.process_time()
                ids = tokenizer.encode(character * n)
                seconds = time.process_time() - began
                check(tokenizer.decode(ids) == character * n, "the text does not come back")
                longest = max({*ids}, key=lambda i: len(tokenizer.token_bytes(i)))
                check(len(tokenizer.token_bytes(longest)) == 8, "the longest token is not used")
                check(ids.count(longest) >= n // 8 - 3, f"only {ids.count(longest)} of the longest token")
                check(len(ids) <= n // 8 + 8, f"{len(ids)} tokens")
                check(seconds < 2, f"{seconds:.1f} s to encode")

            yield used(f"{name}: {character!r} x {n:,}", path, use, ACCEPTED, room=1024 * MiB, seconds=4)


@case("T11", "text that spells control tokens")
def spelled_controls(folder: Path) -> Iterator[Variant]:
    for name, path in every_tokenizer(folder):

        def use(tokenizer) -> None:
            control = tokenizer.control_tokens
            check(control, "there are no control tokens")
            text = "x".join(["", *control, ""])
            ids = tokenizer.encode(text)
            check(not {*ids} & {*control.values()}, "a text became a control token")
            check(tokenizer.decode(ids) == text, "the text does not come back")
            turn = "{% for m in messages %}{{ bos_token }}{{ m.content }}{{ eos_token }}{% endfor %}"
            plain, spelled = (
                nl.ChatTemplate(turn).encode(tokenizer, [{"role": "user", "content": content}])
                for content in ("x", text)
            )
            count = [sum(i in control.values() for i in ids) for ids in (plain, spelled)]
            check(count[0] == count[1], f"{count[1]} control tokens in a conversation that has {count[0]}")

        yield used(name, path, use, ACCEPTED, compiles=True)


@case("T12", "BOS from the template and from the tokenizer")
def double_bos(folder: Path) -> Iterator[Variant]:
    for byte_level in (False, True):
        for bos in ("{{ bos_token }}", ""):
            change = {
                "tokenizer__ggml__add_bos_token": True,
                "tokenizer__chat_template": bos + "{% for m in messages %}{{ m.content }}{% endfor %}",
            }
            name = f"{'bytes' if byte_level else 'SentencePiece'}, {'written' if bos else 'not written'}"
            data = llama_bytes(metadata(byte_level, **change), byte_level)
            path = written(folder / name.replace(" ", "-"), data, "model.gguf")

            def run(path=path) -> None:
                llama = nl.load(path, threads=1)
                ids = llama.encode_chat([{"role": "user", "content": "abc"}])
                check(ids.count(llama.tokenizer.bos_id) == 1 and ids[0] == llama.tokenizer.bos_id, ids)

            yield Variant(name, run, (ACCEPTED,), compiles=True)


@case("T13", "text that is hardly one")
def strange_text(folder: Path) -> Iterator[Variant]:
    for name, path in every_tokenizer(folder):
        for what, text in [
            ("U+FFFE", "a\ufffeb\uffff"),
            ("NUL", "a\0b\0"),
            ("1 MB of combining marks", "a" + "\u0301" * 500_000),
            ("RTL overrides", "\u202eabc\u202c\u2066\u2069\ufeff"),
        ]:

            def use(tokenizer, text=text) -> None:
                check(tokenizer.decode(tokenizer.encode(text)) == text, "the text does not come back")

            yield used(f"{name}: {what}", path, use, ACCEPTED, room=256 * MiB, seconds=4)
        for what, text, at in [("half a pair", "ab\ud800c", 2), ("a pair in halves", "\ud83d\ude00", 0)]:
            yield used(
                f"{name}: {what}",
                path,
                lambda tokenizer, text=text: tokenizer.encode(text),
                "TextError",
                says=(f"character {at}",),
            )


@case("T14", "characters cut anywhere")
def streamed(folder: Path) -> Iterator[Variant]:
    for name, path in every_tokenizer(folder):

        def use(tokenizer) -> None:
            from numpy_llama.text.tokenizer import StreamDecoder

            for text in ("\u00e9\u4e16\U0001f600 a", " \U0001f468\u200d\U0001f469\u200d\U0001f467", "\ufffd"):
                ids = tokenizer.encode(text)
                stream = StreamDecoder(tokenizer)
                parts = [stream.push(i) for i in ids]
                whole = "".join(parts) + stream.flush()
                check(whole == tokenizer.decode(ids) == text, repr(whole))
                check(("\ufffd" in whole) == ("\ufffd" in text), "U+FFFD out of nothing")
                for cut in range(len(ids) + 1):  # a stream may end anywhere, and another go on
                    stream = StreamDecoder(tokenizer)
                    head = "".join(map(stream.push, ids[:cut]))
                    check(text.startswith(head), repr(head))
                    check(stream.flush() in ("", "\ufffd"), "more than what is incomplete at the end")

        yield used(name, path, use, ACCEPTED)


@case("T15", "ids that are none")
def ids_outside(folder: Path) -> Iterator[Variant]:
    for name, path in every_tokenizer(folder):
        for what, make in [
            ("-1", lambda n: -1),
            ("vocab_size", lambda n: n),
            ("2^31", lambda n: 1 << 31),
            ("2^64", lambda n: 1 << 64),
            ("a float", lambda n: 1.0),
            ("numpy -1", lambda n: np.int64(-1)),
            ("NaN", lambda n: float("nan")),
        ]:

            def use(tokenizer, make=make):
                return tokenizer.decode([5, make(tokenizer.vocab_size)])

            says = (str(make(len(sentencepieces()))),) if what not in ("vocab_size", "numpy -1") else ()
            yield used(f"{name}: {what}", path, use, "TokenizerError", says=says)

        def right(tokenizer) -> None:
            check(tokenizer.decode([np.int64(7)]) == tokenizer.decode([7]), "NumPy's whole numbers are too")

        yield used(f"{name}: numpy 7", path, right, ACCEPTED)
