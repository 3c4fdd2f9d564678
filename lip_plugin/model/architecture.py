"""Architecture: what a family's parts are called and how they join, as plain data.

A family is described by the names of its modules (see integrations/huggingface/families.py for the table).
`find_family` picks the description for a model, `lip_plugin.model.parts.parts` resolves it to full module
names, layer by layer. Surgery and certificate both walk these names and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A sub-block f of a layer, and how it joins the residual stream: that is told by its norm slots.

        norm                 x + f(norm x)           most decoders, vit
        norm, branch_norm    x + norm(f(norm x))     gemma
        branch_norm          x + norm(f(x))          olmo2
        sum_norm             norm(x + f(x))          bert

    `module` and the slots are relative to the layer ("" is the layer itself), all other names to the
    module. `scale` names the module whose output the retrofit multiplies, None the module itself: it
    must be one that no adapter wraps (so never a linear map), between the branch and the sum.
    """

    module: str
    norm: str | None = None
    branch_norm: str | None = None
    sum_norm: str | None = None
    scale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attention(Branch):
    """q, k, v or one fused `qkv`: rows of all q, all k, all v; `interleaved`: of q, k, v head by head.

    `scaling` is the float attribute that multiplies the logits, read at every forward. None says
    that the forward uses 1/sqrt(d_head) itself; the retrofit then scales the attention's input.
    `softcap` is the attribute that holds c of c tanh(logit / c), and `layer_type` the attribute that
    the rotation is asked with (where layers of one model rotate differently).
    """

    out: str
    q: str | None = None
    k: str | None = None
    v: str | None = None
    qkv: str | None = None
    interleaved: bool = False
    scaling: str | None = "scaling"
    q_norm: str | None = None
    k_norm: str | None = None
    softcap: str | None = None
    layer_type: str | None = None
    causal: bool = True


@dataclass(frozen=True, kw_only=True)
class Mlp(Branch):
    """down(act(up x)), or down(act(gate x) * up x); `gate_up` is one map with the gate's rows first."""

    down: str
    act: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family: tables -> [entry] -> layers -> [final norm] -> [readout] -> head.

    Paths are relative to the model. What enters the first block is the sum of one row of each table
    (`tokens`, mapped by `token_map`, times `embedding_scale`; `positions`; `types`), normed by
    `entry_norm`; or of an image `patches` (a convolution without overlap) behind the row `first`,
    plus `positions`. Tables are embedding modules, or bare Parameters. `readout` lists the steps
    between the last norm slot and the head as (kind, path). "dense", "act" and "norm" are modules at this
    path. "function" is an activation that the forward calls as a function, so that there is no module to
    scale: its path is the function's name in SLOPE_UPPER. "first" and "last" keep one token only.

    Attributes:
        parallel: both branches of a layer read the same x, and their sum is added.
        heads, kv_heads: attributes of `model.config`.
        padding: attribute, as a path from the model, of a token id that the forward tells from others by
            its value, whatever the mask says. With "last" in `readout` the model keeps the last token
            that has another id. None: all ids are treated alike.
        positions_follow_padding: the row of `positions` with the number of `padding` is for padding; the
            first token that is none has the row behind it. Without it positions begin at row 0.
        embedding_scale: attributes that multiply the token rows; the forward reads the first.
        residual_scale: attribute of a layer that multiplies its branches.
        logits_divisor, softcap: attributes of `model.config`: logits / divisor, c tanh(logits / c).
        unused: Parameters that no forward reads.
    """

    name: str
    layers: str
    attention: Attention
    mlp: Mlp
    head: str
    tokens: str | None = None
    token_map: str | None = None
    positions: str | None = None
    types: str | None = None
    entry_norm: str | None = None
    patches: str | None = None
    first: str | None = None
    final_norm: str | None = None
    readout: tuple[tuple[str, str], ...] = ()
    parallel: bool = False
    rotary: str | None = None
    heads: str = "num_attention_heads"
    kv_heads: str | None = "num_key_value_heads"
    embedding_scale: tuple[str, ...] = ()
    residual_scale: str | None = None
    logits_divisor: str | None = None
    softcap: str | None = None
    unused: tuple[str, ...] = ()
    padding: str | None = None
    positions_follow_padding: bool = False

    @property
    def one_token(self) -> bool:
        """Whether the logits are those of one token for the whole sequence or image: a classifier's."""
        return any(kind in ("first", "last") for kind, _ in self.readout)


