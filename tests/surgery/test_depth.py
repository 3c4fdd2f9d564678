"""A residual that passes on too little of a signal is warned of, with the numbers, or refused."""

from __future__ import annotations

import logging

import pytest

from lip_plugin import LipschitzConfig, retrofit
from lip_plugin.errors import ConfigError
from tests.support.families import tiny


def warnings_of(
    layers: int, config: LipschitzConfig | None, caplog: pytest.LogCaptureFixture
) -> list[str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="lip_plugin"):
        retrofit(tiny("gpt2", num_hidden_layers=layers), config)
    return [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("preset", ["robust", "accurate"])
def test_presets_that_were_seen_not_to_learn_are_warned_of(
    preset: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = LipschitzConfig.preset(preset)
    assert [warnings_of(layers, config, caplog) for layers in (1, 3, 4)] == [[], [], []]
    (message,) = warnings_of(5, config, caplog)
    assert "over 5 layers passes on 3.9e-07" in message
    (message,) = warnings_of(12, config, caplog)
    assert "over 12 layers passes on 2.4e-18" in message
    assert "Leave residual out" in message


@pytest.mark.parametrize("layers", [3, 12, 24, 48])
def test_the_default_passes_a_signal_on_at_any_depth(
    layers: int, caplog: pytest.LogCaptureFixture
) -> None:
    """1/(2L) for L layers: (1 - 1/(2L))^(2L) is about 1/e."""
    assert warnings_of(layers, None, caplog) == []
    assert warnings_of(layers, LipschitzConfig.preset("paper"), caplog) == []


def test_what_leaves_float32_is_refused_with_a_cure_that_works() -> None:
    with pytest.raises(ConfigError, match="48 layers.*Leave residual out"):
        retrofit(tiny("gpt2", num_hidden_layers=48), LipschitzConfig.preset("robust"))
    retrofit(tiny("gpt2", num_hidden_layers=48), LipschitzConfig.preset("robust", residual=None))
