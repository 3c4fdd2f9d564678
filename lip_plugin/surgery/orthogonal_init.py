"""The start of a model that is trained from scratch: orthogonal blocks.

Open this file to see what `LipschitzConfig(init="orthogonal")` writes into the weights. There are
two starts. Output maps are zero, as in arXiv 2507.13338. Or they are orthogonal too, with
`residual="auto"` and `method="stiefel"`; then the branches carry a signal as well.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor, nn

from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW
from lip_plugin.model.position import OffsetBias
from lip_plugin.progress import steps

logger = logging.getLogger(__name__)


@torch.no_grad()
def init_orthogonal_(model: nn.Module, *, open_branches: bool = False) -> None:
    """Initialize a retrofitted model in place, within its caps.

    - A block of a matrix becomes orthogonal with an RMS->RMS norm of min(1, cap).
    - The output maps of attention and MLP become zero, so every branch starts at zero. With
      `open_branches` they become orthogonal like the others.
    - With `open_branches`, learned biases by position start with a peak for each head
      (`peaked_biases`).
    - Each row of a table gets an RMS norm equal to its cap: tables of positions get sinusoids, the
      others random rows.
    - Biases of constrained layers become zero.
    """
    # Ten seconds for GPT-2 small on one core, so it is shown.
    for _, module in steps(list(constrained_modules(model)), "orthogonal start"):
        for segment, blocks in module.layout.views(module.weight):
            cap = min(1.0, segment.cap) * (1.0 - 1e-6)  # room for float32 rounding of the entries
            if module.layout.norm == ROW:
                shape = blocks.shape
                rows = sinusoids(*shape[-2:]) if segment.role == "position" else torch.randn(shape)
                rows = rows.to(blocks.device)
                size = rows.square().mean(-1, keepdim=True).sqrt()
                blocks.copy_(rows * (segment.cap * (1.0 - 1e-6)) / size)
            elif segment.role in ("out", "down") and not open_branches:
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
    if open_branches:
        learned = [m for m in model.modules() if isinstance(m, OffsetBias) and m.learned]
        for layer, bias in enumerate(learned):
            bias.weight.copy_(peaked_biases(bias.weight.shape[0], bias.weight.shape[1], layer))
    logger.info("orthogonal init of %s", type(model).__name__)


def peaked_biases(heads: int, offsets: int, layer: int) -> Tensor:
    """Biases by position that start with one peak for each head, [heads, offsets], float32.

    Four heads look at this token, at the one before, and at two that are further back, by powers of
    2 and of 3 that differ from layer to layer. Further heads look at further offsets. A peak is 4
    above a slope of 0.02 for each token.
    """
    table = torch.empty(heads, offsets)
    for head in range(heads):
        group, kind = divmod(head, 4)
        far = (2 ** ((layer + group) % 5), 3 ** ((layer + group) % 4))
        peak = min((2 * group, 2 * group + 1, *far)[kind], offsets - 1)
        table[head] = -0.02 * (torch.arange(offsets) - peak).abs()
        table[head, peak] += 4.0
    return table


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
