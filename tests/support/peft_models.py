"""Tiny models with adapters, and an oracle that knows no formula.

The oracle finds what an adapted layer multiplies with from the layer's own forward.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import peft
import torch
from torch import Tensor, nn

from lip_plugin import project_, retrofit, set_caps_
from lip_plugin.integrations.peft.layers import wrapped_layers
from tests.support.families import tiny
from tests.support.oracles import paper

IDS = torch.arange(48).reshape(4, 12) % 67
TOLERANCE = 1e-3  # what the plugin promises; the maps themselves stay within 1e-4
TARGETS: dict[str, Any] = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "gpt_neox": ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"],
    "phi3": "all-linear",
    "llama": "all-linear",
    "qwen3": "all-linear",
}


def tuner(kind: str, family: str, r: int = 4, **options: Any) -> Any:
    """A config of peft for lora, rslora, dora, oft, coft or hra."""
    options = {"target_modules": TARGETS[family], **options}
    if kind == "hra":
        return peft.HRAConfig(r=r, **options)
    if kind in ("oft", "coft"):
        options = {
            "oft_block_size": 8,
            "r": 0,
            "use_cayley_neumann": False,
            "coft": kind == "coft",
            **options,
        }
        return peft.OFTConfig(**options, **({"eps": 0.5} if kind == "coft" else {}))
    named = {"rslora": {"use_rslora": True}, "dora": {"use_dora": True}}.get(kind, {})
    return peft.LoraConfig(
        r=r, fan_in_fan_out=family == "gpt2", **{"lora_alpha": 2 * r, **named, **options}
    )


def base_of(
    family: str, w_max: float = 1.0, dtype: torch.dtype = torch.float32, filled: bool = True
) -> Any:
    """A retrofitted model whose output maps are not zero (DoRA divides by rows of W0)."""
    base = tiny(family, num_hidden_layers=1)
    retrofit(base, paper(w_max=1.0))
    if filled:
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in base.parameters():
                if p.dim() == 2 and not p.any():
                    p.copy_(torch.randn(p.shape, generator=generator) / math.sqrt(max(p.shape)))
        project_(base, "spectral_normalize")
    if w_max != 1.0:
        set_caps_(base, None, w_max=w_max)
    return base.to(dtype)


def adapted(
    kind: str, family: str, w_max: float = 1.0, dtype: torch.dtype = torch.float32, **options: Any
) -> Any:
    return peft.get_peft_model(base_of(family, w_max, dtype), tuner(kind, family, **options))


def untouched(kind: str, family: str, **options: Any) -> Any:
    return peft.get_peft_model(tiny(family, num_hidden_layers=1), tuner(kind, family, **options))


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


@torch.no_grad()
def effective(layer: Any) -> Tensor:
    """What a layer multiplies with, [d_out, d_in] in float64.

    These are the outputs of a copy of the layer for the unit vectors, less the one for zero.
    """
    twin = copy.deepcopy(layer).double().eval()
    for p in twin.parameters():  # peft may cast to its own dtype
        p.data = p.data.double()
    d_in = twin.in_features if hasattr(twin, "in_features") else twin.base_layer.weight.shape[0]
    eye = torch.eye(d_in, dtype=torch.float64)
    return (twin(eye) - twin(torch.zeros(1, d_in, dtype=torch.float64))).T


@torch.no_grad()
def base_matrix(layer: Any) -> Tensor:
    weight = layer.base_layer.weight.detach().double()
    return weight.T if type(layer.base_layer).__name__.endswith("Conv1D") else weight


def worst_merged(model: nn.Module) -> float:
    """Largest RMS->RMS norm over cap of a block of what the layers multiply with, by SVD."""
    worst = 0.0
    for _, layer, _ in wrapped_layers(model):
        worst = max(worst, over(effective(layer), layer.base_layer.layout))
    return worst


def worst_change(model: nn.Module) -> float:
    """Largest RMS->RMS norm over budget of a block of the change."""
    return max(
        over(effective(layer) - base_matrix(layer), layer.__dict__["lip_budget"])
        for _, layer, _ in wrapped_layers(model)
    )


def over(matrix: Tensor, layout: Any) -> float:
    worst = 0.0
    for s in layout.segments:
        blocks = matrix[s.start : s.stop].unflatten(0, (s.count, s.d_out))
        sizes = torch.linalg.svdvals(blocks)[:, 0] * math.sqrt(blocks.shape[-1] / blocks.shape[-2])
        worst = max(worst, float(sizes.max()) / s.cap)
    return worst


def disturb(model: nn.Module, size: float, seed: int = 1) -> None:
    """Random numbers on top of everything that trains, so that a projection has something to do."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in trainable(model):
            p.add_((size * torch.randn(p.shape, generator=generator)).to(p.dtype))


def state(model: nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
