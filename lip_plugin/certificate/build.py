"""model -> graph: an executable copy of its structure, which shares its weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.architecture import Family, LayerParts, Parts, find_family, parts
from lip_plugin.certificate.attention import Attention, Projection
from lip_plugin.certificate.graph import (
    Activation,
    Chain,
    Gate,
    Linear,
    Node,
    Norm,
    Residual,
    Scale,
)
from lip_plugin.certificate.joint import AttentionOut, GatedMlp, MlpResidual
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.modules import (
    ConstantScale,
    activation_kind,
    branch_scale,
    is_linear,
    is_transposed,
)
from lip_plugin.surgery import find_retrofit, head_dim

# Readers of what a wrapped linear layer really multiplies with (an adapter's merged weight, stored
# like the base layer's); they return None for a layer that is not theirs.
_WEIGHT_READERS: list[Callable[[nn.Module], Tensor | None]] = []


def register_weight_reader(reader: Callable[[nn.Module], Tensor | None]) -> None:
    """Have the certificate read the weight of wrapped linear layers by `reader(module)`."""
    if reader not in _WEIGHT_READERS:
        _WEIGHT_READERS.append(reader)


@dataclass
class Graph:
    """A model as nodes, from the embeddings that enter the first block to the logits.

    `only` restricts `linears` (so what is measured) to linear maps of these names: a layer at a time.
    """

    root: nn.Module
    family: Family
    parts: Parts
    body: Chain
    only: frozenset[str] | None = None

    def embed(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """What enters the first block for token ids [batch, tokens]."""
        x = self.root.get_submodule(self.parts.tokens).weight[ids].to(dtype)  # type: ignore[index]
        if self.parts.positions:
            positions = self.root.get_submodule(self.parts.positions).weight[: ids.shape[1]]  # type: ignore[index]
            x = x + positions.to(dtype)
        return x

    def tables(self) -> list[str]:
        """Names of the embedding tables whose rows add up to the input of the first block."""
        return [t for t in (self.parts.tokens, self.parts.positions) if t]

    def linears(self) -> list[tuple[str, str, nn.Module, Tensor]]:
        """(role, name, plain base module, effective weight as stored) of every linear map."""
        found = []
        for role, name in self.parts.linears():
            if self.only is not None and name not in self.only:
                continue
            module, weight = _read(self.root.get_submodule(name), name)
            found.append((role, name, module, weight()))
        return found


def build(model: nn.Module) -> Graph:
    """The graph of a model of a known family, retrofitted or not; wrappers are looked through.

    Raises UnsupportedModelError naming a module without a proven rule.
    """
    root = _root(model)
    family = find_family(root)
    names = parts(root, family.architecture)
    nodes: list[Node] = []
    for layer in names.layers:
        nodes.append(_attention_block(root, family, names, layer))
        nodes.append(_mlp_block(root, layer))
    nodes.append(_slot(root, names.final_norm))
    nodes.append(_linear(root, names.head))
    return Graph(root, family, names, Chain("model", nodes))


def _root(model: nn.Module) -> nn.Module:
    """The model itself, inside whatever wraps it (DDP, peft, compile)."""
    found = find_retrofit(model)
    if found is not None:
        return found[0]
    for module in model.modules():
        try:
            find_family(module)
        except UnsupportedModelError:
            continue
        return module
    return model  # whose family is then refused by name


def _read(module: Any, name: str) -> tuple[Any, Callable[[], Tensor]]:
    """(plain linear module, reader of the weight it multiplies with, in the plain module's storage)."""
    if is_linear(module):
        return module, lambda: module.weight
    base = getattr(module, "base_layer", None)
    for reader in _WEIGHT_READERS:
        if base is not None and is_linear(base) and reader(module) is not None:
            read: Any = partial(reader, module)
            return base, read
    raise UnsupportedModelError(
        f"{name} is {type(module).__module__}.{type(module).__name__}: what it computes has no proven "
        "rule here. Merge adapters (merge_and_unload) or take the wrapper off, then certify."
    )


def _linear(root: nn.Module, name: str) -> Linear:
    base, weight = _read(root.get_submodule(name), name)
    transposed = is_transposed(base)
    d_in, d_out = base.weight.shape if transposed else tuple(reversed(base.weight.shape))
    return Linear(
        name,
        weight=(lambda: weight().t()) if transposed else weight,
        bias=lambda: getattr(base, "bias", None),
        d_out=int(d_out),
        d_in=int(d_in),
    )


def _slot(root: nn.Module, name: str) -> Node:
    """The node of a norm slot: the constant it became, or the norm that was kept."""
    module: Any = root.get_submodule(name)
    if isinstance(module, ConstantScale):
        return Scale(name, module.scale)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    kind = type(module).__name__
    if type(module) is nn.LayerNorm:
        return Norm(name, module, float(module.eps), True, weight, bias)
    if kind == "LayerNorm" and eps is None:  # nanoGPT's, whose eps is a literal in its forward
        return Norm(name, module, 1e-5, True, weight, bias)
    if kind.endswith("RMSNorm") and eps is not None and bias is None:
        return Norm(name, module, float(eps), False, weight, None)
    raise UnsupportedModelError(f"{name} is {kind}, a norm without a proven rule here.")


def _attention_block(root: nn.Module, family: Family, names: Parts, layer: LayerParts) -> Residual:
    architecture = family.architecture.attention
    module: Any = root.get_submodule(layer.attention)
    d_head = head_dim(root, layer, names)
    heads = {"q": names.n_heads, "k": names.n_kv_heads, "v": names.n_kv_heads}
    projections = {}
    if "qkv" in layer.attention_linears:
        fused, start = _linear(root, layer.attention_linears["qkv"]), 0
        for role, count in heads.items():
            projections[role] = Projection(role, fused, start, start + count * d_head, count)
            start += count * d_head
    else:
        for role, count in heads.items():
            linear = _linear(root, layer.attention_linears[role])
            projections[role] = Projection(role, linear, 0, count * d_head, count)
    qk: list[Any] = [_slot(root, name) for name in layer.qk_norms] or [None, None]
    tau = float(getattr(module, architecture.scaling)) if architecture.scaling else 1.0 / math.sqrt(d_head)
    attention = Attention(
        layer.attention,
        projections["q"],
        projections["k"],
        projections["v"],
        tau=tau,
        d_head=d_head,
        d_in=projections["q"].linear.d_in,
        q_norm=qk[0],
        k_norm=qk[1],
        rotary=root.get_submodule(names.rotary) if names.rotary else None,
    )
    out = _linear(root, layer.attention_linears["out"])
    scale = Scale(layer.attention, branch_scale(module))
    through = AttentionOut(layer.attention, [attention, out])
    return Residual(
        layer.attention, Chain(layer.attention, [_slot(root, layer.attention_norm), through, scale])
    )


def _mlp_block(root: nn.Module, layer: LayerParts) -> Residual:
    act_module = root.get_submodule(layer.act)
    kind = activation_kind(act_module)
    if kind is None:
        raise UnsupportedModelError(f"{layer.act} is {act_module}: no proven slope is known for it.")
    act = Activation(layer.act, act_module, kind)
    up_map = _linear(root, layer.mlp_linears["up"])
    slot, down = _slot(root, layer.mlp_norm), _linear(root, layer.mlp_linears["down"])
    scale = Scale(layer.mlp, branch_scale(root.get_submodule(layer.mlp)))
    if "gate" in layer.mlp_linears:
        gate = Gate(layer.mlp, _linear(root, layer.mlp_linears["gate"]), up_map, act)
        return Residual(layer.mlp, Chain(layer.mlp, [slot, GatedMlp(layer.mlp, [gate, down]), scale]))
    return MlpResidual(layer.mlp, Chain(layer.mlp, [slot, up_map, act, down, scale]))
