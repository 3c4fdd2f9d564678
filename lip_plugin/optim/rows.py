"""Momentum in float32, and the step of a table of rows: each row moves by a known RMS norm."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor

from lip_plugin.distributed.owners import local
from lip_plugin.model.layout import Layout, clamp_rows_


def momentum_(
    state: MutableMapping[Tensor, dict[str, Any]], weights: list[Tensor], group: dict[str, Any]
) -> tuple[list[Tensor], list[Tensor]]:
    """The local gradients, and the momenta moved towards them, in float32 or wider."""
    grads, buffers = [], []
    for p in weights:
        assert p.grad is not None
        wide = torch.promote_types(p.grad.dtype, torch.float32)
        grads.append(local(p.grad).to(wide))
        if "momentum" not in state[p]:
            state[p]["momentum"] = torch.zeros_like(p, dtype=wide)
        buffers.append(local(state[p]["momentum"]))
    if weights:
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
    return grads, buffers


def step_rows_(group: dict[str, Any], state: MutableMapping[Tensor, dict[str, Any]]) -> None:
    """Move each row that has a gradient by at most the rate in RMS norm; others only decay."""
    rate = group["lr"] * group["lr_ratio"]
    for p, plain in zip(group["params"], group["layouts"]):
        if p.grad is None:  # somebody else may have written to it
            for segment, rows in Layout.from_plain(plain).views(local(p)):
                if segment.cap is not None:
                    clamp_rows_(rows, segment.cap)
            continue
        (grad,), (buffer,) = momentum_(state, [p], group)
        here = local(p)  # a shard holds whole rows, so their norms can be computed here
        update = torch.lerp(grad, buffer, group["momentum"])
        seen = (grad != 0).any(-1, keepdim=True)
        # Divided by its largest entry, a row has squares that neither over- nor underflow.
        largest = update.abs().amax(-1, keepdim=True)
        update = torch.where(seen & (largest > 0), update / largest, 0.0)
        size = update.square().mean(-1, keepdim=True).sqrt()
        update = torch.where(size > 0, update / size, 0.0)
        here.mul_(1 - rate * group["weight_decay"]).add_(update.to(p.dtype), alpha=-rate)
        for segment, rows in Layout.from_plain(plain).views(here):
            if segment.cap is not None:
                clamp_rows_(rows, segment.cap)
