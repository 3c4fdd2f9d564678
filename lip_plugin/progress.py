"""Progress bars for work that takes longer than a few seconds: on stderr, on a terminal, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tqdm import tqdm

T = TypeVar("T")


@contextmanager
def progress(total: int, what: str, *, show: bool | None = None) -> Iterator[Any]:
    """A bar of `total` steps, with `update(n)`. show=None: where stderr is a terminal."""
    disable = {None: not sys.stderr.isatty(), True: False, False: True}[show]
    with tqdm(total=total, desc=what, leave=False, disable=disable) as bar:
        yield bar


def steps(items: Sequence[T], what: str, *, shown: bool = True) -> Iterator[T]:
    """Go through `items` under a bar called `what`, if `shown` and stderr is a terminal."""
    yield from tqdm(items, desc=what, disable=not (shown and sys.stderr.isatty()), leave=False)
