"""Activations whose largest slope is proven, and the 1-Lipschitz modules that replace them.

Open this file to see which activations have a rule, or to add one. A retrofit that removes norms
divides each activation by its largest slope, or puts another one in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError

# The largest slopes, rounded up in the last digit. tests/model/test_layers.py recomputes them in
# float64. That of gelu (erf) is at x = sqrt(2), that of its tanh form near x = 1.4, that of silu
# near x = 2.4.
SLOPE_UPPER = {
    "relu": 1.0,
    "tanh": 1.0,
    "gelu": 1.12890415,
    "gelu_tanh": 1.12899307,
    "silu": 1.09983933,
    "abs": 1.0,
}


class Abs(nn.Module):
    """x -> abs(x). Its slopes are 1 and -1 only, so norms and gradients pass whole."""

    def forward(self, x: Tensor) -> Tensor:
        return x.abs()


REPLACEMENTS: dict[str, type[nn.Module]] = {"abs": Abs}


class FunctionActivation(nn.Module):
    """x -> f(x) of `ACTIVATIONS`, for a place where a library's forward calls f as a function.

    There is no module in the library's model at that place. So nothing can be scaled there, nor
    hooked.
    """

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.kind](x)


class ScaledActivation(nn.Module):
    """x -> act(x) / slope, with slope an upper bound of the largest slope of act: 1-Lipschitz.

    Args:
        act: The activation module or function that the model had.
        kind: Its name in SLOPE_UPPER.

    Raises:
        UnsupportedModelError: No slope is proven for this name.
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


# The function that each slope is proven for.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
    "abs": torch.abs,
}
# The activation classes whose source was read, by module. A look-alike, such as a clipped or a
# trainable one, is not here. The integrations register the classes of their libraries.
_ACTIVATION_CLASSES: dict[str, set[str]] = {
    "torch.nn.modules.activation": {"ReLU", "Tanh", "GELU", "SiLU"}
}


def register_activation_classes(module: str, *names: str) -> None:
    """Make activation classes of a library known.

    Args:
        module: The full name of the module that they are in.
        names: Their names. Each class has to compute one of ACTIVATIONS; `activation_kind` finds
            out which one from its values.
    """
    _ACTIVATION_CLASSES.setdefault(module, set()).update(names)


def activation_kind(act: Any) -> str | None:
    """Which function an activation module computes.

    Its class must be a registered one. A class may have several forms (nn.GELU has `approximate`),
    so the form is told by its values on [-30, 30].

    Returns:
        A name in SLOPE_UPPER, or None if the function is not known.
    """
    if isinstance(act, ScaledActivation):
        return act.kind
    cls = type(act)
    for kind, replacement in REPLACEMENTS.items():
        if cls is replacement:
            return kind
    if cls.__name__ not in _ACTIVATION_CLASSES.get(cls.__module__, ()):
        return None
    # The device is named, because this may run where the default device is meta.
    probe = torch.linspace(-30.0, 30.0, 961, dtype=torch.float64, device="cpu")
    with torch.no_grad():
        values = act(probe)
    for kind, reference in ACTIVATIONS.items():
        if kind not in REPLACEMENTS and torch.allclose(
            values, reference(probe), rtol=0.0, atol=1e-9
        ):
            return kind
    return None
