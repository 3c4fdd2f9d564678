"""What a config leaves untrained: said once, for the retrofit and for loading, which makes new Parameters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.model.layers import table_of
from lip_plugin.model.parts import Parts
from lip_plugin.model.position import position_bias

# Share of `embedding_max` that a table of positions keeps as its cap when biases replace it: it is zero.
UNUSED_SHARE = 2.0**-20


def untrained(
    model: nn.Module, names: Parts, config: LipschitzConfig
) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, Parameter, whether it is zero) of everything that `config` fixes.

    Dropped biases, and positions that biases of attention replace, are zero; queries and keys without content
    keep their values (fused with the values they get zero gradients), as fixed ALiBi tables and gains of calibrated norms do.
    """
    if config.biases == "drop":
        for _, name in names.linears():
            bias: Any = model.get_submodule(name).bias
            if isinstance(bias, Tensor):
                yield f"{name}.bias", bias, True
    for name in names.norms() if config.norms == "calibrated" else ():
        gain: Any = getattr(model.get_submodule(name), "weight", None)
        if isinstance(gain, Tensor):  # it has no cap; the maps behind it can do what it would
            yield f"{name}.weight", gain, False
    if config.position_bias is None:
        return
    if names.architecture.positions:
        yield (
            names.architecture.positions,
            table_of(model, names.architecture.positions).weight,
            True,
        )
    for layer in names.layers:
        if config.attention_scale == 0:
            for role in ("q", "k"):
                if role in layer.attention.linears:
                    name = layer.attention.linears[role]
                    for leaf, p in model.get_submodule(name).named_parameters(recurse=False):
                        yield f"{name}.{leaf}", p, False
        bias = position_bias(model.get_submodule(layer.attention.module))
        if bias is not None and config.position_bias == "alibi":
            yield f"{layer.attention.module}.position_bias", bias.weight, False


def freeze_(model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    """Take what `config` fixes out of training; values stay."""
    for _, p, _ in untrained(model, names, config):
        p.requires_grad_(False)


@torch.no_grad()
def zero_and_freeze_(p: Tensor, zero: bool) -> None:
    """Fix one Parameter, at zero if it is to be."""
    p.requires_grad_(False)
    if zero:
        p.zero_()
