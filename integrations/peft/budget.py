"""Budgets for adapters: `constrain_adapters` bounds every block of the change s B A.

A budget needs no caps on the base, which may be untouched or quantized. Open this file for the
marking of the layers, and for the projections that keep budgets.

The nearest factors within a budget c follow from k x k matrices alone. Let E = B into = U S V^T be
the change in the coordinates of factors.py. Clipping S at c gives the matrix within c that is
nearest to s B A, in the Frobenius norm and every other unitarily invariant norm. Its rows are
combinations of the rows of A. So A stays as it is, and

    B <- B into V diag(min(1, c / S)) V^T back

The proof is in docs/maths.md, section 15.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.errors import ConfigError, LipschitzError, UnsupportedModelError
from lip_plugin.face import require_module
from lip_plugin.integrations.peft.factors import Factors, change_sizes
from lip_plugin.integrations.peft.layers import (
    BUDGET,
    DORA,
    base_weight,
    kind_of,
    refuse_function,
    refuse_merged,
)
from lip_plugin.linalg.norms import rms_to_rms_upper
from lip_plugin.model.adapters import dequantized
from lip_plugin.model.architecture import find_family
from lip_plugin.model.heads import linear_layout
from lip_plugin.model.layers import Constrained, is_linear, is_transposed, rows_of
from lip_plugin.model.layout import RMS_TO_RMS, Layout, Segment, one_block
from lip_plugin.model.parts import parts
from lip_plugin.surgery.plan import Plan, RetrofitReport

ACCEPT = 1.0 + 1e-4  # a block with a norm up to this times its budget is left alone
# The share of a DoRA's budget that s B A may use. The magnitudes use the rest.
DORA_SHARE = 0.5
# Factors on the budget that are tried in turn on a block above it. The first is the exact clipping.
# The smaller ones are for what rounding to the adapter's dtype leaves above.
_ATTEMPTS = (1.0, 0.996, 0.98, 0.9, 0.5, 0.0)


def constrain_adapters(
    model: nn.Module, budget: float, *, relative: bool = False, granularity: str = "head"
) -> RetrofitReport:
    """Hold every block of what LoRA adds to a layer within a budget in the RMS->RMS norm.

    LoRA adds s B A. For DoRA the change is W' - W0. This call only marks the layers. Afterwards
    `attach_projection(optimizer, model)`, LipschitzMuon or LipschitzCallback keep the budget after
    every step. The base may be untouched, or retrofitted, and then its caps hold as well. Call it
    again to change the budget, and `release_adapters` to take it off.

    Args:
        model: a model with peft's LoRA adapters on it.
        budget: largest RMS->RMS norm of a block's change.
        relative: take the budget as a share of the base's own norms. The norm that counts is the
            largest among the blocks of the same role in the layer (the heads of q, say).
        granularity: `"head"` bounds each head of q, k and v on its own if the model's family is
            known. `"matrix"` bounds whole matrices.

    Returns:
        A report that prints as a table, with one line for each layer.

    Raises:
        ConfigError: the budget is not positive and finite, or it is relative and a base is zero.
        UnsupportedModelError: there are no LoRA adapters, or one has no rule (see layers.py).
        TrainerError: adapters are merged.

    After any of these errors nothing was changed.
    """
    require_module(model, "constrain_adapters")
    if (
        isinstance(budget, bool)
        or not isinstance(budget, (int, float))
        or not 0 < budget < math.inf
    ):
        raise ConfigError(
            f"constrain_adapters(budget={budget!r}): must be a finite number above 0."
        )
    if granularity not in ("head", "matrix"):
        raise ConfigError(
            f"constrain_adapters(granularity={granularity!r}): choose 'head' or 'matrix'."
        )
    plan, roles = Plan(), _roles(model)
    for name, layer in _adapted(model):
        layout = _layout(
            name, layer, float(budget), roles.get(name.replace(".base_layer", "")), granularity
        )
        if relative:
            layout = _relative(name, layout, layer)
        kinds = ", ".join(f"{s.count} x {s.role} <= {s.cap:.4g}" for s in layout.segments)
        plan.add(name, f"change {kinds}", partial(layer.__dict__.__setitem__, BUDGET, layout))
    if not plan.steps:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no LoRA layer. Call get_peft_model(model, "
            "LoraConfig(...)) first. (OFT and HRA keep norms by themselves and have no size that a "
            "budget could bound.)"
        )
    return plan.carry_out()


def release_adapters(model: nn.Module) -> int:
    """Take the budgets off again. Returns the number of layers that had one."""
    found = [m for m in model.modules() if BUDGET in m.__dict__]
    for module in found:
        del module.__dict__[BUDGET]
    return len(found)


def has_budget(model: nn.Module) -> bool:
    """Whether `constrain_adapters` was called on this model."""
    return any(BUDGET in m.__dict__ for m in model.modules())


def _adapted(model: nn.Module) -> list[tuple[str, Any]]:
    """The (name, layer) pairs of LoRA on linear maps. Raises for those without a rule."""
    found = []
    for name, module in model.named_modules():
        layer: Any = module
        if not hasattr(layer, "lora_A") or kind_of(layer) is None:
            continue
        base = layer.base_layer
        plain = is_linear(base) or dequantized(base) is not None
        if (
            not plain
            or len(getattr(layer, "lora_embedding_A", ()))
            or hasattr(layer, "parameter_name")
        ):
            raise UnsupportedModelError(
                f"{name}: LoRA on {type(base).__name__}, where a change has no rule here. Leave it "
                "out of target_modules."
            )
        try:
            refuse_function(layer)
        except UnsupportedModelError as error:
            raise UnsupportedModelError(f"{name} is wrapped by {error}") from None
        refuse_merged(name, layer)
        found.append((name, layer))
    return found


def _roles(model: nn.Module) -> dict[str, tuple[str, Any]]:
    """The (role, Parts) of every linear map, by its full name; empty if the family is unknown."""
    for prefix, module in model.named_modules():
        try:
            names = parts(module, find_family(module).architecture)
        except LipschitzError:
            continue
        return {".".join(filter(None, (prefix, n))): (role, names) for role, n in names.linears()}
    return {}


def _layout(name: str, layer: Any, budget: float, role: Any, granularity: str) -> Layout:
    """Blocks of the change: those of the base, or of its family, or the whole matrix."""
    base = layer.base_layer
    if isinstance(base, Constrained):
        parts_ = base.layout.segments
        return Layout(
            RMS_TO_RMS,
            base.layout.transposed,
            tuple(s if s.cap is None else _with_cap(s, budget) for s in parts_),
        )
    transposed = is_transposed(base)
    if role is None:
        return one_block("whole", rows_of(base), budget, transposed=transposed)
    kind, names = role
    interleaved = names.architecture.attention.interleaved
    chosen = "head" if interleaved else granularity
    return linear_layout(base, kind, budget, names, chosen, interleaved=interleaved)


def _with_cap(segment: Segment, cap: float) -> Segment:
    return Segment(segment.role, segment.start, segment.count, segment.d_out, cap)


@torch.no_grad()
def _relative(name: str, layout: Layout, layer: Any) -> Layout:
    """The layout with budgets that are shares of the base's present norms."""
    segments = []
    weight = base_weight(layer)
    for segment, blocks in layout.views(
        weight.float() if weight.dtype != torch.float64 else weight
    ):
        size = float(rms_to_rms_upper(blocks).max())
        if not 0 < size < math.inf:
            raise ConfigError(
                f"{name}: the base's {segment.role} block is {size:g}, so a share of it is no "
                "budget. Use relative=False."
            )
        assert segment.cap is not None
        segments.append(_with_cap(segment, segment.cap * size))
    return Layout(layout.norm, layout.transposed, tuple(segments))


