"""The bug museum: bugs of other implementations of LLaMA, each as a change of this one.

`before` occurs once in `file`. When `after` replaces it, one of `tests` must fail. `source` is the public
report of the bug, repository#number on GitHub. OURS is a bug that was put in here, and at that time no test
failed. run.py applies the bugs one at a time.
"""

from dataclasses import dataclass

LAWS = "numpy_llama/proof/"


@dataclass(frozen=True)
class Bug:
    name: str
    source: str
    file: str
    before: str
    after: str
    tests: str  # files or tests, separated by spaces


F, MODEL, CACHE = "numpy_llama/functional.py", "numpy_llama/model.py", "numpy_llama/cache.py"
SAMPLING, GENERATE = (f"numpy_llama/generation/{name}.py" for name in ("sampling", "generate"))
FORMATS = "numpy_llama/backend/formats.py"
ROPE, ATTENTION, WHOLE = (f"{LAWS}test_{name}.py" for name in ("rope", "attention", "model"))
NORM, SOFTMAX, STORED = (f"{LAWS}test_{name}.py" for name in ("rms_norm", "softmax", "quantisation"))
CHANCE, WINDOWS = f"{LAWS}test_sampling.py", f"{LAWS}test_sliding_window.py"
BACKWARD, LEARNER = "numpy_llama/backward.py", "numpy_llama/learner.py"
GRADIENTS, LOSS, LEARNING = (f"{LAWS}test_{name}.py" for name in ("gradients", "loss", "learning"))
TRAINED_ATTENTION = f"{LAWS}test_attention_backward.py"
EXAMPLES, TRAINED = "numpy_llama/training/examples.py", "tests/training/test_examples.py"
TRAINER = "tests/training/test_trainer.py"
CUT, CUTTING = "numpy_llama/parallel/cut.py", f"{LAWS}test_cutting.py"
OURS = "a fault put in by hand, which no test noticed then"

# The steps of Sampler.__call__, to be put into another order.
STEPS = {
    1: """        if self.repetition_penalty != 1:
            logits = repetition_penalty(logits, seen_ids, self.repetition_penalty)
        _require_finite(logits)
""",
    2: """        if self.temperature == 0:
            return greedy(logits)
""",
    3: """        if self.top_k is not None:
            logits = top_k(logits, self.top_k)
""",
    4: """        if self.top_p is not None:
            logits = top_p(logits, self.top_p)
""",
    5: """        if self.min_p is not None:
            logits = min_p(logits, self.min_p)
""",
    6: """        logits = apply_temperature(logits, self.temperature)
""",
}


def chain(*order: int) -> str:
    return "".join(map(STEPS.__getitem__, order))


CHAIN = chain(1, 2, 3, 4, 5, 6)

