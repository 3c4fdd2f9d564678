"""What every node of the graph speaks: bounds, proven norms of matrices, and what is seen while the graph runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.graph.decimals import INF, up
from lip_plugin.linalg.norms import row_rms_max_upper


@dataclass(frozen=True)
class Bound:
    """On the ball of the input: token norm of the output, and Lipschitz constant, both from above."""

    radius: Decimal
    lipschitz: Decimal


@dataclass(frozen=True)
class LinearNorms:
    """Proven upper bounds on one matrix: sigma_max, largest row 2-norm, sigma_max of each part by role.

    `whole[role]` bounds sigma_max of the rows of q, k or v together, `heads[role]` of each head's rows, `pairs`
    the norm2 of the difference of any two rows (asked for of the head only).
    """

    sigma: Decimal
    row: Decimal
    whole: dict[str, Decimal] = field(default_factory=dict)
    heads: dict[str, list[Decimal]] = field(default_factory=dict)
    pairs: Decimal = INF


class ProvenNorms(dict[str, LinearNorms]):
    """LinearNorms by the name of the linear map; in `joint`, what a node measured of several maps together."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.joint: dict[str, Any] = {}

    def take(self, other: ProvenNorms) -> None:
        """Add everything that `other` holds."""
        self.update(other)
        self.joint.update(other.joint)


class Watch:
    """Collects, while a graph runs, the largest absolute activation and the attention's entropies."""

    def __init__(self) -> None:
        self.largest_activation = 0.0
        self.smallest_entropy = float("inf")  # nats, over the last row of every head

    def activation(self, x: Tensor) -> None:
        self.largest_activation = max(self.largest_activation, float(x.detach().abs().amax()))

    def attention(self, weights: Tensor) -> None:
        last = weights[..., -1, :].detach().double()
        entropy = -torch.special.xlogy(last, last).sum(-1)
        self.smallest_entropy = min(self.smallest_entropy, float(entropy.amin()))


class Node:
    """One step of the graph, which runs and bounds.

    `run(x)` computes what the model computes, on x [batch, tokens, d] in x's own dtype. `bound(r)` gives, for inputs of
    token norm (largest RMS norm of a token) at most r, a bound on the output's token norm and on the Lipschitz
    constant between token norms on that ball.
    """

    name: str

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        raise NotImplementedError

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        raise NotImplementedError

    def children(self) -> Sequence[Node]:
        """The nodes inside, in running order."""
        return ()

    def added(self) -> Sequence[Node]:
        """The chains inside whose outputs are added to the node's input; none for most nodes."""
        return ()


def rms(bias: Tensor | None) -> Decimal:
    """RMS norm of a bias, rounded up; 0 without one."""
    if bias is None or bias.numel() == 0:
        return Decimal(0)
    return up(float(row_rms_max_upper(bias.detach().reshape(1, -1))))


def largest(values: Tensor | None) -> Decimal:
    """Largest absolute entry, exact; 0 for none."""
    if values is None or values.numel() == 0:
        return Decimal(0)
    return up(float(values.detach().double().abs().amax()))
