"""Gradient ascent on secant slopes, in float64 and for many starts at once.

Every attack on a certificate uses it. A map `run` takes a tensor [batch, tokens, d]. Its inputs
stay in a ball of the token norm (largest RMS norm of a token). A secant slope at an input e in
direction v, with half distance h, is

    token norm of run(e + h v) - run(e - h v)
    -----------------------------------------
                token norm of 2 h v

Such a quotient is a lower bound of the map's Lipschitz constant on the ball, whatever h is. Open
this file to see how an attack moves its inputs and directions (`ascend`, `grow`), and how it takes
off what rounding may have added to a slope (`secant`).
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
# Half distance of the two ends, as a share of the start's own ball. A smaller one loses digits to
# rounding, a larger one loses slope to curvature.
_STEP = 1e-5
_SLOW = 0.15  # every second start moves at this share of the rate
_INSIDE = 1.0 - 1e-12  # share of the radius that is used, so that rounding keeps an end in the ball
_NOISE = 1e-13  # a float64 forward pass is off by at least this share of its output's size
# Relative standard deviation of the disturbance in `secant`. It is eight float64 roundings of every
# activation.
_DISTURBED = 2.0**-50


@dataclass
class Starts:
    """A batch of n starts: inputs, directions, and the ball on which each start lives.

    A start lives on a small ball of radius r = scale * radius around its center. Its embeddings are
    center + r * in_ball(input, 1), brought back into the ball of `radius`, and the distance of its
    two ends is a share of r. So an attack can also search places as small as the eps of a kept
    norm.

    Attributes:
        centers, inputs, directions: float64 [n, tokens, d].
        scales: [n], each in (0, 1].
        names: the kind of each start, such as "random" (see starts.py).
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
        """Place every start in the ball of `radius`.

        Args:
            radius: bound on the token norm of both ends of a secant.
            inputs: used in place of the starts' own inputs, if given.

        Returns:
            The embeddings [n, tokens, d], and the half distance of the two ends of each start
            [n, 1, 1].
        """
        z = self.inputs if inputs is None else inputs
        own = (self.scales * radius)[:, None, None]
        step = _STEP * own
        room = radius * _INSIDE - step.squeeze(-1)
        return in_ball(self.centers + own * in_ball(z, 1.0), room), step


@dataclass
class Ascended:
    """Starts after an ascent.

    Attributes:
        starts: each start at the steepest point that it met.
        slopes: [n], the secant slope there, less the noise of a float64 forward pass.
    """

    starts: Starts
    slopes: Tensor

    def best(self, count: int) -> list[int]:
        return self.slopes.argsort(descending=True)[:count].tolist()


@dataclass(frozen=True)
class Witness:
    """The pair of inputs embeddings +- step * direction, which attains a lower bound.

    Attributes:
        embeddings, direction: float64 [tokens, d].
        step: half the distance of the two inputs, in units of the direction.
    """

    embeddings: Tensor
    direction: Tensor
    step: float

    def ends(self) -> Tensor:
        e, v, h = self.embeddings, self.direction, self.step
        return torch.stack([e + h * v, e - h * v])


def in_ball(x: Tensor, radius: float | Tensor) -> Tensor:
    """Shorten each token of x [..., d] to an RMS norm of at most `radius`.

    Args:
        radius: one number, or one for each token.
    """
    return x * (radius / rms_norm(x).clamp_min(1e-300)).clamp_max(1.0).unsqueeze(-1)


def steepest(gradient: Tensor) -> Tensor:
    """Scale each token of a gradient [..., d] to RMS norm 1.

    The result maximizes the inner product with the gradient over the unit ball of the token norm.
    In other words, it is the corner of that ball which the gradient points to.
    """
    # divided by the largest entry first, because the square of an entry of 1e-200 would vanish
    largest = gradient.abs().amax(-1, keepdim=True).clamp_min(1e-300)
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
    """Ascend the secant slope of every start, in token norm.

    Adam moves the inputs. Its rate falls from `lr` along a cosine. The direction is replaced in
    every step by the gradient, each token scaled to RMS norm 1. This is a power iteration in the
    token norm, and for a linear map it never descends.

    Args:
        run: the map that is attacked, from [batch, tokens, d] to [batch, tokens, d_out].
        radius: token norm within which both ends of every secant stay.
        steps: number of steps of each start.
        lr: first rate of Adam, in units of the start's ball.
        warm: number of first steps in which only the directions move, and the slope of the last
            token alone is ascended. Under a causal mask the last token sees all others. Inputs are
            held still meanwhile, so that a good input is not left because its direction is still
            bad.
        chunk: number of starts that are run at a time.
        tick: called once for every step of every chunk.

    Returns:
        Every start at its steepest point, in the order given.
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


# The rows 0 to n - 1 in lists of at most `size`.
def _chunks(n: int, size: int) -> Iterator[list[int]]:
    for i in range(0, n, size):
        yield list(range(i, min(n, i + size)))


# One chunk of `ascend`.
def _ascend(
    run: Run,
    starts: Starts,
    radius: float,
    steps: int,
    lr: float,
    warm: int,
    tick: Callable[[], Any],
) -> Ascended:
    # A large rate crosses wide smooth regions, and a small one stays in narrow steep places. Every
    # second start has the small one.
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
        # backward() would add to the model's own gradients, which may be in the middle of a
        # training step.
        gradient, slope = torch.autograd.grad(-goal.clamp_min(1e-300).log().sum(), [scaled, v])
        if i >= warm:
            scaled.grad = gradient.nan_to_num(0.0, 0.0, 0.0)
            optimizer.step()
        # A token that the output cannot see has no gradient. It keeps its direction.
        seen = (slope.abs().amax(-1, keepdim=True) > 0) & slope.isfinite().all(-1, keepdim=True)
        directions = torch.where(seen, -slope, v.detach())
        tick()
    return Ascended(replace(starts, inputs=best_z, directions=best_v), best)


def grow(run: Run, inputs: Tensor, radius: float, steps: int, lr: float) -> tuple[Tensor, Tensor]:
    """Ascend the token norm of the output of `run`.

    Args:
        run: the map that is attacked.
        inputs: starts [n, tokens, d]. Each token is clipped to RMS norm 1 and multiplied by
            `radius`.
        radius: token norm within which the inputs stay.
        steps, lr: steps and first rate of Adam, whose rate falls along a cosine.

    Returns:
        The largest token norm found from each start [n], lowered by a relative 1e-9 for rounding,
        and the inputs [n, tokens, d] that attain it.
    """
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
    """Changes every activation that a graph shows, in place and at random, by a few roundings."""

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
    """Secant slope between the two inputs of a witness, token norm to token norm, less rounding.

    The rounding error of the output's difference is estimated where it arises, because large values
    inside the network may cancel before the output. For this the difference is computed four times
    more, each time with all activations disturbed by a few roundings. Four times the largest change
    of the difference is taken off. This allowance is generous, but it is not proven.

    Args:
        node: the map that is attacked; its `run` accepts a `Watch`.
        witness: the pair of inputs.

    Returns:
        The slope, never below 0. It is 0 where the map gave nan or inf.
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
    """The steepest secant at one ascended start, tried over several distances of its two ends.

    Args:
        row: which of the starts.
        radius: token norm within which both ends stay.

    Returns:
        The slope of `secant`, and the pair of inputs that attains it.
    """
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
