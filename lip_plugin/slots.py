"""Norm slots: what a library's norm computes, and the affine map that takes its place where norms are calibrated.

A LayerNorm gives g (x - mean x) / s(x) + b, an RMSNorm g x / s(x), with s the root of the mean square (plus eps). A trained
model is a function of these; but over the inputs that it is given, s of one slot varies little. With s replaced by a
constant 1/c the norm is an affine map of constant c max(g), whose c `calibrate` finds. On the way there a slot computes
share * norm(x) + (1 - share) * fixed(x). Gain and bias stay the norm's own Parameters, under their own keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError

# RMSNorms whose gain is 1 + weight
_ONE_PLUS = ("Gemma2RMSNorm", "Gemma3RMSNorm")


@dataclass(frozen=True)
class NormFacts:
    """How a norm module computes: s = sqrt(mean of squares + eps), of the centered input or not; gain weight, or 1 + weight."""

    eps: float
    center: bool
    one_plus: bool = False


def norm_facts(module: Any, name: str) -> NormFacts:
    """The facts about a library's norm module; raises UnsupportedModelError for one that we do not know."""
    cls = module.plain_class if isinstance(module, Calibrated) else type(module)
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if cls is nn.LayerNorm:
        return NormFacts(float(module.eps), True)
    if cls.__name__ == "LayerNorm" and eps is None:  # nanoGPT's, whose eps is a literal in its forward
        return NormFacts(1e-5, True)
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if (
        cls.__name__ in _ONE_PLUS
        and weight is not None
        and cls.__module__.startswith("transformers.models.gemma")
    ):
        return NormFacts(float(module.eps), False, True)
    if cls.__name__.endswith("RMSNorm") and eps is not None and bias is None:
        return NormFacts(float(eps), False)
    raise UnsupportedModelError(f"{name} is {cls.__name__}, a norm without a proven rule here.")


def root_mean_square(x: Tensor, facts: NormFacts) -> Tensor:
    """s(x) [..., 1] of a norm, float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x - x.mean(-1, keepdim=True) if facts.center else x
    return (x.square().mean(-1, keepdim=True) + facts.eps).sqrt()


class Calibrated:
    """Mixin of a norm whose slot computes share * norm(x) + (1 - share) * scale * g * (x, centered or not) + b.

    `scale` and `share` are python floats on the module: torch.compile compiles anew when a share leaves 1, and when it gets
    to 0.
    """

    plain_class: type
    facts: NormFacts
    scale: float
    share: float
    weight: Tensor | None
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        if self.share == 1.0:
            return super().forward(x)  # type: ignore[misc]
        fixed = self.fixed(x)
        return fixed if self.share == 0.0 else self.share * super().forward(x) + (1.0 - self.share) * fixed  # type: ignore[misc]

    def fixed(self, x: Tensor) -> Tensor:
        """The affine map: in float32 or wider, as norms compute, its result in x's dtype."""
        y = x.to(torch.promote_types(x.dtype, torch.float32))
        y = y - y.mean(-1, keepdim=True) if self.facts.center else y
        weight, bias = getattr(self, "weight", None), getattr(self, "bias", None)
        y = y * self.scale
        if weight is not None:
            y = y * ((1.0 + weight) if self.facts.one_plus else weight)
        return (y if bias is None else y + bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:.6g}, share={self.share:.6g}"  # type: ignore[misc]

    def __reduce_ex__(
        self, protocol: Any
    ) -> Any:  # the class is made at run time: pickle by what it is made of
        return _blank, (self.plain_class,), self.__dict__


_CLASSES: dict[type, Any] = {}


def _calibrated(cls: type) -> Any:
    if cls not in _CLASSES:
        _CLASSES[cls] = type(
            "CalibratedScale", (Calibrated, cls), {"plain_class": cls, "__module__": __name__}
        )
    return _CLASSES[cls]


def _blank(cls: type) -> Any:
    made = _calibrated(cls)
    return made.__new__(made)


def calibrate_(module: Any, name: str, scale: float, share: float) -> None:
    """Make a norm calibrated, in place, sharing its very Parameters; or change the numbers of one that is."""
    if not isinstance(module, Calibrated):
        facts = norm_facts(module, name)
        module.__class__ = _calibrated(type(module))
        module.facts = facts
    module.scale, module.share = float(scale), float(share)
