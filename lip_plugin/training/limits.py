"""Changes of a model's limits in mid-run: `set_caps_` its caps, `set_norm_floors_` its floors.

Both write the new limits everywhere that limits are kept: the layers, the optimizer's groups, the
model's LipschitzConfig, and with it what is saved.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lip_plugin.errors import ConfigError
from lip_plugin.face import require_module
from lip_plugin.model.architecture import family_named
from lip_plugin.model.layers import constrain_, constrained_modules
from lip_plugin.model.layout import Layout
from lip_plugin.model.normalization import Floored, floor_, refuse_own_forward
from lip_plugin.model.parts import parts
from lip_plugin.optim.enforce import keep_within_caps_
from lip_plugin.surgery.caps import caps_by_name
from lip_plugin.surgery.checks import check_overrides
from lip_plugin.surgery.plan import Plan, RetrofitReport
from lip_plugin.surgery.state import RetrofitState, require_retrofit, set_state


def set_norm_floors_(model: nn.Module, floors: Mapping[str, float]) -> RetrofitReport:
    """Move the floors under a model's norms in mid-run, in place, and in its config.

    Args:
        model: retrofitted with norms="calibrated", wrapped or not.
        floors: new floors by the slots' full names, each 0 or from 1e-12 to 1e12. Slots that are
            left out keep their floors.

    Returns:
        A report with one line for each floor that moved.

    Raises:
        ConfigError: a floor is out of range, a slot is unknown or wrapped, or the model has no
            calibrated norms. Nothing was changed.
    """
    root, state = require_retrofit(model)
    if state.config.norms != "calibrated":
        raise ConfigError(
            f"set_norm_floors_: this model's norms are {state.config.norms!r}, not 'calibrated'."
        )
    if unknown := sorted(set(floors) - set(state.config.norm_floors)):
        raise ConfigError(
            f"set_norm_floors_: no norm slot {unknown[0]!r}. There are: "
            f"{', '.join(state.config.norm_floors)}."
        )
    config = replace(state.config, norm_floors={**state.config.norm_floors, **floors})
    plan = Plan()
    for slot, floor in config.norm_floors.items():
        module: Any = root.get_submodule(slot)
        if not isinstance(module, Floored):
            raise ConfigError(
                f"set_norm_floors_: {slot} is wrapped by a {type(module).__name__}. Leave norms "
                "out of modules_to_save."
            )
        refuse_own_forward(module, slot)
        if module.floor != floor:
            plan.add(
                slot, f"floor {floor:.6g} under the norm", partial(floor_, module, slot, floor)
            )
    report = plan.carry_out()
    if len(report):
        set_state(root, RetrofitState(config, state.architecture))
        family_named(state.architecture.name).on_retrofit(root, config)
    return report


def set_caps_(
    model: nn.Module,
    optimizer: Optimizer | None,
    *,
    w_max: float | None = None,
    overrides: Mapping[str, float] | None = None,
    process_group: Any = None,
) -> RetrofitReport:
    """Change the caps (RMS->RMS norm) of a retrofitted model in mid-run, in place.

    What is above a new cap is brought within it. Afterwards the layers, the optimizer's groups, the
    model's LipschitzConfig and what is saved all have the new caps. On sharded and replicated
    models every process has to call it with the same numbers.

    Args:
        model: a retrofitted model, wrapped or not.
        optimizer: the optimizer in use, or accelerate's wrapper of it. A LipschitzMuon keeps
            layouts of its own, so None is only right where there is no optimizer yet.
        w_max: the new cap, the largest RMS->RMS norm that a block may have; None keeps the old one.
        overrides: all caps of single layers, as in LipschitzConfig; None keeps the old ones.
        process_group: its members hold equal copies of the model (DDP). None takes the group of a
            DistributedDataParallel around the model.

    Returns:
        A report with one line for each layer whose cap changed.

    Raises:
        ConfigError: a number is out of range, an override matches no layer, or the optimizer is of
            another model.
        NotRetrofittedError: `model` has no constrained layer.

    After any of these errors nothing was changed.
    """
    require_module(model, "set_caps_")
    root, state = require_retrofit(model)
    changes: dict[str, Any] = {} if w_max is None else {"w_max": float(w_max)}
    if overrides is not None:
        changes["overrides"] = dict(overrides)
    config = replace(state.config, **changes)
    names, family = parts(root, state.architecture), family_named(state.architecture.name)
    check_overrides(names, config)
    caps = caps_by_name(names, config)
    found = dict(constrained_modules(root))
    layouts = {name: _capped(m.layout, caps[_plain_name(name)]) for name, m in found.items()}
    inner: Any = getattr(optimizer, "optimizer", optimizer)
    homes = _homes(inner, {id(m.weight): name for name, m in found.items()})
    plan = Plan()
    for name, module in found.items():
        old, new = module.layout.segments[0].cap, layouts[name].segments[0].cap
        if old != new:
            change = f"cap {old:g} -> {new:g}"
            plan.add(name, change, lambda m=module, n=name: constrain_(m, layouts[n]))  # type: ignore[misc]
    report = plan.carry_out()
    for group, index, name in homes:
        group["layouts"][index] = layouts[name].to_plain()
    set_state(root, RetrofitState(config, state.architecture))
    family.on_retrofit(root, config)
    keep_within_caps_(model, process_group)
    return report


def _capped(layout: Layout, cap: float) -> Layout:
    return replace(layout, segments=tuple(replace(s, cap=cap) for s in layout.segments))


def _plain_name(name: str) -> str:
    """The layer's full name as it is without an adapter (peft) around the layer."""
    return name.replace(".base_layer", "")


def _homes(optimizer: Any, names: dict[int, str]) -> list[tuple[dict[str, Any], int, str]]:
    """(group, index, layer) of every layout that the optimizer keeps."""
    homes = []
    for group in optimizer.param_groups if optimizer is not None else ():
        for index, p in enumerate(group["params"]) if group.get("layouts") else ():
            if id(p) not in names:
                raise ConfigError(
                    "set_caps_: the optimizer steps a matrix that is not a constrained layer of "
                    "this model. Give the model and the optimizer that train together."
                )
            homes.append((group, index, names[id(p)]))
    return homes
