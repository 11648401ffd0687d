"""Small vocabularies that are trained here, their reference tokenizers, and texts that find the seams."""

import io
import json
from functools import cache

import numpy as np
import sentencepiece
import tokenizers
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers

from numpy_llama.text.tokenizer import CONTROL, NORMAL, UNKNOWN, tokenizer_from_gguf

CONTROL_NAMES = (
    "<|begin_of_text|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|start|>",
    "</s>",
    "[INST]",
)
CORPUS = [
    "the quick brown fox jumps over the lazy dog, isn't it? They'll say: we've 1234 dogs and 56 foxes.",
    "   def f(x):\n        return x ** 2  # naïve café Ελληνικά русский 日本語 한국어\r\n\r\n\t\tif x: pass",
    "<|im_start|>user\n<|im_end|> </s> [INST] https://example.org/?a=1&b=22 🦙🦙 \u200d\u200d \u0301\u0301",
] * 3
# Text that finds the seams: words, digits of several scripts, all sorts of space, joined emoji. It also has
# the bytes that SmolLM2 lacks, and control tokens whole and in part.
FRAGMENTS = st.sampled_from(
    [
        *" \t\n\r\u00a0\u3000\u2028\x0b\x1c\x85", "  ", "\r\n", "\n\n ", *"0159٣½Ⅷ²",
        "'s", "'LL", "'\u017f", "\u2019t", *"aZéßжδ你한", "the", " fox", "hello", *"!?.<>|'_-$",
        "\U0001f469\u200d\U0001f469\u200d\U0001f467", "🦙", "\u0301", "\u200d", "\ufeff", "\u2581",
        *"\x00\x04\x06\x14\x7f", "\U00041234", "\U0010ffff",
        "<|", "|>", "<s>", "<unk>", "<0x41>", *CONTROL_NAMES,
    ]
)  # fmt: skip
# Unassigned characters (Cn) are left out: the libraries follow different versions of Unicode.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
KNOWN = st.tuples(st.sampled_from(CORPUS), st.integers(0, 90)).map(lambda cut: cut[0][cut[1] :][:20])
TEXTS = st.lists(FRAGMENTS | KNOWN | st.text(CHARACTERS, max_size=4), max_size=30).map("".join)


def hugging_face(metadata: dict) -> tokenizers.Tokenizer:
    """The reference: Hugging Face's BPE of the same vocabulary, its pre-tokenizer written independently."""
    tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    llama3 = metadata["tokenizer.ggml.pre"] == "llama-bpe"
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocabulary = {text: i for i, text in enumerate(tokens)}
    reference = tokenizers.Tokenizer(models.BPE(vocabulary, merges, ignore_merges=llama3))
    reference.pre_tokenizer = pre_tokenizer(metadata["tokenizer.ggml.pre"])
    reference.add_special_tokens([text for text, kind in zip(tokens, kinds, strict=True) if kind == CONTROL])
    return reference


def pre_tokenizer(pre: str):
    if pre == "llama-bpe":  # tokenizer.json of Llama 3
        pattern = tokenizers.Regex(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
            r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
        )
        steps = [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    elif pre == "smollm":
        steps = [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(False, use_regex=True),
        ]
    elif pre == "default":  # llama.cpp's, as it applies them: one after the other
        patterns = [
            r"[\p{P}\$\+<=>\^~\|]+",
            r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)",
            r"\p{N}+",
            r"[0-9][0-9][0-9]",
        ]
        steps = [pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated") for pattern in patterns]
        steps += [pre_tokenizers.ByteLevel(False, use_regex=False)]
    else:
        steps = [pre_tokenizers.ByteLevel(False, use_regex=True)]
    return pre_tokenizers.Sequence(steps)


def hugging_face_ids(reference: tokenizers.Tokenizer, text: str) -> list[int]:
    """`text` as ordinary text: without the added special tokens, which the reference would find in it."""
    pieces = reference.pre_tokenizer.pre_tokenize_str(text)
    return [token.id for piece, _ in pieces for token in reference.model.tokenize(piece)]


@cache
def byte_level_metadata(pre: str = "smollm") -> dict:
    """A small byte-level vocabulary, trained here: all bytes, 300 merges, the control tokens first."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        special_tokens=[*CONTROL_NAMES],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    trained = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(trained["vocab"], key=trained["vocab"].get)
    kinds = [CONTROL if text in CONTROL_NAMES else NORMAL for text in tokens]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.merges": [" ".join(merge) for merge in trained["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    }


@cache
def trained_sentencepiece(add_dummy_prefix: bool = True) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=model,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=add_dummy_prefix,
        control_symbols=["[INST]", "<|im_end|>"],
        minloglevel=2,
    )
    return sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())


@cache
def sentencepiece_metadata(add_dummy_prefix: bool = True) -> dict:
    trained = trained_sentencepiece(add_dummy_prefix)
    ids = range(trained.vocab_size())
    kinds = [
        UNKNOWN
        if trained.is_unknown(i)
        else CONTROL
        if trained.is_control(i)
        else 6
        if trained.is_byte(i)
        else NORMAL
        for i in ids
    ]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [trained.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": np.array([trained.get_score(i) for i in ids], np.float32),
        "tokenizer.ggml.token_type": np.array(kinds, np.int32),
        "tokenizer.ggml.add_space_prefix": add_dummy_prefix,
    }


def altered(metadata: dict, name: str, change) -> dict:
    key = f"tokenizer.ggml.{name}"
    value = metadata.get(key)
    return metadata | {key: change(value.copy() if isinstance(value, (list, np.ndarray)) else value)}


def put(i, value):
    def change(array):
        array[i] = value
        return array

    return change


@cache
def byte_level(pre: str = "smollm"):
    return tokenizer_from_gguf(byte_level_metadata(pre), "small.gguf")


@cache
def sentence_piece(add_dummy_prefix: bool = True):
    return tokenizer_from_gguf(sentencepiece_metadata(add_dummy_prefix), "small.gguf")
