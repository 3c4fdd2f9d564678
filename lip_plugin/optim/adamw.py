"""AdamW for what has no cap: biases, gains of kept norms, tables of position biases."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from lip_plugin.distributed.owners import local


def step_adamw_(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """One step of the parameters of a group that have a gradient, in place, with their state."""
    params = [p for p in group["params"] if p.grad is not None]
    if not params:
        return
    for p in params:
        if "exp_avg" not in state[p]:
            state[p]["step"] = torch.zeros((), dtype=torch.float32)
            state[p]["exp_avg"] = torch.zeros_like(p)
            state[p]["exp_avg_sq"] = torch.zeros_like(p)
    states = [state[p] for p in params]
    adamw(
        [local(p) for p in params],
        [local(p.grad) for p in params],
        [local(s["exp_avg"]) for s in states],
        [local(s["exp_avg_sq"]) for s in states],
        [],
        [s["step"] for s in states],
        amsgrad=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"] * group["lr_ratio"],
        weight_decay=group["adamw_weight_decay"],
        eps=group["eps"],
        maximize=False,
    )
