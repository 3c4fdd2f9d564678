"""Projections of peft's adapters: blocks that a LoRA or DoRA layer multiplies with keep caps.

    retrofit(base)
    model = get_peft_model(base, LoraConfig(...))
    attach_projection(optimizer, model)

After each step every block of rows is treated on its own, because each has its own rows of B:

1. Budgets are kept first (budget.py).
2. The norm e of the block's change is computed from k x k matrices. If norm(W0_b) + e is within the
   cap, nothing is done.
3. Otherwise B_b is replaced by a point of {B_b : norm(W0_b + s B_b A) <= cap}, with A fixed
   (nearest.py, lip_plugin/linalg/low_rank.py). A point of that set keeps every bit.
4. A change that step 3 left above its budget is shortened.
5. DoRA's magnitudes are clamped last (dora.py).

A base at its caps leaves little room. Scaling B would leave nothing at all, because almost every
direction leaves the ball. The projection of step 3 keeps what turns or shrinks the singular
directions that A reads, and filters out what would lengthen them. Training goes on, but slower.
The cure is room: retrofit with a `w_max` above the norms of the base.

OFT and HRA keep norms by themselves and need none of this. What is refused is listed at
`project_adapters`.
"""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lip_plugin.errors import ConfigError
from lip_plugin.integrations.peft.budget import (
    clip_to_budget_,
    has_budget,
    limits,
    shorten_to_budget_,
)
from lip_plugin.integrations.peft.dora import hold_magnitudes_, rows_of
from lip_plugin.integrations.peft.factors import Factors, change_sizes
from lip_plugin.integrations.peft.layers import (
    BUDGET,
    TURNING,
    active,
    adapter_facts,
    base_weight,
    merged_weight,
    parameters_of,
    read_weight,
    refuse_merged,
    saved_module,
    wrapped_layers,
)
from lip_plugin.integrations.peft.nearest import capped_blocks, project_blocks_
from lip_plugin.linalg.norms import rms_to_rms_upper, sigma_max_exact, sigma_max_upper
from lip_plugin.model.adapters import BlockNorms, LayerWrapper, register_layer_wrapper
from lip_plugin.model.layout import Segment
from lip_plugin.optim.finite import check_finite

WITHIN = 1.0 + 5e-5  # of the norm; nearest.ACCEPT says the same of its square
BASE_TOLERANCE = 1e-3  # how far storage in bf16 may lift a base above its cap
# Norms of the blocks of frozen bases, by layer, with what they were computed from.
_NORMS: WeakKeyDictionary[nn.Module, tuple[tuple, list[Tensor]]] = WeakKeyDictionary()


@torch.no_grad()
def project_adapters(model: nn.Module, method: str | None = None, lr: float = 0.0) -> int:
    """Bring every block of W0 + s B A within cap * (1 + 1e-4), in the RMS->RMS norm.

    Only B is changed, and DoRA's m. All active and trainable adapters of a layer move together. If
    none is trainable, all active ones move. Other active ones count as part of W0, and inactive
    ones are not looked at. Every projection of a model with caps or budgets calls this function.

    Args:
        model: the model with adapters.
        method: not used, because adapters have only one projection.
        lr: not used.

    Returns:
        The number of blocks that were looked at.

    Raises:
        UnsupportedModelError: an adapter has no rule (see layers.py), or is on an embedding, or on
            a layer without a cap or budget.
        ConfigError: W0 is above its cap.
        TrainerError: adapters are merged into W0.
        NonFiniteError: a factor holds nan or inf. No adapter was changed.
    """
    found = find_adapters(model)
    bases = [_base_norms(f) for f in found]  # refuses a base above its caps
    for f in found:
        f.coordinates()
    clip_to_budget_([f for f in found if f.budget is not None])
    near = _near(found, bases)
    project_blocks_(near)
    shorten_to_budget_([f for f in near if f.budget is not None])
    for f, norms in zip(found, bases, strict=True):
        if f.magnitude is not None:
            f.coordinates()
            hold_magnitudes_(f, norms, near=f in near)
    return sum(s.count for f in found for s in (f.layout or f.budget).segments if s.cap is not None)


