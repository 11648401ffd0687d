import numpy as np
import pytest
import regex
from helpers.tokenizers import (
    CORPUS,
    TEXTS,
    altered,
    byte_level,
    byte_level_metadata,
    hugging_face,
    hugging_face_ids,
    pre_tokenizer,
    put,
    sentence_piece,
    sentencepiece_metadata,
    trained_sentencepiece,
)
from hypothesis import example, given
from hypothesis import strategies as st

from numpy_llama.checkpoint.gguf.file import GGUFFile
from numpy_llama.errors import (
    FormatError,
    MismatchError,
    ParameterError,
    TextError,
    TokenizerError,
    UnsupportedError,
)
from numpy_llama.text.tokenizer import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    WORDS,
    StreamDecoder,
    tokenizer_from_gguf,
)

LONG = 300_000


BOTH = pytest.mark.parametrize("build", [byte_level, sentence_piece])


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "default"])
@given(text=TEXTS)
@example(text=" \n 5  6   x\n")
def test_byte_level_equals_hugging_face(pre, text):
    assert byte_level(pre).encode(text) == hugging_face_ids(hugging_face(byte_level_metadata(pre)), text)


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "default"])
@given(text=TEXTS)
@example(text="'LLx 1234 '\u017fa 'T't")
@example(text="price: $1,234.56 (approx.)  12345\u0663456 \n\n7 don't  !a\t\t`x")
def test_words_equal_hugging_face(pre, text):
    words = pre_tokenizer(pre).pre_tokenize_str(text)
    assert regex.findall(WORDS[pre], text) == [text[start:end] for _, (start, end) in words]


@pytest.mark.parametrize("pre", ["smollm", "gpt-2", "llama-bpe", "default"])
@given(text=TEXTS)
def test_byte_level_round_trip(pre, text):
    tokenizer = byte_level(pre)
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    metadata = GGUFFile(smollm2_path).metadata
    return tokenizer_from_gguf(metadata, str(smollm2_path)), hugging_face(metadata)


@given(text=TEXTS)
@example(text="!\x04!").via("a byte without a token, between two that merge")
def test_smollm2_equals_hugging_face(smollm2, text):
    tokenizer, reference = smollm2
    ids = tokenizer.encode(text)
    assert ids == hugging_face_ids(reference, text)
    if not set(text.encode()) & {4, 6, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}:
        assert tokenizer.decode(ids) == text


def test_smollm2_is_what_its_file_says(smollm2):
    tokenizer, _ = smollm2
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, (2, 0))
    assert not tokenizer.add_bos
    assert tokenizer.encode("!\x04!") == tokenizer.encode("!!")  # one token, as if the byte were not there
    assert tokenizer.encode("Hello", bos=True, eos=True) == [1, 19556, 2]
    assert len(tokenizer.control_tokens) == 17


@pytest.mark.parametrize("add_dummy_prefix", [True, False])
@given(text=TEXTS)
def test_sentencepiece_equals_the_trained_model(add_dummy_prefix, text):
    tokenizer, trained = sentence_piece(add_dummy_prefix), trained_sentencepiece(add_dummy_prefix)
    ids = tokenizer.encode(text)
    assert ids == trained.encode(text)
    assert tokenizer.decode(ids) == trained.decode(ids) == text.replace("\u2581", " ")


@BOTH
@given(text=TEXTS)
def test_no_text_becomes_a_control_token(build, text):
    tokenizer = build()
    assert not set(tokenizer.encode(text)) & set(tokenizer.control_tokens.values())


@BOTH
@given(text=TEXTS)
def test_stream_gives_whole_characters(build, text):
    tokenizer = build()
    text = text.replace("\u2581", " ").replace("\ufffd", "")
    stream, so_far = StreamDecoder(tokenizer), ""
    for token_id in tokenizer.encode(text):
        so_far += stream.push(token_id)
        assert text.startswith(so_far)
    assert (so_far, stream.flush()) == (text, "")


