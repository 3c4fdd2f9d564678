"""Tables for a terminal: cells in columns, under a head and a rule.

Certificates and reports print themselves with `table`, which is given all rows at once. A program
that finds its rows one by one prints `line` for the head, and again for each row.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

_FORMAT = re.compile(r"([<>]?)(\d*)(.*)")


def table(
    head: Sequence[str] | None,
    rows: Iterable[Sequence[Any]],
    formats: Sequence[str],
    *,
    most: int = 44,
    cut: bool = True,
    closed: bool = False,
) -> str:
    """Lay out rows in columns, two blanks apart.

    A column is as wide as its widest cell. The first one holds names, which can be long: it has at
    most `most` characters, so that the table stays within a terminal's width.

    Args:
        head: title of each column; None leaves out the head and the rule under it.
        rows: cells of each row. Texts stand as they are, numbers are formatted, and None is "-".
        formats: for each column its alignment, the least width, and the format of its numbers, as
            in "<", ">10.4g" or "8.1%". Columns are aligned to the right without "<".
        most: largest width of the first column.
        cut: longer names in the first column lose their beginning; otherwise they stand out.
        closed: put a rule under the last row as well.

    Returns:
        The lines in one text, without a newline at the end.
    """
    cells = [[_text(value, form) for value, form in zip(row, formats)] for row in rows]
    columns = list(zip(*([head] if head is not None else []), *cells))
    widths = [max(map(len, column)) for column in columns] or [0] * len(formats)
    widths = [max(width, _least(form)) for width, form in zip(widths, formats)]
    widths[0] = min(widths[0], most)
    if cut:
        cells = [[row[0][-widths[0] :], *row[1:]] for row in cells]
    body = [_joined(row, widths, formats) for row in cells]
    if head is None:
        return "\n".join(body)
    titles = _joined(head, widths, formats)
    rule = "-" * len(titles)
    return "\n".join([titles, rule, *body, *([rule] if closed else [])])


def line(cells: Sequence[Any], head: Sequence[str], formats: Sequence[str]) -> str:
    """One row, or the head, of a table whose later rows are not known yet.

    Args:
        cells: cells of the row; the head itself for the first line.
        head: title of each column. A column is as wide as its title and its format ask for.
        formats: as in `table`.
    """
    widths = [max(len(title), _least(form)) for title, form in zip(head, formats)]
    return _joined([_text(v, form) for v, form in zip(cells, formats)], widths, formats)


def _least(form: str) -> int:
    """The least width that a format asks for."""
    return int(_FORMAT.match(form)[2] or 0)  # type: ignore[index]  # it matches any text


def _text(value: Any, form: str) -> str:
    """A cell without its padding."""
    if value is None:
        return "-"
    return value if isinstance(value, str) else format(value, _FORMAT.match(form)[3])  # type: ignore[index]


def _joined(cells: Sequence[str], widths: Sequence[int], formats: Sequence[str]) -> str:
    """The cells padded to their columns, in one line."""
    padded = [
        cell.ljust(width) if form.startswith("<") else cell.rjust(width)
        for cell, width, form in zip(cells, widths, formats)
    ]
    return "  ".join(padded).rstrip()
