"""A table of rules, one for each kind of node: how an analysis of a graph finds the rule for a node.

    move = Analysis("local movement", missing)

    @move.rule(Linear)
    def linear_movement(node, x, ...): ...

    move(node, x, ...)

A rule is found by the very class of a node. A new kind of node inherits nothing from the class that it extends: it gets a
rule of its own, or is refused by name. tests/certificate/test_node_coverage.py asks every node for every analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = TypeVar("Rule", bound=Callable[..., Any])


class Analysis:
    """Rules by the class of a node; calling it applies the rule of its first argument.

    Args:
        name: what it computes, for people.
        missing: the error for a node without a rule.
    """

    def __init__(self, name: str, missing: Callable[[Any], Exception]) -> None:
        self.name, self._missing = name, missing
        self._rules: dict[type, Callable[..., Any]] = {}

    def rule(self, *kinds: type) -> Callable[[Rule], Rule]:
        """Make the decorated function the rule of these kinds of nodes."""

        def register(function: Rule) -> Rule:
            for kind in kinds:
                if kind in self._rules:
                    raise TypeError(f"{self.name}: {kind.__name__} has a rule already.")
                self._rules[kind] = function
            return function

        return register

    def kinds(self) -> frozenset[type]:
        """The kinds of nodes that have a rule."""
        return frozenset(self._rules)

    def __call__(self, node: Any, *args: Any) -> Any:
        found = self._rules.get(type(node))
        if found is None:
            raise self._missing(node)
        return found(node, *args)
