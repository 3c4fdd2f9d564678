"""How far apart two attentions are on one input: the rule of `eta` for Attention.

The proof is in docs/maths/drift.md.
"""

from __future__ import annotations

from decimal import Decimal
from typing import Any

from lip_plugin.certificate.drift.rules import _SLIP, Sides, Streams, _unlike, difference, eta, step
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.base import rms
from lip_plugin.certificate.graph.decimals import (
    ONE,
    ZERO,
    add,
    below,
    div,
    exponential,
    mul,
    norm2,
    root,
    up,
)


@eta.rule(Attention)
def attention_eta(b: Attention, t: Any, r: Decimal, sides: Sides) -> Decimal:
    """Drift of attention, per head in 2-norms.

    The values of the two models differ by at most d_v. Their logits differ by at most S up to a
    shift of the row, which moves a mixture of values by at most 2 V tanh(S / 2). V is the size of
    the values in the model where it is smaller. So the drift of a head is at most d_v + 2 V
    tanh(S / 2).
    """
    settings = ("tau", "d_head", "d_in", "whole_norms", "softcap", "causal", "window")
    if any(getattr(b, k) != getattr(t, k) for k in settings) or (b.rotary is None) != (
        t.rotary is None
    ):
        raise _unlike(b, t, "attention with other settings")
    sizes = [
        [a.sizes(getattr(a, role), r, norms, getattr(a, f"{role}_norm", None)) for role in "qkv"]
        for a, norms in ((b, sides.base), (t, sides.tuned))
    ]
    d_q, d_k, d_v = (_heads(b, t, role, r, sides) for role in "qkv")
    tau, shifts, count = up(abs(b.tau)), _positions(b, t), range(b.q.heads)
    values = [min(x, y) for x, y in zip(sizes[0][2].sizes, sizes[1][2].sizes, strict=True)]
    options = []
    # <q_t, k_t> - <q_b, k_b> = <q_t - q_b, k_t> + <q_b, k_t - k_b>. The same holds with b and t
    # exchanged, and the loop tries both.
    for q, k in ((sizes[0][0], sizes[1][1]), (sizes[1][0], sizes[0][1])):
        by_q = [mul(tau, d_q[h], k.sizes[h]) for h in count]
        by_k = [mul(tau, q.sizes[h], d_k[h]) for h in count]
        logits = [add(by_q[h], by_k[h], shifts[h]) for h in count]
        if b.softcap is not None:
            logits = [min(x, mul(up(2), up(abs(b.softcap)))) for x in logits]
        options.append(norm2([add(d_v[h], mul(pull(logits[h]), values[h])) for h in count]))
        # The second way joins all heads by the one token that their queries come from. The sum of
        # norm2(q_h)^2 over the heads is at most the squared size of the whole q.
        shared = mul(tau, q.whole_size, max(mul(d_k[h], values[h]) for h in count))
        parts = (norm2([mul(x[h], values[h]) for h in count]) for x in (by_k, by_q, shifts))
        moved_by_k, *others = parts
        options.append(add(norm2(d_v), min(moved_by_k, shared), *others))
    return div(min(options), below(root(up(b.q.heads * b.d_head))))


def pull(s: Decimal) -> Decimal:
    """2 tanh(s / 2) = 2 - 4 / (e^s + 1), rounded up. It is at most s, and at most 2."""
    e = exponential(s)
    return up(2) if e.is_infinite() else min(s, add(up(2), -below(div(up(4), add(e, ONE)))))


def _positions(b: Attention, t: Attention) -> list[Decimal]:
    """How far the difference of the biases by position moves each head's logits.

    A shift of the whole row does not count. So this is half the spread of the differences.
    """
    if (b.bias is None) != (t.bias is None):
        raise _unlike(b, t, "attention with other position biases")
    if b.bias is None or t.bias is None:
        return [ZERO] * b.q.heads
    apart = difference(t.bias.weight, b.bias.weight)
    assert apart is not None
    # The last term covers the rounding of each difference.
    spread = (apart.amax(1) - apart.amin(1)) / 2 + apart.abs().amax(1) * 2.0**-51
    return [mul(up(x), _SLIP) for x in spread.tolist()]


def _heads(b: Attention, t: Attention, role: str, r: Decimal, sides: Sides) -> list[Decimal]:
    """2-norm, per query head, by which q, k or v of the two models differ on the same token.

    Norms and rotations of queries and keys are included. A key's bias adds the same to every logit
    of a row, unless a norm or a rotation comes after it (see Attention.sizes). The same is true of
    a difference of key biases, so it is left out then. A value's bias passes the mixture unchanged,
    so its difference counts in full.
    """
    p, pt = getattr(b, role), getattr(t, role)
    posts = (getattr(b, f"{role}_norm", None), getattr(t, f"{role}_norm", None))
    values = role == "v"
    turned = b.rotary is not None and not values
    seen = values or p.role == "q" or posts[0] is not None or turned
    width, radius = root(up(b.d_head)), mul(root(up(b.d_in)), r)
    offset = difference(pt.bias(), p.bias()) if seen else None
    biases = (
        [ZERO] * p.heads
        if offset is None
        else [mul(rms(part), width, _SLIP) for part in offset.chunk(p.heads)]
    )
    moved = [
        add(mul(s, radius), x)
        for s, x in zip(sides.diff[p.linear.name].heads[p.role], biases, strict=True)
    ]
    if posts[0] is not None:
        moved = _normed(b, t, role, moved, r, sides)
    if turned:
        factors = [up(abs(float(getattr(a.rotary, "attention_scaling", 1.0)))) for a in (b, t)]
        if factors[0] != factors[1]:
            raise _unlike(b, t, "attention with another rotation")
        moved = [mul(m, factors[0]) for m in moved]
    group = b.q.heads // p.heads
    return [m for m in moved for _ in range(group)]


def _normed(
    b: Attention, t: Attention, role: str, moved: list[Decimal], r: Decimal, sides: Sides
) -> list[Decimal]:
    """The differences of q or k behind their norms.

    A norm is over each head, or over the whole vector of all heads.
    """
    p, pt = getattr(b, role), getattr(t, role)
    posts = (getattr(b, f"{role}_norm"), getattr(t, f"{role}_norm"))
    before_b, before_t = b.sizes(p, r, sides.base, None), t.sizes(pt, r, sides.tuned, None)
    group = b.q.heads // p.heads
    if b.whole_norms:
        full = root(up(b.d_head * p.heads))
        radii = [div(norm2(s.sizes[::group]), below(full)) for s in (before_b, before_t)]
        # A key's bias is not in its size without a norm, but the norm reads it.
        extra = [div(norm2(x.head_biases()), below(full)) for x in (p, pt)]
        at = Streams(
            add(radii[0], extra[0]), add(radii[1], extra[1]), div(norm2(moved), below(full))
        )
        return [mul(step(*posts, at, sides).delta, full)] * p.heads
    width, out = root(up(b.d_head)), []
    for h, m in enumerate(moved):
        sizes = [
            add(s.sizes[h * group], x.head_biases()[h]) for s, x in ((before_b, p), (before_t, pt))
        ]
        at = Streams(div(sizes[0], below(width)), div(sizes[1], below(width)), div(m, below(width)))
        out.append(mul(step(*posts, at, sides).delta, width))
    return out
