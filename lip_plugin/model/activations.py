"""Activations whose largest slope is proven, and the modules that a retrofit puts in their place: 1-Lipschitz."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError

# Largest slopes, rounded up at the last digit; tests/model/test_layers.py recomputes them in float64.
# gelu (erf): at x = sqrt(2); gelu (tanh form): near x = 1.4; silu: near x = 2.4.
SLOPE_UPPER = {
    "relu": 1.0,
    "tanh": 1.0,
    "gelu": 1.12890415,
    "gelu_tanh": 1.12899307,
    "silu": 1.09983933,
    "abs": 1.0,
}


class Abs(nn.Module):
    """x -> abs(x): slopes 1 and -1 only, so norms and gradients pass whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


REPLACEMENTS: dict[str, type[nn.Module]] = {"abs": Abs}


class FunctionActivation(nn.Module):
    """x -> f(x) of `ACTIVATIONS`, standing for a call of that function in a library's forward.

    There is no module in the library's model at that place, so nothing can be scaled there, nor hooked.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.kind](x)


class ScaledActivation(nn.Module):
    """x -> act(x) / slope, with slope an upper bound of act's largest slope: 1-Lipschitz.

    Args:
        act: the activation module or function as the model had it.
        kind: its name in SLOPE_UPPER.
    """

    def __init__(self, act: Callable[[Tensor], Tensor], kind: str) -> None:
        super().__init__()
        if kind not in SLOPE_UPPER:
            raise UnsupportedModelError(
                f"activation {kind!r} has no proven slope; known: {', '.join(SLOPE_UPPER)}."
            )
        self.act = act
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) * (1.0 / SLOPE_UPPER[self.kind])

    def extra_repr(self) -> str:
        return f"kind={self.kind}, slope=1/{SLOPE_UPPER[self.kind]}"


# What each kind computes: the function that its slope is proven for.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "abs": torch.abs,
}
# The classes whose source was read, by module. A look-alike (a clipped or trainable one) is not here; the integrations
# register those of their libraries.
_ACTIVATION_CLASSES: dict[str, set[str]] = {
    "torch.nn.modules.activation": {"ReLU", "Tanh", "GELU", "SiLU"}
}


def register_activation_classes(module: str, *names: str) -> None:
    """Make activation classes of a library known: each computes one of ACTIVATIONS, which its values then tell."""
    _ACTIVATION_CLASSES.setdefault(module, set()).update(names)


def activation_kind(act: Any) -> str | None:
    """Name in SLOPE_UPPER of the function this module computes; None if it is not a known one.

    The class must be on the list above; which of its forms it computes is then told by its values
    on [-30, 30], because one class has several (nn.GELU's `approximate`).
    """
    if isinstance(act, ScaledActivation):
        return act.kind
    cls = type(act)
    for kind, replacement in REPLACEMENTS.items():
        if cls is replacement:
            return kind
    if cls.__name__ not in _ACTIVATION_CLASSES.get(cls.__module__, ()):
        return None
    probe = torch.linspace(
        -30.0, 30.0, 961, dtype=torch.float64, device="cpu"
    )  # also within a meta context
    with torch.no_grad():
        values = act(probe)
    for kind, reference in ACTIVATIONS.items():
        if kind not in REPLACEMENTS and torch.allclose(
            values, reference(probe), rtol=0.0, atol=1e-9
        ):
            return kind
    return None
