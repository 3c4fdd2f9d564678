"""The drift of each node: how far apart the outputs of two models of one structure can be.

b is a node of the base and t the same node of the tuned model. The two streams of hidden states
have token norms at most r_b and r_t, and their difference has token norm at most delta. Let R be
the larger radius, L the smaller Lipschitz constant of the two nodes on the ball of R, and eta a
bound on the token norm of t(x) - b(x) over all x in that ball. Then

    delta behind the node <= min(L delta + eta, r_b behind it + r_t behind it)

The first entry holds because t(x_t) - b(x_b) = [t(x_t) - t(x_b)] + [t(x_b) - b(x_b)], or the same
with b and t exchanged. The second is the triangle inequality.

`step` applies this to one pair of nodes. `eta` has a rule for each node that is not a container.
`through` has one for each container, which walks the parts of the container with delta. A
container's own eta comes from walking its parts with delta = 0, and the smaller of the two bounds
counts. Proofs are in docs/maths.md, section 14.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.graph.analysis import Analysis
from lip_plugin.certificate.graph.base import ProvenNorms, largest, rms
from lip_plugin.certificate.graph.containers import Chain, Parallel, Residual
from lip_plugin.certificate.graph.decimals import (
    ONE,
    ZERO,
    add,
    below,
    div,
    mul,
    norm2,
    root,
    up,
)
from lip_plugin.certificate.graph.joint_attention import AttentionOut
from lip_plugin.certificate.graph.joint_bounds import GatedMlp, MlpResidual
from lip_plugin.certificate.graph.nodes import (
    Activation,
    Gate,
    Linear,
    Norm,
    OneToken,
    Scale,
    Softcap,
)
from lip_plugin.certificate.graph.pairs import Modulus, Stacked
from lip_plugin.errors import ConfigError, UnsupportedModelError

# Factor that covers the rounding of a difference. A tensor's difference in float64 is off by one
# rounding. The difference of two scales is exact in Decimal, but each scale is a product of a few
# floats.
_SLIP = 1 + Decimal("1e-15")


@dataclass(frozen=True)
class Sides:
    """Proven norms of the base, of the tuned model, and of the differences of their matrices."""

    base: ProvenNorms
    tuned: ProvenNorms
    diff: ProvenNorms


@dataclass(frozen=True)
class Streams:
    """Bounds on the token norms of the base's and the tuned stream, and of their difference."""

    base: Decimal
    tuned: Decimal
    delta: Decimal

    @property
    def radius(self) -> Decimal:
        return max(self.base, self.tuned)


def step(b: Any, t: Any, at: Streams, sides: Sides) -> Streams:
    """The streams behind a pair of nodes, as bounds in token norm.

    Args:
        b, t: the node in the base, and the same node in the tuned model.
        at: the streams that enter them.
        sides: proven norms of the matrices.

    Raises:
        ConfigError: the two nodes are not alike.
        UnsupportedModelError: the nodes have no rule here.
    """
    if type(b) is not type(t):
        raise _unlike(b, t)
    out_b, out_t = b.bound(at.base, sides.base).radius, t.bound(at.tuned, sides.tuned).radius
    big = at.radius
    options = [add(out_b, out_t)]
    if type(b) in through.kinds():
        options.append(through(b, t, at, sides))
        own = through(b, t, Streams(big, big, ZERO), sides)
    else:
        own = eta(b, t, big, sides)
    constants = (b.bound(big, sides.base).lipschitz, t.bound(big, sides.tuned).lipschitz)
    options.append(add(_times(min(constants), at.delta), own))
    return Streams(out_b, out_t, min(options))


def _times(constant: Decimal, delta: Decimal) -> Decimal:
    # Equal inputs stay equal, even if the constant is infinite.
    return ZERO if delta == 0 else mul(constant, delta)


def _unlike(b: Any, t: Any, what: str = "") -> ConfigError:
    return ConfigError(
        f"drift: {b.name} is {what or type(b).__name__} in the base and otherwise in the tuned "
        "model; a drift is proven between models of one structure. "
        "Compare a model with what it was fine-tuned from, retrofitted alike."
    )


def _missing(node: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{node.name} ({type(node).__name__}): its drift has no rule here."
    )


