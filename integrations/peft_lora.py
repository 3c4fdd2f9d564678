"""peft's adapters within caps: every block of the weight that a LoRA or DoRA layer multiplies with, in the RMS->RMS norm.

    retrofit(base); model = get_peft_model(base, LoraConfig(...)); attach_projection(optimizer, model)

After each step, block by block (blocks differ in rows of B, so each is a problem of its own):
1. the size e of the block's change comes from k x k matrices; where norm(W0_b) + e is within the cap, nothing is done;
2. elsewhere B is replaced by a point of {B : norm(W0_b + s B_b A) <= cap}, with A fixed (linalg/low_rank.py, with
   s A = R Q^T and E = B R). What is feasible keeps every bit;
3. budgets (peft_budget.py) are kept first, and once more behind 2, by shortening; DoRA's magnitudes last (peft_dora.py).

A base AT its caps leaves little room: scaling B would give nothing at all, since almost every
direction leaves the ball. Z(l) keeps what turns or shrinks the singular directions that A reads and
filters out what would lengthen them: training goes on, slower. The cure is room: retrofit with a
`w_max` above the norms of the base. `project_adapters` says what is refused. OFT and HRA need none of this.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lip_plugin.blocks import Segment
from lip_plugin.certificate.maps import register_weight_reader
from lip_plugin.errors import ConfigError
from lip_plugin.integrations.peft_budget import budgets_of, clip_to_budget_, has_budget, limits
from lip_plugin.integrations.peft_dora import hold_magnitudes_, rows_of
from lip_plugin.integrations.peft_factors import Factors, change_sizes
from lip_plugin.integrations.peft_layers import (
    BUDGET,
    TURNING,
    active,
    base_weight,
    lora_layers,
    merged_weight,
    parameters_of,
    read_weight,
    refuse_merged,
    wrapped_layers,
)
from lip_plugin.linalg.low_rank import LowRankProblem, Spectrum
from lip_plugin.linalg.norms import rms_to_rms_upper, sigma_max_exact, sigma_max_upper
from lip_plugin.optim.projection import BlockNorms, check_finite, register_projector

ACCEPT = 1.0 + 1e-4  # largest eigenvalue of T that is left alone: norm <= cap * (1 + 5e-5)
WITHIN = 1.0 + 5e-5
BASE_TOLERANCE = 1e-3  # a base may exceed its cap by what storage in bf16 does to it
_ROOM = 1e-5  # a base at its cap is given this much, so that C is positive definite
_FAR = 1e3  # deltas longer than this many caps are shortened first, so that Z(l) does not cancel
# What is tried in turn on a block that is above its cap: the projection, again (what rounding to the
# adapter's dtype left), then shorter deltas. W0 is feasible and the set convex, so it ends.
_ATTEMPTS = (None, None, 0.98, 0.9, 0.5, 0.1, 0.0)


# Of frozen bases, by layer: what they were found from, and the norms of their blocks; the same for their eigenvectors.
_NORMS: WeakKeyDictionary[nn.Module, tuple[tuple, list[Tensor]]] = WeakKeyDictionary()
_CACHE: WeakKeyDictionary[nn.Module, tuple[tuple, list[Spectrum]]] = WeakKeyDictionary()


@torch.no_grad()
def project_adapters(model: nn.Module, method: str | None = None, lr: float = 0.0) -> int:
    """Bring every block of W0 + s B A within its cap * (1 + 1e-4), RMS->RMS, by changing B only (and DoRA's m).

    Adapters that are active and trainable move together (all active ones, if none is trainable);
    frozen active ones count as part of W0; inactive ones are not looked at. `method` and `lr` are
    not used: on the adapters there is one map. Called by every projection of a model with caps or budgets.

    Returns:
        The number of blocks looked at.

    Raises:
        UnsupportedModelError: an adapter without a rule (see peft_layers.py), on an embedding, or on a layer without a
            cap or budget.
        ConfigError: W0 is above its cap. TrainerError: adapters are merged into W0.
        NonFiniteError: a factor holds nan or inf. No adapter was changed.
    """
    found, count, named = [], 0, []
    for name, layer, kind in wrapped_layers(model):
        if kind in TURNING:
            refuse_merged(name, layer)
            named += [(f"{name}.{n}", t) for a in active(layer) for n, t in parameters_of(layer, a, kind)]
            continue
        factors = Factors(name, layer)
        if factors.factors:
            found.append(factors)
            named += factors.named
            held = factors.layout or factors.budget
            assert held is not None
            count += sum(s.count for s in held.segments if s.cap is not None)
    check_finite(named)
    bases = [_base_norms(f) for f in found]  # refuses a base above its caps
    for f in found:
        f.coordinates()
        if f.magnitude is not None:
            rows_of(f)  # refuses a zero row
    clip_to_budget_([f for f in found if f.budget is not None])
    near = _near(found, bases)
    _project(near)
    _shorten_to_budget_([f for f in near if f.budget is not None])
    for f, norms in zip(found, bases, strict=True):
        if f.magnitude is not None:
            f.coordinates()
            hold_magnitudes_(f, norms, near=f in near)
    return count


def _near(found: list[Factors], bases: list[list[Tensor]]) -> list[Factors]:
    """Layers with a block for which norm(W0_b) + norm(change) says too little; one synchronization."""
    asked, flags = [], []
    for f, norms in zip(found, bases, strict=True):
        caps = limits(f.layout, f.factors[0][0].shape[1]) if f.layout is not None else []
        asked += [(f, segment, norm, cap) for (segment, cap), norm in zip(caps, norms, strict=False)]
    if not asked:
        return []
    sizes = change_sizes([(f, segment) for f, segment, _, _ in asked])
    for size, (_, _, norm, cap) in zip(sizes, asked, strict=True):
        flags.append(((size > 0) & (norm + size > cap * WITHIN)).any())
    over = {id(f) for (f, *_), flag in zip(asked, torch.stack(flags).tolist(), strict=True) if flag}
    return [f for f in found if id(f) in over]


def _project(near: list[Factors]) -> None:
    """The nearest feasible B where the triangle inequality does not do: all blocks of one shape at once."""
    groups: dict[tuple, list[_Piece]] = defaultdict(list)
    for f in near:
        for p in _pieces(f):
            groups[(p.tall, p.hat_y.shape[1:], p.y.device)].append(p)
    for pieces in groups.values():
        for factor in _ATTEMPTS:
            pieces = _attempt(pieces, factor)
            if not pieces:
                break


def _shorten_to_budget_(factors: list[Factors]) -> None:
    """Scale the blocks that the projection left above their budget: the smaller change is within the cap as well (convex)."""
    for f in factors:
        f.coordinates()
        caps = budgets_of(f)
        for (segment, budget), size in zip(caps, change_sizes([(f, s) for s, _ in caps]), strict=True):
            at = (size > budget * WITHIN).nonzero()[:, 0]
            if len(at):
                rows = f.b(slice(segment.start, segment.stop)).unflatten(0, (segment.count, segment.d_out))
                f.write_blocks(segment, at, rows[at] * (budget / size[at] * (1 - 2**-8))[:, None, None])


def _pieces(f: Factors) -> list[_Piece]:
    """Coordinates of A, and everything of W0 that does not change with B."""
    assert f.layout is not None
    weight, spectra, q = f.weight(), _spectra(f), f.full_coordinates()
    wide = torch.promote_types(weight.dtype, torch.float32)
    y = (f.layout.matrix(weight).to(wide) @ q.to(wide)).double()
    views = zip(_capped(f.layout, weight), spectra, strict=True)
    return [_Piece(f, segment, view, spectrum, y) for (segment, view), spectrum in views]


class _Piece:
    """The blocks of one segment of one layer."""

    def __init__(self, owner: Factors, segment: Segment, w: Tensor, spectrum: Spectrum, y: Tensor) -> None:
        self.owner, self.segment, self.w, self.spectrum = owner, segment, w, spectrum
        self.rows = slice(segment.start, segment.stop)
        self.tall = w.shape[-2] > w.shape[-1]
        self.y = self._blocks(y[self.rows])
        self.hat_y = self._hat(self.y)

    def _blocks(self, rows: Tensor) -> Tensor:
        return rows.unflatten(0, (self.segment.count, self.segment.d_out))

    def _hat(self, x: Tensor) -> Tensor:
        basis = self.spectrum.basis
        x = x.to(basis.dtype)
        return (basis.mT @ (self.w.mT.to(basis.dtype) @ x if self.tall else x)).double()

    def problem(self) -> LowRankProblem:
        """The question whether these blocks, as stored now, are within their caps."""
        e = self._blocks(self.owner.b(self.rows) @ self.owner.into)
        size = torch.linalg.vector_norm(e, dim=(-2, -1))
        self.short = (_FAR * self.spectrum.ceiling.sqrt() / size.clamp_min(1e-300)).clamp(max=1.0)
        self.z = self.y + e * self.short[:, None, None]
        self.x = torch.cat([self.y, self.z], dim=-1)
        hat = torch.cat([self.hat_y, self._hat(self.z)], dim=-1)
        return LowRankProblem(hat, self.x.mT @ self.x, self.spectrum.energy, self.spectrum.ceiling, self.tall)

    def move(self, at: Tensor, hat: Tensor, shift: Tensor, g: Tensor) -> None:
        """Give blocks number `at` the B of Z(l) = Z - l (C + l)^-1 [Y, Z] G."""
        mu = (self.spectrum.ceiling[at] + shift)[:, None]
        inner = (hat @ g) / (mu - self.spectrum.energy[at])[:, :, None]
        basis = self.spectrum.basis
        change = basis[at] @ inner.to(basis.dtype)
        if self.tall:
            change = (self.x[at] @ g + self.w[at].to(basis.dtype) @ change) / mu[:, :, None]
        change = -shift[:, None, None] * change
        old = self._blocks(self.owner.b(self.rows))[at] * self.short[at, None, None]
        self.owner.write_blocks(self.segment, at, old + change @ self.owner.back)

    def shorten(self, at: Tensor, factor: float) -> None:
        """Multiply B of blocks number `at`."""
        self.owner.write_blocks(self.segment, at, self._blocks(self.owner.b(self.rows))[at] * factor)


def _attempt(pieces: list[_Piece], factor: float | None) -> list[_Piece]:
    """Treat the blocks that are above their caps once; gives the pieces that had some."""
    found = [p.problem() for p in pieces]
    batch = LowRankProblem.stack(found)
    far = torch.cat([p.short for p in pieces]) < 1.0
    above = ((batch.solve(torch.zeros_like(batch.ceiling))[0] > ACCEPT) | far).nonzero()[:, 0]
    if len(above) == 0:
        return []
    if factor is None:
        batch = batch[above]
        shift = batch.least_shift()
        g = batch.solve(shift)[1]
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


def _base_norms(f: Factors) -> list[Tensor]:
    """[count] proven sigma_max of the blocks of W0 (with its frozen adapters), of each held segment; from the cache.

    Raises ConfigError for a base above its caps.
    """
    if f.layout is None and f.kind != "dora":
        return []  # a plain budget asks nothing of W0
    key = f.sources()
    known = _NORMS.get(f.layer)
    if known is None or known[0] != key:
        weight = f.weight()
        layout = f.layout or f.budget
        assert layout is not None
        views = list(_capped(layout, weight.float() if weight.dtype != torch.float64 else weight))
        norms = [sigma_max_upper(w) for _, w in views]
        for (segment, w), norm in zip(views, norms, strict=True) if f.layout is not None else ():
            _refuse_above(f.name, segment, w, norm)
        known = (key, norms)
        _NORMS[f.layer] = known
    return known[1]


def _refuse_above(name: str, segment: Segment, w: Tensor, norm: Tensor) -> None:
    assert segment.cap is not None
    limit = segment.cap * (segment.d_out / w.shape[-1]) ** 0.5
    if float(norm.max()) <= limit * (1.0 + BASE_TOLERANCE):
        return
    worst = float(sigma_max_exact(w[int(norm.argmax())])) / limit
    if worst > 1.0 + BASE_TOLERANCE:
        raise ConfigError(
            f"{name}: the base weight's {segment.role} block is {worst:.4g} times its cap {segment.cap:g}, "
            "so no adapter could be within it. Call project_(model) once, before training the adapters, or "
            "retrofit with a larger w_max."
        )


def _spectra(f: Factors) -> list[Spectrum]:
    """Spectra of the blocks of W0 (with its frozen adapters), from the cache if nothing was written since."""
    key = f.sources()
    known = _CACHE.get(f.layer)
    if known is None or known[0] != key:
        assert f.layout is not None
        known = (key, [_spectrum(s, w) for s, w in _capped(f.layout, f.weight())])
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


def _capped(layout: Any, weight: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    return ((s, v) for s, v in layout.views(weight) if s.cap is not None)


@torch.no_grad()
def merged_block_norms(model: nn.Module) -> list[BlockNorms]:
    """Proven upper RMS->RMS norms of the merged blocks over their caps, one entry for each adapted layer with caps.

    And for each layer with a budget one of its change over the budget, under the name "<layer> (change)".
    """
    norms = []
    for name, layer, _ in wrapped_layers(model):
        merged = merged_weight(layer)
        layout = getattr(layer.base_layer, "layout", None)
        if layout is not None:
            norms.append(_over(name, layout, merged))
        if BUDGET in layer.__dict__:
            change = merged - base_weight(layer).double()
            norms.append(_over(f"{name} (change)", layer.__dict__[BUDGET], change))
    return norms


def _over(name: str, layout: Any, weight: Tensor) -> BlockNorms:
    blocks = list(_capped(layout, weight))
    worst = max((float(rms_to_rms_upper(w).max()) / s.cap for s, w in blocks if s.cap), default=0.0)
    return BlockNorms(name, worst, sum(s.count for s, _ in blocks))


register_projector(project_adapters, merged_block_norms, holds=has_budget)
register_weight_reader(read_weight)

__all__ = ["lora_layers", "merged_block_norms", "merged_weight", "project_adapters", "read_weight"]
