"""Progress bars for the command line: on stderr, on a terminal, and nowhere else."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from tqdm import tqdm


class _Silent:
    def update(self, n: int = 1) -> None:
        pass


@contextmanager
def progress(total: int, what: str, *, show: bool | None = None) -> Iterator[Any]:
    """A bar of `total` steps, or nothing; the value has `update(n)`. show=None: where stderr is a terminal."""
    if show is False or find_spec("tqdm") is None:
        yield _Silent()
        return
    with import_module("tqdm").tqdm(
        total=total, desc=what, leave=False, disable=None if show is None else False
    ) as bar:
        yield bar


T = TypeVar("T")


def bar(items: Sequence[T], what: str, *, shown: bool = True) -> Iterator[T]:
    """Go through `items` under a bar called `what`, if `shown` and stderr is a terminal."""
    yield from tqdm(items, desc=what, disable=not (shown and sys.stderr.isatty()), leave=False)
