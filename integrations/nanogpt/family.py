"""nanoGPT's GPT as an Architecture.

The model has no model_type, so it is recognized by its attributes.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lip_plugin.model.architecture import Architecture, Attention, Family, Mlp, register_family
from lip_plugin.model.normalization import NormFacts, plain_norm_class, register_norm

NANOGPT = Architecture(
    name="nanogpt",
    layers="transformer.h",
    tokens="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    head="lm_head",
    heads="n_head",
    kv_heads=None,
    # It calls scaled_dot_product_attention with the default scale, so no attribute holds it.
    attention=Attention(module="attn", norm="ln_1", qkv="c_attn", out="c_proj", scaling=None),
    mlp=Mlp(module="mlp", norm="ln_2", up="c_fc", down="c_proj", act="gelu"),
)


def _matches(model: nn.Module) -> bool:
    config = getattr(model, "config", None)
    return type(model).__name__ == "GPT" and all(
        hasattr(config, name) for name in ("n_layer", "n_head", "n_embd", "block_size")
    )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    return model(ids, ids)[0]  # without targets the forward gives only the last position


def _norm(module: Any) -> NormFacts | None:
    """The facts about nanoGPT's LayerNorm, whose eps is a literal in its forward."""
    own = plain_norm_class(module).__name__ == "LayerNorm" and not hasattr(module, "eps")
    return NormFacts(1e-5, True) if own else None


register_norm(_norm)
register_family(Family(NANOGPT, _matches, logits=_logits))
