"""Nodes with a rule for several linear maps together.

The norm of a product of matrices can be far below the product of their norms. The nodes here and
in joint_attention.py use that:

- `AttentionOut` (joint_attention.py) is attention with its output map. Its rule looks at all heads
  at once, through M_h = W_o,h W_v,h and A_h = W_q,h^T W_k,h.
- `MlpResidual` is x + g W_2 f(W_1 x). Its rule adds the linear half of f to the identity, and
  takes a norm only then.
- `GatedMlp` is W_d (f(W_g x) * W_u x). Its rule takes norms of entrywise products of Gram matrices.

Each is a plain Chain or Residual as well, so it has the plain rule too, and takes the smaller
bound. The norms of several maps together are found before any rule runs, and are kept in
`ProvenNorms.joint`. From weights, a node's `measure` finds them. From caps, its `from_caps` does,
if it has one.

All rules here work in 2-norms, and turn to RMS norms in the end. rho is the largest norm2 of a
token of the input. The proofs are in docs/maths.md, sections 4 and 5.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

from lip_plugin.certificate.graph.base import Bound, ProvenNorms, largest, rms
from lip_plugin.certificate.graph.containers import Chain, Residual
from lip_plugin.certificate.graph.decimals import ZERO, add, below, div, mul, root, up
from lip_plugin.certificate.graph.joint_parts import HALF, SLIP, linear_names
from lip_plugin.certificate.graph.nodes import Activation, Gate, Linear, Scale
from lip_plugin.linalg.rounded import Rounded
from lip_plugin.model.activations import REPLACEMENTS

# Largest hidden width for which `GatedMlp` is measured. A Gram matrix has that width squared
# entries, which is 128 MiB at this width.
_HADAMARD_UP_TO = 4096


@dataclass(frozen=True)
class AffineNorms:
    """2-norm bounds of the affine part of an MLP with its residual path.

    With the letters of `MlpResidual`, the whole is (I + (g c m F / 2) W_2 W_1) x + const + rest.
    The affine part is all but the rest.

    Attributes:
        linear: sigma_max of the matrix I + (g c m F / 2) W_2 W_1.
        constant: norm2 of const = g ((m F / 2) W_2 b_1 + b_2).
    """

    linear: Decimal
    constant: Decimal


@dataclass
class MlpResidual(Residual):
    """x + g (m W_2 F f(W_1 c x + b_1) + b_2), an MLP with its residual path.

    c, m and g are constants in front of the first map, between activation and second map, and
    behind the second map. F is the factor of the activation.

    The rule writes f(z) = z / 2 + e(z), where abs(e(z)) is at most abs(z) / 2, and the slopes of e
    are at most the largest slope of f less 1/2. The half z / 2 is linear, so it is added to the
    identity before a norm is taken. Only e is bounded by a product of norms.
    """

    def linear_names(self) -> list[str]:
        return linear_names(self)

    def _parts(self) -> tuple[Linear, Activation, Linear, list[float]] | None:
        """(first map, activation, second map, [c, m, g]).

        None if the branch has other nodes (a kept norm say), or if the rule is not proven for it.
        """
        kinds = [type(n) for n in self.branch.nodes if not isinstance(n, Scale)]
        if kinds != [Linear, Activation, Linear]:
            return None
        linears: list[Linear] = []
        scales, act = [1.0, 1.0, 1.0], None
        for node in self.branch.nodes:
            if isinstance(node, Scale) and len(linears) == 1 and act is None:
                return None  # the proof has no constant between the first map and the activation
            if isinstance(node, Scale):
                scales[len(linears)] *= node.scale
            elif isinstance(node, Linear):
                linears.append(node)
            elif isinstance(node, Activation):
                act = node
        assert act is not None
        if act.kind in REPLACEMENTS:
            return None  # abs has the slope -1, so its e has the slope -3/2
        return linears[0], act, linears[1], scales

    def measure(self, norms: ProvenNorms) -> AffineNorms | None:
        found = self._parts()
        if found is None:
            return None
        first, act, second, (c, m, g) = found
        half = 0.5 * g * m * c * float(act.factor)
        w1, w2 = Rounded.of(first.weight()), Rounded.of(second.weight())
        # The float `half` is a few roundings off. That changes the matrix by at most 1e-15 of
        # half W_2 W_1.
        slip = mul(
            up(abs(half)), Decimal("1e-15"), norms[first.name].sigma, norms[second.name].sigma
        )
        linear = add((w2 @ w1).plus_identity(half).norm_upper(), slip)
        constant, bias = ZERO, first.bias()
        if bias is not None:
            constant = mul(
                HALF, up(abs(m)), act.factor, (w2 @ Rounded.of(bias[:, None])).size_upper()
            )
        constant = add(constant, mul(rms(second.bias()), root(up(second.d_out))))
        return AffineNorms(linear, mul(up(abs(g)), constant, SLIP))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        plain = super().bound(r, norms)
        affine, found = norms.joint.get(self.name), self._parts()
        if not isinstance(affine, AffineNorms) or found is None:
            return plain
        first, act, second, (c, m, g) = found
        outer = mul(up(abs(g)), up(abs(m)), SLIP, norms[second.name].sigma)
        inner = mul(up(abs(c)), SLIP, norms[first.name].sigma)
        constant = add(affine.linear, mul(outer, inner, act.swing()))
        width = root(up(first.d_in))
        rho = mul(r, width)
        bias = mul(rms(first.bias()), root(up(first.d_out)))
        rest = mul(outer, HALF, act.factor, add(mul(inner, rho), bias))
        radius = div(add(mul(affine.linear, rho), affine.constant, rest), below(width))
        return Bound(min(plain.radius, radius), min(plain.lipschitz, constant))


@dataclass(frozen=True)
class GateNorms:
    """A 2-norm bound on the entrywise product of a gated MLP, through its output map.

    Attributes:
        product: t with norm2(W_d (W_g x * W_u y)) <= t norm2(x) norm2(y) for all x and y.
    """

    product: Decimal


@dataclass
class GatedMlp(Chain):
    """W_d (f(W_g x + b_g) * (W_u x + b_u)): a Gate, then its output map."""

    def linear_names(self) -> list[str]:
        return linear_names(self)

    def _parts(self) -> tuple[Gate, Linear]:
        gate, down = self.nodes
        assert isinstance(gate, Gate)
        assert isinstance(down, Linear)
        return gate, down

    def measure(self, norms: ProvenNorms) -> GateNorms | None:
        gate, down = self._parts()
        if down.d_in > _HADAMARD_UP_TO:
            return None
        sides = [
            (gate.gate, gate.gate.weight()),
            (gate.up, gate.up.weight()),
            (down, down.weight().t()),
        ]
        grams = [(w := Rounded.of(weight)) @ w.mT for _, weight in sides]
        pairs = [
            mul(norms[sides[i][0].name].sigma, grams[j].entrywise(grams[k]).gram_norm_upper())
            for i, j, k in ((0, 1, 2), (1, 0, 2), (2, 0, 1))
        ]
        return GateNorms(min(pairs))

    def from_caps(self, norms: ProvenNorms) -> GateNorms:
        """The same bound from the norms of single matrices.

        norm2 of an entrywise product is at most the largest entry of one factor times norm2 of the
        other. The largest entry of W x is at most the largest norm2 of a row of W times norm2(x).
        """
        gate, down = self._parts()
        g, u, d = (norms[n.name] for n in (gate.gate, gate.up, down))
        return GateNorms(mul(d.sigma, min(mul(g.row, u.sigma), mul(g.sigma, u.row))))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        plain = super().bound(r, norms)
        found = norms.joint.get(self.name)
        if not isinstance(found, GateNorms):
            return plain
        gate, down = self._parts()
        d_in, d_out = root(up(gate.up.d_in)), root(up(down.d_out))
        rho, factor, slope = mul(r, d_in), gate.act.factor, gate.act.slope()
        s_g, s_u, s_d = (norms[n.name].sigma for n in (gate.gate, gate.up, down))
        b_g, b_u = largest(gate.gate.bias()), largest(gate.up.bias())
        both = mul(found.product, rho)
        moving_gate = mul(slope, add(both, mul(s_d, s_g, b_u)))
        moving_up = mul(factor, add(both, mul(s_d, s_u, b_g)))
        constant = div(mul(add(moving_gate, moving_up), d_in), below(d_out))
        biases = mul(rms(gate.up.bias()), root(up(down.d_in)), b_g)
        terms = [mul(both, rho), mul(s_d, s_g, rho, b_u), mul(s_d, s_u, rho, b_g), mul(s_d, biases)]
        radius = add(div(mul(factor, add(*terms)), below(d_out)), rms(down.bias()))
        return Bound(min(plain.radius, radius), min(plain.lipschitz, constant))
