"""calibrate(model, batches): the constant of every norm slot, from a few batches; own_caps(model): caps that change nothing."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.architecture import Family, find_family
from lip_plugin.blocks import ROW, whole
from lip_plugin.certificate.progress import progress
from lip_plugin.checks import norms_are_gone, refuse_shards
from lip_plugin.errors import ConfigError, NonFiniteError, UnsupportedModelError
from lip_plugin.linalg.norms import rms_to_rms_upper, row_rms_max_upper
from lip_plugin.modules import table_of
from lip_plugin.parts import Parts, parts
from lip_plugin.slots import Calibrated, NormFacts, calibrate_, norm_facts, root_mean_square
from lip_plugin.surgery import linear_layout

METHODS = ("least_squares", "least_absolute", "mean_inverse", "median")
_POOR = 0.2  # an error above it is warned of; measured: docs/LOG.md, 2026-11-26
_AT_MOST = 1 << 20  # values of one slot and batch that are kept


class Calibration(dict[str, float]):
    """The constants of all norm slots, by full name in running order; for `LipschitzConfig(norm_scales=...)`.

    Attributes:
        errors: by slot, in [0, 1]: what no constant can explain of the norm. With s the root of the mean square of what enters
            at a token, 1 - (sum s)^2 / (n sum s^2) is the least mean of (1 - c s)^2 over c: 0 where tokens are of one size, near
            1 where a few are far larger than all others.
        shares: how much of its norm each slot keeps, for `LipschitzConfig(norm_shares=...)`; slots that lose it are not in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.errors: dict[str, float] = {}
        self.shares: dict[str, float] = {}


@torch.no_grad()
def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Any]],
    *,
    method: str = "least_squares",
    sequential: bool = True,
    norm_shares: Mapping[str, float] | None = None,
    error_max: float | None = None,
) -> Calibration:
    """The constant c of every norm slot, so that c g (x - mean x) + b is near to what the norm computes on these batches.

        found = calibrate(model, batches, error_max=0.2)
        LipschitzConfig(norms="calibrated", norm_scales=found, norm_shares=found.shares)

    The model is run in eval mode and left as it was.

    Args:
        model: of a known family, with its norms; retrofitted with norms="keep" or not at all.
        batches: token ids [batch, tokens] (pixels of an image model), or dictionaries of the model's inputs, whose
            `attention_mask` says which tokens count. Gone through once for every slot if `sequential`, so keep them few.
        method: c from the roots s of the mean squares of what enters the norm. The norm's output is of size 1 at every token,
            that of the fixed map c s: `"least_squares"` is sum(s) / sum(s^2), which minimizes sum (1 - c s)^2, and
            `"least_absolute"` minimizes sum abs(1 - c s), which a few tokens of huge s do not rule; `"mean_inverse"` is the
            mean of 1/s, `"median"` its median. Measured in docs/LOG.md (2026-11-26).
        sequential: slots in running order, each behind those that are replaced already, so that it sees what it will see.
        norm_shares: how much of its norm a slot will keep, in [0, 1] by full name; 0 for those that are left out.
        error_max: slots whose error is above it keep their norms whole (they get a share of 1). None: all others go, and a
            warning names those whose error is above 0.2: without training on such a model may be destroyed.

    Raises:
        ConfigError: no batches, an unknown method or slot. NonFiniteError: a slot reads nan or inf.
        UnsupportedModelError: an unknown family or norm, or norms that are gone.
    """
    if method not in METHODS:
        raise ConfigError(f"calibrate(method={method!r}): choose one of {', '.join(map(repr, METHODS))}.")
    refuse_shards(model, "calibrate")
    family, names = _described(model)
    calibrated = any(isinstance(model.get_submodule(slot), Calibrated) for slot in names.norms())
    if calibrated or norms_are_gone(model, names):
        raise UnsupportedModelError("calibrate: the norms of this model were replaced already. Load it anew.")
    held = _checked(batches)
    slots = list(names.norms())
    given = dict(norm_shares or {})
    if unknown := sorted(set(given) - set(slots)):
        raise ConfigError(
            f"calibrate(norm_shares={{{unknown[0]!r}: ...}}): no such slot. There are: {', '.join(slots)}."
        )
    groups = [[slot] for slot in slots] if sequential else [slots]
    found = Calibration()
    with _as_it_was(model, slots), progress(len(groups) * len(held), "calibrate") as bar:
        for group in groups:
            roots = _observed(model, family, group, held, bar)
            for slot in group:
                found[slot], found.errors[slot] = _scale(slot, torch.cat(roots[slot]), method)
                share = given.get(slot, 0.0)
                if error_max is not None and found.errors[slot] > error_max:
                    share = 1.0
                if share:
                    found.shares[slot] = share
                if sequential:
                    calibrate_(model.get_submodule(slot), slot, found[slot], share)
    if error_max is None:
        _warn_of_sinks(found)
    return found


def _warn_of_sinks(found: Calibration) -> None:
    poor = {slot: error for slot, error in found.errors.items() if error > _POOR and slot not in found.shares}
    if poor:
        listed = ", ".join(f"{slot} ({error:.2f})" for slot, error in poor.items())
        warnings.warn(
            f"calibrate: at {len(poor)} of {len(found)} norms a few tokens are far larger than all others, and one constant does "
            f"not serve both: {listed}. Look at the loss right after. These norms can stay: found = calibrate(..., "
            f"error_max={_POOR}), then LipschitzConfig(..., norm_scales=found, norm_shares=found.shares).",
            stacklevel=4,
        )


