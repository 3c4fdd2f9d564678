"""The description of a model family as plain data: what its parts are called and how they join.

A family is described by the names of its modules. The table for Hugging Face models is in
integrations/huggingface/families.py. `find_family` picks the description that fits a model, and
`lip_plugin.model.parts.parts` turns it into full module names, layer by layer. Surgery and
certificate both walk these names and nothing else. Open this file to describe a new family.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError


@dataclass(frozen=True, kw_only=True)
class Branch:
    """A sub-block f of a layer, attention or MLP, and how it joins the residual stream.

    How it joins follows from which norm slots it has:

        slots                computes                used by
        norm                 x + f(norm x)           most decoders, vit
        norm, branch_norm    x + norm(f(norm x))     gemma
        branch_norm          x + norm(f(x))          olmo2
        sum_norm             norm(x + f(x))          bert

    Attributes:
        module: Path of f, relative to the layer. "" is the layer itself.
        norm, branch_norm, sum_norm: Paths of the norm slots, relative to the layer, or None.
        scale: Path, relative to `module`, of the module whose output the retrofit multiplies. None
            is `module` itself. It must lie between the branch and the sum, and no adapter may wrap
            it, so it is never a linear map.
    """

    module: str
    norm: str | None = None
    branch_norm: str | None = None
    sum_norm: str | None = None
    scale: str | None = None


@dataclass(frozen=True, kw_only=True)
class Attention(Branch):
    """An attention sub-block. All paths and attributes are relative to its `module`.

    Attributes:
        out: Path of the output map.
        q, k, v: Paths of the three maps, unless they are fused.
        qkv: Path of one fused map. Its rows are all of q, then all of k, then all of v.
        interleaved: The rows of the fused map are those of q, k and v head by head instead.
        scaling: The float attribute that multiplies the logits. It is read at every forward. None
            says that the forward itself uses 1/sqrt(d_head); the retrofit then scales the
            attention's input.
        q_norm, k_norm: Paths of the QK-norms, or None.
        softcap: The attribute that holds c of c tanh(logit / c), or None.
        layer_type: The attribute that the rotation is asked with, where the layers of one model
            rotate differently. None otherwise.
        causal: Whether a token sees only those before it.

    `window` says where the forward reads how many tokens back a query sees: `"module"` or
    `"config"`, each by the attribute `sliding_window`. None says that it sees all of them.
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
    window: str | None = None
    causal: bool = True


@dataclass(frozen=True, kw_only=True)
class Mlp(Branch):
    """An MLP sub-block: down(act(up x)), or, if it is gated, down(act(gate x) * up x).

    Attributes:
        down, act, up, gate: Paths, relative to `module`.
        gate_up: Path of one map in the place of gate and up, with the gate's rows first.
    """

    down: str
    act: str
    up: str | None = None
    gate: str | None = None
    gate_up: str | None = None


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """One family: tables -> [entry norm] -> layers -> [final norm] -> [readout] -> head.

    Paths are relative to the model. What enters the first block is a sum of one row of each table,
    normed by `entry_norm` if there is one. For images, patches take the place of the tokens. A
    table is an embedding module or a bare Parameter.

    Attributes:
        name: The name of the family.
        layers: Path of the list of layers.
        attention, mlp: The two sub-blocks of a layer.
        head: Path of the map to the logits.
        tokens: Path of the token table.
        token_map: Path of a linear map that the token rows go through.
        positions: Path of the table of learned positions.
        types: Path of the table of token types.
        entry_norm: Path of the norm in front of the first block.
        patches: For images, path of the convolution without overlap that makes rows out of patches.
        first: For images, path of the row that stands in front of the patches.
        final_norm: Path of the norm behind the last block.
        readout: The steps between the last norm slot and the head, as (kind, path). "dense", "act"
            and "norm" are modules at this path. "function" is an activation that the forward calls
            as a function, so that there is no module to scale; its path is the name of the function
            in SLOPE_UPPER. "first" and "last" keep one token only.
        parallel: Both sub-blocks of a layer read the same x, and their sum is added to it.
        rotary: Path of the module that computes rotary positions.
        heads, kv_heads: Attributes of `model.config` with the numbers of heads. If kv_heads is
            None, there are as many key and value heads as query heads.
        embedding_scale: Paths of attributes that multiply the token rows. The forward reads the
            first.
        residual_scale: The attribute of a layer that multiplies its branches.
        logits_divisor, softcap: Attributes of `model.config`: the logits become logits / divisor,
            and c tanh(logits / c).
        unused: Names of Parameters that no forward reads.
        padding: Path of an attribute with a token id that the forward tells from others by its
            value, whatever the mask says. With "last" in `readout` the model keeps the last token
            that has another id. None says that all ids are treated alike.
        positions_follow_padding: The row of `positions` whose number is the `padding` id is for
            padding, and the first token that is no padding has the row behind it. Otherwise
            positions begin at row 0.
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
        """Whether the model is a classifier: one token's logits stand for the whole input."""
        return any(kind in ("first", "last") for kind, _ in self.readout)


def model_logits(model: nn.Module, inputs: Tensor) -> Tensor:
    """The logits of a Hugging Face model.

    Args:
        model: Any model whose output has `logits`.
        inputs: Token ids [batch, tokens], or pixels [batch, channels, height, width].

    Returns:
        [batch, tokens, vocabulary]. A classifier's [batch, labels] become [batch, 1, labels].
    """
    logits = model(inputs).logits
    return logits if logits.dim() == 3 else logits.unsqueeze(1)


