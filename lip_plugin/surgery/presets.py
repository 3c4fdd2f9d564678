"""Presets by name, fitted to a model, and the checks of what a user passes as a config.

Open this file to see what a preset leaves out for which family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.config_values import PRESETS
from lip_plugin.errors import ConfigError
from lip_plugin.face import did_you_mean
from lip_plugin.model.architecture import find_family
from lip_plugin.model.parts import parts
from lip_plugin.surgery.automatic import why_no_position_bias
from lip_plugin.surgery.plan import RetrofitReport


def fitted_preset(name: str, model: nn.Module) -> LipschitzConfig:
    """Give `LipschitzConfig.preset(name)` without what the model's family has no place for.

    Families without a norm slot behind their last block (bert) get no `logit_scale`. Models whose
    attention has no place for biases by position look at content in every layer, if the preset does
    in some. All else that depends on the family is "auto" in the presets, and gets its value at the
    retrofit.

    Args:
        name: one of `lip_plugin.config_values.PRESETS`.
        model: a model of a known family, retrofitted or not, without wrappers.

    Raises:
        ConfigError: the name is unknown.
        UnsupportedModelError: the family is unknown.
    """
    check_preset(name)
    values, family = dict(PRESETS[name]), find_family(model)
    if not family.architecture.final_norm:
        values.pop("logit_scale", None)
    scales = values.get("attention_scale")
    if isinstance(scales, tuple) and why_no_position_bias(model, parts(model, family.architecture)):
        values["attention_scale"] = max(scales)
    return LipschitzConfig(**values)


def check_preset(name: str) -> None:
    """Raise ConfigError, with a list of the presets, if there is none of this name."""
    if name not in PRESETS:
        raise ConfigError(
            f"{name!r} is no preset: choose one of {', '.join(map(repr, PRESETS))}."
            f"{did_you_mean(name, PRESETS)}"
        )


def check_config(config: Any, what: str) -> None:
    """Raise ConfigError unless this is a LipschitzConfig, the name of a preset, or None.

    Args:
        config: what a user passed as the config.
        what: the beginning of the user's call for the message, up to the config, such as
            `"retrofit(model, "`.
    """
    if isinstance(config, str):
        check_preset(config)
    elif config is not None and not isinstance(config, LipschitzConfig):
        raise ConfigError(f"{what}...): {_instead_of_a_config(config)}")


def chosen_config(
    config: LipschitzConfig | str | None, model: nn.Module, what: str
) -> LipschitzConfig | None:
    """The config that a user chose.

    The name of a preset is fitted to the model. A LipschitzConfig, or None, is returned as it is.

    Raises:
        ConfigError: `config` is anything else; see `check_config`.
    """
    check_config(config, what)
    return fitted_preset(config, model) if isinstance(config, str) else config


def _instead_of_a_config(given: Any) -> str:
    takes = (
        "Pass a LipschitzConfig, or the name of a preset (" + ", ".join(map(repr, PRESETS)) + ")."
    )
    if isinstance(given, RetrofitReport):
        return f"this is the report that retrofit() gave back, and no config. {takes}"
    if isinstance(given, Mapping):
        return f"this is of type {type(given).__name__}. Pass LipschitzConfig.from_dict(...) of it."
    if isinstance(given, type):
        return (
            f"this is the class {given.__name__}. Pass an object of it, as LipschitzConfig() makes "
            "one."
        )
    if isinstance(given, nn.Module):
        return f"this is a model ({type(given).__name__}). {takes}"
    return f"this is of type {type(given).__name__}. {takes}"
