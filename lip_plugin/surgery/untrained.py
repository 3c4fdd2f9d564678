"""Which parameters a config takes out of training.

Two callers need this list: the retrofit, and the loading of a saved model, which makes new
Parameters that would otherwise train.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.config_values import of_layer
from lip_plugin.model.layers import table_of
from lip_plugin.model.parts import Parts
from lip_plugin.model.position import position_bias

# A table of positions that attention biases replace is zero. It still needs a cap above 0, which is
# this share of `embedding_max`.
UNUSED_SHARE = 2.0**-20


def untrained(
    model: nn.Module, names: Parts, config: LipschitzConfig
) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield (name, Parameter, whether it is zero) for everything that `config` fixes.

    - Fixed at zero: dropped biases, and the table of positions that attention biases replace.
    - Fixed at their values: q and k where attention ignores content, ALiBi tables of
      `position_bias="alibi"`, and the gains of calibrated norms. (A map that fuses q, k and v stays
      trainable; its rows of q and k get gradients of zero.)
    """
    if config.biases == "drop":
        for _, name in names.linears():
            bias: Any = model.get_submodule(name).bias
            if isinstance(bias, Tensor):
                yield f"{name}.bias", bias, True
    for name in names.norms() if config.norms == "calibrated" else ():
        gain: Any = getattr(model.get_submodule(name), "weight", None)
        # A gain has no cap. The maps behind it are trained, and can do what it would do.
        if isinstance(gain, Tensor):
            yield f"{name}.weight", gain, False
    if config.position_bias is None:
        return
    if names.architecture.positions:
        yield (
            names.architecture.positions,
            table_of(model, names.architecture.positions).weight,
            True,
        )
    for i, layer in enumerate(names.layers):
        if of_layer(config.attention_scale, i) == 0:
            for role in ("q", "k"):
                if role in layer.attention.linears:
                    name = layer.attention.linears[role]
                    for leaf, p in model.get_submodule(name).named_parameters(recurse=False):
                        yield f"{name}.{leaf}", p, False
        bias = position_bias(model.get_submodule(layer.attention.module))
        if bias is not None and config.position_bias == "alibi":
            yield f"{layer.attention.module}.position_bias", bias.weight, False


def freeze_(model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    """Take what `config` fixes out of training. The values stay."""
    for _, p, _ in untrained(model, names, config):
        p.requires_grad_(False)


@torch.no_grad()
def zero_and_freeze_(p: Tensor, zero: bool) -> None:
    """Take one Parameter out of training, and set it to zero if `zero` says so."""
    p.requires_grad_(False)
    if zero:
        p.zero_()
