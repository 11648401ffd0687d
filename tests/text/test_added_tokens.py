"""Texts cut at added tokens, with every option and every rule for spaces, against `tokenizers`, and against
transformers for the files that it writes itself."""

import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import transformers
from helpers.tokenizers import CORPUS, byte_level_metadata, sentencepiece_metadata, trained_sentencepiece
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import models, trainers

from numpy_llama.checkpoint.tokenizers import open_tokenizer, tokenizer_of_folder
from numpy_llama.errors import MismatchError, TokenizerError, UnsupportedError
from numpy_llama.text.tokenizer import CONTROL, USER_DEFINED, tokenizer_from_gguf

REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
DOUBLE = {"type": "Replace", "pattern": {"Regex": "\\A\u2581"}, "content": "\u2581\u2581"}
PREPEND = {"type": "Prepend", "prepend": "\u2581"}


def metaspace(scheme: str) -> dict:
    return {"type": "Metaspace", "replacement": "\u2581", "prepend_scheme": scheme, "split": False}


def in_turn(key: str, *steps: dict) -> dict:
    return {"type": "Sequence", key: [*steps]}


RULES = {  # normalizer, pre_tokenizer
    "Prepend": (in_turn("normalizers", PREPEND, REPLACE), None),
    "no prefix": (REPLACE, None),
    "always": (None, metaspace("always")),
    "first": (None, metaspace("first")),
    "never": (None, metaspace("never")),
    "first, replaced": (in_turn("normalizers", REPLACE), in_turn("pretokenizers", metaspace("first"))),
    "as SentencePiece": (in_turn("normalizers", REPLACE, DOUBLE), metaspace("always")),
}
ADDED = {  # text: special, options
    "<right>": (True, "rstrip"),
    "<|normalized|>": (True, "normalized"),
    "\u2581<PRE>": (True, ""),
    "<plain>": (False, ""),
    "<plain>more": (False, ""),
    "<left>": (False, "lstrip"),
    "<both>": (False, "lstrip rstrip"),
    "word": (False, "single_word"),
    "<normalized>": (False, "normalized"),
    "the fox": (False, "normalized lstrip"),
    "the": (False, "normalized rstrip single_word"),  # a token that merges make too
    " <space>": (False, ""),
    "\u2581<SUF>": (False, "normalized"),
}
SPECIAL = [text for text, (special, _) in ADDED.items() if special]
PIECES = st.sampled_from(
    [*" \t\n\u2581\u3000\x1c_.<>1a\u00e9\u4e16", "  ", "the", " the", " fox", "words", "\U0001f999", "\u0301"]
)
NAMES = st.sampled_from([*ADDED, "<s>", "</s>", "<unk>"])
CUT_TEXTS = st.lists(PIECES | NAMES | NAMES.map(lambda name: name[1:]), max_size=12).map("".join)


