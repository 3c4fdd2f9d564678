"""DoRA's magnitudes within what caps and budgets allow: W' = diag(g) V with V = W0 + s B A and g = m / rows(V).

norm(W'_b) <= max(g) norm(V_b), so g <= cap / norm(V_b) on the block's rows keeps the cap; and as
W' - W0 = (g - 1) W0 + g s B A, abs(g - 1) <= t with t norm(W0_b) + (1 + t) norm(s B_b A) <= budget keeps a budget.
V is held first (peft_lora.py), so norm(V_b) <= cap, and g <= 1 always does. The rows of V come without forming it:
with s A = into^T Q^T, Q orthonormal, and E = B into, rows(V)^2 = rows(W0)^2 + 2 sum(E * (W0 Q)) + rows(E)^2.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.integrations.peft.budget import limits
from lip_plugin.integrations.peft.factors import Factors, change_sizes
from lip_plugin.model.layers import is_transposed

_SLACK = 1e-5  # of float32: peft's own rows(V), ours, and their quotient
_ROWS: WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = WeakKeyDictionary()


def hold_magnitudes_(f: Factors, base_norms: list[Tensor], *, near: bool) -> None:
    """Clamp m into the range that cap and budget leave; entries within keep every bit.

    In bfloat16 m is 1/256 coarse, and no budget finer than that share of W0's norm can be kept: leave adapters in float32,
    as peft does by default.

    `base_norms`: sigma_max of W0's blocks, by held segment. `near`: V was projected, so its blocks may be at their caps.
    """
    m: Any = f.magnitude
    low, high = rows_of(f, refuse=False)  # a row that is zero now gets m = 0
    ceiling = torch.full_like(low, torch.inf)
    floor = torch.zeros_like(low)
    d_in = f.factors[0][0].shape[1]
    if f.layout is not None:
        caps = limits(f.layout, d_in)
        sizes = change_sizes([(f, s) for s, _ in caps])
        for (segment, cap), norm, size in zip(caps, base_norms, sizes, strict=True):
            v = (norm + size).clamp(max=cap) if near else norm + size
            _put(ceiling, segment, cap / v.clamp_min(1e-300))
    if f.budget is not None:
        budgets = limits(f.budget, d_in)
        sizes = change_sizes([(f, s) for s, _ in budgets])
        for (segment, budget), norm, size in zip(budgets, base_norms, sizes, strict=True):
            t = ((budget - size) / (norm + size)).clamp(0.0, 1.0)
            _put(ceiling, segment, torch.minimum(_take(ceiling, segment), 1.0 + t))
            _put(floor, segment, 1.0 - t)
    most = ceiling * low * (1.0 - _SLACK)
    least = torch.minimum(floor * high * (1.0 + _SLACK), most)
    now = m.detach().double()
    wanted = torch.minimum(torch.maximum(now, least), most)
    if f.budget is None:  # m may be negative: a row turned around is as long, but far from W0's
        wanted = torch.where(now < 0, torch.maximum(now, -most), wanted)
    off = (
        wanted - now
    ).abs() > 0.5 * _SLACK * now.abs()  # less is what rounding m to its dtype leaves
    if bool(off.any()):
        rounded = wanted.to(m.dtype)
        down = (wanted * (1.0 - torch.finfo(m.dtype).eps)).to(m.dtype)
        m.copy_(
            torch.where(off, torch.where(rounded.double().abs() > most, down, rounded), m.detach())
        )


def _put(rows: Tensor, segment: Any, per_block: Tensor) -> None:
    rows[segment.start : segment.stop] = per_block.repeat_interleave(segment.d_out)


def _take(rows: Tensor, segment: Any) -> Tensor:
    return rows[segment.start : segment.stop].view(segment.count, segment.d_out)[:, 0]


def rows_of(f: Factors, *, refuse: bool = True) -> tuple[Tensor, Tensor]:
    """Bounds from below and above of the 2-norms of V's rows, float64 [d_out].

    Raises UnsupportedModelError for a row that is zero, which DoRA divides by (unless told not to `refuse`).
    """
    weight = f.weight()
    matrix = weight.t() if is_transposed(f.layer.base_layer) else weight
    key = f.sources()
    known = _ROWS.get(f.layer)
    if known is None or known[0] != key:
        known = (key, matrix.double().square().sum(1))
        _ROWS[f.layer] = known
    wide = torch.promote_types(matrix.dtype, torch.float32)
    q = f.full_coordinates()  # in them B A is E, and no term is larger than what it adds up to
    e = f.b(slice(None)) @ f.into
    f.coordinates()
    cross = (e * (matrix.to(wide) @ q.to(wide)).double()).sum(1)
    own = e.square().sum(1)
    size = (known[1].sqrt() + own.sqrt()).square()
    squares = known[1] + 2.0 * cross + own
    low, high = (
        (squares - 1e-6 * size).clamp_min(0.0).sqrt(),
        (squares + 1e-6 * size).clamp_min(0.0).sqrt(),
    )
    if refuse and bool((low == 0).any()):
        row = int((low == 0).nonzero()[0])
        raise UnsupportedModelError(
            f"{f.name}: row {row} of W0 + s B A is zero, and DoRA divides by its length. Leave the layer out of target_modules "
            "(a fresh retrofit's output maps start at zero), or use a plain LoraConfig."
        )
    return low, high
