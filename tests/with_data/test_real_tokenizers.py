"""Real tokenizer files against the libraries whose files they are: random texts, and every character."""

import base64
import json
import time
from functools import cache

import numpy as np
import pytest
import sentencepiece
import tiktoken
import tokenizers
from helpers.data import DATA
from helpers.gguf_writer import gguf_bytes
from tokenizers import models, normalizers, pre_tokenizers

from numpy_llama.checkpoint.tokenizers import open_tokenizer, tokenizer_of_folder
from numpy_llama.errors import UnsupportedError
from numpy_llama.text.tokenizer import WORDS, spelled

TOKENIZERS = DATA / "tokenizers"
SENTENCEPIECE = {
    "Llama 2": TOKENIZERS / "llama2_tokenizer.model",
    "Mistral": TOKENIZERS / "mistral_tokenizer.model.v1",
    "stories": DATA / "models/hf_stories260K/tokenizer.model",
}
TIKTOKEN = {
    "Llama 3": TOKENIZERS / "llama3_tokenizer.model",
    "small": TOKENIZERS / "torchtune_tiktoken_small.model",
}


@cache
def random_texts(n: int = 10_000) -> list[str]:
    """Characters of all planes and of the few that matter most, and bits of real text, in any order."""
    rng = np.random.default_rng(0)
    real = (DATA / "text/wiki.test.raw").read_text()
    frequent = [
        *" \n\t\r'.,!?-_<|>0123456789\u2581aeiou\u0301\u200d\u00e9\u4e16\U0001f999",
        "  ",
        "\r\n",
        "'s",
    ]
    texts = []
    for _ in range(n):
        parts = []
        for kind in rng.integers(0, 4, rng.integers(1, 12)):
            start = int(rng.integers(len(real) - 20))
            parts.append(
                [
                    real[start : start + int(rng.integers(1, 20))],
                    frequent[rng.integers(len(frequent))],
                    character(int(rng.integers(0x110000))),
                    character(int(rng.integers(0x3000))),
                ][kind]
            )
        texts.append("".join(parts))
    return texts


CODES = [code for code in range(0x110000) if not 0xD800 <= code < 0xE000]


def character(code: int) -> str:
    return " " if 0xD800 <= code < 0xE000 else chr(code)


@cache
def every_character() -> list[str]:
    """Each of 1,112,064 beside a letter and a space, 4,096 in a text."""
    texts = (CODES[i : i + 4096] for i in range(0, len(CODES), 4096))
    return [" ".join(f"a{character(code)}" for code in text) for text in texts]


@cache
def ours(path):
    return open_tokenizer(path)


@cache
def tiktoken_reference(path):
    lines = (line.split() for line in path.read_bytes().splitlines())
    ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
    return tiktoken.Encoding("x", pat_str=WORDS["llama-bpe"], mergeable_ranks=ranks, special_tokens={})


@pytest.mark.parametrize("name", SENTENCEPIECE)
def test_sentencepiece(name):
    reference = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE[name]))
    tokenizer = ours(SENTENCEPIECE[name])
    texts = [*random_texts(), *(every_character() if name == "Llama 2" else [])]
    for text, expected in zip(texts, reference.encode(texts), strict=True):
        assert tokenizer.encode(text) == expected, text
    for text in [*random_texts()[:1000], "".join(every_character()[:8])]:
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")
    assert tokenizer.vocab_size == reference.vocab_size()
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (reference.bos_id(), (reference.eos_id(),))


@pytest.mark.parametrize("name", TIKTOKEN)
def test_tiktoken(name):
    reference, tokenizer = tiktoken_reference(TIKTOKEN[name]), ours(TIKTOKEN[name])
    for text in [*random_texts(), *(every_character() if name == "Llama 3" else [])]:
        assert tokenizer.encode(text) == reference.encode_ordinary(text), text
    for text in [*random_texts()[:1000], "".join(every_character()[:8])]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == reference.n_vocab + 256


def test_a_unigram_model_is_refused():
    with pytest.raises(UnsupportedError, match=r"torchtune_m.model is a SentencePiece model of type unigram"):
        open_tokenizer(TOKENIZERS / "torchtune_m.model")


@pytest.mark.parametrize(
    ("bin", "model"),
    [
        (TOKENIZERS / "llama2_tokenizer.bin", SENTENCEPIECE["Llama 2"]),
        (DATA / "models/tok512.bin", SENTENCEPIECE["stories"]),
    ],
)
def test_llama2c_has_the_same_vocabulary(bin, model):
    a, b = ours(bin), ours(model)
    assert (a.tokens, a.meanings, a.control_tokens) == (b.tokens, b.meanings, b.control_tokens)
    assert (a.bos_id, a.eos_ids, a.add_bos, a.add_space) == (b.bos_id, b.eos_ids, b.add_bos, b.add_space)
    assert np.array_equal(a.metadata["tokenizer.ggml.scores"], b.metadata["tokenizer.ggml.scores"])
    for text in random_texts()[:2000]:
        assert a.encode(text) == b.encode(text)


