"""The reference readers, and the written list of where ours may differ from them.

Each gets the same file, in a child process without the limit on memory. What is no answer (a crash, a hang)
is no acceptance either.
"""

import warnings
from pathlib import Path

import gguf
import safetensors.torch
import sentencepiece
import tiktoken
import tokenizers
import torch
from tiktoken.load import load_tiktoken_bpe

from .tokenizers import LLAMA3

SECONDS = 5.0  # some never end; the others take milliseconds


def _safetensors(path: Path) -> None:
    safetensors.torch.load_file(path)


def _gguf(path: Path) -> None:
    for tensor in gguf.GGUFReader(path).tensors:
        tensor.data.max()


def _torch(path: Path) -> None:
    torch.load(path, weights_only=True, map_location="cpu")


def _sentencepiece(path: Path) -> None:
    sentencepiece.SentencePieceProcessor(model_file=str(path)).encode("a b")


def _tiktoken(path: Path) -> None:
    ranks = load_tiktoken_bpe(str(path))
    tiktoken.Encoding("test", pat_str=LLAMA3, mergeable_ranks=ranks, special_tokens={}).encode("a b\x7f")


def _tokenizers(path: Path) -> None:
    tokenizers.Tokenizer.from_file(str(path)).encode("a b\x7f")


READERS = {
    "safetensors": _safetensors,
    "gguf": _gguf,
    "torch": _torch,
    "sentencepiece": _sentencepiece,
    "tiktoken": _tiktoken,
    "tokenizers": _tokenizers,
}


def opinion(reference: tuple[str, Path]) -> dict:
    """Whether it takes the file, and its words if not."""
    warnings.simplefilter("ignore")
    try:
        READERS[reference[0]](reference[1])
        return {"got": "accepted", "message": ""}
    except BaseException as error:  # gguf raises what comes, Rust panics come as BaseException
        return {"got": type(error).__name__, "message": str(error)[:200]}
