"""LipschitzCallback: the whole of lip_plugin from one line of a Trainer script.

    Trainer(model=model, args=args, train_dataset=data, callbacks=[LipschitzCallback()])

When the Trainer has been built, the model is raw and on its device, and there is no optimizer yet.
At that moment the callback retrofits the model and points `args.optim` at LipschitzMuon, which
projects after every step. During training it logs certificates; the keys are explained in
lip_plugin.integrations.huggingface.metrics.METRICS. On several processes the first one computes
certificates, while the others wait for its answer.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
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
from lip_plugin.integrations.huggingface.entries import Entries
from lip_plugin.integrations.huggingface.metrics import (
    CERTIFICATE,
    probe,
)
from lip_plugin.integrations.huggingface.optimizer import OPTIM_NAME, optim_args, register_optimizer
from lip_plugin.integrations.huggingface.order import handler_above, put_first
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
HF_DEFAULT_LR = 5e-5  # the default of TrainingArguments, so the user has chosen no rate
DEFAULT_LR = 0.05  # RMS->RMS norm per step
ADAPTER_BUDGET = 0.1  # share of a base block's own norm


class LipschitzCallback(TrainerCallback):
    """Trains the Trainer's model under a certified Lipschitz constant.

    Args:
        config: a LipschitzConfig, or the name of a preset (`"robust"`; see LipschitzConfig.preset),
            which is fitted to the model's family. None keeps a retrofitted model's own config, or
            takes the defaults of LipschitzConfig.
        optimizer: `"muon"` or `"keep"`. None chooses LipschitzMuon where the user chose no
            optimizer, and otherwise keeps the user's and projects after its steps. With adapters
            (peft) None always keeps the user's optimizer.
        lr: Muon's rate in RMS->RMS norm per step. None takes `args.learning_rate`, or 0.05 if that
            has the default of TrainingArguments.
        probe_tokens: length of the two sequences on which activations and entropies are measured.
        schedule: a RetrofitSchedule for a pretrained model: while it trains, floors rise under its
            norms and its caps tighten to those of the config. A run with a schedule is resumed by
            the same script from the same pretrained weights.
        calibration: batches for the floors of norms="calibrated" (see `calibrate`), needed if the
            config has no floors.
        adapter_budget: for LoRA, how much a block may change, as a share of the norm of its base
            (`constrain_adapters(model, budget, relative=True)`). None leaves present budgets as
            they are, and sets 0.1 for adapters on a base that was never retrofitted. A retrofitted
            base has caps, which hold in any case.
        certify_share: the share of the run's time that entries of the log may take, and three
            seconds besides. A certificate of a large model is then not in every entry; it is always
            written at a save and at the end. 1 puts everything into every entry.
        **muon: further arguments of LipschitzMuon (`adamw_lr`, `embedding_lr`, `momentum`, ...).

    If a certificate cannot be given, the run goes on. A warning says why, once for each reason. The
    keys are then missing from the log entry, or `certificate.json` from the checkpoint.

    The logged keys are those of metrics.METRICS. They reach `trainer.state.log_history` and every
    reporter (TensorBoard, wandb, mlflow and others): when the Trainer has been built, the callback
    moves in front of them. The progress bar shows the bound, and leaves the other keys to the
    reporters.

    Raises:
        ConfigError: when the callback is built, an argument is unknown, out of range, or of the
            wrong type.
        TrainerError: the run uses DeepSpeed, liger kernels, `model_init` or a second
            LipschitzCallback, or a config was given for a base that carries adapters already.
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
        certify_share: float = 0.01,
        **muon: Any,
    ) -> None:
        check_arguments(
            config,
            optimizer,
            lr,
            probe_tokens,
            schedule,
            calibration,
            adapter_budget,
            certify_share,
            muon,
        )
        self.config = config
        self.optimizer = optimizer
        self.lr = lr
        self.probe_tokens = probe_tokens
        self.schedule, self.calibration, self.adapter_budget = schedule, calibration, adapter_budget
        self.muon = muon
        self._entries = Entries(certify_share)
        self._handle: Any = None
        self._began_with_trainer = False
        self._warned: set[str] = set()

    @staticmethod
    def put_first(trainer: Any) -> None:
        """Let this callback log before every reporter, so that wandb and others get its keys.

        A callback that the Trainer is built with does so by itself. One that was added later needs
        this call.
        """
        put_first(trainer.callback_handler, LipschitzCallback)

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        handler = handler_above()
        if handler is not None:
            put_first(handler, LipschitzCallback)
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
            # The user's own come last, because later ones win.
            args.optim_args = ",".join(filter(None, [optim_args(options), args.optim_args]))
            register_optimizer()
            args.optim = OPTIM_NAME

    def _constrain(self, model: Any, config: LipschitzConfig | None) -> RetrofitReport | None:
        """Put limits on the model. Returns a report, or None if its present limits stay."""
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
                    "This LipschitzCallback was added to a Trainer that had been built already, "
                    "too late to retrofit its model. Give it to the Trainer when it is built: "
                    "Trainer(..., callbacks=[LipschitzCallback()])."
                )
            raise TrainerError(
                "The model in training is not the one that was retrofitted: "
                "Trainer(model_init=...) builds a new one at train(). Build the model first and "
                "pass it as Trainer(model=...)."
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
        ids = None
        if state.is_world_process_zero:
            ids = probe(kwargs.get("train_dataloader"), model, self.probe_tokens)
        self._entries.begin(model, ids, state.global_step)

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
        inner = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        projecting = float(getattr(inner, "seconds_projecting", 0.0))
        found = self._entries.entry(kwargs["model"], state.global_step, projecting)
        if not state.is_world_process_zero:
            return
        self._warn(found.problems)
        logs.update(found.values)
        state.log_history[-1].update(found.values)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # The schedule has to end before the last evaluation and the last checkpoint.
        if state.global_step >= state.max_steps:
            self._follow(args, state, kwargs["model"], kwargs["optimizer"])
        if control.should_save and state.is_world_process_zero:
            _make_way(_checkpoint(args, state))

    on_epoch_end = on_evaluate = on_step_end  # the Trainer may decide to save there, too

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
        self._write_certificate(state, kwargs["model"], Path(str(args.output_dir)))

    def _write_certificate(self, state: TrainerState, model: Any, folder: Path) -> None:
        problem = self._entries.write(model, folder)
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
    """Remove the marks of completeness from a folder that an earlier run wrote.

    If this save is cut off, the folder must not pass for complete, nor keep its old certificate.
    """
    for name in (CERTIFICATE, "trainer_state.json"):
        (folder / name).unlink(missing_ok=True)


def _replicas(args: TrainingArguments, model: nn.Module) -> Any:
    """The process group that holds equal copies of the model (DDP), or None.

    It is None for a single process, and for a sharded model.
    """
    if args.parallel_mode != ParallelMode.DISTRIBUTED or has_shards(model):
        return None
    return torch.distributed.group.WORLD


def follow(
    schedule: RetrofitSchedule, state: TrainerState, model: Any, optimizer: Any, process_group: Any
) -> None:
    """Bring the model to where the schedule has it at the present step.

    A schedule changes the model at multiples of `every` only. So the last multiple counts, which
    also brings a resumed run to where it was.
    """
    if state.max_steps <= 0:
        return
    step = state.global_step
    if step < state.max_steps:
        step -= step % schedule.every
    schedule.apply_(model, optimizer, min(1.0, step / state.max_steps), process_group)
