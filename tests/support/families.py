"""Tiny models of every family, seeded: 2 layers, width 32, vocabulary 67.

`tiny(name, **overrides)` makes one. Overrides are config fields by their common Hugging Face names
(`hidden_size`, `num_hidden_layers`, `num_attention_heads`, `vocab_size`,
`max_position_embeddings`), also for nanoGPT, or fields of the family's own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

_STANDIN = Path(__file__).parent / "nanogpt_standin" / "model.py"

_COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA_LIKE: dict[str, Any] = {
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "pad_token_id": None,
    "eos_token_id": 0,
}
# windows shorter than the comparison's 16 tokens; one layer of each kind
_WINDOWS = {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}
_GPT2: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0}
_MISTRAL: dict[str, Any] = {**_LLAMA_LIKE, "sliding_window": 7}
_QWEN2: dict[str, Any] = {
    **_LLAMA_LIKE,
    "use_sliding_window": True,
    "max_window_layers": 1,
    **_WINDOWS,
}
_QWEN3: dict[str, Any] = {
    **_LLAMA_LIKE,
    "head_dim": 16,
}  # heads * head_dim is not hidden_size, as there
_GEMMA: dict[str, Any] = {**_LLAMA_LIKE, "head_dim": 16, "query_pre_attn_scalar": 16, **_WINDOWS}
_NEOX: dict[str, Any] = {
    "eos_token_id": 0,
    "intermediate_size": 48,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}
_NEOX["rope_parameters"]["partial_rotary_factor"] = 0.5
_OPT: dict[str, Any] = {
    "ffn_dim": 48,
    "word_embed_proj_dim": 32,
    "pad_token_id": None,
    "eos_token_id": 0,
}
_BERT: dict[str, Any] = {"intermediate_size": 48, "type_vocab_size": 3}
# This is another id than the library's own. Positions begin behind it, and the tests' texts of
# small ids are free of it.
PADDING = 9
_ROBERTA: dict[str, Any] = {**_BERT, "pad_token_id": PADDING}
_DISTILBERT: dict[str, Any] = {"hidden_dim": 48}
_LABELS: dict[str, Any] = {"num_labels": 5, "pad_token_id": PADDING}
_VIT: dict[str, Any] = {
    "image_size": 12,
    "patch_size": 4,
    "num_channels": 2,
    "intermediate_size": 48,
}
# family -> (model_type, auto class, fields)
_ROWS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "CausalLM", _GPT2),
    "gpt2_classifier": ("gpt2", "SequenceClassification", {**_GPT2, **_LABELS}),
    "llama": ("llama", "CausalLM", _LLAMA_LIKE),
    "llama_classifier": ("llama", "SequenceClassification", {**_LLAMA_LIKE, **_LABELS}),
    "mistral": ("mistral", "CausalLM", _MISTRAL),
    "mistral_classifier": ("mistral", "SequenceClassification", {**_MISTRAL, **_LABELS}),
    "qwen2": ("qwen2", "CausalLM", _QWEN2),
    "qwen2_classifier": ("qwen2", "SequenceClassification", {**_QWEN2, **_LABELS}),
    "qwen3": ("qwen3", "CausalLM", _QWEN3),
    "qwen3_classifier": ("qwen3", "SequenceClassification", {**_QWEN3, **_LABELS}),
    "granite": (
        "granite",
        "CausalLM",
        {
            **_LLAMA_LIKE,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.7,
            "logits_scaling": 1.7,
            "attention_multiplier": 0.2,
        },
    ),
    "phi3": (
        "phi3",
        "CausalLM",
        {
            **_LLAMA_LIKE,
            "sliding_window": 7,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.5,
            },
        },
    ),
    "gemma2": (
        "gemma2",
        "CausalLM",
        {**_GEMMA, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    ),
    "gemma3": ("gemma3_text", "CausalLM", _GEMMA),
    "olmo2": ("olmo2", "CausalLM", _LLAMA_LIKE),
    "gpt_neox": ("gpt_neox", "CausalLM", _NEOX),
    "gpt_neox_sequential": ("gpt_neox", "CausalLM", {**_NEOX, "use_parallel_residual": False}),
    "opt": ("opt", "CausalLM", _OPT),
    "opt_post": ("opt", "CausalLM", {**_OPT, "do_layer_norm_before": False}),
    "opt_projected": (
        "opt",
        "CausalLM",
        {**_OPT, "do_layer_norm_before": False, "word_embed_proj_dim": 24},
    ),
    "bert": ("bert", "MaskedLM", _BERT),
    "bert_classifier": ("bert", "SequenceClassification", {**_BERT, "num_labels": 5}),
    "roberta": ("roberta", "MaskedLM", _ROBERTA),
    "roberta_classifier": ("roberta", "SequenceClassification", {**_ROBERTA, "num_labels": 5}),
    "distilbert": ("distilbert", "MaskedLM", _DISTILBERT),
    "distilbert_classifier": (
        "distilbert",
        "SequenceClassification",
        {**_DISTILBERT, "num_labels": 5},
    ),
    "vit": ("vit", "ImageClassification", {**_VIT, "num_labels": 5}),
}
HF_FAMILIES = tuple(_ROWS)
FAMILIES = (*HF_FAMILIES, "nanogpt") if _STANDIN.exists() else HF_FAMILIES
DECODERS = tuple(name for name, (_, auto, _) in _ROWS.items() if auto == "CausalLM")
ENCODERS = tuple(name for name in HF_FAMILIES if "bert" in name)
TEXT_CLASSIFIERS = tuple(name for name in HF_FAMILIES if name.endswith("_classifier"))
CLASSIFIERS = (*TEXT_CLASSIFIERS, "vit")
PADDED = tuple(name for name, (_, _, row) in _ROWS.items() if row.get("pad_token_id") == PADDING)
HEADS = {
    **dict.fromkeys(TEXT_CLASSIFIERS, "score"),
    "bert": "predictions.decoder",
    "bert_classifier": "classifier",
    "roberta": "lm_head.decoder",
    "roberta_classifier": "classifier.out_proj",
    "distilbert": "vocab_projector",
    "distilbert_classifier": "classifier",
    "vit": "classifier",
}  # others: lm_head
POST_NORM = ("opt_post", "opt_projected", *ENCODERS)
_NANOGPT_NAMES = {
    "hidden_size": "n_embd",
    "num_hidden_layers": "n_layer",
    "num_attention_heads": "n_head",
    "max_position_embeddings": "block_size",
}


def tiny(name: str, **overrides: Any) -> nn.Module:
    """A seeded, randomly initialized tiny model of the family, float32, in eval mode."""
    torch.manual_seed(0)
    if name == "nanogpt":
        fields = {_NANOGPT_NAMES.get(k, k): v for k, v in {**_COMMON, **overrides}.items()}
        module = nanogpt_module()
        return module.GPT(module.GPTConfig(**fields)).eval()
    from transformers import AutoConfig

    model_type, _, row = _ROWS[name]
    fields = {**_COMMON, **row, **overrides}
    if "layer_types" in fields:
        fields["layer_types"] = (fields["layer_types"] * fields["num_hidden_layers"])[
            -fields["num_hidden_layers"] :
        ]
    if "word_embed_proj_dim" in fields and name != "opt_projected":
        fields["word_embed_proj_dim"] = fields["hidden_size"]
    config = AutoConfig.for_model(model_type, **fields)
    return auto_class(name).from_config(config).eval()


def auto_class(name: str) -> Any:
    """The Auto class that builds and loads models of a Hugging Face family."""
    import transformers

    return getattr(transformers, f"AutoModelFor{_ROWS[name][1]}")


def inputs_for(name: str, batch: int = 2, tokens: int = 12) -> torch.Tensor:
    """Random inputs of a tiny model.

    They are token ids [batch, tokens] without padding, or pixels in [-1, 1].
    """
    if name == "vit":
        return 2 * torch.rand(batch, 2, 12, 12) - 1
    if name in PADDED:
        ids = torch.randint(66, (batch, tokens))
        return ids + (ids >= PADDING)
    return torch.randint(67, (batch, tokens))


def data_for(name: str, rows: int = 32, tokens: int = 16) -> list[dict[str, Any]]:
    """A data set that a few steps can learn, as Trainer takes it.

    It is periodic text, each row from another start. For classifiers the label is that of the token
    that they read, the first or the last. Images have one brightness for each label.
    """
    if name == "vit":
        shades = torch.linspace(-1, 1, 5)
        return [
            {"pixel_values": shades[i % 5].expand(2, 12, 12).clone(), "labels": i % 5}
            for i in range(rows)
        ]
    texts = [[(start + t) % 7 for t in range(tokens)] for start in range(rows)]
    if name in TEXT_CLASSIFIERS:
        read = 0 if name in ENCODERS else -1
        return [{"input_ids": ids, "labels": ids[read] % 5} for ids in texts]
    return [{"input_ids": ids, "labels": ids} for ids in texts]


def nanogpt_module() -> Any:
    """The nanoGPT stand-in as a module of its own name (theirs is `model`)."""
    if "nanogpt_standin_model" not in sys.modules:
        spec = importlib.util.spec_from_file_location("nanogpt_standin_model", _STANDIN)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
    return sys.modules["nanogpt_standin_model"]
