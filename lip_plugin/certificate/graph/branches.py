"""The two branches of a layer as nodes: attention with its output map, and the MLP."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from lip_plugin.certificate.graph.attention import Attention, HeadRows, Rotary
from lip_plugin.certificate.graph.base import Node
from lip_plugin.certificate.graph.containers import Chain
from lip_plugin.certificate.graph.joint_attention import AttentionOut
from lip_plugin.certificate.graph.joint_bounds import GatedMlp
from lip_plugin.certificate.graph.nodes import (
    Activation,
    Gate,
    Linear,
    Norm,
    Scale,
)
from lip_plugin.certificate.graph.pairs import Modulus, Stacked
from lip_plugin.certificate.graph.weights import (
    linear_of,
    linears_of,
    refuse_computed,
)
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.activations import activation_kind
from lip_plugin.model.heads import head_dim
from lip_plugin.model.normalization import Floored, norm_facts
from lip_plugin.model.pairs import PairAbs
from lip_plugin.model.parts import (
    BranchParts,
    LayerParts,
    Parts,
    owner_of,
)
from lip_plugin.model.position import position_bias
from lip_plugin.model.scales import ConstantScale, branch_scale, entry_cap, input_scale


def config_of_root(root: nn.Module) -> Any:
    return root.config


def slot_of(root: nn.Module, name: str) -> Node:
    """The node of a norm slot: a constant if the norm was removed, else the norm."""
    module: Any = root.get_submodule(name)
    if isinstance(module, ConstantScale):
        return Scale(name, module.scale)
    refuse_computed(module, name)
    facts = norm_facts(module, name)
    weight: Any = getattr(module, "weight", None)
    bias = getattr(module, "bias", None)
    if facts.one_plus:
        # 1 + w may be rounded towards zero. So it is formed in float64 and moved away from zero by
        # one unit.
        gain = 1.0 + weight.detach().double()
        weight = gain + gain * 2**-52
    floor = module.floor if isinstance(module, Floored) else 0.0
    return Norm(name, module, facts.eps, facts.center, weight, bias, floor)


def _branch(
    root: nn.Module, names: Parts, layer: LayerParts, branch: BranchParts, nodes: list[Node]
) -> Chain:
    """One branch: the slot in front of f, the nodes of f, and the factors on its output."""
    before = (
        slot_of(root, branch.norm)
        if branch.norm
        else Scale(branch.module, input_scale(root.get_submodule(branch.module)))
    )
    chain = [before, *nodes]
    # If the factor sits on the activation's output (OPT), it is among the nodes of f already.
    if branch.scale != branch.act:
        chain.append(Scale(branch.scale, branch_scale(root.get_submodule(branch.scale))))
    if branch.branch_norm:
        chain.append(slot_of(root, branch.branch_norm))
    attribute = names.architecture.residual_scale
    factor = float(getattr(root.get_submodule(layer.name), attribute)) if attribute else 1.0
    if factor != 1.0:
        chain.append(Scale(f"{layer.name}.{attribute}", factor))
    return Chain(branch.module, chain)


def _projections(
    root: nn.Module, names: Parts, branch: BranchParts, d_head: int
) -> dict[str, HeadRows]:
    """q, k and v by role. Each is a linear map of its own, or some rows of a fused one."""
    heads = {"q": names.n_heads, "k": names.n_kv_heads, "v": names.n_kv_heads}
    if "qkv" not in branch.linears:
        maps = {role: linear_of(root, role, branch.linears[role]) for role in heads}
        return {r: HeadRows(r, maps[r], 0, count * d_head, count) for r, count in heads.items()}
    interleaved = names.n_heads if names.architecture.attention.interleaved else None
    fused, start, found = linear_of(root, "qkv", branch.linears["qkv"], interleaved), 0, {}
    for role, count in heads.items():
        found[role] = HeadRows(role, fused, start, start + count * d_head, count)
        start += count * d_head
    return found


# The branch of a layer that holds attention and its output map.
def attention_branch(root: nn.Module, names: Parts, layer: LayerParts) -> Chain:
    described, branch = names.architecture.attention, layer.attention
    module: Any = root.get_submodule(branch.module)
    d_head = head_dim(root, layer, names)
    projections = _projections(root, names, branch, d_head)
    tau = 1.0 / math.sqrt(d_head)
    if described.scaling:
        owner, attribute = owner_of(root, branch.module, described.scaling)
        tau = float(getattr(owner, attribute))
    bias = position_bias(module)
    if bias is not None and not bias.content:
        tau = 0.0  # attention by position alone, without q.k
    softcap = getattr(module, described.softcap) if described.softcap else None
    if softcap is not None and not names.rotary:
        raise UnsupportedModelError(
            f"{branch.module} caps logits of unturned keys: no rule is proven for that."
        )
    if softcap is not None and bias is not None:
        raise UnsupportedModelError(
            f"{branch.module} caps logits and biases them: no rule is proven for that."
        )
    kind = getattr(module, described.layer_type) if described.layer_type else None
    qk: list[Any] = [slot_of(root, name) for name in branch.qk_norms] or [None, None]
    widths = {n.weight.numel() for n in qk if isinstance(n, Norm) and n.weight is not None}
    attention = Attention(
        branch.module,
        projections["q"],
        projections["k"],
        projections["v"],
        tau=tau,
        d_head=d_head,
        d_in=projections["q"].linear.d_in,
        q_norm=qk[0],
        k_norm=qk[1],
        rotary=Rotary(root.get_submodule(names.rotary), kind) if names.rotary else None,
        whole_norms=bool(widths - {d_head}),
        softcap=None if softcap is None else float(softcap),
        causal=described.causal,
        window=_window(root, module, described.window),
        bias=bias,
    )
    out = linear_of(root, "out", branch.linears["out"])
    return _branch(root, names, layer, branch, [AttentionOut(branch.module, [attention, out])])


def _window(root: nn.Module, module: nn.Module, where: str | None) -> int | None:
    """How many tokens a query sees, read where the forward reads it; None for all of them."""
    if where is None:
        return None
    window = getattr(module if where == "module" else config_of_root(root), "sliding_window", None)
    return None if window is None else int(window)


def activation_of(root: nn.Module, name: str) -> list[Node]:
    """The node of an activation, and that of the branch's factor if it sits on the output."""
    module = root.get_submodule(name)
    kind = activation_kind(module)
    if kind is None:
        raise UnsupportedModelError(f"{name} is {module}: no proven slope is known for it.")
    nodes: list[Node] = [Activation(name, module, kind, entry_cap(module))]
    if branch_scale(module) != 1.0:
        nodes.append(Scale(name, branch_scale(module)))
    return nodes


