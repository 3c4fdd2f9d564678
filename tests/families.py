"""Tiny models of every family, seeded: 2 layers, hidden 32, vocabulary 67. `tiny(name, **overrides)`.

Overrides are config fields by their common Hugging Face names (`hidden_size`, `num_hidden_layers`,
`num_attention_heads`, `vocab_size`, `max_position_embeddings`), also for nanoGPT, or the family's own.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

_STANDIN = Path(__file__).parent / "nanogpt_standin" / "model.py"
HF_FAMILIES = ("gpt2", "llama", "mistral", "qwen3")
FAMILIES = (*HF_FAMILIES, "nanogpt") if _STANDIN.exists() else HF_FAMILIES

_COMMON: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
_LLAMA_LIKE: dict[str, Any] = {"intermediate_size": 48, "num_key_value_heads": 2, "pad_token_id": None}
_ROWS: dict[str, dict[str, Any]] = {
    "gpt2": {"bos_token_id": 0, "eos_token_id": 0},
    "llama": _LLAMA_LIKE,
    "mistral": _LLAMA_LIKE,
    "qwen3": {**_LLAMA_LIKE, "head_dim": 16},  # head_dim * heads is not hidden_size: as in Qwen3 itself
}
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
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(name, **{**_COMMON, **_ROWS[name], **overrides})
    return AutoModelForCausalLM.from_config(config).eval()


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
