"""Local movement: how far each token's hidden state can move around a given input.

`move(node, x, movement, local)` runs a node at the centre x [batch, tokens, d] (float64) and bounds, per token,
how far its output moves when its input moves within `movement`, in 2-norms. Unlike a node's global constant it
sees the values at the centre: denominators of kept norms, entries that a gate multiplies with, attention weights.
It also records, for each node that is not linear, a bound on what its linearization at the centre leaves out
(`Remainder`). Proofs: docs/maths.md, section 11. A node without a rule raises CertificateError.
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
from lip_plugin.certificate.graph.joint_bounds import AttentionOut, GatedMlp, MlpResidual
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
from lip_plugin.certificate.robustness.kinks import Kinks
from lip_plugin.certificate.robustness.movement import Local, Movement, Remainder, Term, sum_of
from lip_plugin.errors import CertificateError

# Change of slope at 0, of functions that are linear elsewhere.
_KINKS = {"relu": 1.0, "abs": 2.0}
# Largest second derivatives, rounded up; tests/certificate/test_robustness_rules.py recomputes them in float64. gelu (both
# forms) and silu at 0 (2 phi(0), sqrt(2/pi), 1/2), tanh at atanh(1/sqrt(3)) (4 / (3 sqrt(3))).
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


# move(node, x, movement, local) -> (output at the centre, its movement)
move = Analysis("local movement", _missing)


@move.rule(Linear)
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
            # sum over tokens of size_t^2 and of entry_t size_t, by Cauchy-Schwarz
            half = 0.5 * CURVATURE_UPPER[node.kind] * to_float(node.factor)
            joint = movement.joint(local)
            widest = sum_of([t.joint * local.row(t.key, t.matrix) for t in movement.terms])
            sums = half * widest * joint, half * joint.square()
        record(local, y, two, one, sums, kinks)
    return y, Movement.ball(slope * size, slope * movement.joint(local))


def _curved(node: Activation, z: Tensor, size: Tensor, entry: Tensor) -> tuple[Tensor, Tensor]:
    """(2-norm, 1-norm) of f(z + dz) - f(z) - f'(z) dz, for norm2(dz) <= size, entries at most `entry`."""
    slope, factor = to_float(node.slope()), to_float(node.factor)
    if node.kind in _KINKS:  # in a gate: every entry may move as far as the largest does
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
    """The same where f is linear but for a kink at 0: only entries that can cross it count.

    Behind it they are off by the change of slope times the way beyond, where an entry moves as far as its own row
    lets it. One eps after the other: hidden widths make the entries many.
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
    """(2-norm, 1-norm) of what c tanh(z / c) leaves out of its linearization: its second derivative is tanh's over c."""
    half = 0.0 if cap is None else 0.5 * CURVATURE_UPPER["tanh"] / cap
    return half * entry * size, half * size.square()


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
    # f(g')u' - f(g)u = (f(g') - f(g)) u + f(g) (u' - u) + (f(g') - f(g)) (u' - u)
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
    """(movement, remainder) in 2-norm of a norm at x [..., d], for a movement `size` [eps, ...].

    On the segment to x' the root s = sqrt(m + eps) of the mean square m is within size / sqrt(d) of what it is at x;
    the first derivative is at most 1 / max(s, floor). Above the floor the second is at most (2 / sqrt(3)) / (sqrt(d) s^2),
    below it the map is affine. Where the segment may meet the kink at the floor, the remainder is at most movement and
    derivative together.
    """
    width = math.sqrt(x.shape[-1])
    x = x.detach()
    centered = x - x.mean(-1, keepdim=True) if node.center else x
    rms = torch.linalg.vector_norm(centered, dim=-1) / width
    down, up_ = (
        1 - 1e-12,
        1 + 1e-12,
    )  # what rounding of the root mean square may have added or taken
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
    kinks: Kinks | None = None,
) -> None:
    """Remember a remainder; sizes without a head axis get one."""
    assert local.remainders is not None
    if two.dim() == 3:
        two, one = two.unsqueeze(-1), one.unsqueeze(-1)
    local.remainders.append(Remainder(y, two, one, sums, kinks))
