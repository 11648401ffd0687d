"""Where a reference reader takes a file that we refuse: stricter on purpose, each with its reason.

There is no list of the opposite: nothing is taken here that the reference refuses.
"""

_CONTAINER = "gguf-py reads the container, not what it says of a model and its vocabulary"
_LOCAL_HEADER = "torch looks at the central directory alone, and two readers of one file may see two files"

# By case, or by case and variant.
STRICTER: dict[str | tuple[str, str], str] = {
    (
        "G03",
        "big-endian",
    ): "gguf-py swaps bytes; a big-endian LLaMA is nowhere to be had, and could not be mapped",
    "G07": "gguf-py takes a key without a name",
    ("G14", "5"): "ggml itself has four dimensions; gguf-py takes any number",
    "G22": "gguf-py takes tensors that overlap, lie unaligned or behind holes; ggml does not",
    **dict.fromkeys(["G25", "G26", "G27", "G28", "G29", "G30"], _CONTAINER),
    ("T06", "nan"): "no order of merging is defined by such a score",
    ("T06", "inf"): "no order of merging is defined by such a score",
    ("T06", "-inf"): "no order of merging is defined by such a score",
    ("T07", "a gap"): "the ids of special tokens are counted from the number of lines",
    ("T07", "a token twice"): "a dictionary of tokens keeps the later one, and the first can never be made",
    ("T09", "an added id after a gap"): "`tokenizers` gives such a token another id than the file",
    ("T09", "an added token without a text"): "`tokenizers` keeps an added token that nothing can match",
    ("T09", "a gap of 2^21 ids"): "a gap is filled up to MAX_TOKENS ids",
    ("T09", "an added token of 10^5 characters"): "no token has so long a text",
    ("T09", "ids in a circle"): "`tokenizers` lets an added token take another's id, or renumbers it",
    ("T09", "an added id twice"): "`tokenizers` renumbers added tokens as it likes",
    ("T09", "an added id of 2^31"): "`tokenizers` renumbers added tokens as it likes",
    ("T09", "an id of 2^31"): "`tokenizers` takes a vocabulary with holes; the embedding has no such row",
    ("T09", "an id twice"): "`tokenizers` keeps one of the two, and which one is chance",
    "P07": "torch makes a view of 10^12 elements on four; whoever copies it runs out of memory",
    ("P13", "garbage after STOP"): "what follows STOP is read by nobody: a hiding place",
    "P14": "torch.save never compresses, and a compressed weight cannot be mapped",
    "P15": "torch reads one record under two names; so are zip bombs built",
    ("P16", "archive/../../x"): "torch extracts nothing and so do we, but others do",
    ("P16", "archive/a\\x00b"): "what follows the NUL is seen by some readers only",
    "P17": _LOCAL_HEADER,
    "P18": _LOCAL_HEADER,
    ("P19", "data.pkl"): "torch does not compare the checksum of the pickle",
    ("P20", "archive/code/x.py"): "torch looks for constants.pkl alone",
    ("P21", "big"): "torch swaps bytes; big-endian weights could not be mapped",
    ("P22", "big-endian"): "torch swaps bytes; big-endian weights could not be mapped",
}
