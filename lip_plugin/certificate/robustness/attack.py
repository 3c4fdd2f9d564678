"""An attack on predictions around one input: projected gradient descent on embeddings or pixels.

It finds predictions that do change within a ball. Those that it cannot change give an upper bound
of the true robust accuracy (`attacked_accuracy` in accuracy.py).
"""

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
    """Find which predictions a change within the ball can turn away from their label.

    The sum of margins of the predictions that still stand is descended, in float32. One change
    serves all tokens of a sequence at once. So the starts differ in what they aim at. They take
    turns between all standing predictions, those nearest to turning, and a random eighth of them.
    Whatever seems to turn is checked to lie in the ball and is run again in float64.

    Args:
        ball: which changes are allowed, and their norm.
        point: the ball's centre, float64.
        labels: the label of every prediction.
        targets: bool [batch, tokens], the predictions to attack. They are right without any change.
        eps: sizes of the ball, increasing. What turned at one size counts as turned at all larger
            ones, whose balls contain the smaller one.
        restarts: number of starts at each eps.
        steps: steps of each start.
        seed: seed of the random starts.

    Returns:
        Bool [eps, batch, tokens]: the targets that were turned.

    Raises:
        ConfigError: restarts or steps are below 1.
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
    """Descend from one start, and take out of `standing` the predictions that it turned."""
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
    """Weights of the margins in the sum that is descended.

    Starts take turns between equal weights, weights on those nearest to turning, and a random
    eighth.
    """
    if restart % 3 == 1 and bool(standing.any()):
        nearest = margins[standing].min().clamp_min(0.1)
        return standing * torch.exp(-(margins.clamp(0.0, 50.0) / nearest))
    return (standing & eighth if restart % 3 == 2 else standing).float()


# Take out of `standing` those predictions that seem to turn, and do turn in float64 by a change
# within the ball.
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
    """The label's logit minus the largest other logit, [batch, tokens].

    Args:
        logits: [batch, tokens, classes].
        labels: [batch, tokens]. A label below 0 counts as 0.
    """
    at = labels.clamp_min(0).unsqueeze(-1)
    own = logits.gather(-1, at).squeeze(-1)
    return own - logits.scatter(-1, at, float("-inf")).amax(-1)


def into_ball(ball: Ball, change: Tensor, eps: float) -> Tensor:
    """Scale down each part of a change that the ball bounds on its own, to a size of at most eps.

    Such a part is a token or a whole image, and its size is in the ball's norm.
    """
    return change * (eps / ball.size(change).clamp_min(1e-300)).clamp_max(1.0).to(change.dtype)


def _logits(ball: Ball, point: Tensor) -> Tensor:
    return ball.graph.body.run(ball.enter(point))
