"""RetrofitSchedule: bound a pretrained model step by step while it trains.

A floor is the least value that a norm divides by; at 0 it is the library's own norm. Floors rise
under the model's norms, and its caps become tighter:

    schedule = RetrofitSchedule(norms=(0.0, 0.5), caps=(0.2, 0.9))
    schedule.begin_(model, LipschitzConfig(norms="calibrated", w_max=4.0), batches)
    for step in range(steps):
        schedule.apply_(model, optimizer, step / steps)
        ...

or `LipschitzCallback(config, schedule=schedule, calibration=batches)`.

The floors and caps at a step depend only on the pretrained weights, the calibration batches and
the step. So a run is resumed by the same script, from the same weights and the same batches, with
a checkpoint loaded on top. (Do not shuffle the batches differently, or else keep the floors in the
config's norm_floors.)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn
from torch.optim import Optimizer

from lip_plugin.config import LipschitzConfig
from lip_plugin.config_values import FLOOR_MIN
from lip_plugin.distributed.owners import on_first
from lip_plugin.errors import ConfigError
from lip_plugin.face import require_module
from lip_plugin.model.architecture import find_family
from lip_plugin.model.parts import parts
from lip_plugin.surgery.caps import caps_by_name
from lip_plugin.surgery.checks import check_overrides
from lip_plugin.surgery.plan import RetrofitReport
from lip_plugin.surgery.retrofit import retrofit
from lip_plugin.surgery.state import find_retrofit, require_retrofit
from lip_plugin.training.calibration import own_caps, with_floors
from lip_plugin.training.limits import set_caps_, set_norm_floors_

_KEY = "lip_schedule"


@dataclass(frozen=True)
class _Course:
    """Where a model starts and ends: its caps at both, and the config at the end."""

    start: Mapping[str, float]
    end: Mapping[str, float]
    target: LipschitzConfig


@dataclass(frozen=True)
class RetrofitSchedule:
    """When floors rise under norms and when caps tighten, as shares of the training.

    A share is 0 at the first step of the training and 1 at its end.

    Args:
        norms: (begin, end) of the rise of the floors, from 0 (the library's norm) to the config's
            norm_floors.
        caps: (begin, end) of the tightening of the caps. They go geometrically from the norms of
            the pretrained weights to the config's w_max and overrides. A layer whose own norm is
            below its target has the target as its cap from the start.
        every: steps between two changes. LipschitzCallback keeps to it. `apply_` does not: in a
            loop of your own, call it every so many steps. Each change measures the norms of all
            blocks whose cap fell. A change of floors also makes torch.compile compile again when
            floors leave 0, and when they first move after that. That is twice in all.

    Raises:
        ConfigError: shares are out of order or outside [0, 1].
    """

    norms: tuple[float, float] = (0.0, 0.5)
    caps: tuple[float, float] = (0.0, 0.8)
    every: int = 10

    def __post_init__(self) -> None:
        for name in ("norms", "caps"):
            begin, end = getattr(self, name)
            if not 0 <= begin <= end <= 1:
                raise ConfigError(
                    f"RetrofitSchedule({name}=({begin}, {end})): 0 <= begin <= end <= 1, please."
                )
            object.__setattr__(self, name, (float(begin), float(end)))
        if self.every < 1:
            raise ConfigError(f"RetrofitSchedule(every={self.every}): at least 1 step.")

    def floors_at(self, end: Mapping[str, float], progress: float) -> dict[str, float]:
        """The floor of every slot at this share of the training, from 0 to its `end`.

        Args:
            end: the last floors by slot.
            progress: the share of the training that is done.
        """
        u = _part(self.norms, progress)
        rising = {slot: u * floor for slot, floor in end.items()}
        return {slot: floor if floor >= FLOOR_MIN else 0.0 for slot, floor in rising.items()}

    def caps_at(
        self, start: Mapping[str, float], end: Mapping[str, float], progress: float
    ) -> dict[str, float]:
        """The cap of every layer at this share of the training: start^(1-u) end^u.

        u goes from 0 to 1 over the span `caps`. Where the start is below the end, the cap is the
        end.
        """
        u = _part(self.caps, progress)
        return {
            name: cap
            if u == 1.0 or start.get(name, cap) <= cap
            else start[name] ** (1.0 - u) * cap**u
            for name, cap in end.items()
        }

    def begin_(
        self, model: nn.Module, config: LipschitzConfig, batches: Iterable[Any] | None = None
    ) -> RetrofitReport:
        """Retrofit a pretrained model to the start of the schedule, in place.

        Its floors and caps are then those at progress 0, which leave the weights as they are unless
        a span ends at 0. On several processes every one has
        to call it, and all take the floors and caps that the first one finds.

        Args:
            model: a pretrained model of a known family, not retrofitted yet.
            config: where the schedule ends: norms="calibrated", or "keep" if only caps are to move,
                with w_max and overrides. It may have norm_floors.
            batches: the floors are found on these if the config has none; see `calibrate`.

        Returns:
            The report of the retrofit.

        Raises:
            ConfigError: the config has norms="remove", there are neither floors nor batches, or the
                model was retrofitted already.
        """
        require_module(model, "RetrofitSchedule.begin_")
        if not isinstance(config, LipschitzConfig):  # a preset would remove the norms
            raise ConfigError(
                "RetrofitSchedule goes from a pretrained model to "
                f"LipschitzConfig(norms='calibrated', w_max=...), and was given {config!r:.60} "
                "instead."
            )
        if find_retrofit(model) is not None:
            raise ConfigError(
                "RetrofitSchedule: this model was retrofitted already, perhaps in an earlier part "
                "of the same run. Build it from the same pretrained weights as then, and load the "
                "checkpoint on top: trainer.train(resume_from_checkpoint=...)."
            )
        if config.norms not in ("calibrated", "keep"):
            raise ConfigError(
                "RetrofitSchedule goes to norms='calibrated' (or 'keep': only caps move), not to "
                f"{config.norms!r}."
            )
        names = parts(model, find_family(model).architecture)
        if config.norms == "calibrated" and not config.norm_floors and batches is None:
            raise ConfigError(
                "RetrofitSchedule needs batches for the floors of the norms: "
                "LipschitzCallback(..., calibration=batches), or "
                "LipschitzConfig(norm_floors=calibrate(model, batches))."
            )
        check_overrides(names, config)
        config = with_floors(model, config, batches)
        target = replace(config, init="keep")
        own = on_first(partial(own_caps, model, granularity=config.granularity))
        end = caps_by_name(names, target)
        floors = self.floors_at(target.norm_floors, 0.0)
        first = replace(target, overrides=self.caps_at(own, end, 0.0), norm_floors=floors)
        report = retrofit(model, first)
        model.__dict__[_KEY] = _Course(own, end, target)
        self.apply_(model, None, 0.0)
        return report

    def apply_(
        self,
        model: nn.Module,
        optimizer: Optimizer | None,
        progress: float,
        process_group: Any = None,
    ) -> None:
        """Bring a model to where the schedule is at `progress`, in place.

        What is above a cap is brought within it. Every process has to call it with the same
        numbers, as with `set_caps_`.

        Args:
            model: a model that `begin_` was called on.
            optimizer: the optimizer in use; see `set_caps_`.
            progress: the share of the training that is done.
            process_group: see `set_caps_`.

        Raises:
            ConfigError: `begin_` was not called on the model.
        """
        root, state = require_retrofit(model)
        course: _Course | None = root.__dict__.get(_KEY)
        if course is None:
            raise ConfigError(
                "RetrofitSchedule.apply_: call begin_(model, config, batches) on the pretrained "
                "model first."
            )
        if course.target.norms == "calibrated":
            set_norm_floors_(model, self.floors_at(course.target.norm_floors, progress))
        u = _part(self.caps, progress)
        if u == 1.0:
            wanted: dict[str, Any] = {
                "w_max": course.target.w_max,
                "overrides": course.target.overrides,
            }
        else:
            wanted = {"overrides": self.caps_at(course.start, course.end, progress)}
        now = state.config
        if any(getattr(now, key) != value for key, value in wanted.items()):
            set_caps_(model, optimizer, **wanted, process_group=process_group)


def _part(span: tuple[float, float], progress: float) -> float:
    begin, end = span
    if progress >= end:
        return 1.0
    return 0.0 if progress <= begin else (progress - begin) / (end - begin)
