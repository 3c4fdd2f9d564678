"""What convex functions take from one margin, beyond their linearization at a centre.

Two kinds are here: the kinks of relu and abs (`Kinks`), and the absolute value of pairs (`Bends`).
Both lie above their linearization, so they can lower a margin only where it falls with them.

relu and abs are linear but for a change of slope at 0, their kink. They are convex, so an entry
lies above its linearization, and it does so only beyond its kink. With z_i the entry at the centre,
d_i its movement and `factor` the change of slope, it lies above by at most factor
(abs(d_i) - abs(z_i)).

Let g be the gradient of a margin with respect to the outputs. Where g_i >= 0, an entry that lies
above can only help the margin. So only entries with g_i < 0 lower it. Their movements are bounded
twice. All entries of a token together move by at most S in 2-norm, and entry i moves by at most
s_i. Driving entry i across its kink therefore costs at least z_i^2 of the budget S^2. This makes
the loss far smaller than norm2(g) times the largest remainder. By the Lagrangian of the budget the
loss is, for every lambda > 0, at most

    lambda S^2 + sum over g_i < 0 of
        max over 0 <= d <= s_i of (factor abs(g_i) (d - abs(z_i))_+ - lambda d^2)

where (x)_+ is max(x, 0). Each inner maximum is 0, or it is attained at d = min(s_i, factor
abs(g_i) / (2 lambda)). For a pair the same holds with min(d^2 / (2 R), 2 d) in the place of
(d - abs(z_i))_+. Proofs are in docs/maths/radius.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

# The values of lambda that are tried, in units of norm2(factor g) / S. If all z_i were 0, then 1/2
# would be the best. The farther the kinks are away, the smaller the best lambda is. Every lambda
# gives a true bound, so a coarse grid loses only tightness.
_PRICES = (0.012, 0.025, 0.05, 0.09, 0.15, 0.25, 0.4)
# What float32 may have cost in `price`. `_UP` covers sums of a few thousand terms. `_CANCELLED`
# covers what cancels inside a term: 6 units of c_i d_i each, where norm2(d) <= S / (2 price). With
# a slope of 2 both the terms and the d are twice as large.
_UP, _CANCELLED = 1 + 1e-4, 3e-5


@dataclass(frozen=True)
class Convex:
    """The entries of one convex function, and how far their inputs can move.

    Attributes:
        at: what is known of each entry's input at the centre, [batch, tokens, n].
        sizes, norms: the input of entry i moves by at most the sum over k of
            sizes_k[eps, batch, tokens] * norms_k[i].
        total: bound on the 2-norm of a token's movement over all inputs, [eps, batch, tokens].
        factor: a factor on the function.
    """

    at: Tensor
    sizes: tuple[Tensor, ...]
    norms: tuple[Tensor, ...]
    total: Tensor
    factor: float

    def _gain(self, c: Tensor, reach: Tensor, at: Tensor, rate: Tensor) -> Tensor:
        """Bound on max over 0 <= d <= reach of c above(d) - rate d^2, float32 [batch, tokens, n].

        `above(d)` bounds how far an entry lies above its linearization if its input moves by d.
        """
        raise NotImplementedError

    def joined(self, others: list[Any]) -> Any:
        """The same entries for the eps values of all given objects, one after the other."""
        every = [self, *others]
        sizes = tuple(torch.cat(of) for of in zip(*(k.sizes for k in every), strict=True))
        return replace(self, sizes=sizes, total=torch.cat([k.total for k in every]))

    def price(self, gradient: Tensor) -> Tensor:
        """Bound on what a margin loses by the remainders of all entries, [eps, batch, tokens].

        Args:
            gradient: of the margin with respect to the function's outputs, [batch, tokens, n].
        """
        # Tokens behind the one that predicts have no gradient, so they are left out.
        seen = gradient.abs().amax((0, 2)) > 0
        last = int(seen.nonzero().amax()) + 1 if bool(seen.any()) else 0
        c = (-gradient[:, :last]).clamp_min(0.0).mul(self.factor * (1 + 1e-6)).float()
        at = (self.at[:, :last] * (1 - 1e-6)).float()
        length = torch.linalg.vector_norm(c.double(), dim=-1)
        found = torch.zeros_like(self.total)
        for i, total in enumerate(self.total[:, :, :last]):
            moves = zip(self.sizes, self.norms, strict=True)
            reach = sum(size[i, :, :last, None] * norm for size, norm in moves)
            assert isinstance(reach, Tensor)
            reach = (reach * (1 + 1e-6)).float()
            best = self.steepest * length * total
            for price in _PRICES:
                rate = (price * length / total.clamp_min(1e-300)).clamp_min(1e-30)
                gain = self._gain(c, reach, at, rate.unsqueeze(-1).float())
                bound = rate * total.square() + gain.sum(-1).double()
                slack = _CANCELLED * self.steepest**2 * length * total
                best = torch.minimum(best, bound * _UP + slack)
            found[i, :, :last] = best
        return found

    @property
    def steepest(self) -> float:
        """The largest slope of `above`."""
        return 1.0


@dataclass(frozen=True)
class Kinks(Convex):
    """relu and abs. `at` is abs(z) at the centre, `factor` the change of slope at the kink."""

    def _gain(self, c: Tensor, reach: Tensor, at: Tensor, rate: Tensor) -> Tensor:
        d = torch.minimum(reach, c / (2.0 * rate))
        return (c * (d - at)).sub_(d.square().mul_(rate)).clamp_min_(0.0)


@dataclass(frozen=True)
class Bends(Convex):
    """The absolute value of pairs. `at` is R = sqrt(g^2 + u^2 + e) at the centre.

    An entry lies above its linearization by at most factor * min(d^2 / (2 R), 2 d). The maximum of
    the smaller one is at most the smaller one of both maxima.
    """

    @property
    def steepest(self) -> float:
        return 2.0

    def _gain(self, c: Tensor, reach: Tensor, at: Tensor, rate: Tensor) -> Tensor:
        # The factor covers the rounding of the quotient and of the rate. Without it a difference of
        # two nearly equal numbers could be too small.
        near = (c / (2.0 * at)).mul_(1 + 1e-6).sub_(rate).clamp_min_(0.0).mul_(reach.square())
        d = torch.minimum(reach, c / rate)
        far = (2.0 * c * d).sub_(d.square().mul_(rate)).clamp_min_(0.0)
        return torch.minimum(near, far)
