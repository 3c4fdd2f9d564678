"""Multi-head softmax attention, before its output map: run and bound.

In 2-norms, for one head, with Q, K, V bounds on the size of q, k, v (biases that softmax cannot see
left out of K and V) and D_q, D_k, D_v their Lipschitz constants:

    values move    D_v           a convex mixture of D_v-Lipschitz maps
    keys move      tau Q D_k V   moving the weights changes the output by a covariance of logits and
    queries move   tau D_q K V   values, at most the logits' deviation times the values'

Values and keys move with the same tokens, and their effects are uncorrelated over the mixture, so
they add as squares, unless a rotation or a norm treats each token's key differently. Heads are
joined two ways and the smaller is taken, term by term: each head with its own norms, or the query's
movement (or size) spread over the heads: its 2-norm over all heads is at most that of the whole q.
Proofs: docs/maths.md.
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
    """A library's rotation, asked for the kind of one layer; pairs of the first `width` coordinates turn.

    What it computes is an isometry times `scale` on these, and nothing on the others.
    """

    def __init__(self, module: Any, layer_type: str | None) -> None:
        self.module, self.layer_type = module, layer_type

    def __call__(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin [batch, tokens, width]."""
        if self.layer_type is None:
            return self.module(x, positions)
        return self.module(x, positions, self.layer_type)

    @property
    def scale(self) -> float:
        """What yarn and longrope multiply cos and sin with; 1 for all others."""
        prefix = "" if self.layer_type is None else f"{self.layer_type}_"
        return float(getattr(self.module, f"{prefix}attention_scaling", 1.0))

    @property
    def attention_scaling(self) -> float:
        """Bound on the factor of any coordinate: those that are not turned keep theirs."""
        return max(1.0, abs(self.scale))


def attentions(nodes: Sequence[Node]) -> Iterator[tuple[Node, Attention]]:
    """(what is in front of it in its branch, attention) of every layer, in running order."""
    for chain in (branch for node in nodes for branch in node.added()):
        for before, after in zip(chain.nodes, chain.nodes[1:], strict=False):
            first = after.nodes[0] if isinstance(after, Chain) else after
            if isinstance(first, Attention):
                yield before, first


