"""How far each token can have moved, as a sum of linear images of balls.

A change of the input moves the hidden state of token t. Here that movement is the sum over k of
A_k e_k, where norm2(e_k) is at most size_k[t]. Each A_k is a matrix of the model: the identity for
the embeddings, and an output map for each branch. When a linear map W follows, the movement is
bounded by norms of the products W A_k. These are smaller than products of norms.

Sizes are 2-norms, float64 [eps, batch, tokens], with one entry for each size eps of the ball.
Scalar factors are kept in the sizes. The norms of the products are proven (docs/maths.md, section
11), and each is computed once.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.certificate.robustness.kinks import Convex
from lip_plugin.linalg.norms import sigma_max_upper
from lip_plugin.linalg.spectrum import gamma

_UP = 1 + 1e-12  # a sum of a few thousand float64 squares is off by less than this
# The ids of the nodes whose weights are in a product. Names would not do, because fused maps may
# share one.
Key = tuple[int, ...]


@dataclass(frozen=True)
class Matrix:
    """A product of weights.

    Attributes:
        value: the product as computed, [d_out, d_in]. None stands for the identity.
        error: bound on the Frobenius norm of what computing it cost.
    """

    value: Tensor | None = None
    error: float = 0.0

    def times(self, w: Tensor) -> Matrix:
        """The product w @ self.

        Entrywise abs(fl(W A) - W A) <= gamma_n abs(W) abs(A), and A itself was off by `error`.
        """
        if self.value is None:
            return Matrix(w)
        w_f, a_f = float(w.norm()), float(self.value.norm())
        # The factor 1.01 covers the rounding of the two Frobenius norms.
        return Matrix(w @ self.value, 1.01 * (gamma(w.shape[1]) * w_f * a_f + w_f * self.error))


@dataclass(frozen=True)
class Term:
    """One term A_k e_k of a movement.

    Attributes:
        key: the nodes whose weights are in A_k. Two terms with the same key have the same matrix.
        matrix: A_k.
        size: bound on the 2-norm of e_k at each token, [eps, batch, tokens].
        given: bound on the 2-norm of e_k over all tokens together, [eps, batch]. It is given where
            more is known than the sizes say.
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
    """What the nodes of one local walk share.

    It also keeps products of matrices and their norms, so that each is computed once.

    Attributes:
        products: whether the terms of a sum are kept apart, so that products of matrices are
            formed. Otherwise each residual sum is collapsed into one ball, which is looser.
        remainders: a list in which each node records what its linearization at the centre leaves
            out (see `Remainder`). None records nothing.
    """

    products: bool = True
    remainders: list[Remainder] | None = None
    _norms: dict[tuple[str, int, Key], Tensor] = field(default_factory=dict)
    _matrices: dict[Key, Matrix] = field(default_factory=dict)

    def times(self, key: Key, w: Tensor, term: Term) -> Matrix:
        """The product w A of a term's matrix A, remembered under `key`."""
        if key not in self._matrices:
            self._matrices[key] = term.matrix.times(w)
        return self._matrices[key]

    def sigma(self, key: Key, matrix: Matrix, blocks: int = 1) -> Tensor:
        """Proven bound on sigma_max of each of `blocks` equal blocks of rows, float64 [blocks]."""
        if matrix.value is None:
            return torch.ones((), dtype=torch.float64)
        if ("sigma", blocks, key) not in self._norms:
            norms = sigma_max_upper(matrix.value.unflatten(0, (blocks, -1))) + matrix.error
            self._norms["sigma", blocks, key] = norms
        return self._norms["sigma", blocks, key]

    def row(self, key: Key, matrix: Matrix) -> Tensor:
        """Bound on the largest 2-norm of a row."""
        return self.rows(key, matrix).amax()

    def rows(self, key: Key, matrix: Matrix) -> Tensor:
        """Bound on the 2-norm of each row."""
        if matrix.value is None:
            return torch.ones(1, dtype=torch.float64)
        if ("rows", 1, key) not in self._norms:
            norms = torch.linalg.vector_norm(matrix.value, dim=-1) * _UP
            self._norms["rows", 1, key] = norms + matrix.error
        return self._norms["rows", 1, key]


@dataclass(frozen=True)
class Remainder:
    """What a node's linearization at the centre leaves out of its output.

    The output moves by y' - y = J (x' - x) + rho, with J the Jacobian at the centre. The last
    dimension of y is cut into `heads` equal parts, and rho is bounded in each of them.

    Attributes:
        y: the output at the centre, [batch, tokens, d].
        two: bound on norm2(rho), float64 [eps, batch, tokens, heads].
        one: bound on norm1(rho), of the same shape.
        sums: bounds on the sums of `two` and of `one` over tokens, each [eps, batch]. None if none
            are known beyond adding up.
        kinks: for a convex function, what bounds the loss of a margin by it. None if unknown.
    """

    y: Tensor
    two: Tensor
    one: Tensor
    sums: tuple[Tensor, Tensor] | None = None
    kinks: Convex | None = None

    def norms(self, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """2-norms and largest absolute entries of a gradient with respect to y.

        Returns:
            Both as [batch, tokens, heads].
        """
        parts = gradient.unflatten(-1, (self.two.shape[-1], -1))
        return torch.linalg.vector_norm(parts, dim=-1), parts.abs().amax(-1)


@dataclass(frozen=True)
class Movement:
    """The movement of every token, as a sum of terms (see the top of this file)."""

    terms: tuple[Term, ...]

    @staticmethod
    def ball(size: Tensor, joint: Tensor | None = None) -> Movement:
        """Any movement of 2-norm at most `size` at each token, [eps, batch, tokens].

        `joint` [eps, batch] bounds its 2-norm over all tokens together, if more is known of that.
        """
        return Movement((Term((), Matrix(), size, joint),))

    def scaled(self, factor: float) -> Movement:
        """The movement of factor * x.

        Balls are symmetric, so the sign of the factor does not matter.
        """
        return Movement(
            tuple(
                Term(t.key, t.matrix, t.size * abs(factor), t.joint * abs(factor))
                for t in self.terms
            )
        )

    def linear(self, node: Linear, local: Local) -> Movement:
        """The movement of W x + b."""
        w = weight(node)
        terms = []
        for t in self.terms:
            key = (id(node), *t.key)
            terms.append(Term(key, local.times(key, w, t), t.size, t.given))
        return Movement(tuple(terms))

    def plus(self, other: Movement) -> Movement:
        """The movement of a sum of two values.

        Two images of balls under the same matrix become one.
        """
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
        """One ball around all of the movement."""
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
