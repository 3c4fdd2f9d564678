"""Architecture: what a family's parts are called and how they join, as plain data.

A decoder family is described by the names of its modules (see integrations/hf_families.py for the
table). `find` picks the description for a model, `parts` resolves it to full module names, layer by
layer. Surgery and certificate both walk these names and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError


@dataclass(frozen=True)
class Attention:
    """Names inside one layer: q, k, v (or one fused `qkv`, rows in that order) and the output map.

    `scaling` is the float attribute that multiplies the logits, read at every forward. None says
    that the forward uses 1/sqrt(d_head) itself; the retrofit then scales the attention's input.
    """

    module: str
    norm: str
    out: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    scaling: str | None = "scaling"
    q_norm: str | None = None
    k_norm: str | None = None


@dataclass(frozen=True)
class Mlp:
    """Names inside one layer: down(act(up x)), or down(act(gate x) * up x) with a gate."""

    module: str
    norm: str
    up: str
    down: str
    act: str
    gate: str | None = None


@dataclass(frozen=True)
class Architecture:
    """One family of pre-norm decoders: x <- x + attention(norm x); x <- x + mlp(norm x).

    Paths are relative to the model (`layers`, `tokens`, `positions`, `final_norm`, `head`,
    `rotary`), to a layer (`attention.module`, `norm`) or to the attention or MLP module. `heads`
    and `kv_heads` name attributes of `model.config`.
    """

    name: str
    layers: str
    tokens: str
    final_norm: str
    head: str
    attention: Attention
    mlp: Mlp
    positions: str | None = None
    rotary: str | None = None
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"


@dataclass(frozen=True)
class Family:
    """An Architecture together with what its library needs to be told.

    Attributes:
        matches: whether a model is of this family (reads attributes, never raises).
        is_pretrained: whether the model's weights were loaded from somewhere.
        logits: runs the model on token ids [batch, tokens], gives logits [batch, tokens, vocabulary].
        on_retrofit: called last by `retrofit` with (model, config), to record it in the model's
            own config; must not touch weights.
    """

    architecture: Architecture
    matches: Callable[[nn.Module], bool]
    is_pretrained: Callable[[nn.Module], bool] = field(default=lambda model: False)
    logits: Callable[[nn.Module, Tensor], Tensor] = field(default=lambda model, ids: model(ids).logits)
    on_retrofit: Callable[[nn.Module, Any], None] = field(default=lambda model, config: None)


# Words in the class names of layers that no rule covers, whatever surrounds them.
_NO_RULE = ("sparsemoe", "moeblock", "experts", "mamba")

_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to `retrofit` and `certify`; the same name again replaces it."""
    _FAMILIES[family.architecture.name] = family


def families() -> tuple[str, ...]:
    """Names of the families that are known now."""
    return tuple(_FAMILIES)


def find_family(model: nn.Module) -> Family:
    """The family of `model`.

    Raises UnsupportedModelError, with the way to describe a new one, if there is none.
    """
    for family in _FAMILIES.values():
        if family.matches(model) and not _is_wrapper(model):
            return family
    kind = getattr(getattr(model, "config", None), "model_type", None)
    what = f"{type(model).__name__}" + (f" (model_type {kind!r})" if kind else "")
    _refuse_by_name(model, what)
    raise UnsupportedModelError(
        f"No architecture is described for {what}. Known: {', '.join(_FAMILIES) or 'none'}. "
        "If it is a pre-norm decoder with plain Linear layers, describe it as in "
        "lip_plugin/integrations/hf_families.py and call lip_plugin.architecture.register_family."
    )


def _is_wrapper(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] in ("torch", "peft", "accelerate")


