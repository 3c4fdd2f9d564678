"""Products that are known to be symmetric, for little more than half the work of a full one."""

from __future__ import annotations

import torch
from torch import Tensor

_FROM = 384  # rows; below, one product of the whole costs no more (measured: benchmarks/muon_step.py)
_ROWS = 192  # rows at a time: about the fewest at which a CPU's matrix products are as fast as whole ones
_PIECES = 8  # at most: 9/16 of the work; more pieces save little and cost launches


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b for [..., n, k] and [..., k, n] whose product is symmetric, in their dtype.

    On a CPU from n = 384 on the rows are computed in pieces, each up to its diagonal block, and the rest is
    their transpose; within a diagonal block the result is as symmetric as rounding leaves it. Elsewhere,
    and for small n, the plain product.
    """
    n = a.shape[-2]
    if a.device.type != "cpu" or n < _FROM:
        return a @ b
    if a.dim() > 2:  # one by one: torch's batched products of large matrices are a third slower than plain ones
        flat = zip(a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:]), strict=True)
        return torch.stack([symmetric_product(p, q) for p, q in flat]).reshape(*a.shape[:-1], n)
    out = a.new_empty(n, n)
    rows = max(_ROWS, -(-n // _PIECES))
    for lo in range(0, n, rows):
        hi = min(n, lo + rows)
        out[lo:hi, :hi] = a[lo:hi] @ b[:, :hi]
        out[:lo, lo:hi] = out[lo:hi, :lo].mT
    return out