@cache
def base() -> dict:
    """A small tokenizer.json like SentencePiece's, without added tokens but the usual three."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("\u2581"), tokenizers.normalizers.Replace(" ", "\u2581")]
    )
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, special_tokens=specials)
    words = [*(text for text in CORPUS for text in text.split("  ")), "fox the fox"]
    tokenizer.train_from_iterator(words, trainer)
    value = json.loads(tokenizer.to_str())
    value["added_tokens"] = value["added_tokens"][:3]
    return value


def added_to(value: dict, added: dict[str, tuple[bool, str]] = ADDED) -> dict:
    value, vocab = json.loads(json.dumps(value)), value["model"]["vocab"]
    last = max([*vocab.values(), *(token["id"] for token in value["added_tokens"])])
    for text, (special, options) in added.items():
        names = ("lstrip", "rstrip", "single_word", "normalized")
        chosen = {name: name in options.split() for name in names}
        last += text not in vocab
        token = {"id": vocab.get(text, last), "content": text, "special": special}
        value["added_tokens"].append(token | chosen)
    return value


def like_sentencepiece(rule: str) -> dict:
    value = added_to(base())
    value["normalizer"], value["pre_tokenizer"] = RULES[rule]
    return value


def like_gpt2() -> dict:
    """A byte-level one: the small vocabulary for GGUF, with its merges."""
    tokens = byte_level_metadata("gpt-2")["tokenizer.ggml.tokens"]
    merges = byte_level_metadata("gpt-2")["tokenizer.ggml.merges"]
    bpe = models.BPE({text: i for i, text in enumerate(tokens)}, [tuple(m.split(" ")) for m in merges])
    tokenizer = tokenizers.Tokenizer(bpe)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
    return added_to(json.loads(tokenizer.to_str()))


def written(folder: Path, value: dict) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(value))
    return path


@pytest.mark.parametrize("rule", [*RULES, "byte-level"])
def test_a_text_is_cut_as_tokenizers_cuts_it(tmp_path, rule):
    value = like_gpt2() if rule == "byte-level" else like_sentencepiece(rule)
    tokenizer, reference = (
        open_tokenizer(written(tmp_path, value)),
        tokenizers.Tokenizer.from_str(json.dumps(value)),
    )
    again = tokenizer_from_gguf(tokenizer.metadata, "again")

    @given(text=CUT_TEXTS)
    @example(text="the<plain>fox<s>fox").via("what follows a cut")
    @example(text=" <left> \u3000<both>\x1c<right> a<normalized> <plain>more").via(
        "spaces that a token takes"
    )
    @example(text="word words_word.word").via("a word alone")
    @example(text="word\u0558 word\u200d \U00010ef6word").via("letters of a newer Unicode")
    def compare(text):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == ids
        assert again.encode(text, special=True) == ids

    compare()
    assert {*SPECIAL} <= tokenizer.control_tokens.keys()


@pytest.mark.parametrize("rule", RULES)
def test_without_special_the_control_tokens_are_text(tmp_path, rule):
    value = like_sentencepiece(rule)
    tokenizer = open_tokenizer(written(tmp_path, value))
    special = {token["content"]: token["id"] for token in value["added_tokens"] if token["special"]}
    value["added_tokens"] = [token for token in value["added_tokens"] if not token["special"]]
    value["model"]["vocab"] |= special  # the others keep their ids
    reference = tokenizers.Tokenizer.from_str(json.dumps(value))

    @given(text=CUT_TEXTS)
    def compare(text):
        assert tokenizer.encode(text) == reference.encode(text, add_special_tokens=False).ids

    compare()


# ---------------------------------------------------------------- GGUF


def gguf_with_added(**entries):
    """The small SentencePiece vocabulary with two added tokens, and one that ends a turn."""
    metadata = sentencepiece_metadata()
    more = [("<tool>", USER_DEFINED), ("<tool>s", USER_DEFINED), ("<|end|>", CONTROL)]
    kinds = np.append(metadata["tokenizer.ggml.token_type"], np.int32([kind for _, kind in more]))
    return metadata | {
        "tokenizer.ggml.tokens": [*metadata["tokenizer.ggml.tokens"], *(text for text, _ in more)],
        "tokenizer.ggml.scores": np.append(metadata["tokenizer.ggml.scores"], np.zeros(3, np.float32)),
        "tokenizer.ggml.token_type": kinds.astype(np.int32),
        **entries,
    }


PARTS = st.lists(
    st.sampled_from(["<tool>", "<tool>s", "<|end|>"]) | PIECES.map(lambda text: text * 2), max_size=9
)


@given(parts=PARTS)
def test_gguf_puts_a_space_before_every_part(parts):
    """llama.cpp's rule: each text between two tokens is a text of its own for sentencepiece."""
    tokenizer, sp = tokenizer_from_gguf(gguf_with_added(), "x"), trained_sentencepiece()
    names = {text: i for i, text in enumerate(tokenizer.tokens) if i >= sp.vocab_size()}
    expected, text = [], ""
    for part in [*parts, None]:
        if part is None or part in names:
            expected += sp.encode(text)
            expected += [] if part is None else [names[part]]
            text = ""
        else:
            text += part
    assert tokenizer.encode("".join(parts), special=True) == expected


def test_phi3_takes_the_spaces_behind_its_control_tokens():
    tokenizer = tokenizer_from_gguf(gguf_with_added(**{"general.name": "Phi-3 Mini 4k"}), "x")
    end = tokenizer.control_tokens["<|end|>"]
    assert tokenizer.encode("<|end|>\n\n fox", special=True) == [end, *tokenizer.encode("fox")]
    assert tokenizer.encode("<s> fox", special=True) == [1, *tokenizer.encode(" fox")]
    again = tokenizer_from_gguf(tokenizer.metadata, "x")
    assert again.encode("<|end|>\n fox", special=True) == [end, *tokenizer.encode("fox")]


