"""`Analysis`: a table of rules, one for each kind of node of a graph.

The rules of the certificate itself are methods of the nodes (`Node.bound`). Every other analysis of
the graph (certified radius, drift, rounding, reach of activations) keeps its rules in such a table:

    move = Analysis("local movement", missing)

    @move.rule(Linear)
    def linear_movement(node, x, ...): ...

    move(node, x, ...)  # applies the rule of the node's class

A rule is found by the exact class of a node. A new kind of node inherits no rule from the class
that it extends, because that rule may not be proven for it. It needs a rule of its own; otherwise
it is refused by name. tests/certificate/test_node_coverage.py asks every node for every analysis.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Rule = TypeVar("Rule", bound=Callable[..., Any])


class Analysis:
    """Rules by the class of a node. A call applies the rule of the node that is passed first.

    Args:
        name: what the analysis computes, for messages.
        missing: makes the error to raise for a node without a rule.
    """

    def __init__(self, name: str, missing: Callable[[Any], Exception]) -> None:
        self.name, self._missing = name, missing
        self._rules: dict[type, Callable[..., Any]] = {}

    def rule(self, *kinds: type) -> Callable[[Rule], Rule]:
        """A decorator that makes a function the rule of these kinds of nodes.

        Raises TypeError if a kind has a rule already.
        """

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
