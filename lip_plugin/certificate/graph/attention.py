"""The node `Attention`: multi-head softmax attention, without its output map.

The node runs attention and bounds it. Its rule starts from how fast the output of one head moves,
in 2-norms. Let Q, K and V bound the sizes of q, k and v, where biases that softmax cannot see are
left out of K and V. Let D_q, D_k and D_v be their Lipschitz constants. The output moves for three
reasons:

    values move    D_v           the output is a convex mixture of D_v-Lipschitz maps
    keys move      tau Q D_k V   when logits move, the output moves by a covariance of logits and
    queries move   tau D_q K V   values, which is at most the product of their standard deviations

Values and keys move with the same tokens, and their effects are uncorrelated over the mixture. So
they add as squares. This is not so where a rotation or a norm treats the keys of different tokens
differently; then they add plainly.

Heads are joined in two ways, and the smaller bound is taken. The first way joins whole heads, each
with its own norms. The second way joins the heads term by term. For a term with the query, it may
use that one token's query serves all heads: the 2-norm of its movement (or its size) over all heads
together is at most that of the whole q.

The proofs are in docs/maths.md, section 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import torch
from torch import Tensor

from lip_plugin.certificate.graph.base import Bound, Node, ProvenNorms, Watch, rms
from lip_plugin.certificate.graph.containers import Chain
from lip_plugin.certificate.graph.decimals import ONE, ZERO, add, below, div, mul, norm2, root, up
from lip_plugin.certificate.graph.nodes import Linear, Norm, Scale
from lip_plugin.model.position import OffsetBias


class Rotary:
    """A library's rotation by position, as one layer uses it.

    It turns pairs of the first `width` coordinates of a head, and multiplies these coordinates by
    `scale`. It leaves the others as they are.

    Args:
        module: the library's module, which gives cos and sin.
        layer_type: what the module is asked with, where layers of one model rotate differently.
            None where all layers rotate alike.
    """

    def __init__(self, module: Any, layer_type: str | None) -> None:
        self.module, self.layer_type = module, layer_type

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin, each [batch, tokens, width]."""
        if self.layer_type is None:
            return self.module(x, positions)
        return self.module(x, positions, self.layer_type)

    @property
    def scale(self) -> float:
        """The factor that yarn and longrope put on cos and sin. It is 1 for all other kinds."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        return float(getattr(self.module, f"{prefix}attention_scaling", 1.0))

    @property
    def attention_scaling(self) -> float:
        """Bound on the factor of any coordinate. One that is not turned has the factor 1."""
        return max(1.0, abs(self.scale))


def attentions(nodes: Sequence[Node]) -> Iterator[tuple[Node, Attention]]:
    """Every attention among residual and parallel nodes, in running order.

    Each is given as (the node in front of it in its branch, the attention).
    """
    for chain in (branch for node in nodes for branch in node.added()):
        for before, after in zip(chain.nodes, chain.nodes[1:], strict=False):
            first = after.nodes[0] if isinstance(after, Chain) else after
            if isinstance(first, Attention):
                yield before, first


@dataclass
class HeadRows:
    """One of q, k, v: the rows [start, stop) of a linear map, cut into heads of equal size.

    Attributes:
        role: "q", "k" or "v".
        linear: the linear map. A fused one also has the rows of the other two.
        heads: the number of heads.
    """

    role: str
    linear: Linear
    start: int
    stop: int
    heads: int

    def bias(self) -> Tensor | None:
        bias = self.linear.bias()
        return None if bias is None else bias[self.start : self.stop]

    def head_biases(self) -> list[Decimal]:
        """Bounds on the norm2 of each head's bias."""
        bias = self.bias()
        if bias is None:
            return [Decimal(0)] * self.heads
        size = root(up((self.stop - self.start) // self.heads))
        return [mul(rms(part), size) for part in bias.chunk(self.heads)]


@dataclass
class Attention(Node):
    """softmax(tau q k^T + mask) v for all heads, concatenated. q and k may be normed and rotated.

    Attributes:
        q, k, v: the rows of the linear maps. k and v may have fewer heads than q; then each of
            their heads serves a group of query heads.
        tau: the factor on the logits.
        d_head: the width of a head.
        d_in: the width of the input.
        q_norm, k_norm: the norm slots behind q and k, or None.
        rotary: the rotation of q and k, or None.
        whole_norms: whether the norms of q and k are over all heads together, and not over each.
        softcap: c, if the logits become c tanh(logit / c), else None. It is there only with a
            rotation, because the rule with a softcap is proven for turned keys only.
        causal, window: which tokens a query sees in `run`. No bound depends on it.
        bias: what position adds to the logits in `run`. No Lipschitz constant depends on it. If the
            logits are nothing but this bias, tau is 0.
    """

    name: str
    q: HeadRows
    k: HeadRows
    v: HeadRows
    tau: float
    d_head: int
    d_in: int
    q_norm: Norm | Scale | None = None
    k_norm: Norm | Scale | None = None
    rotary: Any = None
    whole_norms: bool = False
    softcap: float | None = None
    causal: bool = True
    window: int | None = None
    bias: OffsetBias | None = None

    def run(self, x: Tensor, watch: Watch | None = None) -> Tensor:
        outputs = {id(p.linear): p.linear for p in (self.q, self.k, self.v)}
        computed = {key: linear.run(x, watch) for key, linear in outputs.items()}
        q, k, v = (computed[id(p.linear)][..., p.start : p.stop] for p in (self.q, self.k, self.v))
        if self.whole_norms:
            q, k = self._normed(q, k)
        q, k, v = (t.unflatten(-1, (-1, self.d_head)) for t in (q, k, v))
        if not self.whole_norms:
            q, k = self._normed(q, k)
        q, k, v = (t.transpose(-3, -2) for t in (q, k, v))
        if self.rotary is not None:
            positions = torch.arange(x.shape[-2], device=x.device)[None]
            cos, sin = self.rotary(x, positions)
            q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        group = self.q.heads // self.k.heads
        k, v = k.repeat_interleave(group, -3), v.repeat_interleave(group, -3)
        logits = self.tau * q @ k.transpose(-1, -2)
        if self.softcap is not None:
            logits = self.softcap * torch.tanh(logits / self.softcap)
        logits = self.biased(logits)
        weights = logits.masked_fill(self._hidden(logits), float("-inf")).softmax(-1)
        if watch is not None:
            watch.attention(weights)
        return (weights @ v).transpose(-3, -2).flatten(-2)

    def biased(self, logits: Tensor) -> Tensor:
        """The logits [..., heads, tokens, tokens], with the bias by position added."""
        if self.bias is None:
            return logits
        positions = torch.arange(logits.shape[-1], device=logits.device)
        return logits + self.bias(positions, positions).detach().to(logits.dtype)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = q if self.q_norm is None else self.q_norm.run(q)
        return q, k if self.k_norm is None else self.k_norm.run(k)

    def _hidden(self, logits: Tensor) -> Tensor:
        """For each query, the keys that it does not see, as booleans [tokens, tokens]."""
        everything = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        hidden = everything.triu(1) if self.causal else ~everything
        return hidden if self.window is None else hidden | everything.tril(-self.window)

    def sizes(
        self, p: HeadRows, r: Decimal, norms: ProvenNorms, post: Norm | Scale | None
    ) -> _Sizes:
        """Bound q, k or v in 2-norms, for inputs of token norm at most r.

        Args:
            p: q, k or v.
            r: bound on the token norm of the input.
            norms: proven norms of the weights.
            post: the norm slot behind q or k, or None.

        Returns:
            Bounds for each query head. A head of k or v is repeated for its group.
        """
        table, width = norms[p.linear.name], root(up(self.d_head))
        radius = mul(root(up(self.d_in)), r)
        turned = self.rotary is not None and p.role != "v"
        # A key's bias adds the same to every logit of a row, unless a norm or a rotation comes
        # after it, and softmax does not see that. A value's bias passes any mixture unchanged.
        # Neither changes how fast the output moves, so both are left out.
        seen = p.role == "q" or post is not None or turned
        biases = p.head_biases() if seen else [ZERO] * p.heads
        constants = list(table.heads[p.role])
        sizes = [add(mul(s, radius), b) for s, b in zip(constants, biases, strict=True)]
        whole = table.whole[p.role]
        whole_size = min(add(mul(whole, radius), norm2(biases)), norm2(sizes))
        if post is not None and self.whole_norms:
            # Each head is a part of one normed vector, so the bounds of the whole hold for it.
            full = root(up(self.d_head * p.heads))
            b = post.bound(div(whole_size, below(full)), norms)
            whole, whole_size = mul(whole, b.lipschitz), mul(b.radius, full)
            constants, sizes = [whole] * p.heads, [whole_size] * p.heads
        elif post is not None:
            bounds = [post.bound(div(s, below(width)), norms) for s in sizes]
            sizes = [mul(b.radius, width) for b in bounds]
            constants = [mul(c, b.lipschitz) for c, b in zip(constants, bounds, strict=True)]
            whole, whole_size = mul(whole, max(b.lipschitz for b in bounds)), norm2(sizes)
        if turned:
            factor = up(abs(float(getattr(self.rotary, "attention_scaling", 1.0))))
            sizes, constants = [mul(s, factor) for s in sizes], [mul(c, factor) for c in constants]
            whole, whole_size = mul(whole, factor), mul(whole_size, factor)
        group = self.q.heads // p.heads
        return _Sizes(
            [c for c in constants for _ in range(group)],
            [s for s in sizes for _ in range(group)],
            whole,
            whole_size,
        )

    def tau_upper(self) -> Decimal:
        """Bound on the factor between the logits and the q.k of the bare linear maps.

        It includes tau, the rotation's factor, and constants in the norm slots of q and k. It does
        not include kept norms there.
        """
        factors = [n.scale for n in (self.q_norm, self.k_norm) if isinstance(n, Scale)]
        turned = float(getattr(self.rotary, "attention_scaling", 1.0))
        return mul(*(up(abs(f)) for f in (self.tau, turned, turned, *factors)))

    def bound(self, r: Decimal, norms: ProvenNorms) -> Bound:
        q = self.sizes(self.q, r, norms, self.q_norm)
        k = self.sizes(self.k, r, norms, self.k_norm)
        v = self.sizes(self.v, r, norms, None)
        tau, heads = up(abs(self.tau)), range(self.q.heads)
        query_moves = [mul(tau, q.constants[h], k.sizes[h], v.sizes[h]) for h in heads]
        key_moves = [mul(tau, q.sizes[h], k.constants[h], v.sizes[h]) for h in heads]
        joint_query = mul(tau, q.whole, max(mul(k.sizes[h], v.sizes[h]) for h in heads))
        joint_key = mul(tau, q.whole_size, max(mul(k.constants[h], v.sizes[h]) for h in heads))
        # Values and keys add as squares only if each token's key comes from its input by the same
        # linear map. Otherwise they add plainly.
        join = norm2 if self.rotary is None and not isinstance(self.k_norm, Norm) else _sum
        together = norm2(
            [add(join([v.constants[h], key_moves[h]]), query_moves[h]) for h in heads],
        )
        apart = add(
            join([norm2(v.constants), min(norm2(key_moves), joint_key)]),
            min(norm2(query_moves), joint_query),
        )
        # So far the constants are between 2-norms. Between RMS norms they are this factor times
        # that, with d_out = heads d_head.
        factor = root(div(up(self.d_in), up(self.q.heads * self.d_head)))
        group = self.q.heads // self.v.heads
        biases = [b for b in self.v.head_biases() for _ in range(group)]
        out = norm2([add(v.sizes[h], biases[h]) for h in heads])
        radius = mul(out, root(div(ONE, up(self.q.heads * self.d_head))))
        return Bound(radius, mul(min(apart, together), factor))

    def logit_bound(self, r: Decimal, norms: ProvenNorms) -> Decimal:
        """A number B such that all logits of a row lie in [-B, B], up to a shift common to the row.

        Biases by position are included. The bound holds for inputs of token norm at most r.
        """
        q = self.sizes(self.q, r, norms, self.q_norm)
        k = self.sizes(self.k, r, norms, self.k_norm)
        content = mul(
            up(abs(self.tau)), max(mul(a, b) for a, b in zip(q.sizes, k.sizes, strict=True))
        )
        return content if self.bias is None else add(content, up(self.bias.spread() / 2))


@dataclass(frozen=True)
class _Sizes:
    """2-norm bounds of q, k or v at one token.

    Attributes:
        constants: the Lipschitz constant of each query head.
        sizes: the size of each query head.
        whole: the Lipschitz constant of all heads together.
        whole_size: the size of all heads together.
    """

    constants: list[Decimal]
    sizes: list[Decimal]
    whole: Decimal
    whole_size: Decimal


def _sum(values: list[Decimal]) -> Decimal:
    return add(*values)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x_i, x_(i + w/2)) of the first w coordinates, and keep the others."""
    cos, sin = cos.to(x.dtype).unsqueeze(-3), sin.to(x.dtype).unsqueeze(-3)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def smallest_entropy_lower(logit_bound: float, visible: int) -> float:
    """Proven lower bound on the entropy of softmax over logits in [-B, B].

    As one logit grows, the entropy rises until the logit is at the softmax mean of the others, and
    falls from there. So the minimum is at a vertex of the cube, where some number m of the logits
    are at B and the others at -B. All m are tried, because m = 1 is not always the worst. For small
    B the worst m is half of the logits. The proof is in docs/maths.md, section 6.

    Args:
        logit_bound: B.
        visible: the number of logits.

    Returns:
        The bound in nats.
    """
    if visible <= 1:
        return 0.0
    m = torch.arange(1, visible, dtype=torch.float64)
    gap = min(2.0 * logit_bound, 1e6)
    log_z = torch.log(m) + torch.log1p(
        (visible - m) / m * torch.exp(torch.tensor(-gap, dtype=torch.float64))
    )
    low = torch.exp(-gap - log_z) * (visible - m)  # softmax weight of all low logits together
    entropy = log_z + low * gap
    # Taken off for the rounding of a handful of float64 operations on numbers below
    # log(visible) + 1.
    return max(0.0, float(entropy.amin()) - 1e-12 * (1.0 + float(entropy.amin())))
