"""The dtype that a step's update is orthogonalized in: bfloat16 only where it saves time."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

# The keys are what param_groups hold, because those are saved in state_dicts.
PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_BF16_FROM = 256  # width of a block from which bf16 saves time on a CPU (measured)


@lru_cache(maxsize=1)
def cpu_multiplies_bf16() -> bool:
    """Whether this CPU has bf16 products (AVX-512 BF16, AMX) or torch emulates them."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def update_precision(chosen: str | None, update: Tensor) -> torch.dtype | None:
    """The dtype to orthogonalize `update` in; None leaves it to `orthogonalize`."""
    if chosen is not None:
        return PRECISIONS[chosen]
    wide = max(update.shape[-2:]) >= _BF16_FROM and update.dtype == torch.float32
    return (
        torch.bfloat16 if wide and update.device.type == "cpu" and cpu_multiplies_bf16() else None
    )
