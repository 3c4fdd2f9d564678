"""`print_adapter_summary(model)`: one line about adapters under constraint.

It is the counterpart of peft's print_trainable_parameters.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lip_plugin.certificate.drift.drift import drift
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.integrations.peft.enforce import merged_block_norms
from lip_plugin.integrations.peft.layers import wrapped_layers
from lip_plugin.surgery.state import constraints_of


def adapter_summary(model: nn.Module, **attack: Any) -> str:
    """Summarize adapters in one line: their number, their norms, and the drift from the base.

    Norms are proven RMS->RMS norms over caps and budgets. The drift is left out for families
    without a certificate.

    Args:
        model: a model with adapters, and with caps or budgets.
        attack: arguments of `drift`; restarts=0 leaves its attack out.

    Raises:
        NotRetrofittedError: the model has neither caps nor budgets.
        What `drift` raises for merged adapters.
    """
    root, _ = constraints_of(model)
    names = {name for name, _, _ in wrapped_layers(root)}
    norms = merged_block_norms(root)
    parts = [
        f"adapters: {len(names)} layers, {sum(n.count for n in norms if n.name in names)} capped "
        "blocks"
    ]
    for what, found in (
        ("merged norms <= {:.4g} of their caps", [n for n in norms if n.name in names]),
        ("change <= {:.4g} of its budget", [n for n in norms if n.name not in names]),
    ):
        if found:
            parts.append(what.format(max(n.worst_over_cap for n in found)))
    try:
        parts.append(drift(model, **attack).summary)
    except UnsupportedModelError as error:
        parts.append(f"drift: not known ({error})")
    return " || ".join(parts)


def print_adapter_summary(model: nn.Module, **attack: Any) -> None:
    """Print `adapter_summary(model)`."""
    print(adapter_summary(model, **attack))
