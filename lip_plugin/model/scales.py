"""Constants in a forward pass, all of them python floats.

A retrofit that removes norms needs three kinds: a constant in a norm's slot (ConstantScale),
factors on what a branch reads or gives (InputScale, BranchScale), and a cap on entries (EntryCap).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class ConstantScale(nn.Module):
    """x -> scale * x, which a removed norm leaves in its slot.

    Its Lipschitz constant is abs(scale).
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale = float(scale)

    def forward(self, x: Tensor) -> Tensor:
        return x if self.scale == 1.0 else x * self.scale

    def extra_repr(self) -> str:
        return f"scale={self.scale:.6g}"


class BranchScale:
    """Forward hook that multiplies a branch's output, or its first entry if it is a tuple.

    It sits on the attention or MLP module, never inside on the linear layer. peft adds its change
    outside that layer, so a scale inside would miss it.
    """

    def __init__(self, scale: float) -> None:
        self.scale = float(scale)

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (output[0] * self.scale, *output[1:])
        return output * self.scale


def branch_scale(module: nn.Module) -> float:
    """The factor that BranchScale hooks put on the module's output, which is 1.0 without any."""
    return math.prod(h.scale for h in module._forward_hooks.values() if isinstance(h, BranchScale))


def set_branch_scale_(module: nn.Module, scale: float | None) -> None:
    """Replace the module's BranchScale hook. None takes it away."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, BranchScale):
            del module._forward_hooks[key]
    if scale is not None and scale != 1.0:
        module.register_forward_hook(BranchScale(scale))


class InputScale:
    """Forward pre-hook that multiplies what a branch reads.

    It is for branches without a norm slot in front of them (olmo2). It sits on the attention or MLP
    module, for the same reason as BranchScale. It multiplies the argument `hidden_states`, or else
    the first one.
    """

    ARGUMENT = "hidden_states"

    def __init__(self, scale: float) -> None:
        self.scale = float(scale)

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        if self.ARGUMENT in kwargs:
            return args, {**kwargs, self.ARGUMENT: kwargs[self.ARGUMENT] * self.scale}
        return (args[0] * self.scale, *args[1:]), kwargs


def input_scale(module: nn.Module) -> float:
    """The factor that InputScale hooks put on what the module reads, which is 1.0 without any."""
    return math.prod(
        h.scale for h in module._forward_pre_hooks.values() if isinstance(h, InputScale)
    )


def set_input_scale_(module: nn.Module, scale: float | None) -> None:
    """Replace the module's InputScale hook. None takes it away."""
    for key, hook in list(module._forward_pre_hooks.items()):
        if isinstance(hook, InputScale):
            del module._forward_pre_hooks[key]
            module._forward_pre_hooks_with_kwargs.pop(key, None)
    if scale is not None and scale != 1.0:
        module.register_forward_pre_hook(InputScale(scale), with_kwargs=True)


class EntryCap:
    """Forward hook: z -> cap tanh(z / cap) on the last `width` entries of the output.

    Without a width it acts on all entries. It is for the two factors of a gated MLP, where one
    entry may otherwise be sqrt(d) times as large as the RMS norm of all.
    """

    def __init__(self, cap: float, width: int | None = None) -> None:
        self.cap, self.width = float(cap), width

    def __call__(self, module: nn.Module, args: Any, output: Tensor) -> Tensor:
        if self.width is None:
            return self.cap * torch.tanh(output / self.cap)
        kept, capped = output[..., : -self.width], output[..., -self.width :]
        return torch.cat([kept, self.cap * torch.tanh(capped / self.cap)], dim=-1)


def entry_cap(module: nn.Module) -> float | None:
    """The smallest cap of the EntryCap hooks on the module's output. None without any."""
    caps = [h.cap for h in module._forward_hooks.values() if isinstance(h, EntryCap)]
    return min(caps) if caps else None


def set_entry_cap_(module: nn.Module, cap: float | None, width: int | None = None) -> None:
    """Replace the module's EntryCap hook. None takes it away."""
    for key, hook in list(module._forward_hooks.items()):
        if isinstance(hook, EntryCap):
            del module._forward_hooks[key]
    if cap is not None:
        module.register_forward_hook(EntryCap(cap, width))
