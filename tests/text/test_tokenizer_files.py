"""Tokenizer files of every kind, made here, against the libraries whose files they are."""

import base64
import io
import json
import struct
from functools import cache
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from helpers.gguf_writer import gguf_bytes
from helpers.tokenizers import (
    CORPUS,
    TEXTS,
    altered,
    byte_level_metadata,
    pre_tokenizer,
    put,
)
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, normalizers, pre_tokenizers, trainers

from numpy_llama.checkpoint.huggingface import chat_template
from numpy_llama.checkpoint.tokenizers import find_tokenizer, open_tokenizer, tokenizer_of_folder
from numpy_llama.errors import (
    ConfigError,
    FormatError,
    MismatchError,
    ResourceLimitError,
    TokenizerError,
    TruncatedError,
    UnsupportedError,
)
from numpy_llama.generation.transcript import StopTexts, Transcript
from numpy_llama.text import bpe, pretokenizer
from numpy_llama.text.tokenizer import (
    BYTE,
    RANKS,
    USER_DEFINED,
    WORDS,
    StreamDecoder,
    Tokenizer,
    order_of_merging,
    spelled,
    tokenizer_from_gguf,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tokenizers")


# ---------------------------------------------------------------- SentencePiece


@cache
def trained(**options) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    usual = {
        "model_type": "bpe", "vocab_size": 420, "byte_fallback": True, "character_coverage": 1.0,
        "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "minloglevel": 2,
        "control_symbols": ["[INST]", "<|im_end|>"],
    }  # fmt: skip
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, **usual | options
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


def sentencepiece_file(folder: Path, **options) -> Path:
    path = folder / "tokenizer.model"
    path.write_bytes(trained(**options).serialized_model_proto())
    return path


SENTENCEPIECE = [
    {},
    {"add_dummy_prefix": False},
    {"remove_extra_whitespaces": True},
    {"user_defined_symbols": "hello,<|,  ,\u2581fox"},
    {"bos_id": 5, "eos_id": 4, "pad_id": 3, "unk_id": 1},
    {"bos_piece": "<bos>", "eos_piece": "<eos>"},
    {"bos_id": -1, "eos_id": 1},
]


@pytest.mark.parametrize("options", SENTENCEPIECE, ids=str)
def test_sentencepiece_model(folder, options):
    reference, tokenizer = trained(**options), open_tokenizer(sentencepiece_file(folder, **options))

    @given(text=TEXTS)
    @example(text="  hello  hello  ").via("spaces to be removed")
    @example(text="\u2581 \u2581").via("spaces by another name")
    def compare(text):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text)
        if "\u2581" not in text:
            assert tokenizer.decode(ids) == reference.decode(ids)

    compare()
    assert tokenizer.vocab_size == reference.vocab_size()
    bos = -1 if tokenizer.bos_id is None else tokenizer.bos_id
    assert (bos, tokenizer.eos_ids[0]) == (reference.bos_id(), reference.eos_id())
    assert tokenizer.add_bos == (bos >= 0)
    assert tokenizer.add_space == options.get("add_dummy_prefix", True)


def varint(n: int) -> bytes:
    return bytes([n]) if n < 0x80 else bytes([n & 0x7F | 0x80]) + varint(n >> 7)


def field(number: int, value: bytes | int | float) -> bytes:
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def good_model() -> bytes:
    return trained().serialized_model_proto()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"\x08" + b"\xff" * 10 + b"\x01", "number of more than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "number of more than 64 bits"),
        (b"\x08\xff", "ends within a number"),
        (b"\x0a" + b"\x80" * 9 + b"\x01", "9223372036854775808 bytes, 0 are left"),
        (b"\x0a\x05abcd", "5 bytes, 4 are left"),
        (b"\x02\x01x", "field number 0"),
        (varint(1 << 32 | 2) + b"\0", "field number 536870912"),
        (b"\x0b", "wire type 3"),
        (b"\x0c", "wire type 4"),
        (b"\x0e", "wire type 6"),
        (b"\x0f", "wire type 7"),
        (b"\x08\x01", "field 1 has wire type 0"),
        (b"\xf1\x01" + bytes(7), "field 30 has 8 bytes, 7 are left"),
        (field(1, field(1, b"\xff")), "is not UTF-8"),
        (field(1, field(1, 7)), "field 1 has wire type 0, it must be 2"),
        (field(1, field(1, b"x") + field(2, 7)), "field 2 has wire type 0, it must be 5"),
    ],
)
def test_malformed_protobuf(folder, bad, message):
    path = folder / "malformed"
    path.write_bytes(good_model() + bad)
    with pytest.raises(TokenizerError, match=f"malformed protobuf: .*{message}"):
        open_tokenizer(path)


def test_unknown_fields_are_stepped_over(folder):
    path = folder / "more"
    more = b"\xf1\x01" + bytes(8) + field(31, b"abc") + field(32, 5) + field(33, 1.5)
    path.write_bytes(more[10:] + good_model() + more + field(3, more))
    with pytest.raises(TokenizerError):  # a file that begins with field 31 looks like nothing
        open_tokenizer(path)
    path.write_bytes(good_model() + more + field(3, more))
    assert open_tokenizer(path).encode("the quick") == trained().encode("the quick")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (field(2, field(3, 1)), UnsupportedError, "type unigram"),
        (field(2, field(3, 9)), UnsupportedError, "type number 9"),
        (field(2, field(24, 1)), UnsupportedError, "treat_whitespace_as_suffix"),
        (field(3, field(5, 0)), UnsupportedError, "escape_whitespaces"),
        (field(3, field(1, b"nmt_nfkc") + field(2, b"x")), UnsupportedError, "normalizer 'nmt_nfkc'"),
        (field(5, field(2, b"x")), UnsupportedError, "normalizer 'identity'"),
        (field(1, b""), TokenizerError, "piece 420 is empty"),
        (field(1, field(1, "\u2581the".encode())), TokenizerError, "so is tokens"),
        (field(1, field(1, b"<u>") + field(3, 2)), TokenizerError, "2 UNKNOWN"),
        (field(1, field(1, b"<0xGG>") + field(3, BYTE)), TokenizerError, "<0xGG>"),
        (field(1, field(1, b"xyz") + field(2, float("nan"))), TokenizerError, r"scores\[420\] is nan"),
        (field(1, field(1, b"xyz") + field(3, 1 << 63)), TokenizerError, "type 255"),
    ],
)
def test_a_sentencepiece_model_that_is_refused(folder, change, error, message):
    path = folder / "refused"
    path.write_bytes(good_model() + change)
    with pytest.raises(error, match=f"refused.*{message}"):
        open_tokenizer(path)


