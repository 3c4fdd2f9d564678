"""The modules that a retrofit leaves in a model: constrained leaves, constants, scaled activations.

Constrained layers are made by changing the class of the layer that is there, so its Parameters,
hooks, device, dtype and forward stay the very same objects. All constants are python floats:
non-persistent buffers are garbage after a load through the meta device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.blocks import Layout
from lip_plugin.errors import UnsupportedModelError

# Largest slopes, rounded up at the last digit; tests/test_modules.py recomputes them in float64.
# gelu (erf): at x = sqrt(2); gelu (tanh form): near x = 1.4; silu: near x = 2.4.
SLOPE_UPPER = {
    "relu": 1.0,
    "tanh": 1.0,
    "gelu": 1.12890415,
    "gelu_tanh": 1.12899307,
    "silu": 1.09983933,
}


class Constrained:
    """Mixin of layers whose `weight` is capped block by block; `layout` says how."""

    layout: Layout
    weight: Tensor


class ConstrainedLinear(Constrained, nn.Linear):
    """nn.Linear, forward untouched, whose weight blocks an optimizer keeps within their caps."""


class ConstrainedEmbedding(Constrained, nn.Embedding):
    """nn.Embedding whose rows are kept within a cap in RMS norm."""


def _is_conv1d(cls: type) -> bool:
    # transformers' Conv1D, told by name because the core does not import transformers
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


def __getattr__(name: str) -> Any:
    if name == "ConstrainedConv1D":  # built when first asked for: its parent lives in transformers
        if name in globals():  # one class for ever, or earlier models could not be pickled
            return globals()[name]
        from importlib import import_module

        parent = import_module("transformers.pytorch_utils").Conv1D
        doc = "transformers' Conv1D (weight [d_in, d_out]), forward untouched, blocks capped."
        cls = type(name, (Constrained, parent), {"__module__": __name__, "__doc__": doc})
        globals()[name] = cls
        return cls
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def is_linear(module: nn.Module) -> bool:
    """Whether the module is a plain or constrained Linear or Conv1D: a leaf that can be swapped."""
    cls = type(module)
    if isinstance(module, Constrained):
        return not isinstance(module, nn.Embedding)
    return cls is nn.Linear or _is_conv1d(cls)


def is_transposed(module: nn.Module) -> bool:
    """Whether the weight is stored [d_in, d_out]."""
    return any(_is_conv1d(cls) for cls in type(module).__mro__)


def constrain_(module: nn.Module, layout: Layout) -> None:
    """Make `module` constrained, in place, sharing its very Parameters.

    Raises UnsupportedModelError for a class other than Linear, Conv1D or Embedding: a subclass may
    compute something else (quantized layers do).
    """
    cls = type(module)
    if not isinstance(module, Constrained):
        if cls is nn.Linear:
            module.__class__ = ConstrainedLinear
        elif cls is nn.Embedding:
            module.__class__ = ConstrainedEmbedding
        elif _is_conv1d(cls):
            module.__class__ = __getattr__("ConstrainedConv1D")
        else:
            raise UnsupportedModelError(
                f"{cls.__module__}.{cls.__name__} is not a plain Linear, Conv1D or Embedding; "
                "load the model unquantized and unwrapped, then retrofit it."
            )
    module.layout = layout  # type: ignore[assignment]


def unconstrain_(module: nn.Module) -> None:
    """Give a constrained module its plain class back; weights and forward stay as they are."""
    if isinstance(module, Constrained):
        del module.layout
        module.__class__ = type(module).__mro__[2]


def constrained_modules(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, module) of every constrained layer, in the model's own order."""
    return ((name, m) for name, m in model.named_modules() if isinstance(m, Constrained))


class ConstantScale(nn.Module):
    """x -> scale * x: what a removed norm leaves in its slot. Lipschitz constant abs(scale)."""

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale == 1.0 else x * self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale:.6g}"


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


class BranchScale:
    """Forward hook: scales a branch's output (the first entry, if it returns a tuple).

    It sits on the attention or MLP module, never inside the linear layer: peft adds its delta
    outside the layer, and a scale inside would miss it.
    """

    def __init__(self, scale: float) -> None:
        self.scale = float(scale)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * self.scale, *output[1:])
        return output * self.scale


def branch_scale(module: nn.Module) -> float:
    """The factor that BranchScale hooks put on the module's output (1.0 without any)."""
    return math.prod(h.scale for h in module._forward_hooks.values() if isinstance(h, BranchScale))


def set_branch_scale_(module: nn.Module, scale: float | None) -> None:
    """Replace the module's BranchScale hook; None takes it away."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, BranchScale):
            del module._forward_hooks[key]
    if scale is not None and scale != 1.0:
        module.register_forward_hook(BranchScale(scale))


# What each kind computes: the function that its slope is proven for.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "tanh": torch.tanh,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "silu": nn.functional.silu,
}
# The classes we read the source of. A look-alike (ClippedGELU, QuickGELU, a trainable one) is not here.
_ACTIVATION_CLASSES = {
    "torch.nn.modules.activation": {"ReLU", "Tanh", "GELU", "SiLU"},
    "transformers.activations": {
        *("GELUActivation", "NewGELUActivation", "FastGELUActivation", "GELUTanh", "PytorchGELUTanh"),
        *("SiLUActivation", "AccurateGELUActivation"),
    },
}


def activation_kind(act: Any) -> str | None:
    """Name in SLOPE_UPPER of the function this module computes; None if it is not a known one.

    The class must be on the list above; which of its forms it computes is then told by its values
    on [-30, 30], because one class has several (nn.GELU's `approximate`).
    """
    if isinstance(act, ScaledActivation):
        return act.kind
    cls = type(act)
    if cls.__name__ not in _ACTIVATION_CLASSES.get(cls.__module__, ()):
        return None
    probe = torch.linspace(-30.0, 30.0, 961, dtype=torch.float64, device="cpu")  # also within a meta context
    with torch.no_grad():
        values = act(probe)
    for kind, reference in ACTIVATIONS.items():
        if torch.allclose(values, reference(probe), rtol=0.0, atol=1e-9):
            return kind
    return None