def limits(layout: Layout, d_in: int) -> list[tuple[Segment, float]]:
    """The (segment, its cap as a 2-norm) pairs of the segments that have a cap."""
    return [(s, s.cap * math.sqrt(s.d_out / d_in)) for s in layout.segments if s.cap is not None]


def budgets_of(f: Factors) -> list[tuple[Segment, float]]:
    """The (segment, largest 2-norm of s B A) pairs: budgets, or the shares that DoRA leaves."""
    assert f.budget is not None
    share = DORA_SHARE if f.kind == DORA else 1.0
    return [(s, share * c) for s, c in limits(f.budget, f.factors[0][0].shape[1])]


def clip_to_budget_(factors: list[Factors]) -> None:
    """Bring every block of the change within its budget, by changing B.

    Blocks that are within it keep every bit. `coordinates` must have been called on each of
    `factors`.
    """
    open_ = [(f, s, c) for f in factors for s, c in budgets_of(f)]
    for aim in _ATTEMPTS:
        above = _above(open_)
        if not above:
            return
        for (f, segment, budget), at in above:
            e = f.blocks(segment)[at]
            squares, v = torch.linalg.eigh(e.mT @ e)
            s = squares.clamp_min(1e-300).sqrt()
            keep = (aim * budget / s).clamp(max=1.0)
            inner = f.into @ (v * keep[:, None, :]) @ v.mT @ f.back
            rows = f.b(slice(segment.start, segment.stop)).unflatten(
                0, (segment.count, segment.d_out)
            )
            f.write_blocks(segment, at, rows[at] @ inner)
        open_ = [entry for entry, _ in above]


def shorten_to_budget_(factors: list[Factors]) -> None:
    """Scale down the blocks that a projection to the caps has left above their budget.

    The shorter change is within the cap as well, because the set of changes within a cap is convex
    and holds zero.
    """
    for f in factors:
        f.coordinates()
        caps = budgets_of(f)
        for (segment, budget), size in zip(
            caps, change_sizes([(f, s) for s, _ in caps]), strict=True
        ):
            at = (size > budget * (1.0 + 0.5 * (ACCEPT - 1.0))).nonzero()[:, 0]
            if len(at):
                rows = f.b(slice(segment.start, segment.stop)).unflatten(
                    0, (segment.count, segment.d_out)
                )
                # It becomes a little shorter than needed, because rounding to bf16 may lengthen it.
                f.write_blocks(
                    segment, at, rows[at] * (budget / size[at] * (1 - 2**-8))[:, None, None]
                )


def _above(
    open_: list[tuple[Factors, Segment, float]],
) -> list[tuple[tuple[Factors, Segment, float], Tensor]]:
    """The entries with blocks above the budget, and which blocks; one synchronization."""
    if not open_:
        return []
    sizes = change_sizes([(f, s) for f, s, _ in open_])
    over = [size > c * ACCEPT for size, (_, _, c) in zip(sizes, open_, strict=True)]
    flags = torch.stack([o.any() for o in over]).tolist()
    return [
        (entry, o.nonzero()[:, 0])
        for entry, o, flag in zip(open_, over, flags, strict=True)
        if flag
    ]