@BOTH
@given(seed=st.integers(0, 2**32 - 1), n=st.integers(0, 40), start=st.booleans())
def test_decode_and_stream_of_any_ids(build, seed, n, start):
    tokenizer = build()
    ids = np.random.default_rng(seed).integers(tokenizer.vocab_size, size=n)
    data = b"".join(map(tokenizer.token_bytes, ids))
    if start and tokenizer.add_space:
        data = data.removeprefix(b" ")
    stream = StreamDecoder(tokenizer, start)
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    assert streamed == tokenizer.decode(ids, start) == data.decode("utf-8", "replace")


def test_first_space_is_dropped_only_at_the_start():
    tokenizer = sentence_piece()
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode(ids) == "the fox"
    assert tokenizer.decode(ids, start_of_text=False) == " the fox"
    assert tokenizer.decode([tokenizer.bos_id, *ids]) == "the fox"  # a control token is not yet text
    assert tokenizer.decode(tokenizer.encode("  the")) == "  the"


def test_half_a_character_at_the_end_is_replaced():
    tokenizer = byte_level()
    stream = StreamDecoder(tokenizer)
    ids = tokenizer.encode("\u1200")  # Ethiopic, not in the corpus: a token for each byte
    assert [tokenizer.token_bytes(i) for i in ids] == [b"\xe1", b"\x88", b"\x80"]
    assert [stream.push(i) for i in ids[:2]] == ["", ""]
    assert stream.flush() == "\ufffd"
    assert tokenizer.piece(ids[0]) == "\\xe1"
    assert tokenizer.piece(tokenizer.control_tokens["<|im_end|>"]) == "<|im_end|>"


@BOTH
@pytest.mark.parametrize("token_id", [-1, 10**6, 2**31, 1.0, True, "1", None, np.int64(-1), np.float32(1)])
def test_ids_outside_the_vocabulary(build, token_id):
    tokenizer = build()
    for use in (tokenizer.token_bytes, tokenizer.piece, lambda i: tokenizer.decode([i])):
        with pytest.raises(TokenizerError, match="token id"):
            use(token_id)


@BOTH
def test_the_last_id_is_the_last(build):
    tokenizer = build()
    assert tokenizer.decode([tokenizer.vocab_size - 1])
    with pytest.raises(TokenizerError, match=f"token id {tokenizer.vocab_size} "):
        tokenizer.decode([tokenizer.vocab_size])


def test_the_unknown_token_says_nothing():
    tokenizer = sentence_piece()
    assert tokenizer.token_bytes(tokenizer.control_tokens["<unk>"]) == b""


@BOTH
def test_half_a_surrogate_pair_is_no_text(build):
    with pytest.raises(TextError, match=r"character 3 of the text is U\+D800"):
        build().encode("abc\ud800")


# A pattern that backtracks, or a merge that is quadratic, dies of these.
@BOTH
@pytest.mark.parametrize("unit", ["^", " ", "a", "\n", " \n", "\t", "1", "\u0301", "'"])
def test_long_runs_of_the_same(build, unit):
    tokenizer = build()
    for end in ("", "x"):
        text = unit * (LONG // len(unit)) + end
        assert b"".join(map(tokenizer.token_bytes, tokenizer.encode(text))).decode().lstrip(
            " "
        ) == text.lstrip(" ")


def test_bos_and_eos():
    tokenizer = byte_level()
    assert tokenizer.encode("a", bos=True, eos=True) == [0, *tokenizer.encode("a"), 2]
    bare = byte_level_metadata() | {"tokenizer.ggml.bos_token_id": None}
    without = tokenizer_from_gguf(bare | {"tokenizer.ggml.add_bos_token": True}, "small.gguf")
    assert without.bos_id is None and not without.add_bos
    with pytest.raises(ParameterError, match="BOS"):
        without.encode("a", bos=True)


def test_defaults_are_those_of_ggml():
    assert sentence_piece().bos_id == 1
    assert sentence_piece().eos_ids[0] == 2
    assert sentence_piece().add_bos
    assert byte_level("llama-bpe").add_bos
    assert not byte_level("smollm").add_bos
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata() | {"tokenizer.ggml.add_bos_token": False}, "x")
    assert not tokenizer.add_bos


