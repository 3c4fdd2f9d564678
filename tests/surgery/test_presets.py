"""A preset given by name is fitted to the family, and one given as an object is not.

This holds wherever a config may be given.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lip_plugin import LipschitzCallback, LipschitzConfig, certify, plan_caps, retrofit
from lip_plugin.config import PRESETS
from lip_plugin.errors import ConfigError
from lip_plugin.surgery.state import find_retrofit
from tests.integrations.test_trainer import SMALL, trainer_of
from tests.support.families import FAMILIES, tiny
from tests.support.oracles import assert_unchanged, fingerprint
from tests.surgery.test_options import GATED


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_preset_by_name_retrofits_every_family_and_certifies(
    family: str, preset: str
) -> None:
    model = tiny(family)
    retrofit(model, preset)
    assert 0 < certify(model).lipschitz <= certify(model, "caps").lipschitz * 1.001
    assert len(retrofit(model, preset)) == 0  # the same name is the same config
    config = find_retrofit(model)[1].config
    assert config.residual in (PRESETS[preset].get("residual"), 0.75)
    if preset != "paper":
        assert (config.activation == "abs") == (not family.startswith(GATED))
        assert (config.attention_scale == 0) == (not family.startswith(("vit", "gemma2")))


def test_a_name_leaves_out_what_a_family_has_no_place_for_and_nothing_else() -> None:
    found = {}
    for family in ("gpt2", "llama", "bert", "vit", "gpt_neox", "gemma2"):
        retrofit(model := tiny(family), "robust")
        found[family] = find_retrofit(model)[1].config
    whole = replace(LipschitzConfig.preset("robust"), norms="remove")
    assert found["gpt2"] == whole
    assert found["llama"] == replace(whole, activation=None)
    assert found["bert"] == replace(whole, logit_scale=1.0)
    assert found["vit"] == replace(whole, position_bias=None, attention_scale=1.0)
    assert found["gpt_neox"] == replace(whole, residual=0.75)
    assert found["gemma2"] == replace(
        whole, activation=None, position_bias=None, attention_scale=1.0
    )


def test_an_attention_that_the_user_chose_is_not_worked_around() -> None:
    model = tiny("gpt2")
    model.set_attn_implementation("eager")
    with pytest.raises(ConfigError, match="attn_implementation"):
        retrofit(model, "robust")


def test_plan_caps_and_the_callback_take_names_too(tmp_path) -> None:
    planned = plan_caps(model := tiny("llama"), 10.0, "robust")
    retrofit(model, planned)
    assert certify(model, "caps").lipschitz <= 10.0
    assert plan_caps(model, 10.0) == find_retrofit(model)[1].config  # with its tables of positions
    assert planned.activation is None
    assert planned.position_bias == "learned"
    trainer = trainer_of(
        tmp_path, tiny("llama", **SMALL), LipschitzCallback("robust"), "llama", max_steps=2
    )
    trainer.train()
    assert find_retrofit(trainer.model)[1].config == replace(planned, w_max=1.0, norms="remove")


@pytest.mark.parametrize(
    ("family", "words"),
    [
        ("llama", ["activation='abs' out"]),
        ("bert", ["logit_scale", "overrides={'cls.predictions.decoder'"]),
        ("vit", ["position_bias", "attention_scale=0"]),
        ("gpt_neox", ["residual=0.75"]),
        ("gemma2", ["activation='abs' out", "position_bias", "attention_scale=0"]),
    ],
)
def test_an_object_that_does_not_fit_is_refused_with_every_field_and_the_name_that_fits(
    family, words
) -> None:
    model = tiny(family)
    before = fingerprint(model)
    with pytest.raises(ConfigError) as error:
        retrofit(model, LipschitzConfig.preset("robust"))
    for word in (*words, 'retrofit(model, "robust")'):
        assert word in str(error.value)
    assert_unchanged(model, before)
