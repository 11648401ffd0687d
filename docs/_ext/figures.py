"""The figures of the course. Each is drawn from the package's own functions."""

import time
import tracemalloc
from dataclasses import replace

import language
import matplotlib.pyplot as plt  # which shows a cell's figure by itself
import numpy as np
from matplotlib_inline.backend_inline import set_matplotlib_formats

import numpy_llama as nl
from numpy_llama import backward, learner
from numpy_llama import functional as F
from numpy_llama.backend.formats import StoredTensor
from numpy_llama.backend.kernels import Kernels, KernelWeight, available_cpus, fma_probe, read_probe
from numpy_llama.checkpoint import open_checkpoint
from numpy_llama.checkpoint.download import pull
from numpy_llama.checkpoint.presets import PRESETS
from numpy_llama.proof.tiny import TINY, random_tokens, random_weights
from numpy_llama.training.objectives import DPO
from numpy_llama.training.optimizer import AdamW, Hyperparameters, learning_rate
from numpy_llama.training.order import Order
from numpy_llama.training.trainer import Schedule, Trainer

INK, PALE, ACCENT = "#3b6ea5", "#9db8d3", "#d1603d"

set_matplotlib_formats("svg")  # sharp at every size
plt.rcParams |= {"figure.facecolor": "none", "axes.facecolor": "none"}  # the page has the ground: course.css


def rope_circles():
    """Four pairs of a head of 64 numbers, turned by positions 0 to 7."""
    table = F.precompute_freqs_cis(64, 8, 10_000.0)
    _, all_axes = plt.subplots(1, 4, figsize=(9, 2.6), subplot_kw={"aspect": "equal"})
    for axes, j in zip(all_axes, (0, 4, 10, 31), strict=True):
        z = table[:, j]
        axes.add_patch(plt.Circle((0, 0), 1, fill=False, color=PALE))
        for m, point in enumerate(z):
            axes.plot([0, point.real], [0, point.imag], color=INK, alpha=0.25 + 0.09 * m, lw=1.2)
            axes.plot(point.real, point.imag, "o", color=ACCENT if m == 0 else INK, ms=4)
        axes.set(xlim=(-1.2, 1.2), ylim=(-1.2, 1.2), title=f"pair {j}")
        axes.axis("off")


def model():
    return nl.load("smollm2-135m-instruct", backend="numpy")


def residual_stream(n_layers=3):
    """The stream from below to above, and what each layer adds."""
    _, axes = plt.subplots(figsize=(6, 6.2))
    stream = {"arrowstyle": "-|>", "lw": 4, "color": PALE}
    axes.annotate("", (0, 2 * n_layers + 1.6), (0, -0.3), arrowprops=stream)
    box = {"boxstyle": "round,pad=0.5", "fc": "white", "ec": INK}
    for i in range(2 * n_layers):
        y = i + 0.6
        name = ("attention", "FFN")[i % 2]
        axes.annotate("", (1.35, y), (0, y - 0.28), arrowprops={"arrowstyle": "->", "color": INK})
        axes.annotate("", (0, y + 0.3), (1.35, y), arrowprops={"arrowstyle": "->", "color": ACCENT})
        axes.text(1.4, y, f"norm, {name}", bbox=box, va="center", fontsize=10)
        axes.text(-0.16, y + 0.3, "+", color=ACCENT, ha="right", va="center", fontsize=14)
    for i in range(n_layers):
        axes.text(3.4, 2 * i + 1.1, f"layer {i}", va="center", color="grey")
    axes.text(0, -0.45, "tokens: embedding", ha="center", va="top", fontsize=10)
    axes.text(0, 2 * n_layers + 1.75, "norm, output: logits", ha="center", va="bottom", fontsize=10)
    axes.set(xlim=(-1.6, 4.2), ylim=(-0.9, 2 * n_layers + 2.2))
    axes.axis("off")