def all_splits(tokens: list[str], known: set[str]) -> list[tuple[str, str]]:
    """As Hugging Face makes merges of a vocabulary that has none: each pair that makes a token."""
    cuts = ((text[:i], text[i:]) for text in tokens for i in range(1, len(text)))
    return [(left, right) for left, right in cuts if left in known and right in known]


@cache
def converted(name: str) -> tokenizers.Tokenizer:
    """The tokenizer.json that Hugging Face's converters make of a tokenizer.model."""
    if name == "Llama 3":
        data = (line.split()[0] for line in TIKTOKEN[name].read_bytes().splitlines())
        tokens = [spelled(base64.b64decode(token)) for token in data]
        vocabulary = {text: i for i, text in enumerate(tokens)}
        out = tokenizers.Tokenizer(
            models.BPE(vocabulary, all_splits(tokens, set(tokens)), ignore_merges=True)
        )
        pattern = tokenizers.Regex(WORDS["llama-bpe"])
        steps = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        out.pre_tokenizer = pre_tokenizers.Sequence(steps)
        return out
    reference = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE[name]))
    ids = range(reference.vocab_size())
    vocabulary = {reference.id_to_piece(i): i for i in ids}
    by_score = sorted(ids, key=reference.get_score, reverse=True)
    normal = [
        reference.id_to_piece(i) for i in by_score if not (reference.is_control(i) or reference.is_unknown(i))
    ]
    merges = all_splits(normal, set(normal))
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    out = tokenizers.Tokenizer(model)
    if name == "Llama 2":
        steps = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        out.normalizer = normalizers.Sequence(steps)
    else:
        out.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", "first", split=False)
    return out


@pytest.mark.parametrize("name", ["Llama 2", "Mistral", "Llama 3"])
def test_tokenizer_json(name, tmp_path):
    reference = converted(name)
    reference.save(str(tmp_path / "tokenizer.json"))
    tokenizer = tokenizer_of_folder(tmp_path)
    texts = [*random_texts(), *(every_character() if name != "Mistral" else [])]
    batch = reference.encode_batch_fast(texts, add_special_tokens=False)
    for text, expected in zip(texts, batch, strict=True):
        assert tokenizer.encode(text) == expected.ids, text
    # The same vocabulary, the same ids as the file that it was made of, but for Metaspace's prefix.
    original = ours({**SENTENCEPIECE, **TIKTOKEN}[name])
    for text in random_texts()[:2000]:
        if name != "Mistral" or text[0] not in " \u2581":
            assert tokenizer.encode(text) == original.encode(text)


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3", "small"])
def test_written_into_gguf_it_is_the_same_tokenizer(name, tmp_path):
    tokenizer = ours({**SENTENCEPIECE, **TIKTOKEN}[name])
    (tmp_path / "x.gguf").write_bytes(gguf_bytes(tokenizer.metadata, {}))
    again = open_tokenizer(tmp_path / "x.gguf")
    for field in ("tokens", "meanings", "control_tokens", "bos_id", "eos_ids", "add_bos", "add_space"):
        assert getattr(again, field) == getattr(tokenizer, field), field
    for text in [*random_texts()[:1000], " Vi\u1ec7t nghi\u1ec7p .:.:", "a" * 70_000]:
        assert again.encode(text) == tokenizer.encode(text)


def test_ggml_and_meta_have_the_same_vocabulary():
    """ggml's file lists the merges that we make of Meta's ranks."""
    ggml, meta = ours(TOKENIZERS / "ggml-vocab-llama-bpe.gguf"), ours(TIKTOKEN["Llama 3"])
    metadata, made = ggml.metadata, meta.metadata
    assert {*made["tokenizer.ggml.merges"]} == {*metadata["tokenizer.ggml.merges"]}
    assert made["tokenizer.ggml.tokens"][:128_000] == metadata["tokenizer.ggml.tokens"][:128_000]
    for text in random_texts()[:3000]:
        assert ggml.encode(text) == meta.encode(text)


@pytest.mark.parametrize("name", ["Llama 2", "Llama 3"])
@pytest.mark.parametrize("unit", ["a", "^", " ", "-", "\n", "\u0301", "\u4e16", "ab"])
def test_a_million_of_the_same(name, unit):
    text = unit * (1_000_000 // len(unit))
    tokenizer = ours({**SENTENCEPIECE, **TIKTOKEN}[name])
    began = time.process_time()
    ids = tokenizer.encode(text)
    assert time.process_time() - began < 2
    if name == "Llama 2":
        reference = sentencepiece.SentencePieceProcessor(model_file=str(SENTENCEPIECE[name]))
        assert ids == reference.encode(text)
    else:  # not encode_ordinary: its pattern gives up on long runs of spaces
        assert ids == tiktoken_reference(TIKTOKEN[name])._encode_single_piece(text.encode())


def test_what_ends_a_turn_in_a_real_folder():
    tokenizer = tokenizer_of_folder(DATA / "models/hf_stories260K")
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.add_bos) == (1, (2,), True)
    assert json.loads((DATA / "models/hf_stories260K/config.json").read_text())["eos_token_id"] == 2
