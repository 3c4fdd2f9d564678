"""The table: Hugging Face models -> Architecture. Strings only; importing it imports nothing.

To add a family: say what its parts are called (about fifteen lines, most families are LLAMA with a
change), append it to HF_ARCHITECTURES, and run `pytest tests/test_families.py`, which drives the whole
contract from this table. A wrong name is an error at retrofit; a wrong structure is caught when the
certificate's graph is compared with the model.
"""

from __future__ import annotations

from collections.abc import Callable
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
QWEN2 = replace(LLAMA, name="qwen2")
QWEN3 = replace(LLAMA, name="qwen3", attention=replace(LLAMA.attention, q_norm="q_norm", k_norm="k_norm"))

GRANITE = replace(
    LLAMA,
    name="granite",
    embedding_scale=("model.embedding_multiplier",),
    residual_scale="residual_multiplier",
    logits_divisor="logits_scaling",
)

PHI3 = replace(
    LLAMA,
    name="phi3",
    attention=Attention(module="self_attn", norm="input_layernorm", qkv="qkv_proj", out="o_proj"),
    mlp=Mlp(
        module="mlp",
        norm="post_attention_layernorm",
        gate_up="gate_up_proj",
        down="down_proj",
        act="activation_fn",
    ),
)

GEMMA2 = replace(
    LLAMA,
    name="gemma2",
    # the forward reads the buffer; the float is what a load fills the buffer from
    embedding_scale=("model.embed_tokens.embed_scale", "model.embed_tokens.scalar_embed_scale"),
    softcap="final_logit_softcapping",
    attention=replace(
        LLAMA.attention, branch_norm="post_attention_layernorm", softcap="attn_logit_softcapping"
    ),
    mlp=replace(LLAMA.mlp, norm="pre_feedforward_layernorm", branch_norm="post_feedforward_layernorm"),
)
# its attention holds a softcap too, which its forward never passes on
GEMMA3 = replace(
    GEMMA2,
    name="gemma3",
    attention=replace(
        GEMMA2.attention, softcap=None, q_norm="q_norm", k_norm="k_norm", layer_type="layer_type"
    ),
)

OLMO2 = replace(
    LLAMA,
    name="olmo2",
    attention=replace(
        LLAMA.attention, norm=None, branch_norm="post_attention_layernorm", q_norm="q_norm", k_norm="k_norm"
    ),
    mlp=replace(LLAMA.mlp, norm=None, branch_norm="post_feedforward_layernorm"),
)

GPT_NEOX = Architecture(
    name="gpt_neox",
    layers="gpt_neox.layers",
    tokens="gpt_neox.embed_in",
    final_norm="gpt_neox.final_layer_norm",
    head="lm_head",
    rotary="gpt_neox.rotary_emb",
    kv_heads=None,
    parallel=True,
    attention=Attention(
        module="attention", norm="input_layernorm", qkv="query_key_value", interleaved=True, out="dense"
    ),
    mlp=Mlp(
        module="mlp",
        norm="post_attention_layernorm",
        up="dense_h_to_4h",
        down="dense_4h_to_h",
        act="act",
    ),
)
GPT_NEOX_SEQUENTIAL = replace(GPT_NEOX, name="gpt_neox_sequential", parallel=False)

OPT = Architecture(
    name="opt",
    layers="model.decoder.layers",
    tokens="model.decoder.embed_tokens",
    positions="model.decoder.embed_positions",
    final_norm="model.decoder.final_layer_norm",
    head="lm_head",
    kv_heads=None,
    attention=Attention(
        module="self_attn", norm="self_attn_layer_norm", q="q_proj", k="k_proj", v="v_proj", out="out_proj"
    ),
    # its MLP is no module of its own: what can be scaled without touching a linear map is the activation
    mlp=Mlp(
        module="", norm="final_layer_norm", up="fc1", down="fc2", act="activation_fn", scale="activation_fn"
    ),
)
OPT_POST = replace(
    OPT,
    name="opt_post",
    final_norm=None,
    attention=replace(OPT.attention, norm=None, sum_norm="self_attn_layer_norm"),
    mlp=replace(OPT.mlp, norm=None, sum_norm="final_layer_norm"),
)
OPT_PROJECTED = replace(
    OPT_POST,
    name="opt_projected",
    token_map="model.decoder.project_in",
    readout=(("dense", "model.decoder.project_out"),),
)

