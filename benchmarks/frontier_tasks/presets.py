"""The figure of presets: accuracy and certified accuracy against the bound of the logits."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_NAME = re.compile(r"(accurate|robust), logits x (\d+), (\w+)/")
_COLOURS = {"accurate": "#0072B2", "robust": "#D55E00"}  # apart for the colour-blind, too
_EPS = 0.01


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Write the figure: a panel for each family, and in it two lines for each preset."""
    lines: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for row in rows:
        found = _NAME.match(row["name"])
        if found:
            preset, factor, family = found.groups()
            proven = row["certified"][row["eps"].index(_EPS)]
            point = (row["bound"]["weights"] * int(factor), row["accuracy"], proven)
            lines.setdefault(family, {}).setdefault(preset, []).append(point)
    figure, axes = plt.subplots(
        1,
        len(lines),
        figsize=(4.6 * len(lines), 3.8),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (family, presets) in zip(axes[0], sorted(lines.items()), strict=True):
        for preset, points in presets.items():
            bounds, right, proven = zip(*sorted(points), strict=True)
            colour = _COLOURS[preset]
            for values, style, what in ((right, "-", "right"), (proven, "--", "proven right")):
                axis.plot(bounds, [100 * v for v in values], style, marker="o", color=colour)
                label = f"{preset}, {what}"
                axis.annotate(
                    label,
                    (bounds[-1], 100 * values[-1]),
                    xytext=(6, 0),
                    fontsize=8,
                    textcoords="offset points",
                    va="center",
                    color=colour,
                )
        axis.set(xscale="log", xlabel="proven bound of the logits as trained", title=family)
        axis.set_xlim(1.4, 250)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel(f"characters, % (dashed: proven at {_EPS})")
    figure.suptitle("A larger factor on the logits buys accuracy, and costs proven predictions")
    figure.savefig(path, dpi=150)
