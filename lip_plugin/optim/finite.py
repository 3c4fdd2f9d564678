"""Are gradients and weights finite? Asked before a step changes anything, and answered alike on every process."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lip_plugin.distributed.owners import groups_of, largest_together, local
from lip_plugin.errors import NonFiniteError


def largest_entries(tensors: list[Tensor]) -> Tensor:
    """Largest absolute entry of each tensor, float32 [n]; nan where one is nan, 0 for empty tensors."""
    ends = [torch.aminmax(t.detach()) if t.numel() else (t.new_zeros(()),) * 2 for t in tensors]
    return torch.stack([torch.maximum(-low, high).float() for low, high in ends])


def check_finite(named: list[tuple[str, Tensor]], replicas: Any = None) -> None:
    """Raise NonFiniteError naming the first tensor with nan or inf, on all processes; one synchronization if all are well."""
    if named:
        tensors = [t for _, t in named]
        largest = largest_entries([local(t) for t in tensors])
        spread = groups_of(tensors, replicas)
        largest = largest_together(largest, spread) if spread else largest
        if not bool(torch.isfinite(largest).all()):
            refuse_non_finite_named([n for n, _ in named], [float(v) for v in largest])


def refuse_non_finite_named(names: list[str], largest: list[float]) -> None:
    """Raise NonFiniteError with the first name whose largest entry is nan or inf."""
    for name, value in zip(names, largest, strict=True):
        if not math.isfinite(value):
            raise NonFiniteError(
                f"{name} holds nan or inf. Nothing was changed by this step; lower the learning rate."
            )