BERT = Architecture(
    name="bert",
    layers="bert.encoder.layer",
    tokens="bert.embeddings.word_embeddings",
    positions="bert.embeddings.position_embeddings",
    types="bert.embeddings.token_type_embeddings",
    entry_norm="bert.embeddings.LayerNorm",
    kv_heads=None,
    attention=Attention(
        module="attention",
        sum_norm="attention.output.LayerNorm",
        q="self.query",
        k="self.key",
        v="self.value",
        out="output.dense",
        scaling="self.scaling",
        scale="output.dropout",
        causal=False,
    ),
    mlp=Mlp(
        module="",
        sum_norm="output.LayerNorm",
        up="intermediate.dense",
        act="intermediate.intermediate_act_fn",
        down="output.dense",
        scale="output.dropout",
    ),
    readout=(
        ("dense", "cls.predictions.transform.dense"),
        ("act", "cls.predictions.transform.transform_act_fn"),
        ("norm", "cls.predictions.transform.LayerNorm"),
    ),
    head="cls.predictions.decoder",
    unused=("cls.predictions.bias",),
)
BERT_CLASSIFIER = replace(
    BERT,
    name="bert_classifier",
    readout=(("first", ""), ("dense", "bert.pooler.dense"), ("act", "bert.pooler.activation")),
    head="classifier",
    unused=(),
)

VIT = Architecture(
    name="vit",
    layers="vit.layers",
    patches="vit.embeddings.patch_embeddings.projection",
    first="vit.embeddings.cls_token",
    positions="vit.embeddings.position_embeddings",
    final_norm="vit.layernorm",
    readout=(("first", ""),),
    head="classifier",
    kv_heads=None,
    attention=Attention(
        module="attention",
        norm="layernorm_before",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        out="o_proj",
        causal=False,
    ),
    mlp=Mlp(module="mlp", norm="layernorm_after", up="fc1", down="fc2", act="activation_fn"),
)


def _hugging_face(model_type: str, cls: str = "", **fields: Any) -> Callable[[nn.Module], bool]:
    """Whether a model is transformers' own, of this model_type, class name and config fields."""

    def matches(model: nn.Module) -> bool:
        config = getattr(model, "config", None)
        ours = any(base.__module__.startswith("transformers.") for base in type(model).__mro__)
        named = not cls or any(base.__name__ == cls for base in type(model).__mro__)
        return (
            ours
            and named
            and getattr(config, "model_type", None) == model_type
            and all(getattr(config, name, None) == value for name, value in fields.items())
        )

    return matches


def _opt(before: bool, projected: bool) -> Callable[[nn.Module], bool]:
    is_opt = _hugging_face("opt", do_layer_norm_before=before)

    def matches(model: nn.Module) -> bool:
        if not is_opt(model):
            return False
        config: Any = model.config
        return (config.word_embed_proj_dim != config.hidden_size) == projected

    return matches


_ROWS: tuple[tuple[Architecture, Callable[[nn.Module], bool]], ...] = (
    (GPT2, _hugging_face("gpt2")),
    (LLAMA, _hugging_face("llama")),
    (MISTRAL, _hugging_face("mistral")),
    (QWEN2, _hugging_face("qwen2")),
    (QWEN3, _hugging_face("qwen3")),
    (GRANITE, _hugging_face("granite")),
    (PHI3, _hugging_face("phi3")),
    (GEMMA2, _hugging_face("gemma2")),
    (GEMMA3, _hugging_face("gemma3_text")),
    (OLMO2, _hugging_face("olmo2")),
    (GPT_NEOX, _hugging_face("gpt_neox", use_parallel_residual=True)),
    (GPT_NEOX_SEQUENTIAL, _hugging_face("gpt_neox", use_parallel_residual=False)),
    (OPT, _opt(before=True, projected=False)),
    (OPT_POST, _opt(before=False, projected=False)),
    (OPT_PROJECTED, _opt(before=False, projected=True)),
    (BERT, _hugging_face("bert", "BertForMaskedLM", is_decoder=False)),
    (BERT_CLASSIFIER, _hugging_face("bert", "BertForSequenceClassification", is_decoder=False)),
    (VIT, _hugging_face("vit", "ViTForImageClassification")),
)
HF_ARCHITECTURES = tuple(architecture for architecture, _ in _ROWS)


def _is_pretrained(model: nn.Module) -> bool:
    config: Any = model.config
    return bool(getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", ""))


def _on_retrofit(model: nn.Module, config: Any) -> None:
    from lip_plugin.integrations.hf_persistence import mark_

    mark_(model, config)


for _architecture, _matches in _ROWS:
    register_family(Family(_architecture, _matches, is_pretrained=_is_pretrained, on_retrofit=_on_retrofit))