def _described(model: nn.Module) -> tuple[Family, Parts]:
    family = find_family(model)
    return family, parts(model, family.architecture)


@contextmanager
def _as_it_was(model: nn.Module, slots: list[str]) -> Iterator[None]:
    """Inside in eval mode; afterwards every slot, and every mode, is what it was."""
    modes = [(m, m.training) for m in model.modules()]
    classes = [(model.get_submodule(slot), type(model.get_submodule(slot))) for slot in slots]
    model.eval()
    try:
        yield
    finally:
        for module, cls in classes:
            if type(module) is not cls:
                module.__class__ = cls
                for key in ("facts", "scale", "share"):
                    module.__dict__.pop(key, None)
        for module, mode in modes:
            module.training = mode


def _observed(
    model: nn.Module, family: Family, group: list[str], batches: list[Any], bar: Any
) -> dict[str, list[Tensor]]:
    """s of every token that counts, by slot."""
    roots: dict[str, list[Tensor]] = {slot: [] for slot in group}
    mask: list[Tensor | None] = [None]

    def watch(slot: str) -> Any:
        facts = norm_facts(model.get_submodule(slot), slot)

        def hook(module: nn.Module, args: Any) -> None:
            s = _counted(args[0].detach(), facts, mask[0])
            roots[slot].append(s[:: max(1, s.numel() // _AT_MOST)].double().cpu())

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
        if not found:
            raise UnsupportedModelError(
                f"calibrate: {slot} was not reached by a forward pass over the batches."
            )
    return roots


def _counted(x: Tensor, facts: NormFacts, mask: Tensor | None) -> Tensor:
    """s of the tokens that count, flat; heads, if x has any, stand behind the tokens or in front of them."""
    s = root_mean_square(x, facts)[..., 0]
    axes = [i for i in range(1, s.dim()) if mask is not None and s.shape[i] == mask.shape[1]]
    if mask is None or not axes or len(s) != len(mask):
        return s.flatten()
    tokens = max(axes, key=x.stride)  # where heads are as many as tokens: of one token they lie side by side
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
    """The batches, all of them: each a tensor or a dictionary, with a mask by token if any."""
    held = [batches] if isinstance(batches, (Tensor, Mapping)) else list(batches)
    if not held:
        raise ConfigError("calibrate: no batches. Give a few of what the model is trained on.")
    for batch in held:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(batch, (Tensor, Mapping)):
            raise ConfigError(
                f"calibrate: a batch is a {type(batch).__name__}. Give tensors of token ids [batch, tokens], or dictionaries "
                "of tensors as the model takes them."
            )
        if isinstance(mask, Tensor) and mask.dim() != 2:
            raise ConfigError(
                f"calibrate: attention_mask has shape {tuple(mask.shape)}, so it does not say which tokens count. Give one "
                "of shape [batch, tokens], or none."
            )
    return held


def _scale(slot: str, s: Tensor, method: str) -> tuple[float, float]:
    """(the constant, the error that the best one would leave)."""
    if not bool(torch.isfinite(s).all()):
        raise NonFiniteError(
            f"{slot} reads nan or inf on these batches. Check them, and the model's weights."
        )
    best = float(s.sum() / s.square().sum())
    error = max(0.0, 1.0 - best * float(s.mean()))
    if method == "least_squares":
        return best, error
    if method == "mean_inverse":
        return float((1.0 / s).mean()), error
    s = s.sort().values
    if method == "median":
        return float(1.0 / s[(len(s) - 1) // 2]), error
    weight = s.cumsum(0)  # the median of 1/s, each counted s times
    return float(1.0 / s[int((weight < weight[-1] / 2).sum())]), error


@torch.no_grad()
def own_caps(model: nn.Module, *, granularity: str = "head") -> dict[str, float]:
    """Caps at which a model's weights are now, by full name: `LipschitzConfig(overrides=own_caps(model))` changes no bit of them.

    Of each linear map the largest proven RMS->RMS norm of its blocks, of each table the largest RMS norm of a row. Layers of
    zeros are left out (a cap is above 0): they get w_max.

    Raises UnsupportedModelError for an unknown family.
    """
    refuse_shards(model, "own_caps")
    _, names = _described(model)
    caps = {}
    interleaved = names.architecture.attention.interleaved
    for role, name in names.linears():
        module: Any = model.get_submodule(name)
        chosen = "head" if interleaved else granularity
        layout = linear_layout(module, role, 1.0, names, chosen, interleaved=interleaved)
        sizes = [float(rms_to_rms_upper(blocks).max()) for _, blocks in layout.views(module.weight.detach())]
        caps[name] = max(sizes)
    for role, name in names.tables():
        weight = table_of(model, name).weight.detach()
        rows = whole(role, weight.numel() // weight.shape[-1], 1.0, norm=ROW).matrix(weight)
        caps[name] = math.nextafter(float(row_rms_max_upper(rows)), math.inf)
    return {name: cap for name, cap in caps.items() if cap > 0}
