"""The charts of a report, drawn by matplotlib and returned as SVG text to be put into an HTML page.

`lines` draws curves over the steps of a run, `bars` draws one bar for each layer, and `interval`
draws what an attack attained beside what is proven. The text of each SVG names no other file, no
script and no font file, so that the page stays one file that works offline and on paper. The same
numbers give the same text.

matplotlib comes with the optional extra `plots`. It is imported only when something is drawn.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = Sequence[tuple[float, float]]
PROVEN, FROM_CAPS, ATTAINED = "#1d4ed8", "#60a5fa", "#c2410c"
OTHER, SECOND = "#4b5563", "#047857"  # of what is neither proven nor attained
_LIMIT = "#b91c1c"
_DECADES = 100.0  # an axis is logarithmic if its largest number is this many times the smallest
_WRITTEN_OUT = 6.0  # log10 of the bounds from which on they are written as powers of ten
_SETTINGS: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it can be searched, and the page's font is used
    "svg.hashsalt": "lip_plugin",  # the same ids each time
    "text.parse_math": False,  # a dollar in a layer's name is a dollar
    "text.color": "#374151",
    "font.size": 9.0,
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib, which measures text with it
    "axes.unicode_minus": False,
    "axes.formatter.useoffset": False,
    "axes.formatter.limits": (-4, 6),
    "axes.axisbelow": True,
    "axes.edgecolor": "#d1d5db",
    "axes.labelcolor": "#374151",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.0,
    "axes.titleweight": "bold",
    "grid.color": "#e5e7eb",
    "grid.linewidth": 0.7,
    "legend.edgecolor": "none",
    "lines.linewidth": 1.6,
    # A tick of some length would be a reference to a shape elsewhere in the page.
    "xtick.major.size": 0.0,
    "xtick.minor.size": 0.0,
    "ytick.major.size": 0.0,
    "ytick.minor.size": 0.0,
    "xtick.labelcolor": "#374151",
    "ytick.labelcolor": "#374151",
}


def require_matplotlib() -> None:
    """Raise an ImportError that names the cure, unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'The charts of a report need matplotlib: pip install "lip_plugin[plots]"'
        ) from error


def number(value: float, side: str = "nearest") -> str:
    """Write a number with four significant digits and without trailing zeros.

    Args:
        side: where to round to. An upper bound is rounded "up", a lower bound "down".
    """
    if not math.isfinite(value):
        return "infinite" if value > 0 else str(value)
    rounding = {"up": ROUND_CEILING, "down": ROUND_FLOOR, "nearest": ROUND_HALF_EVEN}[side]
    return f"{float(Context(prec=4, rounding=rounding).create_decimal(Decimal(value))):.4g}"


