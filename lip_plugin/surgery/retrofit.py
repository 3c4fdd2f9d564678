"""`retrofit` and `release`: put caps on a model in place, and take them off again.

`retrofit` first checks everything and collects the changes in a `Plan`. It makes them only if
nothing was refused, so an error leaves the model as it was.
"""

from __future__ import annotations

import logging
from dataclasses import fields
from typing import Any

from torch import nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.config_values import AUTO
from lip_plugin.errors import ConfigError
from lip_plugin.face import require_module
from lip_plugin.model.architecture import find_family
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
from lip_plugin.surgery.automatic import resolved
from lip_plugin.surgery.caps import caps_by_name
from lip_plugin.surgery.checks import check_model, norms_are_gone, refuse_shards
from lip_plugin.surgery.depth import refuse_faint
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
    """Constrain `model` in place: every block of its weights gets a cap in the RMS->RMS norm.

    The recipe of arXiv 2507.13338 also replaces the norms by constants, unless `config.norms` keeps
    or calibrates them. The model keeps its class, forward, Parameters and dtypes. Keys of removed
    norms leave its state_dict. A second call with an equal config changes nothing.

    Args:
        model: a model of a known family, in one piece: not yet sharded, and not yet wrapped by DDP,
            FSDP, peft or torch.compile.
        config: see LipschitzConfig; None takes its defaults. It may be the name of a preset
            (`"robust"`; see LipschitzConfig.preset), which is then fitted: what the model's family
            has no place for is left out.

    Returns:
        A report that prints as a table, with one line for each change.

    Raises:
        UnsupportedModelError: the family is unknown, no rule covers a module or parameter, or the
            model is sharded, quantized or on the meta device.
        TiedWeightsError: one Parameter would need several caps.
        NonFiniteError: a weight is nan or inf.
        ConfigError: the config does not fit the model, or the model was retrofitted with another
            one.

    After any of these errors the model is unchanged.
    """
    require_module(model, "retrofit")
    found = find_retrofit(model)
    root = model if found is None else found[0]
    config = chosen_config(config, root, "retrofit(model, ") or LipschitzConfig()
    if found is not None:
        _refuse_another(config, root, found[1])
        return RetrofitReport()
    family = find_family(model)
    names = parts(model, family.architecture)
    fresh = not family.is_pretrained(model) and not norms_are_gone(model, names)
    check_model(model, names, config, pretrained=family.is_pretrained(model), loading=_loading)
    follows_depth = config.residual == AUTO
    config = resolved(config, model, names)
    if config.recipe and not _loading:
        refuse_faint(names, config)
    plan = Plan()
    _plan_untie(plan, model, names)
    _plan_caps(plan, model, names, config)
    if config.recipe:
        plan_constants(plan, model, names, config)
    for name in names.norms() if config.norms == "calibrated" else ():
        _plan_calibrated(plan, model, name, config)
    fresh = fresh and config.norms == "remove"
    if not _loading and (config.init == "orthogonal" or (config.init == "auto" and fresh)):
        # Where blocks stay orthogonal, an open start was better. With other projections, output
        # maps of zero were (docs/LOG.md, 2026-11-30).
        opened = follows_depth and config.method == "stiefel"
        what = "orthogonal blocks" if opened else "orthogonal blocks, zero output maps"
        plan.add("init", what, lambda: init_orthogonal_(model, open_branches=opened))
    for name, p, zero in untrained(model, names, config):
        what = "fixed at zero" if zero else "not trained"
        plan.add(name, what, lambda p=p, zero=zero: zero_and_freeze_(p, zero))  # type: ignore[misc]
    report = plan.carry_out()
    set_state(model, RetrofitState(config, family.architecture))
    family.on_retrofit(model, config)
    logger.info("retrofit of %s: %d changes", type(model).__name__, len(report))
    return report


def _refuse_another(config: LipschitzConfig, root: nn.Module, present: RetrofitState) -> None:
    """Raise ConfigError if `config` differs from the one that the model was retrofitted with.

    The field `init` is not compared, because it only acts once.
    """
    chosen = resolved(config, root, parts(root, present.architecture))
    own = present.config
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


def release(model: nn.Module) -> RetrofitReport:
    """Give a retrofitted model its plain layers back, in place. Its function stays the same.

    The caps are gone afterwards. Constants, floors under norms and scaled activations stay, because
    the trained weights compute through them. What was fixed stays fixed (gains of norms with
    floors, dropped biases). `retrofit` may be called again with any config. A model that is not
    retrofitted is left alone.

    Returns:
        A report with one line for each layer that became plain.

    Raises:
        UnsupportedModelError: the model is sharded.
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
        # A library saves and loads a head's bias under several names as long as the head is tied.
        # Without the tie it loads each name by itself. So the names that no forward reads get a
        # frozen tensor of their own.
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
