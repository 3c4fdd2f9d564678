"""project_() and attach_projection(): every block within its cap, now or after every step of any optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lip_plugin.blocks import ROW, Layout, clamp_rows_
from lip_plugin.errors import ConfigError, NonFiniteError, NotRetrofittedError
from lip_plugin.linalg.norms import rms_to_rms_upper, row_rms_max_upper
from lip_plugin.linalg.projections import METHODS, project
from lip_plugin.modules import constrained_modules
from lip_plugin.optim.batches import batches
from lip_plugin.surgery import find_retrofit


@dataclass(frozen=True)
class BlockNorms:
    """Proven upper bounds of one weight's blocks over their caps (RMS->RMS, or RMS for rows)."""

    name: str
    worst_over_cap: float
    count: int


# How far above its cap a block's proven bound may lie when somebody else wrote it: the bound itself
# is up to 2e-4 loose, and weights that are at their cap must survive a save and a load unchanged.
TOLERANCE = 5e-4

Projector = Callable[[nn.Module, str, float], int]
# What is not a plain constrained weight (peft's adapters) is brought within the caps by a projector,
# f(model, method, lr) -> how many blocks it found, and measured by its norms, f(model) -> BlockNorms.
_PROJECTORS: dict[Projector, Callable[[nn.Module], list[BlockNorms]]] = {}


def register_projector(projector: Projector, norms: Callable[[nn.Module], list[BlockNorms]]) -> None:
    """Have `projector` called by every projection of a model, and `norms` by every measurement of one."""
    _PROJECTORS[projector] = norms


@torch.no_grad()
def project_weights_(
    weights: list[Tensor], layouts: list[Layout], method: str, *, lr: float = 0.0, weight_decay: float = 0.0
) -> None:
    """Bring every block of the weights within its cap, in place, whatever the blocks are now."""
    matrices = [i for i, layout in enumerate(layouts) if layout.norm != ROW]
    for batch in batches([weights[i] for i in matrices], [layouts[i] for i in matrices]):
        if batch.cap is not None:
            batch.scatter_(project(batch.gather(), batch.cap, method, lr=lr, weight_decay=weight_decay))
    for weight, layout in zip(weights, layouts):
        if layout.norm == ROW:
            for segment, rows in layout.views(weight):
                if segment.cap is not None:
                    clamp_rows_(rows, segment.cap)


@torch.no_grad()
def normalize_above_(weights: list[Tensor], layouts: list[Layout]) -> None:
    """Divide the blocks whose proven norm exceeds the cap by more than TOLERANCE; leave the others' bits alone."""
    for batch in batches(weights, layouts):
        if batch.cap is None:
            continue
        blocks = batch.gather()
        above = rms_to_rms_upper(blocks) > batch.cap * (1 + TOLERANCE)
        if bool(above.any()):
            blocks[above] = project(blocks[above], batch.cap, "spectral_normalize")
            batch.scatter_(blocks)


@torch.no_grad()
def keep_within_caps_(model: nn.Module) -> None:
    """Bring what is above its cap within it; weights that are within keep every bit (a resumed run's)."""
    root, state = require_retrofit(model)
    for projector in _PROJECTORS:  # first: they refuse by name what they cannot keep, before a change
        projector(root, state.config.method, 0.0)
    found = [m for _, m in constrained_modules(root)]
    matrices = [m for m in found if m.layout.norm != ROW]
    normalize_above_([m.weight for m in matrices], [m.layout for m in matrices])
    for module in found:
        if module.layout.norm == ROW:
            clamp_rows_(module.weight, module.layout.segments[0].cap)


@torch.no_grad()
def project_(model: nn.Module, method: str | None = None, *, lr: float = 0.0) -> list[BlockNorms]:
    """Bring every block of a retrofitted model within its cap now, in place.

    Args:
        model: a retrofitted model, wrapped or not (DDP, peft).
        method: one of the seven projections; None takes the config's.
        lr: the learning rate, in RMS->RMS norm per step, for the methods that are coupled to it.

    Returns:
        Proven norms over caps after the projection, one entry per layer.

    Raises:
        NotRetrofittedError: no constrained layer in `model`.
        NonFiniteError: a weight holds nan or inf; no weight was changed.
    """
    step_projection_(model, method, lr=lr, frozen=True)
    return block_norms(model)


