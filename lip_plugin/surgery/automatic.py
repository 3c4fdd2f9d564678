"""What "auto" means for a model: options that were measured to train, by family and depth.

`resolved` writes a value in the place of every "auto". Open this file to see the formulas. All of
them are from docs/depth.md, which has the measurements.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.config_values import AUTO, LEGACY, LOGIT_SCALE
from lip_plugin.model.parts import Parts


def depth_steps(layers: int, *, parallel: bool = False) -> float | tuple[float, float]:
    """The residual weights for this many layers: of attention and of MLPs, or one for both.

    They fall as 1 / layers, so that the product of all 1-a, which is what the identity path passes
    on, is at least 1.5e-5 at any depth. Up to three layers they are the largest that were of use.
    """
    attention, mlp = min(0.75, 2.4 / layers), min(0.9, 3.0 / layers)
    return min(0.75, 4.2 / layers) if parallel else (attention, mlp)


def balanced_value_scale(attention_scale: float, *, turned: bool) -> float:
    """The factor on values that makes attention with content 1-Lipschitz at caps of 1.

    With logits of s q.k / d_head, a head whose maps are within 1 has a constant of at most
    sqrt(1 + s^2) + s times its value factor, or 1 + 2 s if keys are turned by their position
    (docs/maths/attention.md). So a sharp head is a quiet one.
    """
    s = attention_scale
    return 1.0 / (1.0 + 2.0 * s if turned else math.sqrt(1.0 + s * s) + s)


def why_no_position_bias(model: nn.Module, names: Parts) -> str | None:
    """Why the model's attention has no place for biases by position. None if it has one."""
    attention = getattr(model.config, "_attn_implementation", "sdpa")
    if names.architecture.patches:
        return "position_bias counts tokens, and this model has patches of an image"
    if attention not in ("sdpa", None):
        return (
            "position_bias needs scaled_dot_product_attention, and this model attends by "
            f"{attention!r}"
        )
    return None


def resolved(config: LipschitzConfig, model: nn.Module, names: Parts) -> LipschitzConfig:
    """The config with a value in the place of every None of `norms` and `logit_scale` and "auto".

    These values are saved with the model, so that other formulas in a later version do not change
    what it computes.

    Args:
        config: what the user chose.
        model: the model.
        names: its parts.
    """
    norms, scale = config.norms or "remove", config.logit_scale
    architecture = names.architecture
    if scale is None:
        scale = LOGIT_SCALE if norms == "remove" and architecture.final_norm else 1.0
    if norms != "remove":
        neutral = {k: v for k, v in LEGACY.items() if getattr(config, k) == AUTO}
        return replace(config, norms=norms, logit_scale=scale, **neutral)
    values: dict[str, Any] = {"norms": norms, "logit_scale": scale}
    attends = config.attention_scale
    bias = config.position_bias
    if bias == AUTO:
        fits = config.some_by_position_alone or why_no_position_bias(model, names) is None
        bias = "learned" if fits else None
    if attends == AUTO:
        attends = 1.0 if bias is None else 0.0
    values |= {"position_bias": bias, "attention_scale": attends}
    if config.value_scale == AUTO:
        turned = names.rotary is not None
        scales = attends if isinstance(attends, tuple) else (attends,)
        balanced = tuple(balanced_value_scale(float(s), turned=turned) for s in scales)
        values["value_scale"] = balanced if isinstance(attends, tuple) else balanced[0]
    if config.residual == AUTO:
        values["residual"] = depth_steps(len(names.layers), parallel=architecture.parallel)
    if config.activation == AUTO:
        # gate_max asks for a product whose factors are limited.
        values["activation"] = None if names.gated and config.gate_max is not None else "abs"
    values |= {"biases": "drop"} if config.biases == AUTO else {}
    values |= {"method": "stiefel"} if config.method == AUTO else {}
    return replace(config, **values)