def test_a_normalizer_that_changes_nothing_may_have_any_name(folder):
    path = folder / "named"
    path.write_bytes(good_model() + field(3, field(1, b"user_defined")))
    assert open_tokenizer(path).encode("the quick") == trained().encode("the quick")


def test_more_pieces_than_any_vocabulary_has(folder, monkeypatch):
    monkeypatch.setattr("numpy_llama.checkpoint.tokenizers.sentencepiece_file.MAX_TOKENS", 419)
    with pytest.raises(ResourceLimitError, match="more than 419 pieces"):
        open_tokenizer(sentencepiece_file(folder))


# ---------------------------------------------------------------- tiktoken


@cache
def ranks() -> list[bytes]:
    """By tiktoken's rule: the vocabulary of a trained byte-level BPE in the order of its merges."""
    metadata = byte_level_metadata("llama-bpe")
    chars = {spelled(bytes([byte])): byte for byte in range(256)}
    made = ["".join(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    return [bytes([byte]) for byte in range(256)] + [bytes(map(chars.get, text)) for text in made]


def tiktoken_file(folder: Path, lines: list[bytes] | None = None) -> Path:
    path = folder / "tokenizer.tiktoken"
    if lines is None:
        lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks())]
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def test_tiktoken_ranks(folder):
    tokenizer = open_tokenizer(tiktoken_file(folder))
    table = {token: rank for rank, token in enumerate(ranks())}
    reference = tiktoken.Encoding("x", pat_str=WORDS["llama-bpe"], mergeable_ranks=table, special_tokens={})

    @given(text=TEXTS)
    def compare(text):
        assert tokenizer.encode(text) == reference.encode_ordinary(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text

    compare()
    n = len(table)
    assert tokenizer.vocab_size == n + 256
    assert tokenizer.bos_id == n and tokenizer.add_bos and not tokenizer.add_space
    assert tokenizer.eos_ids == (n + 1, n + 8, n + 9)
    names = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"]
    assert [tokenizer.control_tokens[name] - n for name in names] == [0, 1, 6, 7, 8]
    assert tokenizer.control_tokens["<|python_tag|>"] == n + 10
    assert len(tokenizer.control_tokens) == 256 and tokenizer.tokens[-1] == "<|reserved_special_token_247|>"


@pytest.mark.parametrize(
    ("at", "line"),
    [
        (300, b"no-space"),
        (300, b"!?=a 300"),
        (300, b"YWE 300"),  # no padding
        (300, b"e!np6 300"),
        (300, base64.b64encode(b"zzz") + b" -1"),
        (300, base64.b64encode(b"zzz") + b" 299"),
        (300, base64.b64encode(b"zzz") + b" 301"),
        (300, base64.b64encode(b"zzz") + b" 1099511627776"),
        (300, base64.b64encode(b"zzz") + b" " + b"9" * 5000),
        (300, base64.b64encode(b"zzz") + b" 0300"),
        (300, base64.b64encode(b"zzz") + b"  300"),
        (300, base64.b64encode(b"a") + b" 300"),  # there already
        (300, base64.b64encode(b"a" * 600) + b" 300"),
        (300, b" 300"),
        (300, b""),
    ],
)
def test_a_line_that_is_no_token(folder, at, line):
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(ranks())]
    with pytest.raises(TokenizerError, match=f"line {at + 1} is b'.*wanted a token in base64"):
        open_tokenizer(tiktoken_file(folder, [*lines[:at], line, *lines[at + 1 :]]))


def test_every_byte_must_have_a_rank(folder):
    tokens = [token for token in ranks() if token != b"\xf1"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    with pytest.raises(TokenizerError, match="no token for byte 0xF1"):
        open_tokenizer(tiktoken_file(folder, lines))


def test_a_word_that_is_a_token_is_taken_whole(folder):
    """tiktoken looks a word up before it merges: Llama 3 has 695 tokens that no merging makes."""
    extra = [*ranks(), b"zqjx"]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(extra)]
    tokenizer = open_tokenizer(tiktoken_file(folder, lines))
    again = tokenizer_from_gguf(tokenizer.metadata, "again")
    for tok in (tokenizer, again):
        assert tok.encode("zqjx") == [len(ranks())]
        assert len(tok.encode("zqjxa")) == 5


# ---------------------------------------------------------------- tokenizer.json


