"""Gradient ascent of secant slopes, in float64, many starts side by side: the engine of every attack.

For a map `run` on [batch, tokens, d] and a ball in token norm (largest RMS norm of a token).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.graph.base import Watch
from lip_plugin.linalg.norms import rms_norm

Run = Callable[[Tensor], Tensor]
_STEP = 1e-5  # half distance of the two ends, over the ball: a compromise of rounding and curvature
_SLOW = 0.15  # of the rate, for every second start
_INSIDE = 1.0 - 1e-12  # of the radius: rounding of an end must not leave the ball
_NOISE = 1e-13  # of the output's size: what a float64 forward is off by at least
_DISTURBED = 2.0**-50  # relative, standard deviation: eight roundings of every activation


@dataclass
class Starts:
    """A batch of starts: inputs in_ball(center + scale radius in_ball(inputs, 1)), and directions.

    centers, inputs, directions [n, tokens, d]; scales [n] in (0, 1]: a start lives, and its step is
    measured, on a ball of its own, so that places as small as a kept norm's eps are searched as well.
    """

    centers: Tensor
    inputs: Tensor
    directions: Tensor
    scales: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: list[int]) -> Starts:
        parts = (self.centers[rows], self.inputs[rows], self.directions[rows], self.scales[rows])
        return Starts(*parts, [self.names[i] for i in rows])

    def embeddings(self, radius: float, inputs: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(inputs [n, tokens, d], half distances of the ends [n, 1, 1]) on the ball of `radius`."""
        z = self.inputs if inputs is None else inputs
        own = (self.scales * radius)[:, None, None]
        step = _STEP * own
        room = radius * _INSIDE - step.squeeze(-1)
        return in_ball(self.centers + own * in_ball(z, 1.0), room), step


@dataclass
class Ascended:
    """Starts after an ascent, each at its steepest point, and the slopes [n] there (noise taken off)."""

    starts: Starts
    slopes: Tensor

    def best(self, count: int) -> list[int]:
        return self.slopes.argsort(descending=True)[:count].tolist()


@dataclass(frozen=True)
class Witness:
    """The pair of inputs embeddings +- step * direction that attains a lower bound; [tokens, d], float64."""

    embeddings: Tensor
    direction: Tensor
    step: float

    def ends(self) -> Tensor:
        e, v, h = self.embeddings, self.direction, self.step
        return torch.stack([e + h * v, e - h * v])


def in_ball(x: Tensor, radius: float | Tensor) -> Tensor:
    """Each token scaled down to RMS norm at most `radius` (a number, or one for each token)."""
    return x * (radius / rms_norm(x).clamp_min(1e-300)).clamp_max(1.0).unsqueeze(-1)


def steepest(gradient: Tensor) -> Tensor:
    """Each token scaled to RMS norm 1: the corner of the token norm's ball that a gradient points to."""
    largest = (
        gradient.abs().amax(-1, keepdim=True).clamp_min(1e-300)
    )  # squares of 1e-200 would vanish
    gradient = gradient / largest
    return (gradient / rms_norm(gradient).clamp_min(1e-300).unsqueeze(-1)).detach()


def ascend(
    run: Run,
    starts: Starts,
    radius: float,
    steps: int,
    lr: float,
    *,
    warm: int = 0,
    chunk: int = 64,
    tick: Callable[[], Any] = lambda: None,
) -> Ascended:
    """Ascend the secant slope of every start for `steps` steps, `chunk` starts at a time.

    Adam, with a rate falling from `lr` along a cosine, moves the inputs; the direction goes to the
    gradient's corner in every token: a power iteration in the token norm, which never descends for a
    linear map. The first `warm` steps move directions alone, for the last token's slope: it sees all
    others, and a good input is not left for a bad direction. `tick` is called once a step and chunk.
    """
    parts = [
        _ascend(run, starts.take(rows), radius, steps, lr, warm, tick)
        for rows in _chunks(len(starts), chunk)
    ]
    joined = Starts(
        torch.cat([p.starts.centers for p in parts]),
        torch.cat([p.starts.inputs for p in parts]),
        torch.cat([p.starts.directions for p in parts]),
        torch.cat([p.starts.scales for p in parts]),
        [name for p in parts for name in p.starts.names],
    )
    return Ascended(joined, torch.cat([p.slopes for p in parts]))


def _chunks(n: int, size: int) -> Iterator[list[int]]:
    for i in range(0, n, size):
        yield list(range(i, min(n, i + size)))


