"""The names of the parts of transformers' encoders, as Architectures.

This is the second half of the table in families.py. It holds strings only.
"""

from __future__ import annotations

from dataclasses import replace

from lip_plugin.model.architecture import Architecture, Attention, Mlp

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
# Its layers have BERT's names. Its positions begin behind the row of the padding id, and its heads
# call their activations as functions.
ROBERTA = replace(
    BERT,
    name="roberta",
    layers="roberta.encoder.layer",
    tokens="roberta.embeddings.word_embeddings",
    positions="roberta.embeddings.position_embeddings",
    types="roberta.embeddings.token_type_embeddings",
    entry_norm="roberta.embeddings.LayerNorm",
    padding="roberta.embeddings.padding_idx",
    positions_follow_padding=True,
    readout=(("dense", "lm_head.dense"), ("function", "gelu"), ("norm", "lm_head.layer_norm")),
    head="lm_head.decoder",
    unused=("lm_head.bias",),
)
ROBERTA_CLASSIFIER = replace(
    ROBERTA,
    name="roberta_classifier",
    readout=(("first", ""), ("dense", "classifier.dense"), ("function", "tanh")),
    head="classifier.out_proj",
    unused=(),
)
DISTILBERT = Architecture(
    name="distilbert",
    layers="distilbert.transformer.layer",
    tokens="distilbert.embeddings.word_embeddings",
    positions="distilbert.embeddings.position_embeddings",
    entry_norm="distilbert.embeddings.LayerNorm",
    heads="n_heads",
    kv_heads=None,
    attention=Attention(
        module="attention",
        sum_norm="sa_layer_norm",
        q="q_lin",
        k="k_lin",
        v="v_lin",
        out="out_lin",
        causal=False,
    ),
    mlp=Mlp(module="ffn", sum_norm="output_layer_norm", up="lin1", down="lin2", act="activation"),
    readout=(("dense", "vocab_transform"), ("act", "activation"), ("norm", "vocab_layer_norm")),
    head="vocab_projector",
)
DISTILBERT_CLASSIFIER = replace(
    DISTILBERT,
    name="distilbert_classifier",
    readout=(("first", ""), ("dense", "pre_classifier"), ("function", "relu")),
    head="classifier",
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
