"""The recipe of arXiv 2507.13338, x <- (1-a) x + a f(x), written into slots that a model has.

The residual needs no new forward pass. Let x_k be what the recipe carries after k branches, and
let c_k = (1-a)^k (the product of all 1-a so far if a differs between branches). The model carries
u_k = x_k / c_k in place of x_k. Dividing the recipe by c_(k+1) turns it into the sum that the
model already computes:

    u_(k+1) = u_k + (a / c_(k+1)) f(c_k u_k)

So three kinds of constants do it:

- What a branch reads is multiplied by c_k. This constant takes the place of the norm in front of
  the branch; without such a norm a hook on the branch's module multiplies.
- What a branch returns is multiplied by a / c_(k+1).
- The final norm becomes the last c, which turns u back into x.

Some families have their norm behind the sum: norm(x + f(x)). That norm becomes the constant 1-a,
and the branch is multiplied by a / (1-a).

The proof is in docs/maths.md, section 2. The functions here only add to a `Plan`; nothing changes
before it is carried out.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.config_values import of_layer
from lip_plugin.model.activations import REPLACEMENTS, ScaledActivation, activation_kind
from lip_plugin.model.heads import head_dim
from lip_plugin.model.pairs import PairAbs
from lip_plugin.model.parts import BranchParts, Knob, LayerParts, Parts, owner_of
from lip_plugin.model.position import MAX_OFFSETS, OffsetBias, position_bias, set_position_bias_
from lip_plugin.model.scales import (
    ConstantScale,
    entry_cap,
    set_branch_scale_,
    set_entry_cap_,
    set_input_scale_,
)
from lip_plugin.surgery.plan import Plan


def step_sizes(config: LipschitzConfig, names: Parts) -> tuple[float, float]:
    """The step a in x <- (1-a) x + a f(x), as a pair: of attention, and of MLPs.

    It is `config.residual` if that is given. None is the paper's 1/(2L) for L layers, or 1/(L+1)
    where attention and MLP run in parallel.
    """
    if isinstance(config.residual, tuple):
        return config.residual
    layers = len(names.layers)
    default = 1.0 / (layers + 1) if names.architecture.parallel else 1.0 / (2 * layers)
    a = default if config.residual is None else float(config.residual)
    return a, a


def plan_constants(plan: Plan, model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    """Plan the recipe for the whole model.

    - Every norm slot becomes a constant, and every branch gets its factors.
    - Attention logits get their scale, and position biases if the config asks for them.
    - Activations become 1-Lipschitz.
    - Multipliers and softcaps of the library's forward get a value that has no effect.
    """
    architecture = names.architecture
    steps = step_sizes(config, names)
    if architecture.entry_norm:
        _plan_slot(plan, model, architecture.entry_norm, 1.0)
    c = 1.0
    for i, layer in enumerate(names.layers):
        sharp, values = (of_layer(of, i) for of in (config.attention_scale, config.value_scale))
        scaling = architecture.attention.scaling
        d_head = head_dim(model, layer, names)
        # Some forwards have no attribute for the scale of the logits and divide by sqrt(d_head).
        # Scaling the input of q, k and v by s gives logits of s^2 q.k / sqrt(d_head), which have to
        # be attention_scale q.k / d_head. The values are scaled by s too, so the output is divided
        # by s. No hook sits inside the attention module, so adapters of peft stay exact.
        s = 1.0 if scaling or not sharp else math.sqrt(sharp / math.sqrt(d_head))
        reads_and_gains = ((s, values / s), (1.0, 1.0))
        for branch, a, (reads, gain) in zip(layer.branches, steps, reads_and_gains, strict=True):
            # Parallel branches share one step: (1-a) x + a (attention + mlp) / 2.
            gain = gain / 2 if architecture.parallel else gain
            # The activation is replaced first, because in OPT the branch's scale is a hook on the
            # activation itself.
            if branch.act:
                _plan_activation(plan, model, branch.act, config.activation, gated=names.gated)
            _plan_branch(plan, model, branch, a, c, reads, gain)
            c *= 1.0 if architecture.parallel else 1.0 - a
        c *= 1.0 - steps[0] if architecture.parallel else 1.0
        _plan_gate(plan, model, layer.mlp, config.gate_max)
        _plan_position(plan, model, layer, names, config, content=sharp != 0)
        if scaling:
            _plan_scaling(plan, model, layer.attention.module, scaling, sharp / d_head)
        for name in layer.attention.qk_norms:
            _plan_slot(plan, model, name, 1.0)
    if architecture.final_norm:
        _plan_slot(plan, model, architecture.final_norm, c * (config.logit_scale or 1.0))
    for kind, path in architecture.readout:
        if kind == "norm":
            _plan_slot(plan, model, path, 1.0)
        if kind == "act":
            _plan_activation(plan, model, path)
    for knob in names.knobs:
        _plan_knob(plan, model, knob)


def _plan_branch(
    plan: Plan, model: nn.Module, branch: BranchParts, a: float, c: float, reads: float, gain: float
) -> None:
    """Plan one branch: its input is multiplied by c_k * reads, its output by a / c_(k+1) * gain."""
    if branch.sum_norm:
        before, after = reads, a / (1.0 - a) * gain
        _plan_slot(plan, model, branch.sum_norm, 1.0 - a)
    else:
        before, after = c * reads, a / (c * (1.0 - a)) * gain
    if branch.norm:
        _plan_slot(plan, model, branch.norm, before)
    elif not branch.sum_norm or before != 1.0:
        plan.add(
            branch.module,
            f"reads its input times {before:.6g}",
            lambda: set_input_scale_(model.get_submodule(branch.module), before),
        )
    if branch.branch_norm:
        _plan_slot(plan, model, branch.branch_norm, after)
    else:
        plan.add(
            branch.scale,
            f"branch scaled by {after:.6g}",
            lambda: set_branch_scale_(model.get_submodule(branch.scale), after),
        )


def set_submodule(model: nn.Module, name: str, module: nn.Module) -> None:
    """Put `module` in the place of the module with this full name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, module)


