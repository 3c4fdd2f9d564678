"""lip_plugin trains existing PyTorch models under Lipschitz constraints, and proves a bound.

    retrofit(model, LipschitzConfig(w_max=1.0))      # constrain a model of a known family, in place
    optimizer = LipschitzMuon(model, lr=0.05)        # Muon, and a projection after every step
    certify(model).lipschitz                         # proven upper bound, embeddings -> logits

With the Hugging Face Trainer one callback does all of it: `callbacks=[LipschitzCallback()]`.

This file lists the public names. Importing it imports torch. Whatever needs transformers is
imported when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

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
from lip_plugin.integrations import register_all
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

if TYPE_CHECKING:
    from lip_plugin.integrations.huggingface.trainer import LipschitzCallback

__version__ = "0.1.0"
recap_ = set_caps_  # the name of set_caps_ before version 0.1

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


# Imports what needs transformers when it is first asked for.
def __getattr__(name: str) -> Any:
    if name == "LipschitzCallback":
        from lip_plugin.integrations.huggingface.trainer import LipschitzCallback

        return LipschitzCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


register_all()