def _refuse_by_name(model: nn.Module, what: str) -> None:
    """Raise if one of the modules inside tells why there is no architecture for this model."""
    for name, module in list(model.named_modules())[1:]:
        cls = type(module).__name__
        if _is_wrapper(model) and any(family.matches(module) for family in _FAMILIES.values()):
            raise UnsupportedModelError(
                f"{what} wraps a {cls}. Order: retrofit the model itself, before DDP, torch.compile or "
                "get_peft_model wraps it."
            )
        if any(word in cls.lower() for word in _NO_RULE):
            raise UnsupportedModelError(
                f"{what}: {name} is {cls}. Mixture-of-experts and state-space layers have no rule here; "
                f"known are {', '.join(_FAMILIES) or 'none'}."
            )


@dataclass(frozen=True)
class LayerParts:
    """Full module names in one layer; `linears` maps roles to names, in running order."""

    attention: str
    attention_norm: str
    attention_linears: dict[str, str]
    qk_norms: tuple[str, ...]
    mlp: str
    mlp_norm: str
    mlp_linears: dict[str, str]
    act: str


@dataclass(frozen=True)
class Parts:
    """The full module names of one model."""

    tokens: str
    positions: str | None
    layers: tuple[LayerParts, ...]
    final_norm: str
    head: str
    rotary: str | None
    n_heads: int
    n_kv_heads: int

    def linears(self) -> Iterator[tuple[str, str]]:
        """(role, full name) of every linear map, head last."""
        for layer in self.layers:
            yield from layer.attention_linears.items()
            yield from layer.mlp_linears.items()
        yield "head", self.head

    def norms(self) -> Iterator[str]:
        """Full names of all norm slots."""
        for layer in self.layers:
            yield layer.attention_norm
            yield layer.mlp_norm
            yield from layer.qk_norms
        yield self.final_norm


def _join(*names: str) -> str:
    return ".".join(n for n in names if n)


def parts(model: nn.Module, architecture: Architecture) -> Parts:
    """Resolve an architecture on a model; raises UnsupportedModelError naming a part that is missing."""
    a, m = architecture.attention, architecture.mlp
    count = len(_get(model, architecture.layers, architecture))
    layers = []
    for index in range(count):
        layer = _join(architecture.layers, str(index))
        attention, mlp = _join(layer, a.module), _join(layer, m.module)
        roles = {"qkv": a.qkv} if a.qkv else {"q": a.q, "k": a.k, "v": a.v}
        mlp_roles = {"gate": m.gate, "up": m.up, "down": m.down}
        layers.append(
            LayerParts(
                attention=attention,
                attention_norm=_join(layer, a.norm),
                attention_linears={r: _join(attention, n) for r, n in {**roles, "out": a.out}.items() if n},
                qk_norms=tuple(_join(attention, n) for n in (a.q_norm, a.k_norm) if n),
                mlp=mlp,
                mlp_norm=_join(layer, m.norm),
                mlp_linears={r: _join(mlp, n) for r, n in mlp_roles.items() if n},
                act=_join(mlp, m.act),
            )
        )
    config = model.config
    n_heads = int(getattr(config, architecture.heads))
    kv = getattr(config, architecture.kv_heads, None) if architecture.kv_heads else None
    found = Parts(
        tokens=architecture.tokens,
        positions=architecture.positions,
        layers=tuple(layers),
        final_norm=architecture.final_norm,
        head=architecture.head,
        rotary=architecture.rotary,
        n_heads=n_heads,
        n_kv_heads=int(kv or n_heads),
    )
    names = [found.tokens, found.positions, found.rotary, *found.norms(), *(n for _, n in found.linears())]
    for name in [*names, *(n for layer in layers for n in (layer.attention, layer.mlp, layer.act))]:
        if name:
            _get(model, name, architecture)
    return found


def _get(model: nn.Module, name: str, architecture: Architecture) -> Any:
    try:
        return model.get_submodule(name)
    except AttributeError as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} was taken for family {architecture.name!r}, but has no module {name!r}. "
            "Retrofit the model with its language-model head (AutoModelForCausalLM), before any wrapper."
        ) from error
