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


def draw(rows: list[dict[str, Any]], path: Path, width: int = 128) -> None:
    """Write the figure."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for (family, run), line in sorted(best(rows, width).items()):
        depths = sorted(line)
        style, marker = _STYLES[run]
        colour = _COLOURS.get(family, "#444444")
        axis.plot(depths, [line[d] for d in depths], style, marker=marker, color=colour)
        what = f"{family}, {run}" if run not in ("adamw", "muon") else f"{family}, free, {run}"
        axis.annotate(
            what,
            (depths[-1], line[depths[-1]]),
            xytext=(6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontsize=9,
        )
    bigram = 100 * rows[0]["bigram"]
    axis.axhline(bigram, color="#999999", linewidth=1)
    axis.annotate(
        "bigrams", (3, bigram), xytext=(0, 3), textcoords="offset points", color="#777777"
    )
    axis.set(
        xscale="log",
        xlabel="layers",
        ylabel="held-out characters predicted, %",
        title="The same preset learns at every depth, at a proven bound of 1",
    )
    ticks = sorted({row["layers"] for row in rows})
    axis.set_xticks(ticks, [str(t) for t in ticks])
    axis.minorticks_off()
    axis.set_xlim(2.7, max(ticks) * 1.9)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
