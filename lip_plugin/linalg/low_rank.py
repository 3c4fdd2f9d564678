"""Low-rank changes of a fixed block W0 that keep it within a cap: a test and a projection.

Adapters (LoRA, DoRA) that are near their caps need this after every step. Both questions are
answered by matrices with few columns: what is n x n is found once from W0, and each step works on
n x k and k x k matrices.

The changed block is M = W_perp + Z Q^T. Here Q has k orthonormal columns, W_perp Q = 0, and
Z = Y + E, where Y = W0 Q is what W0 does on Q and E is the change. Let c be the largest sigma_max
that the cap allows, and C = c^2 I - W0 W0^T.

    M M^T = W_perp W_perp^T + Z Z^T <= c^2 I   iff   Z Z^T <= S = C + Y Y^T

    test         M is within the cap iff all eigenvalues of T(0) = Z^T S^-1 Z are at most 1
    projection   Z(l) = S (S + l I)^-1 Z, for a multiplier l >= 0
    test of it   T(l) = Z(l)^T S^-1 Z(l), which falls to 0 as l grows

Z(l) is the nearest feasible point in the sense of Lagrange, with one multiplier l for all columns.
The least l for which Z(l) is feasible is searched for. The eigenvectors of W0 W0^T, or of W0^T W0
if that is smaller, are found once. The caller is integrations/peft/nearest.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_NEAR = 0.005  # how near to the least multiplier is near enough; see `least_shift`
# After 10 steps of regula falsi the search bisects. After 22 evaluations it ends.
_FALSI, _EVALUATIONS = 10, 22


@dataclass(frozen=True)
class Spectrum:
    """What is found once for the blocks of one segment of W0, while the weights are frozen."""

    basis: Tensor  # [count, n, n] eigenvectors of W0 W0^T, or of W0^T W0 for tall blocks
    energy: Tensor  # [count, n] their eigenvalues, float64
    # [count] c^2 for the l2 norm. Where rounding left a block above its cap, it is the square of
    # the block's own norm.
    ceiling: Tensor


@dataclass
class LowRankProblem:
    """T(l) and Z(l) for a batch of b blocks of one shape.

    Whatever is long has been multiplied away by the caller. C, Y, Z, T and l are those of the head
    of this file. A block is tall if it has more rows than columns.
    """

    hat: Tensor  # [b, n, 2k] basis^T [Y, Z], or basis^T W0^T [Y, Z] for tall blocks
    gram: Tensor  # [b, 2k, 2k] [Y, Z]^T [Y, Z]
    energy: Tensor  # [b, n] as in Spectrum
    ceiling: Tensor  # [b] as in Spectrum
    tall: bool

    def __getitem__(self, at: Tensor) -> LowRankProblem:
        return LowRankProblem(
            self.hat[at], self.gram[at], self.energy[at], self.ceiling[at], self.tall
        )

    @classmethod
    def stack(cls, problems: list[LowRankProblem]) -> LowRankProblem:
        """One batch out of the blocks of several problems of the same shape."""
        keys = ("hat", "gram", "energy", "ceiling")
        return cls(
            **{key: torch.cat([getattr(p, key) for p in problems]) for key in keys},
            tall=problems[0].tall,
        )

    def form(self, shift: Tensor | None = None) -> Tensor:
        """X^T (C + l I)^-1 X for X = [Y, Z].

        Args:
            shift: The multiplier l of each block, [b]. None is l = 0.

        Returns:
            float64 [b, 2k, 2k].
        """
        mu = self._mu(shift)
        gap = mu - self.energy
        if not self.tall:
            return self._weighted(1.0 / gap)
        return self.gram / mu[:, :, None] + self._weighted(1.0 / (mu * gap))

    def form_squared(self, shift: Tensor) -> Tensor:
        """X^T (C + l I)^-2 X for X = [Y, Z], with l = `shift` [b]. float64 [b, 2k, 2k]."""
        mu = self._mu(shift)
        gap = mu - self.energy
        if not self.tall:
            return self._weighted(gap**-2)
        return self.gram / mu[:, :, None] ** 2 + self._weighted(
            (2.0 * mu - self.energy) / (mu * gap) ** 2
        )

    # c^2 + l as [b, 1]. The eigenvalues of C + l I are this minus those of W0 W0^T.
    def _mu(self, shift: Tensor | None) -> Tensor:
        return (self.ceiling if shift is None else self.ceiling + shift)[:, None]

    # The sum over eigenvectors i of f_i times the outer product of row i of `hat`.
    def _weighted(self, f: Tensor) -> Tensor:
        return self.hat.mT @ (f[:, :, None] * self.hat)

    def solve(self, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Test Z(l), and give what is needed to compute it.

        Woodbury's formula turns S + l I = C + l I + Y Y^T into a k x k system. T(l) then follows
        from S = (S + l I) - l I.

        Args:
            shift: The multiplier l of each block, [b]. None is l = 0, the exact test of Z itself.

        Returns:
            (top, G): top [b] is the largest eigenvalue of T(l), and G [b, 2k, k] satisfies
            (S + l I)^-1 Z = (C + l I)^-1 [Y, Z] G.
        """
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
        """A feasible multiplier near the least one, for blocks that are not feasible as they are.

        Near means that the largest eigenvalue of T is at least 1 - 0.5 %, or that a multiplier
        within 0.5 % below is infeasible. In one dimension T(l) = z^2 s / (s + l)^2, so T^-1/2 is
        linear in l. Regula falsi (in the Illinois variant) is applied to that, as trust-region
        methods do. It takes 3 to 8 evaluations of T, where bisection took 12.

        Args:
            top: The largest eigenvalue of T(0) of each block, [b], above 1.

        Returns:
            (l, G): the multipliers [b], and G of `solve` there.

        Source: More and Sorensen, SIAM J. Sci. Stat. Comput. 4(3), 1983.
        """
        k = self.gram.shape[-1] // 2
        size = self.gram.diagonal(dim1=-2, dim2=-1)[:, k:].sum(-1)
        # This start is feasible, because T(l) <= Z^T S Z / l^2 <= c^2 norm_F(Z)^2 / l^2.
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
            if step >= _FALSI:  # bisection ends whatever the function does
                middle = (low * high).sqrt()
            middle = middle.clamp(low * (0.02 * gap).exp(), high * (-0.02 * gap).exp())
            # Blocks that are done wait where they are. If T = 1 to the last bit, the formula above
            # is 0 / 0 for them.
            middle = torch.where(done, high, middle)
            now, g_now = self.solve(middle)
            value, inside = now.clamp_min(1e-200).rsqrt() - 1.0, now <= 1.0
            below = torch.where(inside, torch.where(side > 0, 0.5 * below, below), value)
            above = torch.where(inside, value, torch.where(side < 0, 0.5 * above, above))
            side = torch.where(inside, 1.0, -1.0).to(side.dtype)
            low, high = torch.where(inside, low, middle), torch.where(inside, middle, high)
            inside_top = torch.where(inside, now, inside_top)
            g = torch.where(inside[:, None, None], g_now, g)
        return high, g