SPLITS = {
    "gpt-2": {},
    "llama-bpe": {},
    "smollm": {},
    # Other people's patterns, under no name in GGUF; the last leaves gaps.
    "one digit": {"Regex": r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"},
    "gaps": {"Regex": r"\p{L}+|[0-9]{2}"},
}
ADDED = ["<think", "<thinker>", "\n\n ", "\u00e9 "]


def split(name: str):
    if not SPLITS[name]:
        return pre_tokenizer(name)
    pattern = tokenizers.Regex(SPLITS[name]["Regex"])
    steps = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


@cache
def byte_level_json(name: str, ignore_merges: bool = False) -> str:
    """Trained by `tokenizers`: two control tokens that it finds itself, four others added to be found."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = split(name)
    trainer = trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in ADDED])
    tokenizer.add_special_tokens(["<|begin_of_text|>", "[INST]", "<|im_end|>"])
    return tokenizer.to_str()


def without_special(text: str) -> tokenizers.Tokenizer:
    """The judge: the same tokenizer that takes the names of its special tokens for text."""
    value = json.loads(text)
    value["added_tokens"] = [token for token in value["added_tokens"] if not token["special"]]
    return tokenizers.Tokenizer.from_str(json.dumps(value))


def write_json(folder: Path, value) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


ADDED_TEXTS = st.lists(TEXTS | st.sampled_from(ADDED), max_size=4).map("".join)


@pytest.mark.parametrize("ignore_merges", [False, True])
@pytest.mark.parametrize("name", SPLITS)
def test_byte_level_json(folder, name, ignore_merges):
    source = byte_level_json(name, ignore_merges)
    tokenizer, reference = open_tokenizer(write_json(folder, source)), without_special(source)

    @given(text=ADDED_TEXTS)
    @example(text="<thinker><think").via("the longest of several")
    def compare(text):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.decode(ids) == text

    compare()
    assert tokenizer.control_tokens.keys() == {"<|begin_of_text|>", "[INST]", "<|im_end|>"}
    assert tokenizer.bos_id is None and not tokenizer.add_bos
    assert tokenizer.eos_ids == (tokenizer.control_tokens["<|im_end|>"],)


METASPACE = {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": "first", "split": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}
SPACES = {  # normalizer, pre_tokenizer
    "Llama 2": ({"type": "Sequence", "normalizers": [PREPEND, REPLACE]}, None),
    "no prefix": (REPLACE, None),
    "Mistral": (None, METASPACE),
    "always": (None, METASPACE | {"prepend_scheme": "always"}),
    "never": (None, METASPACE | {"prepend_scheme": "never"}),
}
LLAMA2_DECODER = [
    {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "},
    {"type": "ByteFallback"},
    {"type": "Fuse"},
    {"type": "Strip", "content": " ", "start": 1, "stop": 0},
]


@cache
def like_sentencepiece_json(name: str) -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "[INST]"]
    trainer = trainers.BpeTrainer(vocab_size=700, show_progress=False, special_tokens=specials)
    tokenizer.train_from_iterator([text for text in CORPUS for text in text.split("  ")], trainer)
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = [token for token in value["added_tokens"] if "<0x" not in token["content"]]
    value["normalizer"], value["pre_tokenizer"] = SPACES[name]
    return json.dumps(value)


@pytest.mark.parametrize("name", SPACES)
def test_json_like_sentencepiece(folder, name):
    source = like_sentencepiece_json(name)
    tokenizer, reference = open_tokenizer(write_json(folder, source)), without_special(source)

    @given(text=TEXTS)
    @example(text=" fox").via("a prefix that Metaspace does not put")
    @example(text="\u2581fox").via("the same")
    @example(text="").via("no prefix before nothing")
    def compare(text):
        ids = tokenizer.encode(text)
        assert ids == reference.encode(text, add_special_tokens=False).ids
        if not (name == "Mistral" or name == "always") or text[:1] not in (" ", "\u2581"):
            assert tokenizer.decode(ids) == text.replace("\u2581", " ")

    compare()
    assert tokenizer.add_space == (name not in ("no prefix", "never"))
    assert tokenizer.control_tokens == {"<unk>": 0, "<s>": 1, "</s>": 2, "[INST]": 259}
    assert tokenizer.bos_id == 1 and tokenizer.eos_ids == (2,)


def test_merges_in_both_spellings(folder):
    value = json.loads(byte_level_json("llama-bpe"))
    ids = open_tokenizer(write_json(folder, value)).encode(CORPUS[0])
    merges = value["model"]["merges"]
    assert isinstance(merges[0], list)
    value["model"]["merges"] = [" ".join(merge) for merge in merges]
    assert open_tokenizer(write_json(folder, value)).encode(CORPUS[0]) == ids


def changed(value: dict, path: str, new) -> dict:
    """A deep copy with one entry replaced, "model.merges.3" for example."""
    value = json.loads(json.dumps(value))
    *keys, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = value
    for key in keys:
        inner = inner[key]
    inner[last] = new(inner[last]) if callable(new) else new
    return value


def added(**values) -> dict:
    return {"normalized": False, "lstrip": False, "rstrip": False, "single_word": False} | values


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "[INST]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [],
    "special_tokens": {},
}
EOS_TOO = [*TEMPLATE["single"], {"SpecialToken": {"id": "<|im_end|>", "type_id": 0}}]


@pytest.mark.parametrize(
    "steps", [TEMPLATE, {"type": "Sequence", "processors": [{"type": "ByteLevel"}, TEMPLATE]}]
)
def test_bos_of_the_post_processor(folder, steps):
    value = json.loads(byte_level_json("gpt-2")) | {"post_processor": steps}
    tokenizer = open_tokenizer(write_json(folder, value))
    assert tokenizer.bos_id == tokenizer.control_tokens["[INST]"] and tokenizer.add_bos


@pytest.mark.parametrize(
    ("path", "new", "error", "message"),
    [
        ("model.type", "Unigram", UnsupportedError, "type 'Unigram'"),
        ("model.type", "WordPiece", UnsupportedError, "type 'WordPiece'"),
        ("model.type", 7, TokenizerError, "type is 7"),
        ("model", None, TokenizerError, "JSON, but no tokenizer.json"),
        ("model", [], TokenizerError, "model is"),
        ("model.dropout", 0.1, UnsupportedError, "dropout = 0.1"),
        ("model.continuing_subword_prefix", "##", UnsupportedError, "continuing_subword_prefix"),
        ("model.end_of_word_suffix", "</w>", UnsupportedError, "end_of_word_suffix"),
        ("model.vocab", [], TokenizerError, "vocab"),
        ("model.vocab.a", 1 << 31, TokenizerError, "'a' has id 2147483648, wanted 0 to 1048575"),
        ("model.vocab.a", -1, TokenizerError, "'a' has id -1, wanted 0"),
        ("model.vocab.a", "1", TokenizerError, "token 'a' has id '1'"),
        ("model.vocab.a", True, TokenizerError, "token 'a' has id True"),
        ("model.vocab.a", 3, TokenizerError, "has id 3"),
        ("model.merges.3", "zz yy", TokenizerError, r"merges\[3\] is 'zz yy'"),
        ("model.merges.3", "a", TokenizerError, r"merges\[3\] is 'a'"),
        ("model.merges.3", "a b c", TokenizerError, r"merges\[3\] is 'a b c'"),
        ("model.merges.3", ["a", 7], TokenizerError, r"merges\[3\] is \['a', 7\]"),
        ("model.merges.3", ["a"], TokenizerError, r"merges\[3\] is \['a'\]"),
        ("model.merges.3", {}, TokenizerError, r"merges\[3\] is \{\}"),
        ("model.merges", None, TokenizerError, "no merges"),
        ("added_tokens.0.id", 3, TokenizerError, "added token '<think' has id 3"),
        ("added_tokens.0.id", 1 << 31, TokenizerError, "'<think' has id 2147483648, tokenizers gives it"),
        ("added_tokens.0.content", 3, TokenizerError, "content is 3"),
        ("added_tokens.0.lstrip", 1, TokenizerError, "lstrip is 1, wanted bool"),
        ("added_tokens", lambda tokens: [*tokens, tokens[0]], TokenizerError, "added token '<think'"),
        ("added_tokens", [7], FormatError, "wanted a JSON object"),
        ("normalizer", {"type": "NFC"}, UnsupportedError, "normalizer .*NFC"),
        ("normalizer", {"type": "Sequence", "steps": [{"type": "Lowercase"}]}, UnsupportedError, "Lowercase"),
        ("normalizer", {"type": "Sequence"}, TokenizerError, "without a list of steps"),
        ("pre_tokenizer.pretokenizers.1.add_prefix_space", True, UnsupportedError, "add_prefix_space"),
        ("pre_tokenizer.pretokenizers.0.behavior", "Removed", UnsupportedError, "Removed"),
        ("pre_tokenizer.pretokenizers.0.invert", True, UnsupportedError, "invert"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"String": "x"}, UnsupportedError, "String"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "(x"}, UnsupportedError, "pattern '.x' cannot"),
        ("pre_tokenizer.pretokenizers.0.pattern", {"Regex": "[a&&[b]]"}, UnsupportedError, "cannot be used"),
        ("pre_tokenizer.pretokenizers.0", {"type": "Punctuation"}, UnsupportedError, "Punctuation"),
        ("pre_tokenizer", {"type": "Whitespace"}, UnsupportedError, "byte_fallback"),
        ("pre_tokenizer", None, UnsupportedError, "byte_fallback"),
        ("decoder", {"type": "WordPiece"}, UnsupportedError, "decoder 'WordPiece'"),
        ("decoder", {"type": []}, UnsupportedError, r"decoder \[\]"),
        ("post_processor", TEMPLATE | {"single": [7, *TEMPLATE["single"]]}, UnsupportedError, "adds BOS"),
        ("added_tokens.0.content", "\ud800", TokenizerError, "ud800"),
        ("added_tokens.3.content", "\ud800", TokenizerError, "ud800"),
        ("post_processor", {"type": "BertProcessing"}, UnsupportedError, "BertProcessing"),
        ("post_processor", TEMPLATE | {"single": EOS_TOO}, UnsupportedError, "LLaMA's adds BOS"),
        ("post_processor", TEMPLATE | {"single": [{"SpecialToken": {"id": "<none>"}}, {"Sequence": {}}]},
         TokenizerError, "'<none>', no token"),
    ],
)  # fmt: skip
def test_a_byte_level_json_that_is_refused(folder, path, new, error, message):
    good = json.loads(byte_level_json("llama-bpe", True))
    with pytest.raises(error, match=message):
        open_tokenizer(write_json(folder, changed(good, path, new)))


@pytest.mark.parametrize(
    ("path", "new", "error", "message"),
    [
        ("model.byte_fallback", False, UnsupportedError, "byte_fallback"),
        ("model.ignore_merges", True, UnsupportedError, "ignore_merges"),
        ("model.vocab.<0x41>", 1 << 20, TokenizerError, "'<0x41>' has id 1048576, wanted 0 to 1048575"),
        ("model.merges.0", "a zz", TokenizerError, r"merges\[0\] is 'a zz'"),
        ("normalizer", {"type": "Precompiled"}, UnsupportedError, "Precompiled"),
        ("normalizer", {"type": "Sequence", "normalizers": [REPLACE, PREPEND]}, UnsupportedError, "Prepend"),
        ("pre_tokenizer", METASPACE, UnsupportedError, "with pre_tokenizer .*Metaspace"),
        ("pre_tokenizer", {"type": "WhitespaceSplit"}, UnsupportedError, "WhitespaceSplit"),
    ],
)
def test_a_json_like_sentencepiece_that_is_refused(folder, path, new, error, message):
    good = json.loads(like_sentencepiece_json("Llama 2"))
    with pytest.raises(error, match=message):
        open_tokenizer(write_json(folder, changed(good, path, new)))


def test_a_byte_without_a_token(folder):
    """As if it were not there, unless an unk_token stands for it."""
    value = json.loads(byte_level_json("gpt-2"))
    vocab = value["model"]["vocab"]
    rest = sorted({*vocab} - {spelled(b"\xf1")}, key=vocab.get)
    value["model"]["vocab"] = {text: i for i, text in enumerate(rest)}
    for i, token in enumerate(value["added_tokens"], len(rest)):
        token["id"] = i
    tokenizer = open_tokenizer(write_json(folder, value))
    assert tokenizer.encode("a\U00041234b") == without_special(json.dumps(value)).encode("a\U00041234b").ids
    assert len(tokenizer.encode("\U00041234")) == 3
    value["model"]["unk_token"] = "a"
    with pytest.raises(UnsupportedError, match="an unk_token in its place"):
        open_tokenizer(write_json(folder, value))


def test_a_piece_that_scores_would_make_and_merges_do_not(folder):
    value = json.loads(like_sentencepiece_json("Mistral"))
    left, right = value["model"]["merges"].pop()
    with pytest.raises(UnsupportedError, match="ranks do not make token"):
        open_tokenizer(write_json(folder, value))
    del value["model"]["vocab"][left + right]
    open_tokenizer(write_json(folder, value))


def test_only_a_control_token_is_bos(folder):
    path = folder / "named"
    path.write_bytes(good_model() + field(2, field(46, "\u2581the".encode())))
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    assert reference.bos_id() == -1
    assert open_tokenizer(path).bos_id in (None, 1)  # GGUF's form cannot say that <s> is not BOS


def test_metaspace_that_splits_is_refused(folder):
    value = json.loads(like_sentencepiece_json("Mistral"))
    with pytest.raises(UnsupportedError, match=r"Metaspace.*'split': True"):
        open_tokenizer(write_json(folder, changed(value, "pre_tokenizer.split", True)))


def test_a_pattern_without_end_is_stopped(folder, monkeypatch):
    monkeypatch.setattr(pretokenizer, "PATTERN_SECONDS", 0.05)
    value = json.loads(byte_level_json("one digit"))
    value["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": r"(?:(?:a?){25}a{25}|(?:a|aa)+)+!"}
    tokenizer = open_tokenizer(write_json(folder, value))
    with pytest.raises(TokenizerError, match="pattern takes longer"):
        tokenizer.encode("a" * 60 + "b")


# ---------------------------------------------------------------- llama2.c


def llama2c_file(folder: Path, metadata: dict, cut: int | None = None) -> Path:
    """As llama2.c's tokenizer.py writes a vocabulary."""
    out = struct.pack("<i", max(map(len, metadata["tokenizer.ggml.tokens"])))
    for text, score in zip(
        metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"].tolist(), strict=True
    ):
        text = f"\n{text}\n" if text in ("<s>", "</s>") else text
        data = text.replace("\u2581", " ").encode()
        out += struct.pack("<fi", score, len(data)) + data
    path = folder / "tokenizer.bin"
    path.write_bytes(out[:cut])
    return path


def plain_metadata() -> dict:
    """Without control tokens but the usual ones: the format has no place for them."""
    model = trained(control_symbols="")
    n = range(model.vocab_size())
    return {
        "tokenizer.ggml.tokens": [model.id_to_piece(i) for i in n],
        "tokenizer.ggml.scores": np.array([model.get_score(i) for i in n], np.float32),
    }


def test_llama2c(folder):
    tokenizer, reference = open_tokenizer(llama2c_file(folder, plain_metadata())), trained(control_symbols="")

    @given(text=TEXTS)
    def compare(text):
        assert tokenizer.encode(text) == reference.encode(text)

    compare()
    assert tokenizer.vocab_size == reference.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), True)
    assert tokenizer.decode(tokenizer.encode(CORPUS[1])) == CORPUS[1]


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("tokens", put(1, "<t>"), TokenizerError, "token 1 is b'<t>', it must be"),
        ("tokens", put(3, "<0x0Z>"), TokenizerError, "255 BYTE"),
        ("tokens", put(300, "x" * 65_537), TokenizerError, "token 300 at byte .* has 65537 bytes"),
        ("tokens", put(300, "<0x0A>"), TokenizerError, "so is tokens"),
        ("scores", put(300, np.inf), TokenizerError, r"scores\[300\] is inf"),
    ],
)
def test_a_llama2c_vocabulary_that_is_refused(folder, name, change, error, message):
    with pytest.raises(error, match=f"tokenizer.bin.*{message}"):
        open_tokenizer(llama2c_file(folder, altered(plain_metadata(), name, change)))


