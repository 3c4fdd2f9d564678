"""Parameter groups for LipschitzMuon: which parameter of a model is stepped how.

There are matrices, tables of rows, factors of adapters, and the rest, which AdamW steps.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lip_plugin.distributed.owners import home_of
from lip_plugin.errors import CheckpointError, ConfigError, UnsupportedModelError
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW
from lip_plugin.model.position import OffsetBias
from lip_plugin.optim.lora import KIND as FACTORS
from lip_plugin.optim.lora import factor_group
from lip_plugin.surgery.state import constraints_of

KINDS = ("matrix", "row", "adamw", FACTORS)
# Rate of tables of position biases over the rate of the matrices. It is in attention logits per
# AdamW step. These tables need more than other biases do: at lr 0.1 a rate of 0.05 gave 47.6 %
# accuracy where 0.01 gave 45.7 (docs/LOG.md, 2026-11-24).
POSITION_RATE = 0.5


def param_groups(
    model: nn.Module,
    lr: float,
    embedding_lr: float,
    adamw_lr: float,
    adapter_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Make LipschitzMuon's parameter groups for a retrofitted model, or for adapters with budgets.

    All groups have the same `lr`, and each has its own `lr_ratio`: the rate of a group is
    lr * lr_ratio. Schedulers change `lr`, and nanoGPT's loop writes one number into the `lr` of all
    groups; either way all rates change in proportion.

    Args:
        model: the model, wrapped or not.
        lr: rate of the matrices, in RMS->RMS norm per step.
        embedding_lr: rate of the rows of tables, in RMS norm per step.
        adamw_lr: rate of what AdamW steps.
        adapter_lr: rate of LoRA factors, in RMS->RMS norm per step of the merged weight; None takes
            `lr`.

    Returns:
        The groups that are not empty. `layouts` holds plain tuples, one for each entry of `params`.

    Raises:
        UnsupportedModelError: a weight was flattened (FSDP1), or the rows of a table are cut.
        ConfigError: nothing in the model trains.
    """
    root, config = constraints_of(model)
    layouts = {id(m.weight): m.layout for _, m in constrained_modules(root)}
    for name, module in constrained_modules(root):
        if home_of(module.weight).dim and module.layout.norm == ROW:
            raise UnsupportedModelError(
                f"{name}.weight is a table of rows, and its rows are cut between processes: shard "
                "it along its first axis, as fully_shard does by default."
            )
        if module.layout.norm != ROW and not module.layout.covers(module.weight):
            raise UnsupportedModelError(
                f"{name}.weight has shape {tuple(module.weight.shape)}, which its blocks do not "
                "tile: it was flattened (FSDP1). Use fully_shard (FSDP2), or DDP."
            )
    ratios = {
        "matrix": 1.0,
        "row": embedding_lr / lr,
        "adamw": adamw_lr / lr,
        "position": POSITION_RATE,  # stepped by AdamW as well, at a rate of its own
    }
    groups: dict[str, dict[str, Any]] = {
        name: {"params": [], "kind": name, "layouts": [], "lr": lr, "lr_ratio": ratio}
        for name, ratio in ratios.items()
    }
    groups["position"]["kind"] = "adamw"
    groups[FACTORS] = factor_group(model, lr, adapter_lr or lr)
    factors = {id(p) for _, p in groups[FACTORS]["params"]}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, OffsetBias)}
    for name, p in model.named_parameters():
        if not p.requires_grad or id(p) in factors:
            continue
        layout = layouts.get(id(p))
        kind = "adamw" if layout is None else "row" if layout.norm == ROW else "matrix"
        kind = "position" if id(p) in tables else kind
        groups[kind]["params"].append((name, p))
        if layout is not None:
            groups[kind]["layouts"].append(layout.to_plain())
    groups["matrix"]["method"] = config.method
    chosen = [g for g in groups.values() if g["params"]]
    if not chosen:
        raise ConfigError(
            "no parameter of the model requires a gradient: there is nothing to train."
        )
    return chosen


def refuse_other_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Raise CheckpointError if saved groups have other kinds, sizes or order than `own`."""
    sizes = [[(g.get("kind"), len(g["params"])) for g in groups] for groups in (saved, own)]
    if sizes[0] == sizes[1]:
        return
    said = [", ".join(f"{kind or 'no kind'}: {count}" for kind, count in of) for of in sizes]
    kinds = {kind for kind, _ in sizes[0]}
    origin = (
        "It was written by another optimizer. Resume with that one"
        if kinds == {None}
        else "The run was started with another LipschitzConfig or another model (dropped biases, "
        "position tables and the like change what is trained). Resume with the config that the "
        "checkpoint's config.json has under quantization_config"
    )
    raise CheckpointError(
        f"The saved optimizer state has groups of parameters ({said[0]}), and this LipschitzMuon "
        f"has ({said[1]}). {origin}, or start a new run from the checkpoint's weights."
    )
