"""Estimates of the true Lipschitz constant of a small map, against which the attack is judged.

Both functions give lower bounds, and neither is part of a proof. `affine_slope` is exact for an
affine map. `dense_search` tries so many inputs that, in a handful of dimensions, every input of the
ball has a tried one near it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.attack.ascent import Starts, ascend, in_ball, witness_of
from lip_plugin.certificate.attack.starts import jacobian_direction

_BATCH = 2048


def affine_slope(node: Any, d: int) -> float:
    """Largest slope of an affine map of single tokens, from RMS norm to RMS norm.

    It is the quotient of RMS norms along the top singular direction of the map's Jacobian, which
    attains it up to rounding. The direction comes from an SVD up to d = 4096, and from 500 rounds
    of power iteration above. The value is the Lipschitz constant only if the map is affine and
    moves each token on its own. A network whose branches are all zero is such a map.

    Args:
        node: the map.
        d: width of its input.
    """
    zero = torch.zeros(1, d, dtype=torch.float64)
    v = jacobian_direction(node.run, zero, zero + 1.0, rounds=500, exact=4096)
    moved = (node.run(v[None]) - node.run(zero[None])).detach()
    return float(moved.square().mean().sqrt() / v.square().mean().sqrt())


def dense_search(
    node: Any, d: int, radius: float, tokens: int, *, points: int = 4000, seed: int = 0
) -> float:
    """Largest secant slope over many quasi-random inputs of a ball, in token norm.

    Each input is tried with two random directions, which a few steps of power iteration make steep.
    The best 64 pairs are ascended further. For tokens * d up to about 4 and a few thousand points,
    the result is the Lipschitz constant to a fraction of a percent.

    Args:
        node: the map.
        d: width of its input.
        radius: token norm of the ball.
        tokens: length of the sequence.
        points: number of inputs.
        seed: seed of the points and of the directions.
    """
    sobol = torch.quasirandom.SobolEngine(tokens * d, scramble=True, seed=seed)
    cube = 2 * sobol.draw(points, dtype=torch.float64).view(points, tokens, d) - 1
    generator = torch.Generator().manual_seed(seed)
    # Half of the points stay where they were drawn. The others are pushed onto the boundary.
    outside = cube / cube.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
    inputs = in_ball(
        torch.where((torch.arange(points) % 2 == 0)[:, None, None], cube, outside), 1.0
    )
    inputs = inputs.repeat(2, 1, 1)
    best: list[tuple[float, Tensor, Tensor]] = []
    for part in inputs.split(_BATCH):
        directions = torch.randn(part.shape, generator=generator, dtype=torch.float64)
        found = ascend(node.run, _starts(part, directions), radius, 6, 0.0, warm=6, chunk=_BATCH)
        for row in found.best(64):
            slope = float(found.slopes[row])
            best.append((slope, found.starts.inputs[row], found.starts.directions[row]))
    best = sorted(best, key=lambda entry: -entry[0])[:64]
    starts = _starts(torch.stack([b[1] for b in best]), torch.stack([b[2] for b in best]))
    found = ascend(node.run, starts, radius, 200, 0.02)
    return max(witness_of(node, found.starts.take([row]), 0, radius)[0] for row in found.best(2))


# Starts on the whole ball, centered at zero.
def _starts(inputs: Tensor, directions: Tensor) -> Starts:
    scales = torch.ones(len(inputs), dtype=torch.float64)
    return Starts(torch.zeros_like(inputs), inputs, directions, scales, ["dense"] * len(inputs))
