"""How far a token can have moved: a sum of linear images of balls, one size per token.

The movement of token t is sum over k of A_k e_k, with norm2(e_k) <= size_k[t]. The A_k are matrices of the model
(the identity for the embeddings, an output map for each branch), so a linear map that follows is bounded by the
norms of products W A_k, not by products of norms. Sizes are float64 [eps, batch, tokens], 2-norms; scalars are
kept in the sizes, and the matrices' norms are proven (docs/maths.md, section 11) and computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.certificate.robustness.kinks import Kinks
from lip_plugin.linalg.norms import sigma_max_upper
from lip_plugin.linalg.spectrum import gamma

_UP = 1 + 1e-12  # more than sums of a few thousand float64 squares can be off
Key = tuple[
    int, ...
]  # ids of the nodes whose weights are in a product; names of fused maps may repeat


@dataclass(frozen=True)
class Matrix:
    """A product of weights [d_out, d_in] (None: the identity), and norm_F of what computing it cost."""

    value: Tensor | None = None
    error: float = 0.0

    def times(self, w: Tensor) -> Matrix:
        """w @ self; |fl(W A) - W A| <= gamma_n |W| |A| entrywise, and A was off by `error`."""
        if self.value is None:
            return Matrix(w)
        w_f, a_f = float(w.norm()), float(self.value.norm())
        # 1.01: the two Frobenius norms are themselves rounded
        return Matrix(w @ self.value, 1.01 * (gamma(w.shape[1]) * w_f * a_f + w_f * self.error))


@dataclass(frozen=True)
class Term:
    """A_k, keyed by the nodes whose weights are in it, and the sizes of e_k.

    `given` [eps, batch] bounds the 2-norm of e_k over all tokens together, where more is known than the sizes say.
    """

    key: Key
    matrix: Matrix
    size: Tensor
    given: Tensor | None = None

    @property
    def joint(self) -> Tensor:
        """Bound on the 2-norm of e_k over all tokens together, [eps, batch]."""
        apart = torch.linalg.vector_norm(self.size, dim=-1)
        return apart if self.given is None else torch.minimum(apart, self.given)


@dataclass
class Local:
    """What a local walk shares: norms of products, computed once; whether products are formed at all.

    `remainders`: set to a list to collect what the linearization at the centre leaves out (see `Remainder`).
    """

    products: bool = True
    remainders: list[Remainder] | None = None
    _norms: dict[tuple[str, int, Key], Tensor] = field(default_factory=dict)
    _matrices: dict[Key, Matrix] = field(default_factory=dict)

    def times(self, key: Key, w: Tensor, term: Term) -> Matrix:
        """The product w A of a term's matrix, remembered under `key`."""
        if key not in self._matrices:
            self._matrices[key] = term.matrix.times(w)
        return self._matrices[key]

    def sigma(self, key: Key, matrix: Matrix, blocks: int = 1) -> Tensor:
        """Proven sigma_max of each of `blocks` equal row blocks, float64 [blocks]."""
        if matrix.value is None:
            return torch.ones((), dtype=torch.float64)
        if ("sigma", blocks, key) not in self._norms:
            norms = sigma_max_upper(matrix.value.unflatten(0, (blocks, -1))) + matrix.error
            self._norms["sigma", blocks, key] = norms
        return self._norms["sigma", blocks, key]

    def row(self, key: Key, matrix: Matrix) -> Tensor:
        """Largest 2-norm of a row, from above."""
        return self.rows(key, matrix).amax()

    def rows(self, key: Key, matrix: Matrix) -> Tensor:
        """2-norm of each row, from above."""
        if matrix.value is None:
            return torch.ones(1, dtype=torch.float64)
        if ("rows", 1, key) not in self._norms:
            norms = torch.linalg.vector_norm(matrix.value, dim=-1) * _UP
            self._norms["rows", 1, key] = norms + matrix.error
        return self._norms["rows", 1, key]


@dataclass(frozen=True)
class Remainder:
    """What a node's linearization at the centre leaves out of its output y [batch, tokens, d].

    y' - y = J (x' - x) + rho with norm2(rho) <= `two` and norm1(rho) <= `one`, both float64
    [eps, batch, tokens, heads], for each of the `heads` equal parts of the last dimension.
    """

    y: Tensor
    two: Tensor
    one: Tensor
    sums: tuple[Tensor, Tensor] | None = (
        None  # bounds on the sums of `two` and of `one` over tokens, [eps, batch]
    )
    kinks: Kinks | None = None  # where f is linear but for them

    def norms(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """(2-norms, largest entries) of a gradient with respect to y, [batch, tokens, heads]."""
        parts = gradient.unflatten(-1, (self.two.shape[-1], -1))
        return torch.linalg.vector_norm(parts, dim=-1), parts.abs().amax(-1)


@dataclass(frozen=True)
class Movement:
    """The movement of every token as a sum of terms; see the module's first lines."""

    terms: tuple[Term, ...]

    @staticmethod
    def ball(size: Tensor, joint: Tensor | None = None) -> Movement:
        """Any movement of 2-norm at most size [eps, batch, tokens], and at most joint over all tokens together."""
        return Movement((Term((), Matrix(), size, joint),))

    def scaled(self, factor: float) -> Movement:
        """Of factor * x; balls are symmetric, so the sign does not matter."""
        return Movement(
            tuple(
                Term(t.key, t.matrix, t.size * abs(factor), t.joint * abs(factor))
                for t in self.terms
            )
        )

    def linear(self, node: Linear, local: Local) -> Movement:
        """Of W x + b."""
        w = weight(node)
        terms = []
        for t in self.terms:
            key = (id(node), *t.key)
            terms.append(Term(key, local.times(key, w, t), t.size, t.given))
        return Movement(tuple(terms))

    def plus(self, other: Movement) -> Movement:
        """Of a sum; images under the same matrix are one ball."""
        joined = {t.key: t for t in self.terms}
        for t in other.terms:
            if t.key in joined:
                own = joined[t.key]
                t = Term(t.key, t.matrix, own.size + t.size, own.joint + t.joint)
            joined[t.key] = t
        return Movement(tuple(joined.values()))

    def total(self, local: Local) -> Tensor:
        """Bound on the 2-norm of the movement, [eps, batch, tokens]."""
        return sum_of([t.size * local.sigma(t.key, t.matrix) for t in self.terms])

    def entry(self, local: Local) -> Tensor:
        """Bound on the largest entry of the movement, [eps, batch, tokens]."""
        return sum_of([t.size * local.row(t.key, t.matrix) for t in self.terms])

    def entries(self, local: Local) -> Tensor:
        """Bound on each entry of the movement, [eps, batch, tokens, d]."""
        return sum_of([t.size.unsqueeze(-1) * local.rows(t.key, t.matrix) for t in self.terms])

    def joint(self, local: Local) -> Tensor:
        """Bound on the 2-norm of the movement over all tokens together, [eps, batch]."""
        return sum_of([t.joint * local.sigma(t.key, t.matrix) for t in self.terms])

    def collapsed(self, local: Local) -> Movement:
        """One ball around all of it."""
        return Movement.ball(self.total(local), self.joint(local))


def weight(node: Linear) -> Tensor:
    """The matrix of a linear map, float64 [d_out, d_in]."""
    return node.weight().detach().double()


def sum_of(values: list[Tensor]) -> Tensor:
    """Sum of at least one tensor."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total