def model_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """Logits of a Hugging Face model; a classifier's [batch, labels] become [batch, 1, labels]."""
    logits = model(inputs).logits
    return logits if logits.dim() == 3 else logits.unsqueeze(1)


@dataclass(frozen=True)
class Family:
    """An Architecture together with what its library needs to be told.

    Attributes:
        matches: whether a model is of this family (reads attributes, never raises).
        is_pretrained: whether the model's weights were loaded from somewhere.
        logits: runs the model on what it takes (token ids [batch, tokens], or pixels [batch,
            channels, height, width]), gives logits [batch, tokens, vocabulary], or one token's.
        on_retrofit: called last by `retrofit` with (model, config), to record it in the model's
            own config; must not touch weights.
        model_type: the `model_type` that a Hugging Face config has for it; "" for other libraries.
        cls: name of the model's class, for error messages; "" takes the family's name.
        variant: what its config has to say besides, as plain text for error messages; "" for nothing.
    """

    architecture: Architecture
    matches: Callable[[nn.Module], bool]
    is_pretrained: Callable[[nn.Module], bool] = field(default=lambda model: False)
    logits: Callable[[nn.Module, Tensor], Tensor] = field(default=model_logits)
    on_retrofit: Callable[[nn.Module, Any], None] = field(default=lambda model, config: None)
    model_type: str = ""
    cls: str = ""
    variant: str = ""


# Words in the class names of layers that no rule covers, whatever surrounds them.
_NO_RULE = ("sparsemoe", "moeblock", "experts", "mamba")
_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to `retrofit` and `certify`; the same name again replaces it."""
    _FAMILIES[family.architecture.name] = family


def families() -> tuple[str, ...]:
    """Names of the families that are known now."""
    return tuple(_FAMILIES)


def family_named(name: str) -> Family:
    """The family that is registered under this name: of a retrofitted model, whatever has become of its class since."""
    return _FAMILIES[name]


def has_family(model: nn.Module) -> bool:
    """Whether a module is itself a model of a known family."""
    return not _is_wrapper(model) and any(family.matches(model) for family in _FAMILIES.values())


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
    raise UnsupportedModelError(f"No architecture is described for {what}. {_cure(model, kind)}")


def _known() -> str:
    """The classes of all known families, for a message."""
    return (
        ", ".join(dict.fromkeys(f.cls or f.architecture.name for f in _FAMILIES.values())) or "none"
    )


_DESCRIBE = (
    "describe it as in lip_plugin/integrations/hf_families.py and call "
    "lip_plugin.model.architecture.register_family"
)


def _cure(model: nn.Module, kind: str | None) -> str:
    """What is wrong with a model without a family, and what can be done."""
    config = getattr(model, "config", None)
    if kind is None:
        return (
            "It is not a transformer of a known family, and there is no rule for other networks. Known models: "
            f"{_known()}. A family can only be described for transformers: layers of attention and MLP whose maps are "
            f"plain Linear layers. If this is one, {_DESCRIBE}."
        )
    same = [f for f in _FAMILIES.values() if f.model_type == kind]
    if same:
        described = "; ".join(f"{f.cls} with {f.variant}" if f.variant else f.cls for f in same)
        return (
            f"Of this model_type these are known: {described}. Retrofit the model with its language-model head or "
            "classifier (AutoModelForCausalLM, AutoModelForSequenceClassification and the like load it), before any wrapper."
        )
    if getattr(config, "is_encoder_decoder", False):
        return (
            "It is an encoder-decoder, and attention from one sequence to another has no rule here. Use an encoder or a "
            f"decoder alone: {_known()}."
        )
    towers = [
        key
        for key, value in getattr(config, "__dict__", {}).items()
        if hasattr(value, "model_type")
    ]
    if len(towers) > 1:
        return (
            f"It joins several models ({', '.join(towers)}), and there is no rule for what joins them. Use a model with one "
            f"tower: {_known()}."
        )
    return f"Known: {_known()}. If it is a transformer whose maps are plain Linear layers, {_DESCRIBE}."


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
