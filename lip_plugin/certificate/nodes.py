"""Nodes that only some families need: parallel branches, softcaps, one token of many, rotations.

Their rules are proven in docs/maths.md, section 12.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.attention import Attention
from lip_plugin.certificate.graph import Bound, Chain, Node, Norms, Watch, branches
from lip_plugin.certificate.upper import ONE, add, up


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
class Softcap:
    """c tanh(x / c), entrywise: radius min(r, c), constant 1."""

    name: str
    cap: float

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        return self.cap * torch.tanh(x / self.cap)

    def bound(self, r: Decimal, norms: Norms) -> Bound:
        return Bound(min(r, up(abs(self.cap))), ONE)


@dataclass
class OneToken:
    """One token of all, [batch, 1, d]: the token norm is a maximum over tokens, so r and 1.

    Attributes:
        index: 0 for the first token, -1 for the last.
        padding: token id that the model passes over when it looks for the last token. The node runs on
            sequences without it; the bound holds for any one token, so with it as well.
    """

    name: str
    index: int
    padding: int | None = None

    @property
    def where(self) -> slice:
        """The token, as a slice of the axis of tokens."""
        return slice(self.index, self.index + 1 or None)

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        return x[..., self.where, :]

    def bound(self, r: Decimal, norms: Norms) -> Bound:
        return Bound(r, ONE)


class Rotary:
    """A library's rotation, asked for the kind of one layer; pairs of the first `width` coordinates turn.

    What it computes is an isometry times `scale` on these, and nothing on the others.
    """

    def __init__(self, module: Any, layer_type: str | None) -> None:
        self.module, self.layer_type = module, layer_type

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, tokens, width]."""
        if self.layer_type is None:
            return self.module(x, positions)
        return self.module(x, positions, self.layer_type)

    @property
    def scale(self) -> float:
        """What yarn and longrope multiply cos and sin with; 1 for all others."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        return float(getattr(self.module, f"{prefix}attention_scaling", 1.0))

    @property
    def attention_scaling(self) -> float:
        """Bound on the factor of any coordinate: those that are not turned keep theirs."""
        return max(1.0, abs(self.scale))


def attentions(nodes: Sequence[Node]) -> Iterator[tuple[Node, Attention]]:
    """(what is in front of it in its branch, attention) of every layer, in running order."""
    for chain in (branch for node in nodes for branch in branches(node)):
        for before, after in zip(chain.nodes, chain.nodes[1:], strict=False):
            first = after.nodes[0] if isinstance(after, Chain) else after
            if isinstance(first, Attention):
                yield before, first
