"""The simple nodes: what they compute, and their bounds.

These are the nodes that hold no others, and the gate of a gated MLP. The docstring of each class
states its rule, in RMS norms. r is the token norm of the input, N(W) is the RMS->RMS norm of W, and
RMS(b) is the RMS norm of b. The proofs are in docs/maths.md, sections 4 and 12. All rules hold for
any mask and any length, with or without a KV cache.
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
    """c tanh(x / c), entry by entry. The radius is min(r, abs(c)), and the constant is 1."""

    name: str
    cap: float

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        return self.cap * torch.tanh(x / self.cap)

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        return Bound(min(r, up(abs(self.cap))), ONE)


@dataclass
class OneToken(Node):
    """One token of a sequence, as [batch, 1, d]. The radius is r, and the constant is 1.

    That is because the token norm is a maximum over tokens.

    Attributes:
        index: 0 for the first token, -1 for the last.
        padding: the token id that the model passes over when it looks for the last token, if it
            does. `run` is right only for sequences without this id. The bound holds for any one
            token, so it holds for sequences with it as well.
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
    """W x + b. The radius is N r + RMS(b), and the constant is N = sigma_max sqrt(d_in / d_out).

    Attributes:
        weight: gives W [d_out, d_in]. It is a function because training goes on after the graph was
            built, and the weight has to be the one of now.
        bias: gives b [d_out], or None, for the same reason.
    """

    name: str
    weight: Callable[[], Tensor]
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
        """Bound on the largest entry of W x, for x of RMS norm at most 1.

        It is the largest norm2 of a row of W, times sqrt(d_in).
        """
        return mul(norms[self.name].row, root(up(self.d_in)))


@dataclass
class Scale(Node):
    """x -> scale * x. The radius is abs(scale) r, and the constant is abs(scale)."""

    name: str
    scale: float

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        return x * self.scale

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        s = up(abs(self.scale))
        return Bound(mul(s, r), s)


@dataclass
class Norm(Node):
    """A LayerNorm or RMSNorm that is kept, with or without a floor under its divisor.

    It computes g x / max(s(x), floor) + b, with gain g, bias b and
    s(x) = sqrt(mean square of x + eps). A LayerNorm centers x first.

    Let G be the largest absolute gain and F = max(sqrt(eps), floor). The radius is
    min(G, r G / F) + RMS(b), and the constant is G / F. Centering is an orthogonal projection, so
    it makes neither number larger.

    Attributes:
        module: the library's norm, which the comparison runs beside this node.
        center: whether x is centered first.
        weight: the gain as the forward uses it, or None for a gain of 1.
        floor: 0 if there is none.
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
        """Length d of the vectors that are normed."""
        shape: Any = self.module.normalized_shape if self.weight is None else self.weight.shape
        return int(shape[-1])

    def least(self) -> Decimal:
        """A lower bound of the divisor: max(sqrt(eps), floor), made smaller by a relative 1e-15.

        That covers the rounding of the root, which is computed in floats.
        """
        return up(max(self.eps**0.5, self.floor) * (1 - 1e-15))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        gain, least = ONE if self.weight is None else largest(self.weight), self.least()
        constant = div(gain, least) if least > 0 else INF
        return Bound(add(min(gain, mul(constant, r)), rms(self.bias)), constant)


@dataclass
class Activation(Node):
    """F f(z), entry by entry. The radius is F r, the constant is F times the largest slope of f.

    Here f is one of `ACTIVATIONS`, which all have abs(f(z)) <= abs(z). F is the factor of a scaled
    activation. It is 1 / (largest slope of f), or 1 if the activation was not scaled.

    With a cap c, the node computes c tanh(F f(z) / c). That is no steeper and no larger than
    F f(z), and no entry is above c.

    Attributes:
        act: the model's module.
        kind: the name of f in `ACTIVATIONS` and `SLOPE_UPPER`.
        cap: c, or None.
    """

    name: str
    act: nn.Module
    kind: str
    cap: float | None = None

    @property
    def factor(self) -> Decimal:
        """F, the factor that the module multiplies f with. It is 1 / slope if f was scaled."""
        return up(1.0 / SLOPE_UPPER[self.kind]) if isinstance(self.act, ScaledActivation) else ONE

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        # Runs the function that the slope is proven for, and not the module. If the module were
        # run, a hook on it would be in both sides of the comparison with the model, and so stay
        # unseen.
        y = ACTIVATIONS[self.kind](x)
        y = y * (1.0 / SLOPE_UPPER[self.kind]) if isinstance(self.act, ScaledActivation) else y
        return within_cap(y, self.cap)

    # F times the largest slope of f.
    def slope(self) -> Decimal:
        # The constant was rounded up as a decimal. The float that stands for it may lie below that
        # decimal, so the decimal string is read and not the float.
        return mul(Decimal(repr(SLOPE_UPPER[self.kind])), self.factor)

    def swing(self) -> Decimal:
        """Bound on the slope of F f(z) - F z / 2, which is F times (largest slope of f - 1/2).

        The slopes of f lie between 1 - s and s, where s is the largest. docs/maths.md, section 4,
        has the reason, under "MLP with its residual".
        """
        # `add` and not `-`, because `-` would round as the caller's decimal context says.
        return mul(self.factor, add(Decimal(repr(SLOPE_UPPER[self.kind])), Decimal("-0.5")))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        radius = mul(self.factor, r)
        return Bound(radius if self.cap is None else min(radius, up(self.cap)), self.slope())


@dataclass
class Gate(Node):
    """act(gate x) * (up x), entry by entry. With a cap c, c tanh(up x / c) takes the place of up x.

    The RMS norm of a product, entry by entry, is at most the largest entry of one factor times the
    RMS norm of the other. Each term of the rule takes the better choice of the two. docs/maths.md,
    section 4, has the rule under "Gate".

    Attributes:
        gate, up: the two linear maps.
        act: the activation behind `gate`, which may have a cap of its own.
        cap: c, or None.
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
        # For both factors, p bounds the largest entry and a the RMS norm. e is how fast the largest
        # entry of a linear map moves with the RMS norm of its input.
        e_g, e_u = self.gate.entrywise(norms), self.up.entrywise(norms)
        p_g = _within(mul(factor, add(mul(e_g, r), largest(self.gate.bias()))), self.act.cap)
        p_u = _within(add(mul(e_u, r), largest(self.up.bias())), self.cap)
        a_g, a_u = _within(mul(factor, g.radius), self.act.cap), _within(u.radius, self.cap)
        moving_gate = mul(self.act.slope(), min(mul(g.lipschitz, p_u), mul(e_g, a_u)))
        moving_up = min(mul(p_g, u.lipschitz), mul(a_g, e_u))
        return Bound(min(mul(p_g, a_u), mul(a_g, p_u)), add(moving_gate, moving_up))


def within_cap(x: Tensor, cap: float | None) -> Tensor:
    """c tanh(x / c), or x itself if there is no cap."""
    return x if cap is None else cap * torch.tanh(x / cap)


# The smaller one of a bound and a cap, if there is a cap.
def _within(bound: Decimal, cap: float | None) -> Decimal:
    return bound if cap is None else min(bound, up(cap))
