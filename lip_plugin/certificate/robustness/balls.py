"""What may be changed, and by how much: balls around an input, in which radii are proven and attacks move.

`TokenBall`: every token of what enters the first block by RMS norm at most eps, all at once. `PixelBall`: the
image by 2-norm at most eps over all its pixels, which may leave their range. Proofs: docs/maths.md, section 11.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.decimals import below, div, mul, root, to_float, up
from lip_plugin.certificate.robustness.movement import Local, Matrix, Movement, Term
from lip_plugin.errors import ConfigError
from lip_plugin.linalg.norms import rms_norm

# 1 + 1e-12: a few roundings of float64 in a size
_UP = 1 + 1e-12


class TokenBall:
    """Changes of what enters the first block [batch, tokens, d], of token norm at most eps."""

    name = "token"

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def point(self, inputs: Tensor) -> Tensor:
        """The centre: what a change is added to, float64."""
        return self.graph.embed(inputs, torch.float64).detach()

    def enter(self, point: Tensor) -> Tensor:
        """What enters the first block at a point of the ball, in the point's dtype."""
        return point

    def movement(self, point: Tensor, x: Tensor, eps: Tensor, local: Local) -> Movement:
        """How far the tokens of x = enter(point) can move, for each eps [eps]."""
        size = eps.to(x.device)[:, None, None] * x.shape[-1] ** 0.5 * _UP
        return Movement.ball(size.expand(-1, *x.shape[:2]))

    def token_norm(self, eps: float, norms: ProvenNorms) -> float:
        """Bound on the token norm of the change of what enters the first block."""
        return eps

    def dual(self, gradient: Tensor) -> Tensor:
        """Largest inner product of a gradient at the point with a change of size 1, [batch]."""
        return torch.linalg.vector_norm(gradient, dim=-1).sum(-1) * gradient.shape[-1] ** 0.5

    def size(self, change: Tensor) -> Tensor:
        """The norm that eps bounds, of each part that it bounds on its own; shaped to divide the change."""
        return rms_norm(change).unsqueeze(-1)


class PixelBall:
    """Changes of an image [batch, channels, height, width] of 2-norm at most eps."""

    name = "pixel_l2"

    def __init__(self, graph: Graph) -> None:
        if graph.patches is None:
            raise ConfigError(
                "norm='pixel_l2' is for image models; this one reads tokens: norm='token'."
            )
        if graph.entry.norm is not None:
            raise ConfigError(
                "norm='pixel_l2' needs patches that enter the first block without a norm."
            )
        self.graph, self.patches = graph, graph.patches

    def point(self, inputs: Tensor) -> Tensor:
        return inputs.detach().double()

    def enter(self, point: Tensor) -> Tensor:
        return self.graph.embed(point, point.dtype)

    def movement(self, point: Tensor, x: Tensor, eps: Tensor, local: Local) -> Movement:
        """Each patch through the matrix; the first row stays; all patches together move by eps in 2-norm."""
        size = (eps.to(x.device)[:, None, None] * _UP).expand(-1, *x.shape[:2]).clone()
        size[..., 0] = 0.0
        matrix = Matrix(self.patches.weight().detach().double())
        return Movement((Term((id(self.patches),), matrix, size, size.amax(-1)),))

    def token_norm(self, eps: float, norms: ProvenNorms) -> float:
        moved = mul(norms[self.patches.name].sigma, up(eps))
        return to_float(div(moved, below(root(up(self.patches.d_out)))))

    def dual(self, gradient: Tensor) -> Tensor:
        return torch.linalg.vector_norm(gradient.flatten(1), dim=-1)

    def size(self, change: Tensor) -> Tensor:
        norm: Any = torch.linalg.vector_norm
        return norm(change.double(), dim=(-3, -2, -1), keepdim=True)


Ball = TokenBall | PixelBall


def ball_of(graph: Graph, norm: str) -> Ball:
    """The ball of a name: "token" or "pixel_l2". Raises ConfigError for another, or one that does not fit."""
    kinds: dict[str, type[TokenBall] | type[PixelBall]] = {
        b.name: b for b in (TokenBall, PixelBall)
    }
    if norm not in kinds:
        raise ConfigError(f"norm={norm!r}: choose one of {', '.join(map(repr, kinds))}.")
    return kinds[norm](graph)
