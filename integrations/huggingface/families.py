"""The table of Hugging Face families: which model class is described by which Architecture.

It holds strings only, and importing it does not import transformers. Decoders are described here
and encoders in encoders.py. _ROWS at the end says which class belongs to which family.

To add a family:

1. Write down what its parts are called. That takes about fifteen lines; most families are LLAMA
   with a change.
2. Append a row to _ROWS.
3. Run `pytest tests/integrations/test_families.py`, which tests the whole contract for every row.

A wrong name is an error at retrofit. A wrong structure is found when the certificate's graph is
compared with the model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.integrations.huggingface.encoders import (
    BERT,
    BERT_CLASSIFIER,
    DISTILBERT,
    DISTILBERT_CLASSIFIER,
    ROBERTA,
    ROBERTA_CLASSIFIER,
    VIT,
)
from lip_plugin.model.activations import register_activation_classes
from lip_plugin.model.architecture import (
    Architecture,
    Attention,
    Family,
    Mlp,
    model_logits,
    register_family,
)
from lip_plugin.model.layers import register_layer_class
from lip_plugin.model.normalization import NormFacts, plain_norm_class, register_norm

# ---- classes whose forward was read ----

register_layer_class("transformers.pytorch_utils.Conv1D", transposed=True)
# This class adds an offset to the position before it looks up the row.
register_layer_class("transformers.models.opt.modeling_opt.OPTLearnedPositionalEmbedding")
# These classes multiply the row by a factor.
register_layer_class("transformers.models.gemma2.modeling_gemma2.Gemma2TextScaledWordEmbedding")
register_layer_class("transformers.models.gemma3.modeling_gemma3.Gemma3TextScaledWordEmbedding")
register_activation_classes(
    "transformers.activations",
    *("GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh"),
    *("SiLUActivation", "AccurateGELUActivation"),
)
_GAIN_IS_ONE_PLUS_WEIGHT = {
    "transformers.models.gemma2.modeling_gemma2.Gemma2RMSNorm",
    "transformers.models.gemma3.modeling_gemma3.Gemma3RMSNorm",
}


def _gemma_norm(module: Any) -> NormFacts | None:
    cls = plain_norm_class(module)
    known = f"{cls.__module__}.{cls.__name__}" in _GAIN_IS_ONE_PLUS_WEIGHT
    return NormFacts(float(module.eps), False, True) if known else None


register_norm(_gemma_norm)

# ---- families ----

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
        norm="post_attention_layernorm",  # in spite of its name the norm in front of the MLP
        gate="gate_proj",
        up="up_proj",
        down="down_proj",
        act="act_fn",
    ),
)
MISTRAL = replace(LLAMA, name="mistral", attention=replace(LLAMA.attention, window="config"))
QWEN2 = replace(LLAMA, name="qwen2", attention=replace(LLAMA.attention, window="module"))
QWEN3 = replace(
    LLAMA,
    name="qwen3",
    attention=replace(LLAMA.attention, q_norm="q_norm", k_norm="k_norm", window="module"),
)
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
    attention=Attention(
        module="self_attn",
        norm="input_layernorm",
        qkv="qkv_proj",
        out="o_proj",
        window="config",
    ),
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
    # The forward reads the buffer embed_scale. A load fills it from the float.
    embedding_scale=("model.embed_tokens.embed_scale", "model.embed_tokens.scalar_embed_scale"),
    softcap="final_logit_softcapping",
    attention=replace(
        LLAMA.attention,
        window="module",
        branch_norm="post_attention_layernorm",
        softcap="attn_logit_softcapping",
    ),
    mlp=replace(
        LLAMA.mlp, norm="pre_feedforward_layernorm", branch_norm="post_feedforward_layernorm"
    ),
)
# Its attention has an attribute for a softcap, but its forward never uses it.
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
        LLAMA.attention,
        norm=None,
        branch_norm="post_attention_layernorm",
        q_norm="q_norm",
        k_norm="k_norm",
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
        module="attention",
        norm="input_layernorm",
        qkv="query_key_value",
        interleaved=True,
        out="dense",
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
        module="self_attn",
        norm="self_attn_layer_norm",
        q="q_proj",
        k="k_proj",
        v="v_proj",
        out="out_proj",
    ),
    # Its MLP is not a module of its own. The branch is scaled at the activation, because that is
    # the only module in it that is not a linear map.
    mlp=Mlp(
        module="",
        norm="final_layer_norm",
        up="fc1",
        down="fc2",
        act="activation_fn",
        scale="activation_fn",
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


def _classifier(decoder: Architecture) -> Architecture:
    """The sequence classifier of a decoder, which reads the last token that is not padding."""
    return replace(
        decoder,
        name=f"{decoder.name}_classifier",
        readout=(("last", ""),),
        head="score",
        padding="config.pad_token_id",
    )


def _one_by_one(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits [batch, 1, labels] of a decoder's classifier.

    Without a pad_token_id it takes only one sequence at a time.
    """
    config: Any = model.config
    if config.pad_token_id is not None:
        return model_logits(model, inputs)
    return torch.cat([model_logits(model, one) for one in inputs.split(1)])


