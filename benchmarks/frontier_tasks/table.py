"""The frontier's results as a table for a terminal, and as a figure."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lip_plugin.tables import table as layout

COLORS = {"lipschitz_muon": "tab:blue", "muon": "tab:green", "adamw": "tab:red"}
MARKERS = "o^sDvPX<>*"
LIMITS = (0.3, 1.1, 2.0, 5.0, 20.0, 100.0)
_FEW = 8  # runs that one panel can show all of
# Many bounds are the same product of caps. They are drawn this much to the right, so as not to hide
# each other.
ASIDE = {"lipschitz_muon": 1.0, "muon": 1.12, "adamw": 1.25}


@dataclass(frozen=True)
class Point:
    """The mean of a run over its seeds. `bound` and `caps` are log10s; caps nan without any."""

    method: str
    optimizer: str
    cap: str
    seeds: int
    accuracy: float
    loss: float
    bound: float
    caps: float
    eps: tuple[float, ...]
    certified: tuple[float, ...]
    attacked: tuple[float, ...]
    constrained: bool

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.short.replace("_", " "), self.optimizer, self.cap)))

    @property
    def short(self) -> str:
        return self.method.replace("temperature ", "T ")

    @property
    def projection(self) -> str:
        """The method without the recipe that it is part of."""
        return self.short.removeprefix("position, ")


def points(rows: Iterable[dict[str, Any]]) -> list[Point]:
    """The mean over seeds for each run. Of bounds it is the largest, which holds for each seed."""
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row["name"], []).append(row)
    return [_point(name, of) for name, of in found.items()]


def _point(name: str, rows: list[dict[str, Any]]) -> Point:
    method, optimizer, cap = [*name.split("/"), ""][:3]

    def mean(key: str) -> float:
        return sum(r[key] for r in rows) / len(rows)

    def means(key: str) -> tuple[float, ...]:
        return tuple(
            sum(values) / len(rows) for values in zip(*(r[key] for r in rows), strict=True)
        )

    def bound(source: str) -> float:
        stated = [
            r.get("log10_bound") or {k: math.log10(v) for k, v in r["bound"].items()} for r in rows
        ]
        return max(s.get(source, math.nan) for s in stated)

    return Point(
        method,
        optimizer,
        cap,
        len(rows),
        mean("accuracy"),
        mean("loss"),
        bound("weights"),
        bound("caps"),
        tuple(rows[0]["eps"]),
        means("certified"),
        means("attacked"),
        rows[0]["run"]["config"] is not None,
    )


def table(rows: list[dict[str, Any]]) -> str:
    """The best accuracy under a bound, and the best certified accuracy at each eps.

    There is one line for each method and optimizer.
    """
    if not rows:
        return "no results yet"
    found = points(rows)
    eps = found[0].eps
    head = ("method", "optimizer", *(f"{limit:g}" for limit in LIMITS), "any")
    body = []
    for method, optimizer, mine in _grouped(found):
        at = [_best(p.accuracy for p in mine if p.bound <= math.log10(limit)) for limit in LIMITS]
        proven = [_best(p.certified[i] for p in mine) for i in range(len(eps))]
        body.append([_short(method), optimizer, *at, _best(p.accuracy for p in mine), *proven])
    title = "best accuracy (%) at a proven bound, from weights, of at most ...; "
    title += "best certified accuracy (%) at eps (c ...)"
    best = layout([*head, *(f"c {e:g}" for e in eps)], body, ["<", "<", *["5"] * len(head + eps)])
    return "\n".join(
        [title, best, "", _by_cap(found), f"{len(found)} runs, seeds: {_seeds(found)}"]
    )


def _grouped(found: Iterable[Point]) -> Iterator[tuple[str, str, list[Point]]]:
    """The points of each method and optimizer."""
    groups: dict[tuple[str, str], list[Point]] = {}
    for p in found:
        groups.setdefault((p.method, p.optimizer), []).append(p)
    for (method, optimizer), mine in groups.items():
        yield method, optimizer, mine


def _short(method: str) -> str:
    return method.replace("temperature ", "T ")[:28]


def _by_cap(found: list[Point]) -> str:
    """Accuracy and certified accuracy at the middle eps for each cap.

    At the same cap the bounds from caps are nearly the same.
    """
    middle = len(found[0].eps) // 2
    caps = sorted({p.cap for p in found if p.constrained}, key=float)
    body = []
    for method, optimizer, mine in _grouped(p for p in found if p.constrained):
        at = {p.cap: f"{100 * p.accuracy:.1f} /{100 * p.certified[middle]:5.1f}" for p in mine}
        body.append([_short(method), optimizer, *(at.get(cap, "-") for cap in caps)])
    title = f"accuracy / certified accuracy at eps {found[0].eps[middle]:g} (%), by cap"
    head = ["method", "optimizer", *caps]
    return f"{title}\n{layout(head, body, ['<', '<', *['11'] * len(caps)])}"


def _seeds(found: list[Point]) -> str:
    counts = sorted({p.seeds for p in found})
    return " to ".join(map(str, dict.fromkeys((counts[0], counts[-1]))))


def _best(values: Iterable[float]) -> str:
    kept = list(values)
    return f"{100 * max(kept):.1f}" if kept else "-"


def front(found: Iterable[Point]) -> list[Point]:
    """The points that no other one beats in both bound and accuracy, in the order of bounds."""
    kept: list[Point] = []
    for p in sorted(found, key=lambda p: (p.bound, -p.accuracy)):
        if not kept or p.accuracy > kept[-1].accuracy:
            kept.append(p)
    return kept


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Draw the figure into `path`.

    It shows accuracy and loss against the proven bound, and certified and attacked accuracy
    against eps.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    found = points(rows)
    figure, axes = plt.subplots(1, 3, figsize=(16, 6), layout="constrained")
    edge = max((p.bound for p in found if p.constrained), default=0.0) + 0.7
    for axis, what in zip(axes, ("accuracy", "loss")):
        _scatter(axis, found, what, edge)
    _curves(axes[2], found)
    first = rows[0]
    budget = f"{first['task']}, budget {first['budget']} ({first['steps']} steps)"
    budget += f", {_seeds(found)} seed(s)"
    where = f"{first['device']}, torch {first['torch']}, {first['date']}"
    figure.suptitle(f"{budget}; {where}", fontsize=9)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _scatter(axis: Any, found: list[Point], what: str, edge: float) -> None:
    """Draw filled points for bounds from weights, and hollow ones for bounds from caps.

    Unconstrained runs are stars, which stand at the edge if they are beyond it.
    """
    methods = list(dict.fromkeys(p.projection for p in found if p.constrained))
    for p in found:
        y, color = getattr(p, what), COLORS[p.optimizer]
        if not p.constrained:
            x = min(p.bound, edge)
            axis.plot(10**x, y, "*", color=color, markersize=15, markeredgecolor="black", zorder=4)
            if p.bound > edge:
                label = f"10^{p.bound:.1f} $\\rightarrow$"
                axis.annotate(
                    label, (10**x, y), (-8, -3), textcoords="offset points", fontsize=7, ha="right"
                )
            continue
        marker = MARKERS[methods.index(p.projection) % len(MARKERS)]
        aside = ASIDE[p.optimizer]
        axis.plot(10**p.bound * aside, y, marker, color=color, markersize=5, alpha=0.8)
        axis.plot(
            10**p.caps * aside, y, marker, color=color, markersize=8, alpha=0.4, fillstyle="none"
        )
    if what == "accuracy":
        for optimizer, color in COLORS.items():
            line = front(p for p in found if p.constrained and p.optimizer == optimizer)
            axis.step(
                [10**p.bound for p in line],
                [p.accuracy for p in line],
                color=color,
                where="post",
                alpha=0.6,
            )
        _stretch(axis, max(p.accuracy for p in found))
    handles = [axis.plot([], [], "o", color=c, label=o)[0] for o, c in COLORS.items()]
    handles += [
        axis.plot([], [], MARKERS[i % len(MARKERS)], color="gray", label=m.replace("_", " "))[0]
        for i, m in enumerate(methods)
    ]
    handles += [
        axis.plot(
            [],
            [],
            "*",
            color="white",
            markeredgecolor="black",
            markersize=12,
            label="no constraint",
        )[0]
    ]
    handles += [
        axis.plot(
            [], [], "o", color="gray", fillstyle="none", label="from caps (filled: from weights)"
        )[0]
    ]
    if what == "loss":
        axis.set_yscale("log")
        axis.legend(handles=handles, fontsize=7)
    shifted = ", ".join(f"{o} x {by:g}" for o, by in ASIDE.items() if by != 1)
    axis.set(xscale="log", ylabel=what)
    axis.set_xlabel(
        f"proven Lipschitz bound, RMS norm to RMS norm\n(points drawn to the right: {shifted})"
    )
    axis.set_title(f"held-out {what} against the proven bound")


def _stretch(axis: Any, best: float) -> None:
    """Near 1 by the logarithm of the error; else from 0."""
    if best < 0.9:
        axis.set_ylim(0.0, best * 1.1)
        return
    room = 1.01  # so that 1 is on the axis
    axis.set_yscale(
        "function", functions=(lambda y: -_log10(room - y), lambda v: room - 10.0 ** (-v))
    )
    axis.set_ylim(0.5, 0.997)
    ticks = [0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99]
    axis.set_yticks(ticks, [f"{t:g}" for t in ticks])


def _log10(values: Any) -> Any:
    import numpy

    return numpy.log10(numpy.maximum(values, 1e-9))


def _curves(axis: Any, found: list[Point]) -> None:
    """Draw certified (solid) and attacked (dotted) accuracy.

    Of a few runs all are drawn, of many the best of each optimizer.
    """
    eps = found[0].eps
    groups = [[p for p in found if p.constrained and p.optimizer == o] for o in COLORS]
    groups.append([p for p in found if not p.constrained])
    chosen: dict[Point, None] = {}
    for group in filter(None, groups):
        if len(found) <= _FEW:
            chosen |= dict.fromkeys(group)
            continue
        for i in (0, len(eps) // 2 + 1) if group[0].constrained else (0,):
            chosen[max(group, key=lambda p: p.certified[i])] = None
    for index, p in enumerate(chosen):
        color = COLORS[p.optimizer] if p.constrained else "black"
        color = f"C{index}" if len(found) <= _FEW else color
        marker = MARKERS[index % len(MARKERS)]
        axis.plot(
            eps, p.certified, f"{marker}-", color=color, label=p.name, alpha=0.85, markersize=5
        )
        axis.plot(eps, p.attacked, f"{marker}:", color=color, alpha=0.5, markersize=4)
    axis.set(
        xscale="log",
        xlabel="eps",
        ylabel="accuracy",
        title="proven right (solid), surviving an attack (dotted)",
    )
    axis.set_ylim(0, None)
    axis.set_xticks(eps, [f"{e:g}" for e in eps])
    axis.legend(fontsize=8, loc="lower left")
