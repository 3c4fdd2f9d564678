"""The words that all nodes of the graph share.

`Node` is the base class of all nodes. `Bound` is what a node's rule gives. `ProvenNorms` is what a
rule reads about the weights. `Watch` collects facts while a graph runs.
"""

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
    """What a rule proves about a node on a ball of inputs, in token norm.

    Attributes:
        radius: upper bound of the token norm of the output.
        lipschitz: upper bound of the Lipschitz constant on that ball, from token norm to token
            norm.
    """

    radius: Decimal
    lipschitz: Decimal


@dataclass(frozen=True)
class LinearNorms:
    """Proven upper bounds of the norms of one matrix, in 2-norms.

    Attributes:
        sigma: of sigma_max of the whole matrix.
        row: of the largest norm2 of a row.
        whole: `whole[role]`, of sigma_max of all rows of q, k or v together.
        heads: `heads[role]`, of sigma_max of the rows of each head of q, k or v.
        pairs: of norm2 of the difference of any two rows. Only the model's head is asked for it.
    """

    sigma: Decimal
    row: Decimal
    whole: dict[str, Decimal] = field(default_factory=dict)
    heads: dict[str, list[Decimal]] = field(default_factory=dict)
    pairs: Decimal = INF


class ProvenNorms(dict[str, LinearNorms]):
    """LinearNorms by the name of the linear map.

    Attributes:
        joint: norms of several maps together, by the name of the node that measured them (see
            joint_bounds.py).
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.joint: dict[str, Any] = {}

    def take(self, other: ProvenNorms) -> None:
        """Add everything that `other` holds."""
        self.update(other)
        self.joint.update(other.joint)


class Watch:
    """Collects facts while a graph runs.

    Attributes:
        largest_activation: the largest absolute value of an activation.
        smallest_entropy: the smallest entropy of an attention row, in nats. Only the last row of
            each head is looked at.
    """

    def __init__(self) -> None:
        self.largest_activation = 0.0
        self.smallest_entropy = float("inf")

    def activation(self, x: Tensor) -> None:
        self.largest_activation = max(self.largest_activation, float(x.detach().abs().amax()))

    def attention(self, weights: Tensor) -> None:
        last = weights[..., -1, :].detach().double()
        entropy = -torch.special.xlogy(last, last).sum(-1)
        self.smallest_entropy = min(self.smallest_entropy, float(entropy.amin()))


class Node:
    """One step of the graph.

    `run(x)` computes what the model computes there, on x [batch, tokens, d], in the dtype of x. A
    `Watch` that is passed sees the activations.

    `bound(r, norms)` is the node's rule. It is about all inputs of token norm at most r, where the
    token norm is the largest RMS norm of a token. It bounds the token norm of the output on that
    ball, and the Lipschitz constant on it from token norm to token norm.
    """

    name: str

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        raise NotImplementedError

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        raise NotImplementedError

    def children(self) -> Sequence[Node]:
        """The nodes inside, in running order."""
        return ()

    def added(self) -> Sequence[Any]:
        """The chains inside whose outputs are added to the node's input. Most nodes have none."""
        return ()


def rms(bias: Tensor | None) -> Decimal:
    """RMS norm of a bias, rounded up. It is 0 if there is no bias."""
    if bias is None or bias.numel() == 0:
        return Decimal(0)
    return up(float(row_rms_max_upper(bias.detach().reshape(1, -1))))


def largest(values: Tensor | None) -> Decimal:
    """Largest absolute entry, exact. It is 0 if there are no values."""
    if values is None or values.numel() == 0:
        return Decimal(0)
    return up(float(values.detach().double().abs().amax()))