def test_a_llama2c_vocabulary_that_is_cut_or_no_text(folder):
    whole = llama2c_file(folder, plain_metadata()).read_bytes()
    with pytest.raises(
        TruncatedError, match=f"token 419 needs {len(whole)} bytes, the file has {len(whole) - 1}"
    ):
        open_tokenizer(llama2c_file(folder, plain_metadata(), -1))
    path = folder / "tokenizer.bin"
    for data, message in [
        (whole + b"\0\0\0\0\1", "token 420 needs"),
        (whole + struct.pack("<fi", 0, -1), "has -1 bytes"),
        (whole + struct.pack("<fi", 0, 1) + b"\xff", r"token 420 is b'\\xff', which is not UTF-8"),
        (whole + struct.pack("<fi", 0, 0), r"tokens\[420\] is ''"),
    ]:
        path.write_bytes(data)
        with pytest.raises((TokenizerError, TruncatedError), match=message):
            open_tokenizer(path)


# ---------------------------------------------------------------- all of them


def every_kind(folder: Path) -> dict[str, Path]:
    paths = {
        "SentencePiece": lambda place: sentencepiece_file(
            place, user_defined_symbols="hello,<|,  ,\u2581fox"
        ),
        "no extra spaces": lambda place: sentencepiece_file(place, remove_extra_whitespaces=True),
        "tiktoken": tiktoken_file,
        "JSON, custom": lambda place: write_json(place, byte_level_json("gaps", True)),
        "JSON, Llama 3": lambda place: write_json(place, byte_level_json("llama-bpe", True)),
        "JSON, Mistral": lambda place: write_json(place, like_sentencepiece_json("Mistral")),
        "llama2.c": lambda place: llama2c_file(place, plain_metadata()),
    }
    out = {}
    for i, (name, write) in enumerate(paths.items()):
        (folder / f"kind{i}").mkdir(exist_ok=True)
        out[name] = write(folder / f"kind{i}")
    return out


