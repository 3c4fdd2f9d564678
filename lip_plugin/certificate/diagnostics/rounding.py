"""A bound on how far rounding can take a forward pass from real arithmetic, in token norm.

A certificate is about real arithmetic. A forward pass in float32 or bfloat16 adds an error at every
operation, and later layers amplify that error at most by their Lipschitz constants. Use
`forward_rounding_upper` to bound the total. The rules are listed in docs/maths.md, section 7.

The model of arithmetic is the standard one. Every stored result is rounded once, to within a
relative u, the unit roundoff. A sum of n products is off by at most gamma_n times the sum of their
absolute values. It is accumulated in float32 where the dtype is shorter. Three things are assumed
besides:

- Library functions (exp, tanh, erf, sqrt, cos, sin) are right to `_FUNCTION` units.
- Nothing overflows or underflows.
- No product is shortened, as TF32 does. torch.backends.cuda.matmul.allow_tf32 is off by default.

Source: Higham, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.graph.analysis import Analysis
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.base import ProvenNorms, largest
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.containers import Chain, Parallel, Residual
from lip_plugin.certificate.graph.decimals import (
    INF,
    ONE,
    ZERO,
    add,
    div,
    exponential,
    mul,
    root,
    to_float,
    up,
)
from lip_plugin.certificate.graph.joint_attention import AttentionOut
from lip_plugin.certificate.graph.joint_bounds import GatedMlp, MlpResidual
from lip_plugin.certificate.graph.nodes import (
    Activation,
    Gate,
    Linear,
    Norm,
    OneToken,
    Scale,
    Softcap,
)
from lip_plugin.certificate.graph.pairs import Modulus, Stacked
from lip_plugin.certificate.input_radius import radius_of
from lip_plugin.certificate.weight_norms import refuse_non_finite_weights, weight_norms
from lip_plugin.distributed.gather import sharded_too
from lip_plugin.errors import ConfigError, UnsupportedModelError
from lip_plugin.linalg.norms import sum_rms_max_upper
from lip_plugin.model.pairs import PAIR_EPS

# Error granted to a library function, in units of the roundoff. torch documents none. Its float32
# functions were seen within 4 units, and tests/certificate/test_rounding.py checks that they stay
# within these 8.
_FUNCTION = 8
# the unit roundoff of each dtype is 2 to the power of minus this
_UNIT = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}


@dataclass(frozen=True)
class Arithmetic:
    """The arithmetic of a forward pass.

    Attributes:
        unit: unit roundoff of stored results.
        accumulated: unit roundoff of accumulation, at most that of float32.
        tokens: length of the sequence.
    """

    unit: Decimal
    accumulated: Decimal
    tokens: int

    @classmethod
    def of(cls, dtype: torch.dtype, tokens: int) -> Arithmetic:
        if dtype not in _UNIT:
            raise UnsupportedModelError(
                f"rounding of {dtype}: known are {', '.join(map(str, _UNIT))}."
            )
        return cls(Decimal(2) ** -_UNIT[dtype], Decimal(2) ** -max(24, _UNIT[dtype]), tokens)

    def sum_of(self, n: int) -> Decimal:
        """Relative error of an accumulated sum of n products, of the sum of their absolute values.

        It is gamma_(n + 2), where gamma_m = m u / (1 - m u) with the accumulator's unit u, and inf
        from m u = 1 on.
        """
        nu = mul(up(n + 2), self.accumulated)
        return INF if nu >= 1 else div(nu, ONE - nu)

    def units(self, n: int) -> Decimal:
        return mul(up(n), self.unit)


@sharded_too
@torch.no_grad()
def forward_rounding_upper(model: nn.Module, dtype: torch.dtype, tokens: int) -> float:
    """Bound what rounding does to the logits, in token norm.

    It bounds (logits computed in `dtype`) - (logits in real arithmetic), both with the same stored
    weights, for every sequence of at most `tokens` tokens in the certificate's ball. The bound is
    inf where errors feed on each other, as in bfloat16 with large attention logits.

    Args:
        model: a model of a known family.
        dtype: float64, float32, float16 or bfloat16.
        tokens: the longest sequence.

    Raises:
        UnsupportedModelError: the dtype is another one, or a node's rounding has no rule here.
        NonFiniteError: a weight holds nan or inf.

    Source:
        Higham, "Accuracy and Stability of Numerical Algorithms", chapters 2 and 3.
    """
    if not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"forward_rounding_upper(tokens={tokens!r}): a number of at least 1.")
    graph = build(model)
    refuse_non_finite_weights(graph.root)
    check_graph(graph)
    norms, arithmetic = weight_norms(graph), Arithmetic.of(dtype, tokens)
    r = radius_of(graph, "weights")
    error = _entry(graph, r, norms, arithmetic)
    for node in graph.body.nodes:
        error, r = rounding(node, r, error, norms, arithmetic), node.bound(r, norms).radius
    return to_float(error)


def _entry(graph: Graph, r: Decimal, norms: ProvenNorms, a: Arithmetic) -> Decimal:
    """Rounding error of what enters the first block.

    That is a sum of stored rows, of which some may pass a linear map, or a sum with mapped patches.
    """
    entry = graph.entry
    rows = [up(sum_rms_max_upper([t.read()])) for t in entry.tables.values()]
    error = mul(a.units(2 * len(rows)), add(*rows))
    if entry.patches is not None:
        error = add(error, rounding(entry.patches, up(entry.pixel_max), ZERO, norms, a))
    if entry.token_map is not None:
        token = rows[list(entry.tables).index("token")]
        error = add(error, rounding(entry.token_map, token, mul(a.units(2), token), norms, a))
    error = add(error, mul(a.units(2), add(r, error)))
    return error if entry.norm is None else rounding(entry.norm, add(*rows, r), error, norms, a)


def _missing(node: Any) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{node.name} ({type(node).__name__}): its rounding has no rule here."
    )


# rounding(node, r, e, norms, arithmetic) bounds the token norm of (computed output) - (exact
# output). Here r bounds the token norm of the exact input, and e the token norm of (computed
# input) - (exact input).
rounding = Analysis("rounding", _missing)


def _carried(node: Any, r: Decimal, e: Decimal, norms: ProvenNorms) -> tuple[Decimal, Decimal]:
    """What a node does to an error e of its input, without rounding of its own.

    Returns:
        The error at the output, and a bound on the token norm of the output for the computed input.
    """
    bound = node.bound(add(r, e), norms)
    return mul(bound.lipschitz, e), bound.radius


@rounding.rule(Linear, Stacked)
def linear_rounding(
    node: Linear, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    carried, radius = _carried(node, r, e, norms)
    # A sum of products is off by a share of abs(W) abs(x). norm2(abs(W)) is at most norm_F(W), so
    # at most sigma_max(W) times the root of the smaller side.
    spread = root(up(min(node.d_in, node.d_out)))
    return add(carried, mul(add(mul(a.sum_of(node.d_in + 1), spread), a.units(2)), radius))


@rounding.rule(Scale)
def scale_rounding(
    node: Scale, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    carried, radius = _carried(node, r, e, norms)
    return add(carried, mul(a.units(2), radius))


@rounding.rule(Activation)
def activation_rounding(
    node: Activation, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    carried, _ = _carried(node, r, e, norms)
    # A capped activation computes two library functions, so their error counts twice.
    return add(carried, mul(a.units(2 * _FUNCTION + 6), add(r, e)))


@rounding.rule(Modulus)
def modulus_rounding(
    node: Modulus, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    # Squares, sum, root, difference and product are each rounded relative to the root of
    # g^2 + u^2 + e, which in RMS norm is at most the input and sqrt(e) together.
    carried, _ = _carried(node, r, e, norms)
    return add(carried, mul(a.units(_FUNCTION + 10), add(r, e, up(math.sqrt(2.0 * PAIR_EPS)))))


@rounding.rule(Norm)
def norm_rounding(node: Norm, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic) -> Decimal:
    carried, radius = _carried(node, r, e, norms)
    d = node.width
    # The rounding of the mean passes through the norm's constant.
    centering = (
        mul(node.bound(ONE, norms).lipschitz, a.sum_of(d), add(r, e)) if node.center else ZERO
    )
    return add(carried, centering, mul(add(a.sum_of(d), a.units(_FUNCTION + 6)), radius))


@rounding.rule(Chain, AttentionOut, GatedMlp)
def chain_rounding(
    node: Chain, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    for inner in node.nodes:
        e, r = rounding(inner, r, e, norms, a), inner.bound(r, norms).radius
    return e


@rounding.rule(Residual, MlpResidual)
def residual_rounding(
    node: Residual, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    branch = rounding(node.branch, r, e, norms, a)
    radius = add(r, e, node.branch.bound(r, norms).radius, branch)
    return add(e, branch, mul(a.unit, radius))


@rounding.rule(Parallel)
def parallel_rounding(
    node: Parallel, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    parts = [rounding(branch, r, e, norms, a) for branch in node.branches]
    radius = add(r, e, *parts, *(branch.bound(r, norms).radius for branch in node.branches))
    return add(e, *parts, mul(a.units(2 * len(parts)), radius))


@rounding.rule(Softcap)
def softcap_rounding(
    node: Softcap, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    return add(e, mul(a.units(_FUNCTION + 4), add(r, e)))


@rounding.rule(OneToken)
def one_token_rounding(
    node: OneToken, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    return e


@rounding.rule(Gate)
def gate_rounding(node: Gate, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic) -> Decimal:
    gate, value = (rounding(n, r, e, norms, a) for n in (node.gate, node.up))
    gate = rounding(node.act, node.gate.bound(r, norms).radius, gate, norms, a)
    outer = add(r, e)
    entry = [add(mul(n.entrywise(norms), outer), largest(n.bias())) for n in (node.gate, node.up)]
    # one entry is off by at most the RMS norm of all errors times this
    width = root(up(node.up.d_out))
    moved = add(mul(gate, add(entry[1], mul(value, width))), mul(node.act.factor, entry[0], value))
    # A cap on a factor rounds it by a few units more, relative to the factor's largest size.
    return add(moved, mul(a.units(2 * _FUNCTION + 10), add(node.bound(outer, norms).radius, moved)))


@rounding.rule(Attention)
def attention_rounding(
    node: Attention, r: Decimal, e: Decimal, norms: ProvenNorms, a: Arithmetic
) -> Decimal:
    """Rounding of attention, per head in 2-norms.

    An error of at most eps in every logit changes every attention weight at most by the factor
    exp(2 eps), up or down.
    """
    outer, heads, width = add(r, e), node.q.heads, root(up(node.d_head))
    sizes, errors = [], []
    for p, post in ((node.q, node.q_norm), (node.k, node.k_norm), (node.v, None)):
        found, before = node.sizes(p, outer, norms, post), node.sizes(p, outer, norms, None)
        error = mul(rounding(p.linear, r, e, norms, a), root(up(p.linear.d_out)))
        if post is not None:
            # The norm is over one head or over all heads. In the second case one head may carry the
            # error of all.
            over = root(up(node.d_head * p.heads)) if node.whole_norms else width
            error = mul(
                rounding(post, div(max(before.sizes), width), div(error, over), norms, a), over
            )
        largest_bias = max(p.head_biases())
        sizes.append(add(max(found.sizes), largest_bias))
        errors.append(error)
    if node.rotary is not None:
        # An angle is position times frequency, so its error grows with the position. cos and sin of
        # it are rounded as well.
        turn = mul(add(up(_FUNCTION + 4), up(2 * a.tokens)), max(a.unit, Decimal(2) ** -24))
        errors[0], errors[1] = (
            add(x, mul(turn, add(s, x))) for x, s in zip(errors[:2], sizes[:2], strict=True)
        )
    (q, k, v), (e_q, e_k, e_v) = sizes, errors
    tau = node.tau_upper()
    logits = add(
        mul(q, e_k),
        mul(k, e_q),
        mul(e_q, e_k),
        mul(a.sum_of(node.d_head), add(q, e_q), add(k, e_k)),
    )
    eps = mul(tau, add(logits, mul(a.units(_FUNCTION + 8), add(q, e_q), add(k, e_k))))
    if node.bias is not None:
        # The bias is rounded once when it is cast to the logits' dtype, and once in the sum.
        eps = add(eps, mul(a.units(4), largest(node.bias.weight)))
    share = add(a.sum_of(a.tokens), a.units(_FUNCTION + 4))
    factor = mul(exponential(mul(up(2), eps)), add(ONE, share))
    moved = add(mul(v, add(factor, -ONE) if factor.is_finite() else INF), mul(factor, e_v))
    total = add(moved, mul(add(a.sum_of(a.tokens), a.units(2)), add(v, moved)))
    return mul(total, div(root(up(heads)), root(up(heads * node.d_head))), Decimal("1.000001"))