def stream_lengths(text="A norm keeps all vectors at one length."):
    """Root mean squares of the stream after each layer, and of the input of its attention."""
    llama = model()
    tokens = np.array([llama.tokenizer.encode(text)])
    with nl.trace(llama, "layers.*", "layers.*.attention_norm") as seen:
        llama.model(tokens)

    def rms(name):
        return [np.sqrt(np.mean(seen[name.format(i)][0, -1] ** 2)) for i in range(llama.model.args.n_layers)]

    _, axes = plt.subplots(figsize=(7, 3.2))
    axes.semilogy(rms("layers.{}"), "o-", color=INK, ms=3, label="the stream after the layer")
    axes.semilogy(
        rms("layers.{}.attention_norm"), "o-", color=ACCENT, ms=3, label="the input of its attention"
    )
    axes.set(xlabel="layer", ylabel="root mean square")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def three_heads(text):
    """The heads of all that look most at the word before, at the first token, and elsewhere."""
    llama = model()
    ids = llama.tokenizer.encode(text)
    labels = [llama.tokenizer.piece(i).strip() for i in ids]
    with nl.trace(llama, "layers.*.attention.weights") as seen:
        llama.model(np.array([ids]))
    weights = np.stack([w[0] for w in seen.values()])  # (layers, H, T, S)
    rows = np.arange(1, len(ids))
    before, first = weights[:, :, rows, rows - 1].mean(-1), weights[:, :, 1:, 0].mean(-1)
    here = weights[:, :, rows, rows].mean(-1)
    chosen = [np.unravel_index(x.argmax(), x.shape) for x in (before, first, -(before + first + here))]
    _, all_axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    for axes, (layer, head) in zip(all_axes, chosen, strict=True):
        axes.imshow(weights[layer, head], cmap="Blues", vmin=0, vmax=1)
        axes.set_xticks(range(len(ids)), labels, rotation=90, fontsize=8)
        axes.set_yticks(range(len(ids)), labels, fontsize=8)
        axes.set_title(f"layer {layer}, head {head}", fontsize=10)


def similarities(words):
    """Cosine similarities of the words' rows of the embedding."""
    llama = model()
    ids = [llama.tokenizer.encode(" " + word)[0] for word in words]
    rows = F.embedding(np.array([ids]), llama.model.tok_embeddings)[0]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    figure, axes = plt.subplots(figsize=(5.6, 4.8), layout="constrained")
    image = axes.imshow(rows @ rows.T, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(words)), words, rotation=90, fontsize=9)
    axes.set_yticks(range(len(words)), words, fontsize=9)
    figure.colorbar(image, ax=axes, label="cosine similarity", shrink=0.8)