# through(b, t, at, sides) bounds the token norm of the difference behind a container, by walking
# it.
through = Analysis("drift through a container", _missing)

# eta(b, t, r, sides) bounds the token norm of b(x) - t(x) over all inputs x of token norm at most
# r.
eta = Analysis("drift of a node", _missing)


@through.rule(Chain, AttentionOut, GatedMlp)
def chain_through(b: Chain, t: Any, at: Streams, sides: Sides) -> Decimal:
    if len(b.nodes) != len(t.nodes):
        raise _unlike(b, t)
    for inner_b, inner_t in zip(b.nodes, t.nodes, strict=True):
        at = step(inner_b, inner_t, at, sides)
    return at.delta


@through.rule(Residual, MlpResidual)
def residual_through(b: Residual, t: Any, at: Streams, sides: Sides) -> Decimal:
    return add(at.delta, step(b.branch, t.branch, at, sides).delta)


@through.rule(Parallel)
def parallel_through(b: Parallel, t: Any, at: Streams, sides: Sides) -> Decimal:
    pairs = zip(b.branches, t.branches, strict=True)
    return add(at.delta, *(step(x, y, at, sides).delta for x, y in pairs))


def difference(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The difference a - b in float64, off by one rounding at most (`_SLIP` covers it).

    A tensor that is None counts as zero. If both are None, so is the result.
    """
    if a is None and b is None:
        return None
    x, y = (None if v is None else v.detach().double() for v in (a, b))
    if x is None or y is None:
        return y if x is None else x
    return x - y.to(x.device)


# RMS norm of the difference of two biases.
def _bias(b: Any, t: Any) -> Decimal:
    return mul(rms(difference(t.bias(), b.bias())), _SLIP)


@eta.rule(Linear)
def linear_eta(b: Linear, t: Any, r: Decimal, sides: Sides) -> Decimal:
    n = mul(sides.diff[b.name].sigma, root(div(up(b.d_in), up(b.d_out))))
    return add(mul(n, r), _bias(b, t))


@eta.rule(Scale)
def scale_eta(b: Scale, t: Any, r: Decimal, sides: Sides) -> Decimal:
    return mul(up(abs(Decimal(b.scale) - Decimal(t.scale))), _SLIP, r)


def _gain(b: Norm, t: Any) -> Decimal:
    """Largest difference of two gains.

    A gain that is stored as 1 + w is itself off by a unit or two, which is added.
    """
    found = largest(difference(t.weight, b.weight))
    return (
        found
        if found == 0
        else add(mul(found, _SLIP), mul(_SLIP - 1, add(largest(b.weight), largest(t.weight))))
    )


@eta.rule(Norm)
def norm_eta(b: Norm, t: Any, r: Decimal, sides: Sides) -> Decimal:
    if (b.eps, b.center, b.floor) != (t.eps, t.center, t.floor):
        raise _unlike(b, t, f"a norm with eps {b.eps:g} and floor {b.floor:g}")
    if (b.weight is None) != (t.weight is None):
        raise _unlike(
            b, t, "a norm with a gain" if b.weight is not None else "a norm without a gain"
        )
    gain = _gain(b, t)
    # Before gain and bias the normed vector has an RMS norm of at most 1, of at most r / sqrt(eps),
    # and of at most r / floor.
    least = b.least()
    small = div(r, least) if least > 0 else ONE
    return add(mul(gain, min(ONE, small)), mul(rms(difference(t.bias, b.bias)), _SLIP))


@eta.rule(Activation)
def activation_eta(b: Activation, t: Any, r: Decimal, sides: Sides) -> Decimal:
    if (b.kind, b.cap, b.factor) != (t.kind, t.cap, t.factor):
        raise _unlike(b, t, f"{b.kind} (cap {b.cap})")
    return ZERO


@eta.rule(Softcap)
def softcap_eta(b: Softcap, t: Any, r: Decimal, sides: Sides) -> Decimal:
    if b.cap != t.cap:
        raise _unlike(b, t, f"a softcap of {b.cap:g}")
    return ZERO


@eta.rule(OneToken)
def one_token_eta(b: OneToken, t: Any, r: Decimal, sides: Sides) -> Decimal:
    if b.index != t.index:
        raise _unlike(b, t)
    if b.padding != t.padding:
        raise ConfigError(
            "drift: each model predicts from the last token that is not padding, and padding has "
            f"another id in the tuned model (pad_token_id is {b.padding} in the base and "
            f"{t.padding} in the tuned model), so their logits may be about different tokens. "
            "Give both configs the same pad_token_id."
        )
    return ZERO


@eta.rule(Stacked)
def stacked_eta(b: Stacked, t: Any, r: Decimal, sides: Sides) -> Decimal:
    found = [sides.diff[n.name].sigma for n in (b.gate, b.up)]
    n = mul(norm2(found), root(div(up(b.d_in), up(b.d_out))))
    return add(mul(n, r), _bias(b, t))


@eta.rule(Modulus)
def modulus_eta(b: Modulus, t: Any, r: Decimal, sides: Sides) -> Decimal:
    return ZERO


@eta.rule(Gate)
def gate_eta(b: Gate, t: Any, r: Decimal, sides: Sides) -> Decimal:
    """Drift of a gate a(G x) * (U x), with activation a.

    Entry by entry,

        a(G_t x) U_t x - a(G_b x) U_b x = [a(G_t x) - a(G_b x)] U_t x + a(G_b x) (U_t - U_b) x

    Each product has at most the RMS norm of one factor times the largest entry of the other.
    """
    if b.cap != t.cap:
        raise _unlike(b, t, f"a gate with cap {b.cap}")
    eta(b.act, t.act, r, sides)
    moved = []
    for x, y in ((b.gate, t.gate), (b.up, t.up)):
        size = eta(x, y, r, sides)
        row = mul(sides.diff[x.name].row, root(up(x.d_in)))
        moved.append((size, add(mul(row, r), mul(largest(difference(y.bias(), x.bias())), _SLIP))))
    (gate_rms, gate_entry), (up_rms, up_entry) = moved
    up_size, up_most = _extent(t.up, r, sides.tuned, t.cap)
    act_size, act_most = _extent(b.gate, r, sides.base, None)
    factor = b.act.factor
    act_size, act_most = (
        v if b.act.cap is None else min(v, up(b.act.cap))
        for v in (mul(factor, act_size), mul(factor, act_most))
    )
    first = mul(b.act.slope(), min(mul(gate_rms, up_most), mul(gate_entry, up_size)))
    return add(first, min(mul(act_most, up_rms), mul(act_size, up_entry)))


def _extent(
    linear: Linear, r: Decimal, norms: ProvenNorms, cap: float | None
) -> tuple[Decimal, Decimal]:
    """Bounds on the RMS norm and on the largest entry of W x + b, behind a cap if there is one."""
    size = linear.bound(r, norms).radius
    most = add(mul(linear.entrywise(norms), r), largest(linear.bias()))
    return (size, most) if cap is None else (min(size, up(cap)), min(most, up(cap)))


def logit_step(b: Linear, t: Linear, at: Streams, sides: Sides) -> Decimal:
    """Largest difference of a single output of two linear maps.

    It is used for the last map, whose single outputs are logits.

    Args:
        b, t: the map in the base, and the same map in the tuned model.
        at: token norms of the streams that enter them.
        sides: proven norms of the matrices.
    """
    big, width = at.radius, root(up(b.d_in))
    rows = min(sides.base[b.name].row, sides.tuned[t.name].row)
    own = add(
        mul(sides.diff[b.name].row, width, big), mul(largest(difference(t.bias(), b.bias())), _SLIP)
    )
    sizes = [
        add(mul(norms[n.name].row, width, r), largest(n.bias()))
        for n, norms, r in ((b, sides.base, at.base), (t, sides.tuned, at.tuned))
    ]
    return min(add(_times(mul(rows, width), at.delta), own), add(*sizes))


def rows_apart(a: Tensor, b: Tensor) -> Decimal:
    """Largest RMS norm of a row of a - b, rounded up."""
    rows = difference(a, b)
    assert rows is not None
    size = float(torch.linalg.vector_norm(rows, dim=-1).amax()) if rows.numel() else 0.0
    return div(mul(up(size), Decimal("1.000000000001")), below(root(up(rows.shape[-1]))))