def test_every_end_token_counts():
    names = byte_level_metadata()["tokenizer.ggml.tokens"]
    ends = [names.index(name) for name in ("<|im_end|>", "</s>", "<|eot_id|>")]
    assert byte_level().eos_ids == tuple(ends)
    more = byte_level_metadata() | {"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 6}
    assert tokenizer_from_gguf(more, "x").eos_ids == (2, 4, 6, 5, 3)


def test_control_tokens_that_a_file_calls_user_defined():
    for metadata in (byte_level_metadata(), sentencepiece_metadata()):
        tokens, kinds = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"].copy()
        kinds[tokens.index("<|im_end|>")] = USER_DEFINED
        tokenizer = tokenizer_from_gguf(metadata | {"tokenizer.ggml.token_type": kinds}, "x")
        im_end = tokenizer.control_tokens["<|im_end|>"]
        assert im_end in tokenizer.eos_ids
        assert im_end not in tokenizer.encode("<|im_end|>")


def test_with_all_bytes_no_unknown_token_is_needed():
    """transformers 5 writes such files: a character without a piece is spelt in bytes."""
    kinds = sentencepiece_metadata()["tokenizer.ggml.token_type"].copy()
    kinds[0] = CONTROL
    without = tokenizer_from_gguf(sentencepiece_metadata() | {"tokenizer.ggml.token_type": kinds}, "x")
    text = "the fox \U0001f999<unk>"
    assert without.encode(text) == tokenizer_from_gguf(sentencepiece_metadata(), "x").encode(text)


def test_ids_need_not_be_in_the_order_of_the_merges():
    metadata = byte_level_metadata()
    shuffled = np.random.default_rng(0).permutation(len(metadata["tokenizer.ggml.tokens"]))
    tokens = [metadata["tokenizer.ggml.tokens"][i] for i in shuffled]
    kinds = metadata["tokenizer.ggml.token_type"][shuffled]
    changed = metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": kinds}
    tokenizer = tokenizer_from_gguf(changed, "x")
    for text in CORPUS:
        assert [shuffled[i] for i in tokenizer.encode(text)] == byte_level().encode(text)


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("scores", lambda s: s.astype(np.uint8), FormatError, "scores.*uint8.*float32"),
        ("scores", lambda s: None, FormatError, "scores"),
        ("scores", lambda s: s[:-1], MismatchError, "scores has 419 entries, the vocabulary has 420 tokens"),
        ("scores", put(300, np.nan), TokenizerError, r"scores\[300\] is nan"),
        ("scores", put(300, -np.inf), TokenizerError, r"scores\[300\] is -inf"),
        ("token_type", lambda k: k[:-1], MismatchError, "token_type has 419"),
        ("token_type", lambda k: k.astype(np.int64), FormatError, "token_type.*int64.*int32"),
        ("token_type", put(9, 7), TokenizerError, r"tokens\[9\].*type 7"),
        ("token_type", put(9, 0), TokenizerError, r"tokens\[9\].*type 0"),
        ("token_type", put(400, UNKNOWN), TokenizerError, "2 UNKNOWN and 256 BYTE"),
        ("token_type", put(9, NORMAL), TokenizerError, "1 UNKNOWN and 255 BYTE"),
        ("tokens", put(9, "<0xGG>"), TokenizerError, r"tokens\[9\] is '<0xGG>'"),
        ("tokens", put(9, "<0x-1>"), TokenizerError, r"tokens\[9\] is '<0x-1>'"),
        ("tokens", put(9, "\x1b[31m"), TokenizerError, r"tokens\[9\] is '\\x1b\[31m'"),
        ("tokens", put(400, ""), TokenizerError, r"tokens\[400\] is ''"),
        ("tokens", put(400, "x" * 65_537), TokenizerError, r"tokens\[400\] is 'xxx"),
        ("tokens", lambda t: [*t[:400], t[7], *t[401:]], TokenizerError, r"tokens\[7\].*so is tokens\[400\]"),
        ("tokens", lambda t: np.zeros(420, np.uint8), FormatError, "tokens"),
        ("bos_token_id", lambda i: 2**31 - 1, MismatchError, "bos_token_id is 2147483647"),
        ("bos_token_id", lambda i: -1, MismatchError, "bos_token_id is -1, the vocabulary has 420 tokens"),
        ("eos_token_id", lambda i: 420.0, FormatError, "eos_token_id is 420.0 .float., it must be int"),
        ("bos_token_id", lambda i: "1", FormatError, "bos_token_id is '1' .str., it must be int"),
        ("add_bos_token", lambda b: 1, FormatError, "add_bos_token is 1"),
        ("model", lambda m: "bert", UnsupportedError, "'bert'"),
        ("model", lambda m: 3, FormatError, "model is 3"),
    ],
)  # fmt: skip
def test_a_bad_sentencepiece_vocabulary_is_refused(name, change, error, message):
    with pytest.raises(error, match=f"^small.gguf: .*{message}"):
        tokenizer_from_gguf(altered(sentencepiece_metadata(), name, change), "small.gguf")


