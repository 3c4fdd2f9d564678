"""Computing in the precision that was asked for, also inside somebody's torch.autocast."""

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
    """Run `fn(blocks, ...)` with autocast off: it would compute float32 products in bfloat16.

    Measured without it, on an `optimizer.step()` inside torch.autocast("cpu", torch.bfloat16): weights became inf.
    """

    @wraps(fn)
    def run(blocks: Tensor, *args: P.args, **kwargs: P.kwargs) -> R:
        with torch.autocast(blocks.device.type, enabled=False):
            return fn(blocks, *args, **kwargs)

    return run