def test_written_into_gguf_it_is_the_same_tokenizer(folder):
    for name, path in every_kind(folder).items():
        tokenizer = open_tokenizer(path)
        (folder / "again.gguf").write_bytes(gguf_bytes(tokenizer.metadata, {}))
        again = open_tokenizer(folder / "again.gguf")
        for field_name in (
            "tokens",
            "meanings",
            "control_tokens",
            "bos_id",
            "eos_ids",
            "add_bos",
            "add_space",
        ):
            assert getattr(again, field_name) == getattr(tokenizer, field_name), (name, field_name)
        for text in [*CORPUS[:3], "  hello  <|fox|>  ", " a", "\n\n the<think>", "zqjx 12345"]:
            assert again.encode(text) == tokenizer.encode(text), name
        assert again.metadata.keys() == tokenizer.metadata.keys()
        assert {"tokenizer.ggml.merges", "tokenizer.ggml.scores"} & again.metadata.keys()
        assert RANKS not in again.metadata


def every_tokenizer(folder: Path) -> dict[str, Tokenizer]:
    """Every kind of file, and every way to put a space before a text."""
    out = {name: open_tokenizer(path) for name, path in every_kind(folder).items()}
    out["no prefix"] = open_tokenizer(sentencepiece_file(folder, add_dummy_prefix=False))
    for name in SPACES:
        out[f"JSON, {name}"] = open_tokenizer(write_json(folder, like_sentencepiece_json(name)))
    return out


# What shows at the seams: spaces before and behind, characters of several bytes, nothing.
SEAMS = st.sampled_from([" fox", "fox", " ", "  the", "the ", "\u1200", " \u1200", "\n", "", "1 2"])


def assert_streamed_as_at_once(tokenizer: Tokenizer, ids: list[int], at_start: bool) -> None:
    """Id by id, in a transcript, and at once: the bytes of the ids that are no control tokens."""
    control = tokenizer.control_tokens.values()
    data = b"".join(tokenizer.meanings[i] for i in ids if i not in control)
    if at_start and tokenizer.add_space:
        data = data.removeprefix(b" ")
    text = data.decode("utf-8", "replace")
    stream, transcript = StreamDecoder(tokenizer, at_start), Transcript(tokenizer, StopTexts([]), at_start)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == text
    assert [transcript.push(i) for i in ids] == pieces
    assert transcript.finish([], "length").completion.text == text
    assert tokenizer.decode(ids, at_start) == text
    assert not any(piece for i, piece in zip(ids, pieces, strict=True) if i in control)


