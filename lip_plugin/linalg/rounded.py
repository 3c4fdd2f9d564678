"""Products of matrices with a bound on their rounding.

The norm of W_o W_v can be far below the product of the two norms, so the certificate takes norms of
products. A product computed in float64 is not the true one. So each `Rounded` carries a bound on
how far off it is, and every norm of it is widened by that bound. Errors are bounds in the Frobenius
norm. gamma_n is that of `spectrum`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, Context, Decimal

import torch
from torch import Tensor

from lip_plugin.linalg.norms import sigma_max_upper
from lip_plugin.linalg.spectrum import SLACK, U, gamma, lambda_max_upper

# Entries that fall below the smallest float64 are lost. All of them together are far below this.
_UNDERFLOW = 1e-290
# A decimal context of our own, because the caller's may have few digits or small exponents.
_DECIMAL = Context(prec=40, rounding=ROUND_CEILING, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


@dataclass(frozen=True)
class Rounded:
    """A matrix that is known up to an error, or a batch [..., n, m] of such matrices.

    It stands for (value + D) * 2^exponent, where D is unknown and norm_F(D) <= error. The exponent
    keeps the entries of `value` near 1, so that weights of any size neither over- nor underflow.
    """

    value: Tensor
    error: float = 0.0
    exponent: int = 0

    @classmethod
    def of(cls, weight: Tensor) -> Rounded:
        """A stored weight, which is known exactly."""
        value, exponent = _near_one(weight.detach().double())
        return cls(value, _UNDERFLOW if exponent else 0.0, exponent)

    # The transpose of each matrix.
    @property
    def mT(self) -> Rounded:
        return Rounded(self.value.mT, self.error, self.exponent)

    def frobenius_upper(self) -> float:
        """Upper bound of norm_F over a whole batch, in units of 2^exponent."""
        n = self.value.numel()
        return float(self.value.norm()) * (1.0 + gamma(n + 8)) * SLACK + self.error

    def flat(self) -> Rounded:
        """Blocks [H, k, n] put below each other: [H k, n]."""
        return Rounded(self.value.flatten(0, -2), self.error, self.exponent)

    def __matmul__(self, other: Rounded) -> Rounded:
        a, b = self.frobenius_upper(), other.frobenius_upper()
        # |fl(AB) - AB| <= gamma_k |A||B| entry by entry, and norm_F of |A||B| is at most the
        # product of the two norm_F.
        rounding = gamma(self.value.shape[-1]) * a * b
        error = (a * other.error + self.error * b + rounding) * (1.0 + 16 * U) + _UNDERFLOW
        return Rounded(self.value @ other.value, error, self.exponent + other.exponent)

    def times(self, factors: Tensor) -> Rounded:
        """Block h of [H, ...] times factors[h]. The factors are floats that count as exact."""
        shape = factors.shape + (1,) * (self.value.dim() - factors.dim())
        # Entries must stay near 1, or their squares would underflow in the next Frobenius norm.
        factors, exponent = _near_one(factors.to(self.value))
        largest = float(factors.abs().amax())
        error = (self.error * largest + U * self.frobenius_upper() * largest) * (
            1.0 + 16 * U
        ) + _UNDERFLOW
        return Rounded(self.value * factors.reshape(shape), error, self.exponent + exponent)

    def entrywise(self, other: Rounded) -> Rounded:
        """Entrywise product of two Gram matrices. It is positive semidefinite again (Schur)."""
        a, b = self.value, other.value
        # norm_F of the entrywise A * D is at most the largest entry of A times norm_F(D).
        top_a, top_b = (float(t.abs().amax()) + e for t, e in ((a, self.error), (b, other.error)))
        product = a * b
        rounding = U * float(product.norm()) * (1.0 + gamma(product.numel() + 8))
        error = (top_a * other.error + self.error * top_b + rounding) * (1.0 + 16 * U) + _UNDERFLOW
        return Rounded(product, error, self.exponent + other.exponent)

    def plus_identity(self, factor: float) -> Rounded:
        """I + factor * this matrix, which is square. The factor counts as exact."""
        eye = torch.eye(self.value.shape[-1], dtype=torch.float64, device=self.value.device)
        size = self.frobenius_upper()
        try:
            scale = math.ldexp(factor, self.exponent)  # exact, but for an underflow
        except OverflowError:
            scale = math.inf
        if not math.isfinite(scale * size):
            return Rounded(eye * math.inf, math.inf)
        error = self.error * abs(scale) + 4 * U * (abs(scale) * size + math.sqrt(len(eye)))
        return Rounded(eye + scale * self.value, error * (1.0 + 16 * U) + _UNDERFLOW)

    def norm_upper(self) -> Decimal:
        """Proven upper bound of sigma_max of a single matrix [n, m]."""
        if not math.isfinite(self.error):
            return Decimal("Infinity")
        return _scaled((float(sigma_max_upper(self.value)) + self.error) * SLACK, self.exponent)

    def gram_norm_upper(self) -> Decimal:
        """Proven upper bound of sqrt(lambda_max(P)) for a positive semidefinite matrix P [n, n]."""
        if not math.isfinite(self.error):
            return Decimal("Infinity")
        # The true matrix is symmetric, so this one is no farther from it than `value` is.
        symmetric = (self.value + self.value.mT) * 0.5
        n, slack = len(symmetric), self.error * SLACK + U * self.frobenius_upper()
        # The proof of `proven_lambda_max` takes the diagonal to be at least 0. Here a diagonal
        # entry may be below 0 by the slack, and all of them together by sqrt(n) times the slack.
        # This factor covers what that adds to the trace in the proof, and to the rounding of the
        # diagonal.
        slack *= 1.0 + 2.0 * n * gamma(8 * (n + 1)) + 4 * U
        top = float(lambda_max_upper(symmetric[None], symmetric.new_full((1,), slack)))
        if not math.isfinite(top):
            return Decimal("Infinity")
        exponent = self.exponent
        root = math.sqrt(max(0.0, top) * (2.0 if exponent % 2 else 1.0)) * SLACK
        return _scaled(root, (exponent - exponent % 2) // 2)

    def size_upper(self) -> Decimal:
        """Proven upper bound of norm_F, which is the 2-norm for a vector."""
        return _scaled(self.frobenius_upper() * SLACK, self.exponent)


def _near_one(value: Tensor) -> tuple[Tensor, int]:
    """(value * 2^-e, e) such that the largest entry is in [1/2, 1).

    It is exact, but for entries below 2^-1000 of the largest.
    """
    largest = float(value.abs().amax()) if value.numel() else 0.0
    exponent = math.frexp(largest)[1] if largest > 0 else 0
    # The factor is applied in two steps, because 2^1074 itself is no float64.
    return value * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2), exponent


def _scaled(value: float, exponent: int) -> Decimal:
    """value * 2^exponent, rounded up.

    It is computed to 40 digits and then widened by a unit of the 25th. It is infinite if `value` is
    no finite number.
    """
    if not math.isfinite(value):
        return Decimal("Infinity")
    power = _DECIMAL.power(Decimal(2), Decimal(exponent))
    return _DECIMAL.multiply(
        _DECIMAL.multiply(Decimal(value), power), Decimal("1.0000000000000000000000001")
    )
