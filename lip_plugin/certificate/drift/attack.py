"""An attack on a drift: a search for inputs on which two models differ much in one logit.

What it attains is a lower bound of the largest possible drift of a logit.
`lip_plugin.certificate.drift.drift` proves the upper bound.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.attack.ascent import in_ball, steepest
from lip_plugin.certificate.attack.starts import d_in_of, structured

_LENGTHS = (9, 1, 3)  # lengths of the sequence that are tried; the first gets all restarts
_INSIDE = 1.0 - 1e-12  # share of the radius that is used, so that rounding stays in the ball
_NOISE = 1e-13  # a float64 forward pass is off by at least this share of its logits' size
_LR, _CORNERS = 0.3, 12  # Adam's first rate, and the number of steps to corners
Found = tuple[float, tuple[Tensor, Tensor]]


def largest_difference(
    pair: Any, radius: float, apart: float, restarts: int, steps: int, seed: int
) -> tuple[float, tuple[Tensor, Tensor] | None]:
    """Search for the largest absolute difference of one logit between two models, in float64.

    X goes into the base and Y into the tuned model. Both have token norm at most `radius`, and
    X - Y has token norm at most `apart`. The starts are embeddings of real inputs, and the
    structured and random ones of `lip_plugin.certificate.attack.starts`. They are ascended by Adam,
    and then by steps to the corner of the ball that the gradient points to. What rounding may have
    added is taken off.

    Args:
        pair: both graphs (`_Pair` of drift.py).
        radius: bound on the token norm of X and of Y.
        apart: bound on the token norm of X - Y.
        restarts: number of starts that are followed to the end.
        steps: Adam's steps of each.
        seed: seed of the random starts.

    Returns:
        The difference, and the inputs X, Y [tokens, d] that attain it.
    """
    limits = [
        getattr(pair.base.root.config, k, None) for k in ("max_position_embeddings", "block_size")
    ]
    longest = min((int(n) for n in (*limits, pair.base.entry.longest) if n), default=1 << 30)
    best: Found | None = None
    for i, tokens in enumerate(dict.fromkeys(min(n, longest) for n in _LENGTHS)):
        count = restarts if i == 0 else max(1, restarts // 4)
        search = _Search(pair, radius, apart, seed + 1000 * i)
        for found in (
            search.real(tokens),
            search.ascended(tokens, count, steps if i == 0 else max(1, steps // 2)),
        ):
            best = found if best is None or found[0] > best[0] else best
    assert best is not None
    return best


class _Search:
    """The search at one length of the sequence.

    It moves free variables z and w [n, tokens, d]. The inputs are X = radius * in_ball(z) and
    Y = X + apart * in_ball(w), with Y brought back into the ball of `radius`.
    """

    def __init__(self, pair: Any, radius: float, apart: float, seed: int) -> None:
        self.pair, self.radius, self.apart, self.seed = pair, radius, apart, seed
        self.generator = torch.Generator().manual_seed(seed)
        self.device = next(pair.base.root.parameters()).device

    def difference(self, x: Tensor, y: Tensor) -> Tensor:
        return self.pair.difference(x, y)

    def inputs(self, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        x = in_ball(z, 1.0) * (self.radius * _INSIDE)
        if self.apart == 0:
            return x, x
        # Y is brought back into the ball by a projection onto a convex set. That set holds X, so Y
        # comes no farther from X.
        return x, in_ball(x + in_ball(w, 1.0) * (self.apart * _INSIDE), self.radius * _INSIDE)

    def real(self, tokens: int) -> Found:
        """Differences on random inputs, as both models embed them."""
        ids = self.pair.base.entry.sample(tokens, self.generator, self.device)
        with torch.no_grad():
            x, y = (g.embed(ids, torch.float64) for g in (self.pair.base, self.pair.tuned))
            return self._attained(x, y)

    def starts(self, tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """First values of z and w [n, tokens, d]: embedded inputs, then structured ones."""
        d = d_in_of(self.pair.tuned.body)
        found = structured(
            lambda x: self.difference(x, x),
            self.pair.tuned.body,
            4 * count + 4,
            tokens,
            d,
            self.radius,
            seed=self.seed,
            device=self.device,
        )
        z = found.embeddings(self.radius)[0] / self.radius
        ids = self.pair.base.entry.sample(tokens, self.generator, self.device)
        with torch.no_grad():
            real, other = (g.embed(ids, torch.float64) for g in (self.pair.base, self.pair.tuned))
        w = torch.randn(z.shape, generator=self.generator, dtype=torch.float64).to(self.device)
        if real.shape[1:] == z.shape[1:]:
            z = torch.cat([real / self.radius, z])
            w = torch.cat([(other - real) / max(self.apart, 1e-300), w])
        return z.detach(), w

    def ascended(self, tokens: int, count: int, steps: int) -> Found:
        """Ascend all starts for a few steps and the best of them for `steps` steps.

        Steps to corners follow.
        """
        if self.radius == 0:
            x = torch.zeros(
                1, tokens, d_in_of(self.pair.tuned.body), dtype=torch.float64, device=self.device
            )
            return self._attained(x, x)
        z, w = self.starts(tokens, count)
        sizes, z, w = self._climb(z, w, max(2, steps // 8))
        rows = sizes.argsort(descending=True)[:count]
        _, z, w = self._climb(z[rows], w[rows], steps)
        z, w = self._corners(z, w)
        with torch.no_grad():
            return self._attained(*self.inputs(z, w))

    def _climb(self, z: Tensor, w: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
        """Ascend the largest logit difference by Adam, whose rate falls along a cosine.

        Returns:
            The largest difference of each start [n], and the z and w where it was met.
        """
        leaves = [t.clone().requires_grad_(True) for t in (z, w)]
        optimizer = torch.optim.Adam(leaves, lr=_LR)
        best = torch.full((len(z),), -1.0, dtype=torch.float64, device=z.device)
        kept = [t.detach().clone() for t in leaves]
        for i in range(steps + 1):
            optimizer.param_groups[0]["lr"] = _LR * (
                0.02 + 0.49 * (1 + math.cos(math.pi * i / steps))
            )
            sizes = self.difference(*self.inputs(*leaves)).abs().amax((-2, -1))
            found = sizes.detach().nan_to_num(-1.0, -1.0, -1.0)
            better = found > best
            best = torch.where(better, found, best)
            for keep, leaf in zip(kept, leaves, strict=True):
                keep[better] = leaf.detach()[better]
            self._gradients(sizes, leaves)
            optimizer.step()
        return best, kept[0], kept[1]

    def _corners(self, z: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        """Step to the corner of the ball that the gradient points to.

        The corner is kept where it is better. For a linear map the first such step reaches the best
        input.
        """
        best = torch.full((len(z),), -1.0, dtype=torch.float64, device=z.device)
        kept, now = [z, w], [z, w]
        for _ in range(_CORNERS):
            leaves = [t.clone().requires_grad_(True) for t in now]
            sizes = self.difference(*self.inputs(*leaves)).abs().amax((-2, -1))
            better = sizes.detach().nan_to_num(-1.0, -1.0, -1.0) > best
            best = torch.where(better, sizes.detach(), best)
            kept = [
                torch.where(better[:, None, None], leaf.detach(), k)
                for leaf, k in zip(leaves, kept, strict=True)
            ]
            self._gradients(sizes, leaves)
            now = []
            for leaf in leaves:
                g = leaf.grad if leaf.grad is not None else torch.zeros_like(leaf)
                seen = g.abs().amax(-1, keepdim=True) > 0
                now.append(torch.where(seen, -steepest(g), leaf.detach()))
        return kept[0], kept[1]

    def _gradients(self, sizes: Tensor, leaves: list[Tensor]) -> None:
        """Set the gradient of minus the logarithm of each size.

        The logarithm makes small differences move as fast as large ones.
        """
        # backward() would add to the model's own gradients, which may be in the middle of a
        # training step.
        goal = -sizes.clamp_min(1e-300).log().sum()
        found = torch.autograd.grad(goal, leaves, allow_unused=True)
        for leaf, g in zip(leaves, found, strict=True):
            leaf.grad = None if g is None else g.nan_to_num(0.0, 0.0, 0.0)

    def _attained(self, x: Tensor, y: Tensor) -> Found:
        """The largest difference of a batch, less what rounding may have added, and its inputs."""
        with torch.no_grad():
            found, size = self.difference(x, y), self.pair.tuned.body.run(y).abs().amax((-2, -1))
        largest = found.abs().amax((-2, -1))
        noise = torch.where(largest > 0, _NOISE * (size + largest), 0.0)
        sizes = ((largest - noise) * (1 - 1e-9)).nan_to_num(0.0, 0.0, 0.0)
        row = int(sizes.argmax())
        return max(0.0, float(sizes[row])), (x[row].detach().clone(), y[row].detach().clone())