@torch.no_grad()
def step_projection_(model: nn.Module, method: str | None, *, lr: float, frozen: bool = False) -> None:
    """What `attach_projection` does after a step: trainable weights, then adapters, then nothing else."""
    root, state = require_retrofit(model)
    method = method or state.config.method
    found = [(n, m) for n, m in constrained_modules(root) if frozen or m.weight.requires_grad]
    check_finite([(f"{n}.weight", m.weight) for n, m in found])
    # the decay after steps of size lr whose fixed point is the cap: (1 - lr decay)(cap + lr) = cap
    decay = 1.0 / (state.config.w_max + lr)
    project_weights_(
        [m.weight for _, m in found], [m.layout for _, m in found], method, lr=lr, weight_decay=decay
    )
    for projector in _PROJECTORS:
        projector(root, method, lr)


def attach_projection(
    optimizer: torch.optim.Optimizer, model: nn.Module, method: str | None = None
) -> RemovableHandle:
    """After every step of `optimizer`, bring each block of `model` within its cap.

    Works with any optimizer: it is a `register_step_post_hook`, so a step that a gradient scaler
    skips projects nothing, and one that runs is always followed by it. An accelerate wrapper
    is looked through.

    Returns:
        A handle; `handle.remove()` takes the projection off again.

    Raises:
        NotRetrofittedError: no constrained layer in `model`.
        ConfigError: an unknown method.
    """
    require_retrofit(model)
    if method is not None and method not in METHODS:
        raise ConfigError(f"unknown projection {method!r}: choose one of {', '.join(METHODS)}")
    inner: Any = getattr(optimizer, "optimizer", optimizer)

    def after_step(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        began = time.perf_counter()
        step_projection_(model, method, lr=float(stepped.param_groups[0]["lr"]))
        stepped.seconds_projecting += time.perf_counter() - began  # type: ignore[attr-defined]

    inner.seconds_projecting = 0.0
    keep_within_caps_(model)
    return inner.register_step_post_hook(after_step)


def require_retrofit(model: nn.Module) -> Any:
    """(root, state) of the retrofitted model inside; raises NotRetrofittedError."""
    found = find_retrofit(model)
    if found is None:
        raise NotRetrofittedError(
            f"{type(model).__name__} has no constrained layer. Call retrofit(model, LipschitzConfig(...)) first."
        )
    return found


def largest_entries(tensors: list[Tensor]) -> Tensor:
    """Largest absolute entry of each tensor, float32 [n]; nan where one is nan, 0 for empty tensors."""
    ends = [torch.aminmax(t.detach()) if t.numel() else (t.new_zeros(()),) * 2 for t in tensors]
    return torch.stack([torch.maximum(-low, high).float() for low, high in ends])


def check_finite(named: list[tuple[str, Tensor]]) -> None:
    """Raise NonFiniteError naming the first tensor with nan or inf; one synchronization if all are well."""
    if named:
        largest = largest_entries([t for _, t in named])
        if not bool(torch.isfinite(largest).all()):
            refuse_non_finite([n for n, _ in named], [float(v) for v in largest])


def refuse_non_finite(names: list[str], largest: list[float]) -> None:
    """Raise NonFiniteError with the first name whose largest entry is nan or inf."""
    for name, value in zip(names, largest, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{name} holds nan or inf. Nothing was changed by this step; lower the learning rate."
            )


@torch.no_grad()
def block_norms(model: nn.Module) -> list[BlockNorms]:
    """Proven upper norms over caps of every constrained layer's weight, in the model's order."""
    root, _ = require_retrofit(model)
    found = list(constrained_modules(root))
    worst = [0.0] * len(found)
    matrices = [i for i, (_, m) in enumerate(found) if m.layout.norm != ROW]
    for batch in batches([found[i][1].weight for i in matrices], [found[i][1].layout for i in matrices]):
        if batch.cap is None:
            continue
        upper = (rms_to_rms_upper(batch.gather()) / batch.cap).tolist()
        start = 0
        for view, owner in zip(batch.views, batch.owners):
            index = matrices[owner]
            worst[index] = max(worst[index], *upper[start : start + view.shape[0]])
            start += view.shape[0]
    for i, (_, module) in enumerate(found):
        if module.layout.norm == ROW:
            for segment, rows in module.layout.views(module.weight):
                if segment.cap is not None:
                    worst[i] = max(worst[i], float(row_rms_max_upper(rows[0])) / segment.cap)
    counts = [sum(s.count for s in m.layout.segments) for _, m in found]
    plain = {name: BlockNorms(name, w, c) for (name, _), w, c in zip(found, worst, counts)}
    for norms in _PROJECTORS.values():
        for merged in norms(root):  # of a wrapped layer the merged weight counts, not the base alone
            plain.pop(f"{merged.name}.base_layer", None)
            plain[merged.name] = merged
    return list(plain.values())