BUGS = [
    # --- the operations
    Bug(
        "LayerNorm for RMSNorm",
        "ggml-org/llama.cpp#173",
        F,
        "    return x / np.sqrt(np.mean(x * x,",
        "    x = x - x.mean(axis=-1, keepdims=True)\n    return x / np.sqrt(np.mean(x * x,",
        NORM,
    ),
    Bug(
        "eps outside the root",
        "allenai/OLMo#281; EleutherAI/gpt-neox#1342",
        F,
        "np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight",
        "(np.sqrt(np.mean(x * x, axis=-1, keepdims=True)) + eps) * weight",
        NORM,
    ),
    Bug(
        "the weight of the norm before the mean",
        "tinygrad/tinygrad#5095, where the order of weight and cast was wrong",
        F,
        "    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight",
        "    x = x * weight\n    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)",
        NORM,
    ),
    Bug(
        "eps 1e-5 where the model has 1e-6",
        "ggml-org/llama.cpp#2373: perplexity 5.8986 for 5.8283; Lightning-AI/lit-llama#339",
        MODEL,
        'RMSNorm(w[f"layers.{layer}.ffn_norm.weight"], args.norm_eps)',
        'RMSNorm(w[f"layers.{layer}.ffn_norm.weight"], 1e-5)',
        WHOLE,
    ),
    Bug(
        "half-split RoPE on interleaved weights",
        "rasbt/LLMs-from-scratch#747",
        F,
        "    return (x.view(freqs_cis.dtype) * freqs_cis[..., None, :]).view(x.dtype)",
        "    a, b = np.split(x, 2, axis=-1)\n"
        "    cos, sin = freqs_cis.real[..., None, :], freqs_cis.imag[..., None, :]\n"
        "    return np.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)",
        f"{ROPE}::test_pairs_are_turned_as_complex_numbers",
    ),
    Bug(
        "rope_theta of the checkpoint unused",
        "karpathy/llama2.c#356",
        MODEL,
        "args.rope_theta, args.",
        "1e4, args.",
        WHOLE,
    ),
    Bug(
        "RoPE's scaling read, but unused",
        "Lightning-AI/litgpt#1713; Blaizzy/mlx-vlm#1710",
        MODEL,
        "args.rope_theta, args.rope_scaling,",
        "args.rope_theta, None,",
        WHOLE,
    ),
    Bug(
        "scaling factor 8, as in Llama 3.1, for all",
        "meta-llama/llama-models#241; pytorch/executorch#7265",
        "numpy_llama/rope.py",
        "(1 - keep) / self.factor",
        "(1 - keep) / 8",
        f"{ROPE}::test_a_factor_of_1_changes_nothing",
    ),
    Bug(
        "mask off by one: the next token is seen",
        "pbloem/former#10, the nearest that is public",
        F,
        "k=S - T + 1)",
        "k=S - T + 2)",
        ATTENTION,
    ),
    Bug(
        "mask off by one: no token sees itself",
        "pbloem/former#10, the nearest that is public",
        F,
        "k=S - T + 1)",
        "k=S - T)",
        ATTENTION,
    ),
    Bug(
        "mask forgets what is in the cache",
        "meta-llama/llama#900; hyprstream/hyprstream#1521",
        F,
        "k=S - T + 1)",
        "k=1)",
        ATTENTION,
    ),
    Bug(
        "no mask where there is a cache",
        "meta-llama/llama#900; hyprstream/hyprstream#1521",
        F,
        "    mask: Array = np.triu(",
        "    mask = np.zeros((T, S), dtype) if S > T else np.triu(",
        ATTENTION,
    ),
    Bug(
        "sliding window one position too long",
        "ml-explore/mlx-lm#390; huggingface/transformers#29623",
        F,
        "k=S - T - window)",
        "k=S - T - window - 1)",
        WINDOWS,
    ),
    Bug(
        "the sliding window never reaches attention",
        "unslothai/unsloth#8253",
        MODEL,
        "            attention = partial(attention, window=args.sliding_window)",
        "            pass",
        WINDOWS,
    ),
    Bug(
        "the cache of a sliding window drops what a chunk of the prompt still sees",
        "ml-explore/mlx-lm#390, where its cache is discussed",
        "numpy_llama/window.py",
        "args.sliding_window + PREFILL_CHUNK + BLOCK)",
        "args.sliding_window - 2 + BLOCK)",
        f"{WINDOWS}::test_the_cache_returns_what_is_seen_and_stores_little_more",
    ),
    Bug(
        "scores not divided by sqrt(Dh)",
        "mlc-ai/mlc-llm#3426",
        F,
        " @ k / math.sqrt(Dh) +",
        " @ k +",
        ATTENTION,
    ),
    Bug(
        "softmax over the wrong axis",
        "PetrochukM/PyTorch-NLP#2",
        F,
        "    return e / e.sum(axis=-1, keepdims=True)",
        "    return e / e.sum(axis=-2 if e.ndim > 1 else -1, keepdims=True)",
        SOFTMAX,
    ),
    Bug(
        "softmax without the maximum taken away",
        "ggml-org/llama.cpp#2665",
        F,
        "np.exp(x - x.max(axis=-1, keepdims=True))",
        "np.exp(x)",
        SOFTMAX,
    ),
    Bug(
        "key heads tiled, not repeated",
        "onnx/onnx#7274; apple/axlearn#842",
        F,
        "np.repeat(x, n_rep, axis=2)",
        "np.tile(x, (1, 1, n_rep, 1))",
        ATTENTION,
    ),
    Bug(
        "negative ids count from the end of the embedding",
        "BlinkDL/ChatRWKV#217",
        F,
        "tokens.min() >= 0 and ",
        "",
        f"{LAWS}test_embedding.py",
    ),
    Bug(
        "silu's exp overflows with a warning",
        "antirez/ds4#498",
        F,
        '    with np.errstate(over="ignore"):\n        return x / (1 + np.exp(-x))',
        "    return x * np.exp(x) / (1 + np.exp(x))",
        f"{LAWS}test_swiglu.py",
    ),
    # --- the model and its cache
    Bug(
        "w1 and w3 exchanged",
        "ml-explore/mlx-lm#767",
        MODEL,
        "F.swiglu(self.w_gate(x), self.w_up(x))",
        "F.swiglu(self.w_up(x), self.w_gate(x))",
        WHOLE,
    ),
    Bug(
        "cache written one position late",
        "microsoft/onnxruntime-genai#2354",
        CACHE,
        "k[:, new], v[:, new] = xk, xv",
        "late, T = slice(start_pos + 1, end + 1), k.shape[1] - start_pos - 1; "
        "k[:, late], v[:, late] = xk[:, :T], xv[:, :T]",
        f"{LAWS}test_cache.py",
    ),
    Bug(
        "positions begin at 0 again in the next turn",
        "pytorch/torchchat#1462; nntrainer/nntrainer#3814",
        GENERATE,
        "    start_pos = len(session.ids)\n",
        "    start_pos = 0\n",
        "tests/generation/test_generate.py::test_a_session_is_reused_as_far_as_the_prompts_agree",
    ),
    Bug(
        "a rewound cache still counts what lay behind",
        OURS,
        CACHE,
        "        self.filled[layer] = end\n",
        "        most = vars(self).setdefault('most', {})\n"
        "        self.filled[layer] = most[layer] = max(end, most.get(layer, 0))\n",
        f"{LAWS}test_cache.py::test_a_rewound_cache_holds_no_more",
    ),
    Bug(
        "a rewound cache still counts what lay behind, in C",
        OURS,
        "numpy_llama/backend/fused.py",
        "                one.filled[at_layers] = [at + T] * len(blocks)\n",
        "                one.most = max(at + T, vars(one).get('most', 0))\n"
        "                one.filled[at_layers] = [one.most] * len(blocks)\n",
        "tests/kernels/test_layer.py::test_rewound_caches_count_no_position_behind",
    ),
    Bug(
        "an update that stops halfway counts what it began",
        OURS,
        CACHE,
        "        self.filled[layer] = start_pos  #",
        "        #",
        "tests/generation/test_generate.py::test_an_update_that_stops_halfway_counts_nothing",
    ),
    Bug(
        "of the caches of a batch only two are checked",
        OURS,
        "numpy_llama/backend/fused.py",
        "            one.check(worst, at, one.batch, T)",
        "            one in caches[:2] and one.check(worst, at, one.batch, T)",
        "tests/generation/test_batch.py::test_each_of_many_caches_is_checked",
    ),
    # --- files and text
    Bug(
        "K permuted with n_heads",
        "ggml-org/llama.cpp#3364; huggingface/transformers#31788",
        "numpy_llama/checkpoint/names.py",
        "interleaved_rows(heads, args.head_dim)",
        "interleaved_rows(args.n_heads, args.head_dim * heads // args.n_heads)",
        "tests/checkpoint/test_huggingface.py",
    ),
    Bug(
        "w1 and w3 exchanged in the names",
        "ml-explore/mlx-lm#767",
        "numpy_llama/checkpoint/names.py",
        '("feed_forward.w_gate", "feed_forward.w1",',
        '("feed_forward.w_gate", "feed_forward.w3",',
        "tests/checkpoint/test_meta.py",
    ),
    Bug(
        "double BOS: the template's and the tokenizer's",
        "abetlen/llama-cpp-python#1501; sgl-project/sglang#888",
        "numpy_llama/text/chat.py",
        "        if tokenizer.add_bos and tokenizer.bos_id not in ids:",
        "        if tokenizer.add_bos:",
        "tests/text/test_chat.py::test_llama2_by_hand",
    ),
    Bug(
        "double BOS: the template's, which does not begin with it",
        OURS,
        "numpy_llama/text/chat.py",
        "        if tokenizer.add_bos and tokenizer.bos_id not in ids:",
        "        if tokenizer.add_bos and ids[:1] != [tokenizer.bos_id]:",
        "tests/text/test_chat.py::test_bos_stands_where_the_template_writes_it_as_in_transformers",
    ),
    Bug(
        "one end token of two",
        "vllm-project/vllm#4180",
        "numpy_llama/text/tokenizer.py",
        "eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))",
        "eos_ids = tuple(dict.fromkeys(i for i in ends if i is not None))[:1]",
        "tests/text/test_tokenizer.py::test_smollm2_is_what_its_file_says",
    ),
    Bug(
        "spaces stripped from every piece of the stream",
        "huggingface/transformers#22710; karpathy/llama2.c#1",
        "numpy_llama/text/tokenizer.py",
        "        return self._utf8.decode(data)\n",
        "        return self._utf8.decode(data).strip()\n",
        "tests/text/test_tokenizer.py::test_byte_level_round_trip",
    ),
    Bug(
        "characters of several tokens decoded one by one",
        "abetlen/llama-cpp-python#57",
        "numpy_llama/text/tokenizer.py",
        "        return self._utf8.decode(data)\n",
        '        return data.decode("utf-8", "replace")\n',
        "tests/text/test_tokenizer.py::test_byte_level_round_trip",
    ),
    Bug(
        "the space behind a control token dropped from a stream",
        OURS,
        "numpy_llama/text/tokenizer.py",
        "        if data and self._drop_space:\n            data,",
        "        self._drop_space |= not data and self._tokenizer.add_space\n"
        "        if data and self._drop_space:\n            data,",
        "tests/text/test_tokenizer_files.py::test_a_stream_with_control_tokens_anywhere_is_the_text_at_once",
    ),
    Bug(
        "only the space at once behind BOS kept out of a stream",
        OURS,
        "numpy_llama/text/tokenizer.py",
        "        if data and self._drop_space:\n",
        "        if self._drop_space:\n",
        "tests/text/test_tokenizer_files.py::test_a_stream_with_control_tokens_anywhere_is_the_text_at_once",
    ),
    Bug(
        "a space after every added token, whatever the file says",
        "huggingface/transformers#29872; ggml-org/llama.cpp#7049",
        "numpy_llama/text/tokenizer.py",
        " and (begins or not only_first)",
        "",
        "tests/text/test_added_tokens.py::test_a_text_is_cut_as_tokenizers_cuts_it",
    ),
    Bug(
        "normalized added tokens looked for in the text as it is",
        "huggingface/tokenizers#1786",
        "numpy_llama/text/added.py",
        "found = {self.normalize(text): i for",
        "found = {text: i for",
        "tests/text/test_added_tokens.py::test_a_text_is_cut_as_tokenizers_cuts_it",
    ),
    Bug(
        "of the vectors of all shards two are compared",
        OURS,
        "numpy_llama/checkpoint/meta.py",
        "            for shard, part in zip(self.shards, parts, strict=True):\n                if not",
        "            for shard, part in zip(self.shards[:2], parts):\n                if not",
        "tests/checkpoint/test_meta.py::test_each_shard_must_fit_all_others",
    ),
    Bug(
        "of the names of all shards two are compared",
        OURS,
        "numpy_llama/checkpoint/meta.py",
        "        for shard in self.shards[1:]:\n",
        "        for shard in self.shards[1:2]:\n",
        "tests/checkpoint/test_meta.py::test_each_shard_must_fit_all_others",
    ),
    Bug(
        "of the shapes in all shards two are compared",
        OURS,
        "numpy_llama/checkpoint/meta.py",
        "if odd := [p for p in parts if",
        "if odd := [p for p in parts[:2] if",
        "tests/checkpoint/test_meta.py::test_each_shard_must_fit_all_others",
    ),
    Bug(
        "of the parts of a GGUF two are compared",
        OURS,
        "numpy_llama/checkpoint/gguf/file.py",
        "            if (found := part.get(key, int)) != by_name:",
        "            if i < 2 and (found := part.get(key, int)) != by_name:",
        "tests/checkpoint/test_gguf.py::test_parts_that_do_not_belong_together_are_refused",
    ),
    Bug(
        "of the files of an index two are compared",
        OURS,
        "numpy_llama/checkpoint/huggingface.py",
        "if odd := {tensor for tensor in wanted[name] ^ file.tensors.keys()",
        "if odd := {tensor for tensor in wanted[name] ^ file.tensors.keys() if name in sorted(wanted)[:2]",
        "tests/checkpoint/test_huggingface.py::test_an_index_that_is_wrong_about_its_files",
    ),
    # --- choosing
    Bug(
        "top-p drops the id that reaches p",
        "ggml-org/llama.cpp#1953; skyzh/tiny-llm#32",
        SAMPLING,
        "np.cumsum(falling) - falling <= p",
        "np.cumsum(falling) <= p",
        f"{CHANCE}::test_top_p_keeps_the_smallest_set_that_reaches_p",
    ),
    Bug(
        "the penalty makes negative logits likelier",
        "huggingface/transformers#2302",
        SAMPLING,
        "np.where(x > 0, x / penalty, x * penalty)",
        "x / penalty",
        f"{CHANCE}::test_seen_ids_become_less_likely",
    ),
    Bug(
        "top-k keeps all that are equal to the last",
        "vllm-project/vllm#50979",
        SAMPLING,
        "keep[np.flatnonzero(logits == kth)[: k - keep.sum()]] = True",
        "keep[logits == kth] = True",
        f"{CHANCE}::test_top_k_keeps_exactly_k",
    ),
    Bug(
        "min-p of raw logits",
        OURS,
        SAMPLING,
        CHAIN,
        "        raw = logits\n"
        + CHAIN.replace(
            "= min_p(logits, self.min_p)", "= np.where(min_p(raw, self.min_p) > -np.inf, logits, -np.inf)"
        ),
        "tests/generation/test_sampling.py::test_what_is_left_where_the_order_shows",
    ),
    Bug(
        "min-p after the temperature",
        OURS,
        SAMPLING,
        CHAIN,
        chain(1, 2, 3, 4, 6, 5),
        "tests/generation/test_sampling.py::test_the_sampler_is_the_chain",
    ),
    Bug(
        "the temperature before the penalty",
        OURS,
        SAMPLING,
        CHAIN,
        chain(2, 6, 1, 3, 4, 5),
        "tests/generation/test_sampling.py",
    ),
    Bug(
        "top-k after the temperature",
        OURS,
        SAMPLING,
        CHAIN,
        chain(1, 2, 6, 3, 4, 5),
        "tests/generation/test_sampling.py::test_the_sampler_is_the_chain",
    ),
    Bug(
        "top-p before top-k",
        OURS,
        SAMPLING,
        CHAIN,
        chain(1, 2, 4, 3, 5, 6),
        "tests/generation/test_sampling.py::test_the_steps_are_those_of_transformers",
    ),
    Bug(
        "min-p before top-p",
        OURS,
        SAMPLING,
        CHAIN,
        chain(1, 2, 3, 5, 4, 6),
        "tests/generation/test_sampling.py::test_what_is_left_where_the_order_shows",
    ),
    # --- stored weights
    Bug(
        "neighbours, not halves, share a byte",
        "kekzl/imp#722",
        FORMATS,
        "    return np.concatenate([q & 0x0F, q >> 4], axis=-1)",
        "    return np.stack([q & 0x0F, q >> 4], axis=-1).reshape(*q.shape[:-1], -1)",
        STORED,
    ),
    Bug(
        "q - 8 in unsigned bytes",
        "tile-ai/tilelang#2947",
        FORMATS,
        "(q.view(np.int8) - 8)",
        "(q - np.uint8(8))",
        STORED,
    ),
    Bug(
        "bfloat16 cut off, not rounded",
        "paiml/aprender#2144",
        FORMATS,
        "(bits + 0x7FFF + ((bits >> 16) & 1)) >> 16",
        "bits >> 16",
        f"{STORED}::test_weights_become_the_bytes_of_ggml",
    ),
    Bug(
        "a NaN becomes infinite in bfloat16",
        "paiml/aprender#2144",
        FORMATS,
        "(bits >> 16) | 64",
        "(bits >> 16)",
        f"{STORED}::test_bf16_by_hand",
    ),
    # --- learning
    Bug(
        "the weight of the norm left out of dx",
        "karpathy/llm.c#763, where a reader reports it of his own code",
        BACKWARD,
        "    xh, g = x * r, dy * weight",
        "    xh, g = x * r, dy",
        GRADIENTS,
    ),
    Bug(
        "dx of the norm written over dy before the weight's gradient",
        "unslothai/unsloth#4550; ggml-org/ggml#1491, where the scheduler shared the memory",
        BACKWARD,
        "    xh, g = x * r, dy * weight",
        "    xh, g = x * r, np.multiply(dy, weight, out=dy)",
        GRADIENTS,
    ),
    Bug(
        "the norm's weight never learns",
        "unslothai/unsloth#4533",
        LEARNER,
        '        return dx, {"weight": dweight}',
        "        return dx, {}",
        LEARNING,
    ),
    Bug(
        "the residual's gradient sent through the norm",
        "Dao-AILab/quack#53",
        BACKWARD,
        '    dh = dy + back("ffn_norm", dhn, s.h)',
        '    dh = back("ffn_norm", dy + dhn, s.h)',
        LEARNING,
    ),
    Bug(
        "the gradients of gate and up exchanged",
        "unslothai/unsloth#3314",
        BACKWARD,
        "    return ds * up * sig * (1 + gate * (1 - sig)), ds * F.silu(gate)",
        "    return ds * F.silu(gate), ds * up * sig * (1 + gate * (1 - sig))",
        GRADIENTS,
    ),
    Bug(
        "RoPE turned forward in the backward pass",
        "ngxson/llama.cpp#59, where the flag of the direction was inverted",
        BACKWARD,
        "    return F.apply_rotary_emb(dy, freqs_cis.conj())",
        "    return F.apply_rotary_emb(dy, freqs_cis)",
        GRADIENTS,
    ),
    Bug(
        "a token that occurs twice learns once",
        "tracel-ai/burn#5296",
        BACKWARD,
        "    np.add.at(dweight, tokens, dx)",
        "    dweight[tokens] += dx",
        GRADIENTS,
    ),
    Bug(
        "dk and dv of one head of each group",
        "marin-community/levanter#449",
        BACKWARD,
        "    return y.reshape(B, K, H // K, S, Dh).sum(axis=2).swapaxes(1, 2)",
        "    return y.reshape(B, K, H // K, S, Dh)[:, :, 0].swapaxes(1, 2)",
        f"{TRAINED_ATTENTION}::test_every_key_learns_from_the_last_query",
    ),
    Bug(
        "dk and dv of the wrong group of heads",
        "XunhaoLai/native-sparse-attention-triton#27",
        BACKWARD,
        "    return y.reshape(B, K, H // K, S, Dh).sum(axis=2).swapaxes(1, 2)",
        "    return y.reshape(B, H // K, K, S, Dh).sum(axis=1).swapaxes(1, 2)",
        f"{TRAINED_ATTENTION}::test_a_token_that_sees_itself_alone",
    ),
    Bug(
        "packed documents see each other",
        "huggingface/trl#1230; huggingface/nanoVLM#204",
        BACKWARD,
        "pairwise([*np.unique(row).tolist(), len(row)])",
        "pairwise([0, len(row)])",
        TRAINED_ATTENTION,
    ),
    Bug(
        "positions go on over packed documents, beyond the context",
        "huggingface/nanoVLM#204; RoPE is relative, so within the context no result changes",
        LEARNER,
        "        positions = np.arange(tokens.shape[1]) - first",
        "        positions = np.arange(tokens.shape[1]) - 0 * first",
        "tests/model/test_learner.py",
    ),
    Bug(
        "the mean of each micro-batch, not of the batch",
        "huggingface/transformers#35203; ml-explore/mlx-lm#1413",
        BACKWARD,
        "weights.reshape(-1).astype(h.dtype)",
        "(weights / max(np.count_nonzero(weights), 1)).reshape(-1).astype(h.dtype)",
        LEARNING,
    ),
    Bug(
        "the mean of each chunk of the loss",
        "NVIDIA-NeMo/Automodel#3803",
        BACKWARD,
        "        loss += float(w[rows] @ nll)",
        "        loss += float(w[rows] @ nll) / max(len(rows), 1)",
        LOSS,
    ),
    Bug(
        "NaN from a batch whose targets are all masked",
        "NVIDIA-NeMo/Automodel#3796; ml-explore/mlx-lm#1355",
        BACKWARD,
        "    loss, dx, gradients = 0.0, np.zeros_like(x), Gradients()",
        "    loss, dx, gradients = 0.0 / np.float64(np.count_nonzero(w)), np.zeros_like(x), Gradients()",
        LOSS,
    ),
    Bug(
        "masked rows are computed, and padding is a target",
        "ml-explore/mlx-lm, where the mask of the loss had one position too many",
        BACKWARD,
        "    rows = np.flatnonzero(weights)",
        "    rows = np.arange(len(weights))",
        LOSS,
    ),
    Bug(
        "the loss writes its mask into the caller's targets",
        "NVIDIA-NeMo/Automodel#3917",
        BACKWARD,
        "    loss, dx, gradients = 0.0, np.zeros_like(x), Gradients()",
        "    y[w == 0] = -100\n    loss, dx, gradients = 0.0, np.zeros_like(x), Gradients()",
        LOSS,
    ),
    Bug(
        "a tied embedding gets the gradient of the table alone",
        "ggml-org/llama.cpp#9065; huggingface/peft#2803",
        LEARNER,
        '                head["weight"][ids] += rows',
        '                head["weight"] = B.embedding_backward(dx, run.tokens, len(self.tok_embeddings))',
        LEARNING,
    ),
    Bug(
        "a tied embedding learns in two separate steps",
        "paiml/entrenar#314",
        LEARNER,
        '                add(gradients, head, "tok_embeddings.")',
        '                add(gradients, head, "output.")',
        LEARNING,
    ),
    Bug(
        "a block computed again without all of its arguments",
        "huggingface/peft#2826",
        LEARNER,
        "        _, saved = functions.block_forward(block, x, freqs_cis, first)",
        "        _, saved = functions.block_forward(block, x, freqs_cis, np.zeros_like(first))",
        f"{LEARNING}::test_checkpointing_changes_no_bit",
    ),
    Bug(
        "nothing flows back through a frozen weight",
        "microsoft/LoRA#120; huggingface/transformers#26221",
        LEARNER,
        "        return self.linear_dx(dy, self.weight), {}",
        "        return 0 * self.linear_dx(dy, self.weight), {}",
        f"{LEARNING}::test_only_what_is_put_in_learns",
    ),
    # --- training
    Bug(
        "the mean of the means of micro-batches",
        "huggingface/transformers#34191; huggingface/trl#2175; ml-explore/mlx-lm#1544",
        "numpy_llama/training/trainer.py",
        "self.objective.gradients(self.learner, group, n, gradients)",
        "self.objective.gradients(self.learner, group, self.objective.size(group) or 1, gradients)",
        TRAINER,
    ),
    Bug(
        "the last partial micro-batch is left out",
        "huggingface/transformers#39659",
        "numpy_llama/training/batch.py",
        "    return [*groups.values()]",
        "    return [group for group in groups.values() if inputs(group) * n >= total]",
        TRAINER,
    ),
    Bug(
        "packed examples see each other",
        "huggingface/trl#1230",
        "numpy_llama/training/batch.py",
        "np.repeat(starts % shape[1], lengths)",
        "np.repeat(0 * starts, lengths)",
        TRAINER,
    ),
    Bug(
        "a loss that is not finite goes on",
        "Nerogar/OneTrainer#1147",
        "numpy_llama/training/trainer.py",
        "if not math.isfinite(x):",
        "if math.isinf(x) and x < 0:",
        f"{TRAINER}::test_a_number_that_is_not_finite_stops_with_step_and_examples",
    ),
    Bug(
        "the answer is trained from the first mark in a text on",
        "huggingface/trl#598, #980, #1191, which search for the template's text",
        EXAMPLES,
        "begin, end = end_of(i, True), end_of(i + 1, False)",
        "begin, end = end_of(i, True) - 3, end_of(i + 1, False)",
        TRAINED,
    ),
    Bug(
        "the stop token is not trained",
        "huggingface/trl#5988; unslothai/unsloth#416",
        EXAMPLES,
        "trained[begin : stop + 1] = True",
        "trained[begin:stop] = True",
        TRAINED,
    ),
    Bug(
        "BOS twice before a text",
        "OpenRLHF/OpenRLHF#393; huggingface/trl#4481",
        EXAMPLES,
        "ids = tokenizer.encode(text, bos",
        "ids = [tokenizer.bos_id] * tokenizer.add_bos + tokenizer.encode(text, bos",
        f"{TRAINED}::test_a_text_has_one_bos_and_one_eos",
    ),
    Bug(
        "no EOS after a text",
        "axolotl-ai-cloud/axolotl#1616",
        EXAMPLES,
        "eos=bool(tokenizer.eos_ids)",
        "eos=False",
        TRAINED,
    ),
    Bug(
        "examples without a target are kept",
        "ml-explore/mlx-lm#1355",
        EXAMPLES,
        "if all(example.trained.any() for example in row):",
        "if row:",
        TRAINED,
    ),
    Bug(
        "the first step learns nothing",
        "karpathy/llama2.c, where the warm-up begins at 0",
        "numpy_llama/training/optimizer.py",
        "highest * (step + 1) / warmup",
        "highest * step / warmup",
        "tests/training/test_optimizer.py::test_the_learning_rate_rises_then_falls_and_is_never_0",
    ),
    Bug(
        "a resumed run begins with the first data again",
        "huggingface/transformers#46628; huggingface/accelerate#4071",
        "numpy_llama/training/state.py",
        "optimizer.t = self.step",
        "optimizer.t = 0",
        "tests/training/test_state.py",
    ),
    Bug(
        "the old checkpoint is removed before the new one is whole",
        "huggingface/transformers#27820; Lightning-AI/pytorch-lightning#688",
        "numpy_llama/training/state.py",
        "    write_safetensors(path, tensors",
        "    path.unlink(missing_ok=True)\n    write_safetensors(path, tensors",
        "tests/training/test_state.py",
    ),
    Bug(
        "weights of few bits that no step can move",
        "workofart/ml-by-hand#85",
        "numpy_llama/training/models.py",
        "np.array(w.dequantize(), np.float32)",
        "np.array(w.dequantize(), np.float16)",
        "tests/training/test_pretrain.py::test_weights_of_fewer_bits_move_by_steps_that_these_cannot_hold",
    ),
    Bug(
        "the scale that is saved is not the one of the training",
        "ggml-org/llama.cpp#2632",
        "numpy_llama/training/lora.py",
        "LowRank(part.lora_a, part.lora_b, part.scale)",
        "LowRank(part.lora_a, part.lora_b, 1.0)",
        "tests/training/test_finetune.py::test_the_adapter_that_is_saved_is_the_one_that_was_trained",
    ),
    # --- several ranks
    Bug(
        "query heads are cut from their key head",
        "NVIDIA/TensorRT-LLM#4308, where the key head itself was cut",
        CUT,
        "        return tuple(slice(part.start * n_rep, part.stop * n_rep) for part in kv_heads), kv_heads",
        "        return cut(args.n_heads, shares, least=1), kv_heads",
        CUTTING,
    ),
    Bug(
        "rows beyond the last whole unit are on no rank",
        "huggingface/transformers#37051",
        CUT,
        "units, end, ends = -(-n // unit), 0, [0]",
        "units, end, ends = n // unit, 0, [0]",
        CUTTING,
    ),
    Bug(
        "the step is counted once for each parameter",
        "flashlight/flashlight#143",
        "numpy_llama/training/optimizer.py",
        "        h, self.t = self.hyperparameters, self.t + 1\n"
        "        for name, p in self.parameters.items():\n",
        "        h = self.hyperparameters\n"
        "        for name, p in self.parameters.items():\n"
        "            self.t += 1\n",
        "tests/training/test_optimizer.py::test_adamw_is_pytorchs",
    ),
    Bug(
        "decay goes through the moments",
        "pytorch/pytorch#3740, which brings what Loshchilov and Hutter found",
        "numpy_llama/training/optimizer.py",
        "        p_ *= 1 - lr * weight_decay\n        p_ -= rate * m_ /",
        "        m_ += (1 - h.beta1) * weight_decay * p_\n        p_ -= rate * m_ /",
        f"{LAWS}test_training.py",
    ),
    Bug(
        "LoRA is scaled by alpha, not by alpha / r",
        "rasbt/LLMs-from-scratch#821; Blaizzy/mlx-vlm#841",
        "numpy_llama/training/lora.py",
        "if rslora else alpha / rank",
        "if rslora else alpha",
        "tests/training/test_finetune.py::test_an_adapter_begins_without_effect_and_has_the_shapes_of_its_matrices",
    ),
    Bug(
        "DPO takes the mean over an answer's tokens",
        "jingyaogong/minimind#298; linkedin/Liger-Kernel#693",
        "numpy_llama/training/batch.py",
        "        return np.add.reduceat(x.reshape(-1), self.starts, dtype=np.float64)",
        "        lengths = np.diff(self.starts, append=self.tokens.size)\n"
        "        return np.add.reduceat(x.reshape(-1), self.starts, dtype=np.float64) / lengths",
        "tests/training/test_trainer.py",
    ),
    # --- C
    Bug(
        "a rank's own part lies at the beginning of the gathered whole",
        "turboderp-org/exllamav3#233",
        "csrc/layer.c",
        "part_of(c, (gathered){NL_DIM, -1}, c->a->cut->rank)",
        "part_of(c, (gathered){NL_DIM, -1}, 0)",
        "tests/kernels/test_layer.py::test_layers_on_ranks_have_the_bits_of_whole_ones",
    ),
    Bug(
        "32-bit offsets into the weights",
        "karpathy/llama2.c#164",
        "csrc/formats.h",
        "return (const uint8_t *)w->data + r * row_bytes + at;",
        "return (const uint8_t *)w->data + (int)(r * row_bytes) + at;",
        "tests/kernels/test_kernels.py::test_rows_beyond_4_gib_are_found",
    ),
    Bug(
        "rows beyond the last whole panel dropped",
        "ggml-org/llama.cpp#16443",
        "csrc/linear.c",
        "/ n + panel - 1) / panel * panel;",
        "/ n) / panel * panel;",
        "tests/kernels/test_kernels.py",
    ),
    Bug(
        "sums of bytes saturate at 32,767",
        "ikawrakow/ik_llama.cpp#427",
        "csrc/vec_avx2.h",
        "_mm256_maddubs_epi16(_mm256_abs_epi8(a), _mm256_sign_epi8(b, a))",
        "_mm256_maddubs_epi16(a, b)",
        "tests/kernels/test_quantized_activations.py::test_it_is_linear_of_x_rounded",
    ),
    Bug(
        "minima of a K format forgotten",
        "paiml/aprender#3105; ggml-org/llama.cpp#1117",
        "csrc/linear_gemv.c",
        "y[t] = vec_fma(m, vec_all(x_sums(x, T)[t]), y[t]);",
        "y[t] = vec_fma(vec_zero(), vec_all(x_sums(x, T)[t]), y[t]);",
        "tests/kernels/test_quantized_activations.py::test_it_is_linear_of_x_rounded",
    ),
    Bug(
        "the sum not rescaled when a larger score comes",
        "Dao-AILab/flash-attention#2082, where the maximum it was rescaled by was wrong",
        "csrc/attention.c",
        "            l = l * before + here;",
        "            l = l + here;",
        "tests/kernels/test_attention_kernel.py::test_attention_is_within_the_rounding_of_its_sums",
    ),
    Bug(
        "spans from the fifth on dropped: decoding behind 4,096 positions",
        "found here by putting it in: no test had more than three spans",
        "csrc/attention.c",
        "            for (int64_t i = 1; i < spans; i++)",
        "            for (int64_t i = 1; i < spans && i < 4; i++)",
        "tests/kernels/test_attention_kernel.py::test_each_of_many_spans_counts_by_its_probability",
    ),
    Bug(
        "spans from the fifth on dropped: a prompt longer than 4,096 positions",
        "the same in the other loop over spans",
        "csrc/attention.c",
        "            for (int64_t j = begin + KV_SPAN; j < visible_positions(",
        "            for (int64_t j = begin + KV_SPAN; j < 4 * KV_SPAN && j < visible_positions(",
        "tests/kernels/test_attention_kernel.py::test_each_of_many_spans_counts_by_its_probability",
    ),
]