def test_a_stream_with_control_tokens_anywhere_is_the_text_at_once(folder):
    """One space is dropped at the start of a text, behind any control tokens there, and no other."""
    for name, tokenizer in every_tokenizer(folder).items():
        control = min(tokenizer.control_tokens.values())
        fox, spelt_in_bytes = tokenizer.encode(" fox"), tokenizer.encode("\u1200")
        any_control = st.sampled_from(sorted(tokenizer.control_tokens.values())).map(lambda i: [i])

        @given(st.lists(any_control | SEAMS.map(tokenizer.encode), max_size=8), st.booleans())
        @example([[control], fox, [control], fox], True)
        @example([spelt_in_bytes[:-1], [control], spelt_in_bytes[-1:]], True)
        def compare(parts, at_start):
            assert_streamed_as_at_once(tokenizer, [i for part in parts for i in part], at_start)  # noqa: B023

        print(name)  # shown where one fails
        compare()


@pytest.mark.parametrize("options", SENTENCEPIECE, ids=str)
def test_control_tokens_in_a_stream_as_sentencepiece_has_them(folder, options):
    """Its own decode, of ids with control tokens among them."""
    reference, tokenizer = trained(**options), open_tokenizer(sentencepiece_file(folder, **options))
    control = sorted(i for i in tokenizer.control_tokens.values() if reference.is_control(i))

    @given(st.lists(st.sampled_from(control).map(lambda i: [i]) | SEAMS.map(tokenizer.encode), max_size=8))
    def compare(parts):
        ids = [i for part in parts for i in part]
        assert tokenizer.decode(ids) == reference.decode(ids)

    compare()


@pytest.mark.parametrize("name", ["Llama 2", "Mistral"])
def test_control_tokens_in_a_stream_as_tokenizers_has_them(folder, name):
    """Hugging Face's decoder of Llama 2, of ids with control tokens among them."""
    value = json.loads(like_sentencepiece_json(name))
    value["decoder"] = {"type": "Sequence", "decoders": LLAMA2_DECODER}
    tokenizer = open_tokenizer(write_json(folder, json.dumps(value)))
    reference = tokenizers.Tokenizer.from_str(json.dumps(value))

    @given(st.lists(st.sampled_from([[1], [2], [259]]) | SEAMS.map(tokenizer.encode), max_size=8))
    def compare(parts):
        ids = [i for part in parts for i in part]
        assert tokenizer.decode(ids) == reference.decode(ids)

    compare()


def test_a_file_is_what_it_holds_not_what_it_is_called(folder):
    for name, path in every_kind(folder).items():
        other = folder / "tokenizer.anything"
        other.write_bytes(path.read_bytes())
        assert open_tokenizer(other).encode(CORPUS[0]) == open_tokenizer(path).encode(CORPUS[0]), name


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "0 bytes; wanted a tokenizer"),
        (b'{"version": "1.0"}', "is JSON, but no tokenizer.json"),
        (b"version https://git-lfs.github.com/spec/v1\noid", "Git LFS pointer"),
        (b"<!DOCTYPE html>", "an HTML page"),
        (b"PK\x03\x04", "a zip archive"),
        (b'\xef\xbb\xbf{"version"', "a byte order mark; save the file as UTF-8 without one"),
        (b"\x80\x02}", "a Python pickle"),
        (b"hello world", "begins with b'hello world': unknown"),
        (b"\xff" * 100, "unknown; wanted a tokenizer"),
    ],
)
def test_what_is_no_tokenizer(folder, data, message):
    path = folder / "tokenizer.model"
    path.write_bytes(data)
    with pytest.raises(TokenizerError, match=message):
        open_tokenizer(path)


def test_a_file_that_is_too_large(folder, monkeypatch):
    monkeypatch.setattr("numpy_llama.checkpoint.tokenizers.MAX_BYTES", 1000)
    with pytest.raises(TokenizerError, match="at most 1000 are read"):
        open_tokenizer(write_json(folder, byte_level_json("gpt-2")))


# ---------------------------------------------------------------- folders


