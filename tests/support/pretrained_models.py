"""Models as if they had been trained, with floors and without.

Their gains are not ones, and their output maps are not zero.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from lip_plugin import calibrate, own_caps, retrofit
from lip_plugin.model.architecture import find_family
from tests.support.families import inputs_for, tiny
from tests.support.oracles import paper


def logits(model: Any, inputs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return find_family(model).logits(model.eval(), inputs)


def lively(family: str, **overrides: Any) -> Any:
    """Gains and biases that are not ones and zeros, output maps that are not zero."""
    model = tiny(family, **overrides)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(
                0.2
                * torch.randn(p.shape, generator=generator)
                / math.sqrt(max(1, p.shape[-1] if p.dim() > 1 else 1))
            )
    return model


def calibrated(family: str, quantile: float = 0.5, times: float = 1.0, **overrides: Any) -> Any:
    """Floors at a quantile of what the norms divide by on the tests' inputs, times a number."""
    model = lively(family, **overrides)
    found = calibrate(model, [inputs_for(family)], quantile=quantile)
    floors = {slot: times * floor for slot, floor in found.items()}
    retrofit(model, paper(norms="calibrated", norm_floors=floors, overrides=own_caps(model)))
    return model
