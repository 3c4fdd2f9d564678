"""retrofit() and release(): plan, check everything, then mutate."""

from __future__ import annotations

import logging
from dataclasses import fields, replace
from typing import Any

from torch import nn

from lip_plugin.config import LOGIT_SCALE, LipschitzConfig
from lip_plugin.errors import ConfigError
from lip_plugin.face import require_module
from lip_plugin.model.architecture import Architecture, find_family
from lip_plugin.model.heads import linear_layout
from lip_plugin.model.layers import (
    constrain_,
    constrained_modules,
    table_of,
    unconstrain_,
)
from lip_plugin.model.layout import ROW, Layout, one_block
from lip_plugin.model.normalization import floor_
from lip_plugin.model.parts import Parts, parts
from lip_plugin.surgery.caps import caps_by_name
from lip_plugin.surgery.checks import check_model, norms_are_gone, refuse_shards
from lip_plugin.surgery.orthogonal_init import init_orthogonal_
from lip_plugin.surgery.plan import Plan, RetrofitReport
from lip_plugin.surgery.presets import chosen_config
from lip_plugin.surgery.recipe import plan_constants
from lip_plugin.surgery.state import _MARK, RetrofitState, find_retrofit, set_state
from lip_plugin.surgery.untrained import untrained, zero_and_freeze_

logger = logging.getLogger(__name__)


def retrofit(
    model: nn.Module, config: LipschitzConfig | str | None = None, *, _loading: bool = False
) -> RetrofitReport:
    """Constrain `model` in place: every block gets a cap in the RMS->RMS norm, norms go, constants come.

    The model keeps its class, forward, Parameters and dtypes; keys of removed norms leave its
    state_dict. Everything is checked before the first change. A second call with an equal config
    changes nothing.

    Args:
        model: a model of a known family, in one piece: before DDP, FSDP, peft or compile.
        config: see LipschitzConfig; None takes its defaults. The name of a preset (`"robust"`; see
            LipschitzConfig.preset) takes it without what the model's family has no place for.

    Returns:
        A report that prints as a table, one line per change.

    Raises:
        UnsupportedModelError: unknown family, a module or parameter that no rule covers, a model on
            the meta device or quantized.
        TiedWeightsError, NonFiniteError, ConfigError: see their messages; nothing was changed.
    """
    require_module(model, "retrofit")
    found = find_retrofit(model)
    root = model if found is None else found[0]
    config = chosen_config(config, root, "retrofit(model, ") or LipschitzConfig()
    if found is not None:
        _refuse_another(config, found[1])
        return RetrofitReport()
    family = find_family(model)
    names = parts(model, family.architecture)
    fresh = not family.is_pretrained(model) and not norms_are_gone(model, names)
    check_model(model, names, config, pretrained=family.is_pretrained(model), loading=_loading)
    config = _resolved(config, family.architecture)
    plan = Plan()
    _plan_untie(plan, model, names)
    _plan_caps(plan, model, names, config)
    if config.recipe:
        plan_constants(plan, model, names, config)
    for name in names.norms() if config.norms == "calibrated" else ():
        _plan_calibrated(plan, model, name, config)
    fresh = fresh and config.norms == "remove"
    if not _loading and (config.init == "orthogonal" or (config.init == "auto" and fresh)):
        plan.add("init", "orthogonal blocks, zero output maps", lambda: init_orthogonal_(model))
    for name, p, zero in untrained(model, names, config):
        what = "fixed at zero" if zero else "not trained"
        plan.add(name, what, lambda p=p, zero=zero: zero_and_freeze_(p, zero))  # type: ignore[misc]
    report = plan.carry_out()
    set_state(model, RetrofitState(config, family.architecture))
    family.on_retrofit(model, config)
    logger.info("retrofit of %s: %d changes", type(model).__name__, len(report))
    return report


