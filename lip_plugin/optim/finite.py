"""Checks that gradients and weights are finite.

They run before a step changes anything, and give the same answer on every process.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lip_plugin.distributed.owners import groups_of, largest_together, local
from lip_plugin.errors import NonFiniteError


def largest_entries(tensors: list[Tensor]) -> Tensor:
    """Largest absolute entry of each tensor, as a float32 tensor [n].

    It is nan for a tensor that holds nan, and 0 for an empty tensor.
    """
    ends = [torch.aminmax(t.detach()) if t.numel() else (t.new_zeros(()),) * 2 for t in tensors]
    return torch.stack([torch.maximum(-low, high).float() for low, high in ends])


def check_finite(
    named: list[tuple[str, Tensor]], replicas: Any = None, *, moved: bool = False
) -> None:
    """Raise NonFiniteError, on all processes, if one of the tensors holds nan or inf.

    If all are finite, this costs one synchronization with the device.

    Args:
        named: (name, tensor) pairs; the first one that is not finite is named.
        replicas: process group whose members hold equal copies of the tensors.
        moved: whether an optimizer has stepped them already; the message then says so.
    """
    if named:
        tensors = [t for _, t in named]
        largest = largest_entries([local(t) for t in tensors])
        spread = groups_of(tensors, replicas)
        largest = largest_together(largest, spread) if spread else largest
        if not bool(torch.isfinite(largest).all()):
            refuse_non_finite_named([n for n, _ in named], [float(v) for v in largest], moved)


def refuse_non_finite_named(names: list[str], largest: list[float], moved: bool = False) -> None:
    """Raise NonFiniteError for the first name whose value is nan or inf."""
    for name, value in zip(names, largest, strict=True):
        if not math.isfinite(value):
            what = (
                "The optimizer's step has put it there, and nothing was projected: go back to the "
                "last checkpoint, and lower the learning rate."
                if moved
                else "Nothing was changed by this step; lower the learning rate."
            )
            raise NonFiniteError(f"{name} holds nan or inf. {what}")
