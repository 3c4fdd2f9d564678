"""Blocks of a LoRA layer against their caps: the exact test, and the nearest feasible B.

They are needed for blocks whose norms alone do not prove that the cap holds (see enforce.py). The
letters Q, Y, Z, E, C, T and l are those at the head of lip_plugin/linalg/low_rank.py, where the
mathematics is; `into` and `back` are in factors.py. This file computes what that needs from W0.
These are products of W0, or of its eigenvectors, with a few columns. Each product reads all of W0,
so it is written in the orientation that is fast: for 8 columns (x^T w^T)^T is three times faster
than w x.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lip_plugin.integrations.peft.factors import Factors
from lip_plugin.linalg.low_rank import LowRankProblem, Spectrum
from lip_plugin.model.layout import Segment

# A block is left alone if the largest eigenvalue of T is at most this: norm <= cap * (1 + 5e-5).
ACCEPT = 1.0 + 1e-4
_ROOM = 1e-5  # additional room for a base at its cap, so that C is positive definite
_FAR = 1e3  # deltas longer than this many caps are shortened first, so that Z(l) does not cancel
# What is tried in turn on a block that is above its cap: the projection (None), once more for what
# rounding to the adapter's dtype has left, then B times each factor. The last one leaves W0 itself,
# which is feasible, and the set is convex.
_ATTEMPTS = (None, None, 0.98, 0.9, 0.5, 0.1, 0.0)
# Eigenvectors of frozen bases, by layer, with what they were computed from.
_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple, list[Spectrum]]] = WeakKeyDictionary()


def project_blocks_(near: list[Factors]) -> None:
    """Bring every capped block of these layers within its cap by changing B.

    All blocks of one shape are treated at once.
    """
    groups: dict[tuple, list[_Piece]] = defaultdict(list)
    for f in near:
        for p in _pieces(f):
            groups[(p.tall, p.hat_y.shape[1:], p.hat_y.device)].append(p)
    for pieces in groups.values():
        for factor in _ATTEMPTS:
            pieces = _attempt(pieces, factor)
            if not pieces:
                break


def _pieces(f: Factors) -> list[_Piece]:
    """Everything of W0 that does not change with B, in the coordinates of A."""
    assert f.layout is not None
    weight, spectra, q = f.weight(), spectra_of(f), f.full_coordinates()
    views = list(capped_blocks(f.layout, weight))
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = None
    if any(v.shape[-2] <= v.shape[-1] for _, v in views):
        y = _times(f.layout.matrix(weight).to(wide), q.to(wide)).double()
    return [
        _Piece(f, s, v, spectrum, q, y) for (s, v), spectrum in zip(views, spectra, strict=True)
    ]


def _times(w: Tensor, x: Tensor) -> Tensor:
    """w @ x for an x with few columns, computed from the other side."""
    return (x.mT @ w.mT).mT


class _Piece:
    """The blocks of one segment of one layer.

    Y = W0 Q, E is the change, and Z = Y + E. `hat` has the meaning that it has in LowRankProblem.
    """

    def __init__(
        self,
        owner: Factors,
        segment: Segment,
        w: Tensor,
        spectrum: Spectrum,
        q: Tensor,
        y: Tensor | None,
    ) -> None:
        self.owner, self.segment, self.spectrum = owner, segment, spectrum
        self.wide = spectrum.basis.dtype
        self.w, self.q = w, q
        self.rows = slice(segment.start, segment.stop)
        self.tall = w.shape[-2] > w.shape[-1]
        if self.tall:  # basis^T W0^T W0 Q = energy basis^T Q, so W0 need not be read
            inner = self._turned(q.expand(len(w), -1, -1))
            self.hat_y = spectrum.energy[:, :, None] * inner
            self.gram_y = inner.mT @ self.hat_y
        else:
            assert y is not None
            self.y = self._blocks(y[self.rows])
            self.hat_y = self._turned(self.y)

    def _blocks(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.segment.count, self.segment.d_out))

    def _turned(self, x: Tensor) -> Tensor:
        """basis^T x."""
        return _times(self.spectrum.basis.mT, x.to(self.wide)).double()

    def problem(self) -> LowRankProblem:
        """The question whether these blocks, as they are stored now, are within their caps."""
        e = self._blocks(self.owner.b(self.rows) @ self.owner.into)
        size = torch.linalg.vector_norm(e, dim=(-2, -1))
        self.short = (_FAR * self.spectrum.ceiling.sqrt() / size.clamp_min(1e-300)).clamp(max=1.0)
        self.e = e * self.short[:, None, None]
        if self.tall:
            through = _times(self.w.mT.to(self.wide), self.e.to(self.wide)).double()  # W0^T E
            hat_z = self.hat_y + self._turned(through)
            cross = self.q.mT @ through
            yz = self.gram_y + cross
            zz = yz + cross.mT + self.e.mT @ self.e
            gram = torch.cat([torch.cat([self.gram_y, yz], -1), torch.cat([yz.mT, zz], -1)], -2)
        else:
            hat_z = self.hat_y + self._turned(self.e)
            x = torch.cat([self.y, self.y + self.e], dim=-1)
            gram = x.mT @ x
        hat = torch.cat([self.hat_y, hat_z], dim=-1)
        return LowRankProblem(hat, gram, self.spectrum.energy, self.spectrum.ceiling, self.tall)

    def move(self, at: Tensor, hat: Tensor, shift: Tensor, g: Tensor) -> None:
        """Give blocks number `at` the B of Z(l) = Z - l (C + l)^-1 [Y, Z] G."""
        mu = (self.spectrum.ceiling[at] + shift)[:, None]
        inner = (hat @ g) / (mu - self.spectrum.energy[at])[:, :, None]
        change = _times(self.spectrum.basis[at], inner.to(self.wide))
        if self.tall:  # [Y, Z] G = W0 Q (G1 + G2) + E G2
            k = g.shape[-1]
            reads = (self.q @ (g[:, :k] + g[:, k:])).to(self.wide) + change
            through = _times(self.w[at].to(self.wide), reads).double()
            change = (self.e[at] @ g[:, k:] + through) / mu[:, :, None]
        change = -shift[:, None, None] * change.double()
        old = self._blocks(self.owner.b(self.rows))[at] * self.short[at, None, None]
        self.owner.write_blocks(self.segment, at, old + change @ self.owner.back)

    def shorten(self, at: Tensor, factor: float) -> None:
        """Multiply B of blocks number `at` by `factor`."""
        self.owner.write_blocks(
            self.segment, at, self._blocks(self.owner.b(self.rows))[at] * factor
        )


def _attempt(pieces: list[_Piece], factor: float | None) -> list[_Piece]:
    """Treat the blocks that are above their caps once. Returns the pieces that had some."""
    found = [p.problem() for p in pieces]
    batch = LowRankProblem.stack(found)
    far = torch.cat([p.short for p in pieces]) < 1.0
    top = batch.solve()[0]
    above = ((top > ACCEPT) | far).nonzero()[:, 0]
    if len(above) == 0:
        return []
    if factor is None:
        batch = batch[above]
        shift, g = batch.least_shift(top[above])
    touched, start = [], 0
    for p in pieces:
        mine = ((above >= start) & (above < start + p.segment.count)).nonzero()[:, 0]
        at, start = above[mine] - start, start + p.segment.count
        if len(at):
            touched.append(p)
            if factor is None:
                p.move(at, batch.hat[mine], shift[mine], g[mine])
            else:
                p.shorten(at, factor)
    return touched


def spectra_of(f: Factors) -> list[Spectrum]:
    """Spectra of the blocks of W0 with its frozen adapters.

    They come from the cache if nothing was written to W0 since they were computed.
    """
    key = f.sources()
    known = _CACHE.get(f.layer)
    if known is None or known[0] != key:
        assert f.layout is not None
        known = (key, [_spectrum(s, w) for s, w in capped_blocks(f.layout, f.weight())])
        _CACHE[f.layer] = known
    return known[1]


def _spectrum(segment: Segment, w: Tensor) -> Spectrum:
    d_out, d_in = w.shape[-2:]
    double = w.double()
    energy, basis = torch.linalg.eigh(double @ double.mT if d_out <= d_in else double.mT @ double)
    top = energy[:, -1].clamp_min(0.0).sqrt()
    assert segment.cap is not None
    limit = segment.cap * (d_out / d_in) ** 0.5
    ceiling = (top * (1.0 + _ROOM)).clamp_min(limit).square()
    return Spectrum(basis.to(torch.promote_types(w.dtype, torch.float32)), energy, ceiling)


def capped_blocks(layout: Any, weight: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    """The (segment, its blocks) pairs of the segments with a cap."""
    return ((s, v) for s, v in layout.views(weight) if s.cap is not None)