# The branch of a layer that holds its MLP, gated or not.
def mlp_branch(root: nn.Module, names: Parts, layer: LayerParts) -> Chain:
    branch, linears = layer.mlp, layer.mlp.linears
    gated: list[Linear] | None = None
    if "gate_up" in linears:
        gated = linears_of(root, "gate_up", linears["gate_up"])
    elif "gate" in linears:
        gated = [linear_of(root, role, linears[role]) for role in ("gate", "up")]
    down = linear_of(root, "down", linears["down"])
    module = root.get_submodule(str(branch.act))
    if gated is not None and isinstance(module, PairAbs):
        stacked = Stacked.of(f"{branch.module}[gate, up]", *gated)
        return _branch(
            root, names, layer, branch, [stacked, Modulus(str(branch.act), module), down]
        )
    act, *scale = activation_of(root, str(branch.act))
    assert isinstance(act, Activation)
    if gated is None:
        return _branch(
            root, names, layer, branch, [linear_of(root, "up", linears["up"]), act, *scale, down]
        )
    cap = entry_cap(root.get_submodule(linears.get("gate_up") or linears["up"]))
    gate = Gate(branch.module, gated[0], gated[1], act, cap)
    assert not scale
    return _branch(root, names, layer, branch, [GatedMlp(branch.module, [gate, down])])
