"""Products of large matrices, arranged for speed on a CPU.

`product` is for any matrices. `symmetric_product` is for products that are known to be symmetric,
and does little more than half of the work. Both are plain products on other devices.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Rows from which the ways below are taken. With fewer rows one batched product costs no more
# (measured on AVX-512, one thread).
_FROM = 384
# Rows of a piece: about the fewest at which a CPU multiplies matrices as fast as whole ones.
_ROWS = 192
# The most pieces. Eight do 9/16 of the work, and more would save little.
_PIECES = 8


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in the dtype of a and b.

    On a CPU large matrices are multiplied one by one, because torch's batched products of them are
    up to a third slower.

    Args:
        a: [..., n, m].
        b: [..., m, k], with the same batch dimensions.

    Returns:
        [..., n, k].
    """
    if a.dim() == 2 or a.device.type != "cpu" or a.shape[-2] < _FROM:
        return a @ b
    if len(a) == 1 and a.dim() == 3:
        return (a[0] @ b[0])[None]
    return _one_by_one(torch.mm, a, b)


def symmetric_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, in the dtype of a and b, where the product is known to be symmetric.

    On a CPU, from n = 384 on, the rows are computed in pieces, each up to its diagonal block. The
    rest is their transpose. Within a diagonal block the result is as symmetric as rounding leaves
    it. Elsewhere, and for small n, it is the plain product.

    Args:
        a: [..., n, k].
        b: [..., k, n], with the same batch dimensions.

    Returns:
        [..., n, n].
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


# `multiply` on each pair of matrices of two batches.
def _one_by_one(multiply: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    if a.numel() == 0:
        return a @ b
    pairs = zip(a.flatten(0, -3), b.flatten(0, -3), strict=True)
    return torch.stack([multiply(p, q) for p, q in pairs]).unflatten(0, a.shape[:-2])
