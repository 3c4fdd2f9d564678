"""retrofit() and release(): plan, check everything, then mutate.

The residual needs no new forward. With c_k = (1-a)^k, the model carries u_k = x_k / c_k instead of
x_k, so x <- (1-a) x + a f(x) becomes u <- u + (a / c_(k+1)) f(c_k u): the norm slot in front of a
sub-block becomes the constant c_k, the branch's output is scaled by a / c_(k+1), and the final norm
slot becomes c_2L. See docs/maths.md.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.architecture import Architecture, Family, LayerParts, Parts, find_family, parts
from lip_plugin.blocks import ROW, Layout, Segment, whole
from lip_plugin.checks import check_model
from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError, UnsupportedModelError
from lip_plugin.modules import (
    ConstantScale,
    Constrained,
    ScaledActivation,
    activation_kind,
    constrain_,
    constrained_modules,
    is_transposed,
    set_branch_scale_,
    unconstrain_,
)

logger = logging.getLogger(__name__)
_MARK = "lip_retrofit"


@dataclass(frozen=True)
class RetrofitState:
    """What a retrofitted model remembers of it (a plain attribute of its root module)."""

    config: LipschitzConfig
    architecture: Architecture


@dataclass
class RetrofitReport:
    """What `retrofit` or `release` changed: one (name, change) per step; empty if nothing was to do."""

    changes: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.changes)

    def __str__(self) -> str:
        if not self.changes:
            return "nothing to change"
        width = min(max(len(name) for name, _ in self.changes), 48)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in self.changes)


@dataclass
class _Plan:
    """Steps that were checked and not yet taken."""

    steps: list[tuple[str, str, Callable[[], None]]] = field(default_factory=list)

    def add(self, name: str, what: str, do: Callable[[], None]) -> None:
        self.steps.append((name, what, do))

    def carry_out(self) -> RetrofitReport:
        for _, _, do in self.steps:
            do()
        return RetrofitReport([(name, what) for name, what, _ in self.steps])


def find_retrofit(model: nn.Module) -> tuple[nn.Module, RetrofitState] | None:
    """(root, state) of the retrofitted model inside `model`, whatever wraps it; None if there is none."""
    for module in model.modules():
        state = module.__dict__.get(_MARK)
        if isinstance(state, RetrofitState):
            return module, state
    return None


def retrofit(
    model: nn.Module, config: LipschitzConfig | None = None, *, _loading: bool = False
) -> RetrofitReport:
    """Constrain `model` in place: every block gets a cap in the RMS->RMS norm, norms go, constants come.

    The model keeps its class, forward, Parameters and dtypes; keys of removed norms leave its
    state_dict. Everything is checked before the first change. A second call with an equal config
    changes nothing.

    Args:
        model: a model of a known family, in one piece: before DDP, FSDP, peft or compile.
        config: see LipschitzConfig; None takes its defaults.

    Returns:
        A report that prints as a table, one line per change.

    Raises:
        UnsupportedModelError: unknown family, a module or parameter that no rule covers, a model on
            the meta device or quantized.
        TiedWeightsError, NonFiniteError, ConfigError: see their messages; nothing was changed.
    """
    config = config or LipschitzConfig()
    chosen = replace(config, norms=config.norms or "remove")
    found = find_retrofit(model)
    if found is not None:
        if replace(found[1].config, init=config.init) == chosen:
            return RetrofitReport()
        raise ConfigError(
            "This model was retrofitted with another config. Call release(model) first, then retrofit again; "
            "model.lip_retrofit.config shows the present one."
        )
    family = find_family(model)
    names = parts(model, family.architecture)
    fresh = not family.is_pretrained(model) and not isinstance(
        model.get_submodule(names.final_norm), ConstantScale
    )
    check_model(model, names, config, pretrained=family.is_pretrained(model), loading=_loading)
    config = chosen
    plan = _Plan()
    _plan_untie(plan, model, names)
    _plan_caps(plan, model, names, config)
    if config.norms != "keep":
        _plan_constants(plan, model, names, config, family)
    if config.biases == "drop":
        _plan_drop_biases(plan, model, names)
    fresh = fresh and config.norms == "remove"
    if not _loading and (config.init == "orthogonal" or (config.init == "auto" and fresh)):
        plan.add("init", "orthogonal blocks, zero output maps", lambda: _init_orthogonal_(model, names))
    report = plan.carry_out()
    model.__dict__[_MARK] = RetrofitState(config, family.architecture)
    family.on_retrofit(model, config)
    logger.info("retrofit of %s: %d changes", type(model).__name__, len(report))
    return report


def release(model: nn.Module) -> RetrofitReport:
    """Give the plain layers back, in place: no caps any more, the very same function.

    Constants and scaled activations stay, because the trained weights compute through them;
    retrofit() may be called again, with any config. A model that is not retrofitted is left alone.
    """
    found = find_retrofit(model)
    if found is None:
        return RetrofitReport()
    root, _ = found
    plan = _Plan()
    for name, module in list(constrained_modules(root)):
        plan.add(name, "plain layer, no cap", lambda m=module: unconstrain_(m))  # type: ignore[misc]
    report = plan.carry_out()
    del root.__dict__[_MARK]
    return report


def _plan_untie(plan: _Plan, model: nn.Module, names: Parts) -> None:
    head: Any = model.get_submodule(names.head)
    tokens: Any = model.get_submodule(names.tokens)
    if head.weight is not tokens.weight:
        return

    def untie() -> None:
        weight = head.weight
        copy = nn.Parameter(weight.detach().clone(), requires_grad=weight.requires_grad)
        head.weight = copy

    plan.add(names.head, "untied from the embedding", untie)


def _plan_caps(plan: _Plan, model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    for role, name in names.linears():
        module: Any = model.get_submodule(name)
        layout = linear_layout(module, role, cap_of(name, config), names, config.granularity)
        _plan_constrain(plan, name, module, layout)
    tables = [t for t in (names.tokens, names.positions) if t]
    for role, name in zip(("token", "position"), tables):
        module = model.get_submodule(name)
        cap = cap_of(name, config, default=config.embedding_max / len(tables))
        _plan_constrain(plan, name, module, whole(role, module.weight.shape[0], cap, norm=ROW))


def _plan_constrain(plan: _Plan, name: str, module: nn.Module, layout: Layout) -> None:
    kinds = ", ".join(f"{s.count} x {s.role} <= {s.cap:g}" for s in layout.segments)
    plan.add(name, f"capped ({layout.norm}): {kinds}", lambda: constrain_(module, layout))


def cap_of(name: str, config: LipschitzConfig, default: float | None = None) -> float:
    """Cap of the layer with this full name: the longest override that names it, or the default."""
    hits = [key for key in config.overrides if name == key or name.endswith("." + key)]
    if hits:
        return float(config.overrides[max(hits, key=len)])
    return float(config.w_max if default is None else default)


def linear_layout(module: Any, role: str, cap: float, names: Parts, granularity: str) -> Layout:
    """Blocks of one linear map: heads of q, k, v (or each as a whole), everything else one block."""
    transposed = is_transposed(module)
    d_out = module.weight.shape[1 if transposed else 0]
    heads = {"q": names.n_heads, "k": names.n_kv_heads, "v": names.n_kv_heads}
    roles = ("q", "k", "v") if role == "qkv" else (role,)
    if role not in (*heads, "qkv"):
        return whole(role, d_out, cap, transposed=transposed)
    total = sum(heads[r] for r in roles)
    if d_out % total:
        raise UnsupportedModelError(f"{role}: {d_out} rows do not fall into {total} heads of equal size.")
    segments, start = [], 0
    for r in roles:
        count = heads[r] if granularity == "head" else 1
        rows = heads[r] * (d_out // total)
        segments.append(Segment(r, start, count, rows // count, cap))
        start += rows
    return Layout("rms_to_rms", transposed, tuple(segments))


def head_dim(model: nn.Module, layer: LayerParts, names: Parts) -> int:
    """Width of one attention head."""
    linears = layer.attention_linears
    module: Any = model.get_submodule(linears.get("qkv") or linears["q"])
    module = getattr(module, "base_layer", module)  # an adapter may wrap it
    rows = module.weight.shape[1 if is_transposed(module) else 0]
    total = names.n_heads + 2 * names.n_kv_heads if "qkv" in linears else names.n_heads
    return rows // total


def _plan_constants(
    plan: _Plan, model: nn.Module, names: Parts, config: LipschitzConfig, family: Family
) -> None:
    steps = 2 * len(names.layers)
    a = config.residual if config.residual is not None else 1.0 / steps
    scaling = family.architecture.attention.scaling
    for index, layer in enumerate(names.layers):
        c = [(1.0 - a) ** (2 * index + j) for j in range(3)]
        d_head = head_dim(model, layer, names)
        # Without a scaling attribute the forward divides by sqrt(d_head). Scaling the input of q, k
        # and v by s gives logits s^2 q.k / sqrt(d_head) = attention_scale q.k / d_head; the values'
        # s is taken off again behind the output map. Nothing is hooked inside, so peft stays exact.
        s = 1.0 if scaling else math.sqrt(config.attention_scale / math.sqrt(d_head))
        _plan_slot(plan, model, layer.attention_norm, c[0] * s)
        _plan_branch(plan, model, layer.attention, a / c[1] * config.value_scale / s)
        if scaling:
            _plan_scaling(plan, model, layer.attention, scaling, config.attention_scale / d_head)
        for name in layer.qk_norms:
            _plan_slot(plan, model, name, 1.0)
        _plan_slot(plan, model, layer.mlp_norm, c[1])
        _plan_branch(plan, model, layer.mlp, a / c[2])
        _plan_activation(plan, model, layer.act)
    _plan_slot(plan, model, names.final_norm, (1.0 - a) ** steps)


def _set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _plan_slot(plan: _Plan, model: nn.Module, name: str, scale: float) -> None:
    training = model.get_submodule(name).training
    plan.add(
        name,
        f"norm -> constant {scale:.6g}",
        lambda: _set_submodule(model, name, ConstantScale(scale).train(training)),
    )


def _plan_branch(plan: _Plan, model: nn.Module, name: str, scale: float) -> None:
    module = model.get_submodule(name)
    plan.add(name, f"branch scaled by {scale:.6g}", lambda: set_branch_scale_(module, scale))


def _plan_scaling(plan: _Plan, model: nn.Module, name: str, attribute: str, value: float) -> None:
    module = model.get_submodule(name)
    plan.add(name, f"logits scaled by {value:.6g}", lambda: setattr(module, attribute, value))


def _plan_activation(plan: _Plan, model: nn.Module, name: str) -> None:
    act = model.get_submodule(name)
    if isinstance(act, ScaledActivation):
        return
    kind = activation_kind(act)
    assert kind is not None  # check_model refused it otherwise
    scaled = ScaledActivation(act, kind).train(act.training)
    plan.add(name, f"{kind} scaled to slope 1", lambda: _set_submodule(model, name, scaled))


def _plan_drop_biases(plan: _Plan, model: nn.Module, names: Parts) -> None:
    for _, name in names.linears():
        bias = model.get_submodule(name).bias
        if isinstance(bias, Tensor):
            plan.add(name, "bias fixed at zero", lambda b=bias: b.requires_grad_(False).data.zero_())  # type: ignore[misc]


@torch.no_grad()
def _init_orthogonal_(model: nn.Module, names: Parts) -> None:
    """Every block orthogonal at norm min(1, cap); attention and MLP output maps zero; biases zero."""
    for _, module in constrained_modules(model):
        for segment, blocks in module.layout.views(module.weight):
            cap = min(1.0, segment.cap) * (1.0 - 1e-6)  # room for float32 rounding of the entries
            if module.layout.norm == ROW:
                shape = blocks.shape
                rows = _sinusoids(*shape[-2:]) if segment.role == "position" else torch.randn(shape)
                rows = rows.to(blocks.device)
                size = rows.square().mean(-1, keepdim=True).sqrt()
                blocks.copy_(rows * (segment.cap * (1.0 - 1e-6)) / size)
            elif segment.role in ("out", "down"):
                blocks.zero_()
            else:
                for block in blocks:
                    fresh = torch.empty(block.shape, dtype=torch.float32, device=block.device)
                    nn.init.orthogonal_(fresh, gain=cap * math.sqrt(block.shape[0] / block.shape[1]))
                    block.copy_(fresh)
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor):
            bias.zero_()
    logger.info("orthogonal init of %s", type(model).__name__)


def _sinusoids(count: int, width: int) -> Tensor:
    """Rows sin, cos of the position at wavelengths from 2 pi to 2 pi count [count, width], float32.

    Offsets between positions are then rotations, so attention to a fixed offset is a linear map away; learned
    from random rows under small logits it takes far longer (measured in docs/LOG.md).
    """
    half = (width + 1) // 2
    frequencies = float(count) ** -(torch.arange(half) / max(half - 1, 1))
    angles = torch.arange(count)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=-1)[:, :width]


__all__ = ["Constrained", "RetrofitReport", "RetrofitState", "find_retrofit", "release", "retrofit"]
