"""Local movement of softmax attention around a given input.

This is the rule of attention for `move` in rules.py. It uses the weights, keys, queries and values
that the input gives. It is stated for one head and one query token t. Let p be the attention
weights at the centre and o = sum_s p_s v_s the output. Let d_s be the change of logit s up to a
common shift, with abs(d_s) <= lam. Let p_theta be the softmax of the logits plus theta d. Then

    o' - o = sum_s p'_s (v'_s - v_s) + integral over theta in [0, 1] of Cov_theta(d, v)

and every second moment under p_theta is at most e^(2 theta lam) times that under p. Proofs are in
docs/maths.md, section 11.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lip_plugin.certificate.graph.attention import Attention, HeadRows, _rotate
from lip_plugin.certificate.graph.nodes import Norm, Scale
from lip_plugin.certificate.robustness.movement import (
    Key,
    Local,
    Matrix,
    Movement,
    Term,
    sum_of,
    weight,
)
from lip_plugin.certificate.robustness.rules import CURVATURE_UPPER, move, norm_rule, record
from lip_plugin.errors import CertificateError

# The attention at the centre is recomputed here and compared with the node's own. In float64 the
# two agree to 1e-13. A mask or rotation that this file does not know is off by far more.
_SAME = 1e-9


@dataclass(frozen=True)
class _Part:
    """One of q, k and v, repeated for the query heads of its group.

    Attributes:
        centre: the value at the centre, [batch, heads, tokens, d_head].
        size: bound on the 2-norm of its movement, [eps, batch, heads, tokens].
        curved: bound on the 2-norm of the part of the movement beyond its linearization, of the
            same shape.
        joint: bound on the 2-norm of the movement over all tokens together, [eps, batch, heads].
    """

    centre: Tensor
    size: Tensor
    curved: Tensor
    joint: Tensor


@move.rule(Attention)
def attention_movement(
    node: Attention, x: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Movement]:
    q, k, v = (_part(node, p, x, movement, local) for p in (node.q, node.k, node.v))
    hidden = _hidden(node, x.shape[-2], x.device)
    logits = node.tau * q.centre @ k.centre.mT
    if node.softcap is not None:
        logits = node.softcap * torch.tanh(logits / node.softcap)
    logits = node.biased(logits)
    weights = logits.masked_fill(hidden, float("-inf")).softmax(-1)
    y = (weights @ v.centre).transpose(-3, -2).flatten(-2)
    _compare(node, x, y)
    with torch.no_grad():
        moves = _logit_moves(node, q, k, weights.detach(), hidden, movement, local)
        size, rest = _head(node, q, k, v, weights.detach(), hidden, moves)
    if local.remainders is not None:
        rest = rest.transpose(-1, -2)
        record(local, y, rest, rest * node.d_head**0.5)
    return y, Movement.ball(torch.linalg.vector_norm(size, dim=-2))


# Raise CertificateError unless the node's own output at the centre is y.
def _compare(node: Attention, x: Tensor, y: Tensor) -> None:
    with torch.no_grad():
        own = node.run(x)
    off = float((own - y.detach()).abs().max()) if own.shape == y.shape else float("inf")
    if not off <= _SAME * (1.0 + float(own.abs().max())):
        raise CertificateError(
            f"{node.name} does something in its attention that no local rule knows "
            f"(off by {off:.2e}): a mask or rotation of its own. "
            "certify(model) may still bound the model as a whole."
        )


def _hidden(node: Attention, tokens: int, device: torch.device) -> Tensor:
    """True where token t (rows) does not see token s (columns), [tokens, tokens]."""
    seen = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    hidden = seen.triu(1) if node.causal else ~seen
    return hidden if node.window is None else hidden | seen.tril(-node.window)


# q, k or v at the centre, and how far it moves.
def _part(node: Attention, p: HeadRows, x: Tensor, movement: Movement, local: Local) -> _Part:
    w, bias = weight(p.linear)[p.start : p.stop], p.bias()
    y = torch.nn.functional.linear(x, w, None if bias is None else bias.detach().double())
    post = {"q": node.q_norm, "k": node.k_norm}.get(p.role)
    # If one norm is over all heads together, the part of each head moves at most as far as the
    # whole.
    whole = node.whole_norms and isinstance(post, Norm)
    y = y.unflatten(-1, (1, -1) if whole else (p.heads, -1))
    size = sum_of(
        [t.size.unsqueeze(-1) * local.sigma(*_rows(p, w, t, local, whole)) for t in movement.terms]
    )
    curved = torch.zeros_like(size)
    joint = size.new_full((), float("inf"))
    if post is None:  # a rotation, if there is one, is applied below
        joint = sum_of(
            [t.joint.unsqueeze(-1) * local.sigma(*_rows(p, w, t, local)) for t in movement.terms]
        )
    if isinstance(post, Norm):
        size, curved = norm_rule(post, y, size)
    elif isinstance(post, Scale):
        size = size * abs(post.scale)
    y = y if post is None else post.run(y)
    if whole:
        y = y.flatten(-2).unflatten(-1, (p.heads, -1))
        size, curved = (t.expand(*t.shape[:-1], p.heads) for t in (size, curved))
    y, size, curved = y.transpose(-3, -2), size.transpose(-1, -2), curved.transpose(-1, -2)
    if node.rotary is not None and p.role != "v":
        cos, sin = node.rotary(x, torch.arange(x.shape[-2], device=x.device)[None])
        y, factor = _rotate(y, cos, sin), _turning(cos, sin)
        size, curved, joint = size * factor, curved * factor, joint * factor
    group = node.q.heads // p.heads
    if group > 1:
        y, size, curved = (
            t.repeat_interleave(group, 2 if i else 1) for i, t in enumerate((y, size, curved))
        )
        joint = joint.repeat_interleave(group, -1) if joint.dim() else joint
    return _Part(y, size, curved, torch.minimum(joint, torch.linalg.vector_norm(size, dim=-1)))


def _turning(cos: Tensor, sin: Tensor) -> float:
    """The largest factor by which a rotation scales pairs.

    It is measured on cos and sin as computed, in float32.
    """
    return float((cos.double().square() + sin.double().square()).amax().sqrt()) * (1 + 1e-12)


def _rows(
    p: HeadRows, w: Tensor, term: Term, local: Local, whole: bool = False
) -> tuple[Key, Matrix, int]:
    """Arguments of `Local.sigma` for a projection's rows times a term's matrix.

    Returns:
        The key, the matrix, and the number of blocks of rows.
    """
    key = (id(p), *term.key)
    return key, local.times(key, w, term), 1 if whole else p.heads


@dataclass(frozen=True)
class _Moves:
    """How far the logits of a row move, up to a shift that is common to the row.

    All are [eps, batch, heads, t], with t the query token.

    Attributes:
        most: bound on the movement of any logit of the row.
        typical: bound on the standard deviation of the movements under p.
        bent: bound on the standard deviation of what a softcap's curve adds to the linear part.
    """

    most: Tensor
    typical: Tensor
    bent: Tensor | None = None


# How far the logits of each row move.
def _logit_moves(
    node: Attention, q: _Part, k: _Part, p: Tensor, hidden: Tensor, movement: Movement, local: Local
) -> _Moves:
    queries, keys = q.centre.detach(), k.centre.detach()
    plain = node.rotary is None and node.q_norm is None and node.k_norm is None
    if plain and node.softcap is None:
        by_query, by_key, deviation = _plain_moves(node, queries, keys, p, movement, local)
    elif node.softcap is not None:
        # A shift that is common to the row is no longer common behind the cap. So keys enter as
        # they are, not relative to their mean.
        by_query = q.size.unsqueeze(-1) * torch.linalg.vector_norm(keys, dim=-1).unsqueeze(-2)
        by_key = torch.linalg.vector_norm(queries, dim=-1).unsqueeze(-1) * k.size.unsqueeze(-2)
        deviation = q.size * _top(_second_moment(keys, p)).sqrt()
    else:
        by_query = q.size.unsqueeze(-1) * _distances(keys, p)
        by_key = torch.linalg.vector_norm(queries, dim=-1).unsqueeze(-1) * k.size.unsqueeze(-2)
        deviation = q.size * _top(_covariance(keys, p)).sqrt()
    by_key = by_key + q.size.unsqueeze(-1) * k.size.unsqueeze(-2)
    most = (by_query + by_key).masked_fill(hidden, 0.0).amax(-1)
    # The mean of squares under p is at most the largest weight times their sum.
    together = torch.linalg.vector_norm(queries, dim=-1) + q.size
    together = together * k.joint.unsqueeze(-1) * p.amax(-1).sqrt()
    typical = deviation + torch.minimum((p * by_key.square()).sum(-1).sqrt(), together)
    most, typical = abs(node.tau) * most, abs(node.tau) * typical
    if node.softcap is None:
        return _Moves(most, typical)
    cap = abs(node.softcap)
    curve = 0.5 * CURVATURE_UPPER["tanh"] / cap * most * typical
    return _Moves(most.clamp_max(2.0 * cap), typical, curve)


def _plain_moves(
    node: Attention, queries: Tensor, keys: Tensor, p: Tensor, movement: Movement, local: Local
) -> tuple[Tensor, Tensor, Tensor]:
    """Movements of logits where keys and queries are linear in the input.

    Norms of the products q_t W_k A and k_s W_q A are used here, with A the matrix of a term. They
    are smaller than products of norms.

    Returns:
        What the query's and what the key's movement do to each logit, and the standard deviation of
        the first under p.
    """
    by_query, by_key, deviation = [], [], []
    group = node.q.heads // node.k.heads
    covariance, lengths = _covariance(keys, p), torch.linalg.vector_norm(queries, dim=-1)
    apart, top = _distances(keys, p), _top(covariance).sqrt()
    for t in movement.terms:
        _, a, _ = _rows(node.q, weight(node.q.linear)[node.q.start : node.q.stop], t, local)
        _, b, _ = _rows(node.k, weight(node.k.linear)[node.k.start : node.k.stop], t, local)
        assert a.value is not None
        assert b.value is not None
        # r r^T = W_q A A^T W_q^T. So products with r have the norms of products with W_q A, in
        # d_head dimensions only.
        r = torch.linalg.qr(a.value.unflatten(0, (node.q.heads, -1)).mT).R.mT
        seen = _distances(keys @ r, p) + a.error * apart
        bent = _top(r.mT.unsqueeze(1) @ covariance @ r.unsqueeze(1)).sqrt() + a.error * top
        asks = queries @ b.value.unflatten(0, (node.k.heads, -1)).repeat_interleave(group, 0)
        length = torch.linalg.vector_norm(asks, dim=-1) + b.error * lengths
        by_query.append(t.size[:, :, None, :, None] * seen)
        deviation.append(t.size[:, :, None, :] * bent)
        by_key.append(length.unsqueeze(-1) * t.size[:, :, None, None, :])
    return sum_of(by_query), sum_of(by_key), sum_of(deviation)


def _covariance(points: Tensor, p: Tensor) -> Tensor:
    """Covariance of the points under each row of weights, [batch, heads, t, d, d]."""
    mean = p @ points
    return _second_moment(points, p) - mean.unsqueeze(-1) * mean.unsqueeze(-2)


def _second_moment(points: Tensor, p: Tensor) -> Tensor:
    """Mean of x x^T under each row of weights, [batch, heads, t, d, d]."""
    outer = (points.unsqueeze(-1) * points.unsqueeze(-2)).flatten(-2)
    return (p @ outer).unflatten(-1, points.shape[-1:] * 2)


def _top(c: Tensor) -> Tensor:
    """Upper bound on lambda_max of positive semidefinite matrices [..., d, d].

    The bound is norm_F(C^8)^(1/8).
    """
    trace = c.diagonal(dim1=-2, dim2=-1).sum(-1)
    scaled = c / trace.clamp_min(1e-300)[..., None, None]
    for _ in range(3):
        scaled = scaled @ scaled
    # 1e-12 of the trace covers what cancellation in the covariance may have cost.
    return trace.clamp_min(0.0) * (torch.linalg.matrix_norm(scaled) ** 0.125 + 1e-12)


def _distances(points: Tensor, weights: Tensor) -> Tensor:
    """Upper bound on norm2(points_s - sum_s' p_ts' points_s'), [batch, heads, t, s].

    It is the distance of each point from the mean of the points under the weights of query t.
    """
    mean = weights @ points
    squares = points.square().sum(-1).unsqueeze(-2) + mean.square().sum(-1).unsqueeze(-1)
    # 1e-12 of the squares covers cancellation, which costs a few thousand roundings of 1e-16.
    return (squares - 2.0 * mean @ points.mT + 1e-12 * squares).clamp_min(0.0).sqrt()


def _head(
    node: Attention, q: _Part, k: _Part, v: _Part, p: Tensor, hidden: Tensor, moves: _Moves
) -> tuple[Tensor, Tensor]:
    """Movement and remainder of every head's output, in 2-norm, both [eps, batch, heads, tokens].

    The proofs are in docs/maths.md, section 11. In its letters `most` is lam, `typical` is D,
    `radius` is R and `spread` is S. `once` and `twice` are g(lam) and g(2 lam), `bend` and
    `bend_twice` are h(lam) and h(2 lam).
    """
    values, most, typical = v.centre.detach(), moves.most, moves.typical
    radius = _distances(values, p).masked_fill(hidden, 0.0).amax(-1)
    # the largest standard deviation of the values under p, in one direction
    spread = _top(_covariance(values, p)).sqrt()
    moved = v.size.unsqueeze(-2).expand(*v.size.shape, p.shape[-1])
    largest = moved.masked_fill(hidden, 0.0).amax(-1)
    least = moved.masked_fill(hidden, float("inf")).amin(-1)
    joint = v.joint.unsqueeze(-1)
    mean = torch.minimum((p * moved).sum(-1), torch.linalg.vector_norm(p, dim=-1) * joint)
    square = torch.minimum((p * moved.square()).sum(-1), p.amax(-1) * joint.square())
    turn = torch.tanh(most / 2)  # bounds the total variation between p and p'
    by_values = torch.minimum(largest, mean + turn * (largest - least))
    once, twice = growth(most), growth(2 * most)
    by_weights = _least(
        2 * radius * turn, once * typical * radius, once * most * spread, twice * typical * spread
    )
    first = typical * spread
    bend, bend_twice = curvature(most), curvature(2 * most)
    curved = _least(
        1.5 * most.square() * bend * spread,
        2 * radius * typical.square() * bend_twice,
        2 * most * typical * spread * bend_twice,
        by_weights + first,
    )
    along = _least(2 * turn * largest, once * typical * largest, twice * typical * square.sqrt())
    bent = _second_order(node, q, k, p)
    beyond = (bent if moves.bent is None else bent + moves.bent) * spread
    # The last bound on the remainder is the whole movement plus its linear part. The linear part of
    # the logits is their movement without its second order, so first + beyond bounds what it does.
    return by_values + by_weights, _least(
        curved + along + beyond, by_values + by_weights + first + beyond + mean
    )


def _second_order(node: Attention, q: _Part, k: _Part, p: Tensor) -> Tensor:
    """Bound on the standard deviation, under p, of the logits' movement beyond its linear part."""
    tau = abs(node.tau)
    moved = (p * k.size.unsqueeze(-2).square()).sum(-1).sqrt()
    moved = torch.minimum(moved, p.amax(-1).sqrt() * k.joint.unsqueeze(-1))
    both = tau * q.size * moved
    if not bool(q.curved.any() | k.curved.any()):
        return both
    spread = _covariance if node.softcap is None else _second_moment
    apart = _top(spread(k.centre.detach(), p)).sqrt()
    bent = (p * k.curved.unsqueeze(-2).square()).sum(-1).sqrt()
    return both + tau * (
        q.curved * apart + torch.linalg.vector_norm(q.centre.detach(), dim=-1) * bent
    )


def _least(*bounds: Tensor) -> Tensor:
    """Entrywise minimum of bounds. A nan, which is 0 times inf, counts as no bound."""
    return torch.stack([b.nan_to_num(nan=float("inf"), posinf=float("inf")) for b in bounds]).amin(
        0
    )


def growth(x: Tensor) -> Tensor:
    """Upper bound on (e^x - 1) / x for x >= 0.

    This is the integral of e^(theta x) over theta in [0, 1].
    """
    small = 1.0 + x  # (e^x - 1) / x is at most 1 + x up to x = 1.79
    return torch.where(x < 1e-6, small, torch.expm1(x) / x.clamp_min(1e-300))


def curvature(x: Tensor) -> Tensor:
    """Upper bound on (e^x - 1 - x) / x^2 for x >= 0.

    This is the integral of (1 - theta) e^(theta x) over theta in [0, 1].
    """
    # The two power series are compared term by term: 2 * 3^(n - 2) <= n!
    small = 0.5 / (1.0 - x.clamp_max(1.0) / 3.0)
    return torch.where(x < 0.1, small, (torch.expm1(x) - x) / x.clamp_min(1e-300).square())
