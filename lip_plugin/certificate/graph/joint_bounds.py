"""Nodes with a rule for several linear maps together.

The norm of a product of matrices can be far below the product of their norms. The nodes in this
file use that:

- `AttentionOut` is attention with its output map. Its rule looks at all heads at once, through
  M_h = W_o,h W_v,h and A_h = W_q,h^T W_k,h.
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

import torch
from torch import Tensor

from lip_plugin.certificate.graph.attention import Attention, HeadRows
from lip_plugin.certificate.graph.base import Bound, ProvenNorms, largest, rms
from lip_plugin.certificate.graph.containers import Chain, Residual, walk
from lip_plugin.certificate.graph.decimals import ZERO, add, below, div, mul, norm2, root, up
from lip_plugin.certificate.graph.nodes import Activation, Gate, Linear, Norm, Scale
from lip_plugin.linalg.rounded import Rounded
from lip_plugin.model.activations import REPLACEMENTS

_HALF = Decimal("0.5")
_SLIP = 1 + Decimal("1e-15")  # covers the rounding of products and quotients of a few floats
_ALIKE = 1.05  # if the weights of all heads are within this factor, they are not worth measuring
# Largest hidden width for which `GatedMlp` is measured. A Gram matrix has that width squared
# entries, which is 128 MiB at this width.
_HADAMARD_UP_TO = 4096


@dataclass(frozen=True)
class HeadNorms:
    """2-norm bounds on all heads of an attention together, for one choice of weights w_h > 0.

    Any choice of weights gives a proven bound. M_h and A_h are as in the docstring of this file.
    Each field bounds the number that is named here, with the name that docs/maths.md, section 5,
    has for it.

    Attributes:
        spread: omega = sqrt(sum_h w_h^-2).
        values: G = sigma_max of [w_1 M_1 .. w_H M_H].
        scores: B = sigma_max of the A_h^T / w_h below each other. If keys are turned,
            B' = sigma_max of the sigma(W_k,h) / w_h W_q,h below each other.
        query_bias: beta = norm2 of all W_k,h^T b_q,h / w_h. If keys are turned,
            beta' = norm2 of all sigma(W_k,h) b_q,h / w_h.
        key_bias: kappa = sigma_max of the norm2(b_k,h) / w_h W_q,h below each other if keys are
            turned, else 0.
        both: C = sigma_max of sum_h M_h A_h^T. None if keys are turned.
    """

    spread: Decimal
    values: Decimal
    scores: Decimal
    query_bias: Decimal
    key_bias: Decimal
    both: Decimal | None

    def lipschitz(self, rho: Decimal, tau: Decimal) -> Decimal:
        """2-norm Lipschitz constant of all heads through the output map.

        It holds for tokens of norm2 at most rho. tau is the factor on the logits, see
        `Attention.tau_upper`.
        """
        keys = mul(tau, add(mul(rho, self.scores), self.query_bias))
        if self.both is None:
            own = mul(self.values, add(self.spread, mul(rho, keys)))
            return add(own, mul(tau, rho, self.values, add(mul(rho, self.scores), self.key_bias)))
        own = mul(self.values, norm2([self.spread, mul(rho, keys)]))
        return add(own, mul(_HALF, tau, rho, rho, add(mul(self.values, self.scores), self.both)))


@dataclass
class AttentionOut(Chain):
    """Attention, then its output map.

    Where a kept norm is behind q or k, only the plain rule of a chain is used.
    """

    def linear_names(self) -> list[str]:
        return linear_names(self)

    def _parts(self) -> tuple[Attention, Linear]:
        attention, out = self.nodes
        assert isinstance(attention, Attention)
        assert isinstance(out, Linear)
        return attention, out

    def measure(self, norms: ProvenNorms) -> tuple[HeadNorms, ...]:
        """Measure the weights as they are, for one to three choices of the heads' weights w_h.

        The result is empty where a kept norm is behind q or k.
        """
        attention, out = self._parts()
        if isinstance(attention.q_norm, Norm) or isinstance(attention.k_norm, Norm):
            return ()
        heads = _Heads.of(attention, out)
        return tuple(heads.norms(w, norms) for w in heads.candidates())

    def from_caps(self, norms: ProvenNorms) -> tuple[HeadNorms, ...]:
        """The same bounds from the norms of single matrices, for w_h = 1."""
        attention, out = self._parts()
        if isinstance(attention.q_norm, Norm) or isinstance(attention.k_norm, Norm):
            return ()
        q, k, v = (_per_head(attention, p, norms) for p in (attention.q, attention.k, attention.v))
        b_q, b_k = (_head_biases(attention, p) for p in (attention.q, attention.k))
        values = mul(norms[out.name].sigma, max(v))
        whole = norms[attention.q.linear.name].whole["q"]
        scores = min(mul(max(k), whole), norm2([mul(a, b) for a, b in zip(q, k)]))
        turned = attention.rotary is not None
        key_bias = min(mul(max(b_k), whole), norm2([mul(a, b) for a, b in zip(q, b_k)]))
        return (
            HeadNorms(
                root(up(len(q))),
                values,
                scores,
                norm2([mul(a, b) for a, b in zip(k, b_q)]),
                key_bias if turned else ZERO,
                None if turned else mul(values, scores),
            ),
        )

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        plain = super().bound(r, norms)
        attention, out = self._parts()
        d_in, d_out = root(up(attention.d_in)), root(up(out.d_out))
        rho, tau = mul(r, d_in), attention.tau_upper()
        radius, constant = plain.radius, plain.lipschitz
        for heads in norms.joint.get(self.name, ()):
            constant = min(constant, div(mul(heads.lipschitz(rho, tau), d_in), below(d_out)))
            moved = mul(rho, heads.values, heads.spread)
            biases = mul(norms[out.name].sigma, norm2(_head_biases(attention, attention.v)))
            radius = min(radius, add(div(add(moved, biases), below(d_out)), rms(out.bias())))
        return Bound(radius, constant)


@dataclass(frozen=True)
class _Heads:
    """The weights of an attention by query head, each [H, d_head, d], exact.

    Attributes:
        q, k, v: the rows of each head. Those of k and v are repeated for the query heads of a
            group.
        out: the columns of the output map that read each head, transposed.
        q_bias: the bias of q, or None.
        attention: the node that the weights are of.
    """

    q: Rounded
    k: Rounded
    v: Rounded
    out: Rounded
    q_bias: Tensor | None
    attention: Attention

    @classmethod
    def of(cls, attention: Attention, out: Linear) -> _Heads:
        q, k, v = (_rows(attention, p) for p in (attention.q, attention.k, attention.v))
        columns = Rounded.of(out.weight().t().unflatten(0, (attention.q.heads, attention.d_head)))
        return cls(q, k, v, columns, attention.q.bias(), attention)

    def candidates(self) -> list[Tensor]:
        """The choices of weights w_h that are tried.

        They are 1, 1 / norm2(M_h), and sqrt(norm2(A_h) / norm2(M_h)). The norms are only about
        right, which is enough, because any w_h > 0 gives a proven bound. A choice whose weights are
        almost alike is left out.
        """
        value, score = (
            _product_norms(self.out.value, self.v.value),
            _product_norms(self.q.value, self.k.value),
        )
        choices = [torch.ones_like(value)]
        for w in (1.0 / _floored(value), (_floored(score) / _floored(value)).sqrt()):
            if bool(w.isfinite().all()) and float(w.amax() / w.amin()) > _ALIKE:
                choices.append(w / w.amax())
        return choices

    # The bounds for one choice of weights. Products are taken with their rounding, see `Rounded`.
    def norms(self, w: Tensor, norms: ProvenNorms) -> HeadNorms:
        turned = self.attention.rotary is not None
        # Below, w and `inverse` both count as exact weights. w * inverse is 1 only up to rounding,
        # and `_SLIP` covers that.
        inverse = 1.0 / w
        values = (
            self.out.flat().mT @ ((self.v @ self.v.mT) @ self.out).times(w * w).flat()
        ).gram_norm_upper()
        key_bias = ZERO
        both = None
        if turned:
            k, b_k = (
                torch.tensor(
                    [float(x) * (1 + 1e-15) for x in sizes], dtype=torch.float64, device=w.device
                )
                for sizes in (
                    _per_head(self.attention, self.attention.k, norms),
                    _head_biases(self.attention, self.attention.k),
                )
            )
            scores = self.q.times(k * inverse).flat().norm_upper()
            key_bias = self.q.times(b_k * inverse).flat().norm_upper() if bool(b_k.any()) else ZERO
            reads = None if self.q_bias is None else self._q_bias().times(k * inverse)
        else:
            gram = (
                self.q.flat().mT @ ((self.k @ self.k.mT) @ self.q).times(inverse * inverse).flat()
            )
            scores = gram.gram_norm_upper()
            both = (self.out.flat().mT @ ((self.v @ self.k.mT) @ self.q).flat()).norm_upper()
            reads = None if self.q_bias is None else (self._q_bias() @ self.k).times(inverse)
        return HeadNorms(
            mul(norm2([up(float(x)) for x in inverse]), _SLIP),
            mul(values, _SLIP),
            mul(scores, _SLIP),
            ZERO if reads is None else mul(reads.size_upper(), _SLIP),
            mul(key_bias, _SLIP),
            both,
        )

    def _q_bias(self) -> Rounded:
        assert self.q_bias is not None
        return Rounded.of(self.q_bias.reshape(self.attention.q.heads, 1, self.attention.d_head))


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

    The rule writes f(z) = z / 2 + e(z), where e is smaller and flatter than f. The half z / 2 is
    linear, so it is added to the identity before a norm is taken. Only e is bounded by a product of
    norms.
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
            return None  # for these f (abs), f(z) - z / 2 is not smaller and flatter than f
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
                _HALF, up(abs(m)), act.factor, (w2 @ Rounded.of(bias[:, None])).size_upper()
            )
        constant = add(constant, mul(rms(second.bias()), root(up(second.d_out))))
        return AffineNorms(linear, mul(up(abs(g)), constant, _SLIP))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        plain = super().bound(r, norms)
        affine, found = norms.joint.get(self.name), self._parts()
        if not isinstance(affine, AffineNorms) or found is None:
            return plain
        first, act, second, (c, m, g) = found
        outer = mul(up(abs(g)), up(abs(m)), _SLIP, norms[second.name].sigma)
        inner = mul(up(abs(c)), _SLIP, norms[first.name].sigma)
        constant = add(affine.linear, mul(outer, inner, act.swing()))
        width = root(up(first.d_in))
        rho = mul(r, width)
        bias = mul(rms(first.bias()), root(up(first.d_out)))
        rest = mul(outer, _HALF, act.factor, add(mul(inner, rho), bias))
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


def linear_names(node: Chain | Residual) -> list[str]:
    """Names of all linear maps inside a node, those of an attention included."""
    names = []
    for inner in walk([node]):
        found = (inner.q, inner.k, inner.v) if isinstance(inner, Attention) else ()
        names += [p.linear.name for p in found] + (
            [inner.name] if isinstance(inner, Linear) else []
        )
    return names


# The rows of q, k or v by query head, [H, d_head, d]. Those of k and v are repeated for a group.
def _rows(attention: Attention, p: HeadRows) -> Rounded:
    rows = p.linear.weight()[p.start : p.stop].detach().unflatten(0, (p.heads, attention.d_head))
    return Rounded.of(rows.repeat_interleave(attention.q.heads // p.heads, 0))


# sigma_max of q, k or v by query head.
def _per_head(attention: Attention, p: HeadRows, norms: ProvenNorms) -> list[Decimal]:
    group = attention.q.heads // p.heads
    return [s for s in norms[p.linear.name].heads[p.role] for _ in range(group)]


# norm2 of the bias of q, k or v by query head.
def _head_biases(attention: Attention, p: HeadRows) -> list[Decimal]:
    return [b for b in p.head_biases() for _ in range(attention.q.heads // p.heads)]


def _product_norms(a: Tensor, b: Tensor) -> Tensor:
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
def _floored(sizes: Tensor) -> Tensor:
    return sizes.clamp_min(1e-3 * float(sizes.amax()))
