"""A LipschitzConfig is frozen, validated by name, and goes through JSON both ways."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lip_plugin import LipschitzConfig
from lip_plugin.config_values import LEGACY, METHOD_NAMES, PRESETS, of_layer
from lip_plugin.errors import ConfigError, LipschitzError
from lip_plugin.linalg.projections import METHODS

POSITIVE = ("w_max", "attention_scale", "value_scale", "embedding_max", "residual")
NOT_POSITIVE = (0, 0.0, -1.0, math.nan, math.inf, -math.inf, True, False, "1.0", [1.0], 10**400)


def test_a_config_cannot_be_changed_after_it_was_checked():
    config = LipschitzConfig()
    for name in config.to_dict():
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(config, name, 1.0)


def test_a_config_does_not_share_the_callers_dictionary():
    overrides = {"mlp.c_fc": 2.0}
    config = LipschitzConfig(overrides=overrides)
    overrides["mlp.c_fc"] = -1.0
    assert config.overrides == {"mlp.c_fc": 2.0}


def test_the_methods_a_config_accepts_are_those_that_exist():
    assert set(METHOD_NAMES) == set(METHODS)
    assert {LipschitzConfig(method=name).method for name in METHOD_NAMES} == set(METHODS)


@settings(max_examples=50, deadline=None)
@given(
    method=st.sampled_from(("auto", *METHOD_NAMES)),
    w_max=st.floats(1e-300, 1e300),
    overrides=st.dictionaries(
        st.text(min_size=1, max_size=8), st.floats(1e-300, 1e300), max_size=3
    ),
    granularity=st.sampled_from(["head", "matrix"]),
    norms=st.sampled_from([None, "remove", "keep"]),
    residual=st.sampled_from([None, "auto"]) | st.floats(1e-9, 0.999),
    attention_scale=st.just("auto") | st.lists(st.floats(1e-9, 1e9), min_size=1),
    value_scale=st.just("auto") | st.floats(1e-9, 1e9) | st.lists(st.floats(1e-9, 1e9), min_size=1),
    activation=st.sampled_from([None, "auto"]),
    biases=st.sampled_from(["auto", "keep", "drop"]),
    untie_head=st.booleans(),
    init=st.sampled_from(["auto", "orthogonal", "keep"]),
)
def test_json_gives_back_an_equal_config(**fields):
    config = LipschitzConfig(**fields)
    assert LipschitzConfig.from_json(config.to_json()) == config
    assert LipschitzConfig.from_dict(config.to_dict()) == config
    assert json.loads(config.to_json()) == config.to_dict()  # JSON types only


@pytest.mark.parametrize("name", POSITIVE)
@pytest.mark.parametrize("value", NOT_POSITIVE, ids=lambda v: repr(v)[:9])
def test_a_number_that_is_not_finite_and_positive_is_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        LipschitzConfig(**{**LEGACY, name: [2.0, value] if value == [1.0] else value})


@pytest.mark.parametrize("value", NOT_POSITIVE, ids=lambda v: repr(v)[:9])
def test_a_bad_cap_of_one_layer_is_refused_by_the_layers_name(value):
    with pytest.raises(ConfigError, match=r"overrides\['mlp\.up'\]"):
        LipschitzConfig(overrides={"mlp.up": value})


@pytest.mark.parametrize("value", [1.0, 1, 1.5])
def test_a_residual_of_one_or_more_is_refused(value):
    with pytest.raises(ConfigError, match="residual"):
        LipschitzConfig(residual=value)


@pytest.mark.parametrize("name", ["method", "granularity", "norms", "biases", "init"])
@pytest.mark.parametrize("value", ["magic", "", 1, ["soft_cap"], {}], ids=repr)
def test_a_choice_that_does_not_exist_is_refused_with_those_that_do(name, value):
    with pytest.raises(ConfigError, match=f"{name}=.*choose one of"):
        LipschitzConfig(**{name: value})


@pytest.mark.parametrize("value", ["no", None, 0, 1.0], ids=repr)
def test_untie_head_is_a_bool(value):
    with pytest.raises(ConfigError, match="untie_head"):
        LipschitzConfig(untie_head=value)


@pytest.mark.parametrize("value", [[("mlp", 1.0)], "mlp", 1.0, None], ids=repr)
def test_overrides_are_a_mapping(value):
    with pytest.raises(ConfigError, match="overrides"):
        LipschitzConfig(overrides=value)


@pytest.mark.parametrize("key", [1, None, ""], ids=repr)
def test_an_override_without_a_name_is_refused(key):
    with pytest.raises(ConfigError, match="overrides"):
        LipschitzConfig(overrides={key: 1.0})


def test_unknown_keys_are_refused_so_that_no_setting_is_lost():
    with pytest.raises(ConfigError, match="wmax"):
        LipschitzConfig.from_dict({"wmax": 1.0})
    with pytest.raises(ConfigError, match="from_the_future"):
        LipschitzConfig.from_json('{"w_max": 2.0, "from_the_future": 1}')


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", '"soft_cap"', "null", "1"])
def test_text_that_is_no_json_object_is_refused(text):
    with pytest.raises(ConfigError, match="not a LipschitzConfig"):
        LipschitzConfig.from_json(text)


def test_json_with_a_bad_value_is_refused_like_python():
    with pytest.raises(ConfigError, match="w_max"):
        LipschitzConfig.from_json('{"w_max": NaN}')


def test_a_config_error_is_both_ours_and_a_value_error():
    assert issubclass(ConfigError, LipschitzError)
    assert issubclass(ConfigError, ValueError)


def test_presets_are_configs_that_changes_go_on_top_of():
    for name in PRESETS:
        assert LipschitzConfig.preset(name, w_max=1.5).w_max == 1.5
        assert LipschitzConfig.from_json(
            LipschitzConfig.preset(name).to_json()
        ) == LipschitzConfig.preset(name)
    assert LipschitzConfig.preset("robust", activation=None).activation is None
    with pytest.raises(ConfigError, match="robust"):
        LipschitzConfig.preset("best")
    with pytest.raises(ConfigError, match="w_min"):
        LipschitzConfig.preset("robust", w_min=1.0)


def test_two_residual_weights_survive_json_as_a_pair():
    config = LipschitzConfig(residual=[0.5, 0.9])
    assert config.residual == (0.5, 0.9)
    assert (
        config
        == LipschitzConfig(residual=(0.5, 0.9))
        == LipschitzConfig.from_json(config.to_json())
    )
    assert json.loads(config.to_json()) == config.to_dict()


def test_a_config_saved_before_an_option_existed_means_what_it_meant():
    """A missing option is not "auto": the model was trained without it."""
    for values in ({"w_max": 1.2}, {"w_max": 1.2, "method": "hard_cap", "residual": [0.5, 0.9]}):
        found = LipschitzConfig.from_saved(values)
        assert found == LipschitzConfig(**{**LEGACY, "logit_scale": 1.0, **values})
        assert "auto" not in {k: v for k, v in found.to_dict().items() if k != "init"}.values()
    with pytest.raises(ConfigError):
        LipschitzConfig.from_saved({"w_max": -1.0})


@pytest.mark.parametrize("name", ["attention_scale", "value_scale"])
@pytest.mark.parametrize("value", [(), (1.0, -1.0), (1.0, "2"), (True,), (math.nan, 1.0)])
def test_a_bad_scale_of_one_layer_is_refused(name, value):
    with pytest.raises(ConfigError, match=name):
        LipschitzConfig(**{**LEGACY, name: value})


def test_a_layer_by_position_alone_needs_biases():
    with pytest.raises(ConfigError, match="position_bias"):
        LipschitzConfig(attention_scale=(0, 4.0), position_bias=None)
    assert LipschitzConfig(attention_scale=(4.0, 2.0), position_bias=None).attention_scale == (4, 2)


def test_a_tuple_is_repeated_over_the_layers():
    assert [of_layer((0.0, 16.0), i) for i in range(4)] == [0.0, 16.0, 0.0, 16.0]
    assert of_layer(3, 7) == 3.0
