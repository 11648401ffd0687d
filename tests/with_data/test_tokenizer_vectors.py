"""Real vocabularies against what others made of them: ggml, Meta, the JavaScript tokenizers, Hugging Face."""

import json
import re
from functools import cache

import pytest
from helpers.data import DATA
from helpers.tokenizers import hugging_face, hugging_face_ids

from numpy_llama.checkpoint.gguf.file import GGUFFile
from numpy_llama.checkpoint.tokenizers import open_tokenizer
from numpy_llama.text.chat import ChatTemplate
from numpy_llama.text.tokenizer import tokenizer_from_gguf

VOCABULARIES = {
    "spm": DATA / "tokenizers/ggml-vocab-llama-spm.gguf",
    "spm.model": DATA / "tokenizers/llama2_tokenizer.model",
    "spm.bin": DATA / "tokenizers/llama2_tokenizer.bin",
    "bpe": DATA / "tokenizers/ggml-vocab-llama-bpe.gguf",
    "bpe.model": DATA / "tokenizers/llama3_tokenizer.model",
    "stories260K": DATA / "models/stories260K.gguf",
}
LLAMA2, LLAMA3 = ["spm", "spm.model", "spm.bin"], ["bpe", "bpe.model"]


@cache
def vocabulary(name):
    return open_tokenizer(VOCABULARIES[name])


def read_json(path):
    return json.loads((DATA / path).read_text())


@pytest.mark.parametrize("name", LLAMA2 + LLAMA3)
def test_vectors_of_ggml(name):
    tokenizer, path = vocabulary(name), str(VOCABULARIES[name.partition(".")[0]])
    with open(path + ".inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")[:-1]
    with open(path + ".out", encoding="utf-8") as file:
        expected = [[int(i) for i in line.split()] for line in file]
    assert len(texts) == len(expected) == 46
    assert [tokenizer.encode(text) for text in texts] == expected
    assert [tokenizer.decode(ids) for ids in expected] == texts


@pytest.mark.parametrize("name", LLAMA2)
def test_vectors_of_llama_tokenizer_js(name):
    tokenizer, vectors = vocabulary(name), read_json("tokenizers/l2_js_vectors.json")
    for case in vectors["encode_with_bos"]:
        assert tokenizer.encode(case["text"], bos=True) == case["ids"]
        assert tokenizer.decode(case["ids"]) == case["text"]
    for case in vectors["decode"]:
        # Where add_bos does not fit the ids, that tokenizer writes BOS as text: not with us.
        text, start = case["text"].removeprefix("<s>"), case["preceding_space"] and "<s>" not in case["text"]
        assert tokenizer.decode(case["ids"], start_of_text=start) == text


@pytest.mark.parametrize("name", LLAMA3)
def test_vectors_of_llama3_tokenizer_js(name):
    tokenizer, vectors = vocabulary(name), read_json("tokenizers/l3_js_vectors.json")
    for case in vectors["encode_decode"]:
        if "<|" not in case["text"]:
            assert tokenizer.encode(case["text"]) == case["ids"]
            assert tokenizer.decode(case["ids"]) == case["text"]
    for case in vectors["encode"]:
        options = case["options"] or {"bos": True, "eos": True}
        assert tokenizer.encode(case["text"], **options) == case["ids"]
    # The GGUF file is Llama 3's, the vectors are of 3.1, which gave names to some of the reserved tokens.
    for case in vectors["decode"]:
        if set(re.findall(r"<\|\w+\|>", case["text"])) <= set(tokenizer.control_tokens):
            assert "".join(map(tokenizer.piece, case["ids"])) == case["text"]


LLAMA3_TEMPLATE = (
    "{% for message in messages %}{% set content = '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)


@pytest.mark.parametrize("name", LLAMA3)
def test_vectors_of_meta(name):
    tokenizer, vectors = vocabulary(name), read_json("golden/meta_llama3_test_tokenizer_vectors.json")
    for text, ids in vectors["encode_bos_eos"].items():
        assert tokenizer.encode(text, bos=True, eos=True) == ids
    template = ChatTemplate(LLAMA3_TEMPLATE)
    for text, ids in vectors["encode_message_user"].items():
        message = [{"role": "user", "content": text}]
        assert template.encode(tokenizer, message, add_generation_prompt=False)[1:] == ids
    dialog = vectors["encode_dialog"]
    assert template.encode(tokenizer, dialog["dialog"]) == dialog["ids"]
    ends = {tokenizer.piece(i) for i in tokenizer.eos_ids}
    assert ends - {"<|eom_id|>"} == {"<|end_of_text|>", "<|eot_id|>"}


def test_stories260K_as_llama_cpp_read_them():
    tokenizer = vocabulary("stories260K")
    for case in read_json("golden/stories260K_llamacpp_f32.json")["cases"]:
        ids = tokenizer.encode(case["prompt"], bos=True)
        assert len(ids) == case["usage"]["prompt_tokens"]
        assert tokenizer.decode(case["tokens"], start_of_text=False) == case["text"]
    golden = read_json("golden/stories260K_nll_tinystories5.json")["docs"]
    stories = (DATA / "text/tinystories_sample_5.txt").read_text().split("<|endoftext|>")
    stories = [story.strip() for story in stories if story.strip()]
    for story, expected in zip(stories, golden, strict=True):
        ids = tokenizer.encode(story, bos=True)[:512]
        assert (len(ids), ids[:16]) == (expected["n_tokens"], expected["ids_head"])


@pytest.mark.parametrize("text", ["wiki.test.raw", "tinyshakespeare.txt"])
def test_smollm2_on_real_text(smollm2_path, text):
    metadata = GGUFFile(smollm2_path).metadata
    tokenizer = tokenizer_from_gguf(metadata, str(smollm2_path))
    content = (DATA / "text" / text).read_bytes().decode()
    ids = tokenizer.encode(content)
    assert ids == hugging_face(metadata).encode(content, add_special_tokens=False).ids
    assert ids[:100] == hugging_face_ids(hugging_face(metadata), content[:2000])[:100]
    assert tokenizer.decode(ids) == content


def test_smollm2_decodes_what_llama_cpp_generated(smollm2_path):
    tokenizer = tokenizer_from_gguf(GGUFFile(smollm2_path).metadata, str(smollm2_path))
    for case in read_json("golden/smollm2_dequantf32_llamacpp.json")["cases"]:
        assert tokenizer.decode(case["tokens"]) == case["text"]
        assert len(tokenizer.encode(case["prompt"])) == case["usage"]["prompt_tokens"]
