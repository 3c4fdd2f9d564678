"""What a bitsandbytes layer multiplies with, for certificates and budgets on 4-bit bases (QLoRA).

A Linear4bit computes x @ dequantize(W)^T with frozen codes and scales. That is a plain linear map,
and its matrix is read here. A Linear8bitLt rounds its *input* to 8 bits as well (LLM.int8). It is
not linear and not even continuous, so it is refused wherever something is to be proven.

bitsandbytes is only imported when a layer of it is read.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.adapters import LayerWrapper, register_layer_wrapper


def dequantize(module: nn.Module) -> Tensor | None:
    """The weight [d_out, d_in] of a bitsandbytes layer, in its compute dtype.

    Returns:
        The weight, or None for any other module.

    Raises:
        UnsupportedModelError: the layer has 8 bits, or has 4 bits and was not quantized yet.
    """
    cls, layer = type(module), module
    if not cls.__module__.startswith("bitsandbytes"):
        return None
    held: Any = layer
    if cls.__name__ == "Linear8bitLt":
        raise UnsupportedModelError(
            "Linear8bitLt rounds what enters it to 8 bits, so no Lipschitz constant exists. Load "
            "the base in 4 bits (BitsAndBytesConfig(load_in_4bit=True)) or unquantized."
        )
    if cls.__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return None
    if getattr(held.weight, "quant_state", None) is None:
        raise UnsupportedModelError(
            "A Linear4bit has no codes yet: it is quantized when it moves to a device. Call "
            "model.to(device) first."
        )
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(held.weight.data, held.weight.quant_state).detach()


class QuantizedLayers(LayerWrapper):
    """bitsandbytes' layers. The certificate reads them; no projection changes frozen codes."""

    kind = "bitsandbytes"

    def dequantized(self, layer: nn.Module) -> Tensor | None:
        return dequantize(layer)


register_layer_wrapper(QuantizedLayers())