def _plan_slot(plan: Plan, model: nn.Module, name: str, scale: float) -> None:
    training = model.get_submodule(name).training
    plan.add(
        name,
        f"norm -> constant {scale:.6g}",
        lambda: set_submodule(model, name, ConstantScale(scale).train(training)),
    )


def _plan_scaling(plan: Plan, model: nn.Module, module: str, path: str, value: float) -> None:
    owner, attribute = owner_of(model, module, path)
    plan.add(module, f"logits scaled by {value:.6g}", lambda: setattr(owner, attribute, value))


def _plan_activation(
    plan: Plan, model: nn.Module, name: str, chosen: str | None = None, *, gated: bool = False
) -> None:
    act = model.get_submodule(name)
    if isinstance(act, PairAbs):
        return  # its product is gone for good
    if gated and chosen is not None:
        pairs = PairAbs().train(act.training)
        plan.add(name, "product -> absolute value", lambda: set_submodule(model, name, pairs))
        return
    present = act.kind if isinstance(act, ScaledActivation) else None
    if chosen is not None and present != chosen:
        replaced = ScaledActivation(REPLACEMENTS[chosen](), chosen).train(act.training)
        plan.add(name, f"replaced by {chosen}", lambda: set_submodule(model, name, replaced))
        return
    if present is not None:
        return
    kind = activation_kind(act)
    assert kind is not None  # check_model has refused models with other activations
    scaled = ScaledActivation(act, kind).train(act.training)
    plan.add(name, f"{kind} scaled to slope 1", lambda: set_submodule(model, name, scaled))


def _plan_gate(plan: Plan, model: nn.Module, branch: BranchParts, cap: float | None) -> None:
    """Plan caps on the entries of both factors of a gated MLP, or plan to take present ones away.

    The factors are the output of the activation, and that of `up` (or of half of a fused map).
    """
    name = branch.linears.get("gate_up") or (
        branch.linears["up"] if "gate" in branch.linears else None
    )
    if name is None or (cap is None and entry_cap(model.get_submodule(name)) is None):
        return
    module: Any = model.get_submodule(name)
    width = module.weight.shape[0] // 2 if "gate_up" in branch.linears else None

    def do() -> None:
        set_entry_cap_(model.get_submodule(name), cap, width)
        set_entry_cap_(model.get_submodule(str(branch.act)), cap)

    what = "caps on entries gone" if cap is None else f"entries of both factors within {cap}"
    plan.add(name, what, do)


def _plan_position(
    plan: Plan,
    model: nn.Module,
    layer: LayerParts,
    names: Parts,
    config: LipschitzConfig,
    *,
    content: bool,
) -> None:
    """Plan the position biases of one layer's attention, or plan to take present ones away.

    Tables that are there already keep their values.
    """
    module: Any = model.get_submodule(layer.attention.module)
    present = position_bias(module)
    if config.position_bias is None:
        if present is not None:
            plan.add(
                layer.attention.module,
                "position biases gone",
                lambda: set_position_bias_(module, None),
            )
        return
    like: Any = next(model.get_submodule(name).weight for name in layer.attention.linears.values())
    longest = [
        getattr(model.config, key, None) for key in ("max_position_embeddings", "block_size")
    ]
    offsets = min([MAX_OFFSETS, *(int(length) for length in longest if length)])
    causal = names.architecture.attention.causal

    def do() -> None:
        bias = present or OffsetBias(
            names.n_heads, offsets, content=content, causal=causal, like=like
        )
        bias.content = content
        bias.weight.requires_grad_(config.position_bias == "learned")
        set_position_bias_(module, bias)

    what = "content and position" if content else "position alone"
    plan.add(layer.attention.module, f"attends by {what} ({config.position_bias})", do)


def _plan_knob(plan: Plan, model: nn.Module, knob: Knob) -> None:
    """Plan to take a multiplier or softcap out of the forward.

    It is set in the config as well, so that the model is saved without it.
    """
    owner: Any = model.config if knob.owner is None else model.get_submodule(knob.owner)
    value = getattr(owner, knob.attribute)
    if not isinstance(value, Tensor) and value == knob.neutral:
        return

    def do() -> None:
        # A buffer is filled, so that it keeps its device and dtype.
        if isinstance(value, Tensor) and knob.neutral is not None:
            with torch.no_grad():
                value.fill_(knob.neutral)
        else:
            setattr(owner, knob.attribute, knob.neutral)

    where = "config" if knob.owner is None else knob.owner
    plan.add(f"{where}.{knob.attribute}", f"set to {knob.neutral}", do)