def test_a_file_beside_the_tokenizer_may_be_as_large(folder):
    """A tokenizer_config.json lists every added token: 2 MiB here, where config.json may have one."""
    write_json(folder, byte_level_json("gpt-2"))
    config = {"bos_token": "<s>", "chat_template": "{{ bos_token }}", "notes": "x" * (2 << 20)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert tokenizer_of_folder(folder).vocab_size and chat_template(folder) == "{{ bos_token }}"


def test_the_tokenizer_lies_in_the_folder_or_beside_it(tmp_path):
    (tmp_path / "7B").mkdir()
    with pytest.raises(TokenizerError, match=r"neither .*7B/tokenizer.model nor .*7B/tokenizer.json nor"):
        find_tokenizer(tmp_path / "7B")
    beside = sentencepiece_file(tmp_path)
    assert find_tokenizer(tmp_path / "7B") == beside
    inside = sentencepiece_file(tmp_path / "7B")
    assert find_tokenizer(tmp_path / "7B") == inside


def beside(folder: Path, **files) -> Path:
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_a_folder_without_a_tokenizer(tmp_path):
    sentencepiece_file(tmp_path)
    (tmp_path / "model").mkdir()
    with pytest.raises(TokenizerError, match=r"neither tokenizer.json nor tokenizer.model"):
        tokenizer_of_folder(tmp_path / "model")


def test_tokenizer_json_goes_before_tokenizer_model(tmp_path):
    sentencepiece_file(tmp_path)
    assert tokenizer_of_folder(tmp_path).add_space
    write_json(tmp_path, byte_level_json("gpt-2"))
    assert not tokenizer_of_folder(tmp_path).add_space


def test_what_stands_beside_a_tokenizer(tmp_path):
    write_json(tmp_path, byte_level_json("llama-bpe", True))
    ids = tokenizer_of_folder(tmp_path).control_tokens
    bos, inst, im_end = ids["<|begin_of_text|>"], ids["[INST]"], ids["<|im_end|>"]
    assert tokenizer_of_folder(tmp_path).eos_ids == (im_end,)

    beside(tmp_path, config={"bos_token_id": bos, "eos_token_id": [inst, 5]})
    found = tokenizer_of_folder(tmp_path)
    assert (found.bos_id, found.eos_ids, found.add_bos) == (bos, (inst, 5, im_end), False)

    beside(tmp_path, generation_config={"eos_token_id": 7})
    assert tokenizer_of_folder(tmp_path).eos_ids == (inst, 7, im_end)
    beside(tmp_path, generation_config={"eos_token_id": [8, inst]})
    assert tokenizer_of_folder(tmp_path).eos_ids == (inst, 8, im_end)

    # Chat templates write the EOS that the tokenizer's own files name: it stands first.
    beside(
        tmp_path, special_tokens_map={"eos_token": {"content": "<|begin_of_text|>"}, "bos_token": "[INST]"}
    )
    found = tokenizer_of_folder(tmp_path)
    assert (found.bos_id, found.eos_ids) == (inst, (bos, 8, inst, im_end))
    beside(tmp_path, tokenizer_config={"eos_token": "<|im_end|>", "bos_token": None, "add_bos_token": True})
    found = tokenizer_of_folder(tmp_path)
    assert (found.bos_id, found.eos_ids, found.add_bos) == (inst, (im_end, 8, inst), True)


def test_added_tokens(tmp_path):
    sentencepiece_file(tmp_path)
    beside(tmp_path, added_tokens={"<pad>": 421, "<word>": 420})
    beside(tmp_path, tokenizer_config={"pad_token": "<pad>"})
    found = tokenizer_of_folder(tmp_path)
    assert found.vocab_size == 422
    assert found.control_tokens["<pad>"] == 421 and 421 not in found.encode("the<pad>")
    assert found.encode("the<word>fox")[:2] == [*found.encode("the"), 420]
    assert found.decode(found.encode("the<word>fox")) == "the<word> fox"  # fox is a text of its own

    decoder = {"422": {"content": "<tool>", "special": True}, "420": {"content": "<word>", "special": True}}
    beside(tmp_path, tokenizer_config={"added_tokens_decoder": decoder})
    found = tokenizer_of_folder(tmp_path)
    assert {found.control_tokens["<tool>"], found.control_tokens["<word>"]} == {420, 422}
    assert found.encode("<pad>")[-1] == 421


def test_a_default_in_config_json_does_not_overrule_the_tokenizer(tmp_path):
    sentencepiece_file(tmp_path)
    plain = tokenizer_of_folder(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 7, "eos_token_id": 8}))
    with_defaults = tokenizer_of_folder(tmp_path)
    assert (with_defaults.bos_id, with_defaults.eos_ids) == (plain.bos_id, plain.eos_ids)


@pytest.mark.parametrize(
    ("files", "error", "message"),
    [
        ({"added_tokens": {"<x>": 421}}, TokenizerError, "'<x>' has id 421, the vocabulary has 420 tokens"),
        ({"tokenizer_config": {"extra_special_tokens": [7]}}, FormatError, "wanted a JSON object"),
        ({"tokenizer_config": {"extra_special_tokens": "x"}}, ConfigError, "extra_special_tokens is 'x'"),
        ({"added_tokens": {"<x>": -1}}, TokenizerError, "has id -1"),
        ({"added_tokens": {"<x>": "1"}}, TokenizerError, "has id '1'"),
        ({"added_tokens": {"<x>": [], "<y>": 420}}, TokenizerError, r"has id \[\]"),
        ({"added_tokens": {"<x>": 3}}, MismatchError, "'<x>' has id 3, which is "),
        ({"tokenizer_config": {"added_tokens_decoder": {"x": {"content": "<x>"}}}}, TokenizerError, "id 'x'"),
        ({"generation_config": {"bos_token_id": 420}}, MismatchError, "wanted ids of tokens, 0 to 419"),
        ({"generation_config": {"eos_token_id": ["</s>"]}}, MismatchError, "wanted ids of tokens"),
    ],
)
def test_files_beside_that_do_not_fit(tmp_path, files, error, message):
    sentencepiece_file(tmp_path)
    with pytest.raises(error, match=message):
        tokenizer_of_folder(beside(tmp_path, **files))


SPECIAL = [(file, key) for file in ("config", "generation_config") for key in ("bos", "eos")]


@pytest.mark.parametrize("known", [True, False])  # whether the tokenizer's own files say it too
@pytest.mark.parametrize(("file", "key"), SPECIAL)
def test_one_rule_for_every_special_id(tmp_path, file, key, known):
    """For every file and key, used or not. No id at all is none. BOS must be a token.

    An end that no token has is left out: nothing makes it. What is no whole number is an error.
    """
    options = {} if known else {"bos_id": -1, "eos_id": 1}
    sentencepiece_file(tmp_path, **options)
    plain = tokenizer_of_folder(tmp_path)

    def found(value):
        tokenizer = tokenizer_of_folder(beside(tmp_path, **{file: {f"{key}_token_id": value}}))
        return tokenizer.bos_id, tokenizer.eos_ids

    for nothing in (None, []):
        assert found(nothing) == (plain.bos_id, plain.eos_ids)
    for token in (0, 419, [0, 419]):
        found(token)
    message = f"{file}.json: {key}_token_id is .*, wanted ids of tokens, 0 to 419"
    for wrong in (["1"], [None], [[1]], [1.0], [True]):
        with pytest.raises(MismatchError, match=message):
            found(wrong)
    for beyond in (-1, 420, 1 << 31, 1 << 70, [420], [-1]):
        if key == "eos":
            assert found(beyond) == (plain.bos_id, plain.eos_ids)
            assert found([1, beyond] if isinstance(beyond, int) else [1, *beyond]) == found([1])
        else:
            with pytest.raises(MismatchError, match=message):
                found(beyond)


# ---------------------------------------------------------------- merging


def random_merges(rng: np.random.Generator) -> list[tuple[str, str]]:
    """Merges of the letters a, b, c. A merge takes two tokens that exist; their union may exist too."""
    tokens, merges = ["a", "b", "c"], []
    for _ in range(rng.integers(1, 14)):
        pair = tuple(rng.choice(tokens, 2).tolist())
        if pair not in merges:
            merges.append(pair)
        if "".join(pair) not in tokens:
            tokens.append("".join(pair))
    if rng.random() < 0.2:
        rng.shuffle(merges)
    return [tuple(merge) for merge in merges]


