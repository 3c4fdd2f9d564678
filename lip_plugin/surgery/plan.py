"""`Plan`: a list of changes that are all checked before the first one is made; and their report.

`retrofit`, `release` and `set_caps_` collect their changes here. An error while they collect leaves
the model untouched, because nothing has been carried out yet.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from lip_plugin.tables import table


@dataclass
class RetrofitReport:
    """What a call changed: one (name, change) for each step, printed as a table.

    It is empty if nothing had to be changed.
    """

    changes: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "nothing to change"
        return table(None, self.changes, ("<", "<"), most=48, cut=False)


@dataclass
class Plan:
    """Changes that were checked and have not been made yet."""

    steps: list[tuple[str, str, Callable[[], None]]] = field(default_factory=list)

    def add(self, name: str, what: str, do: Callable[[], None]) -> None:
        """Add one change.

        Args:
            name: full name of the part of the model that changes.
            what: the change in words, for the report.
            do: makes the change.
        """
        self.steps.append((name, what, do))

    def carry_out(self) -> RetrofitReport:
        """Make all changes, in the order in which they were added."""
        for _, _, do in self.steps:
            do()
        return RetrofitReport([(name, what) for name, what, _ in self.steps])
