"""Small charts as SVG text: lines over steps, and bars. No library, no script, readable on paper."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from decimal import ROUND_CEILING, ROUND_FLOOR, ROUND_HALF_EVEN, Context, Decimal
from html import escape

Points = Sequence[tuple[float, float]]
COLORS = ("#1d4ed8", "#c2410c", "#047857", "#7c3aed")
_WIDTH, _HEIGHT = 520.0, 240.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 58.0, 14.0, 30.0, 40.0


def number(value: float, side: str = "nearest") -> str:
    """Four significant digits, without trailing zeros; `side` "up" for upper bounds, "down" for lower ones."""
    if not math.isfinite(value):
        return "infinite" if value > 0 else str(value)
    rounding = {"up": ROUND_CEILING, "down": ROUND_FLOOR, "nearest": ROUND_HALF_EVEN}[side]
    return f"{float(Context(prec=4, rounding=rounding).create_decimal(Decimal(value))):.4g}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers in [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / max(1, count)
    if not (math.isfinite(raw) and raw > 0):
        return [low]
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 5, 10) if m * power >= raw), 10 * power)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)] or [low]


def lines(
    series: Mapping[str, Points],
    title: str,
    xlabel: str = "step",
    limit: tuple[str, float] | None = None,
    dashed: Sequence[str] = (),
    from_zero: bool = False,
) -> str:
    """A line chart; points that are not finite are left out, and "" is given if none is left.

    Args:
        series: label -> points (x, y).
        limit: (label, y) of a red horizontal line.
        dashed: labels drawn with dashes.
        from_zero: let the y axis begin at 0.
    """
    kept = {
        k: [(x, y) for x, y in v if math.isfinite(x) and math.isfinite(y)]
        for k, v in series.items()
    }
    kept = {k: v for k, v in kept.items() if v}
    if not kept:
        return ""
    xs = [x for v in kept.values() for x, _ in v]
    ys = [y for v in kept.values() for _, y in v] + ([limit[1]] if limit else [])
    x0, x1 = _span(xs)
    y0, y1 = _span([*ys, 0.0] if from_zero else ys, margin=0.06)

    def at(x: float, y: float) -> tuple[float, float]:
        across = _LEFT + (x - x0) / (x1 - x0) * (_WIDTH - _LEFT - _RIGHT)
        return across, _HEIGHT - _BOTTOM - (y - y0) / (y1 - y0) * (_HEIGHT - _TOP - _BOTTOM)

    body = [_text(_LEFT, 14, title, "start", "title")]
    for y in ticks(y0, y1):
        _, v = at(x0, y)
        body.append(
            f'<line stroke="#e5e7eb" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>'
        )
        body.append(_text(_LEFT - 6, v + 4, number(round(y, 12)), "end"))
    for x in ticks(x0, x1, 6):
        h, _ = at(x, y0)
        body.append(_text(h, _HEIGHT - _BOTTOM + 15, number(round(x, 12)), "middle"))
    body.append(_text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 8, xlabel, "middle"))
    if limit:
        _, v = at(x0, limit[1])
        body.append(
            f'<line stroke="#b91c1c" stroke-dasharray="4 3" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>'
        )
        body.append(_text(_WIDTH - _RIGHT - 2, v - 4, limit[0], "end"))
    for i, (label, points) in enumerate(kept.items()):
        body.append(_curve([at(x, y) for x, y in points], COLORS[i % len(COLORS)], label in dashed))
    body += _legend(list(kept), dashed)
    return _svg(_WIDTH, _HEIGHT, title, body)


def bars(
    rows: Sequence[tuple[str, float]],
    title: str,
    limit: tuple[str, float] | None = None,
    log: bool = False,
) -> str:
    """Horizontal bars from 0, a label and a value each; values that are not finite are drawn in full.

    `log` says that values are base-10 logarithms: they are written as powers of ten.
    """
    if not rows:
        return ""
    finite = [v for _, v in rows if math.isfinite(v)] + ([limit[1]] if limit else [])
    top = max([*finite, 1e-300]) * 1.02
    left, row, width = 250.0, 17.0, 720.0
    room = width - left - 70
    height = 30 + row * len(rows) + (16 if limit else 4)
    body = [_text(0, 14, title, "start", "title")]
    for i, (label, value) in enumerate(rows):
        y = 26 + row * i
        length = room * (min(1.0, max(0.0, value / top)) if math.isfinite(value) else 1.0)
        body.append(_text(left - 6, y + 11, label[-40:], "end"))
        body.append(
            f'<rect x="{left}" y="{y}" width="{length:.1f}" height="{row - 5}" fill="{COLORS[0]}"/>'
        )
        shown = ("10^" + f"{value:.2f}") if log and math.isfinite(value) else number(value)
        # beyond the limit's line, which would go through the number otherwise
        end = left + max(length, room * limit[1] / top if limit else 0.0)
        body.append(_text(end + 5, y + 11, shown, "start"))
    if limit:
        x, end = left + room * limit[1] / top, 26 + row * len(rows)
        body.append(
            f'<line stroke="#b91c1c" stroke-dasharray="4 3" x1="{x:.1f}" x2="{x:.1f}" y1="22" y2="{end:.1f}"/>'
        )
        body.append(_text(x, end + 14, limit[0], "middle"))
    return _svg(width, height, title, body)


def _span(values: Sequence[float], margin: float = 0.0) -> tuple[float, float]:
    low, high = min(values), max(values)
    if high <= low:
        room = abs(low) * 0.05 or 1.0
        return low - room, high + room
    return low - margin * (high - low), high + margin * (high - low)


def _curve(points: Points, color: str, dashed: bool) -> str:
    if len(points) == 1:
        return f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{color}"/>'
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return f'<polyline fill="none" stroke="{color}" stroke-width="1.8"{dash} points="{path}"/>'


def _legend(labels: Sequence[str], dashed: Sequence[str]) -> list[str]:
    if len(labels) < 2:
        return []
    body, x = [], _WIDTH - _RIGHT
    for i, label in reversed(list(enumerate(labels))):
        x -= 6.2 * len(label) + 4
        body.append(_text(x, 26, label, "start"))
        dash = ' stroke-dasharray="5 4"' if label in dashed else ""
        color = COLORS[i % len(COLORS)]
        body.append(
            f'<line x1="{x - 22}" x2="{x - 5}" y1="22" y2="22" stroke="{color}" stroke-width="2"{dash}/>'
        )
        x -= 32
    return body


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> str:
    style = (
        'font-size="13" font-weight="600" fill="#111827"'
        if kind
        else 'font-size="11" fill="#374151"'
    )
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    return f'<text {place} font-family="system-ui, sans-serif" {style}>{escape(text)}</text>'


def _svg(width: float, height: float, title: str, body: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(title, quote=True)}">{"".join(body)}</svg>'
    )
