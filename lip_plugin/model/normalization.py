"""Norm slots: what a library's norm computes, and the floor that makes it a Lipschitz map.

A LayerNorm gives g (x - mean x) / s(x) + b, and an RMSNorm g x / s(x). Here s is the root of the
mean square plus eps. Near zero such a norm is as steep as g / sqrt(eps).

With max(s(x), floor) in the place of s(x), it is nowhere steeper than g / floor, no output is
larger than before, and every x with s(x) >= floor is mapped as before. In a trained model the s of
a slot stays away from 0, so `calibrate` finds floors that change almost nothing. A floor far above
every s makes the map affine: the norm is gone. Gain and bias stay the norm's own Parameters, under
their own keys.

The proof is in docs/maths.md, section 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError


@dataclass(frozen=True)
class NormFacts:
    """How a norm module computes.

    Attributes:
        eps: s is sqrt(mean of squares + eps).
        center: Whether the mean is subtracted from the input first.
        one_plus: Whether the gain is 1 + weight instead of weight.
    """

    eps: float
    center: bool
    one_plus: bool = False


# What `register_norm` was given.
_READERS: list[Callable[[Any], NormFacts | None]] = []


def register_norm(read: Callable[[Any], NormFacts | None]) -> None:
    """Make norms known that are neither nn.LayerNorm nor a plain RMSNorm.

    Args:
        read: Looks at the class of a module. It gives its NormFacts, or None if it is not known to
            it.
    """
    if read not in _READERS:
        _READERS.append(read)


def norm_facts(module: Any, name: str) -> NormFacts:
    """The facts about a library's norm module.

    Args:
        module: The norm.
        name: Its full name, for the message.

    Raises:
        UnsupportedModelError: The norm is not known.
    """
    cls = plain_norm_class(module)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if cls is nn.LayerNorm:
        return NormFacts(float(module.eps), True)
    for read in _READERS:
        facts = read(module)
        if facts is not None:
            return facts
    if (
        cls.__name__.endswith("RMSNorm")
        and eps is not None
        and getattr(module, "bias", None) is None
    ):
        return NormFacts(float(eps), False)
    raise UnsupportedModelError(f"{name} is {cls.__name__}, a norm without a proven rule here.")


def plain_norm_class(module: Any) -> type:
    """The class that a norm had before a floor was put under it."""
    return module.plain_class if isinstance(module, Floored) else type(module)


def root_mean_square(x: Tensor, facts: NormFacts) -> Tensor:
    """s(x) of a norm, [..., 1], in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    square = (
        x.var(-1, correction=0, keepdim=True) if facts.center else x.square().mean(-1, keepdim=True)
    )
    return (square + facts.eps).sqrt()


class Floored:
    """Mixin of a norm with a floor: g (x, centered or not) / max(s(x), floor) + b.

    At a floor of 0 it is the library's norm. With eps = 0 the gradient at x = 0 is then nan, as the
    library's is. `floor` is a python float on the module. So torch.compile compiles anew when it
    leaves 0, and takes later values as they come.
    """

    plain_class: type
    facts: NormFacts
    floor: float
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)  # type: ignore[misc]
        if self.floor == 0.0:
            return y
        # Tokens above the floor keep the bits that the library's norm gave.
        return torch.where(root_mean_square(x.detach(), self.facts) < self.floor, self.below(x), y)

    def below(self, x: Tensor) -> Tensor:
        """The affine map for tokens below the floor.

        It is computed in float32 or wider, as norms are, and returned in the dtype of x.
        """
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y - y.mean(-1, keepdim=True) if self.facts.center else y
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        if weight is None:
            y = y / self.floor
        else:
            weight = weight.to(y.dtype)  # gain / floor may lie outside the range of float16
            y = y * ((1.0 + weight if self.facts.one_plus else weight) / self.floor)
        return (y if bias is None else y + bias).to(x.dtype)

    def extra_repr(self) -> str:
        return ", ".join(filter(None, [super().extra_repr(), f"floor={self.floor:.6g}"]))  # type: ignore[misc]

    # The class is made at run time, so it is pickled as what it is made of.
    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (self.plain_class,), self.__dict__


_CLASSES: dict[type, Any] = {}


# The class with a floor of this norm class, made when it is first needed.
def _floored(cls: type) -> Any:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(
            f"Floored{cls.__name__}", (Floored, cls), {"plain_class": cls, "__module__": __name__}
        )
    return _CLASSES[cls]


# An empty object of that class, which pickle then fills.
def _blank(cls: type) -> Any:
    made = _floored(cls)
    return made.__new__(made)


def refuse_own_forward(module: Any, name: str) -> None:
    """Refuse a norm whose forward was replaced on the instance.

    A floor changes the class of the module, and such a forward would not ask the class.

    Raises:
        UnsupportedModelError: The module carries a forward of its own.
    """
    if "forward" in vars(module):
        raise UnsupportedModelError(
            f"{name} carries a forward of its own (accelerate's hooks and kernels set one), so a "
            "floor would have no effect. Remove it first: "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True), or load without "
            "kernels."
        )


def floor_(module: Any, name: str, floor: float) -> None:
    """Put a floor under a norm's divisor, in place, or move the one that is there.

    Args:
        module: The norm. It keeps its very Parameters.
        name: Its full name, for messages.
        floor: At least 0.
    """
    if not isinstance(module, Floored):
        facts = norm_facts(module, name)
        module.__class__ = _floored(type(module))
        module.facts = facts
    module.floor = float(floor)


@torch.no_grad()
def steepest_norm(model: nn.Module, slots: Iterable[str]) -> float:
    """The largest Lipschitz constant of the norms in these slots: gain / max(sqrt(eps), floor).

    It is a float for logs, and no proof.
    """
    found = [0.0]
    for slot in slots:
        module: Any = model.get_submodule(slot)
        facts, weight = norm_facts(module, slot), getattr(module, "weight", None)
        gain = 1.0
        if weight is not None:
            gain = float((1.0 + weight if facts.one_plus else weight).abs().max())
        least = max(facts.eps**0.5, module.floor if isinstance(module, Floored) else 0.0)
        found.append(gain / least if least else math.inf)
    return max(found)
