"""`plan_caps(model, target)`: the caps that keep a model under a Lipschitz bound for a whole run.

The certificate from caps grows with `w_max`, the cap of most blocks. So the largest `w_max` under a
given bound is found by bisection, on a copy of the model that has no matrices in memory.
"""

from __future__ import annotations

import copy
import math
from dataclasses import fields, replace
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.certify import bound_of
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.weight_norms import cap_norms
from lip_plugin.config import LipschitzConfig
from lip_plugin.distributed.gather import sharded_too
from lip_plugin.errors import ConfigError
from lip_plugin.model.architecture import find_family
from lip_plugin.model.layers import Constrained
from lip_plugin.model.layout import ROW, Layout
from lip_plugin.model.parts import parts
from lip_plugin.model.position import OffsetBias
from lip_plugin.surgery.automatic import resolved
from lip_plugin.surgery.caps import cap_of
from lip_plugin.surgery.checks import check_model
from lip_plugin.surgery.presets import chosen_config
from lip_plugin.surgery.retrofit import retrofit
from lip_plugin.surgery.state import find_retrofit

_SMALLEST, _LARGEST = 1e-3, 1e3  # w_max is looked for between these
# If a model is retrofitted already, a new config may differ from its own in these fields only.
_FREE = ("w_max", "overrides", "method", "init")
_TOLERANCE = 1e-4  # the bisection stops when log10(w_max) is known this well


@sharded_too
def plan_caps(
    model: nn.Module, target: float, config: LipschitzConfig | str | None = None
) -> LipschitzConfig:
    """Find the largest `w_max` whose certificate from caps is at most `target`.

    The target is a bound from token norm to token norm. It is known before the first step of a run,
    and it holds at every step. Only `w_max` is chosen, to four digits, rounded down. `overrides` (a
    head with more room, say) stay as they are. The model is not changed, and its matrices are not
    copied.

    Args:
        model: a model of a known family, retrofitted or not. Its biases are taken as they are. If a
            retrofit would start the model afresh, they are taken as zero. If the model is sharded,
            all processes have to make this call together.
        target: the bound on Lip(embeddings -> logits), above 0.
        config: everything but `w_max`. The name of a preset is fitted to the model's family, as by
            `retrofit`. None takes the config of the retrofitted model, or the defaults.

    Returns:
        The config with that `w_max`.

    Raises:
        ConfigError: the target is not a finite number above 0; or it is below what w_max = 0.001
            gives, and then the message says how much that is; or the config would change a model
            that is retrofitted already in more than its caps, method and init.
        LipschitzError: everything that `retrofit` would refuse, with the same error.
    """
    is_number = isinstance(target, (int, float)) and not isinstance(target, bool)
    if not is_number or not 0 < target < math.inf:
        raise ConfigError(f"plan_caps(target={target!r}): must be a finite number above 0.")
    found = find_retrofit(model)
    config = chosen_config(config, found[0] if found else model, "plan_caps(model, target, ")
    config = config or (found[1].config if found else LipschitzConfig())
    root = found[0] if found else model
    if found:
        config = resolved(config, root, parts(root, found[1].architecture))
    _check(model, found[1].config if found else None, config)
    graph = build(_skeleton(model, config))

    def log10_bound(w_max: float) -> float:
        _set_caps_(graph, replace(config, w_max=w_max))
        return bound_of(graph, cap_norms(graph), "caps").log10_lipschitz

    goal = math.log10(target)
    low, high = math.log10(_SMALLEST), math.log10(_LARGEST)
    least = log10_bound(_SMALLEST)
    if least > goal:
        raise ConfigError(
            f"plan_caps(target={target:g}): with w_max = {_SMALLEST} the bound is still "
            f"10^{least:.2f}, because the residual path and the layers in `overrides` (the head?) "
            "alone give that. Lower those, or raise the target."
        )
    if log10_bound(_LARGEST) <= goal:
        return replace(config, w_max=_LARGEST)
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if log10_bound(10**middle) <= goal else (low, middle)
    digits = 3 - math.floor(low)
    w_max = math.floor(10 ** (low + digits)) / 10**digits
    return replace(config, w_max=w_max)


def _check(model: nn.Module, present: LipschitzConfig | None, config: LipschitzConfig) -> None:
    """Raise for a config that `retrofit` would refuse, or that does not fit a retrofitted model."""
    if present is None:
        family = find_family(model)
        names = parts(model, family.architecture)
        check_model(model, names, config, pretrained=family.is_pretrained(model))
        return
    changed = [
        f.name for f in fields(config) if getattr(present, f.name) != getattr(config, f.name)
    ]
    fixed = [name for name in changed if name not in _FREE]
    if fixed:
        raise ConfigError(
            f"plan_caps: {', '.join(fixed)} of this model were set when it was retrofitted. Call "
            "release(model), or plan on a model that is not retrofitted."
        )


def _skeleton(model: nn.Module, config: LipschitzConfig) -> nn.Module:
    """A retrofitted copy of the model, with biases and position biases but without matrices.

    The matrices are on the meta device, where they have shapes and no values.
    """
    found = find_retrofit(model)
    root: Any = found[0] if found else model
    tables = {id(m.weight) for m in root.modules() if isinstance(m, OffsetBias)}
    memo: dict[int, Any] = {}
    for p in root.parameters():
        if p.dim() > 1 and id(p) not in tables:
            memo[id(p)] = nn.Parameter(
                torch.empty_like(p, device="meta"), requires_grad=p.requires_grad
            )
    twin = copy.deepcopy(root, memo)
    if found is None:
        fresh = not find_family(root).is_pretrained(root) and config.recipe
        retrofit(twin, config, _loading=True)
        _start_tables_(twin)
        if fresh and config.init != "keep":
            with torch.no_grad():
                for name, p in twin.named_parameters():
                    if name.endswith("bias") and not p.is_meta:
                        p.zero_()
    return twin


@torch.no_grad()
def _start_tables_(twin: nn.Module) -> None:
    """Give position biases that the retrofit put on the meta device the values they start with."""
    for module in twin.modules():
        if isinstance(module, OffsetBias) and module.weight.is_meta:
            heads, offsets = module.weight.shape
            start = OffsetBias(heads, offsets, content=module.content, causal=module.causal).weight
            learned = module.weight.requires_grad
            module.weight = nn.Parameter(start.to(module.weight.dtype), requires_grad=learned)


# Give every matrix of the skeleton the cap that it has under this config. Tables keep theirs.
def _set_caps_(graph: Graph, config: LipschitzConfig) -> None:
    for name, module in graph.root.named_modules():
        if isinstance(module, Constrained) and module.layout.norm != ROW:
            if module.layout.segments[0].role == "patch":
                continue  # its cap is a share of embedding_max, as that of a table, and not w_max
            layout = module.layout
            cap = cap_of(name, config)
            module.layout = Layout(
                layout.norm, layout.transposed, tuple(replace(s, cap=cap) for s in layout.segments)
            )
