"""The figure of depth.py: accuracy against depth, beside the unconstrained twin."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Colours that the colour-blind can tell apart (Okabe and Ito).
_COLOURS = {"gpt2": "#0072B2", "llama": "#D55E00", "qwen3": "#009E73", "gemma3": "#CC79A7"}
_STYLES = {"accurate": ("-", "o"), "robust": ("--", "s"), "adamw": (":", "x"), "muon": (":", "+")}


def best(rows: list[dict[str, Any]], width: int) -> dict[tuple[str, str], dict[int, float]]:
    """Per (family, run) the accuracy by depth in per cent, each at its best learning rate."""
    found: dict[tuple[str, str], dict[int, float]] = {}
    for row in rows:
        if row["width"] == width and row["run"] in _STYLES:
            line = found.setdefault((row["family"], row["run"]), {})
            line[row["layers"]] = max(line.get(row["layers"], 0.0), 100 * row["accuracy"])
    return found


def apart(heights: list[float], least: float) -> list[float]:
    """The heights in the same order, moved up where two are closer than `least`."""
    order, moved = sorted(range(len(heights)), key=heights.__getitem__), list(heights)
    for below, above in zip(order, order[1:]):
        moved[above] = max(moved[above], moved[below] + least)
    return moved


def draw(rows: list[dict[str, Any]], path: Path, width: int = 128) -> None:
    """Write the figure."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    lines = sorted(best(rows, width).items())
    ticks = sorted({row["layers"] for row in rows})
    ends = [line[max(line)] for _, line in lines]
    for ((family, run), line), height in zip(lines, apart(ends, 1.2), strict=True):
        style, marker = _STYLES[run]
        colour = _COLOURS.get(family, "#444444")
        depths = sorted(line)
        axis.plot(depths, [line[d] for d in depths], style, marker=marker, color=colour)
        free = run in ("adamw", "muon")
        what = f"{family}, no constraint, {run}" if free else f"{family}, {run}"
        axis.text(max(depths) * 1.05, height, what, va="center", color=colour, fontsize=9)
    bigram = 100 * rows[0]["bigram"]
    axis.axhline(bigram, color="#999999", linewidth=1)
    axis.text(max(ticks) * 1.05, bigram + 0.3, "bigrams", color="#777777", fontsize=9)
    depths = ", ".join(map(str, ticks[:-1])) + f" and {ticks[-1]}"
    axis.set(
        xscale="log",
        xlabel="layers",
        ylabel="held-out characters predicted, %",
        title=f"One preset learns at {depths} layers, at a proven bound of 1",
    )
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(min(ticks) * 0.9, max(ticks) * 2.2)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
