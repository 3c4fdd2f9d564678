"""TODO lip_plugin.certificate.graph.nodes.containers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from torch import Tensor

from lip_plugin.certificate.graph.base import Bound, Node, Norms, Watch
from lip_plugin.certificate.graph.decimals import ONE, add, mul
from lip_plugin.certificate.graph.nodes import Gate


@dataclass
class Parallel:
    """x + sum of f_i(x): radius r + sum of r_i, constant 1 + sum of L_i."""

    name: str
    branches: Sequence[Chain]

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        y = x
        for branch in self.branches:
            y = y + branch.run(x, watch)
        if watch is not None:
            watch.activation(y)
        return y

    def bound(self, r: Decimal, norms: Norms) -> Bound:
        bounds = [branch.bound(r, norms) for branch in self.branches]
        return Bound(add(r, *(b.radius for b in bounds)), add(ONE, *(b.lipschitz for b in bounds)))


@dataclass
class Chain:
    """Nodes one after another: constants multiply, radii are handed on."""

    name: str
    nodes: Sequence[Node]

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        for node in self.nodes:
            x = node.run(x, watch)
        return x

    def bound(self, r: Decimal, norms: Norms) -> Bound:
        constant = ONE
        for node in self.nodes:
            b = node.bound(r, norms)
            r, constant = b.radius, mul(constant, b.lipschitz)
        return Bound(r, constant)


@dataclass
class Residual:
    """x + f(x): radius r + r_f, constant 1 + L_f."""

    name: str
    branch: Chain

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        y = x + self.branch.run(x, watch)
        if watch is not None:
            watch.activation(y)
        return y

    def bound(self, r: Decimal, norms: Norms) -> Bound:
        b = self.branch.bound(r, norms)
        return Bound(add(r, b.radius), add(ONE, b.lipschitz))


def walk(nodes: Iterable[Any]) -> Iterator[Any]:
    """All nodes, whatever contains them, containers first."""
    for node in nodes:
        yield node
        if isinstance(node, Gate):
            yield from (node.gate, node.up, node.act)
        yield from walk([*branches(node), *getattr(node, "nodes", [])])


def branches(node: Any) -> Sequence[Chain]:
    """The branches that a node adds to the residual stream; none for other nodes."""
    return (node.branch,) if isinstance(node, Residual) else getattr(node, "branches", ())