def work_per_token(prompt=20, new=30):
    """Tokens that go through the layers for each new one."""
    steps = np.arange(new)
    _, axes = plt.subplots(figsize=(7, 3))
    axes.plot(steps, prompt + steps, color=ACCENT, label="without a cache")
    axes.plot(steps, np.where(steps == 0, prompt, 1), color=INK, label="with a cache")
    axes.set(xlabel="new token", ylabel="tokens computed", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def gate():
    """SiLU between what it lies close to."""
    x = np.linspace(-6, 4, 400)
    _, axes = plt.subplots(figsize=(6, 3))
    axes.plot(x, np.maximum(x, 0), color=PALE, label="relu(x)")
    axes.plot(x, F.silu(x), color=INK, label="silu(x)")
    axes.plot(-1.278, F.silu(np.float64(-1.278)), "o", color=ACCENT, label="its lowest point, -0.278")
    axes.set(xlabel="x")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def temperatures(text):
    """The likeliest next tokens at three temperatures."""
    llama = model()
    logits = llama.model(np.array([llama.tokenizer.encode(text)]))[0, -1]
    best = np.argsort(-logits)[:10]
    labels = [repr(llama.tokenizer.piece(int(i)))[1:-1] for i in best]
    _, all_axes = plt.subplots(1, 3, figsize=(10, 2.8), sharey=True, layout="constrained")
    for axes, temperature in zip(all_axes, (0.5, 1.0, 1.5), strict=True):
        axes.bar(range(10), F.softmax(logits / temperature)[best], color=INK)
        axes.set_xticks(range(10), labels, rotation=90, fontsize=8)
        axes.set_title(f"temperature {temperature}", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set_ylabel("probability")


def boxes(text):
    """The tokens of a text, each in a box."""
    tokenizer = nl.load_tokenizer("smollm2-135m-instruct")
    ids = tokenizer.encode(text)
    _, axes = plt.subplots(figsize=(10, 1.5))
    x = 0.0
    for n, i in enumerate(ids):
        data = tokenizer.token_bytes(i)
        label = data.decode() if is_text(data) else " ".join(f"{byte:02x}" for byte in data)
        width = 0.25 + 0.155 * max(len(label), 1)
        axes.add_patch(plt.Rectangle((x, 0), width, 1, fc=(PALE, "#f0d9cf")[n % 2], ec="white", lw=2))
        middle = {"ha": "center", "va": "center"}
        axes.text(x + width / 2, 0.62, label.replace(" ", "␣"), family="monospace", fontsize=8, **middle)
        axes.text(x + width / 2, 0.24, str(i), color="grey", fontsize=6, **middle)
        x += width
    axes.set(xlim=(0, x), ylim=(-0.1, 1.1))
    axes.axis("off")


def is_text(data):
    try:
        return data.decode().isprintable()
    except UnicodeDecodeError:
        return False


def block():
    """A block of 32 weights, and what 8 and 4 bits keep of it."""
    weights = open_checkpoint(pull("smollm2-135m-instruct")).weights()
    w = weights["tok_embeddings.weight"][np.array([1000])][:, :32]  # the only matrix of more than 4 bits
    _, all_axes = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
    for axes, name, bits in zip(all_axes, ("Q8_0", "Q4_0"), (8, 4), strict=True):
        axes.bar(range(32), w[0], color=PALE, label="weight")
        kept = StoredTensor.quantize(w, name).dequantize()[0]
        axes.plot(range(32), kept, "_", color=ACCENT, ms=9, mew=2, label="kept")
        axes.set_title(f"{name}: {bits} bits", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].legend(frameon=False)


def roofline():
    """Speed of `linear` by the number of tokens, below what memory and arithmetic allow on this machine."""
    threads, n = available_cpus(), 16_384  # a matrix larger than the caches of most machines
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(1024, n)).astype(np.float32)
    dense = np.tile(rows, (n // 1024, 1))
    w = StoredTensor.quantize(rows, "Q8_0")
    w = StoredTensor(w.format, dense.shape, np.tile(w.data, (n // 1024, 1)))
    packed, kernels = KernelWeight(w), Kernels(threads)
    bandwidth = dense.nbytes / seconds(read_probe, [dense], threads)
    operations = 1 << 30
    peak = operations * threads / seconds(fma_probe, operations, threads)
    counts = np.array([1, 2, 4, 8, 16, 32, 64, 128, 256])
    work = 2 * counts * n * n
    _, axes = plt.subplots(figsize=(7, 4.4))
    for label, nbytes, highest, color, call in [
        ("C, 8-bit weights", w.nbytes, 2 * peak, INK, lambda x: kernels.linear(x, packed)),
        ("NumPy, float32", dense.nbytes, peak, ACCENT, lambda x: F.linear(x, dense)),
    ]:
        axes.loglog(counts, np.minimum(work * bandwidth / nbytes, highest) / 1e9, color=color, alpha=0.35)
        inputs = [rng.normal(size=(1, T, n)).astype(np.float32) for T in counts]
        measured = [seconds(call, x, runs=3) for x in inputs]
        axes.loglog(counts, work / measured / 1e9, "o", color=color, label=label)
    axes.set_xticks(counts, counts)
    axes.minorticks_off()
    axes.set(xlabel="tokens at once", ylabel="Gop/s: billions of operations a second")
    axes.set_title(
        f"{threads} threads: memory {bandwidth / 1e9:.0f} GB/s, float32 {peak / 1e9:.0f} Gop/s",
        fontsize=9,
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def file_map():
    """Where the bytes of a model are."""
    opened = open_checkpoint(pull("smollm2-135m-instruct"))
    kinds = {"tok_embeddings": "embedding", "feed_forward": "FFN", "attention_norm": "norms"}
    kinds |= {"ffn_norm": "norms", "attention": "attention", "norm": "norms"}
    total = dict.fromkeys(("embedding", "attention", "FFN", "norms"), 0)
    for name, w in opened.weights().items():
        if name != "output.weight":  # which is the embedding
            total[next(kinds[part] for part in name.split(".") if part in kinds)] += w.nbytes
    _, axes = plt.subplots(figsize=(8, 1.7), layout="constrained")
    left = 0
    for (name, nbytes), color in zip(total.items(), (PALE, INK, ACCENT, "#555555"), strict=True):
        axes.barh(0, nbytes / 1e6, left=left / 1e6, color=color, label=f"{name}: {nbytes / 1e6:.1f} MB")
        left += nbytes
    axes.set(yticks=[], xlabel="megabytes", xlim=(0, left / 1e6))
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(frameon=False, ncols=4, loc="lower center", bbox_to_anchor=(0.5, 1), fontsize=9)


def walk(S=60):
    """The largest score so far, and the mean of the values so far, of one query on its way."""
    rng = np.random.default_rng(4)
    scores, values = 2 * rng.normal(size=S), rng.normal(size=S)
    highest, means = np.maximum.accumulate(scores), []
    for n in range(1, S + 1):
        weights = F.softmax(scores[:n])
        means.append(weights @ values[:n])
    _, (above, below) = plt.subplots(2, 1, figsize=(8, 4), sharex=True, layout="constrained")
    above.bar(range(S), scores, color=PALE, label="score")
    above.step(range(S), highest, where="post", color=ACCENT, label="m, the largest so far")
    below.plot(range(S), means, color=INK, label="o / l, the result so far")
    below.axhline(means[-1], color="grey", lw=0.8, ls=":", label="softmax over all")
    below.set(xlabel="position")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=9, ncols=2, loc="lower left", bbox_to_anchor=(0, 1))


def rounding():
    """Errors of float32 sums of K products in two orders, and the bound that the tests allow."""
    rng = np.random.default_rng(0)
    lengths = 2 ** np.arange(4, 15)
    errors = {"one after the other": [], "in 16 lanes": []}
    bounds = []
    for K in lengths:
        a, b = rng.normal(size=(2, 100, K)).astype(np.float32)
        true, size = (a.astype(float) * b).sum(1), np.abs(a.astype(float) * b).sum(1)
        in_turn = np.cumsum(a * b, axis=1)[:, -1]
        lanes = np.cumsum((a * b).reshape(100, -1, 16), axis=1)[:, -1].sum(1)
        for name, found in zip(errors, (in_turn, lanes), strict=True):
            errors[name].append(np.max(np.abs(found - true) / size))
        bounds.append((np.ceil(K / 16) + 4 + 3) * 2.0**-24)
    _, axes = plt.subplots(figsize=(7, 3.4))
    for (name, found), color in zip(errors.items(), (ACCENT, INK), strict=True):
        axes.loglog(lengths, found, "o-", ms=3, color=color, label=name)
    axes.loglog(lengths, bounds, color="grey", ls="--", label="the bound, 16 lanes")
    axes.set(xlabel="terms of the sum", ylabel="error, as a share of $\\sum |a_i b_i|$")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def generations(names):
    """What a token's keys and values take, and how many of them fit into the context."""
    args = [PRESETS[name].args for name in names]
    kib = [2 * a.n_layers * a.n_kv_heads * a.head_dim * 2 / 1024 for a in args]
    _, (left, right) = plt.subplots(1, 2, figsize=(10, 3), sharey=True, layout="constrained")
    places = range(len(names))[::-1]
    left.barh(places, kib, color=INK)
    left.set(xlabel="KV cache, KiB a token in float16")
    right.barh(places, [a.max_seq_len for a in args], color=ACCENT)
    right.set(xlabel="context, tokens", xscale="log")
    left.set_yticks(places, names)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


def logit_gradient(text, target):
    """The likeliest next tokens, and how the loss of `target` would move their logits."""
    llama = model()
    (wanted,) = llama.tokenizer.encode(target)
    logits = llama.model(np.array([llama.tokenizer.encode(text)]))[0, -1:]
    _, lse = backward.cross_entropy(logits, np.array([wanted]))
    moved = -backward.cross_entropy_backward(np.ones(1), logits, np.array([wanted]), lse)[0]
    best = np.argsort(-logits[0])[:12]
    colors = [ACCENT if i == wanted else INK for i in best]
    _, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    left.barh(range(len(best)), F.softmax(logits)[0, best], color=colors)
    left.set(xlabel="probability")
    left.set_yticks(range(len(best)), [repr(llama.tokenizer.piece(int(i)))[1:-1] for i in best], fontsize=9)
    left.invert_yaxis()
    right.barh(range(len(best)), moved[best], color=colors)
    right.axvline(0, color="grey", lw=0.8)
    right.set(xlabel="minus the gradient: the change of the logit")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


# The lines of a block from below to above, and what the gradient of each needs of the forward pass.
MIRROR = [
    ("attention_norm", "x", True),
    ("wq, wk, wv", "attention_norm(x)", False),
    ("RoPE", "", False),
    ("attention", "q, k, v, out, lse", True),
    ("wo", "out", True),
    ("+", "", False),
    ("ffn_norm", "h", True),
    ("w_gate, w_up", "ffn_norm(h)", False),
    ("swiglu", "gate, up", True),
    ("w_down", "swiglu(gate, up)", False),
    ("+", "", False),
]


def mirror():
    """A block upwards, its gradients downwards, and between them what is kept or computed again."""
    _, axes = plt.subplots(figsize=(8, 7.6))
    top, sides = len(MIRROR), ((0.0, -1, INK, ("x", "y")), (6.4, 1, ACCENT, ("dx", "dy")))
    for at, side, color, ends in sides:
        arrow = {"arrowstyle": "-|>", "color": color, "lw": 1.4, "shrinkA": 11, "shrinkB": 11}
        how = {"ha": "center", "va": "center", "fontsize": 10}
        for y, (name, _, _) in enumerate(MIRROR):
            axes.text(at, y, name, bbox={"boxstyle": "round,pad=0.35", "fc": "white", "ec": color}, **how)
        for y, name in zip((-1, top), ends, strict=True):
            axes.text(at, y, name, **{**how, "fontsize": 12})
        for y in range(top + 1):
            below, above = (at, y - 1), (at, y)
            axes.annotate("", *((above, below) if side < 0 else (below, above)), arrowprops=arrow)
        for low, high in ((-0.5, 5), (5.5, 10)):  # the residual stream, past each of the two steps
            past = at + 1.75 * side
            axes.plot([at, past, past, at + 0.4 * side], [low, low, high, high], color=color, lw=1.4)
            tip = ((at + 0.25 * side, high), (past, high)) if side < 0 else ((at, low), (past, low))
            axes.annotate("", *tip, arrowprops={**arrow, "shrinkA": 0, "shrinkB": 0})
    for y, (_, needed, kept) in enumerate(MIRROR):
        if needed:
            how = {"arrowstyle": "->", "color": "#555555", "ls": "-" if kept else ":"}
            axes.annotate("", (4.9, y), (1.5, y), arrowprops=how)
            label = needed if kept else f"{needed}, again"
            axes.text(3.2, y + 0.1, label, ha="center", va="bottom", fontsize=9, color="#333333")
    axes.set(xlim=(-2.2, 8.6), ylim=(-1.4, top + 0.4))
    axes.axis("off")


def memory_of_a_pass(n_layers=8, T=512):
    """The most memory in use during each block of a small model, forward and then backward."""
    args = replace(TINY, dim=96, head_dim=24, hidden_dim=256, n_layers=n_layers, max_seq_len=T)
    rng = np.random.default_rng(0)
    small = nl.Transformer(args, random_weights(rng, args, np.float32))
    tokens, weights = random_tokens(rng, args, 1, T), np.full((1, T), 1 / T, np.float32)
    plain = learner.Functions()
    _, axes = plt.subplots(figsize=(7, 3.2))
    policies = {"Saved is kept": plain, "x is kept": learner.checkpointing(plain)}
    for (name, functions), color in zip(policies.items(), (INK, ACCENT), strict=True):
        found = []

        def noting(block, found=found):
            """The same function, which notes the most memory that was in use during each call."""

            def call(*arguments):
                tracemalloc.reset_peak()
                result = block(*arguments)
                found.append(tracemalloc.get_traced_memory()[1])
                return result

            return call

        noted = replace(
            functions,
            block_forward=noting(functions.block_forward),
            block_backward=noting(functions.block_backward),
        )
        learning = learner.Learner(small, noted)
        tracemalloc.start()
        learning.loss_and_gradients(tokens, tokens, weights)
        tracemalloc.stop()
        axes.plot(np.array(found) / 1e6, "o-", ms=3, color=color, label=name)
    axes.axvline(n_layers - 0.5, color="grey", lw=0.8, ls=":")
    axes.set_xticks(range(2 * n_layers), [*range(n_layers), *reversed(range(n_layers))])
    axes.set(xlabel="blocks forward, then blocks backward", ylabel="megabytes", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def seconds(call, *arguments, runs=5):
    """The median."""
    times = []
    for _ in range(runs):
        began = time.perf_counter()
        call(*arguments)
        times.append(time.perf_counter() - began)
    return sorted(times)[runs // 2]


def descents(steps=120):
    """The loss of the same tiny model by two optimizers, and the learning rate of each step."""

    def sgd(p, g, m, v, t, lr, weight_decay, h):
        p -= lr * g

    _, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), width_ratios=[2, 1], layout="constrained")
    for lr, style in ((0.3, ":"), (1.0, "-")):
        left.plot(language.learnt(steps, lr, sgd)[1], color=ACCENT, ls=style, label=f"p - lr g, lr = {lr}")
    left.plot(language.learnt(steps)[1], color=INK, label="AdamW, lr = 0.01")
    left.axhline(np.log(len(language.WORDS)), color="grey", lw=0.8, ls="-.", label="all words alike")
    left.axhline(language.FLOOR, color="grey", lw=0.8, ls="--", label="lowest possible")
    left.set(xlabel="step", ylabel="loss, nats a token", ylim=(0, None))
    left.legend(frameon=False)
    right.plot([learning_rate(step, steps, 1e-2, 10) for step in range(steps)], color=INK)
    right.set(xlabel="step", ylabel="learning rate")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)


def beside_a_weight(OUT=576, IN=576, r=16):
    """A frozen matrix and the two matrices of LoRA, drawn to the same scale."""
    _, axes = plt.subplots(figsize=(8, 3.4), layout="constrained")
    gap = 90
    x_b, x_a = IN + 2 * gap, IN + 3 * gap + r
    for x, height, width, color, name in [
        (0, OUT, IN, PALE, f"W, frozen\n{OUT} x {IN} = {OUT * IN:,} numbers"),
        (x_b, OUT, r, ACCENT, f"B\n{OUT} x {r}"),
        (x_a, r, IN, ACCENT, f"A\n{r} x {IN}"),
    ]:
        axes.add_patch(plt.Rectangle((x, -height), width, height, fc=color, ec="none"))
        inside = width > r and height > r
        y = -height / 2 if inside else -height - 20
        axes.text(x + width / 2, y, name, ha="center", va="center" if inside else "top", fontsize=10)
    axes.text(IN + gap, -OUT / 2, "+ s", ha="center", va="center", fontsize=13)
    axes.text(x_a + IN / 2, -OUT / 2, f"{r * (OUT + IN):,} numbers learn", ha="center", fontsize=10)
    axes.set(xlim=(-10, x_a + IN + 10), ylim=(-OUT - 90, 20), aspect="equal")
    axes.axis("off")


def margins(steps=60):
    """The rewards of both answers while DPO trains, and their difference."""
    base = language.frozen_base()
    learner = language.with_adapter(base)
    optimizer = AdamW(learner.parameters(), Hyperparameters(3e-3, weight_decay=0.0))
    rows, order, schedule = language.pairs(256, seed=3), Order(256, 16), Schedule(steps)
    trainer = Trainer(learner, optimizer, rows, order, DPO(base), schedule, 4096)
    found = [step.numbers for step in trainer.steps()]
    _, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for name, color in (("margins", "#555555"), ("chosen", INK), ("rejected", ACCENT)):
        axes.plot([numbers[f"rewards/{name}"] for numbers in found], color=color, label=name)
    axes.axhline(0, color="grey", lw=0.8, ls=":")
    axes.set(xlabel="step", ylabel="reward, or margin")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def rewards(curves):
    """The mean reward of the samples of each round, by method."""
    _, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
    for (name, found), color in zip(curves.items(), ("#555555", ACCENT, INK), strict=True):
        axes.plot(found, color=color, label=name)
    axes.set(xlabel="round", ylabel="mean reward", ylim=(0, 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def two_cuts(names=("rank 0", "rank 1", "rank 2")):
    """y = W x, with W cut for three ranks by rows and by columns."""
    colours, n = (PALE, INK, ACCENT), len(names)
    _, (rows, columns) = plt.subplots(2, 1, figsize=(7.4, 5), layout="constrained")

    def box(axes, x, y, width, height, colour):
        axes.add_patch(plt.Rectangle((x, y), width, height, fc=colour, ec="white", lw=1.5))

    def sign(axes, x, y, text, size=13, **options):
        axes.text(x, y, text, ha="center", va="center", fontsize=size, **options)

    for r, (name, colour) in enumerate(zip(names, colours, strict=True)):
        y, ink = n - 1 - r, "black" if colour == PALE else "white"
        box(rows, 0, y, 4.5, 1, colour)
        box(rows, 7.6, y, 0.5, 1, colour)
        sign(rows, 2.25, y + 0.5, f"rows of {name}", 10, color=ink)
        box(columns, 1.5 * r, 0, 1.5, n, colour)
        box(columns, 5.1, y, 0.5, 1, colour)
        box(columns, 7.6 + 1.5 * r, 0, 0.5, n, colour)
        sign(columns, 1.5 * r + 0.75, n / 2, f"columns of\n{name}", 10, color=ink)
        if r:
            sign(columns, 7.6 + 1.5 * r - 0.5, n / 2, "+")
    box(rows, 5.1, 0, 0.5, n, "#bbbbbb")
    sign(rows, 10, n / 2, "gather: the parts\nside by side are y", 10)
    sign(columns, 12, n / 2, "=  y")
    for axes, x in ((rows, "x, whole"), (columns, "x, cut")):
        sign(axes, 6.6, n / 2, "=")
        sign(axes, 2.25, -0.35, "W", 10)
        sign(axes, 5.35, -0.35, x, 10)
        axes.set(xlim=(-0.1, 12.6), ylim=(-0.6, n + 0.2), aspect="equal")
        axes.axis("off")
    sign(rows, 7.85, -0.35, "y", 10)
    sign(columns, 9.35, -0.35, "each rank has a part of every sum", 10)
    rows.set_title("by rows: each output is one sum on one rank", fontsize=11, loc="left")
    columns.set_title("by columns: each output is a sum of three sums", fontsize=11, loc="left")


def networks(curves):
    """Tokens a second by the number of machines: {network: speeds of 1, 2, ... machines}."""
    styles = [("grey", "--"), (ACCENT, "o-"), (INK, "o-"), (PALE, "o-")]
    _, axes = plt.subplots(figsize=(7, 3.8), layout="constrained")
    for (name, speeds), (colour, line) in zip(curves.items(), styles, strict=True):
        axes.plot(range(1, len(speeds) + 1), speeds, line, ms=3, color=colour, label=name)
    axes.set(xlabel="machines", ylabel="tokens a second", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)


def tree_of_beams(prompt, beams=3, steps=5, shown=5):
    """The beams of a search, step by step, and the path of greedy decoding."""
    llama = model()
    start = llama.tokenizer.encode(prompt)

    def log_p(ids):
        logits = llama.model(np.array([[*start, *ids]]))[0, -1].astype(np.float64)
        return np.log(F.softmax(logits))

    columns, running, greedy = [], [(0.0, ())], ()
    for _ in range(steps):
        grown = []
        for total, ids in running:
            row = log_p(ids)
            grown += [(total + row[i], (*ids, int(i))) for i in np.argsort(-row)[:shown]]
        grown.sort(reverse=True)
        following = (*greedy, int(log_p(greedy).argmax()))
        column = grown[:shown]
        if following not in [ids for _, ids in column]:
            column[-1] = (sum(log_p(following[:n])[following[n]] for n in range(len(following))), following)
        columns.append(column)
        running, greedy = grown[:beams], following

    best = {ids[:n] for _, ids in running for n in range(steps + 1)}
    _, axes = plt.subplots(figsize=(9, 4.2), layout="constrained")
    places = {(): (0.0, (shown - 1) / 2)}
    axes.text(0, (shown - 1) / 2, "prompt", ha="center", va="center", color="grey")
    for step, column in enumerate(columns, 1):
        for rank, (total, ids) in enumerate(column):
            places[ids] = step, shown - 1 - rank
            colour = ACCENT if ids == greedy[:step] else INK if ids in best else PALE
            x, y = places[ids[:-1]]
            axes.plot([x + 0.32, step - 0.32], [y, shown - 1 - rank], color=colour, lw=1.3, zorder=0)
            axes.text(
                step,
                shown - 1 - rank,
                repr(llama.tokenizer.decode([ids[-1]])),
                ha="center",
                va="bottom",
                fontsize=10,
                color="black" if colour == PALE else colour,
            )
            axes.text(step, shown - 1 - rank, f"{total:.1f}", ha="center", va="top", fontsize=8, color="grey")
    axes.set(xlim=(-0.5, steps + 0.5), ylim=(-0.6, shown - 0.3))
    axes.axis("off")


def gains_of_drafts(cost, of_a_draft, lengths=(1, 3, 7)):
    """Tokens in the time of one, by the acceptance, for drafts that cost little and much."""
    a = np.linspace(0, 1, 101)
    _, all_axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True, layout="constrained")
    for axes, draft in zip(all_axes, of_a_draft, strict=True):
        for k, colour in zip(lengths, (PALE, INK, ACCENT), strict=True):
            tokens = (a[:, None] ** np.arange(k + 1)).sum(axis=1)
            axes.plot(a, tokens / (1 + k * (cost + draft)), color=colour, label=f"k = {k}")
        axes.axhline(1, color="grey", lw=0.8, ls="--")
        axes.set(xlabel="acceptance", title=f"a drafted token costs {draft} passes")
        axes.spines[["top", "right"]].set_visible(False)
    all_axes[0].set(ylabel="gain", ylim=(0, None))
    all_axes[0].legend(frameon=False)


def two_scores(context, choices, gold):
    """The log-likelihood of each choice, as a sum and for each character."""
    scores = np.array(
        [s.log_likelihood for s in model().log_likelihoods(context, [f" {c}" for c in choices])]
    )
    values = {"log-likelihood": scores, "log-likelihood a character": scores / [len(c) for c in choices]}
    _, all_axes = plt.subplots(1, 2, figsize=(9, 2.4), sharey=True, layout="constrained")
    for axes, (name, found) in zip(all_axes, values.items(), strict=True):
        axes.barh(choices, found, color=[ACCENT if i == gold else PALE for i in range(len(choices))])
        for i, value in enumerate(found):
            best = {"fontweight": "bold"} if value == found.max() else {}
            axes.text(value, i, f" {value:.1f} ", ha="right", va="center", fontsize=9, **best)
        axes.set(xlabel=name, xlim=(1.25 * found.min(), 0))
        axes.spines[["top", "left"]].set_visible(False)
        axes.yaxis.set_inverted(True)
        axes.tick_params(axis="y", length=0)
