"""lip_plugin: train existing PyTorch models under enforced Lipschitz constants, with a sound certificate.

    retrofit(model, LipschitzConfig(w_max=1.0))            # constrain any known model, in place
    optimizer = LipschitzMuon(model, lr=0.05)              # Muon, and a projection after every step
    certify(model).lipschitz                               # proven upper bound, embeddings -> logits

With the Hugging Face Trainer one callback does all of it: `callbacks=[LipschitzCallback()]`.
Importing this package imports torch; names that need transformers are loaded when first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from lip_plugin.integrations import register_all as _register_all

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
    from lip_plugin.training.calibration import calibrate, own_caps
    from lip_plugin.training.checkpoint import load_checkpoint, save_checkpoint
    from lip_plugin.training.limits import recap_, set_norm_floors_
    from lip_plugin.training.losses import MarginLoss
    from lip_plugin.training.schedule import RetrofitSchedule

__version__ = "0.1.0"

_HOMES = {
    "LipschitzConfig": "lip_plugin.config",
    "retrofit": "lip_plugin.surgery.retrofit",
    "release": "lip_plugin.surgery.retrofit",
    "project_": "lip_plugin.optim.enforce",
    "attach_projection": "lip_plugin.optim.enforce",
    "LipschitzMuon": "lip_plugin.optim.muon",
    "certify": "lip_plugin.certificate.certify",
    "Certificate": "lip_plugin.certificate.certify",
    "drift": "lip_plugin.certificate.drift.drift",
    "Drift": "lip_plugin.certificate.drift.drift",
    "falsify": "lip_plugin.certificate.attack.falsify",
    "plan_caps": "lip_plugin.certificate.plan_caps",
    "forward_rounding_upper": "lip_plugin.certificate.diagnostics.rounding",
    "certified_radius": "lip_plugin.certificate.robustness.accuracy",
    "certified_accuracy": "lip_plugin.certificate.robustness.accuracy",
    "attacked_accuracy": "lip_plugin.certificate.robustness.accuracy",
    "activation_report": "lip_plugin.certificate.diagnostics.activation_report",
    "MarginLoss": "lip_plugin.training.losses",
    "recap_": "lip_plugin.training.limits",
    "calibrate": "lip_plugin.training.calibration",
    "own_caps": "lip_plugin.training.calibration",
    "RetrofitSchedule": "lip_plugin.training.schedule",
    "set_norm_floors_": "lip_plugin.training.schedule",
    "save_checkpoint": "lip_plugin.training.checkpoint",
    "load_checkpoint": "lip_plugin.training.checkpoint",
    "constrain_adapters": "lip_plugin.integrations.peft.budget",
    "release_adapters": "lip_plugin.integrations.peft.budget",
    "adapter_summary": "lip_plugin.integrations.peft.summary",
    "print_adapter_summary": "lip_plugin.integrations.peft.summary",
    "LipschitzCallback": "lip_plugin.integrations.huggingface.trainer",
}
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
    "constrain_adapters",
    "drift",
    "falsify",
    "forward_rounding_upper",
    "load_checkpoint",
    "own_caps",
    "plan_caps",
    "print_adapter_summary",
    "project_",
    "recap_",
    "release",
    "release_adapters",
    "retrofit",
    "save_checkpoint",
    "set_norm_floors_",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


_register_all()