@given(seed=st.integers(0, 2**32 - 1))
def test_what_ranks_can_say_they_say_exactly(seed):
    """The claim behind `order_of_merging`: where it agrees, tiktoken does what `tokenizers` does."""
    rng = np.random.default_rng(seed)
    for _ in range(20):
        compare_rules(random_merges(rng), rng)


def compare_rules(merges: list[tuple[str, str]], rng: np.random.Generator) -> None:
    try:
        order = order_of_merging(merges, "x")
    except UnsupportedError:
        return
    texts = dict.fromkeys(["a", "b", "c", *map("".join, merges)])
    by_list = models.BPE({text: i for i, text in enumerate(texts)}, merges)
    for _ in range(20):
        text = "".join(rng.choice(list("abc"), rng.integers(1, 24)))
        expected = [token.value for token in by_list.tokenize(text)]
        assert by_rank(text, order) == expected, (merges, text)


def by_rank(text: str, rank: dict[str, int]) -> list[str]:
    """tiktoken's rule in three lines: merge the neighbours whose union has the lowest rank, the leftmost."""
    parts = list(text)
    while found := [(rank[u], i) for i, u in enumerate(map("".join, pairwise(parts))) if u in rank]:
        _, i = min(found)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def test_ranks_can_say_most_lists_but_not_all():
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        try:
            order_of_merging(random_merges(rng), "x")
        except UnsupportedError:
            refused += 1
    assert 20 < refused < 300


@pytest.mark.parametrize(
    ("merges", "expected"),
    [
        ([("a", "b"), ("ab", "c")], ["ab", "abc"]),
        ([("b", "c"), ("a", "b"), ("ab", "c")], None),  # ranks make abc of a + bc
        # Nothing makes abcde: once there are ab and de, c stands between them.
        ([("a", "b"), ("d", "e"), ("b", "c"), ("bc", "de"), ("a", "bcde")], ["ab", "de", "bc", "bcde"]),
        ([("a", "a"), ("aa", "a")], ["aa", "aaa"]),
        ([("a", "a"), ("a", "aa")], None),  # ranks make aaa of aa + a
        ([("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")], ["bc", "ab", "abc"]),
        ([("ab", "c"), ("a", "b")], ["abc", "ab"]),  # from a part that stands behind it
    ],
)
def test_ranks_of_merges(merges, expected):
    if expected is None:
        with pytest.raises(UnsupportedError, match="ranks do not make token"):
            order_of_merging(merges, "x")
    else:
        assert list(order_of_merging(merges, "x")) == expected


def test_unions_of_which_the_list_is_silent():
    assert list(order_of_merging([("a", "b")], "x", ["abcd"])) == ["ab"]
    with pytest.raises(UnsupportedError, match="'abc'"):
        order_of_merging([("a", "b")], "x", ["abc"])


def test_merges_beyond_the_limits(monkeypatch):
    long = [("a" * n, "a") for n in range(1, 600)]
    with pytest.raises(TokenizerError, match="more than 512 characters"):
        order_of_merging(long, "x")
    monkeypatch.setattr(bpe, "MAX_UNPROVEN", 0)
    with pytest.raises(UnsupportedError, match="1 tokens are not what their merges make"):
        order_of_merging([("a", "b"), ("d", "e"), ("b", "c"), ("bc", "de"), ("a", "bcde")], "x")


def test_a_word_may_be_encoded_in_parts(folder, monkeypatch):
    """Every chunk gives the ids of the whole, however small it is."""
    tokenizers_ = {name: open_tokenizer(path) for name, path in every_kind(folder).items()}

    @given(seed=st.integers(0, 2**32 - 1), chunk=st.integers(1, 50))
    def compare(seed, chunk):
        rng = np.random.default_rng(seed)
        pieces = [
            "the",
            "e",
            "t",
            "th",
            "quick",
            "q",
            "_",
            "\u65e5",
            "\U0001f999",
            " ",
            "hello",
            "<|",
            "\u2581fox",
        ]
        text = "".join(rng.choice(pieces, rng.integers(1, 120)))
        for name, tokenizer in tokenizers_.items():
            expected = tokenizer.encode(text)
            with monkeypatch.context() as patch:
                patch.setattr(bpe, "CHUNK", chunk)
                assert tokenizer.encode(text) == expected, name

    compare()


@pytest.mark.parametrize("chunk", range(1, 27))
def test_what_follows_may_change_what_came_long_before(folder, monkeypatch, chunk):
    """yz merges first, then xy, wx and so on: whether ab or bc is a token, the last letter says."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    pairs = [pair.encode() for pair in map("".join, pairwise(letters))]
    tokens = [bytes([byte]) for byte in range(256)] + pairs[::-1]
    lines = [base64.b64encode(token) + b" %d" % rank for rank, token in enumerate(tokens)]
    tokenizer = open_tokenizer(tiktoken_file(folder, lines))
    expected = {n: tokenizer.encode(letters[:n] + letters) for n in range(27)}
    assert tokenizer.piece(tokenizer.encode(letters)[0]) == "ab"
    assert tokenizer.piece(tokenizer.encode(letters[:-1])[0]) == "a"
    monkeypatch.setattr(bpe, "CHUNK", chunk)
    assert {n: tokenizer.encode(letters[:n] + letters) for n in range(27)} == expected


def test_no_call_is_long(monkeypatch):
    """Ctrl-C is heard between two calls: none may have more than a chunk and what is done again."""
    monkeypatch.setattr(bpe, "CHUNK", 1000)
    sizes = []

    def in_threes(data: bytes) -> list[int]:
        sizes.append(len(data))
        return [3] * (len(data) // 3) + [len(data) % 3] * (len(data) % 3 > 0)

    assert bpe.in_chunks(in_threes, b"a" * 9001, [0, 1, 2, 3]) == [3] * 3000 + [1]
    assert len(sizes) == 10 and max(sizes) <= 1000 + 2 * 3 + 2


def test_added_tokens_are_limited(folder):
    names = [f"word{i}" for i in range(4097)]
    metadata = byte_level_metadata() | {
        "tokenizer.ggml.tokens": [*byte_level_metadata()["tokenizer.ggml.tokens"], *names],
        "tokenizer.ggml.token_type": np.append(
            byte_level_metadata()["tokenizer.ggml.token_type"], np.full(len(names), USER_DEFINED, np.int32)
        ),
    }
    with pytest.raises(ResourceLimitError, match="4097 tokens to be found in texts, at most 4096"):
        tokenizer_from_gguf(metadata, "x")