@pytest.mark.parametrize(
    ("name", "change", "error", "message"),
    [
        ("pre", lambda p: "tekken", TokenizerError, "'tekken', we know gpt-2, default, smollm, llama-bpe"),
        ("merges", put(3, "no space"), TokenizerError, r"merges\[3\] is 'no space'"),
        ("merges", put(3, "t"), TokenizerError, r"merges\[3\] is 't'"),
        ("merges", put(3, "t h e"), TokenizerError, r"merges\[3\] is 't h e'"),
        ("merges", lambda m: np.zeros(9, np.int32), FormatError, "merges"),
        ("tokens", put(400, "two words"), TokenizerError, r"tokens\[400\] is 'two words'"),
        ("tokens", put(400, "日"), TokenizerError, r"tokens\[400\] is '\\u65e5'"),
        ("token_type", lambda k: k[:5], MismatchError, "token_type has 5"),
    ],
)
def test_a_bad_byte_level_vocabulary_is_refused(name, change, error, message):
    with pytest.raises(error, match=f"^small.gguf: .*{message}"):
        tokenizer_from_gguf(altered(byte_level_metadata(), name, change), "small.gguf")


@pytest.mark.parametrize("wrong", [-1, 420, 2**32 - 1])
@pytest.mark.parametrize("name", ["eos", "eot", "eom", "unknown", "padding", "seperator", "cls", "mask"])
def test_a_special_id_that_no_token_has_is_left_out(name, wrong):
    """Nothing makes it. BOS is refused, because a prompt would need it."""
    usual = tokenizer_from_gguf(sentencepiece_metadata(), "small.gguf")
    entries = {
        f"tokenizer.ggml.{name}_token_id": wrong,
        "numpy_llama.tokenizer.end_token_ids": np.array([min(wrong, 420)], np.int32),
    }
    found = tokenizer_from_gguf(sentencepiece_metadata() | entries, "small.gguf")
    assert (found.bos_id, {*found.eos_ids} - {2}) == (usual.bos_id, {*usual.eos_ids} - {2})
    again = tokenizer_from_gguf(found.metadata, "again")
    assert (again.bos_id, again.eos_ids, again.named_tokens) == (
        found.bos_id,
        found.eos_ids,
        found.named_tokens,
    )


def test_special_tokens_have_names_for_templates():
    ids = {"padding": 4, "unknown": 0, "mask": 5}
    entries = {f"tokenizer.ggml.{name}_token_id": i for name, i in ids.items()}
    tokenizer = tokenizer_from_gguf(sentencepiece_metadata() | entries, "x")
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    assert tokenizer.named_tokens == names | {
        "pad_token": tokenizer.tokens[4],
        "mask_token": tokenizer.tokens[5],
    }