def lines(
    series: Mapping[str, Points],
    title: str,
    ylabel: str = "",
    xlabel: str = "step",
    *,
    limit: tuple[str, float] | None = None,
    colors: Mapping[str, str] | None = None,
    dashed: Sequence[str] = (),
    from_zero: bool = False,
    logs: bool = False,
) -> str:
    """Draw curves over the steps of a run.

    Points that are not finite are left out. The y axis is logarithmic where the numbers span two
    decades or more.

    Args:
        series: for each curve's label its points (x, y).
        ylabel: what is measured, with its unit or its norm.
        limit: (label, y) of a red horizontal line.
        colors: for each label its color; grey where there is none.
        dashed: labels of the curves that are drawn with dashes.
        from_zero: let the y axis begin at 0.
        logs: the numbers are base-10 logarithms of what the axis shows.

    Returns:
        The SVG, or "" if no point is left.
    """
    kept = {
        label: [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
        for label, points in series.items()
    }
    kept = {label: points for label, points in kept.items() if points}
    if not kept:
        return ""
    ys = [y for points in kept.values() for _, y in points] + ([limit[1]] if limit else [])
    powers = logs and _are_powers(ys)
    with _drawing():
        figure, axes = _figure(5.2, 2.7, title)
        for label, points in kept.items():
            x = [x for x, _ in points]
            y = [10**y if logs and not powers else y for _, y in points]
            color = (colors or {}).get(label, OTHER)
            if len(points) == 1:
                axes.scatter(x, y, s=16, color=color, label=label)
            else:
                style = "--" if label in dashed else "-"
                axes.plot(x, y, color=color, linestyle=style, label=label)
        shown = [10**y for y in ys] if logs and not powers else ys
        _scale(axes, "y", shown, powers, from_zero)
        axes.xaxis.set_major_locator(_round_numbers(6, integer=True))
        axes.grid(axis="y")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if limit:
            axes.axhline(limit[1], color=_LIMIT, linestyle="--", linewidth=1)
            place: dict[str, Any] = {
                "transform": axes.get_yaxis_transform(),
                "ha": "right",
                "va": "bottom",
            }
            axes.text(1.0, limit[1], limit[0], color=_LIMIT, **place)
        if len(kept) > 1:
            axes.legend(loc="best")
        return _svg(figure, title)


def bars(
    rows: Sequence[tuple[str, float]],
    title: str,
    xlabel: str = "",
    limit: tuple[str, float] | None = None,
) -> str:
    """Draw horizontal bars from 0, each with its label and its value.

    Args:
        rows: (label, value) of each bar. A value that is not finite fills the whole width.
        xlabel: what is measured, with its unit or its norm.
        limit: (label, x) of a red vertical line.

    Returns:
        The SVG, or "" if there are no rows.
    """
    if not rows:
        return ""
    finite = [value for _, value in rows if math.isfinite(value)]
    top = max([*finite, *([limit[1]] if limit else []), 1e-300])
    lengths = [min(max(value, 0.0), top) if math.isfinite(value) else top for _, value in rows]
    with _drawing():
        figure, axes = _figure(9.4, 0.9 + 0.22 * len(rows), title)
        axes.barh(range(len(rows)), lengths, height=0.7, color=PROVEN)
        axes.set_yticks(range(len(rows)), [label[-40:] for label, _ in rows])
        axes.set_ylim(len(rows) - 0.4, -0.6)  # the first row is on top
        axes.set_xlim(0.0, top * 1.1)
        axes.xaxis.set_major_locator(_round_numbers(6))
        axes.set(xlabel=xlabel)
        for i, (_, value) in enumerate(rows):
            # Beyond the limit's line, which would go through the number otherwise.
            end = max(lengths[i], limit[1] if limit else 0.0)
            axes.text(end + 0.008 * top, i, number(value), va="center")
        if limit:
            axes.axvline(limit[1], color=_LIMIT, linestyle="--", linewidth=1)
            place: dict[str, Any] = {
                "transform": axes.get_xaxis_transform(),
                "ha": "center",
                "va": "bottom",
            }
            axes.text(limit[1], 1.0, limit[0], color=_LIMIT, **place)
        return _svg(figure, title)


def interval(lower: tuple[str, float], upper: tuple[str, float], title: str, xlabel: str) -> str:
    """Draw what an attack attained and what is proven as two points with the gap between them.

    Args:
        lower: what was attained, as a text and as a base-10 logarithm.
        upper: the proven bound, likewise.
        xlabel: what is bounded, in which norm.

    Returns:
        The SVG, or "" unless both numbers are finite.
    """
    logs = [lower[1], upper[1]]
    if not all(map(math.isfinite, logs)):
        return ""
    powers = _are_powers(logs)
    ends = logs if powers else [10**value for value in logs]
    with _drawing():
        figure, axes = _figure(9.4, 1.45, title)
        axes.plot(ends, [0.0, 0.0], color="#d1d5db", linewidth=5, solid_capstyle="butt", zorder=1)
        _scale(axes, "x", ends, powers, from_zero=max(ends) < _DECADES * min(ends) and not powers)
        for text, end, color, above in (
            (lower[0], ends[0], ATTAINED, False),
            (upper[0], ends[1], PROVEN, True),
        ):
            axes.scatter([end], [0.0], s=45, color=color, zorder=2)
            # On the right half of the axis a text goes to the left of its point.
            across = axes.transLimits.transform(axes.transScale.transform((end, 0.0)))[0]
            place: dict[str, Any] = {
                "ha": "right" if across > 0.5 else "left",
                "va": "bottom" if above else "top",
            }
            axes.text(end, 0.35 if above else -0.35, text, color=color, **place)
        axes.set(xlabel=xlabel, ylim=(-1.3, 1.3), yticks=[])
        axes.spines["left"].set_visible(False)
        return _svg(figure, title)


def _are_powers(logs: Sequence[float]) -> bool:
    """Whether numbers with these base-10 logarithms are written as powers of ten."""
    return max(map(abs, logs)) >= _WRITTEN_OUT


@contextmanager
def _drawing() -> Iterator[None]:
    """Draw with our settings on top of matplotlib's defaults, whatever the user's own ones are."""
    require_matplotlib()
    import matplotlib
    import matplotlib.style

    settings: Any = _SETTINGS
    with (
        matplotlib.style.context("default"),
        matplotlib.rc_context(settings),
        warnings.catch_warnings(),
    ):
        # matplotlib only measures text with its own font; the browser draws it with another.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        yield


def _figure(width: float, height: float, title: str) -> tuple[Figure, Axes]:
    """A figure of this size in inches that no window and no global state knows of."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, pad=10)
    return figure, axes


def _round_numbers(count: int, integer: bool = False) -> Any:
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(count, integer=integer, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])


def _scale(axes: Axes, which: str, values: Sequence[float], powers: bool, from_zero: bool) -> None:
    """Choose scale, range and ticks of the axis `which` ("x" or "y") for these numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis = axes.yaxis if which == "y" else axes.xaxis
    set_limits = axes.set_ylim if which == "y" else axes.set_xlim
    low, high = min(values), max(values)
    if not powers and not from_zero and low > 0 and high >= _DECADES * low:
        (axes.set_yscale if which == "y" else axes.set_xscale)("log")
        axis.set_major_locator(LogLocator(numticks=6))
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        set_limits(low / 1.3, high * 1.3)
        return
    axis.set_major_locator(_round_numbers(5, integer=powers and high - low >= 3))
    if powers:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"10^{value:.6g}"))
    if from_zero:
        low = min(0.0, low)
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    set_limits(low if from_zero else low - room, high + room)


