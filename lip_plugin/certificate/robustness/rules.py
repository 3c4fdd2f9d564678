"""Local movement: how far each token's hidden state can move around one given input.

`move(node, x, movement, local)` runs a node at the centre x [batch, tokens, d], in float64. It also
bounds, for each token and in 2-norms, how far the node's output moves when its input moves within
`movement`. A node's global constant cannot see the values at the centre, but a local rule can: the
denominators of kept norms, the entries that a gate multiplies with, the weights of attention.

A node that is not linear also records a bound on what its linearization at the centre leaves out
(`Remainder` in movement.py). A node without a rule raises CertificateError. The rule of attention
is in attention_rule.py. Proofs are in docs/maths.md, section 11.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.graph.analysis import Analysis
from lip_plugin.certificate.graph.base import largest
from lip_plugin.certificate.graph.containers import Chain, Parallel, Residual
from lip_plugin.certificate.graph.decimals import to_float
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
    within_cap,
)
from lip_plugin.certificate.graph.pairs import Modulus, Stacked
from lip_plugin.certificate.robustness.kinks import Bends, Convex, Kinks
from lip_plugin.certificate.robustness.movement import Local, Movement, Remainder, Term, sum_of
from lip_plugin.errors import CertificateError
from lip_plugin.model.pairs import PAIR_EPS, PAIR_SCALE

# The change of slope at 0 of functions that are linear elsewhere.
_KINKS = {"relu": 1.0, "abs": 2.0}
# The largest absolute second derivatives, rounded up. Those of both forms of gelu and of silu are
# at 0: 2 phi(0), sqrt(2/pi) and 1/2. That of tanh is 4 / (3 sqrt(3)), at atanh(1/sqrt(3)).
# tests/certificate/test_robustness_rules.py recomputes them in float64.
CURVATURE_UPPER = {
    "relu": math.inf,
    "abs": math.inf,
    "tanh": 0.76980036,
    "gelu": 0.79788457,
    "gelu_tanh": 0.79788457,
    "silu": 0.5,
}


def _missing(node: Any) -> CertificateError:
    return CertificateError(
        f"{getattr(node, 'name', node)} is {type(node).__name__}: no local rule is proven for it. "
        "certify(model) may still bound the model as a whole."
    )


# move(node, x, movement, local) returns the output at the centre and its movement.
move = Analysis("local movement", _missing)


@move.rule(Linear, Stacked)
def linear_movement(
    node: Linear, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    return node.run(x), movement.linear(node, local)


@move.rule(Scale)
def scale_movement(
    node: Scale, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    return node.run(x), movement.scaled(node.scale)


@move.rule(Chain, AttentionOut, GatedMlp)
def chain_movement(
    node: Chain, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    for part in node.nodes:
        x, movement = move(part, x, movement, local)
    return x, movement


@move.rule(Residual, MlpResidual)
def residual_movement(
    node: Residual, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    y, branch = move(node.branch, x, movement, local)
    both = movement.plus(branch)
    return x + y, both if local.products else both.collapsed(local)


@move.rule(Parallel)
def parallel_movement(
    node: Parallel, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    y, total = x, movement
    for part in node.branches:
        branch, moved = move(part, x, movement, local)
        y, total = y + branch, total.plus(moved)
    return y, total if local.products else total.collapsed(local)


@move.rule(OneToken)
def one_token_movement(
    node: OneToken, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    terms = tuple(Term(t.key, t.matrix, t.size[..., node.where]) for t in movement.terms)
    return node.run(x), Movement(terms)


@move.rule(Softcap)
def softcap_movement(
    node: Softcap, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    y, size, cap = node.run(x), movement.total(local), abs(node.cap)
    width = math.sqrt(x.shape[-1])
    if local.remainders is not None:
        half = 0.5 * CURVATURE_UPPER["tanh"] / cap
        record(
            local,
            y,
            torch.minimum(half * movement.entry(local) * size, 2.0 * size),
            half * size.square(),
        )
    return y, Movement.ball(size.clamp_max(2.0 * cap * width * (1 + 1e-12)))


@move.rule(Activation)
def activation_movement(
    node: Activation, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    y, slope = node.run(x), to_float(node.slope())
    size, entry = movement.total(local), movement.entry(local)
    if local.remainders is not None:
        sums = kinks = None
        if node.kind in _KINKS and node.cap is None:
            two, one, kinks = _kinked(node, x, movement, local)
        else:
            two, one = _curved(node, x, size, entry)
        if node.kind not in _KINKS and node.cap is None:
            # These bound the sums over tokens of entry_t size_t and of size_t^2, the first by
            # Cauchy-Schwarz.
            half = 0.5 * CURVATURE_UPPER[node.kind] * to_float(node.factor)
            joint = movement.joint(local)
            widest = sum_of([t.joint * local.row(t.key, t.matrix) for t in movement.terms])
            sums = half * widest * joint, half * joint.square()
        record(local, y, two, one, sums, kinks)
    return y, Movement.ball(slope * size, slope * movement.joint(local))


def _curved(node: Activation, z: Tensor, size: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    """What a curved activation leaves out of its linearization.

    For norm2(dz) <= size and entries of dz at most `entry`, it bounds f(z + dz) - f(z) - f'(z) dz.

    Returns:
        A bound on its 2-norm, and one on its 1-norm.
    """
    slope, factor = to_float(node.slope()), to_float(node.factor)
    if node.kind in _KINKS:
        # This case is for a relu or abs in a gate, or one with a cap. Every entry may move as far
        # as the largest does.
        beyond = (entry.unsqueeze(-1) - z.detach().abs()).clamp_min(0.0) * (
            _KINKS[node.kind] * factor
        )
        two, one = torch.linalg.vector_norm(beyond, dim=-1), beyond.sum(-1)
    else:
        half = 0.5 * CURVATURE_UPPER[node.kind] * factor
        two, one = half * entry * size, half * size.square()
    capped_two, capped_one = _cap_curved(node.cap, slope * size, slope * entry)
    return torch.minimum(two + capped_two, 2.0 * slope * size), one + capped_one


def _kinked(
    node: Activation, z: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Tensor, Kinks]:
    """What relu or abs leaves out of its linearization, as 2-norm, 1-norm and `Kinks`.

    Only entries that can cross the kink at 0 count. Such an entry is off by the change of slope
    times the way beyond the kink, where it moves at most as far as its own row allows. The sizes
    eps are treated one after the other, because wide hidden layers have many entries.
    """
    factor, z = _KINKS[node.kind] * to_float(node.factor), z.detach().abs()
    two, one = [], []
    for i in range(movement.terms[0].size.shape[0]):
        some = Movement(tuple(Term(t.key, t.matrix, t.size[i]) for t in movement.terms))
        beyond = (some.entries(local) - z).clamp_min_(0.0)
        one.append(beyond.sum(-1) * factor)
        two.append(torch.linalg.vector_norm(beyond, dim=-1) * factor)
    total = movement.total(local)
    most = torch.minimum(torch.stack(two), 2.0 * to_float(node.slope()) * total)
    sizes, norms = zip(
        *((t.size, local.rows(t.key, t.matrix)) for t in movement.terms), strict=True
    )
    return most, torch.stack(one), Kinks(z, sizes, norms, total, factor)


def _cap_curved(cap: float | None, size: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    """What a cap c tanh(z / c) leaves out of its linearization.

    Its second derivative is that of tanh, divided by c.

    Returns:
        A bound on its 2-norm, and one on its 1-norm.
    """
    half = 0.0 if cap is None else 0.5 * CURVATURE_UPPER["tanh"] / cap
    return half * entry * size, half * size.square()


@move.rule(Modulus)
def modulus_movement(
    node: Modulus, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    y = node.run(x)
    if local.remainders is not None:
        two, one, bends = _bent(x, movement, local)
        record(local, y, two, one, None, bends)
    scale = PAIR_SCALE * (1 + 1e-15)
    return y, Movement.ball(scale * movement.total(local), scale * movement.joint(local))


def _bent(x: Tensor, movement: Movement, local: Local) -> tuple[Tensor, Tensor, Bends]:
    """What `pair_abs` leaves out of its linearization, as 2-norm, 1-norm and `Bends`.

    With R = sqrt(g^2 + u^2 + e) at the centre, a pair that moves by d lies above its linearization
    by at most min(d^2 / (2 R), 2 d), times the scale (docs/maths/radius.md). The sizes eps are
    treated one after the other, because wide hidden layers have many entries.
    """
    g, u = x.detach().chunk(2, dim=-1)
    # These factors cover the rounding of a root and of a few products.
    modulus = (g.square() + u.square() + PAIR_EPS).sqrt() * (1 - 1e-12)
    scale = PAIR_SCALE * (1 + 1e-12)
    total, two, one = movement.total(local), [], []
    # A pair moves by no more than the root of the squares of its two rows' norms allows.
    sizes, norms = zip(
        *(
            (t.size, torch.hypot(*local.rows(t.key, t.matrix).chunk(2)) * (1 + 1e-12))
            for t in movement.terms
        ),
        strict=True,
    )
    for i in range(total.shape[0]):
        reach = sum_of([s[i].unsqueeze(-1) * n for s, n in zip(sizes, norms, strict=True)])
        above = torch.minimum(reach.square() / (2.0 * modulus), 2.0 * reach) * scale
        # All pairs together move by `total`. So the sum of d^2 / (2 R) is at most total^2 times
        # the largest 1 / (2 R).
        together = scale * total[i].square() / (2.0 * modulus.amin(-1))
        one.append(torch.minimum(above.sum(-1), together))
        slope = torch.minimum(reach / (2.0 * modulus), torch.full_like(reach, 2.0)).amax(-1)
        apart = torch.linalg.vector_norm(above, dim=-1)
        two.append(torch.minimum(apart, scale * total[i] * slope))
    return torch.stack(two), torch.stack(one), Bends(modulus, sizes, norms, total, scale)


@move.rule(Gate)
def gate_movement(
    node: Gate, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    g, u = node.gate.run(x), within_cap(node.up.run(x), node.cap)
    f = node.act.run(g)
    y, slope = f * u, to_float(node.act.slope())
    moving_g, moving_u = movement.linear(node.gate, local), movement.linear(node.up, local)
    size_g, size_u = moving_g.total(local), moving_u.total(local)
    entry_g, entry_u = moving_g.entry(local), moving_u.entry(local)
    largest_u, largest_f = u.detach().abs().amax(-1), f.detach().abs().amax(-1)
    # f(g')u' - f(g)u = (f(g') - f(g)) u + f(g) (u' - u) + (f(g') - f(g)) (u' - u),
    # and `both` bounds the last term, which is of second order.
    both = slope * torch.minimum(entry_g * size_u, size_g * entry_u)
    size = slope * size_g * largest_u + largest_f * size_u + both
    if local.remainders is not None:
        two, one = _curved(node.act, g, size_g, entry_g)
        up_two, up_one = _cap_curved(node.cap, size_u, entry_u)
        two = largest_u * two + largest_f * up_two + both
        record(local, y, two, largest_u * one + largest_f * up_one + slope * size_g * size_u)
    return y, Movement.ball(size)


@move.rule(Norm)
def norm_movement(
    node: Norm, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    y = node.run(x)
    size, two = norm_rule(node, x, movement.total(local))
    if local.remainders is not None:
        record(local, y, two, two * math.sqrt(x.shape[-1]))
    return y, Movement.ball(size)


def norm_rule(node: Norm, x: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
    """Movement and remainder of a norm at the input x, in 2-norm.

    Let s = sqrt(m + eps), with m the mean square of x in R^d (for a LayerNorm, of x minus its
    mean). On the segment from x to x', the root of m is within size / sqrt(d) of what it is at x,
    which bounds s from both sides. The first derivative is at most 1 / max(s, floor). Where s is
    above the floor, the second derivative is at most (2 / sqrt(3)) / (sqrt(d) s^2). Where s is
    below it, the map is affine. If the segment may meet the kink at the floor, the remainder is at
    most the movement and the derivative's part together.

    Args:
        node: the norm.
        x: the input at the centre, [..., d].
        size: bound on the 2-norm of the input's movement, [eps, ...].

    Returns:
        Bounds on the 2-norm of the output's movement, and on that of its remainder, both
        [eps, ...].
    """
    width = math.sqrt(x.shape[-1])
    x = x.detach()
    centered = x - x.mean(-1, keepdim=True) if node.center else x
    rms = torch.linalg.vector_norm(centered, dim=-1) / width
    # These factors cover the rounding of the root mean square.
    down, up_ = 1 - 1e-12, 1 + 1e-12
    here = (rms.square() + node.eps).sqrt().clamp_min(node.floor) * down
    low = ((rms * down - size / width).clamp_min(0.0).square() + node.eps).sqrt() * down
    high = ((rms * up_ + size / width).square() + node.eps).sqrt() * up_
    least = low.clamp_min(node.floor * down)
    gain = to_float(largest(node.weight)) if node.weight is not None else 1.0
    moved = gain * torch.minimum(size / least, torch.full_like(size, 2.0 * width))
    curved = gain * size.square() / (math.sqrt(3.0) * width * least.square())
    either = moved + gain * size / here
    curved = torch.where(low <= node.floor, either, torch.minimum(curved, either))
    return moved, torch.where(high < node.floor, torch.zeros_like(curved), curved)


def record(
    local: Local,
    y: Tensor,
    two: Tensor,
    one: Tensor,
    sums: tuple[Tensor, Tensor] | None = None,
    kinks: Convex | None = None,
) -> None:
    """Remember the remainder of one node in `local`.

    Args:
        local: where it is remembered.
        y: the node's output at the centre.
        two, one: bounds on its 2-norm and 1-norm. Without an axis of heads they get one.
        sums: bounds on their sums over tokens, where known.
        kinks: what bounds the loss of a margin by a convex function, where it is known.
    """
    assert local.remainders is not None
    if two.dim() == 3:
        two, one = two.unsqueeze(-1), one.unsqueeze(-1)
    local.remainders.append(Remainder(y, two, one, sums, kinks))
