"""Progress bars for work that takes longer than a few seconds; silent where tqdm is absent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any


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