@torch.no_grad()
def find_adapters(model: nn.Module) -> list[Factors]:
    """Find the LoRA and DoRA layers that a projection would look at, and check them.

    It raises what `project_adapters` raises, except for a W0 above its cap.
    """
    found, named = [], []
    for name, layer, kind in wrapped_layers(model):
        if kind in TURNING:
            refuse_merged(name, layer)
            named += [
                (f"{name}.{n}", t) for a in active(layer) for n, t in parameters_of(layer, a, kind)
            ]
            continue
        factors = Factors(name, layer)
        named += factors.named
        if factors.factors:
            found.append(factors)
    check_finite(named)
    for f in found:
        if f.magnitude is not None:
            rows_of(f)  # refuses a zero row
    return found


def _near(found: list[Factors], bases: list[list[Tensor]]) -> list[Factors]:
    """The layers with a block for which norm(W0_b) + norm(change) is above the cap."""
    asked, flags = [], []
    for f, norms in zip(found, bases, strict=True):
        caps = limits(f.layout, f.factors[0][0].shape[1]) if f.layout is not None else []
        asked += [
            (f, segment, norm, cap) for (segment, cap), norm in zip(caps, norms, strict=False)
        ]
    if not asked:
        return []
    sizes = change_sizes([(f, segment) for f, segment, _, _ in asked])
    for size, (_, _, norm, cap) in zip(sizes, asked, strict=True):
        flags.append(((size > 0) & (norm + size > cap * WITHIN)).any())
    over = {id(f) for (f, *_), flag in zip(asked, torch.stack(flags).tolist(), strict=True) if flag}
    return [f for f in found if id(f) in over]


def _base_norms(f: Factors) -> list[Tensor]:
    """Proven sigma_max [count] of the blocks of W0 for each segment with a cap or budget, cached.

    W0 includes frozen adapters. Raises ConfigError if W0 is above a cap.
    """
    if f.layout is None and f.kind != "dora":
        return []  # a plain budget does not depend on W0
    key = f.sources()
    known = _NORMS.get(f.layer)
    if known is None or known[0] != key:
        weight = f.weight()
        layout = f.layout or f.budget
        assert layout is not None
        views = list(
            capped_blocks(layout, weight.float() if weight.dtype != torch.float64 else weight)
        )
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
            f"{name}: the base weight's {segment.role} block is {worst:.4g} times its cap "
            f"{segment.cap:g}, so no adapter could be within it. Call project_(model) once, before "
            "training the adapters, or retrofit with a larger w_max."
        )


@torch.no_grad()
def merged_block_norms(model: nn.Module) -> list[BlockNorms]:
    """Proven RMS->RMS norms of the merged blocks over their caps, from above.

    Returns:
        One entry for each adapted layer with caps. For each layer with a budget there is one more,
        of its change over the budget, under the name "<layer> (change)".
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
    blocks = list(capped_blocks(layout, weight))
    worst = max((float(rms_to_rms_upper(w).max()) / s.cap for s, w in blocks if s.cap), default=0.0)
    return BlockNorms(name, worst, sum(s.count for s, _ in blocks))


class PeftLayers(LayerWrapper):
    """peft's adapters on linear layers, and the copies of layers that it trains beside them."""

    kind = "peft"

    def runs(self, layer: nn.Module) -> nn.Module | None:
        return saved_module(layer)

    def weight(self, layer: nn.Module) -> Tensor | None:
        return read_weight(layer)

    def facts(self, layer: nn.Module) -> str:
        return adapter_facts(layer)

    def holds(self, model: nn.Module) -> bool:
        return has_budget(model)

    def check(self, model: nn.Module) -> None:
        find_adapters(model)

    def project_(self, model: nn.Module, method: str, lr: float) -> int:
        return project_adapters(model, method, lr)

    def norms(self, model: nn.Module) -> list[BlockNorms]:
        return merged_block_norms(model)


register_layer_wrapper(PeftLayers())
