"""The figures of depth.py, drawn from its rows."""

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
        plain = row["width"] == width and row["steps"] == 200 and not row.get("byte_pairs")
        if plain and row["run"] in _STYLES:
            line = found.setdefault((row["family"], row["run"]), {})
            line[row["layers"]] = max(line.get(row["layers"], 0.0), 100 * row["accuracy"])
    return found


def apart(heights: list[float], least: float) -> list[float]:
    """The heights in the same order, moved up where two are closer than `least`."""
    order, moved = sorted(range(len(heights)), key=heights.__getitem__), list(heights)
    for below, above in zip(order, order[1:]):
        moved[above] = max(moved[above], moved[below] + least)
    return moved


def depth(rows: list[dict[str, Any]], path: Path, width: int = 128) -> None:
    """Write the figure."""
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    # A run at one depth says nothing about depth.
    lines = sorted((key, line) for key, line in best(rows, width).items() if len(line) > 1)
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
    axis.set_ylim(top=max(max(line.values()) for _, line in lines) + 1.5)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def rates(rows: list[dict[str, Any]], path: Path, steps: int = 100) -> None:
    """Write the figure of losses by learning rate, one line for each width and depth."""
    lines: dict[tuple[int, int], dict[float, float]] = {}
    for row in rows:
        if row["steps"] == steps and row["run"] == "accurate":
            lines.setdefault((row["layers"], row["width"]), {})[row["lr"]] = row["loss"]
    figure, axis = plt.subplots(figsize=(7, 4.2), layout="constrained")
    colours = {64: "#0072B2", 128: "#009E73", 256: "#D55E00", 512: "#CC79A7"}
    styles = {3: "-", 12: "--", 24: ":"}
    ends = [line[max(line)] for _, line in sorted(lines.items())]
    for ((layers, width), line), height in zip(
        sorted(lines.items()), apart(ends, 0.025), strict=True
    ):
        at = sorted(line)
        colour = colours[width]
        axis.plot(
            at, [line[lr] for lr in at], styles[layers], marker="o", markersize=4, color=colour
        )
        best = min(line, key=line.__getitem__)
        axis.plot(best, line[best], "o", markersize=10, markerfacecolor="none", color=colour)
        text = f"{layers} layers, {width} wide"
        axis.text(max(at) * 1.08, height, text, va="center", color=colour, fontsize=9)
    axis.set(
        xscale="log",
        xlabel="learning rate, RMS->RMS norm per step (circles: the best)",
        ylabel=f"held-out loss after {steps} steps",
        title="The best learning rate moves by a factor of 2",
    )
    ticks = sorted({lr for line in lines.values() for lr in line})
    axis.set_xticks(ticks, [f"{lr:g}" for lr in ticks])
    axis.minorticks_off()
    axis.set_xlim(min(ticks) * 0.9, max(ticks) * 2.6)
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