@pytest.mark.parametrize("metadata", [sentencepiece_metadata, lambda: byte_level_metadata("gpt-2")])
def test_types_that_a_file_leaves_out_are_those_of_the_names(metadata):
    """llama.cpp runs such files. [INST] is no name that only control tokens have."""
    whole = tokenizer_from_gguf(metadata(), "x")
    without = metadata().copy()
    del without["tokenizer.ggml.token_type"]
    found = tokenizer_from_gguf(without, "x")
    assert found.control_tokens == {n: i for n, i in whole.control_tokens.items() if n != "[INST]"}
    for text in ("the fox\u00e9 \U0001f999", "<|im_end|></s><unk>"):
        assert found.encode(text) == whole.encode(text)
    assert tokenizer_from_gguf(found.metadata, "x").control_tokens == found.control_tokens


def test_pieces_without_scores_are_refused_with_a_way_out():
    without = sentencepiece_metadata().copy()
    del without["tokenizer.ggml.scores"]
    with pytest.raises(TokenizerError, match=r"scores is missing, .*: convert the original model again"):
        tokenizer_from_gguf(without, "x")


def padded_with(kinds: list[int], **entries):
    """The small byte-level vocabulary and further tokens of these types."""
    metadata, n = byte_level_metadata(), len(kinds)
    types = np.append(metadata["tokenizer.ggml.token_type"], np.int32(kinds)).astype(np.int32)
    tokens = [*metadata["tokenizer.ggml.tokens"], *(f"[PAD{i}]" for i in range(n))]
    return tokenizer_from_gguf(
        metadata | {"tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": types} | entries, "x"
    )


def test_a_control_token_without_a_row_of_the_embedding_is_left_out():
    rows = len(byte_level_metadata()["tokenizer.ggml.tokens"])
    options = {f"numpy_llama.tokenizer.{name}": np.int32([1, rows]) for name in ("lstrip", "rstrip")}
    found = padded_with([CONTROL, CONTROL], **options, **{"tokenizer.ggml.padding_token_id": rows}).within(
        rows
    )
    found.check_rows(rows)
    assert found.vocab_size == rows and "pad_token" not in found.named_tokens
    assert found.encode("the [PAD0]", special=True) == byte_level().encode("the [PAD0]")
    assert found.added.left == frozenset([1])
    assert found.within(rows) is found


@pytest.mark.parametrize(
    ("kinds", "needed"),
    [
        ([USER_DEFINED], ""),
        ([USER_DEFINED, CONTROL], ""),
        ([CONTROL], "eos"),
        ([CONTROL], "bos"),
        ([CONTROL] * 1024, ""),
    ],
)
def test_a_token_that_may_be_needed_must_have_a_row(kinds, needed):
    rows = len(byte_level_metadata()["tokenizer.ggml.tokens"])
    entries = {f"tokenizer.ggml.{needed}_token_id": rows} if needed else {}
    with pytest.raises(MismatchError, match=f"the embedding {rows} rows"):
        padded_with(kinds, **entries).within(rows).check_rows(rows)


@pytest.mark.parametrize("name", ["model", "tokens", "merges", "pre"])
def test_a_missing_entry_is_named(name):
    metadata = {key: value for key, value in byte_level_metadata().items() if not key.endswith(f".{name}")}
    with pytest.raises(TokenizerError, match=f"small.gguf: tokenizer.ggml.{name} is missing"):
        tokenizer_from_gguf(metadata, "small.gguf")


@pytest.mark.parametrize("model", ["gpt2", "llama"])
@pytest.mark.parametrize("n", [0, 2])
def test_a_vocabulary_of_almost_nothing_is_refused(model, n):
    metadata = byte_level_metadata() if model == "gpt2" else sentencepiece_metadata()
    few = metadata | {"tokenizer.ggml.tokens": ["<unk>", "e"][:n], "tokenizer.ggml.merges": []}
    few |= {"tokenizer.ggml.token_type": np.array([UNKNOWN, NORMAL][:n], np.int32)}
    few |= {"tokenizer.ggml.scores": np.zeros(n, np.float32)}
    with pytest.raises(TokenizerError, match="vocabulary"):
        tokenizer_from_gguf(few, "small.gguf")
