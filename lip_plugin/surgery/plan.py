"""Plan: the steps of a surgery, all of them checked before the first is taken; and the report of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass
class RetrofitReport:
    """What `retrofit` or `release` changed: one (name, change) per step; empty if nothing was to do."""

    changes: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "nothing to change"
        width = min(max(len(name) for name, _ in self.changes), 48)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in self.changes)


@dataclass
class Plan:
    """Steps that were checked and not yet taken."""

    steps: list[tuple[str, str, Callable[[], None]]] = field(default_factory=list)

    def add(self, name: str, what: str, do: Callable[[], None]) -> None:
        """One step: the part's full name, the change in words, and what carries it out."""
        self.steps.append((name, what, do))

    def carry_out(self) -> RetrofitReport:
        """Take all steps, in order."""
        for _, _, do in self.steps:
            do()
        return RetrofitReport([(name, what) for name, what, _ in self.steps])
