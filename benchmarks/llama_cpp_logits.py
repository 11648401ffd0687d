"""llama.cpp's logits of windows of token ids: the child process of accuracy.py.

    PYTHON benchmarks/llama_cpp_logits.py MODEL.gguf CTX THREADS

It needs an interpreter with llama-cpp-python, and nothing else. Each line of standard input is an object
{"ids": [...], "first": n} in JSON. The logits that predict ids[first:] go to standard output as float32, and
nothing else does. llama.cpp keeps its default settings for KV cache and flash attention.
"""

import ctypes
import json
import sys

import llama_cpp as L


def main(path: str, ctx: int, threads: int) -> None:
    quiet = L.llama_log_callback(lambda level, text, user_data: None)
    L.llama_log_set(quiet, None)
    L.llama_backend_init()
    model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
    if not model:
        sys.exit(f"llama.cpp cannot load {path}")
    settings = L.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = ctx
    settings.n_threads = settings.n_threads_batch = threads
    context = L.llama_init_from_model(model, settings)
    row = 4 * L.llama_vocab_n_tokens(L.llama_model_get_vocab(model))
    batch = L.llama_batch_init(ctx, 0, 1)
    for line in sys.stdin:
        task = json.loads(line)
        ids, first = task["ids"], task["first"]
        batch.n_tokens = len(ids)
        for i, token in enumerate(ids):
            batch.token[i], batch.pos[i], batch.logits[i] = token, i, first - 1 <= i < len(ids) - 1
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, 0
        L.llama_memory_clear(L.llama_get_memory(context), True)
        if L.llama_decode(context, batch):
            sys.exit("llama_decode failed")
        for i in range(first - 1, len(ids) - 1):
            sys.stdout.buffer.write(ctypes.string_at(L.llama_get_logits_ith(context, i), row))
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
