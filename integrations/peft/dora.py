"""DoRA's magnitudes m, held within what caps and budgets allow.

A DoRA layer multiplies with W' = diag(g) V, where V = W0 + s B A and g = m / rows(V). rows(V) are
the 2-norms of the rows of V. For each block b of rows:

- Caps: norm(W'_b) <= max(g) norm(V_b). So g <= cap / norm(V_b) on its rows keeps the cap. V itself
  is brought within the cap first (enforce.py). Then norm(V_b) <= cap, so g <= 1 always keeps it.
- Budgets: W' - W0 = diag(g - 1) W0 + diag(g) s B A. So abs(g - 1) <= t keeps the budget if
  t norm(W0_b) + (1 + t) norm(s B_b A) <= budget.

rows(V) are computed without forming V. In the coordinates of factors.py the change is E Q^T with
orthonormal columns of Q, so rows(V)^2 = rows(W0)^2 + 2 sum(E * (W0 Q)) + rows(E)^2.
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

_SLACK = 1e-5  # float32 rounding of peft's rows(V), of ours, and of their quotient
_ROWS: WeakKeyDictionary[nn.Module, tuple[tuple, Tensor]] = WeakKeyDictionary()


def hold_magnitudes_(f: Factors, base_norms: list[Tensor], *, near: bool) -> None:
    """Clamp m into the range that cap and budget leave. Entries within it keep every bit.

    bfloat16 is 1/256 coarse, so in it no budget finer than that share of W0's norm can be kept.
    Leave adapters in float32, as peft does by default.

    Args:
        f: a DoRA layer. `coordinates` must have been called.
        base_norms: sigma_max of the blocks of W0, for each segment with a cap or budget.
        near: whether V was projected, so that its blocks may be at their caps.
    """
    m: Any = f.magnitude
    low, high = rows_of(f, refuse=False)  # a row that has become zero gets m = 0
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
    # m may be negative. Such a row is as long, so its cap holds, but its change from W0 is large.
    if f.budget is None:
        wanted = torch.where(now < 0, torch.maximum(now, -most), wanted)
    # Smaller differences are left by the rounding of m to its dtype.
    off = (wanted - now).abs() > 0.5 * _SLACK * now.abs()
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
    """Bounds from below and above of the 2-norms of V's rows, each float64 [d_out].

    Args:
        f: a DoRA layer.
        refuse: raise for rows of zeros, which DoRA would divide by.

    Raises:
        UnsupportedModelError: a row is zero, and `refuse` is set.
    """
    weight = f.weight()
    matrix = weight.t() if is_transposed(f.layer.base_layer) else weight
    key = f.sources()
    known = _ROWS.get(f.layer)
    if known is None or known[0] != key:
        known = (key, matrix.double().square().sum(1))
        _ROWS[f.layer] = known
    wide = torch.promote_types(matrix.dtype, torch.float32)
    q = f.full_coordinates()  # in these coordinates the sums below do not cancel
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
            f"{f.name}: row {row} of W0 + s B A is zero, and DoRA divides by its length. Leave the "
            "layer out of target_modules (a fresh retrofit's output maps start at zero), or use a "
            "plain LoraConfig."
        )
    return low, high
