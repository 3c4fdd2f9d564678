"""Arithmetic for upper bounds: non-negative decimals, with every operation rounded up.

A bound is made of sums and products of non-negative numbers. So it stays an upper bound if each
operation is rounded up. Decimal does that by a context setting. Its exponents also go beyond 1e308,
which the certificates of unconstrained models exceed. A certificate takes a few thousand
operations, which cost milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import MAX_EMAX, MIN_EMIN, ROUND_CEILING, Context, Decimal

_UP = Context(prec=28, rounding=ROUND_CEILING, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
ZERO, ONE, INF = Decimal(0), Decimal(1), Decimal("Infinity")


def up(value: float | int | Decimal) -> Decimal:
    """The number itself, or the next decimal above it. nan becomes infinity.

    Raises ValueError for a negative number.
    """
    d = _UP.plus(Decimal(value))
    if d.is_nan():
        return INF
    if d < 0:
        raise ValueError(f"an upper bound is never negative, got {value}")
    return d


def add(*terms: Decimal) -> Decimal:
    """Sum, rounded up."""
    total = ZERO
    for t in terms:
        total = _UP.add(total, t)
    return total


def mul(*factors: Decimal) -> Decimal:
    """Product, rounded up. Anything times infinity is infinity.

    That includes 0 times infinity, because no rule relies on a zero that cancels an infinity.
    """
    if any(f.is_infinite() for f in factors):
        return INF
    product = ONE
    for f in factors:
        product = _UP.multiply(product, f)
    return product


def div(a: Decimal, b: Decimal) -> Decimal:
    """a / b, rounded up. The divisor b must be known exactly or from below."""
    return INF if b == 0 or a.is_infinite() else _UP.divide(a, b)


def root(value: Decimal) -> Decimal:
    """Square root, rounded up.

    Decimal's sqrt ignores the rounding mode and is right to half a unit, so one unit is added.
    """
    if value.is_infinite() or value == 0:
        return value
    return _UP.next_plus(_UP.sqrt(value))


def exponential(value: Decimal) -> Decimal:
    """The exponential, rounded up. It is infinity for values beyond 10^6.

    Decimal's exp is right to half a unit, so one unit is added.
    """
    if value > 10**6:
        return INF
    return _UP.next_plus(_UP.exp(value))


def below(value: Decimal) -> Decimal:
    """For a `value` that `root` gave: a number at or below the exact root, to divide by.

    `root` lies at most 1.5 units above the exact root, so two units are taken off.
    """
    return value if value == 0 else _UP.next_minus(_UP.next_minus(value))


def norm2(values: Iterable[Decimal]) -> Decimal:
    """Euclidean norm of a list of upper bounds, rounded up."""
    return root(add(*(mul(v, v) for v in values)))


def to_float(value: Decimal) -> float:
    """The smallest float at or above the value. It is inf beyond 1.8e308."""
    if value.is_infinite():
        return math.inf
    f = float(value)
    return f if Decimal(f) >= value else math.nextafter(f, math.inf)


def log10(value: Decimal) -> float:
    """The base-10 logarithm, rounded up. It is -inf for zero."""
    if value == 0:
        return -math.inf
    if value.is_infinite():
        return math.inf
    digits = value.log10(_UP)
    return to_float_signed(_UP.next_plus(digits))


def to_float_signed(value: Decimal) -> float:
    """A float at or above a decimal of either sign."""
    f = float(value)
    return f if Decimal(f) >= value else math.nextafter(f, math.inf)