@dataclass
class HeadRows:
    """One of q, k, v: the rows [start, stop) of a linear map, cut into heads of equal size."""

    role: str
    linear: Linear
    start: int
    stop: int
    heads: int

    def bias(self) -> Tensor | None:
        bias = self.linear.bias()
        return None if bias is None else bias[self.start : self.stop]

    def head_biases(self) -> list[Decimal]:
        """2-norms of each head's bias."""
        bias = self.bias()
        if bias is None:
            return [Decimal(0)] * self.heads
        size = root(up((self.stop - self.start) // self.heads))
        return [mul(rms(part), size) for part in bias.chunk(self.heads)]


@dataclass
class Attention(Node):
    """softmax(tau q k^T + mask) v for all heads, concatenated; q and k may be normed and rotated.

    Attributes:
        whole_norms: the norms of q and k are over all heads together, not over each.
        softcap: c of c tanh(logit / c), for turned keys only; None for none.
        causal, window: which tokens a query sees in `run`; no bound depends on it.
        bias: what position adds to the logits, in `run`; no Lipschitz constant depends on it. tau is 0 if it is all.
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
        """The logits [..., heads, tokens, tokens] with what position adds."""
        if self.bias is None:
            return logits
        positions = torch.arange(logits.shape[-1], device=logits.device)
        return logits + self.bias(positions, positions).detach().to(logits.dtype)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        q = q if self.q_norm is None else self.q_norm.run(q)
        return q, k if self.k_norm is None else self.k_norm.run(k)

    def _hidden(self, logits: Tensor) -> Tensor:
        """Which keys each query does not see [tokens, tokens]."""
        everything = torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device)
        hidden = everything.triu(1) if self.causal else ~everything
        return hidden if self.window is None else hidden | everything.tril(-self.window)

    def sizes(
        self, p: HeadRows, r: Decimal, norms: ProvenNorms, post: Norm | Scale | None
    ) -> _Sizes:
        """2-norm bounds on one of q, k, v at input token norm r, each kv head repeated for its group."""
        table, width = norms[p.linear.name], root(up(self.d_head))
        radius = mul(root(up(self.d_in)), r)
        turned = self.rotary is not None and p.role != "v"
        # A key's bias adds the same to every logit of a row, unless a norm or a rotation comes
        # after it, and a value's bias passes any mixture unchanged: neither moves what is bounded.
        seen = p.role == "q" or post is not None or turned
        biases = p.head_biases() if seen else [ZERO] * p.heads
        constants = list(table.heads[p.role])
        sizes = [add(mul(s, radius), b) for s, b in zip(constants, biases, strict=True)]
        whole = table.whole[p.role]
        whole_size = min(add(mul(whole, radius), norm2(biases)), norm2(sizes))
        if post is not None and self.whole_norms:  # every head is part of one normed vector
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
        """The factor on q.k, everything but the linear maps included; kept norms on q and k left out."""
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
        # uncorrelated only if every token's key comes from its input by the same linear map
        join = norm2 if self.rotary is None and not isinstance(self.k_norm, Norm) else _sum
        together = norm2(
            [add(join([v.constants[h], key_moves[h]]), query_moves[h]) for h in heads],
        )
        apart = add(
            join([norm2(v.constants), min(norm2(key_moves), joint_key)]),
            min(norm2(query_moves), joint_query),
        )
        # 2-norm to 2-norm so far; as RMS norms, times sqrt(d_in / (heads d_head))
        factor = root(div(up(self.d_in), up(self.q.heads * self.d_head)))
        group = self.q.heads // self.v.heads
        biases = [b for b in self.v.head_biases() for _ in range(group)]
        out = norm2([add(v.sizes[h], biases[h]) for h in heads])
        radius = mul(out, root(div(ONE, up(self.q.heads * self.d_head))))
        return Bound(radius, mul(min(apart, together), factor))

    def logit_bound(self, r: Decimal, norms: ProvenNorms) -> Decimal:
        """B such that all logits of every row lie, up to a common shift, in [-B, B], biases by position included."""
        q = self.sizes(self.q, r, norms, self.q_norm)
        k = self.sizes(self.k, r, norms, self.k_norm)
        content = mul(
            up(abs(self.tau)), max(mul(a, b) for a, b in zip(q.sizes, k.sizes, strict=True))
        )
        return content if self.bias is None else add(content, up(self.bias.spread() / 2))


@dataclass(frozen=True)
class _Sizes:
    """2-norm bounds of q, k or v: per query head, and over all heads of one token together."""

    constants: list[Decimal]
    sizes: list[Decimal]
    whole: Decimal
    whole_size: Decimal


def _sum(values: list[Decimal]) -> Decimal:
    return add(*values)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, halves convention: pairs (x_i, x_(i + w/2)) of the first w coordinates turned."""
    cos, sin = cos.to(x.dtype).unsqueeze(-3), sin.to(x.dtype).unsqueeze(-3)
    turned, kept = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
    a, b = turned.chunk(2, dim=-1)
    turned = turned * cos + torch.cat((-b, a), dim=-1) * sin
    return torch.cat((turned, kept), dim=-1) if kept.shape[-1] else turned


def smallest_entropy_lower(logit_bound: float, visible: int) -> float:
    """Proven lower bound, in nats, on the entropy of softmax over `visible` logits in [-B, B].

    Along one logit the entropy rises to the mean of the others and then falls, so the minimum lies
    at a vertex of the cube: some m logits at B, the others at -B. All m are tried; m = 1 is not
    always the worst (for small B, half of them is).
    """
    if visible <= 1:
        return 0.0
    m = torch.arange(1, visible, dtype=torch.float64)
    gap = min(2.0 * logit_bound, 1e6)
    log_z = torch.log(m) + torch.log1p(
        (visible - m) / m * torch.exp(torch.tensor(-gap, dtype=torch.float64))
    )
    low = torch.exp(-gap - log_z) * (visible - m)  # weight of all the low logits together
    entropy = log_z + low * gap
    # rounding of a handful of float64 operations on numbers below log(visible) + 1
    return max(0.0, float(entropy.amin()) - 1e-12 * (1.0 + float(entropy.amin())))
