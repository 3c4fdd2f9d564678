"""parts(model, architecture): the full module names of everything that an architecture describes.

An Architecture holds relative names. This file puts them together, layer by layer, and checks that
each part exists in the model. Surgery and certificate then walk the result.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.architecture import Architecture, Branch
from lip_plugin.model.layers import RowParameter, table_of


@dataclass(frozen=True)
class BranchParts:
    """The full names in one sub-block.

    Attributes:
        module: The attention or MLP module.
        scale: The module whose output the retrofit multiplies.
        norm, branch_norm, sum_norm: The norm slots, or None; see `Branch`.
        linears: Role -> name of each linear map, in running order.
        act: The activation, or None.
        qk_norms: The QK-norms that there are.
    """

    module: str
    scale: str
    norm: str | None
    branch_norm: str | None
    sum_norm: str | None
    linears: dict[str, str]
    act: str | None = None
    qk_norms: tuple[str, ...] = ()

    def norms(self) -> Iterator[str]:
        """The full names of its norm slots."""
        yield from filter(None, (self.norm, self.branch_norm, self.sum_norm))
        yield from self.qk_norms


@dataclass(frozen=True)
class LayerParts:
    """One layer: its full name and its two sub-blocks."""

    name: str
    attention: BranchParts
    mlp: BranchParts

    @property
    def branches(self) -> tuple[BranchParts, BranchParts]:
        return self.attention, self.mlp


@dataclass(frozen=True)
class Knob:
    """A number in the forward pass that is no weight, such as a multiplier or a softcap.

    Attributes:
        owner: The full name of the module that has it as an attribute. None is `model.config`.
        attribute: The name of the attribute.
        neutral: The value that takes it out of the forward: 1 for a factor, None for a softcap.
    """

    owner: str | None
    attribute: str
    neutral: float | None


@dataclass(frozen=True)
class Parts:
    """The full module names of one model."""

    architecture: Architecture
    layers: tuple[LayerParts, ...]
    knobs: tuple[Knob, ...]
    n_heads: int
    n_kv_heads: int

    @property
    def head(self) -> str:
        return self.architecture.head

    @property
    def rotary(self) -> str | None:
        return self.architecture.rotary

    @property
    def gated(self) -> bool:
        """Whether an MLP multiplies two maps of its input with each other, entry by entry.

        The MLPs of llama and its relatives do.
        """
        return any({"gate", "gate_up"} & layer.mlp.linears.keys() for layer in self.layers)

    def tables(self) -> list[tuple[str, str]]:
        """(role, name) of every table of rows, tokens first."""
        a = self.architecture
        named = {"token": a.tokens, "first": a.first, "position": a.positions, "type": a.types}
        return [(role, name) for role, name in named.items() if name]

    def linears(self) -> Iterator[tuple[str, str]]:
        """(role, full name) of every linear map in running order, so that the head is last."""
        a = self.architecture
        if a.patches:
            yield "patch", a.patches
        if a.token_map:
            yield "token_map", a.token_map
        for layer in self.layers:
            for branch in layer.branches:
                yield from branch.linears.items()
        yield from (("dense", path) for kind, path in a.readout if kind == "dense")
        yield "head", a.head

    def norms(self) -> Iterator[str]:
        """The full names of all norm slots."""
        a = self.architecture
        yield from filter(None, [a.entry_norm])
        for layer in self.layers:
            for branch in layer.branches:
                yield from branch.norms()
        yield from filter(None, [a.final_norm])
        yield from (path for kind, path in a.readout if kind == "norm")

    def activations(self) -> Iterator[str]:
        """The full names of all activations."""
        for layer in self.layers:
            yield from (branch.act for branch in layer.branches if branch.act)
        yield from (path for kind, path in self.architecture.readout if kind == "act")


# A dotted name out of its parts. Empty parts are left out.
def _join(*names: str) -> str:
    return ".".join(n for n in names if n)


def parts(model: nn.Module, architecture: Architecture) -> Parts:
    """Resolve an architecture on a model.

    Raises:
        UnsupportedModelError: A part is missing. The message names it.
    """
    config: Any = model.config
    n_heads = int(getattr(config, architecture.heads))
    kv = getattr(config, architecture.kv_heads, None) if architecture.kv_heads else None
    layers = []
    for index in range(len(_get(model, architecture.layers, architecture))):
        layers.append(_layer(_join(architecture.layers, str(index)), architecture))
    found = Parts(
        architecture=architecture,
        layers=tuple(layers),
        knobs=tuple(_knobs(model, architecture, layers)),
        n_heads=n_heads,
        n_kv_heads=int(kv or n_heads),
    )
    branches = [branch for layer in layers for branch in layer.branches]
    names = [n for branch in branches for n in (branch.module, branch.scale)]
    names += [name for _, name in found.linears()]
    names += [*found.norms(), *found.activations(), *filter(None, [architecture.rotary])]
    for name in names:
        _get(model, name, architecture)
    for _, name in found.tables():
        table_of(model, name)
    return found


# The names in the layer with this full name.
def _layer(layer: str, architecture: Architecture) -> LayerParts:
    a, m = architecture.attention, architecture.mlp
    attention = {"qkv": a.qkv, "q": a.q, "k": a.k, "v": a.v, "out": a.out}
    mlp = {"gate_up": m.gate_up, "gate": m.gate, "up": m.up, "down": m.down}
    module = _join(layer, a.module)
    qk_norms = tuple(_join(module, n) for n in (a.q_norm, a.k_norm) if n)
    act = _join(layer, m.module, m.act)
    return LayerParts(
        layer, _branch(layer, a, attention, qk_norms=qk_norms), _branch(layer, m, mlp, act=act)
    )


# The names in one sub-block of the layer with this full name.
def _branch(layer: str, branch: Branch, linears: dict[str, str | None], **more: Any) -> BranchParts:
    module = _join(layer, branch.module)
    slots = (branch.norm, branch.branch_norm, branch.sum_norm)
    norm, branch_norm, sum_norm = (_join(layer, slot) if slot else None for slot in slots)
    named = {role: _join(module, name) for role, name in linears.items() if name}
    scale = _join(module, branch.scale or "")
    return BranchParts(module, scale, norm, branch_norm, sum_norm, named, **more)


def _knobs(
    model: nn.Module, architecture: Architecture, layers: list[LayerParts]
) -> Iterator[Knob]:
    """The knobs that this model has. A config's copy of a module's attribute is one more knob."""
    wanted: list[tuple[str, str, float | None]] = []
    for path in architecture.embedding_scale:
        owner, _, attribute = path.rpartition(".")
        wanted.append((owner, attribute, 1.0))
    for layer in layers:
        if architecture.residual_scale:
            wanted.append((layer.name, architecture.residual_scale, 1.0))
        if architecture.attention.softcap:
            wanted.append((layer.attention.module, architecture.attention.softcap, None))
    for owner, attribute, neutral in wanted:
        yield Knob(owner, attribute, neutral)
    neutrals = {attribute: neutral for _, attribute, neutral in wanted}
    neutrals |= dict.fromkeys(filter(None, [architecture.logits_divisor]), 1.0)
    neutrals |= dict.fromkeys(filter(None, [architecture.softcap]))
    yield from (Knob(None, a, n) for a, n in neutrals.items() if hasattr(model.config, a))


# The segments that peft's modules_to_save puts into a parameter's name.
_COPY = re.compile(r"\.(original_module|modules_to_save\.[^.]+)(?=\.)")


def refuse_undescribed(model: nn.Module, names: Parts) -> None:
    """Check that the architecture describes every parameter of the model.

    What an adapter adds inside a described layer belongs to that layer. So does a copy of a layer
    that peft trains beside it.

    Raises:
        UnsupportedModelError: A parameter lies outside everything that is described.
    """
    described = {*(name for _, name in names.linears()), *names.norms()}
    rows = [(name, table_of(model, name)) for _, name in names.tables()]
    described |= {name for name, table in rows if not isinstance(table, RowParameter)}
    bare = {name for name, table in rows if isinstance(table, RowParameter)} | {
        *names.architecture.unused
    }
    described |= {f"{layer.attention.module}.position_bias" for layer in names.layers}
    for name, _ in model.named_parameters():
        steps = _COPY.sub("", name).split(".")
        inside = any(".".join(steps[:i]) in described for i in range(1, len(steps)))
        if not inside and name not in bare:
            owner = name.rpartition(".")[0]
            raise UnsupportedModelError(
                f"{owner or type(model).__name__} ({type(model.get_submodule(owner)).__name__}) "
                "has weights that the architecture does not describe, so nothing could be proven "
                "about the model. Mixture-of-experts, state-space and cross-attention layers have "
                "no rule here."
            )


# The module with this full name. Raises UnsupportedModelError if the model has none.
def _get(model: nn.Module, name: str, architecture: Architecture) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} was taken for family {architecture.name!r}, but has no "
            f"module {name!r}. Retrofit the model with its language-model head "
            "(AutoModelForCausalLM) or classifier, before any wrapper."
        ) from error


def owner_of(model: nn.Module, module: str, path: str) -> tuple[Any, str]:
    """(module, attribute) of a dotted path.

    Args:
        model: The model.
        module: The full name of a module.
        path: A path of an attribute, relative to that module.
    """
    owner, _, attribute = f"{module}.{path}".rpartition(".")
    return model.get_submodule(owner), attribute
