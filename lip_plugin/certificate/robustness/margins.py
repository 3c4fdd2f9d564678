"""Margins that hold: for which eps of a grid no change within eps can turn a prediction.

There are two bounds on how far z_i - z_j can move, where z are the logits at token t, i is the
predicted class and j another class. Each is proven, and the smaller one counts.

- The bound from sizes adds up, over the terms k of the local movement before the head, the norm of
  (w_i - w_j) A_k times the term's size. Here w_i and w_j are rows of the head. One pass gives it
  for all pairs of classes.
- The bound from gradients is eps times the dual norm of the gradient of z_i - z_j at the centre,
  plus a part for each node that is not linear. That part is the gradient with respect to the node's
  output times what the node's linearization leaves out. It needs a backward pass for each pair, and
  is asked for those pairs that hold a token back.

Proofs are in docs/maths.md, section 11, which also says what is and is not proven about rounding.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import lip_plugin.certificate.robustness.attention_rule  # noqa: F401  its rule is registered on import
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.containers import Chain
from lip_plugin.certificate.graph.decimals import to_float, up
from lip_plugin.certificate.graph.nodes import Linear, Scale, Softcap
from lip_plugin.certificate.robustness.balls import Ball
from lip_plugin.certificate.robustness.kinks import Convex
from lip_plugin.certificate.robustness.movement import Local, Remainder, sum_of, weight
from lip_plugin.certificate.robustness.rules import move
from lip_plugin.certificate.weight_norms import weight_norms
from lip_plugin.errors import CertificateError
from lip_plugin.linalg.norms import rms_norm
from lip_plugin.progress import progress

# Taken off margins, as a share of the largest logit, and added to every bound. It covers the
# rounding of the centre's float64 pass, of which 1e-13 was measured, and that of sums of sizes.
_SLACK = 1e-9
_CHUNK = 1 << 24  # numbers in one temporary tensor, which is 128 MB in float64


@dataclass(frozen=True)
class Found:
    """What was proven about a batch. All tensors are [batch, tokens].

    Attributes:
        count: how many of the grid's eps are proven for the prediction, from the smallest on.
        prediction: index of the largest logit.
        correct: whether the prediction is the label. It is true everywhere without labels.
    """

    count: Tensor
    prediction: Tensor
    correct: Tensor


class Certifier:
    """Both bounds, for batches of one model on one grid of eps.

    Norms of products of matrices are shared by all batches.

    Args:
        graph: the model's graph.
        ball: which changes are allowed, and their norm.
        eps: the grid, increasing.
        refine: backward passes that are spent on a prediction at most.

    Raises:
        CertificateError: the last node is not a linear head.
    """

    def __init__(self, graph: Graph, ball: Ball, eps: Tensor, refine: int) -> None:
        nodes = list(graph.body.nodes)
        while isinstance(nodes[-1], Softcap) or (
            isinstance(nodes[-1], Scale) and nodes[-1].scale > 0
        ):
            # A node that increases with each logit, and is the same for all of them, changes no
            # prediction.
            nodes.pop()
        if not isinstance(nodes[-1], Linear):
            raise CertificateError(
                f"{graph.body.nodes[-1].name}: a certified radius needs "
                "a linear head as the last node."
            )
        self.graph, self.ball, self.eps, self.refine = graph, ball, eps, refine
        self.head, self.body = nodes[-1], Chain("hidden", nodes[:-1])
        self.local = Local()
        self.norms: ProvenNorms = weight_norms(graph)

    def run(self, inputs: Tensor, labels: Tensor | None) -> Found:
        """Find how many eps of the grid are proven for each token's prediction.

        A classifier has one token of logits.

        Args:
            inputs: token ids [batch, tokens], or pixels [batch, channels, height, width].
            labels: [batch, tokens], or None.
        """
        with torch.no_grad():
            point = self.ball.point(inputs)
            x = self.ball.enter(point)
            logits = self.head.run(self.body.run(x))
        prediction = logits.argmax(-1)
        correct = (
            torch.ones_like(prediction, dtype=torch.bool)
            if labels is None
            else prediction == labels
        )
        need = self._margins(logits, prediction)
        counts = self._from_sizes(point, x, prediction, need)
        if self.refine:
            self._from_gradients(point, prediction, correct, need, counts)
        return Found(counts.amin(-1), prediction, correct)

    def _margins(self, logits: Tensor, prediction: Tensor) -> Tensor:
        """The margins z_i - z_j less what rounding may have added, [batch, tokens, classes].

        The margin is inf for j = i.
        """
        best = logits.gather(-1, prediction.unsqueeze(-1))
        slack = _SLACK * (1.0 + logits.abs().amax(-1, keepdim=True))
        return (best - logits - slack).scatter(-1, prediction.unsqueeze(-1), float("inf"))

    def _from_sizes(self, point: Tensor, x: Tensor, prediction: Tensor, need: Tensor) -> Tensor:
        """Number of eps that sizes of movements prove for each pair, [batch, tokens, classes]."""
        classes, present = prediction.unique(return_inverse=True)
        counts = torch.zeros(need.shape, dtype=torch.int16, device=need.device)
        alive = torch.ones_like(need, dtype=torch.bool)
        w = weight(self.head)
        rows = self._pair_norms(w, classes)
        with torch.no_grad():
            for some in self.chunks_of_eps(x):
                _, movement = move(
                    self.body, x, self.ball.movement(point, x, some, self.local), self.local
                )
                pairs = [self._term_norms(w, classes, t) for t in movement.terms]
                for i, e in enumerate(some.tolist()):
                    # The global certificate bounds the movement as well.
                    cap = rows * self._global(x, e)
                    for b, t in (
                        (b, t)
                        for b in range(x.shape[0])
                        for t in _chunks(need.shape[1], w.shape[0])
                    ):
                        at = present[b, t]
                        moved = sum_of(
                            [
                                p[at] * m.size[i, b, t, None]
                                for p, m in zip(pairs, movement.terms, strict=True)
                            ]
                        )
                        alive[b, t] &= torch.minimum(moved, cap[at]) * (1 + _SLACK) < need[b, t]
                    counts += alive
        return counts

    def chunks_of_eps(self, x: Tensor) -> Sequence[Tensor]:
        """The grid, in parts whose attention logits fit in one temporary tensor."""
        heads = self.graph.parts.n_heads
        return self.eps.split(max(1, _CHUNK // (4 * heads * x.shape[0] * x.shape[1] ** 2)))

    def _global(self, x: Tensor, eps: float) -> float:
        """Bound on the 2-norm by which any token's hidden state moves, from the global certificate.

        It uses the ball that holds all centres of the batch and their changes.
        """
        moved = self.ball.token_norm(eps, self.norms)
        radius = up(float(rms_norm(x).amax()) * (1 + 1e-12) + moved)
        return to_float(self.body.bound(radius, self.norms).lipschitz) * moved * self.head.d_in**0.5

    # Bounds on norm2((w_i - w_j) A), with A the matrix of a term, [classes, rows].
    def _term_norms(self, w: Tensor, classes: Tensor, term: Any) -> Tensor:
        matrix = self.local.times((id(self.head), *term.key), w, term)
        assert matrix.value is not None
        return self._pair_norms(matrix.value, classes) + 2.0 * matrix.error

    def _pair_norms(self, rows: Tensor, classes: Tensor) -> Tensor:
        """Upper bound on norm2 of the difference of each row of a class in `classes` and every row.

        Its shape is [classes, rows].
        """
        exact = torch.cdist(rows[classes], rows, compute_mode="donot_use_mm_for_euclid_dist")
        return exact * (1 + 1e-12)

    def _from_gradients(
        self, point: Tensor, prediction: Tensor, correct: Tensor, need: Tensor, counts: Tensor
    ) -> None:
        """Raise `counts` of the pairs of classes that hold a token back.

        Each backward pass serves one pair of each sequence. A token is done when the pair that
        holds it back has had its pass, when the whole grid is proven, or when `refine` passes are
        spent on it.
        """
        linear = Linearized(self, point)
        open_ = correct & (counts.amin(-1) < len(self.eps))
        spent = torch.zeros(open_.shape, dtype=torch.int64)
        seen = torch.zeros_like(need, dtype=torch.bool)
        with progress(int(open_.sum()) * self.refine, "certified radius") as bar:
            while bool(open_.any()):
                at = [(b, int(row.nonzero()[0])) for b, row in enumerate(open_) if bool(row.any())]
                picked = [(b, t, int(counts[b, t].argmin())) for b, t in at]
                found = linear.moved(picked, prediction)
                for (b, t, j), moved in zip(picked, found, strict=True):
                    alive = (moved * (1 + _SLACK) < need[b, t, j]).long().cumprod(0)
                    counts[b, t, j] = max(int(counts[b, t, j]), int(alive.sum()))
                    seen[b, t, j], spent[b, t] = True, spent[b, t] + 1
                    worst = int(counts[b, t].argmin())
                    done = bool(seen[b, t, worst]) or int(counts[b, t, worst]) == len(self.eps)
                    if done or spent[b, t] >= self.refine:
                        open_[b, t] = False
                        bar.update(self.refine - int(spent[b, t]))
                    bar.update(1)


class Linearized:
    """The model linearized at a centre, for the whole grid of eps.

    It also holds bounds on what the linearization leaves out at each node.
    """

    def __init__(self, certifier: Certifier, point: Tensor) -> None:
        self.eps, self.ball = certifier.eps.to(point.device), certifier.ball
        self.point = point.detach().requires_grad_(True)
        x = self.ball.enter(self.point)
        self.points: list[Remainder] = []
        two: list[list[Tensor]] = []
        sums: list[list[Tensor]] = []
        kinks: list[list[Convex | None]] = []
        # The centre is the same for all parts of the grid, so what its gradients need is kept for
        # the first part only.
        for i, some in enumerate(certifier.chunks_of_eps(x)):
            certifier.local.remainders = []
            with torch.set_grad_enabled(i == 0):
                movement = self.ball.movement(self.point, x, some, certifier.local)
                y, _ = move(certifier.body, x, movement, certifier.local)
                if i == 0:
                    self.points, self.logits = certifier.local.remainders, certifier.head.run(y)
            two.append([torch.stack([r.two, r.one]).detach() for r in certifier.local.remainders])
            kinks.append([r.kinks for r in certifier.local.remainders])
            sums.append([_sums_of(r).detach() for r in certifier.local.remainders])
        certifier.local.remainders = None
        # For each node these are the 2-norms and the 1-norms of its remainder,
        # [2, eps, batch, tokens, heads].
        self.sizes = [torch.cat(of, 1) for of in zip(*two, strict=True)]
        self.kinks = [
            None if of[0] is None else of[0].joined(list(of[1:])) for of in zip(*kinks, strict=True)
        ]
        # Bounds on their sums over tokens, [2, eps, batch].
        self.sums = [torch.cat(of, 1) for of in zip(*sums, strict=True)]

    def moved(self, picked: list[tuple[int, int, int]], prediction: Tensor) -> list[Tensor]:
        """Bound on the movement of z_i - z_j for some pairs of classes.

        Args:
            picked: (batch, token, j) of each pair, at most one for each sequence of the batch.
            prediction: the class i of each token, [batch, tokens].

        Returns:
            One tensor [eps] for each pair.
        """
        margins = [self.logits[b, t, prediction[b, t]] - self.logits[b, t, j] for b, t, j in picked]
        wanted = [self.point, *(r.y for r in self.points)]
        first, *others = torch.autograd.grad(
            torch.stack(margins).sum(), wanted, retain_graph=True, allow_unused=True
        )
        moved = self.eps[:, None] * self.ball.dual(first)
        at_points = zip(others, self.points, self.sizes, self.sums, self.kinks, strict=True)
        for gradient, point, size, sums, kinks in at_points:
            if gradient is not None:
                two, one = point.norms(gradient)
                apart = torch.minimum(_times(two, size[0]), _times(one, size[1]))
                if kinks is not None:
                    apart = torch.minimum(apart, kinks.price(gradient).unsqueeze(-1))
                part = apart.sum((-1, -2))
                together = torch.minimum(
                    _times(two.amax((-1, -2)), sums[0]), _times(one.amax((-1, -2)), sums[1])
                )
                moved = moved + torch.minimum(part, together)
        return [moved[:, b] for b, _, _ in picked]


def _times(gradient: Tensor, size: Tensor) -> Tensor:
    """A product in which a zero gradient gives zero, even if the size is infinite."""
    return torch.where(gradient == 0, 0.0, gradient * size)


def _sums_of(point: Remainder) -> Tensor:
    """Bounds on the sums over tokens of 2-norms and of 1-norms, [2, eps, batch].

    They are inf where none is known.
    """
    if point.sums is not None:
        return torch.stack(point.sums)
    return torch.full(
        (2, *point.two.shape[:2]), float("inf"), dtype=torch.float64, device=point.two.device
    )


# Slices of tokens whose margins fit in one temporary tensor.
def _chunks(tokens: int, classes: int) -> Iterable[slice]:
    step = max(1, _CHUNK // max(1, classes))
    return (slice(i, i + step) for i in range(0, tokens, step))
