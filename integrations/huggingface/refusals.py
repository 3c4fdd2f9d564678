"""Checks of LipschitzCallback's schedule and calibration batches.

They refuse what would have no effect on the run, or a harmful one.
"""

from __future__ import annotations

from typing import Any

from transformers import TrainingArguments

from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError, TrainerError
from lip_plugin.training.schedule import RetrofitSchedule


def refuse_without_effect(
    args: TrainingArguments,
    model: Any,
    config: LipschitzConfig | None,
    schedule: RetrofitSchedule | None,
    calibration: Any,
) -> None:
    """Raise for a schedule or calibration batches that would have no effect, or a wrong one.

    Args:
        args: the arguments of the Trainer.
        model: its model.
        config: the config that was chosen, or None.
        schedule: the callback's schedule, or None.
        calibration: the callback's calibration batches, or None.

    Raises:
        TrainerError: the schedule cannot work with this model or these arguments.
        ConfigError: the calibration batches would not be used.
    """
    if schedule is not None and hasattr(model, "peft_config"):
        raise TrainerError(
            "This model carries adapters, and a schedule changes the norms and weights that they "
            "were put on. Order: train the base under the schedule, then get_peft_model, then a "
            "Trainer with LipschitzCallback()."
        )
    if schedule is not None and args.load_best_model_at_end:
        raise TrainerError(
            "load_best_model_at_end would put the weights of a step with lower floors and higher "
            "caps into the model of the schedule's end. Set it to False; each checkpoint folder "
            "loads as what it was."
        )
    norms = None if config is None else config.norms
    if calibration is not None and schedule is None and norms != "calibrated":
        raise ConfigError(
            "LipschitzCallback(calibration=...) has no effect without a schedule or "
            "LipschitzConfig(norms='calibrated')."
        )
