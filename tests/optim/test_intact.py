"""An optimizer notices when the model has changed under it.

No cap is lost, and nothing stays untrained, without a word.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from lip_plugin import (
    LipschitzMuon,
    attach_projection,
    config_of,
    release,
    retrofit,
)
from lip_plugin.errors import ConfigError, LipschitzError, UnsupportedModelError
from tests.support.families import tiny
from tests.support.oracles import CAP_TOLERANCE, paper, worst_over_cap

IDS = torch.arange(48).reshape(4, 12) % 67
FAMILIES = ["gpt2", "llama"]


def capped(family: str) -> Any:
    model = tiny(family)
    retrofit(model, paper())
    return model


def a_step(model: Any, optimizer: Any) -> None:
    optimizer.zero_grad()
    model(IDS, labels=IDS).loss.backward()
    optimizer.step()


def muon(model: Any) -> Any:
    return LipschitzMuon(model, lr=0.1)


def adamw(model: Any) -> Any:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    attach_projection(optimizer, model)
    return optimizer


def _mlp_in(model: Any) -> Any:
    return (
        model.transformer.h[0].mlp.c_fc
        if hasattr(model, "transformer")
        else model.model.layers[0].mlp.up_proj
    )


def _pruned(model: Any) -> None:
    prune.l1_unstructured(_mlp_in(model), "weight", amount=0.3)


def _parametrized(model: Any) -> None:
    parametrizations.weight_norm(_mlp_in(model))


def _resized(model: Any) -> None:
    model.resize_token_embeddings(80, mean_resizing=False)


def _tied(model: Any) -> None:
    model.get_output_embeddings().weight = model.get_input_embeddings().weight


def _replaced_parameter(model: Any) -> None:
    layer = _mlp_in(model)
    layer.weight = nn.Parameter(layer.weight.detach().clone())


def _replaced_layer(model: Any) -> None:
    old = model.get_output_embeddings()
    model.set_output_embeddings(nn.Linear(old.in_features, old.out_features, bias=False))


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "pruned": (_pruned, r"pruned.*prune\.remove"),
    "parametrized": (_parametrized, "parametrized"),
    "resized": (_resized, r"plain Linear now and has no cap.*release\(model\); retrofit"),
    "tied again": (_tied, "share one Parameter"),
    "another Parameter": (_replaced_parameter, "not among the parameters.*Order"),
    "another layer": (_replaced_layer, "plain Linear now and has no cap"),
    "released": (lambda m: release(m), "released"),
}


@pytest.mark.parametrize("make", [muon, adamw])
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("what", CHANGES)
def test_a_change_after_the_optimizer_was_built_is_an_error_at_the_next_step(
    what: str, family: str, make: Any
) -> None:
    change, message = CHANGES[what]
    model = capped(family)
    optimizer = make(model)
    a_step(model, optimizer)
    change(model)
    before = [p.detach().clone() for g in optimizer.param_groups for p in g["params"]]
    with pytest.raises((UnsupportedModelError, ConfigError), match=message):
        a_step(model, optimizer)
    after = [p for g in optimizer.param_groups for p in g["params"]]
    assert all(
        torch.equal(a, b) for a, b in zip(before, after, strict=True)
    )  # before anything moved


@pytest.mark.parametrize("make", [muon, adamw])
@pytest.mark.parametrize(
    "what", ["pruned", "parametrized", "resized", "tied again", "another layer"]
)
def test_a_change_before_the_optimizer_is_built_is_an_error_there(what: str, make: Any) -> None:
    change, message = CHANGES[what]
    model = capped("gpt2")
    change(model)
    with pytest.raises(LipschitzError, match=message):
        make(model)


def test_the_cure_for_a_resized_model_works() -> None:
    """The cure that the message names works for a resized model.

    It is to release, to retrofit with the same config, and to make a new optimizer.
    """
    model = capped("gpt2")
    a_step(model, muon(model))
    model.resize_token_embeddings(80, mean_resizing=False)
    config = config_of(model)
    release(model)
    retrofit(model, config)
    optimizer = muon(model)
    for _ in range(5):
        a_step(model, optimizer)
    assert model.get_output_embeddings().weight.shape[0] == 80
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


def test_the_cure_for_a_pruned_layer_works() -> None:
    model = capped("gpt2")
    _pruned(model)
    prune.remove(_mlp_in(model), "weight")
    optimizer = muon(model)
    a_step(model, optimizer)
    assert worst_over_cap(model) <= 1 + CAP_TOLERANCE


def test_an_optimizer_of_before_the_retrofit_is_refused_by_the_order_of_lines() -> None:
    """Its list lacks the untied head, which would never train."""
    model = tiny("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    retrofit(model, paper())
    with pytest.raises(
        ConfigError, match=r"lm_head\.weight is trainable and not among.*Order: retrofit"
    ):
        attach_projection(optimizer, model)
    model.lm_head.weight.requires_grad_(False)  # meant to stay as it is
    attach_projection(optimizer, model)


def test_swapped_arguments_are_told_apart() -> None:
    model = capped("gpt2")
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ConfigError, match="the optimizer comes first"):
        attach_projection(model, optimizer)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="takes the model"):
        attach_projection(optimizer, retrofit(model, paper()))  # type: ignore[arg-type]


def test_adapters_that_the_optimizer_does_not_have_are_named() -> None:
    import peft

    from lip_plugin import constrain_adapters

    base = capped("gpt2")
    late = torch.optim.AdamW(base.parameters())
    model = peft.get_peft_model(base, peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True))
    with pytest.raises(ConfigError, match=r"lora_A.*get_peft_model"):
        attach_projection(late, model)
    untouched = tiny("gpt2")
    late = torch.optim.AdamW(untouched.parameters())
    adapted = peft.get_peft_model(
        untouched, peft.LoraConfig(target_modules=["c_fc"], fan_in_fan_out=True)
    )
    constrain_adapters(adapted, 0.1)
    with pytest.raises(ConfigError, match=r"lora_A"):
        attach_projection(late, adapted)


def test_several_optimizers_share_a_model() -> None:
    model = capped("gpt2")
    matrices = [
        p for n, p in model.named_parameters() if p.dim() == 2 and "wte" not in n and "wpe" not in n
    ]
    held = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in held]
    pair = [torch.optim.Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1)]
    with pytest.raises(ConfigError, match="list of optimizers"):
        attach_projection(pair[0], model)
    handle = attach_projection(pair, model)
    for _ in range(10):
        a_step(model, pair[0])
        pair[1].step()
        assert worst_over_cap(model) <= 1 + CAP_TOLERANCE
    handle.remove()
    for _ in range(10):
        a_step(model, pair[0])
        pair[1].step()
    assert worst_over_cap(model) > 1.01


def test_freezing_and_thawing_are_fine_while_the_optimizer_has_the_parameters() -> None:
    model = capped("gpt2")
    optimizer = muon(model)
    _mlp_in(model).weight.requires_grad_(False)
    a_step(model, optimizer)
    _mlp_in(model).weight.requires_grad_(True)
    a_step(model, optimizer)


def test_a_model_that_holds_two_retrofitted_ones_is_refused() -> None:
    both = nn.ModuleList([capped("gpt2"), capped("gpt2")])
    with pytest.raises(UnsupportedModelError, match="holds 2 retrofitted"):
        LipschitzMuon(both)


def test_an_optimizer_is_copied_and_pickled_without_its_model() -> None:
    import copy
    import pickle

    model = capped("gpt2")
    optimizer = muon(model)
    a_step(model, optimizer)
    assert (
        len(pickle.dumps(optimizer)) < 3 * sum(p.numel() * 4 for p in model.parameters()) + 200_000
    )
    assert copy.deepcopy(optimizer)._held is None


def test_models_with_kept_norms_are_watched_as_well() -> None:
    """Models with norms="keep" are watched as well."""
    model = tiny("llama")
    retrofit(model, paper(norms="keep"))
    optimizer = muon(model)
    _replaced_parameter(model)
    with pytest.raises(ConfigError, match="not among"):
        a_step(model, optimizer)
