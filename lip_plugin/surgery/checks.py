"""Everything that can be wrong with a model, checked before a retrofit changes it.

Open this file to see which models are refused, and why. Every message names the part that is at
fault and says what to do about it.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.distributed.owners import is_sharded
from lip_plugin.errors import ConfigError, NonFiniteError, TiedWeightsError, UnsupportedModelError
from lip_plugin.face import did_you_mean
from lip_plugin.model.activations import activation_kind
from lip_plugin.model.layers import RowParameter, is_embedding, is_linear, is_patches, table_of
from lip_plugin.model.normalization import Floored, norm_facts, refuse_own_forward
from lip_plugin.model.pairs import PairAbs
from lip_plugin.model.parts import Parts, refuse_undescribed
from lip_plugin.model.scales import ConstantScale
from lip_plugin.surgery.automatic import resolved, why_no_position_bias
from lip_plugin.surgery.depth import check_depth

_ADAPTERS = (
    "To train adapters on a quantized base (4-bit ones work), leave retrofit out: put LoRA on it "
    "with get_peft_model, and constrain_adapters(model, budget=0.1, relative=True) holds what they "
    "change."
)


def check_model(
    model: nn.Module,
    names: Parts,
    config: LipschitzConfig,
    *,
    pretrained: bool,
    loading: bool = False,
) -> None:
    """Refuse a model that a retrofit with this config could not constrain soundly.

    Args:
        model: the model, of the family that `names` describes.
        names: its parts.
        config: the config that the user chose.
        pretrained: whether the weights were loaded from somewhere.
        loading: whether the model is a skeleton whose weights come next (from_pretrained). Values
            and devices are then not looked at, and the choice of norms was made when it was saved.

    Raises:
        UnsupportedModelError: a part has no rule, or its weights are sharded, quantized or on the
            meta device.
        TiedWeightsError: one Parameter would need several caps.
        NonFiniteError: a weight is nan or inf.
        ConfigError: the config does not fit the model.
    """
    refuse_shards(model, "retrofit")
    if not loading:
        _check_values(model)
        _check_norms_choice(model, names, config, pretrained)
    if not names.layers:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layers at {names.architecture.layers}: there is "
            "nothing to constrain between its embeddings and its head. Build it with at least one."
        )
    _check_leaves(model, names)
    _check_ties(model, names, config)
    refuse_undescribed(model, names)
    check_overrides(names, config)
    if config.norms == "calibrated":
        _check_slots(model, names, config)
    if config.recipe:
        _check_recipe(model, names)
        _check_options(model, names, resolved(config, model, names))


def refuse_shards(model: nn.Module, what: str) -> None:
    """Raise UnsupportedModelError if a parameter is sharded (a DTensor).

    The values of such a parameter are on several processes, and FSDP keeps its own record of the
    modules.

    Args:
        model: the model.
        what: name of the function that was called, for the message.
    """
    for name, p in model.named_parameters():
        if is_sharded(p):
            raise UnsupportedModelError(
                f"{name} is sharded already. Order: {what}(model), then fully_shard(model). A "
                "saved retrofitted model can be loaded sharded: from_pretrained(folder, "
                "distributed_config=...)."
            )


def norms_are_gone(model: nn.Module, names: Parts) -> bool:
    """Whether an earlier retrofit put constants into the norm slots."""
    return any(isinstance(model.get_submodule(name), ConstantScale) for name in names.norms())


def _check_recipe(model: nn.Module, names: Parts) -> None:
    """Check what removing the norms needs: known activations, and a place for every constant."""
    for name in names.activations():
        act = model.get_submodule(name)
        if not isinstance(act, PairAbs) and activation_kind(act) is None:
            raise UnsupportedModelError(
                f"{name} is {act}: no proven slope is known for it. Use gelu, gelu_new, silu, relu "
                "or tanh, or keep the norms (norms='keep') if you need no certificate."
            )
    branches = [branch for layer in names.layers for branch in layer.branches]
    scaled = [model.get_submodule(branch.scale) for branch in branches]
    if len(set(map(id, scaled))) < len(scaled):
        raise UnsupportedModelError(
            f"{branches[0].scale} and another layer's are one module: each branch needs a scale of "
            "its own. Give every layer its own module."
        )
    telescoped = not any(branch.sum_norm for branch in branches)
    if telescoped and not names.architecture.final_norm:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no norm behind its last block, so there is no slot for "
            "the last constant of the residual. Build it with its final norm, or keep the norms "
            "(norms='keep')."
        )


def _check_options(model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    """Raise one error that names all options for which the family has no place."""
    unfit = dict(_without_place(model, names, config))
    if unfit:
        raise ConfigError(
            f"{type(model).__name__} has no place for {' and '.join(unfit)}. "
            f"{' '.join(unfit.values())} The "
            "name of a preset leaves out by itself what a family has no place for: retrofit(model, "
            '"robust").'
        )
    check_depth(names, config)


def _without_place(
    model: nn.Module, names: Parts, config: LipschitzConfig
) -> Iterator[tuple[str, str]]:
    """Yield (field, why, and what to do) for every field that has no place in the model."""
    architecture = names.architecture
    if config.logit_scale not in (None, 1) and not architecture.final_norm:
        yield (
            "logit_scale",
            "There is no norm slot behind its last block, where logit_scale would go: leave it "
            f"out, and give the head a cap of its own instead, overrides={{{names.head!r}: ...}}.",
        )
    pairs = config.activation is not None or any(
        isinstance(model.get_submodule(name), PairAbs) for name in names.activations()
    )
    if config.gate_max is not None and names.gated and pairs:
        yield (
            "gate_max",
            "gate_max limits the factors of a product, and activation='abs' leaves no product: "
            "leave gate_max out, or say activation=None to keep the product.",
        )
    if isinstance(config.residual, tuple) and architecture.parallel:
        yield (
            "two residual weights",
            "It runs attention and MLP in parallel, so they share one step: give residual one "
            f"number, residual={min(config.residual)!r}.",
        )
    if config.position_bias is None:
        return
    # Attention by position alone needs the biases, so the advice is to leave out both.
    out = "leave position_bias out" + (
        f" and attention_scale={config.attention_scale} with it"
        if config.some_by_position_alone
        else ""
    )
    why = why_no_position_bias(model, names)
    if why is not None and architecture.patches:
        yield "position_bias", f"{why}: {out}."
    elif why is not None:
        yield (
            "position_bias",
            f'{why}: build or load it with attn_implementation="sdpa", or {out} if transformers '
            "does not let it.",
        )


def _check_values(model: nn.Module) -> None:
    for name, p in model.named_parameters():
        if p.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device and has no values. Load the model first (without "
                "device_map or init_empty_weights), then retrofit it."
            )
        if not p.is_floating_point():
            raise UnsupportedModelError(
                f"{name} has dtype {p.dtype}: a quantized weight has no norm that training could "
                f"keep. Load the model unquantized. {_ADAPTERS}"
            )
        if not torch.isfinite(p.detach()).all():
            raise NonFiniteError(
                f"{name} holds nan or inf. Load a sound checkpoint before retrofitting."
            )


def _check_norms_choice(
    model: nn.Module, names: Parts, config: LipschitzConfig, pretrained: bool
) -> None:
    removed = norms_are_gone(model, names)
    if removed and not config.recipe:
        raise ConfigError(
            f"The norms of this {type(model).__name__} are gone: an earlier retrofit removed them, "
            "and its weights were trained without. Use norms='remove', or build the model anew."
        )
    if config.norms == "keep" and any(
        isinstance(model.get_submodule(n), Floored) for n in names.norms()
    ):
        raise ConfigError(
            f"The norms of this {type(model).__name__} got floors by an earlier retrofit. Use "
            "norms='calibrated' with norm_floors of 0 to have them back."
        )
    if pretrained and config.norms is None and not removed:
        raise ConfigError(
            f"{type(model).__name__} was loaded from pretrained weights, and a trained model is a "
            "function of its norms: removing them destroys what it learned. Say which you want: "
            "LipschitzConfig(norms='keep') caps the weights only, norms='calibrated' puts a floor "
            "under what every norm divides by, LipschitzConfig(norms='remove') removes the norms "
            "all the same; add init='orthogonal' to train from scratch."
        )


def _check_slots(model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    """Check that norm_floors gives a floor for every norm slot, and for nothing else."""
    slots = list(names.norms())
    if not config.norm_floors:
        raise ConfigError(
            "norms='calibrated' needs the floor of every norm slot: "
            "LipschitzConfig(norms='calibrated', norm_floors=calibrate(model, batches)), with a "
            "few batches of what the model is trained on."
        )
    missing, extra = set(slots) - set(config.norm_floors), set(config.norm_floors) - set(slots)
    if missing or extra:
        what = (
            f"norm_floors lacks {min(missing)!r}"
            if missing
            else f"norm_floors names {min(extra)!r}, which is no norm slot"
        )
        raise ConfigError(f"{what} of this {type(model).__name__}. Its slots: {', '.join(slots)}.")
    for name in slots:
        norm_facts(model.get_submodule(name), name)
        refuse_own_forward(model.get_submodule(name), name)


def _check_leaves(model: nn.Module, names: Parts) -> None:
    for role, name in names.linears():
        module = model.get_submodule(name)
        if hasattr(module, "base_layer"):
            raise UnsupportedModelError(
                f"{name} is wrapped by an adapter already. Order: retrofit(model), then "
                "get_peft_model(model, ...)."
            )
        if role == "patch" and not is_patches(module):
            raise UnsupportedModelError(
                f"{name} is {module}, not a plain Conv2d whose stride is its kernel: patches that "
                "overlap or are padded have no rule here."
            )
        if role != "patch" and not is_linear(module):
            raise UnsupportedModelError(
                f"{name} is {type(module).__module__}.{type(module).__name__}, not a plain Linear "
                "or Conv1D: load the model unquantized and without mixture-of-experts layers. "
                f"{_ADAPTERS}"
            )
    for _, name in names.tables():
        table = table_of(model, name)
        if isinstance(table, RowParameter):
            continue
        cls = type(table)
        # A subclass may scale what it looks up, so only known classes pass.
        if not is_embedding(table):
            raise UnsupportedModelError(
                f"{name} is {cls.__module__}.{cls.__name__}, not a plain nn.Embedding; its rows "
                "cannot be bounded."
            )
        if getattr(table, "max_norm", None) is not None:
            raise UnsupportedModelError(
                f"{name} renormalizes itself at lookup (max_norm); set max_norm=None."
            )


def _check_ties(model: nn.Module, names: Parts, config: LipschitzConfig) -> None:
    owners: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        if name not in names.architecture.unused:
            owners.setdefault(id(p), []).append(name)
    for tied in owners.values():
        if len(tied) == 1:
            continue
        if sorted(tied) != sorted([f"{names.architecture.tokens}.weight", f"{names.head}.weight"]):
            raise TiedWeightsError(
                f"{' and '.join(tied)} are one Parameter: its blocks would need several caps at "
                "once. Untie them first."
            )
        if not config.untie_head:
            raise TiedWeightsError(
                f"{' and '.join(tied)} are tied, but a table of rows and a matrix have different "
                "constraints. Use LipschitzConfig(untie_head=True)."
            )


def check_overrides(names: Parts, config: LipschitzConfig) -> None:
    """Raise ConfigError for an override that matches no layer."""
    known = [name for _, name in (*names.linears(), *names.tables())]
    for key in config.overrides:
        if not any(name == key or name.endswith("." + key) for name in known):
            leaves = {".".join(name.split(".")[-n:]) for name in known for n in (1, 2, 3)}
            hint = did_you_mean(key, [*known, *sorted(leaves)])
            raise ConfigError(
                f"overrides[{key!r}] matches no layer.{hint} Layers are named like: "
                f"{', '.join(known[:4])}."
            )
