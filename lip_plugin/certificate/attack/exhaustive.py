"""What a small map's Lipschitz constant really is, from below: to judge the attack by.

Neither is part of a proof. An affine map is searched exactly; any other by so many inputs that for a
handful of dimensions none is far away.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.attack.ascent import Starts, ascend, in_ball, witness_of
from lip_plugin.certificate.attack.starts import jacobian_direction

_BATCH = 2048


def affine_slope(node: Any, d: int) -> float:
    """Largest slope of an affine map of single tokens, RMS norm to RMS norm: by the SVD of its Jacobian.

    Attained to rounding by the top singular direction. Valid only if the map is affine and moves each
    token on its own (a network whose branches are all zero).
    """
    zero = torch.zeros(1, d, dtype=torch.float64)
    v = jacobian_direction(node.run, zero, zero + 1.0, rounds=500, exact=4096)
    moved = (node.run(v[None]) - node.run(zero[None])).detach()
    return float(moved.square().mean().sqrt() / v.square().mean().sqrt())


def dense_search(
    node: Any, d: int, radius: float, tokens: int, *, points: int = 4000, seed: int = 0
) -> float:
    """Largest secant slope over `points` quasi-random inputs of the ball, each with its steepest direction.

    Directions by power iteration from two corners; the best 64 are ascended further. For tokens * d up
    to about 4 and a few thousand points this is the constant to a fraction of a percent.
    """
    sobol = torch.quasirandom.SobolEngine(tokens * d, scramble=True, seed=seed)
    cube = 2 * sobol.draw(points, dtype=torch.float64).view(points, tokens, d) - 1
    generator = torch.Generator().manual_seed(seed)
    # half of them as drawn (inside), half pushed onto the ball's boundary
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


def _starts(inputs: Tensor, directions: Tensor) -> Starts:
    scales = torch.ones(len(inputs), dtype=torch.float64)
    return Starts(torch.zeros_like(inputs), inputs, directions, scales, ["dense"] * len(inputs))
