"""plan_caps gives the largest cap whose certificate from caps is at most the target."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lip_plugin import certify, config_of, plan_caps, project_, retrofit
from lip_plugin.errors import ConfigError
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import fingerprint, paper, randomize_


@pytest.mark.parametrize("family", FAMILIES)
def test_the_planned_caps_hold_the_target_and_larger_ones_do_not(family: str) -> None:
    planned = plan_caps(tiny(family), 5.0, paper(biases="drop"))
    bounds = []
    for config in (planned, replace(planned, w_max=planned.w_max * 1.01)):
        model = tiny(family)
        retrofit(model, config)
        bounds.append(certify(model, "caps").lipschitz)
        randomize_(model)
        project_(model)
    assert bounds[0] <= 5.0 < bounds[1]
    assert certify(model).lipschitz <= bounds[1], (
        "what holds from caps holds for any weights within them"
    )


def test_overrides_stay_and_the_head_counts() -> None:
    config = paper(overrides={"lm_head": 4.0}, logit_scale=1.0)
    planned = plan_caps(tiny("gpt2"), 5.0, config)
    assert planned.overrides == config.overrides
    assert planned.w_max < plan_caps(tiny("gpt2"), 5.0, paper(logit_scale=1.0)).w_max


def test_twelve_layers_under_a_bound_of_ten() -> None:
    """Caps that give a bound of 10 at 12 layers are found."""
    model = tiny("gpt2", num_hidden_layers=12)
    planned = plan_caps(model, 10.0)
    retrofit(model, planned)
    assert 9.9 < certify(model, "caps").lipschitz <= 10.0


def test_a_retrofitted_model_is_planned_with_its_own_config_and_stays_as_it_was() -> None:
    model = tiny("llama")
    retrofit(model, paper(attention_scale=2.0, w_max=3.0))
    before = fingerprint(model)
    planned = plan_caps(model, 20.0)
    assert planned == replace(config_of(model), w_max=planned.w_max)
    after = fingerprint(model)
    assert after["modules"] == before["modules"]
    assert all(torch.equal(after["tensors"][k], v) for k, v in before["tensors"].items())


def test_constants_that_a_retrofit_has_set_cannot_be_planned_otherwise() -> None:
    model = tiny("llama")
    retrofit(model, paper(attention_scale=2.0))
    with pytest.raises(ConfigError, match="attention_scale.*release"):
        plan_caps(model, 10.0, paper())


def test_what_a_retrofit_would_refuse_is_refused_here_too() -> None:
    model = tiny("gpt2")
    model.config._name_or_path = "somewhere"  # as from_pretrained leaves it
    with pytest.raises(ConfigError, match="norms='keep'"):
        plan_caps(model, 10.0)
    with pytest.raises(ConfigError, match="matches no layer"):
        plan_caps(tiny("gpt2"), 10.0, paper(overrides={"nowhere": 1.0}))


def test_a_target_below_the_residual_path_is_refused_with_what_it_costs() -> None:
    config = paper(overrides={"lm_head": 8.0}, logit_scale=1.0)
    with pytest.raises(ConfigError, match=r"10\^0.4"):
        plan_caps(tiny("gpt2"), 0.01, config)


@pytest.mark.parametrize("target", [0.0, -1.0, float("nan"), float("inf")])
def test_targets_that_are_no_bounds_are_refused(target: float) -> None:
    with pytest.raises(ConfigError, match="above 0"):
        plan_caps(tiny("gpt2"), target)
