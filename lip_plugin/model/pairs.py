"""The absolute value of a pair, which takes the place of the product in a gated MLP.

The MLP of llama and its relatives computes `act(gate x) * (up x)`. A product of two numbers is as
steep as the numbers are large, so such an MLP has no Lipschitz constant of its own. With
`LipschitzConfig(activation="abs")` it computes the absolute value of the complex number g + i u
instead, scaled to slope 1:

    (sqrt(g^2 + u^2 + e) - sqrt(e)) / sqrt(2)

The library's forward is not rewritten. `PairAbs` stands in the place of the activation. What it
returns is an operand that waits for its other half, and the product in the library's forward then
computes the absolute value of both.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

# The e above. It keeps the slope defined where both halves are 0, and it is far above the smallest
# number of float16.
PAIR_EPS = 1e-6
# Below sqrt(1/2) by one unit, so that the bound 1 on the slope holds for the stored number.
PAIR_SCALE = math.nextafter(math.sqrt(0.5), 0.0)


def pair_abs(first: Tensor, second: Tensor) -> Tensor:
    """(sqrt(g^2 + u^2 + e) - sqrt(e)) / sqrt(2), entry by entry.

    In RMS norm it is 1-Lipschitz as a map of both halves together, and no larger than they are
    (docs/maths/gates.md).
    """
    modulus = torch.sqrt(first * first + second * second + PAIR_EPS)
    return (modulus - math.sqrt(PAIR_EPS)) * PAIR_SCALE


# What a product of two tensors is called by torch: eager calls the second, and compile the last.
_PRODUCTS = (torch.mul, torch.Tensor.mul, torch.Tensor.__mul__, operator.mul)


class Half:
    """The first half of each pair. Multiplied with the second half, it gives `pair_abs` of both.

    It has `__torch_function__`, so that it may stand on either side of the product, in eager code
    and under torch.compile. It takes part in no other operation of torch.
    """

    def __init__(self, first: Tensor) -> None:
        self.first = first

    def __mul__(self, second: Any) -> Tensor:
        return _joined(self.first, second)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if func not in _PRODUCTS or len(args) != 2:
            return NotImplemented
        first, second = args
        if isinstance(first, Half):
            return _joined(first.first, second)
        return _joined(second.first, first)


# `pair_abs` of the two halves, if the second one is what it has to be.
def _joined(first: Tensor, second: Any) -> Tensor:
    if not isinstance(second, Tensor) or second.shape != first.shape:
        raise TypeError(
            "The first half of a gated MLP's pairs was multiplied with something else than the "
            "second half, a tensor of the same shape."
        )
    return pair_abs(first, second)


class PairAbs(nn.Module):
    """Stands in the place of a gated MLP's activation, and makes its product a `pair_abs`.

    A forward that does anything but multiply its output with a tensor of the same shape raises
    TypeError.
    """

    def forward(self, x: Tensor) -> Half:
        return Half(x)

    def extra_repr(self) -> str:
        return f"eps={PAIR_EPS}, scale={PAIR_SCALE:.6g}"
