"""LipschitzCallback: retrofit, Muon with projection, and a logged certificate, from one line of a Trainer script.

    Trainer(model=model, args=args, train_dataset=data, callbacks=[LipschitzCallback()])

When the Trainer has been built the model is raw, on its device, and there is no optimizer yet: that
is where the callback retrofits, and points `args.optim` at LipschitzMuon. What it logs is in hf_measure.METRICS. On
several processes certificates are computed by the first one, while the others wait for its answer.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    DefaultFlowCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.training_args import ParallelMode

from lip_plugin.config import LipschitzConfig
from lip_plugin.distributed.gather import has_shards
from lip_plugin.errors import TrainerError
from lip_plugin.integrations.huggingface.arguments import (
    check_arguments,
    refuse_second,
    refuse_stack,
)
from lip_plugin.integrations.huggingface.metrics import (
    CERTIFICATE,
    certificate_or_reason,
    measured,
    probe,
)
from lip_plugin.integrations.huggingface.optimizer import OPTIM_NAME, optim_args, register_optimizer
from lip_plugin.integrations.huggingface.refusals import refuse_without_effect
from lip_plugin.integrations.peft.budget import constrain_adapters, has_budget
from lip_plugin.optim.enforce import attach_projection, keep_within_caps_
from lip_plugin.optim.muon import LipschitzMuon
from lip_plugin.surgery.plan import RetrofitReport
from lip_plugin.surgery.presets import chosen_config
from lip_plugin.surgery.retrofit import retrofit
from lip_plugin.surgery.state import find_retrofit
from lip_plugin.training.calibration import with_floors
from lip_plugin.training.schedule import RetrofitSchedule

logger = logging.getLogger(__name__)
HF_DEFAULT_LR = 5e-5  # TrainingArguments' default: means that the user chose none
DEFAULT_LR = 0.05  # RMS->RMS norm per step
ADAPTER_BUDGET = 0.1  # share of a base block's own norm


class LipschitzCallback(TrainerCallback):
    """Trains the Trainer's model under a certified Lipschitz constant.

    Args:
        config: a LipschitzConfig, or the name of a preset (`"robust"`; see LipschitzConfig.preset), which
            is fitted to the model's family. None keeps a retrofitted model's own config, or takes
            LipschitzConfig's defaults.
        optimizer: `"muon"` or `"keep"`. None chooses LipschitzMuon where the user chose no
            optimizer, and otherwise keeps theirs and projects after its steps. Adapters (peft)
            always keep the user's optimizer.
        lr: Muon's rate in RMS->RMS norm per step; None takes `args.learning_rate`, or 0.05 if
            that was left at the TrainingArguments default.
        probe_tokens: length of the two sequences that activations and entropies are seen on.
        schedule: of a pretrained model: floors rise under its norms, and its caps tighten to the config's, while it trains
            (RetrofitSchedule). Resumed by the same script from the same pretrained weights.
        calibration: batches for the floors of norms="calibrated" (see `calibrate`), where the config names none.
        adapter_budget: of LoRA: how much of the base's own norm a block may change by
            (`constrain_adapters(model, budget, relative=True)`). None leaves budgets that are there, and takes 0.1 for
            adapters on a base that was never retrofitted; on one that was, its caps hold in any case.
        **muon: further arguments of LipschitzMuon (`adamw_lr`, `embedding_lr`, `momentum`, ...).

    A certificate that cannot be had does not end a run. A warning says why, once for each reason, and its
    keys are missing from the log entry, or `certificate.json` from the checkpoint.

    The keys it logs are in `hf_measure.METRICS`. They reach the progress bar, `trainer.state.log_history` and
    TensorBoard. Other reporters (wandb, mlflow) run before a user's callback; for those add one line
    after building the Trainer: `LipschitzCallback.put_first(trainer)`.

    Raises:
        ConfigError: when it is built, an argument of another type, out of range, or that is not known.
        TrainerError: DeepSpeed, liger kernels, `model_init`, a second LipschitzCallback, or a config for a
            base that carries adapters already.
    """

    def __init__(
        self,
        config: LipschitzConfig | str | None = None,
        *,
        optimizer: str | None = None,
        lr: float | None = None,
        probe_tokens: int = 64,
        schedule: RetrofitSchedule | None = None,
        calibration: Iterable[Any] | None = None,
        adapter_budget: float | None = None,
        **muon: Any,
    ) -> None:
        check_arguments(
            config, optimizer, lr, probe_tokens, schedule, calibration, adapter_budget, muon
        )
        self.config = config
        self.optimizer = optimizer
        self.lr = lr
        self.probe_tokens = probe_tokens
        self.schedule, self.calibration, self.adapter_budget = schedule, calibration, adapter_budget
        self.muon = muon
        self._seconds_certifying = 0.0
        self._probe: torch.Tensor | None = None
        self._writer: Any = None
        self._handle: Any = None
        self._began_with_trainer = False
        self._warned: set[str] = set()

    @staticmethod
    def put_first(trainer: Any) -> None:
        """Let this callback log before every reporter, so that wandb and others get its keys."""
        callbacks = trainer.callback_handler.callbacks
        # behind Trainer's own, which says whether a step logs, evaluates and saves
        order = (DefaultFlowCallback, LipschitzCallback)
        callbacks.sort(
            key=lambda c: next(
                (i for i, kind in enumerate(order) if isinstance(c, kind)), len(order)
            )
        )

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        refuse_stack(args, model, kwargs.get("optimizer"), self.config)
        refuse_second(control, self)
        found = find_retrofit(model)
        config = chosen_config(
            self.config, model if found is None else found[0], "LipschitzCallback("
        )
        refuse_without_effect(args, model, config, self.schedule, self.calibration)
        report = self._constrain(model, config)
        self._began_with_trainer = True
        if report is not None and state.is_world_process_zero:
            logger.info("%s", report)
        if kwargs.get("optimizer") is None and self._takes_muon(args, model):
            rate = self.lr
            if rate is None:
                rate = DEFAULT_LR if args.learning_rate == HF_DEFAULT_LR else args.learning_rate
            if rate != args.learning_rate:
                logger.info("learning_rate is %g, in RMS->RMS norm per step", rate)
            args.learning_rate = rate
            options = {"momentum": 0.95, "weight_decay": args.weight_decay, **self.muon}
            args.optim_args = ",".join(
                filter(None, [optim_args(options), args.optim_args])
            )  # the user's own win
            register_optimizer()
            args.optim = OPTIM_NAME

    def _constrain(self, model: Any, config: LipschitzConfig | None) -> RetrofitReport | None:
        """What is to be held of this model from now on; None if it says so itself."""
        retrofitted = find_retrofit(model) is not None
        if hasattr(model, "peft_config") and (not retrofitted or self.adapter_budget is not None):
            if has_budget(model) and self.adapter_budget is None:
                return None
            return constrain_adapters(model, self.adapter_budget or ADAPTER_BUDGET, relative=True)
        if self.schedule is not None:
            return self.schedule.begin_(
                model, config or LipschitzConfig(norms="calibrated"), self.calibration
            )
        config = None if config is None else with_floors(model, config, self.calibration)
        return None if retrofitted and config is None else retrofit(model, config)

    def _takes_muon(self, args: TrainingArguments, model: nn.Module) -> bool:
        if self.optimizer is not None:
            return self.optimizer == "muon"
        default = type(args).__dataclass_fields__["optim"].default
        untouched = str(getattr(args.optim, "value", args.optim)) == str(
            getattr(default, "value", default)
        )
        return not hasattr(model, "peft_config") and (untouched or args.optim == OPTIM_NAME)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if find_retrofit(model) is None and not has_budget(model):
            if not self._began_with_trainer:
                raise TrainerError(
                    "This LipschitzCallback was added to a Trainer that had been built already, too late to "
                    "retrofit its model. Give it to the Trainer when it is built: Trainer(..., "
                    "callbacks=[LipschitzCallback()])."
                )
            raise TrainerError(
                "The model in training is not the one that was retrofitted: Trainer(model_init=...) builds a new one at "
                "train(). Build the model first and pass it as Trainer(model=...)."
            )
        inner = getattr(optimizer, "optimizer", optimizer)
        replicas = _replicas(args, model)
        self._follow(args, state, model, optimizer)
        keep_within_caps_(model, replicas)
        if isinstance(inner, LipschitzMuon):
            inner.process_group = replicas
        else:
            self._handle = attach_projection(inner, model, process_group=replicas)
        inner.seconds_projecting = 0.0
        self._seconds_certifying = 0.0
        if state.is_world_process_zero:
            self._probe = probe(kwargs.get("train_dataloader"), model, self.probe_tokens)
            if "tensorboard" in (args.report_to or []):
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(
                    os.environ.get("TENSORBOARD_LOGGING_DIR") or _tensorboard_dir(args)
                )

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.schedule is not None and state.global_step % self.schedule.every == 0:
            self._follow(args, state, kwargs["model"], kwargs["optimizer"])

    def _follow(
        self, args: TrainingArguments, state: TrainerState, model: Any, optimizer: Any
    ) -> None:
        if self.schedule is not None:
            follow(self.schedule, state, model, optimizer, _replicas(args, model))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if logs is None or "loss" not in logs:
            return
        began = time.perf_counter()
        values, problems = measured(kwargs["model"], self._probe)
        if not state.is_world_process_zero:
            return
        self._warn(problems)
        self._seconds_certifying += time.perf_counter() - began
        inner = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        values["lip/seconds_projecting"] = float(getattr(inner, "seconds_projecting", 0.0))
        values["lip/seconds_certifying"] = self._seconds_certifying
        logs.update(values)
        state.log_history[-1].update(values)
        if self._writer is not None:
            for key, value in values.items():
                self._writer.add_scalar(key, value, state.global_step)
            self._writer.flush()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (
            state.global_step >= state.max_steps
        ):  # before the last evaluation and the last checkpoint
            self._follow(args, state, kwargs["model"], kwargs["optimizer"])
        if control.should_save and state.is_world_process_zero:
            _make_way(_checkpoint(args, state))

    on_epoch_end = on_evaluate = on_step_end  # where Trainer decides to save, too

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write_certificate(state, kwargs["model"], _checkpoint(args, state))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        self._write_certificate(state, kwargs["model"], Path(str(args.output_dir)))

    def _write_certificate(self, state: TrainerState, model: Any, folder: Path) -> None:
        problem = certificate_or_reason(model, folder)
        if problem is not None and state.is_world_process_zero:
            self._warn([problem])

    def _warn(self, problems: list[str]) -> None:
        for problem in problems:
            if problem not in self._warned:
                logger.warning("%s", problem)
        self._warned.update(problems)


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir), f"checkpoint-{state.global_step}")


def _make_way(folder: Path) -> None:
    """A folder that an earlier run wrote: if this save is cut off, it must not pass for complete, nor its certificate stay."""
    for name in (CERTIFICATE, "trainer_state.json"):
        (folder / name).unlink(missing_ok=True)


def _replicas(args: TrainingArguments, model: nn.Module) -> Any:
    """The group of processes that hold equal copies of the model (DDP); None alone, or if it is sharded."""
    if args.parallel_mode != ParallelMode.DISTRIBUTED or has_shards(model):
        return None
    return torch.distributed.group.WORLD


def _tensorboard_dir(args: TrainingArguments) -> str:
    return getattr(args, "logging_dir", None) or os.path.join(str(args.output_dir), "runs")


def follow(
    schedule: RetrofitSchedule, state: TrainerState, model: Any, optimizer: Any, process_group: Any
) -> None:
    """Bring the model to where the schedule has it at this step: of the last multiple of `every`, so a resumed run's too."""
    if state.max_steps <= 0:
        return
    step = state.global_step
    if step < state.max_steps:
        step -= step % schedule.every
    schedule.apply_(model, optimizer, min(1.0, step / state.max_steps), process_group)
