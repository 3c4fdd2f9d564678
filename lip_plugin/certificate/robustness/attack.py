"""Projected gradient descent on embeddings or pixels: which predictions change within a ball around the input."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lip_plugin.certificate.robustness.balls import Ball
from lip_plugin.errors import ConfigError
from lip_plugin.progress import progress


def attack(
    ball: Ball,
    point: Tensor,
    labels: Tensor,
    targets: Tensor,
    eps: Sequence[float],
    restarts: int,
    steps: int,
    seed: int,
) -> Tensor:
    """Which targets a change within the ball turned away from their label.

    Args:
        point: the ball's centre, float64.
        targets: bool [batch, tokens], the tokens of logits to attack (predicted right without any change).
        eps: increasing; what broke at one is broken at all larger ones, whose balls contain it.

    Returns bool [eps, batch, tokens]. Descends the sum of margins of those that still stand, in float32; by
    turns all of them, those nearest to breaking, and random eighths, because one change serves all tokens at
    once. Whatever seems to break is run again in float64, after a check that it lies in the ball.
    """
    if min(restarts, steps) < 1:
        raise ConfigError("attack: restarts and steps must be at least 1.")
    generator = torch.Generator().manual_seed(seed)
    broken = torch.zeros(len(eps), *targets.shape, dtype=torch.bool, device=point.device)
    standing = targets.clone()
    with progress(len(eps) * restarts * steps, "attack") as bar:
        for i, e in enumerate(eps):
            for restart in range(restarts):
                _descend(ball, point, labels, standing, e, restart, steps, generator, bar)
            broken[i] = targets & ~standing
    return broken


def _descend(
    ball: Ball,
    point: Tensor,
    labels: Tensor,
    standing: Tensor,
    eps: float,
    restart: int,
    steps: int,
    generator: torch.Generator,
    bar: object,
) -> None:
    """One start; strikes out of `standing` what it broke."""
    change = torch.randn(point.shape, generator=generator, dtype=torch.float32).to(point.device)
    change = into_ball(ball, change, eps) if restart else change * 0.0
    eighth = torch.rand(standing.shape, generator=generator).to(point.device) < 0.125
    for step in range(steps):
        bar.update(1)  # type: ignore[attr-defined]
        if not bool(standing.any()):
            continue
        change.requires_grad_(True)
        margins = margins_of(_logits(ball, point.float() + change), labels)
        _strike(ball, point, change, labels, standing & (margins <= 0), standing, eps)
        aim = _aim(restart, margins.detach(), standing, eighth)
        (slope,) = torch.autograd.grad((margins * aim).sum(), change)
        rate = 2.0 * eps * (1.0 - step / steps) ** 0.5 / max(1.0, steps / 8)
        size = ball.size(slope).float().clamp_min(1e-30)
        change = into_ball(ball, (change - rate * slope / size).detach(), eps)
    margins = margins_of(_logits(ball, point.float() + change), labels)
    _strike(ball, point, change, labels, standing & (margins <= 0), standing, eps)


def _aim(restart: int, margins: Tensor, standing: Tensor, eighth: Tensor) -> Tensor:
    """Weights of the margins: all alike, or those nearest to breaking, or a random eighth, by turns."""
    if restart % 3 == 1 and bool(standing.any()):
        nearest = margins[standing].min().clamp_min(0.1)
        return standing * torch.exp(-(margins.clamp(0.0, 50.0) / nearest))
    return (standing & eighth if restart % 3 == 2 else standing).float()


@torch.no_grad()
def _strike(
    ball: Ball,
    point: Tensor,
    change: Tensor,
    labels: Tensor,
    seems: Tensor,
    standing: Tensor,
    eps: float,
) -> None:
    if not bool(seems.any()):
        return
    moved = into_ball(ball, change.detach().double(), eps * (1 - 1e-12))
    assert float(ball.size(moved).amax()) <= eps
    turned = margins_of(_logits(ball, point + moved), labels) < 0
    standing &= ~(seems & turned)


def margins_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Label's logit less the largest other one, [batch, tokens]; labels below 0 count as 0."""
    at = labels.clamp_min(0).unsqueeze(-1)
    own = logits.gather(-1, at).squeeze(-1)
    return own - logits.scatter(-1, at, float("-inf")).amax(-1)


def into_ball(ball: Ball, change: Tensor, eps: float) -> Tensor:
    """Each part that the ball bounds on its own, scaled down to size at most eps."""
    return change * (eps / ball.size(change).clamp_min(1e-300)).clamp_max(1.0).to(change.dtype)


def _logits(ball: Ball, point: Tensor) -> Tensor:
    return ball.graph.body.run(ball.enter(point))
