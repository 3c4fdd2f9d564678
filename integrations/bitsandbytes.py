"""What a bitsandbytes layer multiplies with: certificates and budgets for 4-bit bases (QLoRA).

A Linear4bit computes x @ dequantize(W)^T, with blocks of codes and their scales frozen: a plain linear map, whose
matrix is read here. A Linear8bitLt rounds its *input* to 8 bits as well (LLM.int8), so it is no linear map and not even
continuous: it is refused wherever something is to be proven. Nothing here imports bitsandbytes before it is needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.adapters import LayerWrapper, register_layer_wrapper


def dequantize(module: nn.Module) -> Tensor | None:
    """[d_out, d_in] of a bitsandbytes layer, in its compute dtype; None for any other module.

    Raises UnsupportedModelError for 8-bit layers, and for 4-bit ones that were not quantized yet.
    """
    cls, layer = type(module), module
    if not cls.__module__.startswith("bitsandbytes"):
        return None
    held: Any = layer
    if cls.__name__ == "Linear8bitLt":
        raise UnsupportedModelError(
            "Linear8bitLt rounds what enters it to 8 bits, so no Lipschitz constant exists. Load the base in 4 bits "
            "(BitsAndBytesConfig(load_in_4bit=True)) or unquantized."
        )
    if cls.__name__ not in ("Linear4bit", "LinearNF4", "LinearFP4"):
        return None
    if getattr(held.weight, "quant_state", None) is None:
        raise UnsupportedModelError(
            "A Linear4bit has no codes yet: it is quantized when it moves to a device. Call model.to(device) first."
        )
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(held.weight.data, held.weight.quant_state).detach()


class QuantizedLayers(LayerWrapper):
    """bitsandbytes' layers: read by the certificate, and kept by no projection, because their codes are frozen."""

    kind = "bitsandbytes"

    def dequantized(self, layer: nn.Module) -> Tensor | None:
        return dequantize(layer)


register_layer_wrapper(QuantizedLayers())
