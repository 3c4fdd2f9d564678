"""LipschitzMuon as an optimizer that the Trainer builds by its name.

The name is `args.optim = "lipschitz_muon"`. `optimizer_cls_and_kwargs` works too.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import trainer_optimizer as hf_optimizer

from lip_plugin.errors import TrainerError
from lip_plugin.integrations.peft.budget import has_budget
from lip_plugin.optim.muon import LipschitzMuon
from lip_plugin.surgery.state import find_retrofit

OPTIM_NAME = "lipschitz_muon"


def register_optimizer() -> None:
    """Make `args.optim = "lipschitz_muon"` known, in the Trainer's table of its own optimizers.

    Raises:
        TrainerError: this version of transformers has no such table.
    """
    handlers = getattr(hf_optimizer, "_OPTIMIZER_HANDLERS", None)
    if not isinstance(handlers, dict):
        raise TrainerError(
            "This transformers version keeps its optimizers elsewhere. Pass "
            "optimizer_cls_and_kwargs=(MuonFactory, {'lr': 0.05}) to Trainer, with MuonFactory "
            "from lip_plugin.integrations.huggingface.optimizer."
        )
    handlers[OPTIM_NAME] = _muon_of


def optim_args(options: dict[str, Any]) -> str:
    """Write options of LipschitzMuon as `TrainingArguments.optim_args` has them.

    An example is "momentum=0.95,betas=0.9/0.99".
    """
    written = {k: "/".join(map(repr, v)) if isinstance(v, tuple) else v for k, v in options.items()}
    return ",".join(f"{key}={value}" for key, value in written.items() if value is not None)


def _muon_of(context: Any) -> tuple[type, dict[str, Any]]:
    options = {key: _read(value) for key, value in context.optim_args.items()}
    return MuonFactory, {"lr": context.args.learning_rate, **options}


def _read(value: str) -> Any:
    """The value of an option in text: a number, several numbers, or a word."""
    try:
        numbers = [int(v) if v.lstrip("-").isdecimal() else float(v) for v in value.split("/")]
    except ValueError:
        return value
    return numbers[0] if len(numbers) == 1 else tuple(numbers)


class MuonFactory:
    """What the Trainer calls as `MuonFactory()(model, lr=..., ...)`. It gives a LipschitzMuon."""

    def __call__(self, model: nn.Module, **options: Any) -> LipschitzMuon:
        if find_retrofit(model) is None and not has_budget(model):
            raise TrainerError(
                "The model in training was not retrofitted. Trainer(model_init=...) builds a new "
                "model at train(); build it first and pass it as Trainer(model=...)."
            )
        return LipschitzMuon(model, **options)
