"""4-bit bases (QLoRA) are certified through what they multiply with, 8-bit ones refused."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from tests.support.families import tiny

bnb = pytest.importorskip("bitsandbytes")
peft = pytest.importorskip("peft")

from lip_plugin import (  # noqa: E402
    LipschitzMuon,
    attach_projection,
    certify,
    constrain_adapters,
    drift,
    falsify,
    retrofit,
)
from lip_plugin.errors import UnsupportedModelError  # noqa: E402
from lip_plugin.integrations.bitsandbytes import dequantize  # noqa: E402
from lip_plugin.integrations.peft.enforce import merged_block_norms  # noqa: E402
from tests.support.oracles import paper  # noqa: E402
from tests.support.peft_models import IDS, trainable  # noqa: E402


def quantized(family: str, kind: str = "nf4") -> Any:
    """A tiny model whose block maps are 4-bit (or 8-bit), as transformers' loader leaves it."""
    model = tiny(family, num_hidden_layers=1)
    for name, module in list(model.named_modules()):
        if type(module) is not nn.Linear or "head" in name or "embed_out" in name:
            continue
        if kind == "int8":
            layer = bnb.nn.Linear8bitLt(
                module.in_features,
                module.out_features,
                module.bias is not None,
                has_fp16_weights=False,
            )
        else:
            layer = bnb.nn.Linear4bit(
                module.in_features,
                module.out_features,
                module.bias is not None,
                torch.float32,
                quant_type=kind,
            )
        layer.load_state_dict(module.state_dict())
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, layer.to("cpu"))
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = kind != "int8", kind == "int8"
    return model


@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_a_layer_multiplies_with_what_is_read(kind: str) -> None:
    model = quantized("gpt_neox", kind)
    for module in model.modules():
        weight = dequantize(module)
        if weight is not None:
            x = torch.randn(5, weight.shape[1])
            expected = nn.functional.linear(x, weight.float(), module.bias)
            torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "phi3"])
def test_a_quantized_base_is_certified_and_its_adapters_held(family: str) -> None:
    model = quantized(family)
    alone = certify(model).log10_lipschitz
    assert math.log10(falsify(model, restarts=1, steps=3).lower_bound) <= alone
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules="all-linear"))
    constrain_adapters(model, 0.1, relative=True)
    for optimizer in (torch.optim.AdamW(trainable(model), lr=0.1), LipschitzMuon(model, lr=0.2)):
        if isinstance(optimizer, torch.optim.AdamW):
            attach_projection(optimizer, model)
        for _ in range(3):
            model(input_ids=IDS, labels=IDS).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            assert max(b.worst_over_cap for b in merged_block_norms(model)) <= 1 + 1e-3
    assert max(b.worst_over_cap for b in merged_block_norms(model)) > 0.5
    assert certify(model).log10_lipschitz != alone
    found = drift(model, restarts=2, steps=5)
    assert 0 < found.logit_lower <= found.logit_upper
    with model.disable_adapter():
        assert certify(model).log10_lipschitz == pytest.approx(alone)


def test_eight_bits_and_caps_on_codes_are_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="rounds what enters it to 8 bits"):
        certify(quantized("llama", "int8"))
    model = quantized("llama")
    with pytest.raises(UnsupportedModelError, match="quantized"):
        retrofit(model, paper(norms="keep"))
    unready = bnb.nn.Linear4bit(8, 8)
    with pytest.raises(UnsupportedModelError, match="quantized when it moves to a device"):
        dequantize(unready)