def _ascend(
    run: Run,
    starts: Starts,
    radius: float,
    steps: int,
    lr: float,
    warm: int,
    tick: Callable[[], Any],
) -> Ascended:
    # a large rate crosses smooth maps, a small one stays in narrow steep places: starts take turns
    rate = torch.tensor([1.0, _SLOW], dtype=torch.float64).repeat(len(starts))[: len(starts)]
    rate = rate.to(starts.inputs.device)[:, None, None]
    scaled = (starts.inputs / rate).requires_grad_(True)
    directions, optimizer = starts.directions, torch.optim.Adam([scaled], lr=lr)
    z = starts.inputs
    best = torch.full((len(starts),), -1.0, dtype=torch.float64, device=z.device)
    best_z, best_v = z.detach().clone(), steepest(directions)
    for i in range(steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (
            0.02 + 0.49 * (1 + math.cos(math.pi * i / max(1, steps)))
        )
        z = scaled * rate
        e, h = starts.embeddings(radius, z)
        v = steepest(directions).requires_grad_(True)
        plus, minus = run(torch.cat([e + h * v, e - h * v])).chunk(2)
        by_token = rms_norm(plus - minus) / (2 * h.squeeze(-1))
        noise = _NOISE * rms_norm(plus.detach()).amax(-1) / (2 * h[:, 0, 0])
        slopes = by_token.amax(-1)
        found = (slopes.detach() - noise).nan_to_num(-1.0, -1.0, -1.0)
        better = found > best
        best = torch.where(better, found, best)
        best_z[better], best_v[better] = z.detach()[better], v.detach()[better]
        goal = by_token[:, -1] if i < warm else slopes
        # not backward(): the model's own gradients may be in the middle of a training step
        gradient, slope = torch.autograd.grad(-goal.clamp_min(1e-300).log().sum(), [scaled, v])
        if i >= warm:
            scaled.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
        # tokens that the output cannot see have no gradient and keep their direction
        seen = (slope.abs().amax(-1, keepdim=True) > 0) & slope.isfinite().all(-1, keepdim=True)
        directions = torch.where(seen, -slope, v.detach())
        tick()
    return Ascended(replace(starts, inputs=best_z, directions=best_v), best)


def grow(run: Run, inputs: Tensor, radius: float, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Ascend the token norm of the output: (largest found [n], inputs that attain it [n, tokens, d])."""
    z = inputs.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=lr)
    best = torch.full((len(z),), -1.0, dtype=torch.float64, device=z.device)
    best_e = z.detach().clone()
    for i in range(steps + 1):
        optimizer.param_groups[0]["lr"] = lr * (
            0.02 + 0.49 * (1 + math.cos(math.pi * i / max(1, steps)))
        )
        e = in_ball(z, 1.0) * (radius * _INSIDE)
        sizes = rms_norm(run(e)).amax(-1)
        found = sizes.detach().nan_to_num(-1.0, -1.0, -1.0)
        better = found > best
        best = torch.where(better, found, best)
        best_e[better] = e.detach()[better]
        (gradient,) = torch.autograd.grad(-sizes.clamp_min(1e-300).log().sum(), [z])
        z.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
        optimizer.step()
    return best * (1 - 1e-9), best_e


class _Disturb(Watch):
    """Disturbs every activation that a graph shows, in place, by a few roundings."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def activation(self, x: Tensor) -> None:
        noise = torch.randn(x.shape, generator=self.generator, dtype=torch.float64)
        x.mul_(1.0 + _DISTURBED * noise.to(x.device))

    def attention(self, weights: Tensor) -> None:
        pass


@torch.no_grad()
def secant(node: Any, witness: Witness) -> float:
    """Slope between a witness's ends, token norm to token norm, less what rounding may have added.

    Rounding is measured where it matters, not at the output alone (large values may cancel before
    it): the difference of the outputs is taken again with every activation disturbed by a few
    roundings, and four times the largest change is taken off. Generous, not proven.
    """
    ends = witness.ends()
    gap = rms_norm(ends[0] - ends[1]).amax()
    out = node.run(ends)
    noise = _NOISE * rms_norm(out).amax()
    for seed in range(4):
        again = node.run(ends, _Disturb(seed))
        noise = torch.maximum(noise, 4 * rms_norm((again[0] - again[1]) - (out[0] - out[1])).amax())
    slope = float((rms_norm(out[0] - out[1]).amax() - noise) / gap)
    return max(0.0, slope * (1 - 1e-9)) if math.isfinite(slope) else 0.0


def witness_of(node: Any, starts: Starts, row: int, radius: float) -> tuple[float, Witness]:
    """The steepest secant at one ascended start, over several distances of its ends."""
    e, step = starts.embeddings(radius)
    best: tuple[float, Witness] | None = None
    for factor in (1.0, 1e3, 1e2, 10.0, 0.1, 1e-2):
        h = float(step[row]) * factor
        inside = in_ball(e[row], radius * _INSIDE - h).detach().clone()
        witness = Witness(inside, starts.directions[row].clone(), h)
        found = secant(node, witness)
        if best is None or found > best[0]:
            best = (found, witness)
    assert best is not None
    return best
