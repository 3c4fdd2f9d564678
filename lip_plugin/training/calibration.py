"""Measurements of a pretrained model that decide how to constrain it without changing it much.

`calibrate(model, batches)` finds the floor under every norm from a few batches. `own_caps(model)`
gives caps that the weights already keep.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.distributed.owners import on_first
from lip_plugin.errors import ConfigError, NonFiniteError, UnsupportedModelError
from lip_plugin.face import require_module
from lip_plugin.linalg.norms import rms_to_rms_upper, row_rms_max_upper
from lip_plugin.model.architecture import Family, find_family
from lip_plugin.model.heads import linear_layout
from lip_plugin.model.layers import table_of
from lip_plugin.model.layout import ROW, one_block
from lip_plugin.model.normalization import (
    Floored,
    NormFacts,
    floor_,
    norm_facts,
    root_mean_square,
)
from lip_plugin.model.parts import Parts, parts
from lip_plugin.progress import progress
from lip_plugin.surgery.checks import norms_are_gone, refuse_shards
from lip_plugin.surgery.state import find_retrofit

_AT_MOST = 1 << 20  # how many values of one slot and batch are kept


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    quantile: float = 0.05,
    sequential: bool = True,
) -> dict[str, float]:
    """Find the floor under the divisor of every norm: a quantile of the divisors on these batches.

    The result is for `LipschitzConfig(norms="calibrated", norm_floors=...)`. The model runs in eval
    mode and is left as it was. What a floor does is measured in docs/pretrained.md.

    Args:
        model: a model of a known family that has its norms. It is either not retrofitted, or
            retrofitted with norms="keep".
        batches: token ids [batch, tokens], or pixels for an image model, or dictionaries of the
            model's inputs. An `attention_mask` in a dictionary says which tokens count. If
            `sequential`, all batches are run once for every slot, so give only a few.
        quantile: a number in [0, 1]. It is taken over the tokens, of s = the root mean square of
            what enters the norm. At 0 the floor is the smallest s, and nothing changes on these
            batches. Tokens with s below the floor come out shorter by s / floor. The Lipschitz
            constant of a slot is its largest gain over its floor. At 1 the norm is affine for all
            tokens of the batches.
        sequential: calibrate the slots one after the other, as a forward pass reaches them. Each
            one then sees the outputs of those that already have floors, as it will after the
            retrofit.

    Returns:
        The floors by the slots' full names.

    Raises:
        ConfigError: there are no batches, or the quantile is out of range.
        NonFiniteError: a slot reads nan or inf.
        UnsupportedModelError: the family or a norm is unknown, or the norms were replaced already.
    """
    require_module(model, "calibrate")
    if not 0.0 <= quantile <= 1.0:
        raise ConfigError(f"calibrate(quantile={quantile!r}): a number in [0, 1], please.")
    refuse_shards(model, "calibrate")
    family, names = _described(model)
    floored = any(isinstance(model.get_submodule(slot), Floored) for slot in names.norms())
    if floored or norms_are_gone(model, names):
        raise UnsupportedModelError(
            "calibrate: the norms of this model were replaced already. Load it anew."
        )
    held = _checked(batches)
    slots = list(names.norms())
    floors: dict[str, float] = {}
    rounds = len(slots) if sequential else 1
    with _as_it_was(model, slots), progress(rounds * len(held), "calibrate") as bar:
        slots = _running_order(model, family, slots, held[0])
        for group in [[slot] for slot in slots] if sequential else [slots]:
            roots = _observed(model, family, group, held, bar)
            for slot in group:
                floors[slot] = _floor(slot, torch.cat(roots[slot]), quantile)
                if sequential:
                    floor_(model.get_submodule(slot), slot, floors[slot])
    return floors


def _described(model: nn.Module) -> tuple[Family, Parts]:
    family = find_family(model)
    return family, parts(model, family.architecture)


@contextmanager
def _as_it_was(model: nn.Module, slots: list[str]) -> Iterator[None]:
    """Run the body in eval mode; afterwards give every slot and every mode back."""
    modes = [(m, m.training) for m in model.modules()]
    classes = [(model.get_submodule(slot), type(model.get_submodule(slot))) for slot in slots]
    model.eval()
    try:
        yield
    finally:
        for module, cls in classes:
            if type(module) is not cls:
                module.__class__ = cls
                for key in ("facts", "floor"):
                    module.__dict__.pop(key, None)
        for module, mode in modes:
            module.training = mode


def _running_order(model: nn.Module, family: Family, slots: list[str], batch: Any) -> list[str]:
    """The slots in the order in which a forward pass reaches them."""
    order: dict[str, None] = {}
    handles = [
        model.get_submodule(slot).register_forward_pre_hook(
            lambda m, a, slot=slot: order.setdefault(slot)
        )
        for slot in slots
    ]
    try:
        _run(model, family, batch, [None])
    finally:
        for handle in handles:
            handle.remove()
    if missing := [slot for slot in slots if slot not in order]:
        raise UnsupportedModelError(
            f"calibrate: {missing[0]} was not reached by a forward pass over the batches."
        )
    return list(order)


def _observed(
    model: nn.Module, family: Family, group: list[str], batches: list[Any], bar: Any
) -> dict[str, list[Tensor]]:
    """s of every token that counts, by slot."""
    roots: dict[str, list[Tensor]] = {slot: [] for slot in group}
    mask: list[Tensor | None] = [None]

    def watch(slot: str) -> Any:
        facts = norm_facts(model.get_submodule(slot), slot)

        def hook(module: nn.Module, args: Any) -> None:
            roots[slot].append(_few(_counted(args[0].detach(), facts, mask[0])).double().cpu())

        return model.get_submodule(slot).register_forward_pre_hook(hook)

    handles = [watch(slot) for slot in group]
    try:
        for batch in batches:
            _run(model, family, batch, mask)
            bar.update()
    finally:
        for handle in handles:
            handle.remove()
    for slot, found in roots.items():
        if not sum(map(len, found)):
            raise ConfigError(
                f"calibrate: at {slot} no token of the batches counts. Look at their "
                "attention_mask."
            )
    return roots


def _few(s: Tensor) -> Tensor:
    """At most _AT_MOST of the values: a random choice, and the smallest one.

    The choice is random because heads lie in a regular pattern, of which a stride could miss some.
    """
    if len(s) <= _AT_MOST:
        return s
    generator = torch.Generator(s.device).manual_seed(0)
    at = torch.randint(len(s), (_AT_MOST - 1,), generator=generator, device=s.device)
    return torch.cat([s.min()[None], s[at]])


def _counted(x: Tensor, facts: NormFacts, mask: Tensor | None) -> Tensor:
    """s of the tokens that count, flat. An axis of heads may lie before or behind the tokens."""
    s = root_mean_square(x, facts)[..., 0]
    # OPT flattens its tokens in front of some norms.
    if mask is not None and s.shape == (mask.numel(),):
        return s[mask.flatten().bool()]
    axes = [i for i in range(1, s.dim()) if mask is not None and s.shape[i] == mask.shape[1]]
    if mask is None or not axes or len(s) != len(mask):
        return s.flatten()
    # There may be as many heads as tokens. The heads of one token lie side by side in memory, so
    # the axis of the tokens has the larger stride.
    tokens = max(axes, key=x.stride)
    return s.movedim(tokens, 1)[mask.bool()].flatten()


def _run(model: nn.Module, family: Family, batch: Any, mask: list[Tensor | None]) -> None:
    device = next(model.parameters()).device
    mask[0] = None
    if isinstance(batch, Tensor):
        family.logits(model, batch.to(device))
        return
    inputs = {k: v.to(device) for k, v in batch.items() if isinstance(v, Tensor) and k != "labels"}
    mask[0] = inputs.get("attention_mask")
    model(**inputs)


def _checked(batches: Any) -> list[Any]:
    """The batches as a list. Raises ConfigError unless each is a tensor or a dictionary."""
    listed = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
    if not listed or isinstance(batches, (str, bytes, type)):
        raise ConfigError(
            f"calibrate(model, batches): the batches are of type {type(batches).__name__}. Give a "
            "list of tensors of token ids [batch, tokens], or of dictionaries of the model's "
            "inputs."
        )
    held = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    if not held:
        raise ConfigError("calibrate: no batches. Give a few of what the model is trained on.")
    for batch in held:
        inputs = list(batch.values()) if isinstance(batch, Mapping) else [batch]
        if any(isinstance(v, Tensor) and not v.numel() for v in inputs):
            raise ConfigError("calibrate: a batch is empty.")
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(batch, (Tensor, Mapping)):
            raise ConfigError(
                f"calibrate: a batch is a {type(batch).__name__}. Give tensors of token ids "
                "[batch, tokens], or dictionaries of tensors as the model takes them."
            )
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise ConfigError(
                f"calibrate: attention_mask has shape {tuple(mask.shape)}, so it does not say "
                "which tokens count. Give one of shape [batch, tokens], or none."
            )
    return held


def _floor(slot: str, s: Tensor, quantile: float) -> float:
    """The value of rank floor(q (n - 1)) in s.

    torch.quantile is not used because it takes at most 2^24 values.
    """
    if not bool(torch.isfinite(s).all()):
        raise NonFiniteError(
            f"{slot} reads nan or inf on these batches. Check them, and the model's weights."
        )
    return float(s.sort().values[int(quantile * (len(s) - 1))])


@torch.no_grad()
def own_caps(model: nn.Module, *, granularity: str = "head") -> dict[str, float]:
    """Find the caps that a model's weights keep as they are now.

    A retrofit with `LipschitzConfig(overrides=own_caps(model))` changes no bit of the weights. The
    cap of a linear map is the largest proven RMS->RMS norm of its blocks. The cap of a table is the
    largest RMS norm of a row. Layers of zeros are left out, because a cap is above 0; they get
    w_max.

    Args:
        model: a model of a known family.
        granularity: as in LipschitzConfig.

    Returns:
        The caps by the layers' full names.

    Raises:
        UnsupportedModelError: the family is unknown, or the model is sharded.
    """
    require_module(model, "own_caps")
    refuse_shards(model, "own_caps")
    _, names = _described(model)
    caps = {}
    interleaved = names.architecture.attention.interleaved
    for role, name in names.linears():
        module: Any = model.get_submodule(name)
        chosen = "head" if interleaved else granularity
        layout = linear_layout(module, role, 1.0, names, chosen, interleaved=interleaved)
        sizes = [
            float(rms_to_rms_upper(blocks).max())
            for _, blocks in layout.views(module.weight.detach())
        ]
        caps[name] = max(sizes)
    for role, name in names.tables():
        weight = table_of(model, name).weight.detach()
        rows = one_block(role, weight.numel() // weight.shape[-1], 1.0, norm=ROW).matrix(weight)
        caps[name] = math.nextafter(float(row_rms_max_upper(rows)), math.inf)
    return {name: cap for name, cap in caps.items() if cap > 0}


def with_floors(
    model: nn.Module, config: LipschitzConfig, batches: Iterable[Any] | None
) -> LipschitzConfig:
    """Give the config with its floors found on `batches`, if it needs floors and has none.

    A model that has floors already keeps them. All processes get the floors that the first one
    finds.
    """
    if config.norms != "calibrated" or config.norm_floors or batches is None:
        return config
    found = find_retrofit(model)
    if found is not None and found[1].config.norm_floors:
        return replace(config, norm_floors=found[1].config.norm_floors)
    return replace(config, norm_floors=on_first(partial(calibrate, model, batches)))
