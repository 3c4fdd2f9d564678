"""A preset fits every family: what depends on the family is "auto", and gets its value there.

This holds wherever a config may be given.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lip_plugin import LipschitzCallback, LipschitzConfig, certify, config_of, plan_caps, retrofit
from lip_plugin.config_values import AUTO, PRESETS
from lip_plugin.errors import ConfigError
from lip_plugin.surgery.automatic import balanced_value_scale, depth_steps
from tests.integrations.test_trainer import SMALL, trainer_of
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import assert_unchanged, fingerprint, paper

WITHOUT_POSITION = ("vit", "gemma2")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_by_name_retrofits_every_family_and_certifies(
    family: str, preset: str
) -> None:
    model = tiny(family)
    retrofit(model, preset)
    assert 0 < certify(model).lipschitz <= certify(model, "caps").lipschitz * 1.001
    assert len(retrofit(model, preset)) == 0  # the same name is the same config
    config = config_of(model)
    assert AUTO not in {k: v for k, v in config.to_dict().items() if k != "init"}.values()
    if preset != "paper":
        assert config.activation == "abs"
        placed = not family.startswith(WITHOUT_POSITION)
        by_position = (0.0, 16.0) if preset == "content" else 0.0
        assert (config.attention_scale == by_position) == placed
        # one-Lipschitz branches at any depth: four maps a layer, each within CAP_SLACK. By content
        # q and k of one layer count besides, and the square of the radius behind four maps.
        maps = 22 if preset == "content" else 12
        bound = certify(model, "caps").lipschitz / config.logit_scale
        assert bound <= 1.13 * 1.001**maps  # the gelu of roberta's head is not scaled: 1.129


def test_what_auto_stands_for_follows_family_depth_and_the_other_options() -> None:
    found = {}
    for family in ("gpt2", "llama", "bert", "vit", "gpt_neox", "gemma2"):
        retrofit(model := tiny(family), "robust")
        found[family] = config_of(model)
    whole = LipschitzConfig(
        norms="remove",
        logit_scale=5.0,
        method=found["gpt2"].method,
        residual=(0.75, 0.9),
        position_bias="learned",
        attention_scale=0.0,
        value_scale=1.0,
        activation="abs",
        biases="drop",
    )
    assert found["gpt2"] == found["llama"] == whole
    assert found["bert"] == replace(whole, logit_scale=1.0)
    content = replace(whole, position_bias=None, attention_scale=1.0)
    assert found["vit"] == replace(content, value_scale=1 / (2**0.5 + 1))
    assert found["gemma2"] == replace(content, value_scale=1 / 3)  # its keys are turned
    assert found["gpt_neox"] == replace(whole, residual=0.75)
    deep = tiny("gpt2", num_hidden_layers=12)
    retrofit(deep, "robust")
    assert config_of(deep).residual == depth_steps(12)
    retrofit(model := tiny("gpt2"), LipschitzConfig(attention_scale=4.0, residual=0.3))
    assert config_of(model).value_scale == balanced_value_scale(4.0, turned=False)
    assert config_of(model).residual == 0.3
    assert config_of(model).position_bias == "learned"


@pytest.mark.parametrize("norms", ["keep", "calibrated"])
def test_auto_leaves_a_model_with_norms_as_it_is(norms: str) -> None:
    from lip_plugin import calibrate
    from tests.support.families import inputs_for

    model = tiny("llama")
    floors = {}
    if norms == "calibrated":
        floors = calibrate(model, [{"input_ids": inputs_for("llama")}])
    retrofit(model, LipschitzConfig(norms=norms, norm_floors=floors))
    assert config_of(model) == paper(norms=norms, norm_floors=floors, logit_scale=1.0)


def test_an_attention_that_has_no_place_for_positions_attends_by_content() -> None:
    model = tiny("gpt2")
    model.set_attn_implementation("eager")
    retrofit(model, "robust")
    assert config_of(model).position_bias is None
    assert config_of(model).attention_scale == 1.0
    other = tiny("gpt2")
    other.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="attn_implementation"):
        retrofit(other, LipschitzConfig(attention_scale=0.0))


def test_plan_caps_and_the_callback_take_names_too(tmp_path) -> None:
    planned = plan_caps(model := tiny("llama"), 10.0, "robust")
    retrofit(model, planned)
    assert certify(model, "caps").lipschitz <= 10.0
    assert plan_caps(model, 10.0) == config_of(model)  # with its tables of positions
    trainer = trainer_of(
        tmp_path, tiny("llama", **SMALL), LipschitzCallback("robust"), "llama", max_steps=2
    )
    trainer.train()
    retrofit(other := tiny("llama", **SMALL), "robust")
    assert config_of(trainer.model) == config_of(other)


@pytest.mark.parametrize(
    ("family", "fields", "words"),
    [
        ("bert", {"logit_scale": 5.0}, ["logit_scale", "overrides={'cls.predictions.decoder'"]),
        ("vit", {"attention_scale": 0.0}, ["position_bias", "attention_scale=0"]),
        ("gpt_neox", {"residual": (0.5, 0.75)}, ["residual=0.5"]),
        ("gemma2", {"position_bias": "learned"}, ["position_bias"]),
    ],
)
def test_an_option_that_does_not_fit_is_refused_with_the_cure(family, fields, words) -> None:
    model = tiny(family)
    before = fingerprint(model)
    with pytest.raises(ConfigError) as error:
        retrofit(model, LipschitzConfig(**fields))
    for word in (*words, 'retrofit(model, "robust")'):
        assert word in str(error.value)
    assert_unchanged(model, before)
