"""Figures, by matplotlib. It is an extra: pip install "numpy_llama[plot]"."""

from collections.abc import Sequence

import numpy as np

from ..errors import UnsupportedError

try:
    from matplotlib.figure import Figure
except ImportError:
    raise UnsupportedError('drawing needs matplotlib: pip install "numpy_llama[plot]"') from None

INCHES_A_TOKEN = 0.28


def attention_map(weights: np.ndarray, labels: Sequence[str], title: str = "") -> Figure:
    """Attention weights (T, T) as squares: a row for each query, a column for each key."""
    side = max(2.5, INCHES_A_TOKEN * len(labels))
    figure = Figure(figsize=(side + 1.2, side + 0.9), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(weights, cmap="Blues", vmin=0, vmax=1)
    places = range(len(labels))
    axes.set_xticks(places, labels, rotation=90, family="monospace", fontsize=8)
    axes.set_yticks(places, labels, family="monospace", fontsize=8)
    axes.set(title=title, xlabel="is looked at", ylabel="looks")
    axes.spines[:].set_visible(False)
    figure.colorbar(image, ax=axes, label="weight", shrink=0.8)
    return figure


def loss_curve(train: Sequence[tuple[int, float]], valid: Sequence[tuple[int, float]] = ()) -> Figure:
    """The losses (step, loss) of training and validation."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, series, style in (("training", train, "-"), ("validation", valid, "o-")):
        if series:
            axes.plot(*zip(*series, strict=True), style, label=name, markersize=4, linewidth=1)
    axes.set(xlabel="step", ylabel="loss")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure
