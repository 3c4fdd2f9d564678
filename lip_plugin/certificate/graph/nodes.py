"""Nodes that hold no others, and the gate of a gated MLP: what they compute, and their bounds.

Each rule's proof is in docs/maths.md; all of them hold for any mask, any length, and with or without a KV cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.certificate.graph.base import Bound, Node, ProvenNorms, Watch, largest, rms
from lip_plugin.certificate.graph.decimals import INF, ONE, add, div, mul, root, up
from lip_plugin.model.activations import ACTIVATIONS, SLOPE_UPPER, ScaledActivation


@dataclass
class Softcap(Node):
    """c tanh(x / c), entrywise: radius min(r, c), constant 1."""

    name: str
    cap: float

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        return self.cap * torch.tanh(x / self.cap)

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        return Bound(min(r, up(abs(self.cap))), ONE)


@dataclass
class OneToken(Node):
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

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        return Bound(r, ONE)


@dataclass
class Linear(Node):
    """W x + b. Radius N r + RMS(b), constant N = sigma_max sqrt(d_in / d_out)."""

    name: str
    weight: Callable[[], Tensor]  # [d_out, d_in], read when needed: training goes on
    bias: Callable[[], Tensor | None]
    d_out: int
    d_in: int

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        bias = self.bias()
        y = nn.functional.linear(
            x, self.weight().to(x.dtype), None if bias is None else bias.to(x.dtype)
        )
        if watch is not None:
            watch.activation(y)
        return y

    def norm(self, norms: ProvenNorms) -> Decimal:
        return mul(norms[self.name].sigma, root(div(up(self.d_in), up(self.d_out))))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        n = self.norm(norms)
        return Bound(add(mul(n, r), rms(self.bias())), n)

    def entrywise(self, norms: ProvenNorms) -> Decimal:
        """Largest entry of W x over x of RMS norm 1: largest row norm times sqrt(d_in)."""
        return mul(norms[self.name].row, root(up(self.d_in)))


@dataclass
class Scale(Node):
    """x -> scale * x: radius and constant abs(scale)."""

    name: str
    scale: float

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        return x * self.scale

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        s = up(abs(self.scale))
        return Bound(mul(s, r), s)


@dataclass
class Norm(Node):
    """LayerNorm or RMSNorm, kept or with a floor: g x / max(s(x), floor) + b with s = sqrt(mean square + eps).

    Radius largest gain + RMS(bias), constant gain / max(sqrt(eps), floor). The centering of a LayerNorm is an orthogonal
    projection, so it changes neither number.
    """

    name: str
    module: nn.Module
    eps: float
    center: bool
    weight: Tensor | None
    bias: Tensor | None
    floor: float = 0.0

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        y = x - x.mean(-1, keepdim=True) if self.center else x
        y = y / (y.square().mean(-1, keepdim=True) + self.eps).sqrt().clamp_min(self.floor)
        y = y if self.weight is None else y * self.weight.to(y.dtype)
        return y if self.bias is None else y + self.bias.to(y.dtype)

    @property
    def width(self) -> int:
        """d of what it norms."""
        shape: Any = self.module.normalized_shape if self.weight is None else self.weight.shape
        return int(shape[-1])

    def least(self) -> Decimal:
        """What it divides by is at least this; from below by one unit of 1e-15, as the library computes with floats."""
        return up(max(self.eps**0.5, self.floor) * (1 - 1e-15))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        gain, least = ONE if self.weight is None else largest(self.weight), self.least()
        constant = div(gain, least) if least > 0 else INF
        return Bound(add(min(gain, mul(constant, r)), rms(self.bias)), constant)


@dataclass
class Activation(Node):
    """Entrywise f with f(0) = 0 and abs(f(z)) <= abs(z): radius r, constant the largest slope.

    With a cap c, c tanh(f(z) / c): no steeper, no larger, and no entry above c.
    """

    name: str
    act: nn.Module
    kind: str
    cap: float | None = None

    @property
    def factor(self) -> Decimal:
        """What the module multiplies the activation with: 1/slope if it was scaled."""
        return up(1.0 / SLOPE_UPPER[self.kind]) if isinstance(self.act, ScaledActivation) else ONE

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        # the function that the slope was proven for, not the module: a hook on that would hide here
        y = ACTIVATIONS[self.kind](x)
        y = y * (1.0 / SLOPE_UPPER[self.kind]) if isinstance(self.act, ScaledActivation) else y
        return within_cap(y, self.cap)

    def slope(self) -> Decimal:
        # decimal string of the constant: its float may lie below the value that was rounded up
        return mul(Decimal(repr(SLOPE_UPPER[self.kind])), self.factor)

    def swing(self) -> Decimal:
        """Largest slope of f(z) - F z / 2, F the factor: slopes lie in [F - slope, slope], as f(-z) = f(z) - F z."""
        # not `-`: that rounds as the caller's decimal context says
        return mul(self.factor, add(Decimal(repr(SLOPE_UPPER[self.kind])), Decimal("-0.5")))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        radius = mul(self.factor, r)
        return Bound(radius if self.cap is None else min(radius, up(self.cap)), self.slope())


@dataclass
class Gate(Node):
    """act(gate x) * up x, entrywise: each term bounded with whichever factor is better entrywise.

    With a cap c, c tanh(up x / c) in place of up x.
    """

    name: str
    gate: Linear
    up: Linear
    act: Activation
    cap: float | None = None

    def children(self) -> Sequence[Node]:
        return (self.gate, self.up, self.act)

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        y = self.act.run(self.gate.run(x, watch)) * within_cap(self.up.run(x, watch), self.cap)
        if watch is not None:
            watch.activation(y)
        return y

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        g, u, factor = self.gate.bound(r, norms), self.up.bound(r, norms), self.act.factor
        e_g, e_u = self.gate.entrywise(norms), self.up.entrywise(norms)
        p_g = _within(mul(factor, add(mul(e_g, r), largest(self.gate.bias()))), self.act.cap)
        p_u = _within(add(mul(e_u, r), largest(self.up.bias())), self.cap)
        a_g, a_u = _within(mul(factor, g.radius), self.act.cap), _within(u.radius, self.cap)
        moving_gate = mul(self.act.slope(), min(mul(g.lipschitz, p_u), mul(e_g, a_u)))
        moving_up = min(mul(p_g, u.lipschitz), mul(a_g, e_u))
        return Bound(min(mul(p_g, a_u), mul(a_g, p_u)), add(moving_gate, moving_up))


def within_cap(x: Tensor, cap: float | None) -> Tensor:
    """c tanh(x / c); x itself without a cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


def _within(bound: Decimal, cap: float | None) -> Decimal:
    return bound if cap is None else min(bound, up(cap))
