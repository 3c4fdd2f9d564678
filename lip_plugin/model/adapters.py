"""What libraries put around or in place of single layers: adapters, quantized weights, copies trained beside a layer.

The core knows none of them. Each library that is understood registers one `LayerWrapper`, which says what such a layer
multiplies with (for the certificate) and how it is kept within caps (for the optimizer).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class BlockNorms:
    """Proven upper bounds of one weight's blocks over their caps (RMS->RMS, or RMS for rows)."""

    name: str
    worst_over_cap: float
    count: int


class LayerWrapper:
    """One library's layers; the methods here are those of a library that has nothing to say.

    `kind` is its name. Methods about a layer answer None (or "") for a layer that is not theirs; methods about a model
    do nothing where it has no such layer.
    """

    kind = ""

    # ---- of one layer, for the certificate ----

    def runs(self, layer: nn.Module) -> nn.Module | None:
        """The plain layer inside that it runs now, where it does nothing else (a copy that is trained beside a layer)."""
        return None

    def weight(self, layer: nn.Module) -> Tensor | None:
        """What a layer with a `base_layer` multiplies with, stored like that layer's weight.

        Raises UnsupportedModelError for one whose function is not that of one weight.
        """
        return None

    def dequantized(self, layer: nn.Module) -> Tensor | None:
        """The matrix [d_out, d_in] that a layer multiplies with whose weight is not stored as one."""
        return None

    def facts(self, layer: nn.Module) -> str:
        """What the weight depends on besides Parameters (active adapters, their scaling), in plain text."""
        return ""

    # ---- of a model, for caps and budgets ----

    def holds(self, model: nn.Module) -> bool:
        """Whether there is something to hold in a model that was never retrofitted (budgets of adapters)."""
        return False

    def check(self, model: nn.Module) -> None:
        """Raise for what `project_` cannot keep, before anything is changed."""

    def project_(self, model: nn.Module, method: str, lr: float) -> int:
        """Bring every such layer within its caps and budgets; gives the number of blocks."""
        return 0

    def norms(self, model: nn.Module) -> list[BlockNorms]:
        """Proven norms of every such layer over its caps; a name "<layer> (change)" is about a budget."""
        return []


_WRAPPERS: dict[str, LayerWrapper] = {}


def register_layer_wrapper(wrapper: LayerWrapper) -> None:
    """Make a library's layers known; the same kind again replaces it."""
    _WRAPPERS[wrapper.kind] = wrapper


def layer_wrappers() -> tuple[LayerWrapper, ...]:
    """All that are known now, in the order in which they came."""
    return tuple(_WRAPPERS.values())


def runs_inside(layer: nn.Module) -> nn.Module:
    """The layer inside that a wrapper runs in its place; any other layer itself."""
    return next((found for w in layer_wrappers() if (found := w.runs(layer)) is not None), layer)


def dequantized(layer: nn.Module) -> Tensor | None:
    """The matrix [d_out, d_in] that a quantized layer multiplies with; None for any other layer."""
    return next(
        (found for w in layer_wrappers() if (found := w.dequantized(layer)) is not None), None
    )


def wrapper_facts(layer: nn.Module) -> str:
    """What a wrapped layer's weight depends on besides Parameters; empty for any other layer."""
    return next((found for w in layer_wrappers() if (found := w.facts(layer))), "")
