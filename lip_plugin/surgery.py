"""retrofit() and release(): plan, check everything, then mutate."""

from __future__ import annotations

import logging
from dataclasses import dataclass, fields, replace
from typing import Any

from torch import nn

from lip_plugin.architecture import Architecture, find_family
from lip_plugin.blocks import RMS_TO_RMS, ROW, Layout, Segment, whole
from lip_plugin.checks import check_model, norms_are_gone, refuse_shards
from lip_plugin.config import LOGIT_SCALE, LipschitzConfig
from lip_plugin.errors import ConfigError, UnsupportedModelError
from lip_plugin.face import require_module
from lip_plugin.frozen import UNUSED_SHARE, untrained, zero_and_freeze_
from lip_plugin.initial import init_orthogonal_
from lip_plugin.modules import (
    Constrained,
    constrain_,
    constrained_modules,
    is_transposed,
    rows_of,
    table_of,
    unconstrain_,
)
from lip_plugin.parts import Parts, parts
from lip_plugin.plan import Plan, RetrofitReport
from lip_plugin.presets import chosen_config
from lip_plugin.recipe import plan_constants
from lip_plugin.slots import floor_

logger = logging.getLogger(__name__)
_MARK = "lip_retrofit"


@dataclass(frozen=True)
class RetrofitState:
    """What a retrofitted model remembers of it (a plain attribute of its root module)."""

    config: LipschitzConfig
    architecture: Architecture


def set_state(root: nn.Module, state: RetrofitState) -> None:
    """Have the model's root remember this."""
    root.__dict__[_MARK] = state


def find_retrofit(model: nn.Module) -> tuple[nn.Module, RetrofitState] | None:
    """(root, state) of the retrofitted model inside `model`, whatever wraps it; None if there is none.

    Raises UnsupportedModelError if there are several: no call could be about all of them.
    """
    found = [module for module in model.modules() if is_retrofitted(module)]
    if len(found) > 1:
        kinds = ", ".join(type(module).__name__ for module in found[:3])
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} retrofitted models ({kinds}). Pass the one that is meant."
        )
    return (found[0], found[0].__dict__[_MARK]) if found else None


def is_retrofitted(module: nn.Module) -> bool:
    """Whether this very module is the root of a retrofitted model."""
    return isinstance(module.__dict__.get(_MARK), RetrofitState)


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
            "release(model) first, then retrofit again; model.lip_retrofit.config shows the present one."
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
        layout = linear_layout(module, role, caps[name], names, config.granularity, interleaved=interleaved)
        _plan_constrain(plan, name, module, layout)
    for role, name in names.tables():
        module = table_of(model, name)
        rows = module.weight.numel() // module.weight.shape[-1]
        _plan_constrain(plan, name, module, whole(role, rows, caps[name], norm=ROW))


def caps_by_name(names: Parts, config: LipschitzConfig) -> dict[str, float]:
    """The cap of every matrix (RMS->RMS) and of every table of rows (RMS), by full name."""
    tables = names.tables()
    # what enters the first block: one row of each table; of images, a patch (or `first`) and a position
    shared = [role for role, _ in tables if role != "position" or config.position_bias is None]
    share = config.embedding_max / (2 if names.architecture.patches else len(shared))
    unused = config.embedding_max * UNUSED_SHARE
    if len(shared) < len(tables):
        share *= 1.0 - UNUSED_SHARE
    caps = {}
    for role, name in names.linears():
        caps[name] = cap_of(name, config, default=share / config.pixel_max if role == "patch" else None)
    for role, name in tables:
        caps[name] = cap_of(name, config, default=share if role in shared else unused)
    return caps


def _plan_calibrated(plan: Plan, model: nn.Module, name: str, config: LipschitzConfig) -> None:
    floor = config.norm_floors[name]
    what = f"floor {floor:.6g} under the norm" if floor else "norm, without a floor yet"
    plan.add(name, what, lambda: floor_(model.get_submodule(name), name, floor))


def _plan_constrain(plan: Plan, name: str, module: Any, layout: Layout) -> None:
    kinds = ", ".join(f"{s.count} x {s.role} <= {s.cap:g}" for s in layout.segments)
    plan.add(name, f"capped ({layout.norm}): {kinds}", lambda: constrain_(module, layout))


def cap_of(name: str, config: LipschitzConfig, default: float | None = None) -> float:
    """Cap of the layer with this full name: the longest override that names it, or the default."""
    hits = [key for key in config.overrides if name == key or name.endswith("." + key)]
    if hits:
        return float(config.overrides[max(hits, key=len)])
    return float(config.w_max if default is None else default)


def linear_layout(
    module: Any, role: str, cap: float, names: Parts, granularity: str, *, interleaved: bool = False
) -> Layout:
    """Blocks of one linear map: heads of q, k, v (or each as a whole), everything else one block.

    Args:
        interleaved: the rows of a fused map are those of q, k, v head by head, as the weight is
            stored in some families; a graph's weights have all rows of q first, then k, then v.

    Raises:
        UnsupportedModelError: rows that do not fall into heads.
        ConfigError: granularity "matrix" for interleaved rows.
    """
    transposed = is_transposed(module)
    d_out = rows_of(module)
    heads = {"q": names.n_heads, "k": names.n_kv_heads, "v": names.n_kv_heads}
    roles = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(role, (role,))
    if role == "gate_up":
        half = d_out // 2
        parts_ = tuple(Segment(r, i * half, 1, half, cap) for i, r in enumerate(roles))
        return Layout(RMS_TO_RMS, transposed, parts_)
    if role not in (*heads, "qkv"):
        return whole(role, d_out, cap, transposed=transposed)
    total = sum(heads[r] for r in roles)
    if d_out % total:
        raise UnsupportedModelError(f"{role}: {d_out} rows do not fall into {total} heads of equal size.")
    d_head = d_out // total
    if interleaved and role == "qkv":
        if granularity != "head":
            raise ConfigError(
                f"The rows of q, k and v are interleaved in the fused maps of {names.architecture.name}, so none of "
                "them is one block of its weight. Use granularity='head'."
            )
        turns = [(h, r) for h in range(names.n_heads) for r in roles]
        one_each = [Segment(r, i * d_head, 1, d_head, cap) for i, (_, r) in enumerate(turns)]
        return Layout(RMS_TO_RMS, transposed, tuple(one_each))
    segments, start = [], 0
    for r in roles:
        count = heads[r] if granularity == "head" else 1
        rows = heads[r] * d_head
        segments.append(Segment(r, start, count, rows // count, cap))
        start += rows
    return Layout(RMS_TO_RMS, transposed, tuple(segments))


__all__ = ["Constrained", "RetrofitReport", "RetrofitState", "find_retrofit", "release", "retrofit"]
