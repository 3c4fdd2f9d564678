"""lip_plugin trains existing PyTorch models under Lipschitz constraints, and proves a bound.

    retrofit(model, LipschitzConfig(w_max=1.0))      # constrain a model of a known family, in place
    optimizer = LipschitzMuon(model, lr=0.05)        # Muon, and a projection after every step
    certify(model).lipschitz                         # proven upper bound, embeddings -> logits

With the Hugging Face Trainer one callback does all of it: `callbacks=[LipschitzCallback()]`.

This file lists the public names. Each is imported when it is first used, and torch with it.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lip_plugin.integrations.after_import import register_saving

if TYPE_CHECKING:
    from lip_plugin.certificate.attack.falsify import falsify
    from lip_plugin.certificate.certify import certify
    from lip_plugin.certificate.diagnostics.activation_report import activation_report
    from lip_plugin.certificate.diagnostics.rounding import forward_rounding_upper
    from lip_plugin.certificate.drift.drift import Drift, drift
    from lip_plugin.certificate.plan_caps import plan_caps
    from lip_plugin.certificate.result import Certificate
    from lip_plugin.certificate.robustness.accuracy import (
        attacked_accuracy,
        certified_accuracy,
        certified_radius,
    )
    from lip_plugin.config import LipschitzConfig
    from lip_plugin.integrations.huggingface.trainer import LipschitzCallback
    from lip_plugin.integrations.peft.budget import constrain_adapters, release_adapters
    from lip_plugin.integrations.peft.summary import adapter_summary, print_adapter_summary
    from lip_plugin.optim.enforce import attach_projection, project_
    from lip_plugin.optim.muon import LipschitzMuon
    from lip_plugin.surgery.retrofit import release, retrofit
    from lip_plugin.surgery.state import config_of
    from lip_plugin.training.calibration import calibrate, own_caps
    from lip_plugin.training.checkpoint import load_checkpoint, save_checkpoint
    from lip_plugin.training.limits import set_caps_, set_norm_floors_
    from lip_plugin.training.losses import MarginLoss
    from lip_plugin.training.schedule import RetrofitSchedule

__version__ = "0.1.0"

__all__ = [
    "Certificate",
    "Drift",
    "LipschitzCallback",
    "LipschitzConfig",
    "LipschitzMuon",
    "MarginLoss",
    "RetrofitSchedule",
    "activation_report",
    "adapter_summary",
    "attach_projection",
    "attacked_accuracy",
    "calibrate",
    "certified_accuracy",
    "certified_radius",
    "certify",
    "config_of",
    "constrain_adapters",
    "drift",
    "falsify",
    "forward_rounding_upper",
    "load_checkpoint",
    "own_caps",
    "plan_caps",
    "print_adapter_summary",
    "project_",
    "release",
    "release_adapters",
    "retrofit",
    "save_checkpoint",
    "set_caps_",
    "set_norm_floors_",
]

# Where each public name is. It is imported when it is first asked for.
_PLACES = {
    "Certificate": "lip_plugin.certificate.result",
    "Drift": "lip_plugin.certificate.drift.drift",
    "LipschitzCallback": "lip_plugin.integrations.huggingface.trainer",
    "LipschitzConfig": "lip_plugin.config",
    "LipschitzMuon": "lip_plugin.optim.muon",
    "MarginLoss": "lip_plugin.training.losses",
    "RetrofitSchedule": "lip_plugin.training.schedule",
    "activation_report": "lip_plugin.certificate.diagnostics.activation_report",
    "adapter_summary": "lip_plugin.integrations.peft.summary",
    "attach_projection": "lip_plugin.optim.enforce",
    "attacked_accuracy": "lip_plugin.certificate.robustness.accuracy",
    "calibrate": "lip_plugin.training.calibration",
    "certified_accuracy": "lip_plugin.certificate.robustness.accuracy",
    "certified_radius": "lip_plugin.certificate.robustness.accuracy",
    "certify": "lip_plugin.certificate.certify",
    "config_of": "lip_plugin.surgery.state",
    "constrain_adapters": "lip_plugin.integrations.peft.budget",
    "drift": "lip_plugin.certificate.drift.drift",
    "falsify": "lip_plugin.certificate.attack.falsify",
    "forward_rounding_upper": "lip_plugin.certificate.diagnostics.rounding",
    "load_checkpoint": "lip_plugin.training.checkpoint",
    "own_caps": "lip_plugin.training.calibration",
    "plan_caps": "lip_plugin.certificate.plan_caps",
    "print_adapter_summary": "lip_plugin.integrations.peft.summary",
    "project_": "lip_plugin.optim.enforce",
    "release": "lip_plugin.surgery.retrofit",
    "release_adapters": "lip_plugin.integrations.peft.budget",
    "retrofit": "lip_plugin.surgery.retrofit",
    "save_checkpoint": "lip_plugin.training.checkpoint",
    "set_caps_": "lip_plugin.training.limits",
    "set_norm_floors_": "lip_plugin.training.limits",
}


def __getattr__(name: str) -> Any:
    if name == "recap_":  # the name of set_caps_ before version 0.1
        return __getattr__("set_caps_")
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_PLACES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


# A saved model has to load after `import lip_plugin` alone.
register_saving()
