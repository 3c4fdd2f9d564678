"""Does a residual with these weights carry a signal through this many layers?

In x <- (1-a) x + a f(x) every layer passes on (1-a) of what it is given. Where output maps start at
zero, the product of all the 1-a is all that reaches the logits at the start, and all of the
gradient that reaches the first layer. The model carries x divided by that product, so that nothing
of it is lost to rounding, but the loss sees the product itself.
"""

from __future__ import annotations

import math

from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError
from lip_plugin.model.parts import Parts
from lip_plugin.surgery.recipe import step_sizes

# The model carries x / c, where c is the product of all 1-a, and gradients at its start are as
# small as c. At 2^-100 float32 has 26 binary orders left below: 24 layers at (0.75, 0.9) are exact
# to 2e-7, and 48 are nan.
_SMALLEST_SHARE = 2.0**-100
# What all layers but one pass on. A GPT-2 of width 128 with residual=(0.75, 0.9) and zero output
# maps learned with 3.9e-7 (5 layers, 32.5 % of Shakespeare's characters) and not with 9.8e-9 (6
# layers, 18.9 %; a bigram model has 27.0 %), after 200 steps of LipschitzMuon at 0.1
# (docs/LOG.md, 2026-11-30). With a dropout of 0.1 it did not learn with 3.9e-7 either, so the limit
# lies above that.
_FAINT = 1e-6
_CURE = 'Leave residual out: "auto" follows the number of layers.'


def passed_on(names: Parts, config: LipschitzConfig) -> float:
    """log2 of the share of a signal that one layer passes on besides what it computes."""
    a, b = step_sizes(config, names)
    return math.log2(1.0 - a) + (0.0 if names.architecture.parallel else math.log2(1.0 - b))


def check_depth(names: Parts, config: LipschitzConfig) -> None:
    """Raise ConfigError if what the model carries would leave the range of float32."""
    if not names.architecture.final_norm:
        return  # the norms are behind the sums, so the factors 1-a do not accumulate
    layers = len(names.layers)
    if layers * passed_on(names, config) < math.log2(_SMALLEST_SHARE):
        raise ConfigError(
            f"residual={config.residual} over {layers} layers: the model carries x divided by all "
            f"the 1-a, which leaves the range of float32. {_CURE}"
        )


def refuse_faint(names: Parts, config: LipschitzConfig) -> None:
    """Raise ConfigError, with the numbers, if a fresh model would not start to learn.

    Args:
        names: the parts of the model.
        config: its config, with no value left open.
    """
    layers = len(names.layers)
    share = 2.0 ** ((layers - 1) * passed_on(names, config))
    if share < _FAINT:
        raise ConfigError(
            f"residual={config.residual} over {layers} layers passes on {share:.2g} of what one "
            "layer would, of the signal to the logits and of the gradient to the first layer. A "
            "GPT-2 was seen to learn with 3.9e-7 (5 layers) without dropout, and not with 9.8e-9 "
            f"(6 layers), or with 3.9e-7 and a dropout of 0.1. {_CURE}"
        )
