"""gate_max caps both factors of a gated MLP entrywise, and so bounds from caps."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from lip_plugin import (
    attach_projection,
    certify,
    falsify,
    forward_rounding_upper,
    project_,
    retrofit,
)
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.nodes import Gate
from lip_plugin.errors import CertificateError, ConfigError, UnsupportedModelError
from lip_plugin.model.scales import EntryCap, entry_cap
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import logits_of, paper, randomize_

GATED = [
    name
    for name in FAMILIES
    if any(isinstance(n, Gate) for n in walk(build(tiny(name)).body.nodes))
]


def model_with(family: str, **fields) -> nn.Module:
    model = tiny(family)
    retrofit(model, paper(**fields))
    return randomize_(model)


def test_the_gated_families_are_the_ones_we_think() -> None:
    gated = {"llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "olmo2", "granite"}
    assert gated == {name.removesuffix("_classifier") for name in GATED}


@pytest.mark.parametrize("family", GATED)
def test_the_bound_holds_under_attack_and_the_graph_is_the_model(family: str) -> None:
    model = model_with(family, gate_max=1.5, w_max=2.0)
    weights = certify(model)  # compares graph and model first
    assert 0 < falsify(model, restarts=2, steps=10, tokens=5).lower_bound <= weights.lipschitz
    project_(model)
    assert certify(model).lipschitz <= certify(model, "caps").lipschitz


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_no_entry_of_either_factor_exceeds_the_cap(family: str) -> None:
    """No entry of either factor exceeds the cap.

    Weights are a hundred times too large, and the product stays within the square of the cap.
    """
    model = model_with(family, gate_max=2.0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "mlp" in name:
                p.mul_(100)
    seen = []
    for name, module in model.named_modules():
        if name.endswith("down_proj"):
            module.register_forward_pre_hook(
                lambda m, args: seen.append(float(args[0].detach().abs().max()))
            )
    logits_of(model, torch.randint(0, 67, (2, 8)))
    assert 2.0 < max(seen) <= 4.0 * (1 + 1e-6)  # float32 rounding of tanh and of the product


def test_from_caps_the_factor_is_the_cap_and_no_longer_the_width() -> None:
    """From caps the factor is the cap, whatever the width.

    With d = 32 and 128, the bound of one MLP grows like sqrt(d) without the cap.
    """
    constants: dict[float | None, list[float]] = {None: [], 2.0: []}
    for gate_max, found in constants.items():
        for d in (32, 128):
            model = tiny("llama", hidden_size=d, intermediate_size=2 * d, num_hidden_layers=1)
            retrofit(model, paper(gate_max=gate_max))
            mlp = certify(model, "caps").layers[1]
            found.append(mlp.lipschitz - 1)
    assert constants[None][1] / constants[None][0] == pytest.approx(2.0, rel=0.01)
    assert constants[2.0][1] == pytest.approx(constants[2.0][0], rel=0.01)
    assert constants[2.0][1] < constants[None][0]


def test_a_cap_that_is_never_reached_changes_nothing() -> None:
    plain, capped = model_with("llama"), model_with("llama", gate_max=1e6)
    ids = torch.randint(0, 67, (2, 8))
    assert torch.allclose(logits_of(plain, ids), logits_of(capped, ids), atol=1e-6)


def test_a_model_without_a_gate_takes_no_notice() -> None:
    model = model_with("gpt2", gate_max=1.0)
    assert not any(
        isinstance(h, EntryCap) for m in model.modules() for h in m._forward_hooks.values()
    )


def test_it_is_saved_and_loaded(tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = model_with("llama", gate_max=1.25)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert entry_cap(loaded.model.layers[0].mlp.up_proj) == 1.25
    ids = torch.randint(0, 67, (2, 8))
    assert torch.equal(logits_of(model, ids), logits_of(loaded, ids))


def test_a_cap_taken_off_behind_the_certificates_back_is_seen() -> None:
    model = model_with("llama", gate_max=0.2)
    certify(model)
    hooks = model.model.layers[0].mlp.up_proj._forward_hooks
    (key,) = [k for k, h in hooks.items() if isinstance(h, EntryCap)]
    cap = hooks.pop(key)
    assert certify(model).lipschitz < math.inf  # read anew: a graph without it
    hooks[key] = lambda module, args, output: cap(
        module, args, output
    )  # a cap that nobody knows of
    with pytest.raises(CertificateError, match="reproduce"):
        certify(model)


def test_rounding_covers_it() -> None:
    model = model_with("llama", gate_max=1.0)
    project_(model)
    ids = torch.randint(0, 67, (4, 8))
    off = logits_of(model, ids).double() - logits_of(model.double(), ids)
    assert float(off.detach().square().mean(-1).sqrt().max()) <= forward_rounding_upper(
        model.float(), torch.float32, 8
    )


def test_adapters_behind_a_cap_are_refused_by_name() -> None:
    from peft import LoraConfig, get_peft_model

    model = tiny("llama")
    retrofit(model, paper(gate_max=1.0))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["up_proj"]))
    with pytest.raises(UnsupportedModelError, match="gate_max=None"):
        certify(wrapped)
    optimizer = torch.optim.SGD([p for p in wrapped.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(UnsupportedModelError, match="target_modules"):
        attach_projection(optimizer, wrapped)


@pytest.mark.parametrize("bad", [0.0, -1.0, math.inf, True])
def test_caps_that_are_no_caps_are_refused(bad: float) -> None:
    with pytest.raises(ConfigError, match="gate_max"):
        paper(gate_max=bad)
