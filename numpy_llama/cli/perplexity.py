"""Measure how well a model predicts a text.

FILE is plain text, for example WikiText-2's wiki.test.raw. It is cut into windows of --ctx tokens, and the
second half of each window is scored, as in llama.cpp. The command prints the perplexity and its standard
error. A lower perplexity is a better prediction.
"""

import argparse
import time
from dataclasses import asdict

from ..errors import ContextOverflowError, ParameterError, TextError
from ..inspect.perplexity import LEAST_CTX, perplexity
from . import common


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", type=common.path, help="the file with the text")
    common.add_model_arguments(parser)
    least = common.whole_number(LEAST_CTX)
    parser.add_argument("--ctx", type=least, default=512, metavar="N", help="tokens in a window [512]")
    parser.add_argument(
        "--windows", type=common.whole_number(1), metavar="N", help="score only the first N windows [all]"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")


def run(args: argparse.Namespace) -> None:
    try:
        data = args.file.read_bytes()
    except OSError as error:
        raise TextError(f"{args.file} cannot be read: {error.strerror}") from None
    text = common.as_text(data, str(args.file))
    llama = common.load_model(args)
    if args.ctx > llama.max_context:
        most = llama.model.args.max_seq_len
        memory = "" if llama.max_context == most else f", and memory has room for {llama.max_context}"
        raise ContextOverflowError(f"--ctx is {args.ctx}, the context has {most} tokens{memory}: give less")
    tokenizer = llama.tokenizer
    common.note_names(tokenizer, text)
    ids = tokenizer.encode(text, bos=tokenizer.add_bos)
    if len(ids) < args.ctx:
        raise ParameterError(f"{args.file} has {len(ids)} tokens, a window takes {args.ctx}: see --ctx")
    total = min(len(ids) // args.ctx, args.windows or len(ids))
    bos_id = tokenizer.bos_id if tokenizer.add_bos else None
    began = time.perf_counter()
    with common.count_bar("windows") as bar:
        bar("perplexity", 0, total)
        for now in perplexity(llama.model, ids, args.ctx, bos_id, total):
            bar(f"perplexity {now.perplexity:.4f}", now.windows, total)
            llama.check_unchanged()
    if args.json:
        seconds = round(time.perf_counter() - began, 6)
        print(common.results_json({**asdict(now), "ctx": args.ctx, "seconds": seconds}))
    else:
        counts = f"{now.windows} windows of {args.ctx} tokens, {now.tokens} scored"
        print(f"perplexity {now.perplexity:.4f} +/- {now.standard_error:.4f} ({counts})")