@pytest.mark.parametrize("name", ["lstrip", "added", "symbols", "normalized"])
@pytest.mark.parametrize("wrong", [-1, 423])
def test_options_of_tokens_that_are_not_there(name, wrong):
    entries = {f"numpy_llama.tokenizer.{name}": np.array([wrong], np.int32)}
    with pytest.raises(MismatchError, match=f"tokenizer.{name} has {wrong}, the vocabulary has 423 tokens"):
        tokenizer_from_gguf(gguf_with_added(**entries), "x")


# ---------------------------------------------------------------- files as transformers 5 saves them

CONFIG = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 600}
NAMED = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
SHIPPED = {  # tokenizer_config.json of the folder that transformers reads
    "LlamaTokenizer": {"tokenizer_class": "LlamaTokenizer"},
    "LlamaTokenizer, legacy": {"tokenizer_class": "LlamaTokenizerFast", "legacy": True},
    "LlamaTokenizer, no prefix": {"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False},
    "LlamaTokenizer, BOS": {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True},
    "CodeLlamaTokenizer": {"tokenizer_class": "CodeLlamaTokenizer"},
    "PreTrainedTokenizerFast": {"tokenizer_class": "PreTrainedTokenizerFast"},
    "no class": {},
    "extra": {"extra_special_tokens": ["<extra>", "<plain>"]},
}


def folder_of(folder: Path, **files) -> Path:
    folder.mkdir(exist_ok=True)
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def assert_as_transformers(folder: Path, reference, examples: st.SearchStrategy = CUT_TEXTS) -> None:
    tokenizer = tokenizer_of_folder(folder)

    @given(text=examples)
    def compare(text):
        ids = reference.backend_tokenizer.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == ids

    compare()


@pytest.mark.parametrize("name", SHIPPED)
def test_what_transformers_saves(tmp_path, name):
    source = folder_of(
        tmp_path / "shipped",
        config=CONFIG,
        tokenizer=like_sentencepiece("Prepend"),
        tokenizer_config=NAMED | SHIPPED[name],
    )
    saved_to = folder_of(tmp_path / "saved", config=CONFIG)
    transformers.AutoTokenizer.from_pretrained(source).save_pretrained(saved_to)
    file = str(tmp_path / "saved/tokenizer.json")  # its own rule, which AutoTokenizer reads only in part
    assert_as_transformers(tmp_path / "saved", transformers.PreTrainedTokenizerFast(tokenizer_file=file))
    tokenizer, again = tokenizer_of_folder(saved_to), transformers.AutoTokenizer.from_pretrained(saved_to)
    assert tokenizer.encode("the", bos=tokenizer.add_bos) == again.encode("the")
    assert tokenizer.control_tokens.keys() >= {"<s>", "</s>", "<pad>"}


def test_what_transformers_saves_of_a_byte_level_model(tmp_path):
    source = folder_of(
        tmp_path / "a", config=CONFIG, tokenizer=like_gpt2(), tokenizer_config={"eos_token": "</s>"}
    )
    saved = transformers.AutoTokenizer.from_pretrained(source)
    saved.save_pretrained(folder_of(tmp_path / "b", config=CONFIG))
    assert_as_transformers(tmp_path / "b", saved)


SENTENCEPIECE_RULES = {  # tokenizer_config.json: where a space is put, as transformers 5 does it
    "no class": ({}, "each"),
    "LlamaTokenizer": ({"tokenizer_class": "LlamaTokenizer"}, "first"),
    "not legacy": ({"legacy": False}, "first"),
    "legacy": ({"tokenizer_class": "LlamaTokenizerFast", "legacy": True}, "each without one"),
    "no prefix": ({"tokenizer_class": "LlamaTokenizer", "add_prefix_space": False}, "none"),
}


def without_prefix(text: str) -> list[int]:
    """The ids of a text for the small SentencePiece model with add_dummy_prefix = false."""
    model = trained_sentencepiece().serialized_model_proto() + b"\x1a\x02\x18\x00"  # normalizer_spec
    return sentencepiece.SentencePieceProcessor(model_proto=model).encode(text)


@pytest.mark.parametrize("how", ["added_tokens_decoder", "added_tokens.json"])
@pytest.mark.parametrize(("config", "rule"), SENTENCEPIECE_RULES.values(), ids=SENTENCEPIECE_RULES)
def test_a_sentencepiece_model_with_added_tokens(tmp_path, config, rule, how):
    n = trained_sentencepiece().vocab_size()
    names = {"<tool>": n, "<|end|>": n + 1}
    folder = folder_of(tmp_path, tokenizer_config=config, added_tokens=names)
    if how == "added_tokens_decoder":
        decoder = {str(i): {"content": text, "normalized": True} for text, i in names.items()}
        folder_of(tmp_path, added_tokens={}, tokenizer_config=config | {how: decoder})
    (folder / "tokenizer.model").write_bytes(trained_sentencepiece().serialized_model_proto())
    tokenizer = tokenizer_of_folder(folder)
    assert tokenizer.tokens[n:] == [*names]

    @given(parts=st.lists(st.sampled_from([*names]) | PIECES, max_size=8))
    @example(parts=["<tool>", "the", "<tool>", " the", "<|end|>"])
    @example(parts=[" the", "<tool>", "\u2581the"])
    def compare(parts):
        expected, text = [], ""
        for part in [*parts, "<tool>"]:
            if part not in names:
                text += part
                continue
            begun = text[:1] in (" ", "\u2581")
            spaced = {"each": True, "each without one": not begun, "none": False}
            spaced["first"] = not begun and not expected
            expected += without_prefix(" " * spaced[rule] + text if text else "")
            expected.append(names[part])
            text = ""
        assert tokenizer.encode("".join([*parts, "<tool>"]), special=True) == expected

    compare()


def test_special_tokens_without_an_id_get_the_next_ones(tmp_path):
    """In the order in which transformers adds them: the named ones, then the further ones."""
    config = {
        "extra_special_tokens": {"image_token": "<a>"},
        "additional_special_tokens": [{"content": "<b>"}],
    }
    folder = folder_of(tmp_path, tokenizer=base(), tokenizer_config=config | {"pad_token": "<pad>"})
    tokenizer, n = tokenizer_of_folder(folder), len(base()["model"]["vocab"])
    assert {name: tokenizer.control_tokens[name] for name in ("<pad>", "<a>", "<b>")} == {
        "<pad>": n,
        "<a>": n + 1,
        "<b>": n + 2,
    }
    assert not {n, n + 1, n + 2} & {*tokenizer.encode("<pad> <a> <b>")}


def test_a_gap_in_the_ids_of_a_model_is_an_unused_id(tmp_path):
    value = base()
    vocab = {text: i + 3 * (i > 400) for text, i in value["model"]["vocab"].items()}
    value = value | {"model": value["model"] | {"vocab": vocab}}
    tokenizer = open_tokenizer(written(tmp_path, value))
    reference = tokenizers.Tokenizer.from_str(json.dumps(value))
    for text in (*CORPUS, "the fox"):
        ids = reference.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, special=True) == ids
    assert tokenizer.tokens[401:404] == ["[PAD401]", "[PAD402]", "[PAD403]"]


def test_an_added_id_that_tokenizers_does_not_use_is_refused(tmp_path):
    """It counts the added tokens itself, whatever ids the file has: so the model's ids are not certain."""
    value, n = base(), len(base()["model"]["vocab"])
    for i in (n + 1, n - 1):
        more = {"id": i, "content": "<x>", "special": True}
        with pytest.raises(TokenizerError, match=f"'<x>' has id {i},"):
            open_tokenizer(written(tmp_path, value | {"added_tokens": [*value["added_tokens"], more]}))


def test_a_prefix_rule_that_is_not_known_is_refused(tmp_path):
    value = like_sentencepiece("first")
    value["normalizer"] = in_turn("normalizers", REPLACE, DOUBLE, DOUBLE)
    with pytest.raises(UnsupportedError, match="is not understood"):
        open_tokenizer(written(tmp_path, value))
