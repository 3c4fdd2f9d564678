"""The balls around an input in which radii are proven and in which attacks move.

`TokenBall` lets every token of what enters the first block change by an RMS norm of at most eps,
all tokens at once. `PixelBall` lets an image change by a 2-norm of at most eps over all its pixels,
and the image may leave the range of pixels. Both classes have the same methods. Proofs are in
docs/maths.md, section 11.
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

_UP = 1 + 1e-12  # covers a few float64 roundings in a size


class TokenBall:
    """Changes of what enters the first block [batch, tokens, d], of token norm at most eps."""

    name = "token"

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def point(self, inputs: Tensor) -> Tensor:
        """The centre in float64, to which a change is added."""
        return self.graph.embed(inputs, torch.float64).detach()

    def enter(self, point: Tensor) -> Tensor:
        """What enters the first block at a point of the ball, in the point's dtype."""
        return point

    def movement(self, point: Tensor, x: Tensor, eps: Tensor, local: Local) -> Movement:
        """How far the tokens can move, for each size of the ball, in 2-norms.

        Args:
            point: the centre.
            x: enter(point), [batch, tokens, d].
            eps: sizes of the ball [eps], in its norm.
            local: shared norms of matrices.
        """
        size = eps.to(x.device)[:, None, None] * x.shape[-1] ** 0.5 * _UP
        return Movement.ball(size.expand(-1, *x.shape[:2]))

    def token_norm(self, eps: float, norms: ProvenNorms) -> float:
        """Bound on the token norm of the change of what enters the first block."""
        return eps

    def dual(self, gradient: Tensor) -> Tensor:
        """Largest inner product of a gradient with a change of size 1, [batch].

        The gradient is taken with respect to the point.
        """
        return torch.linalg.vector_norm(gradient, dim=-1).sum(-1) * gradient.shape[-1] ** 0.5

    def size(self, change: Tensor) -> Tensor:
        """The size of a change in the ball's norm, for each part that eps bounds on its own.

        Its shape is such that the change can be divided by it.
        """
        return rms_norm(change).unsqueeze(-1)


class PixelBall:
    """Changes of an image [batch, channels, height, width], of 2-norm at most eps."""

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
        """How far the tokens can move, for each eps, in 2-norms.

        Each patch moves through the matrix of the patch convolution. The first row does not move.
        All patches together move by at most eps in 2-norm.
        """
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
    """The ball of a given name.

    Args:
        graph: the model's graph.
        norm: "token" or "pixel_l2".

    Raises:
        ConfigError: the name is another one, or the ball does not fit the model.
    """
    kinds: dict[str, type[TokenBall] | type[PixelBall]] = {
        b.name: b for b in (TokenBall, PixelBall)
    }
    if norm not in kinds:
        raise ConfigError(f"norm={norm!r}: choose one of {', '.join(map(repr, kinds))}.")
    return kinds[norm](graph)
