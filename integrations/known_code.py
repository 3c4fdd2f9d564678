"""Hooks and patches of libraries whose code was read: they change nothing that a model computes.

A comparison with the model is remembered only while nothing unknown is there (see
lip_plugin/certificate/comparison/structure.py). What is listed here is known.
"""

from __future__ import annotations

from lip_plugin.certificate.comparison.structure import (
    know_caller,
    know_hook,
    know_library,
    know_patch,
)

for _library in ("transformers", "peft", "accelerate", "bitsandbytes"):
    know_library(_library)
# They set requires_grad, for gradient checkpointing.
for _library in ("transformers", "peft", "trl"):
    know_hook(_library, "make_inputs_require_grad")
    know_hook(_library, "make_inputs_require_grads")
# accelerate's mixed precision: outputs in float32, around torch's autocast.
know_patch("accelerate.utils.operations", "forward", "model_forward")
know_caller("accelerate.utils.operations.ConvertOutputsToFp32", "model_forward")
# TRL's patch is for its own loss. Called as models are called, it only calls what it replaced.
know_patch("trl.trainer.utils", "_fused_forward", "original_forward")
