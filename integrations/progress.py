"""Progress bars for the command line: on stderr, on a terminal, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")


def bar(items: Sequence[T], what: str, *, shown: bool = True) -> Iterator[T]:
    """Go through `items` under a bar called `what`, if `shown` and stderr is a terminal."""
    yield from tqdm(items, desc=what, disable=not (shown and sys.stderr.isatty()), leave=False)
