"""parts(model, architecture): the full names of everything that an architecture describes, checked."""

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
    """Full names in one sub-block; `linears` maps roles to names, in running order."""

    module: str
    scale: str
    norm: str | None
    branch_norm: str | None
    sum_norm: str | None
    linears: dict[str, str]
    act: str | None = None
    qk_norms: tuple[str, ...] = ()

    def norms(self) -> Iterator[str]:
        """Full names of its norm slots."""
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
    """A number of the forward besides weights: attribute of a module, or of `model.config` (owner None).

    `neutral` is the value that takes it out of the forward: 1 for a factor, None for a softcap.
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

    def tables(self) -> list[tuple[str, str]]:
        """(role, name) of every table of rows, tokens first."""
        a = self.architecture
        named = {"token": a.tokens, "first": a.first, "position": a.positions, "type": a.types}
        return [(role, name) for role, name in named.items() if name]

    def linears(self) -> Iterator[tuple[str, str]]:
        """(role, full name) of every linear map in running order, so the head last."""
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
        """Full names of all norm slots."""
        a = self.architecture
        yield from filter(None, [a.entry_norm])
        for layer in self.layers:
            for branch in layer.branches:
                yield from branch.norms()
        yield from filter(None, [a.final_norm])
        yield from (path for kind, path in a.readout if kind == "norm")

    def activations(self) -> Iterator[str]:
        """Full names of all activations."""
        for layer in self.layers:
            yield from (branch.act for branch in layer.branches if branch.act)
        yield from (path for kind, path in self.architecture.readout if kind == "act")


def _join(*names: str) -> str:
    return ".".join(n for n in names if n)


def parts(model: nn.Module, architecture: Architecture) -> Parts:
    """Resolve an architecture on a model; raises UnsupportedModelError naming a part that is missing."""
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
    """Those that this model has, a config's copy of a module's attribute included."""
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


_COPY = re.compile(
    r"\.(original_module|modules_to_save\.[^.]+)(?=\.)"
)  # segments of peft's modules_to_save


def refuse_undescribed(model: nn.Module, names: Parts) -> None:
    """Raise UnsupportedModelError for a parameter outside everything that the architecture describes.

    What an adapter adds inside a described layer is that layer's, and so is a copy that peft trains beside it.
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
                f"{owner or type(model).__name__} ({type(model.get_submodule(owner)).__name__}) has weights that the "
                "architecture does not describe, so nothing could be proven about the model. Mixture-of-experts, "
                "state-space and cross-attention layers have no rule here."
            )


def _get(model: nn.Module, name: str, architecture: Architecture) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} was taken for family {architecture.name!r}, but has no module {name!r}. "
            "Retrofit the model with its language-model head (AutoModelForCausalLM) or classifier, before any wrapper."
        ) from error


def owner_of(model: nn.Module, module: str, path: str) -> tuple[Any, str]:
    """(module, attribute) of a dotted attribute path relative to a module's full name."""
    owner, _, attribute = f"{module}.{path}".rpartition(".")
    return model.get_submodule(owner), attribute
