"""The nodes of a gated MLP whose product was replaced by the absolute value of each pair.

`Stacked` is the maps of gate and up below each other, as one linear map to pairs. `Modulus` is the
absolute value of the pairs. The output map follows as a node of its own. The rules are proven in
docs/maths/gates.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor, nn

from lip_plugin.certificate.graph.base import Bound, Node, ProvenNorms, Watch
from lip_plugin.certificate.graph.decimals import ONE, div, mul, norm2, root, up
from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.linalg.norms import sigma_max_upper
from lip_plugin.model.pairs import pair_abs


@dataclass(frozen=True)
class StackNorms:
    """A 2-norm bound of the maps of gate and up together.

    Attributes:
        sigma: of sigma_max of the matrix that has the rows of both.
    """

    sigma: Decimal


@dataclass
class Stacked(Linear):
    """The maps of gate and up below each other: x -> (W_g x + b_g, W_u x + b_u).

    Its radius and its constant are those of a linear map to 2 n entries. From caps, sigma_max of
    the stack is at most the root of the sum of both squares. From weights it is measured.

    Attributes:
        gate, up: the two maps, with n rows each.
    """

    gate: Linear
    up: Linear

    @staticmethod
    def of(name: str, gate: Linear, up: Linear) -> Stacked:
        """The stack of two maps of the same input, with as many rows in each."""
        assert (gate.d_in, gate.d_out) == (up.d_in, up.d_out)

        def weight() -> Tensor:
            return torch.cat([gate.weight(), up.weight()])

        def bias() -> Tensor | None:
            found = [map_.bias() for map_ in (gate, up)]
            if all(b is None for b in found):
                return None
            like = next(b for b in found if b is not None)
            return torch.cat([like.new_zeros(gate.d_out) if b is None else b for b in found])

        return Stacked(name, weight, bias, 2 * gate.d_out, gate.d_in, gate, up)

    def children(self) -> tuple[Node, ...]:
        return (self.gate, self.up)

    def linear_names(self) -> list[str]:
        return [self.gate.name, self.up.name]

    def measure(self, norms: ProvenNorms) -> StackNorms:
        weight = self.weight().detach().double()
        return StackNorms(min(self._apart(norms), up(float(sigma_max_upper(weight[None])))))

    # sigma_max of the stack by the norms of both maps.
    def _apart(self, norms: ProvenNorms) -> Decimal:
        return norm2([norms[self.gate.name].sigma, norms[self.up.name].sigma])

    def norm(self, norms: ProvenNorms) -> Decimal:
        found = norms.joint.get(self.name)
        sigma = found.sigma if isinstance(found, StackNorms) else self._apart(norms)
        return mul(sigma, root(div(up(self.d_in), up(self.d_out))))

    def entrywise(self, norms: ProvenNorms) -> Decimal:
        return max(self.gate.entrywise(norms), self.up.entrywise(norms))


@dataclass
class Modulus(Node):
    """`pair_abs` of the first and the second half of the entries. The radius is r, the constant 1.

    Attributes:
        module: the model's `PairAbs`, which the comparison runs beside this node.
    """

    name: str
    module: nn.Module

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        y = pair_abs(*x.chunk(2, dim=-1))
        if watch is not None:
            watch.activation(y)
        return y

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        return Bound(r, ONE)
