"""What a kink leaves out of the linearization, seen from one gradient: which entries can cross, and at what cost.

relu and abs are convex and linear but for a change of slope at 0: an entry z_i lies above its linearization by at most
factor (abs(d_i) - abs(z_i)), and only beyond its kink. Above, so entries that a margin grows with can only help it,
and the others (g_i < 0) lower it. The movement d of all entries of a token has 2-norm at most S, and each entry
its own bound s_i: an entry is driven across its kink only at the cost of d_i^2 >= z_i^2 of S^2. So what a margin with
gradient g can lose is far below norm2(g) times the largest remainder. For every lambda > 0 it is at most

    lambda S^2 + sum over g_i < 0 of max over 0 <= d <= s_i of (factor abs(g_i) (d - abs(z_i))_+ - lambda d^2),

the Lagrangian of the budget; each maximum is 0 or at d = min(s_i, factor abs(g_i) / (2 lambda)). docs/maths.md, section 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# lambda in units of norm2(factor g) / S. Without kinks to cross 1/2 would be the best; the more there is to cross, the
# smaller. Any value is proven, so a grid loses only tightness.
_PRICES = (0.012, 0.025, 0.05, 0.09, 0.15, 0.25, 0.4)
# float32 sums of a few thousand terms, and what cancels in them: 6 units of c_i d_i each, norm2(d) <= S / (2 price)
_UP, _CANCELLED = 1 + 1e-4, 3e-5


@dataclass(frozen=True)
class Kinks:
    """The entries of one activation's input, and how far they can move.

    Attributes:
        away: abs(z) [batch, tokens, n].
        sizes, norms: entry i moves at most sum_k sizes_k[eps, batch, tokens] norms_k[i].
        total: 2-norm of a token's movement over all entries, [eps, batch, tokens].
        factor: change of slope.
    """

    away: Tensor
    sizes: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    total: Tensor
    factor: float

    def joined(self, others: list[Kinks]) -> Kinks:
        """The same entries for the eps of all of them, one after the other."""
        every = [self, *others]
        sizes = tuple(torch.cat(of) for of in zip(*(k.sizes for k in every), strict=True))
        return Kinks(self.away, sizes, self.norms, torch.cat([k.total for k in every]), self.factor)

    def price(self, gradient: Tensor) -> Tensor:
        """Bound on what a margin with this gradient loses by what is left out, [eps, batch, tokens]."""
        seen = gradient.abs().amax((0, 2)) > 0  # later tokens have no gradient
        last = int(seen.nonzero().amax()) + 1 if bool(seen.any()) else 0
        c = (-gradient[:, :last]).clamp_min(0.0).mul(self.factor * (1 + 1e-6)).float()
        away = (self.away[:, :last] * (1 - 1e-6)).float()
        length = torch.linalg.vector_norm(c.double(), dim=-1)
        found = torch.zeros_like(self.total)
        for i, total in enumerate(self.total[:, :, :last]):
            moves = zip(self.sizes, self.norms, strict=True)
            reach = sum(size[i, :, :last, None] * norm for size, norm in moves)
            assert isinstance(reach, Tensor)
            reach = (reach * (1 + 1e-6)).float()
            best = length * total
            for price in _PRICES:
                rate = (price * length / total.clamp_min(1e-300)).clamp_min(1e-30)
                d = torch.minimum(reach, c / (2.0 * rate.unsqueeze(-1)).float())
                gain = (
                    (c * (d - away))
                    .sub_(d.square().mul_(rate.unsqueeze(-1).float()))
                    .clamp_min_(0.0)
                )
                bound = rate * total.square() + gain.sum(-1).double()
                best = torch.minimum(best, bound * _UP + _CANCELLED * length * total)
            found[i, :, :last] = best
        return found
