"""The figures of the course. Each is drawn from the package's own functions."""

import matplotlib.pyplot as plt  # which shows a cell's figure by itself
import numpy as np

import numpy_llama as nl
from numpy_llama import functional as F

INK, PALE, ACCENT = "#3b6ea5", "#9db8d3", "#d1603d"


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
    """Root mean squares of the stream behind each layer, and of what attention reads of it."""
    llama = model()
    tokens = np.array([llama.tokenizer.encode(text)])
    with nl.trace(llama, "layers.*", "layers.*.attention_norm") as seen:
        llama.model(tokens)

    def rms(name):
        return [np.sqrt(np.mean(seen[name.format(i)][0, -1] ** 2)) for i in range(llama.model.args.n_layers)]

    _, axes = plt.subplots(figsize=(7, 3.2))
    axes.semilogy(rms("layers.{}"), "o-", color=INK, ms=3, label="the stream behind the layer")
    axes.semilogy(
        rms("layers.{}.attention_norm"), "o-", color=ACCENT, ms=3, label="what its attention is given"
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
