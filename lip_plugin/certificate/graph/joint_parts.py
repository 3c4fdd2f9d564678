"""What the joint rules share: the maps of a node, products of maps, small constants."""

from __future__ import annotations

from decimal import Decimal

import torch
from torch import Tensor

from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.containers import Chain, Residual, walk
from lip_plugin.certificate.graph.nodes import Linear

HALF = Decimal("0.5")


SLIP = 1 + Decimal("1e-15")  # covers the rounding of products and quotients of a few floats


ALIKE = 1.05  # if the weights of all heads are within this factor, they are not worth measuring


def linear_names(node: Chain | Residual) -> list[str]:
    """Names of all linear maps inside a node, those of an attention included."""
    names = []
    for inner in walk([node]):
        found = (inner.q, inner.k, inner.v) if isinstance(inner, Attention) else ()
        names += [p.linear.name for p in found] + (
            [inner.name] if isinstance(inner, Linear) else []
        )
    return names


def product_norms(a: Tensor, b: Tensor) -> Tensor:
    """About sigma_max(a_h^T b_h) of each head: [H, k, n], [H, k, m] -> [H].

    This is the result of twelve steps of a power iteration. It is not proven, so it only serves to
    choose weights.
    """
    left, right = a @ a.mT, b @ b.mT
    x = torch.ones(*left.shape[:-1], 1, dtype=left.dtype, device=left.device)
    size = torch.ones(len(left), 1, 1, dtype=left.dtype, device=left.device)
    for _ in range(12):
        x = left @ (right @ x)
        size = x.norm(dim=(-2, -1), keepdim=True)
        x = x / size.clamp_min(1e-300)
    return size[:, 0, 0].sqrt()


# Sizes that are not far below the largest one, so that they can be divided by.
def floored(sizes: Tensor) -> Tensor:
    return sizes.clamp_min(1e-3 * float(sizes.amax()))
