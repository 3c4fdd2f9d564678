"""Low-rank changes of a fixed block that keep it within a cap: tests and projections from k x k matrices.

For M = W_perp + Z Q^T with Q orthonormal (k columns), W_perp Q = 0, Z = Y + E, Y = W0 Q:

    M M^T = W_perp W_perp^T + Z Z^T <= c^2   iff   Z Z^T <= S = C + Y Y^T,  C = c^2 - W0 W0^T
    T(0) = Z^T S^-1 Z <= 1                   the exact test
    Z(l) = S (S + l)^-1 Z                    nearest in the sense of Lagrange, one multiplier l for all
    T(l) = Z(l)^T S^-1 Z(l)                  columns; falls to 0: the least feasible l is searched

The eigenvectors of W0 W0^T (or of W0^T W0, the smaller) are found once; the rest is n x k and k x k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NEAR = 0.005
_FALSI, _EVALUATIONS = 10, 22  # regula falsi, then bisection


@dataclass(frozen=True)
class Spectrum:
    """Of the blocks of one segment of W0: what is found once while the weights are frozen."""

    basis: Tensor  # [count, n, n] eigenvectors of W0 W0^T, or of W0^T W0 for tall blocks
    energy: Tensor  # [count, n] their eigenvalues, float64
    ceiling: (
        Tensor  # [count] c^2, in the l2 norm; the block's own norm where that is above by rounding
    )


@dataclass
class LowRankProblem:
    """T and Z(l) of a batch of blocks; everything that is long was multiplied away already."""

    hat: Tensor  # [b, n, 2k] basis^T [Y, Z], or basis^T W0^T [Y, Z] for tall blocks
    gram: Tensor  # [b, 2k, 2k] [Y, Z]^T [Y, Z]
    energy: Tensor
    ceiling: Tensor
    tall: bool

    def __getitem__(self, at: Tensor) -> LowRankProblem:
        return LowRankProblem(
            self.hat[at], self.gram[at], self.energy[at], self.ceiling[at], self.tall
        )

    @classmethod
    def stack(cls, problems: list[LowRankProblem]) -> LowRankProblem:
        """One batch of all their blocks."""
        keys = ("hat", "gram", "energy", "ceiling")
        return cls(
            **{key: torch.cat([getattr(p, key) for p in problems]) for key in keys},
            tall=problems[0].tall,
        )

    def form(self, shift: Tensor | None = None) -> Tensor:
        """X^T (C + l)^-1 X for X = [Y, Z], float64 [b, 2k, 2k]; l = 0 for None."""
        mu = self._mu(shift)
        gap = mu - self.energy
        if not self.tall:
            return self._weighted(1.0 / gap)
        return self.gram / mu[:, :, None] + self._weighted(1.0 / (mu * gap))

    def form_squared(self, shift: Tensor) -> Tensor:
        """X^T (C + l)^-2 X."""
        mu = self._mu(shift)
        gap = mu - self.energy
        if not self.tall:
            return self._weighted(gap**-2)
        return self.gram / mu[:, :, None] ** 2 + self._weighted(
            (2.0 * mu - self.energy) / (mu * gap) ** 2
        )

    def _mu(self, shift: Tensor | None) -> Tensor:
        return (self.ceiling if shift is None else self.ceiling + shift)[:, None]

    def _weighted(self, f: Tensor) -> Tensor:
        return self.hat.mT @ (f[:, :, None] * self.hat)

    def solve(self, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(largest eigenvalue of T(l), G) where (S + l)^-1 Z = (C + l)^-1 [Y, Z] G; l = 0, the exact test, for None."""
        first = self.form(shift)
        k = first.shape[-1] // 2
        eye = torch.eye(k, dtype=first.dtype, device=first.device)
        inner = torch.linalg.solve(eye + first[:, :k, :k], first[:, :k, k:])  # Woodbury
        g = torch.cat([-inner, eye.expand_as(inner)], dim=1)
        t = first[:, k:, k:] - first[:, k:, :k] @ inner
        if shift is not None:
            t = t - shift[:, None, None] * (g.mT @ self.form_squared(shift) @ g)
        return torch.linalg.eigvalsh(0.5 * (t + t.mT))[:, -1], g

    def least_shift(self, top: Tensor) -> tuple[Tensor, Tensor]:
        """([b] a feasible multiplier near the least, G at it), for blocks whose T(0) has the largest eigenvalue `top` > 1.

        Near: T there is at least 1 - 0.5 %, or the multiplier within 0.5 % of an infeasible one. In one dimension T(l) is
        z^2 s / (s + l)^2, so T^-1/2 is what is linear in l, and what regula falsi (Illinois) is put to, as trust-region
        methods do (More and Sorensen, SIAM J. Sci. Stat. Comput. 4(3), 1983): 3 to 8 evaluations of T where bisection took 12.
        """
        k = self.gram.shape[-1] // 2
        size = self.gram.diagonal(dim1=-2, dim2=-1)[:, k:].sum(-1)
        # T(l) <= Z^T S Z / l^2 <= c^2 norm_F(Z)^2 / l^2
        high = (self.ceiling * size).sqrt()
        low = torch.minimum(high, 1e-9 * self.ceiling)
        inside_top, g = self.solve(high)
        below, above = (
            (top.rsqrt() - 1.0).clamp_max(-1e-9),
            inside_top.clamp_min(1e-200).rsqrt() - 1.0,
        )
        side = torch.zeros_like(high)
        for step in range(_EVALUATIONS):
            done = (inside_top >= 1.0 - _NEAR) | (high <= low * (1.0 + _NEAR))
            if bool(done.all()):
                break
            middle = (low * above - high * below) / (above - below)
            gap = (high / low).log()
            if step >= _FALSI:  # whatever the function does, this ends
                middle = (low * high).sqrt()
            middle = middle.clamp(low * (0.02 * gap).exp(), high * (-0.02 * gap).exp())
            middle = torch.where(
                done, high, middle
            )  # it waits: at T = 1 to the last bit the formula above is 0 / 0
            now, g_now = self.solve(middle)
            value, inside = now.clamp_min(1e-200).rsqrt() - 1.0, now <= 1.0
            below = torch.where(inside, torch.where(side > 0, 0.5 * below, below), value)
            above = torch.where(inside, value, torch.where(side < 0, 0.5 * above, above))
            side = torch.where(inside, 1.0, -1.0).to(side.dtype)
            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
            inside_top = torch.where(inside, now, inside_top)
            g = torch.where(inside[:, None, None], g_now, g)
        return high, g
