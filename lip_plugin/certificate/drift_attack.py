"""The largest difference of a logit that gradient ascent finds between two models: a lower bound of their drift."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.ascent import in_ball
from lip_plugin.certificate.starts import d_in_of

_TOKENS = (1, 2, 7, 16)


def largest_difference(
    pair: Any, radius: float, own_tables: bool, restarts: int, steps: int, seed: int
) -> float:
    """Largest absolute difference of a logit, float64, less what rounding may have added.

    With equal tables over embeddings in the ball of `radius`, by ascent; where the tables differ over token ids or pixels.
    """
    from lip_plugin.certificate.drift import logits_of

    device = next(pair.base.root.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    best = 0.0
    for batch in _ids(pair, restarts, generator, device):
        best = max(best, float(_difference_of_inputs(pair, batch).abs().amax()))
    if own_tables:
        return best * (1 - 1e-9)
    longest = pair.base.entry.longest or 1 << 30
    images = pair.base.patches is not None
    for tokens in (_TOKENS[-1],) if images else _TOKENS:
        tokens = min(tokens, longest)
        x = torch.randn(
            restarts, tokens, d_in_of(pair.base.body), generator=generator, dtype=torch.float64
        ).to(device)
        real = _real(pair, restarts, tokens, generator, device)
        x = (
            in_ball(x * 10.0, radius)
            if real is None
            else torch.cat([in_ball(x * 10.0, radius), in_ball(real, radius)])
        )
        best = max(best, _ascend(lambda e: logits_of(pair, e), x, radius, steps))
    return best * (1 - 1e-9)  # float64 over a forward pass, relative to its size, is far below


def _ids(pair: Any, count: int, generator: torch.Generator, device: Any) -> list[Tensor]:
    length = min(_TOKENS[-1], pair.base.entry.longest or _TOKENS[-1])
    return [pair.base.entry.sample(length, generator, device) for _ in range(count)]


def _difference_of_inputs(pair: Any, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        with pair.in_base():
            base = pair.base.body.run(pair.base.entry.run(inputs, torch.float64))
        return pair.tuned.body.run(pair.tuned.entry.run(inputs, torch.float64)) - base


def _real(pair: Any, count: int, tokens: int, generator: torch.Generator, device: Any) -> Tensor | None:
    """Embeddings of random token ids."""
    if pair.base.patches is not None:
        return None
    ids = torch.cat([pair.base.entry.sample(tokens, generator, device) for _ in range((count + 1) // 2)])
    with torch.no_grad():
        return pair.tuned.entry.run(ids, torch.float64)[:count]


def _ascend(difference: Any, x: Tensor, radius: float, steps: int) -> float:
    """Signless ascent of the largest entry, each start its own, every token within the ball."""
    best = 0.0
    for i in range(steps + 1):
        x = x.detach().requires_grad_()
        sizes = difference(x).abs().flatten(1).amax(1)
        best = max(best, float(sizes.detach().amax()))
        if i == steps:
            break
        (gradient,) = torch.autograd.grad(sizes.sum(), x)
        length = gradient.square().mean(-1, keepdim=True).sqrt()
        direction = torch.where(length > 0, gradient / length.clamp_min(1e-300), 0.0)
        rate = radius * (0.5 if i < steps // 2 else 0.1)
        x = in_ball(x.detach() + rate * direction, radius)
    return best
