"""Products of large matrices as a CPU does them best, and symmetric ones for little more than half the work."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_FROM = 384  # rows; below, one batched product of the whole costs no more (measured on AVX-512, one thread)
_ROWS = 192  # rows at a time: about the fewest at which a CPU's matrix products are as fast as whole ones
_PIECES = 8  # at most: 9/16 of the work; more pieces save little


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [..., n, m] and [..., m, k] of equal batches, in their dtype.

    On a CPU large matrices are multiplied one by one: torch's batched products of them are up to a third slower.
    """
    if a.dim() == 2 or a.device.type != "cpu" or a.shape[-2] < _FROM:
        return a @ b
    if len(a) == 1 and a.dim() == 3:
        return (a[0] @ b[0])[None]
    return _one_by_one(torch.mm, a, b)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [..., n, k] and [..., k, n] whose product is symmetric, in their dtype.

    On a CPU from n = 384 on the rows are computed in pieces, each up to its diagonal block, and the rest is
    their transpose; within a diagonal block the result is as symmetric as rounding leaves it. Elsewhere,
    and for small n, the plain product.
    """
    n = a.shape[-2]
    if a.device.type != "cpu" or n < _FROM:
        return a @ b
    if a.dim() > 2:
        return _one_by_one(symmetric_product, a, b)
    out = a.new_empty(n, n)
    rows = max(_ROWS, -(-n // _PIECES))
    for lo in range(0, n, rows):
        hi = min(n, lo + rows)
        out[lo:hi, :hi] = a[lo:hi] @ b[:, :hi]
        out[:lo, lo:hi] = out[lo:hi, :lo].mT
    return out


def _one_by_one(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0:
        return a @ b
    pairs = zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)
    return torch.stack([multiply(p, q) for p, q in pairs]).unflatten(0, a.shape[:-2])