def _refuse_another(config: LipschitzConfig, present: RetrofitState) -> None:
    """Raise ConfigError, with the fields that differ, unless a retrofitted model's own config is this one."""
    chosen, own = _resolved(config, present.architecture), present.config
    changed = [
        f"{f.name}={getattr(own, f.name)!r:.60}"
        for f in fields(own)
        if f.name != "init" and getattr(own, f.name) != getattr(chosen, f.name)
    ]
    if changed:
        raise ConfigError(
            f"This model was retrofitted with another config: it has {', '.join(changed)}. Call "
            "release(model) first, then retrofit again; config_of(model) shows the present one."
        )


def _resolved(config: LipschitzConfig, architecture: Architecture) -> LipschitzConfig:
    """The config with what None stands for written out, so that a later version's defaults change no saved model."""
    norms, scale = config.norms or "remove", config.logit_scale
    if scale is None:
        scale = LOGIT_SCALE if norms == "remove" and architecture.final_norm else 1.0
    return replace(config, norms=norms, logit_scale=scale)


def release(model: nn.Module) -> RetrofitReport:
    """Give the plain layers back, in place: no caps any more, the very same function.

    Constants, floors under norms and scaled activations stay, because the trained weights compute through them, and what was
    fixed (gains of norms with floors, dropped biases) stays fixed;
    retrofit() may be called again, with any config. A model that is not retrofitted is left alone.

    Raises UnsupportedModelError for a sharded model.
    """
    require_module(model, "release")
    found = find_retrofit(model)
    if found is None:
        return RetrofitReport()
    refuse_shards(model, "release")
    root, _ = found
    plan = Plan()
    for name, module in list(constrained_modules(root)):
        plan.add(name, "plain layer, no cap", lambda m=module: unconstrain_(m))  # type: ignore[misc]
    report = plan.carry_out()
    del root.__dict__[_MARK]
    return report


def _plan_untie(plan: Plan, model: nn.Module, names: Parts) -> None:
    if not names.architecture.tokens:
        return
    head: Any = model.get_submodule(names.head)
    tokens: Any = table_of(model, names.architecture.tokens)
    if head.weight is not tokens.weight:
        return

    def untie() -> None:
        weight = head.weight
        copy = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        head.weight = copy
        # Without the tie a library loads every name of the head's bias on its own: give the names
        # that no forward reads a tensor of their own, frozen.
        for name in names.architecture.unused:
            owner, _, leaf = name.rpartition(".")
            if getattr(model.get_submodule(owner), leaf) is head.bias:
                own = nn.Parameter(head.bias.detach().clone(), requires_grad=False)
                setattr(model.get_submodule(owner), leaf, own)

    plan.add(names.head, "untied from the embedding", untie)


def _plan_caps(plan: Plan, model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    interleaved, caps = names.architecture.attention.interleaved, caps_by_name(names, config)
    for role, name in names.linears():
        module: Any = model.get_submodule(name)
        layout = linear_layout(
            module, role, caps[name], names, config.granularity, interleaved=interleaved
        )
        _plan_constrain(plan, name, module, layout)
    for role, name in names.tables():
        module = table_of(model, name)
        rows = module.weight.numel() // module.weight.shape[-1]
        _plan_constrain(plan, name, module, one_block(role, rows, caps[name], norm=ROW))


def _plan_calibrated(plan: Plan, model: nn.Module, name: str, config: LipschitzConfig) -> None:
    floor = config.norm_floors[name]
    what = f"floor {floor:.6g} under the norm" if floor else "norm, without a floor yet"
    plan.add(name, what, lambda: floor_(model.get_submodule(name), name, floor))


def _plan_constrain(plan: Plan, name: str, module: Any, layout: Layout) -> None:
    kinds = ", ".join(f"{s.count} x {s.role} <= {s.cap:g}" for s in layout.segments)
    plan.add(name, f"capped ({layout.norm}): {kinds}", lambda: constrain_(module, layout))
