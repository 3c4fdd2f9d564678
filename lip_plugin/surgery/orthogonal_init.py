"""The start of a model that is trained from scratch: orthogonal blocks, and output maps of zeros.

Open this file to see what `LipschitzConfig(init="orthogonal")` writes into the weights.
Source: the initialization of arXiv 2507.13338.
"""

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
    """Initialize a retrofitted model in place, within its caps.

    - A block of a matrix becomes orthogonal with an RMS->RMS norm of min(1, cap).
    - The output maps of attention and MLP become zero, so every branch starts at zero.
    - Each row of a table gets an RMS norm equal to its cap: tables of positions get sinusoids, the
      others random rows.
    - Biases of constrained layers become zero.
    """
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
    """A table of positions [count, width], float32: sines and cosines of the position.

    The wavelengths go from 2 pi to 2 pi count. A shift of the position by a fixed offset is then a
    rotation, so attention to that offset is only a linear map away. Learned from random rows under
    small logits, the same takes far longer (measured in docs/LOG.md).
    """
    half = (width + 1) // 2
    frequencies = float(count) ** -(torch.arange(half) / max(half - 1, 1))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]
