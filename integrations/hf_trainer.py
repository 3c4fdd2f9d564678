"""LipschitzCallback: retrofit, Muon with projection, and a logged certificate, from one line of a Trainer script.

    Trainer(model=model, args=args, train_dataset=data, callbacks=[LipschitzCallback()])

When the Trainer has been built the model is raw, on its device, and there is no optimizer yet: that
is where the callback retrofits, and points `args.optim` at LipschitzMuon. What it logs is in METRICS.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers import trainer_optimizer as hf_optimizer

from lip_plugin.certificate.build import build
from lip_plugin.certificate.certify import certify
from lip_plugin.certificate.graph import Watch
from lip_plugin.certificate.nodes import attentions
from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError, TrainerError
from lip_plugin.optim.muon import LipschitzMuon
from lip_plugin.optim.projection import attach_projection, block_norms, keep_within_caps_
from lip_plugin.surgery import find_retrofit, retrofit

logger = logging.getLogger(__name__)

OPTIM_NAME = "lipschitz_muon"
HF_DEFAULT_LR = 5e-5  # TrainingArguments' default: means that the user chose none
DEFAULT_LR = 0.05  # RMS->RMS norm per step

METRICS = {
    "lip/log10_certificate": "log10 of the certificate from the weights as they are (embeddings -> logits)",
    "lip/log10_certificate_caps": "the same from the caps alone: holds for the whole run, but for biases, which have no cap",
    "lip/radius": "proven token norm of what enters the first block",
    "lip/worst_norm_over_cap": "largest proven block norm over its cap; at most 1.001",
    "lip/largest_activation": "largest absolute activation seen on two training sequences",
    "lip/attention_entropy_seen": "smallest entropy, in nats, of a full-length attention row on them",
    "lip/attention_entropy_proven": "proven lower bound of that entropy, for any input",
    "lip/seconds_projecting": "seconds spent in projections since training began (launch time only on a GPU)",
    "lip/seconds_certifying": "seconds spent in certificates and these measurements since training began",
}


class LipschitzCallback(TrainerCallback):
    """Trains the Trainer's model under a certified Lipschitz constant.

    Args:
        config: None keeps a retrofitted model's own config, or takes LipschitzConfig's defaults.
        optimizer: `"muon"` or `"keep"`. None chooses LipschitzMuon where the user chose no
            optimizer, and otherwise keeps theirs and projects after its steps. Adapters (peft)
            always keep the user's optimizer.
        lr: Muon's rate in RMS->RMS norm per step; None takes `args.learning_rate`, or 0.05 if
            that was left at the TrainingArguments default.
        probe_tokens: length of the two sequences that activations and entropies are seen on.
        **muon: further arguments of LipschitzMuon (`adamw_lr`, `embedding_lr`, `momentum`, ...).

    The keys it logs are in `METRICS`. They reach the progress bar, `trainer.state.log_history` and
    TensorBoard. Other reporters (wandb, mlflow) run before a user's callback; for those add one line
    after building the Trainer: `LipschitzCallback.put_first(trainer)`.

    Raises:
        TrainerError: DeepSpeed, liger kernels, `model_init`, or adapters on an unconstrained base.
    """

    def __init__(
        self,
        config: LipschitzConfig | None = None,
        *,
        optimizer: str | None = None,
        lr: float | None = None,
        probe_tokens: int = 64,
        **muon: Any,
    ) -> None:
        if optimizer not in (None, "muon", "keep"):
            raise ConfigError(f"LipschitzCallback(optimizer={optimizer!r}): choose 'muon', 'keep' or None.")
        self.config = config
        self.optimizer = optimizer
        self.lr = lr
        self.probe_tokens = probe_tokens
        self.muon = muon
        self._seconds_certifying = 0.0
        self._probe: torch.Tensor | None = None
        self._writer: Any = None
        self._handle: Any = None

    @staticmethod
    def put_first(trainer: Any) -> None:
        """Let this callback log before every reporter, so that wandb and others get its keys."""
        callbacks = trainer.callback_handler.callbacks
        callbacks.sort(key=lambda callback: not isinstance(callback, LipschitzCallback))

    def on_init_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        _refuse(args, model, kwargs.get("optimizer"))
        if find_retrofit(model) is None or self.config is not None:
            report = retrofit(model, self.config)
            if state.is_world_process_zero:
                logger.info("%s", report)
        if kwargs.get("optimizer") is None and self._takes_muon(args, model):
            rate = self.lr
            if rate is None:
                rate = DEFAULT_LR if args.learning_rate == HF_DEFAULT_LR else args.learning_rate
            if rate != args.learning_rate:
                logger.info("learning_rate is %g, in RMS->RMS norm per step", rate)
            args.learning_rate = rate
            options = {"momentum": 0.95, "weight_decay": args.weight_decay, **self.muon}
            # on the arguments, because the table of optimizers is global
            args._lip_muon = options  # type: ignore[attr-defined]
            _register_optimizer()
            args.optim = OPTIM_NAME

    def _takes_muon(self, args: TrainingArguments, model: nn.Module) -> bool:
        if self.optimizer is not None:
            return self.optimizer == "muon"
        default = type(args).__dataclass_fields__["optim"].default
        untouched = str(getattr(args.optim, "value", args.optim)) == str(getattr(default, "value", default))
        return not hasattr(model, "peft_config") and (untouched or args.optim == OPTIM_NAME)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if find_retrofit(model) is None:
            raise TrainerError(
                "The model in training is not the one that was retrofitted: Trainer(model_init=...) builds a new one at "
                "train(). Build the model first and pass it as Trainer(model=...)."
            )
        inner = getattr(optimizer, "optimizer", optimizer)
        keep_within_caps_(model)
        if not isinstance(inner, LipschitzMuon):
            self._handle = attach_projection(inner, model)
        inner.seconds_projecting = 0.0
        self._seconds_certifying = 0.0
        if state.is_world_process_zero:
            self._probe = _probe(kwargs.get("train_dataloader"), model, self.probe_tokens)
            if "tensorboard" in (args.report_to or []):
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(
                    os.environ.get("TENSORBOARD_LOGGING_DIR") or _tensorboard_dir(args)
                )

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        if not state.is_world_process_zero or logs is None or "loss" not in logs:
            return
        began = time.perf_counter()
        values = measure(kwargs["model"], self._probe)
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

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            folder = Path(str(args.output_dir), f"checkpoint-{state.global_step}")
            write_certificate(kwargs["model"], folder)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if state.is_world_process_zero:
            write_certificate(kwargs["model"], Path(str(args.output_dir)))


def measure(model: nn.Module, ids: torch.Tensor | None) -> dict[str, float]:
    """The values of METRICS for a model now, the two times excepted; `ids` [batch, tokens] may be None."""
    certificate, caps = certify(model), certify(model, "caps")
    values = {
        "lip/log10_certificate": certificate.log10_lipschitz,
        "lip/log10_certificate_caps": caps.log10_lipschitz,
        "lip/radius": certificate.radius,
        "lip/worst_norm_over_cap": max(b.worst_over_cap for b in block_norms(model)),
    }
    if ids is not None:
        watch, graph = Watch(), build(model)
        with torch.no_grad():
            x = graph.embed(ids, torch.float32)
            graph.body.run(x, watch)
        windows = [attention.window for _, attention in attentions(graph.body.nodes) if attention.window]
        visible = min([x.shape[1], *windows])  # of the last token: all others, or a window of them
        values["lip/largest_activation"] = watch.largest_activation
        values["lip/attention_entropy_seen"] = watch.smallest_entropy
        values["lip/attention_entropy_proven"] = certificate.smallest_entropy_lower(visible)
    return values


def write_certificate(model: nn.Module, folder: Path) -> None:
    """Write `certificate.json` of the weights as they are into `folder`, whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "certificate.json.tmp"
    temporary.write_text(certify(model).to_json())
    os.replace(temporary, folder / "certificate.json")


