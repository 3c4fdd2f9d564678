"""The table: Hugging Face model_type -> Architecture. Strings only; importing it imports nothing.

To add a family that is a pre-norm decoder: say what its parts are called (about fifteen lines, most
families are LLAMA with a change), append it to HF_ARCHITECTURES, and run
`pytest tests/test_families.py`, which drives the whole contract from this table. A wrong name is an
error at retrofit; a wrong structure is caught when the certificate's graph is compared with the model.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from lip_plugin.architecture import Architecture, Attention, Family, Mlp, register_family

GPT2 = Architecture(
    name="gpt2",
    layers="transformer.h",
    tokens="transformer.wte",
    positions="transformer.wpe",
    final_norm="transformer.ln_f",
    head="lm_head",
    kv_heads=None,
    attention=Attention(module="attn", norm="ln_1", qkv="c_attn", out="c_proj"),
    mlp=Mlp(module="mlp", norm="ln_2", up="c_fc", down="c_proj", act="act"),
)

LLAMA = Architecture(
    name="llama",
    layers="model.layers",
    tokens="model.embed_tokens",
    final_norm="model.norm",
    head="lm_head",
    rotary="model.rotary_emb",
    attention=Attention(
        module="self_attn", norm="input_layernorm", q="q_proj", k="k_proj", v="v_proj", out="o_proj"
    ),
    mlp=Mlp(
        module="mlp",
        norm="post_attention_layernorm",  # the name misleads: it is the norm in front of the MLP
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        act="act_fn",
    ),
)

MISTRAL = replace(LLAMA, name="mistral")

QWEN3 = replace(LLAMA, name="qwen3", attention=replace(LLAMA.attention, q_norm="q_norm", k_norm="k_norm"))

HF_ARCHITECTURES = (GPT2, LLAMA, MISTRAL, QWEN3)


def _matches(name: str) -> Any:
    def matches(model: nn.Module) -> bool:
        kind = getattr(getattr(model, "config", None), "model_type", None)
        hugging_face = any(cls.__module__.startswith("transformers.") for cls in type(model).__mro__)
        return kind == name and hugging_face

    return matches


def _is_pretrained(model: nn.Module) -> bool:
    return bool(getattr(model.config, "_name_or_path", "") or getattr(model, "name_or_path", ""))


def _on_retrofit(model: nn.Module, config: Any) -> None:
    from lip_plugin.integrations.hf_persistence import mark_

    mark_(model, config)


for _architecture in HF_ARCHITECTURES:
    register_family(
        Family(
            _architecture,
            _matches(_architecture.name),
            is_pretrained=_is_pretrained,
            on_retrofit=_on_retrofit,
        )
    )
