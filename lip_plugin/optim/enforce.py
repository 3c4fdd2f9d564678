"""Projections of a whole model: `project_` brings every block within its cap now, and
`attach_projection` does so after every step of any optimizer.

The projections of single blocks are in lip_plugin/linalg/projections.py. This file applies them to
the layers of a model, on one process or many, and to adapters.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lip_plugin.distributed.owners import local, on_owners, replicas_of
from lip_plugin.errors import ConfigError
from lip_plugin.face import require_module
from lip_plugin.linalg.norms import rms_to_rms_upper
from lip_plugin.linalg.projections import METHODS, project
from lip_plugin.model.adapters import BlockNorms, layer_wrappers
from lip_plugin.model.batches import batches, cost_of
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW, Layout, clamp_rows_
from lip_plugin.optim.finite import check_finite
from lip_plugin.optim.intact import Held
from lip_plugin.surgery.block_norms import block_norms
from lip_plugin.surgery.state import constraints_of

# How far above its cap a block's proven bound may lie before `normalize_above_` changes the block.
# The bound itself is up to 2e-4 loose, and weights at their cap must survive a save and a load
# unchanged.
TOLERANCE = 5e-4


@torch.no_grad()
def project_weights_(
    weights: list[Tensor],
    layouts: list[Layout],
    method: str,
    *,
    lr: float = 0.0,
    weight_decay: float = 0.0,
    replicas: Any = None,
) -> None:
    """Bring every block of the weights within its cap, in place, with the projection `method`.

    Sharded weights are projected whole, each by one process.

    Args:
        weights: weights of constrained layers.
        layouts: their layouts, in the same order.
        method: one of `lip_plugin.linalg.projections.METHODS`.
        lr: learning rate in RMS->RMS norm per step, for the methods that depend on it.
        weight_decay: decay per unit of `lr`, for the methods that depend on it.
        replicas: process group whose members hold equal copies of the weights; they share the work.
            See lip_plugin/distributed/owners.py.
    """

    def work(whole: list[Tensor], of: list[Layout]) -> None:
        for batch in batches(whole, of):
            if batch.cap is not None:
                batch.scatter_(
                    project(batch.gather(), batch.cap, method, lr=lr, weight_decay=weight_decay)
                )

    _on_matrices(weights, layouts, work, replicas)
    _clamp_tables_(weights, layouts)


@torch.no_grad()
def normalize_above_(weights: list[Tensor], layouts: list[Layout], replicas: Any = None) -> None:
    """Divide every block that is clearly above its cap by its norm over the cap, in place.

    A block is clearly above if its proven norm exceeds the cap by more than TOLERANCE. All other
    blocks keep every bit.
    """

    def work(whole: list[Tensor], of: list[Layout]) -> None:
        for batch in batches(whole, of):
            if batch.cap is None:
                continue
            blocks = batch.gather()
            above = rms_to_rms_upper(blocks) > batch.cap * (1 + TOLERANCE)
            if bool(above.any()):
                blocks[above] = project(blocks[above], batch.cap, "spectral_normalize")
                batch.scatter_(blocks)

    _on_matrices(weights, layouts, work, replicas)
    _clamp_tables_(weights, layouts)


def _on_matrices(
    weights: list[Tensor],
    layouts: list[Layout],
    work: Callable[[list[Tensor], list[Layout]], None],
    replicas: Any,
) -> None:
    """Call `work` on the whole matrices, each on its owner. Tables of rows are left out."""
    matrices = [i for i, layout in enumerate(layouts) if layout.norm != ROW]
    on_owners(
        [weights[i] for i in matrices],
        lambda mine, wholes, _: work(wholes, [layouts[matrices[k]] for k in mine]),
        replicas=replicas,
        costs=[cost_of(weights[i], layouts[i]) for i in matrices],
    )


def _clamp_tables_(weights: list[Tensor], layouts: list[Layout]) -> None:
    """Bring every row of the tables within its cap (RMS norm), in place.

    Each process clamps the rows that it has, because rows are never cut between processes
    (lip_plugin.optim.groups refuses that).
    """
    for weight, layout in zip(weights, layouts):
        for segment, rows in layout.views(local(weight)) if layout.norm == ROW else ():
            if segment.cap is not None:
                clamp_rows_(rows, segment.cap)


@torch.no_grad()
def keep_within_caps_(
    model: nn.Module, process_group: Any = None, *, only_frozen: bool = False
) -> None:
    """Bring what is above its cap within it, in place.

    Weights that are within their caps keep every bit, so a resumed run goes on exactly where it
    was.

    Args:
        model: a model with caps, or with budgets on its adapters. It may be wrapped.
        process_group: its members hold equal copies of the model and share the work. None takes the
            group of a DistributedDataParallel around the model.
        only_frozen: look only at the weights that do not train.
    """
    root, config = constraints_of(model)
    # The wrappers come first, because they refuse what they cannot keep, before any change.
    for wrapper in layer_wrappers():
        wrapper.project_(root, config.method, 0.0)
    found = [
        m for _, m in constrained_modules(root) if not (only_frozen and m.weight.requires_grad)
    ]
    replicas = process_group if process_group is not None else replicas_of(model)
    normalize_above_([m.weight for m in found], [m.layout for m in found], replicas)


@torch.no_grad()
def project_(model: nn.Module, method: str | None = None, *, lr: float = 0.0) -> list[BlockNorms]:
    """Bring every block of a retrofitted model within its cap (RMS->RMS norm) now, in place.

    On sharded (FSDP2) or replicated (DDP) models every process has to call it. Each matrix is then
    projected by one of them.

    Args:
        model: a retrofitted model, wrapped or not (DDP, peft).
        method: one of the seven projections; None takes that of the config.
        lr: the learning rate in RMS->RMS norm per step, for the methods that depend on it.

    Returns:
        Proven norms over caps after the projection, one entry for each layer.

    Raises:
        NotRetrofittedError: `model` has no constrained layer.
        NonFiniteError: a weight holds nan or inf; no weight was changed.
    """
    step_projection_(model, method, lr=lr, frozen=True)
    return block_norms(model)


@torch.no_grad()
def step_projection_(
    model: nn.Module,
    method: str | None,
    *,
    lr: float,
    frozen: bool = False,
    process_group: Any = None,
    only: set[int] | None = None,
    also: frozenset[int] = frozenset(),
) -> None:
    """Project as `attach_projection` does after a step: first the weights, then the adapters.

    Args:
        model: as in `project_`.
        method: as in `project_`.
        lr: as in `project_`.
        frozen: project the weights that do not train as well.
        process_group: as in `keep_within_caps_`.
        only: ids of the parameters to project; None projects all. Adapters are always projected.
    """
    root, config = constraints_of(model)
    replicas = process_group if process_group is not None else replicas_of(model)
    method = method or config.method
    found = [
        (n, m)
        for n, m in constrained_modules(root)
        if frozen or m.weight.requires_grad or id(m.weight) in also
    ]
    found = [(n, m) for n, m in found if only is None or id(m.weight) in only]
    # Adapters are projected last. What they refuse is refused here, before the weights change.
    for wrapper in layer_wrappers() if found else ():
        wrapper.check(root)
    check_finite([(f"{n}.weight", m.weight) for n, m in found], replicas, moved=not frozen)
    # With this decay, steps of size lr have the cap as their fixed point:
    # (1 - lr decay)(cap + lr) = cap.
    decay = 1.0 / (config.w_max + lr)
    weights, layouts = [m.weight for _, m in found], [m.layout for _, m in found]
    project_weights_(weights, layouts, method, lr=lr, weight_decay=decay, replicas=replicas)
    for wrapper in layer_wrappers():
        wrapper.project_(root, method, lr)


def _innermost(optimizer: Any) -> Any:
    """The optimizer whose step moves the weights.

    accelerate's wrapper skips steps on which a gradient scaler found inf, so its inner optimizer is
    the one. Any other object with a step of its own may move weights after the one inside it.
    """
    kind = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    wraps = kind == "accelerate.optimizer.AcceleratedOptimizer"
    if wraps or not hasattr(optimizer, "register_step_post_hook"):
        return getattr(optimizer, "optimizer", optimizer)
    return optimizer


def attach_projection(
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    model: nn.Module,
    method: str | None = None,
    *,
    process_group: Any = None,
) -> RemovableHandle:
    """After every step of `optimizer`, bring each block of `model` within its cap (RMS->RMS norm).

    It works with any optimizer, because it is a hook behind the optimizer's step
    (`register_step_post_hook`). A step that a gradient scaler skips is not followed by a
    projection; every step that runs is. Before each step the model is checked: it must still be the
    one that was retrofitted, with all its caps.

    Args:
        optimizer: an optimizer of torch, or accelerate's wrapper of one. It may be a list of
            several that share the model's parameters among them. Each step of one is then followed
            by the projection of the weights that it moved.
        model: the retrofitted model, wrapped or not.
        method: one of the seven projections; None takes that of the config.
        process_group: its members hold equal copies of the model (DDP), and each matrix is
            projected by one of them. None takes the group of a DistributedDataParallel around the
            model. Sharded (FSDP2) weights need none.

    A copy or a pickle of the optimizer has no projection, because torch copies no hooks. Attach it
    to the copy as well.

    Returns:
        A handle. `handle.remove()` takes the projection off again.

    Raises:
        NotRetrofittedError: `model` has no constrained layer, and no budget on its adapters.
        ConfigError: the method is unknown, the arguments are in another order, or a trainable
            weight with a cap is in no group of the optimizers.
        UnsupportedModelError: a layer has lost its cap since the retrofit.

    The check before a later step raises the last two as well.
    """
    several = list(optimizer) if isinstance(optimizer, (list, tuple)) else [optimizer]
    inner: list[Any] = [_innermost(o) for o in several]
    if isinstance(optimizer, nn.Module) or not all(
        hasattr(o, "register_step_post_hook") for o in inner
    ):
        raise ConfigError(
            f"attach_projection({type(optimizer).__name__}, {type(model).__name__}): the optimizer "
            "comes first, then the model: attach_projection(optimizer, model)."
        )
    require_module(model, "attach_projection")
    root, _ = constraints_of(model)
    if method is not None and method not in METHODS:
        raise ConfigError(f"unknown projection {method!r}: choose one of {', '.join(METHODS)}")
    held = Held(root)
    moving: WeakKeyDictionary[Any, frozenset[int]] = WeakKeyDictionary()

    def before_step(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        held.check([g for o in inner for g in o.param_groups], type(stepped).__name__)
        # torch steps what has a gradient, also if it was frozen since
        weights = (m.weight for _, m in constrained_modules(root))
        moving[stepped] = frozenset(id(w) for w in weights if w.grad is not None)

    def after_step(stepped: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        began = time.perf_counter()
        rate = float(stepped.param_groups[0]["lr"])
        # Each of several optimizers moves its own weights, so only those need the projection.
        own = {id(p) for g in stepped.param_groups for p in g["params"]} if len(inner) > 1 else None
        also = moving.get(stepped, frozenset())
        step_projection_(model, method, lr=rate, process_group=process_group, only=own, also=also)
        stepped.seconds_projecting += time.perf_counter() - began  # type: ignore[attr-defined]

    before_step(inner[0], (), {})
    keep_within_caps_(model, process_group)
    handles = []
    for one in inner:
        one.seconds_projecting = 0.0
        handles += [
            one.register_step_pre_hook(before_step),
            one.register_step_post_hook(after_step),
        ]
    return _Together(handles)


class _Together(RemovableHandle):
    """Several handles that are removed together."""

    def __init__(self, handles: list[RemovableHandle]) -> None:
        self._handles = handles

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
