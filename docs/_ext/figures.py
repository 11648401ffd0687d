"""The figures of the course. Each is drawn from the package's own functions."""

import matplotlib.pyplot as plt  # which shows a cell's figure by itself
import numpy as np

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
