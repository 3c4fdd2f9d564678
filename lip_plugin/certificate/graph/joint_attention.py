"""Attention with its output map: one bound for all heads together, from products of their maps."""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal

import torch
from torch import Tensor

from lip_plugin.certificate.graph.attention import Attention, HeadRows
from lip_plugin.certificate.graph.base import Bound, ProvenNorms, rms
from lip_plugin.certificate.graph.containers import Chain
from lip_plugin.certificate.graph.decimals import ZERO, add, below, div, mul, norm2, root, up
from lip_plugin.certificate.graph.joint_parts import (
    ALIKE,
    HALF,
    SLIP,
    floored,
    linear_names,
    product_norms,
)
from lip_plugin.certificate.graph.nodes import Linear, Norm
from lip_plugin.linalg.rounded import Rounded


@dataclass(frozen=True)
class HeadNorms:
    """2-norm bounds on all heads of an attention together, for one choice of weights w_h > 0.

    Any choice of weights gives a proven bound. M_h and A_h are as in the docstring of
    joint_bounds.py. Each field bounds the number that is named here, with the name that
    docs/maths.md, section 5, has for it.

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
        return add(own, mul(HALF, tau, rho, rho, add(mul(self.values, self.scores), self.both)))


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
            product_norms(self.out.value, self.v.value),
            product_norms(self.q.value, self.k.value),
        )
        choices = [torch.ones_like(value)]
        for w in (1.0 / floored(value), (floored(score) / floored(value)).sqrt()):
            if bool(w.isfinite().all()) and float(w.amax() / w.amin()) > ALIKE:
                choices.append(w / w.amax())
        return choices

    # The bounds for one choice of weights. Products are taken with their rounding, see `Rounded`.
    def norms(self, w: Tensor, norms: ProvenNorms) -> HeadNorms:
        turned = self.attention.rotary is not None
        # Below, w and `inverse` both count as exact weights. w * inverse is 1 only up to rounding,
        # and `SLIP` covers that.
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
            mul(norm2([up(float(x)) for x in inverse]), SLIP),
            mul(values, SLIP),
            mul(scores, SLIP),
            ZERO if reads is None else mul(reads.size_upper(), SLIP),
            mul(key_bias, SLIP),
            both,
        )

    def _q_bias(self) -> Rounded:
        assert self.q_bias is not None
        return Rounded.of(self.q_bias.reshape(self.attention.q.heads, 1, self.attention.d_head))


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
