"""The start of a constrained model: orthogonal blocks at their caps, output maps zero."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW

logger = logging.getLogger(__name__)


@torch.no_grad()
def init_orthogonal_(model: nn.Module) -> None:
    """Every block orthogonal at norm min(1, cap); attention and MLP output maps zero; biases zero."""
    for _, module in constrained_modules(model):
        for segment, blocks in module.layout.views(module.weight):
            cap = min(1.0, segment.cap) * (1.0 - 1e-6)  # room for float32 rounding of the entries
            if module.layout.norm == ROW:
                shape = blocks.shape
                rows = sinusoids(*shape[-2:]) if segment.role == "position" else torch.randn(shape)
                rows = rows.to(blocks.device)
                size = rows.square().mean(-1, keepdim=True).sqrt()
                blocks.copy_(rows * (segment.cap * (1.0 - 1e-6)) / size)
            elif segment.role in ("out", "down"):
                blocks.zero_()
            else:
                for block in blocks:
                    fresh = torch.empty(block.shape, dtype=torch.float32, device=block.device)
                    nn.init.orthogonal_(
                        fresh, gain=cap * math.sqrt(block.shape[0] / block.shape[1])
                    )
                    block.copy_(fresh)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
    logger.info("orthogonal init of %s", type(model).__name__)


def sinusoids(count: int, width: int) -> Tensor:
    """Rows sin, cos of the position at wavelengths from 2 pi to 2 pi count [count, width], float32.

    Offsets between positions are then rotations, so attention to a fixed offset is a linear map away; learned
    from random rows under small logits it takes far longer (measured in docs/LOG.md).
    """
    half = (width + 1) // 2
    frequencies = float(count) ** -(torch.arange(half) / max(half - 1, 1))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]