@dataclass(frozen=True)
class _Row:
    """A family with the model_type and the class that it has in transformers.

    `when` says whether the family describes models with a given config; `variant` says the same in
    words.
    """

    architecture: Architecture
    model_type: str
    cls: str
    when: Callable[[Any], bool] = lambda config: True
    variant: str = ""

    def matches(self, model: nn.Module) -> bool:
        """Whether the model is of the class in transformers, or of a subclass of it."""
        config = getattr(model, "config", None)
        bases = [
            base.__name__
            for base in type(model).__mro__
            if base.__module__.startswith("transformers.")
        ]
        return (
            self.cls in bases
            and getattr(config, "model_type", None) == self.model_type
            and bool(self.when(config))
        )


def _encoder(architecture: Architecture, model_type: str, cls: str) -> _Row:
    return _Row(
        architecture, model_type, cls, lambda config: not config.is_decoder, "is_decoder=False"
    )


def _opt(architecture: Architecture, before: bool, projected: bool) -> _Row:
    def when(config: Any) -> bool:
        differ = config.word_embed_proj_dim != config.hidden_size
        return config.do_layer_norm_before == before and differ == projected

    equal = "another than" if projected else "equal to"
    variant = f"do_layer_norm_before={before} and word_embed_proj_dim {equal} hidden_size"
    return _Row(architecture, "opt", "OPTForCausalLM", when, variant)


def _neox(architecture: Architecture, parallel: bool) -> _Row:
    return _Row(
        architecture,
        "gpt_neox",
        "GPTNeoXForCausalLM",
        lambda config: config.use_parallel_residual == parallel,
        f"use_parallel_residual={parallel}",
    )


_ROWS = (
    _Row(GPT2, "gpt2", "GPT2LMHeadModel"),
    _Row(_classifier(GPT2), "gpt2", "GPT2ForSequenceClassification"),
    _Row(LLAMA, "llama", "LlamaForCausalLM"),
    _Row(_classifier(LLAMA), "llama", "LlamaForSequenceClassification"),
    _Row(MISTRAL, "mistral", "MistralForCausalLM"),
    _Row(_classifier(MISTRAL), "mistral", "MistralForSequenceClassification"),
    _Row(QWEN2, "qwen2", "Qwen2ForCausalLM"),
    _Row(_classifier(QWEN2), "qwen2", "Qwen2ForSequenceClassification"),
    _Row(QWEN3, "qwen3", "Qwen3ForCausalLM"),
    _Row(_classifier(QWEN3), "qwen3", "Qwen3ForSequenceClassification"),
    _Row(GRANITE, "granite", "GraniteForCausalLM"),
    _Row(PHI3, "phi3", "Phi3ForCausalLM"),
    _Row(GEMMA2, "gemma2", "Gemma2ForCausalLM"),
    _Row(GEMMA3, "gemma3_text", "Gemma3ForCausalLM"),
    _Row(OLMO2, "olmo2", "Olmo2ForCausalLM"),
    _neox(GPT_NEOX, parallel=True),
    _neox(GPT_NEOX_SEQUENTIAL, parallel=False),
    _opt(OPT, before=True, projected=False),
    _opt(OPT_POST, before=False, projected=False),
    _opt(OPT_PROJECTED, before=False, projected=True),
    _encoder(BERT, "bert", "BertForMaskedLM"),
    _encoder(BERT_CLASSIFIER, "bert", "BertForSequenceClassification"),
    _encoder(ROBERTA, "roberta", "RobertaForMaskedLM"),
    _encoder(ROBERTA_CLASSIFIER, "roberta", "RobertaForSequenceClassification"),
    _Row(DISTILBERT, "distilbert", "DistilBertForMaskedLM"),
    _Row(DISTILBERT_CLASSIFIER, "distilbert", "DistilBertForSequenceClassification"),
    _Row(VIT, "vit", "ViTForImageClassification"),
)
HF_ARCHITECTURES = tuple(row.architecture for row in _ROWS)


def _is_pretrained(model: nn.Module) -> bool:
    config: Any = model.config
    return bool(getattr(config, "_name_or_path", "") or getattr(model, "name_or_path", ""))


def _depends_on(model: nn.Module) -> tuple[Any, ...]:
    """The attention and the mask that transformers looks up by the config's name, at each call."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    config: Any = model.config
    name = getattr(config, "_attn_implementation", None)
    tables = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    found = (dict(table.items()).get(name) for table in tables)
    return tuple(function for function in found if function is not None)


def _on_retrofit(model: nn.Module, config: Any) -> None:
    from lip_plugin.integrations.huggingface.saving import mark_

    mark_(model, config)


for _row in _ROWS:
    _last = ("last", "") in _row.architecture.readout
    register_family(
        Family(
            _row.architecture,
            _row.matches,
            is_pretrained=_is_pretrained,
            logits=_one_by_one if _last else model_logits,
            on_retrofit=_on_retrofit,
            depends_on=_depends_on,
            model_type=_row.model_type,
            cls=_row.cls,
            variant=_row.variant,
        )
    )