def _svg(figure: Figure, title: str) -> str:
    """The figure as an <svg> element in ASCII, without ids, references and metadata."""
    text = StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(text, format="svg", transparent=True, metadata=nothing)
    _, _, body = text.getvalue().partition("<svg")
    # The style is for "*", which would reach the whole page. Nothing is drawn outside its axes, so
    # that the clip paths are not needed. Of the ids, only those of markers are referred to; the
    # other ones would stand several times in a page.
    body = re.sub(r"<style.*?</style>", "", "<svg" + body, flags=re.DOTALL)
    body = re.sub(r"<clipPath.*?</clipPath>", "", body, flags=re.DOTALL)
    unwanted = re.compile(
        r' (?:id="(?!m[0-9a-f]+")[^"]*"|(?:clip-path|xmlns:xlink)="[^"]*"'
        r'|(?:width|height)="[\d.]+pt")'
    )
    # "<" and ">" are escaped in texts and in attributes, so that this finds whole tags only.
    body = re.sub(r"<[^<>]+>", lambda tag: unwanted.sub("", tag[0]), body)
    label = f'<svg role="img" stroke-linejoin="round" aria-label="{escape(title, quote=True)}"'
    return body.replace("<svg", label, 1).encode("ascii", "xmlcharrefreplace").decode()
