"""What libraries put around single layers, or in their place.

Examples are adapters, quantized weights, and copies that are trained beside a layer. The core knows
none of these libraries. Each one that is understood registers a `LayerWrapper`, which says what
such a layer multiplies with, for the certificate, and how it is kept within caps, for the
optimizer.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn


@dataclass(frozen=True)
class BlockNorms:
    """The proven norms of the blocks of one weight, compared with their caps.

    Attributes:
        name: The full name of the layer.
        worst_over_cap: Proven upper bound of the largest norm / cap of a block. The norm is
            RMS->RMS, or for tables the RMS norm of a row.
        count: The number of blocks.
    """

    name: str
    worst_over_cap: float
    count: int


class LayerWrapper:
    """The layers of one library. A subclass overrides what it has something to say about.

    The methods here are those of a library that has nothing to say. Methods about a layer answer
    None, or "", for a layer that is not theirs. Methods about a model do nothing if it has no such
    layer.

    Attributes:
        kind: The name of the library's kind of layers.
    """

    kind = ""

    # ---- about one layer, for the certificate ----

    def runs(self, layer: nn.Module) -> nn.Module | None:
        """The plain layer inside that this layer runs now, if it does nothing else.

        An example is a copy that is trained beside a layer.
        """
        return None

    def weight(self, layer: nn.Module) -> Tensor | None:
        """What a layer with a `base_layer` multiplies with, stored like that layer's weight.

        Raises:
            UnsupportedModelError: The function of the layer is not that of one weight.
        """
        return None

    def dequantized(self, layer: nn.Module) -> Tensor | None:
        """The matrix [d_out, d_in] of a layer that does not store its weight as a matrix."""
        return None

    def facts(self, layer: nn.Module) -> str:
        """What the weight depends on besides Parameters, in plain text.

        Examples are which adapters are active, and their scaling.
        """
        return ""

    # ---- about a model, for caps and budgets ----

    def holds(self, model: nn.Module) -> bool:
        """Whether there is something to hold in a model that was never retrofitted.

        Budgets of adapters are such a thing.
        """
        return False

    def check(self, model: nn.Module) -> None:
        """Raise for whatever `project_` cannot keep, before anything is changed."""

    def project_(self, model: nn.Module, method: str, lr: float) -> int:
        """Bring every such layer within its caps and budgets.

        Returns:
            The number of blocks.
        """
        return 0

    def norms(self, model: nn.Module) -> list[BlockNorms]:
        """The proven norms of every such layer over its caps.

        A name that ends with " (change)" is about a budget.
        """
        return []


_WRAPPERS: dict[str, LayerWrapper] = {}


def register_layer_wrapper(wrapper: LayerWrapper) -> None:
    """Make a library's layers known. A wrapper of the same kind is replaced."""
    _WRAPPERS[wrapper.kind] = wrapper


def layer_wrappers() -> tuple[LayerWrapper, ...]:
    """All wrappers that are known now, in the order in which they were registered."""
    return tuple(_WRAPPERS.values())


def runs_inside(layer: nn.Module) -> nn.Module:
    """The layer that a wrapper runs in its place. For other layers it is the layer itself."""
    return next((found for w in layer_wrappers() if (found := w.runs(layer)) is not None), layer)


def dequantized(layer: nn.Module) -> Tensor | None:
    """The matrix [d_out, d_in] that a quantized layer multiplies with. None for other layers."""
    return next(
        (found for w in layer_wrappers() if (found := w.dequantized(layer)) is not None), None
    )


def wrapper_facts(layer: nn.Module) -> str:
    """What a wrapped layer's weight depends on besides Parameters. Empty for other layers."""
    return next((found for w in layer_wrappers() if (found := w.facts(layer))), "")
