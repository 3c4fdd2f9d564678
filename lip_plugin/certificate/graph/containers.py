"""Nodes that hold other nodes, and `walk`, which visits them all.

A chain runs its nodes one after another. A residual adds a chain's output to its input. Parallel
branches read the same input and are all added to it. The rules are proven in docs/maths.md,
sections 3, 4 and 12.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from torch import Tensor

from lip_plugin.certificate.graph.base import Bound, Node, ProvenNorms, Watch
from lip_plugin.certificate.graph.decimals import ONE, add, mul


@dataclass
class Parallel(Node):
    """x + sum of f_i(x). The radius is r + sum of r_i, and the constant is 1 + sum of L_i."""

    name: str
    branches: Sequence[Chain]

    def children(self) -> Sequence[Node]:
        return self.branches

    added = children

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        y = x
        for branch in self.branches:
            y = y + branch.run(x, watch)
        if watch is not None:
            watch.activation(y)
        return y

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        bounds = [branch.bound(r, norms) for branch in self.branches]
        return Bound(add(r, *(b.radius for b in bounds)), add(ONE, *(b.lipschitz for b in bounds)))


@dataclass
class Chain(Node):
    """Nodes one after another. Each gets the radius of the one before, and constants multiply."""

    name: str
    nodes: Sequence[Node]

    def children(self) -> Sequence[Node]:
        return self.nodes

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        for node in self.nodes:
            x = node.run(x, watch)
        return x

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        constant = ONE
        for node in self.nodes:
            b = node.bound(r, norms)
            r, constant = b.radius, mul(constant, b.lipschitz)
        return Bound(r, constant)


@dataclass
class Residual(Node):
    """x + f(x). The radius is r + r_f, and the constant is 1 + L_f."""

    name: str
    branch: Chain

    def children(self) -> Sequence[Node]:
        return (self.branch,)

    added = children

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        y = x + self.branch.run(x, watch)
        if watch is not None:
            watch.activation(y)
        return y

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        b = self.branch.bound(r, norms)
        return Bound(add(r, b.radius), add(ONE, b.lipschitz))


def walk(nodes: Iterable[Node]) -> Iterator[Any]:
    """All nodes and all nodes inside of them. A container comes before its own nodes."""
    for node in nodes:
        yield node
        yield from walk(node.children())