@dataclass(frozen=True)
class Family:
    """An Architecture, together with what only its library knows.

    Attributes:
        architecture: The description.
        matches: Whether a model is of this family. It reads attributes and never raises.
        is_pretrained: Whether the model's weights were loaded from somewhere.
        logits: Runs the model on token ids [batch, tokens], or on pixels [batch, channels, height,
            width]. It gives logits [batch, tokens, vocabulary], or those of one token.
        on_retrofit: Called by `retrofit` as its last step with (model, config), to record the
            config in the model's own. It must not touch weights.
        model_type: The `model_type` of its Hugging Face config, or "" for other libraries.
        cls: The name of the model's class, for error messages. "" takes the name of the family.
        variant: What its config has to say besides, as plain text for error messages, or "".
        depends_on: functions of the library that the model's forward looks up when it runs (which
            attention it calls, say), so that another one there is another structure.
    """

    architecture: Architecture
    matches: Callable[[nn.Module], bool]
    is_pretrained: Callable[[nn.Module], bool] = field(default=lambda model: False)
    logits: Callable[[nn.Module, Tensor], Tensor] = field(default=model_logits)
    on_retrofit: Callable[[nn.Module, Any], None] = field(default=lambda model, config: None)
    depends_on: Callable[[nn.Module], tuple[Any, ...]] = field(default=lambda model: ())
    model_type: str = ""
    cls: str = ""
    variant: str = ""


# Words in the class names of layers for which there is no rule, in whatever model they stand.
_NO_RULE = ("sparsemoe", "moeblock", "experts", "mamba")
_FAMILIES: dict[str, Family] = {}


def register_family(family: Family) -> None:
    """Make a family known to `retrofit` and `certify`.

    A family with the same name is replaced.
    """
    _FAMILIES[family.architecture.name] = family


def families() -> tuple[str, ...]:
    """The names of all families that are known now."""
    return tuple(_FAMILIES)


def family_named(name: str) -> Family:
    """The family with this name.

    A retrofitted model remembers the name, so this finds its family whatever has become of its
    class.
    """
    return _FAMILIES[name]


def has_family(model: nn.Module) -> bool:
    """Whether a module is itself a model of a known family, and not a wrapper around one."""
    return not _is_wrapper(model) and any(family.matches(model) for family in _FAMILIES.values())


def find_family(model: nn.Module) -> Family:
    """The family of `model`.

    Raises:
        UnsupportedModelError: There is none. The message says how to describe a new one.
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
    "describe it as in lip_plugin/integrations/huggingface/families.py and call "
    "lip_plugin.model.architecture.register_family"
)


def _cure(model: nn.Module, kind: str | None) -> str:
    """What is wrong with a model that has no family, and what can be done about it."""
    config = getattr(model, "config", None)
    if kind is None:
        return (
            "It is not a transformer of a known family, and there is no rule for other networks. "
            f"Known models: {_known()}. A family can only be described for transformers: layers "
            "of attention and MLP whose maps are plain Linear layers. If this is one, "
            f"{_DESCRIBE}."
        )
    same = [f for f in _FAMILIES.values() if f.model_type == kind]
    if same:
        described = "; ".join(f"{f.cls} with {f.variant}" if f.variant else f.cls for f in same)
        return (
            f"Of this model_type these are known: {described}. Retrofit the model with its "
            "language-model head or classifier (AutoModelForCausalLM, "
            "AutoModelForSequenceClassification and the like load it), before any wrapper."
        )
    if getattr(config, "is_encoder_decoder", False):
        return (
            "It is an encoder-decoder, and attention from one sequence to another has no rule "
            f"here. Use an encoder or a decoder alone: {_known()}."
        )
    towers = [
        key
        for key, value in getattr(config, "__dict__", {}).items()
        if hasattr(value, "model_type")
    ]
    if len(towers) > 1:
        return (
            f"It joins several models ({', '.join(towers)}), and there is no rule for what joins "
            f"them. Use a model with one tower: {_known()}."
        )
    return (
        f"Known: {_known()}. If it is a transformer whose maps are plain Linear layers, "
        f"{_DESCRIBE}."
    )


# Whether the module's class is that of a library which wraps models.
def _is_wrapper(model: nn.Module) -> bool:
    return type(model).__module__.partition(".")[0] in ("torch", "peft", "accelerate")


def _refuse_by_name(model: nn.Module, what: str) -> None:
    """Raise if a module inside the model tells why there is no architecture for it."""
    for name, module in list(model.named_modules())[1:]:
        cls = type(module).__name__
        if _is_wrapper(model) and any(family.matches(module) for family in _FAMILIES.values()):
            raise UnsupportedModelError(
                f"{what} wraps a {cls}. Order: retrofit the model itself, before DDP, "
                "torch.compile or get_peft_model wraps it."
            )
        if any(word in cls.lower() for word in _NO_RULE):
            raise UnsupportedModelError(
                f"{what}: {name} is {cls}. Mixture-of-experts and state-space layers have no rule "
                f"here; known are {', '.join(_FAMILIES) or 'none'}."
            )
