"""Progress bars for work that takes longer than a few seconds.

They are drawn on stderr, and only if stderr is a terminal, so logs and pipes stay clean.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


@contextmanager
def progress(total: int, what: str, *, show: bool | None = None) -> Iterator[Any]:
    """A progress bar, as a context manager.

    Args:
        total: The number of steps.
        what: The text in front of the bar.
        show: True or False to show or hide it. None shows it if stderr is a terminal.

    Yields:
        The bar; call its `update(n)` after n steps.
    """
    disable = {None: not sys.stderr.isatty(), True: False, False: True}[show]
    with tqdm(total=total, desc=what, leave=False, disable=disable) as bar:
        yield bar


def steps(items: Sequence[T], what: str, *, shown: bool = True) -> Iterator[T]:
    """Iterate over `items` under a progress bar.

    Args:
        items: What to go through.
        what: The text in front of the bar.
        shown: False hides the bar. True shows it if stderr is a terminal.
    """
    yield from tqdm(items, desc=what, disable=not (shown and sys.stderr.isatty()), leave=False)
