"""Products of matrices whose rounding is bounded: norms of products, not products of norms.

The norm of W_o W_v can be far below the product of their norms. A product computed in float64 is not
the true one, so each `Rounded` carries a bound on how far off it is, and every norm taken of it is
widened by that. Errors are Frobenius norms; gamma_n as in `spectrum`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, Context, Decimal

import torch
from torch import Tensor

from lip_plugin.linalg.norms import sigma_max_upper
from lip_plugin.linalg.spectrum import SLACK, U, gamma, lambda_max_upper

_UNDERFLOW = 1e-290  # entries that fall below the smallest float64, summed up: far less than this
# of our own: the caller's decimal context may have few digits, or small exponents
_DECIMAL = Context(prec=40, rounding=ROUND_CEILING, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])


@dataclass(frozen=True)
class Rounded:
    """The matrix (value + D) * 2^exponent with norm_F(D) <= error; [..., n, m], batches stacked.

    `exponent` keeps entries near 1, so that weights of any size neither over- nor underflow.
    """

    value: Tensor
    error: float = 0.0
    exponent: int = 0

    @classmethod
    def of(cls, weight: Tensor) -> Rounded:
        """A stored weight, exactly."""
        value, exponent = _near_one(weight.detach().double())
        return cls(value, _UNDERFLOW if exponent else 0.0, exponent)

    @property
    def mT(self) -> Rounded:
        return Rounded(self.value.mT, self.error, self.exponent)

    def frobenius_upper(self) -> float:
        """Upper bound of norm_F, over all of a batch, in units of 2^exponent."""
        n = self.value.numel()
        return float(self.value.norm()) * (1.0 + gamma(n + 8)) * SLACK + self.error

    def flat(self) -> Rounded:
        """Blocks [H, k, n] below each other: [H k, n]."""
        return Rounded(self.value.flatten(0, -2), self.error, self.exponent)

    def __matmul__(self, other: Rounded) -> Rounded:
        a, b = self.frobenius_upper(), other.frobenius_upper()
        # |fl(AB) - AB| <= gamma_k |A||B| entrywise; norm_F of |A||B| is at most the product of norm_F
        rounding = gamma(self.value.shape[-1]) * a * b
        error = (a * other.error + self.error * b + rounding) * (1.0 + 16 * U) + _UNDERFLOW
        return Rounded(self.value @ other.value, error, self.exponent + other.exponent)

    def times(self, factors: Tensor) -> Rounded:
        """Block h of [H, ...] times factors[h], floats that count as exact."""
        shape = factors.shape + (1,) * (self.value.dim() - factors.dim())
        # entries stay near 1, or squares of them would underflow in the next Frobenius norm
        factors, exponent = _near_one(factors.to(self.value))
        largest = float(factors.abs().amax())
        error = (self.error * largest + U * self.frobenius_upper() * largest) * (
            1.0 + 16 * U
        ) + _UNDERFLOW
        return Rounded(self.value * factors.reshape(shape), error, self.exponent + exponent)

    def entrywise(self, other: Rounded) -> Rounded:
        """Entrywise product of two Gram matrices: positive semidefinite again (Schur)."""
        a, b = self.value, other.value
        # norm_F of A * D is at most the largest entry of A times norm_F(D)
        top_a, top_b = (float(t.abs().amax()) + e for t, e in ((a, self.error), (b, other.error)))
        product = a * b
        rounding = U * float(product.norm()) * (1.0 + gamma(product.numel() + 8))
        error = (top_a * other.error + self.error * top_b + rounding) * (1.0 + 16 * U) + _UNDERFLOW
        return Rounded(product, error, self.exponent + other.exponent)

    def plus_identity(self, factor: float) -> Rounded:
        """I + factor * this, for a square matrix; factor counts as exact."""
        eye = torch.eye(self.value.shape[-1], dtype=torch.float64, device=self.value.device)
        size = self.frobenius_upper()
        try:
            scale = math.ldexp(factor, self.exponent)  # a power of two: exact, but for an underflow
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
        """For a positive semidefinite matrix P [n, n]: proven upper bound of sqrt(lambda_max(P))."""
        if not math.isfinite(self.error):
            return Decimal("Infinity")
        symmetric = (self.value + self.value.mT) * 0.5  # no farther from the true, symmetric matrix
        n, slack = len(symmetric), self.error * SLACK + U * self.frobenius_upper()
        # a diagonal entry may be below 0, by the slack at most, all of them by sqrt(n) times it: what that
        # adds to the trace in the proof of `proven_lambda_max`, and to the rounding of its diagonal
        slack *= 1.0 + 2.0 * n * gamma(8 * (n + 1)) + 4 * U
        top = float(lambda_max_upper(symmetric[None], symmetric.new_full((1,), slack)))
        if not math.isfinite(top):
            return Decimal("Infinity")
        exponent = self.exponent
        root = math.sqrt(max(0.0, top) * (2.0 if exponent % 2 else 1.0)) * SLACK
        return _scaled(root, (exponent - exponent % 2) // 2)

    def size_upper(self) -> Decimal:
        """Proven upper bound of norm_F, of a vector its 2-norm."""
        return _scaled(self.frobenius_upper() * SLACK, self.exponent)


def _near_one(value: Tensor) -> tuple[Tensor, int]:
    """(value * 2^-e, e), the largest entry in [1/2, 1): exact, but for entries below 2^-1000 of it."""
    largest = float(value.abs().amax()) if value.numel() else 0.0
    exponent = math.frexp(largest)[1] if largest > 0 else 0
    # in two steps, as 2^1074 itself is not a float64
    return value * 2.0 ** -(exponent // 2) * 2.0 ** -(exponent - exponent // 2), exponent


def _scaled(value: float, exponent: int) -> Decimal:
    """value * 2^exponent; exact up to 40 digits, widened by a unit of the 25th; infinite if not a number."""
    if not math.isfinite(value):
        return Decimal("Infinity")
    power = _DECIMAL.power(Decimal(2), Decimal(exponent))
    return _DECIMAL.multiply(
        _DECIMAL.multiply(Decimal(value), power), Decimal("1.0000000000000000000000001")
    )
