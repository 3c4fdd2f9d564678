"""Ways to take a pretrained model's norms, or to put floors under them."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from common import recipe
from torch import Tensor

from lip_plugin import LipschitzConfig, RetrofitSchedule, calibrate, certify, own_caps, retrofit
from lip_plugin.model.normalization import norm_facts, root_mean_square
from pretrained_tasks.tasks import Task

WAYS = (
    "as it is",
    "keep",
    "recipe",
    "dropped",
    "constant",
    "floored",
    "tightened",
    "gone",
    "last",
    "first",
    "together",
    "gone tight",
    "kept tight",
)
NAIVE = ("dropped", "constant")


class OneByOne(RetrofitSchedule):
    """One slot's floor after another's: what was tried before all floors rose together."""

    backwards = False  # from the last slot to the first

    def floors_at(self, end: Mapping[str, float], progress: float) -> dict[str, float]:
        begin, over = self.norms
        u = min(1.0, max(0.0, (progress - begin) / (over - begin))) if over > begin else 1.0
        turn = list(end)[::-1] if self.backwards else list(end)
        parts = {slot: min(1.0, max(0.0, u * len(turn) - i)) for i, slot in enumerate(turn)}
        return {slot: parts[slot] * floor for slot, floor in end.items()}


class Affine(torch.nn.Module):
    """A norm that is gone: c gain (x, centered or not) + bias, with the norm's own Parameters."""

    def __init__(self, norm: Any, c: float) -> None:
        super().__init__()
        self.weight, self.bias, self.c = norm.weight, getattr(norm, "bias", None), c
        self.center = isinstance(norm, torch.nn.LayerNorm)

    def forward(self, x: Tensor) -> Tensor:
        y = x - x.mean(-1, keepdim=True) if self.center else x
        y = y * self.c * self.weight
        return y if self.bias is None else y + self.bias


def replace_naively(
    model: Any, way: str, slots: list[str], batches: list[dict[str, Tensor]]
) -> None:
    """Put Affine where norms were, with c = 1 or with c = sum(s) / sum(s^2) over the tokens.

    s is what the norm divides by, seen behind those norms that are replaced already.
    """
    for slot in slots:
        norm, c = model.get_submodule(slot), 1.0
        if way == "constant":
            seen: list[Tensor] = []
            handle = norm.register_forward_pre_hook(
                lambda m, a, seen=seen, norm=norm: seen.append(roots(norm, a[0]))
            )
            with torch.no_grad():
                for batch in batches:
                    model(**batch)
            handle.remove()
            masks = [b["attention_mask"].bool() if "attention_mask" in b else None for b in batches]
            s = torch.cat(
                [(x if m is None else x[m]).flatten() for x, m in zip(seen, masks, strict=True)]
            )
            c = float(s.sum() / s.square().sum())
        model.set_submodule(slot, Affine(norm, c))


def roots(norm: Any, x: Tensor) -> Tensor:
    return root_mean_square(x, norm_facts(norm, "norm"))[..., 0]


def prepare(model: Any, way: str, task: Task, args: argparse.Namespace) -> RetrofitSchedule | None:
    """Retrofit a pretrained model in place.

    Returns the schedule that it follows from then on, or None.
    """
    if way == "as it is":
        return None
    own = own_caps(model)
    batches = [{k: v for k, v in b.items() if k != "labels"} for b in task.batches(4, 7)]
    tight: dict[str, Any] = (
        {"w_max": args.w_max} if way.endswith(("tight", "tightened")) else {"overrides": own}
    )
    caps = (0.1, 0.8) if "w_max" in tight else (0.0, 0.0)
    if way == "recipe":
        retrofit(model, recipe(norms="remove", init="keep", overrides=own))
    elif way == "keep" or way in NAIVE:
        slots = list(calibrate(model, batches))
        retrofit(model, LipschitzConfig(norms="keep", overrides=own))
        if way in NAIVE:
            replace_naively(model, way, slots, batches)
    elif way == "kept tight":
        schedule = RetrofitSchedule(caps=caps, every=args.every)
        schedule.begin_(model, LipschitzConfig(norms="keep", **tight))
        return schedule
    else:
        gone = way not in ("floored", "tightened")
        floors = calibrate(model, batches, quantile=1.0 if gone else args.quantile)
        rise = (0.0, 0.5) if gone and way != "gone" else (0.0, 0.0)
        kind = {"last": OneByOne, "first": OneByOne}.get(way, RetrofitSchedule)
        schedule = kind(norms=rise, caps=caps, every=args.every)
        if isinstance(schedule, OneByOne):
            object.__setattr__(schedule, "backwards", way == "last")
        schedule.begin_(model, LipschitzConfig(norms="calibrated", norm_floors=floors, **tight))
        return schedule
    return None


def proven(model: Any, way: str) -> float:
    return math.nan if way in NAIVE else certify(model).log10_lipschitz
