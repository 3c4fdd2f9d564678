"""What the options of `LipschitzConfig` may be: choices, presets, and checks of numbers."""

from __future__ import annotations

import sys
from typing import Any

from lip_plugin.errors import ConfigError

# An option with this value gets one that fits the model: its family, its depth and the other
# options. lip_plugin/surgery/automatic.py has the formulas.
AUTO = "auto"
METHOD_NAMES = (
    "soft_cap",
    "hard_cap",
    "spectral_normalize",
    "spectral_hammer",
    "stiefel",
    "spectral_weight_decay",
    "weight_decay",
)
# The default factor on the logits. Factors of 40 and more gave the best accuracy, and a factor of 3
# the widest margins: docs/LOG.md, 2026-11-24.
LOGIT_SCALE = 40.0
CHOICES: dict[str, tuple[Any, ...]] = {
    "method": (AUTO, *METHOD_NAMES),
    "granularity": ("head", "matrix"),
    "norms": (None, "remove", "keep", "calibrated"),
    "biases": (AUTO, "keep", "drop"),
    "init": ("auto", "orthogonal", "keep"),
    "position_bias": (AUTO, None, "learned", "alibi"),
    "activation": (AUTO, None, "abs"),
}
# What models have that were saved before an option existed, and models that keep their norms. It is
# the recipe of arXiv 2507.13338.
LEGACY: dict[str, Any] = {
    "method": "soft_cap",
    "position_bias": None,
    "attention_scale": 1.0,
    "value_scale": 1.0 / 3.0,
    "residual": None,
    "activation": None,
    "biases": "keep",
}
# What `LipschitzConfig.preset` hands out: the options that differ from the defaults.
PRESETS: dict[str, dict[str, Any]] = {
    "accurate": {},
    "robust": {"logit_scale": 5.0, "method": "soft_cap"},
    # Every second layer looks things up by content, and the others move them by position.
    "content": {"attention_scale": (0.0, 16.0)},
    "paper": {**LEGACY, "logit_scale": 1.0},
}
# The smallest floor under a norm besides 0: gain / floor has to be a float32.
FLOOR_MIN = 1e-12


# Refuses anything but one number between 0 and 1, or a pair of them.
def check_residual(residual: Any) -> None:
    weights = residual if isinstance(residual, tuple) else (residual,)
    if isinstance(residual, tuple) and len(residual) != 2:
        raise ConfigError(
            f"LipschitzConfig(residual={residual}): one number, or those of (attention, MLP)."
        )
    for a in weights:
        is_number = isinstance(a, (int, float)) and not isinstance(a, bool)
        if not is_number or not 0 < a < 1:
            raise ConfigError(
                f"LipschitzConfig(residual={residual!r}): a in (1-a) x + a f(x) is a number "
                "between 0 and 1, or a pair of them, of (attention, MLP)."
            )


# Refuses anything but a finite number above 0.
def check_positive(name: str, value: Any) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not 0 < value <= sys.float_info.max:
        raise ConfigError(f"LipschitzConfig({name}={value!r}): must be a finite number above 0.")


# Refuses anything but a number above 0, or a tuple of them; with `zero`, 0 is allowed too.
def check_scales(name: str, value: Any, *, zero: bool) -> None:
    if value == ():
        raise ConfigError(
            f"LipschitzConfig({name}=()): give one number, or a tuple of numbers, which is "
            "repeated over the layers."
        )
    for one in value if isinstance(value, tuple) else (value,):
        if not (zero and one == 0 and not isinstance(one, bool)):
            check_positive(name, one)


def of_layer(value: Any, layer: int) -> float:
    """What a number or a tuple, which is repeated over the layers, says for one layer."""
    return float(value[layer % len(value)] if isinstance(value, tuple) else value)
