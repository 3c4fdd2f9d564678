"""A decorator for functions that must compute in the precision that was asked for.

Inside a user's torch.autocast, products of float32 matrices would be computed in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def without_autocast(
    fn: Callable[Concatenate[Tensor, P], R],
) -> Callable[Concatenate[Tensor, P], R]:
    """Decorate `fn(blocks, ...)` so that it runs with autocast switched off.

    Measured without it, on an `optimizer.step()` inside torch.autocast("cpu", torch.bfloat16):
    weights became inf.
    """

    @wraps(fn)
    def run(blocks: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(blocks.device.type, enabled=False):
            return fn(blocks, *args, **kwargs)

    return run
