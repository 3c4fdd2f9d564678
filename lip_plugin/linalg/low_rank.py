"""Low-rank changes of a fixed block that keep it within a cap: tests and projections from k x k matrices.

For M = W_perp + Z Q^T with Q orthonormal (k columns), W_perp Q = 0, Z = Y + E, Y = W0 Q:

    M M^T = W_perp W_perp^T + Z Z^T <= c^2   iff   Z Z^T <= S = C + Y Y^T,  C = c^2 - W0 W0^T
    T(0) = Z^T S^-1 Z <= 1                   the exact test
    Z(l) = S (S + l)^-1 Z                    nearest in the sense of Lagrange, one multiplier l for all
    T(l) = Z(l)^T S^-1 Z(l)                  columns; falls to 0, so the least feasible l is bisected

The eigenvectors of W0 W0^T (or of W0^T W0, the smaller) are found once; the rest is n x k and k x k.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Spectrum:
    """Of the blocks of one segment of W0: what is found once while the weights are frozen."""

    basis: Tensor  # [count, n, n] eigenvectors of W0 W0^T, or of W0^T W0 for tall blocks
    energy: Tensor  # [count, n] their eigenvalues, float64
    ceiling: Tensor  # [count] c^2, in the l2 norm; the block's own norm where that is above by rounding


@dataclass
class LowRankProblem:
    """T and Z(l) of a batch of blocks; everything that is long was multiplied away already."""

    hat: Tensor  # [b, n, 2k] basis^T [Y, Z], or basis^T W0^T [Y, Z] for tall blocks
    gram: Tensor  # [b, 2k, 2k] [Y, Z]^T [Y, Z]
    energy: Tensor
    ceiling: Tensor
    tall: bool

    def __getitem__(self, at: Tensor) -> LowRankProblem:
        return LowRankProblem(self.hat[at], self.gram[at], self.energy[at], self.ceiling[at], self.tall)

    @classmethod
    def stack(cls, problems: list[LowRankProblem]) -> LowRankProblem:
        """One batch of all their blocks."""
        keys = ("hat", "gram", "energy", "ceiling")
        return cls(
            **{key: torch.cat([getattr(p, key) for p in problems]) for key in keys}, tall=problems[0].tall
        )

    def forms(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """X^T (C + l)^-1 X and X^T (C + l)^-2 X for X = [Y, Z], float64 [b, 2k, 2k]."""
        mu = (self.ceiling + shift)[:, None]
        gap = mu - self.energy
        if not self.tall:
            return self._weighted(1.0 / gap), self._weighted(gap**-2)
        mu3 = mu[:, :, None]
        first = self.gram / mu3 + self._weighted(1.0 / (mu * gap))
        return first, self.gram / mu3**2 + self._weighted((2.0 * mu - self.energy) / (mu * gap) ** 2)

    def _weighted(self, f: Tensor) -> Tensor:
        return self.hat.mT @ (f[:, :, None] * self.hat)

    def solve(self, shift: Tensor) -> tuple[Tensor, Tensor]:
        """(largest eigenvalue of T(l), G) where (S + l)^-1 Z = (C + l)^-1 [Y, Z] G."""
        first, second = self.forms(shift)
        k = first.shape[-1] // 2
        eye = torch.eye(k, dtype=first.dtype, device=first.device)
        inner = torch.linalg.solve(eye + first[:, :k, :k], first[:, :k, k:])  # Woodbury
        g = torch.cat([-inner, eye.expand_as(inner)], dim=1)
        t = first[:, k:, k:] - first[:, k:, :k] @ inner - shift[:, None, None] * (g.mT @ second @ g)
        return torch.linalg.eigvalsh(0.5 * (t + t.mT))[:, -1], g

    def least_shift(self) -> Tensor:
        """[b] a feasible multiplier within about 1 % of the least, for blocks that are infeasible at 0."""
        k = self.gram.shape[-1] // 2
        size = self.gram.diagonal(dim1=-2, dim2=-1)[:, k:].sum(-1)
        # T(l) <= Z^T S Z / l^2 <= c^2 norm_F(Z)^2 / l^2
        high = (self.ceiling * size).sqrt().log()
        low = torch.minimum(high, (1e-9 * self.ceiling).log())
        for _ in range(11):
            middle = 0.5 * (low + high)
            inside = self.solve(middle.exp())[0] <= 1.0
            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
        return high.exp()
