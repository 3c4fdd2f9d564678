"""Checks of the arguments of LipschitzCallback, and of the Trainer around it.

What cannot work is refused before anything is changed, with a message that says what to do.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from numbers import Integral, Real
from typing import Any

import torch
from torch import nn
from transformers import TrainingArguments

from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError, TrainerError
from lip_plugin.face import did_you_mean
from lip_plugin.optim.muon import LipschitzMuon
from lip_plugin.surgery.presets import check_config
from lip_plugin.surgery.state import find_retrofit
from lip_plugin.training.schedule import RetrofitSchedule

# The arguments of LipschitzMuon, without those that the callback or the Trainer chooses.
MUON = tuple(
    name
    for name in inspect.signature(LipschitzMuon.__init__).parameters
    if name not in ("self", "params", "lr", "process_group")
)
_FIELDS = tuple(f.name for f in dataclasses.fields(LipschitzConfig))


def check_arguments(
    config: Any,
    optimizer: Any,
    lr: Any,
    probe_tokens: Any,
    schedule: Any,
    calibration: Any,
    adapter_budget: Any,
    certify_share: Any,
    muon: Mapping[str, Any],
) -> None:
    """Raise ConfigError for the first argument of LipschitzCallback that it cannot take.

    The arguments are those of LipschitzCallback; `muon` holds the ones for LipschitzMuon.
    """
    check_config(config, "LipschitzCallback(")
    if isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(
            "LipschitzCallback(optimizer=...) takes 'muon', 'keep' or None. An optimizer of your "
            "own goes to the Trainer, Trainer(..., optimizers=(optimizer, None)), and is then kept."
        )
    if not (optimizer is None or (isinstance(optimizer, str) and optimizer in ("muon", "keep"))):
        raise ConfigError(
            f"LipschitzCallback(optimizer={optimizer!r}): choose 'muon', 'keep' or None."
        )
    for name, value in {"lr": lr, "adapter_budget": adapter_budget}.items():
        if value is not None and not _positive(value):
            raise ConfigError(
                f"LipschitzCallback({name}={value!r}): must be a finite number above 0, or None."
            )
    if not (_number(certify_share) and 0 <= certify_share <= 1):
        raise ConfigError(
            f"LipschitzCallback(certify_share={certify_share!r}): must be a number from 0 to 1, "
            "the share of the run's time that entries of the log may take."
        )
    if not _count(probe_tokens):
        raise ConfigError(
            f"LipschitzCallback(probe_tokens={probe_tokens!r}): must be a whole number above 0."
        )
    if schedule is not None and not isinstance(schedule, RetrofitSchedule):
        raise ConfigError(
            f"LipschitzCallback(schedule={_shown(schedule)}): pass a RetrofitSchedule, as "
            "RetrofitSchedule() makes one. A scheduler of learning rates goes to the Trainer."
        )
    if calibration is not None and not _batches(calibration):
        raise ConfigError(
            f"LipschitzCallback(calibration={_shown(calibration)}): pass a few batches, each a "
            "tensor of token ids [batch, tokens] or a dictionary of the model's inputs."
        )
    _check_muon(config, muon)


def _check_muon(config: Any, muon: Mapping[str, Any]) -> None:
    """Check the names and then the values of what is passed on to LipschitzMuon."""
    for name, value in muon.items():
        if name in _FIELDS:
            made = f"LipschitzConfig({name}={_shown(value)})"
            if isinstance(config, str):
                made = f"LipschitzConfig.preset({config!r}, {name}={_shown(value)})"
            raise ConfigError(f"{name} is a field of LipschitzConfig: LipschitzCallback({made}).")
        if name not in MUON:
            known = [
                n
                for n in inspect.signature(_callback().__init__).parameters
                if n not in ("self", "muon")
            ]
            hint = did_you_mean(name, [*known, *MUON, *_FIELDS])
            raise ConfigError(
                f"LipschitzCallback has no argument {name!r}.{hint} It takes {', '.join(known)}, "
                f"and of LipschitzMuon {', '.join(MUON)}."
            )
        right, words = _MORE.get(name, (None, ""))
        if right is not None and not right(value):
            raise ConfigError(f"LipschitzCallback({name}={_shown(value)}): must be {words}.")
        _try_muon(name, value)


def _try_muon(name: str, value: Any) -> None:
    """Let LipschitzMuon itself check a value, by building one on a parameter that nobody uses."""
    group = {"params": [nn.Parameter(torch.zeros(1))], "kind": "adamw"}
    try:
        LipschitzMuon([group], **{name: value})
    except ConfigError as error:
        raise ConfigError(f"LipschitzCallback({name}={_shown(value)}): {error}") from None
    except (TypeError, ValueError, AttributeError) as error:
        raise ConfigError(
            f"LipschitzCallback({name}={_shown(value)}): LipschitzMuon cannot take this value "
            f"({error})."
        ) from error


def refuse_stack(args: TrainingArguments, model: Any, optimizer: Any, config: Any) -> None:
    """Raise TrainerError for a training stack under which the caps could not hold.

    Nothing is changed.
    """
    if args.deepspeed or getattr(args, "hf_deepspeed_config", None):
        raise TrainerError(
            "DeepSpeed owns optimizer and weights, so no projection could run after its step. Use "
            "accelerate with DDP: remove deepspeed= and start with torchrun."
        )
    plugin = getattr(args, "fsdp_plugin_args", None) or {}
    if args.fsdp and int(plugin.get("fsdp_version", 2)) != 2:
        raise TrainerError(
            "FSDP1 flattens weights, and a matrix in pieces has no norm. Use FSDP2, by "
            "fsdp_config={'version': 2} or integrations/accelerate/fsdp2_8.yaml."
        )
    if args.use_liger_kernel:
        raise TrainerError(
            "Liger kernels replace the forward passes that the certificate describes. Set "
            "use_liger_kernel=False."
        )
    if hasattr(model, "peft_config") and find_retrofit(model) is None and config is not None:
        raise TrainerError(
            "This model carries adapters on a base without caps, so a config comes too late. "
            "Order: retrofit(base, LipschitzConfig(...)), then get_peft_model(base, ...), then "
            "Trainer. Or leave the config out: the adapters' change is then bounded "
            "(adapter_budget)."
        )
    if optimizer is not None and find_retrofit(model) is None and _is_tied(model):
        raise TrainerError(
            "The head is tied to the embedding, and untying gives it a Parameter that your "
            "optimizer does not have, so it would never train. Order: retrofit(model, "
            "LipschitzConfig(...)), then the optimizer, then Trainer."
        )


def _is_tied(model: Any) -> bool:
    head = model.get_output_embeddings()
    return head is not None and head.weight is model.get_input_embeddings().weight


def refuse_second(control: Any, callback: Any) -> None:
    """Raise TrainerError if the Trainer with this control already has another LipschitzCallback."""
    first = getattr(control, "_lip_callback", None)
    if first is not None and first is not callback:
        raise TrainerError(
            "This Trainer has a LipschitzCallback already, and two of them would hold one model to "
            "two configs. Keep one, with all the arguments: callbacks=[LipschitzCallback(config, "
            "...)]."
        )
    if control is not None:
        control._lip_callback = callback


def _callback() -> Any:
    from lip_plugin.integrations.huggingface.trainer import LipschitzCallback

    return LipschitzCallback


def _number(value: Any, kind: type = Real) -> bool:
    is_one: bool = isinstance(value, kind) and not isinstance(value, bool)
    return is_one and -math.inf < value < math.inf


def _positive(value: Any) -> bool:
    return _number(value) and value > 0


def _count(value: Any) -> bool:
    return _number(value, Integral) and value > 0


def _pair(value: Any) -> bool:
    return (
        isinstance(value, (tuple, list))
        and len(value) == 2
        and all(_number(v) and 0 <= v < 1 for v in value)
    )


def _batches(value: Any) -> bool:
    # A map-style data set has only __getitem__, and can be iterated all the same.
    listed = isinstance(value, Iterable) or hasattr(value, "__getitem__")
    return listed and not isinstance(value, (str, bytes, type))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"<{type(value).__name__}>"


_Check = tuple[Callable[[Any], bool], str]
# Checks of values that LipschitzMuon does not check itself.
_MORE: dict[str, _Check] = {
    "betas": (_pair, "two numbers from 0 to below 1"),
    "eps": (_positive, "a finite number above 0"),
    "steps": (_count, "a whole number above 0"),
    "adamw_weight_decay": (lambda v: _number(v) and v >= 0, "a finite number of at least 0"),
}
for _name in ("embedding_lr", "adamw_lr", "adapter_lr"):
    _MORE[_name] = (lambda v: v is None or _positive(v), "a finite number above 0, or None")
_MORE["adamw_lr"] = (_positive, "a finite number above 0")
for _name in ("momentum", "weight_decay"):
    _MORE[_name] = (_number, "a finite number")
