"""Which parameter of a retrofitted model is stepped how: matrices, tables of rows, and the rest."""

from __future__ import annotations

from typing import Any

from torch import nn

from lip_plugin.blocks import ROW
from lip_plugin.errors import ConfigError, UnsupportedModelError
from lip_plugin.modules import constrained_modules
from lip_plugin.optim.batches import refuse_sharded
from lip_plugin.optim.projection import require_retrofit

KINDS = ("matrix", "row", "adamw")


def param_groups(model: nn.Module, lr: float, embedding_lr: float, adamw_lr: float) -> list[dict[str, Any]]:
    """Parameter groups for LipschitzMuon from a retrofitted model.

    Every group has the same `lr`, which schedulers move, and its own `lr_ratio`: the rate of a
    group is lr * lr_ratio, so one scheduler (or nanoGPT's loop, which writes one number into all
    groups) moves all rates in proportion. `layouts` are plain tuples aligned with `params`.
    """
    root, state = require_retrofit(model)
    layouts = {id(m.weight): m.layout for _, m in constrained_modules(root)}
    for name, module in constrained_modules(root):
        refuse_sharded(module.weight)
        if module.layout.norm != ROW and not module.layout.covers(module.weight):
            raise UnsupportedModelError(
                f"{name}.weight has shape {tuple(module.weight.shape)}, which its blocks do not tile: it was flattened or "
                "sharded (FSDP). Train with DDP, or build the optimizer before sharding."
            )
    groups: dict[str, dict[str, Any]] = {
        kind: {"params": [], "kind": kind, "layouts": [], "lr": lr, "lr_ratio": ratio}
        for kind, ratio in zip(KINDS, (1.0, embedding_lr / lr, adamw_lr / lr))
    }
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        layout = layouts.get(id(p))
        kind = "adamw" if layout is None else "row" if layout.norm == ROW else "matrix"
        groups[kind]["params"].append((name, p))
        if layout is not None:
            groups[kind]["layouts"].append(layout.to_plain())
    groups["matrix"]["method"] = state.config.method
    chosen = [g for g in groups.values() if g["params"]]
    if not chosen:
        raise ConfigError("no parameter of the model requires a gradient: there is nothing to train.")
    return chosen