def _refuse(args: TrainingArguments, model: Any, optimizer: Any) -> None:
    if args.deepspeed or getattr(args, "hf_deepspeed_config", None):
        raise TrainerError(
            "DeepSpeed owns optimizer and weights, so no projection could run after its step. Use accelerate "
            "with DDP: remove deepspeed= and start with torchrun."
        )
    if args.use_liger_kernel:
        raise TrainerError(
            "Liger kernels replace the forward passes that the certificate describes. Set use_liger_kernel=False."
        )
    if hasattr(model, "peft_config") and find_retrofit(model) is None:
        raise TrainerError(
            "This model carries adapters on a base without caps. Order: retrofit(base, LipschitzConfig(...)), "
            "then get_peft_model(base, ...), then Trainer."
        )
    if optimizer is not None and find_retrofit(model) is None and _is_tied(model):
        raise TrainerError(
            "The head is tied to the embedding, and untying gives it a Parameter that your optimizer does not have: it "
            "would never train. Order: retrofit(model, LipschitzConfig(...)), then the optimizer, then Trainer."
        )


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def _register_optimizer() -> None:
    """Make `args.optim = "lipschitz_muon"` known to Trainer, through the table of its own optimizers."""
    handlers = getattr(hf_optimizer, "_OPTIMIZER_HANDLERS", None)
    if not isinstance(handlers, dict):
        raise TrainerError(
            "This transformers version keeps its optimizers elsewhere. Pass optimizer_cls_and_kwargs="
            "(MuonFactory, {'lr': 0.05}) to Trainer, with MuonFactory from lip_plugin.integrations.hf_trainer."
        )
    handlers[OPTIM_NAME] = _muon_of


def _muon_of(context: Any) -> tuple[type, dict[str, Any]]:
    return MuonFactory, {"lr": context.args.learning_rate, **getattr(context.args, "_lip_muon", {})}


class MuonFactory:
    """What Trainer calls as `MuonFactory()(model, lr=..., ...)`; gives a LipschitzMuon."""

    def __call__(self, model: nn.Module, **options: Any) -> LipschitzMuon:
        if find_retrofit(model) is None:
            raise TrainerError(
                "The model in training was not retrofitted. Trainer(model_init=...) builds a new model at train(); "
                "build it first and pass it as Trainer(model=...)."
            )
        return LipschitzMuon(model, **options)


def _tensorboard_dir(args: TrainingArguments) -> str:
    return getattr(args, "logging_dir", None) or os.path.join(str(args.output_dir), "runs")


def _probe(loader: Any, model: nn.Module, tokens: int) -> torch.Tensor | None:
    """Two sequences of the training set, cut to `tokens`; None if the data cannot be indexed."""
    try:
        dataset = loader.dataset
        batch = loader.collate_fn([dataset[i] for i in range(min(2, len(dataset)))])
        name = getattr(model, "main_input_name", "input_ids")
        ids = batch[name][:, :tokens] if name == "input_ids" else batch[name]
    except (AttributeError, TypeError, KeyError, IndexError, NotImplementedError):
        logger.info("training data cannot be indexed: activations and entropies are not measured")
        return None
    return ids.to(next(model.parameters()).device)
