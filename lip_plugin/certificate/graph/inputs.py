"""Are these inputs that the graph is about? Asked of token ids and pixels that users hand over."""

from __future__ import annotations

from typing import Any

import torch

from lip_plugin.certificate.graph.build import Graph
from lip_plugin.errors import ConfigError


def refuse_odd_inputs(graph: Graph, inputs: Any) -> None:
    """Raise ConfigError for inputs that the model was not built for.

    Args:
        graph: the graph of the model.
        inputs: token ids [batch, tokens], integers below the vocabulary's size, no padding among
            them, not longer than the positions reach; or pixels [batch, channels, height, width].
    """
    if not isinstance(inputs, torch.Tensor):
        raise ConfigError(f"inputs are a tensor of ids or pixels, not a {type(inputs).__name__}.")
    if inputs.numel() == 0:
        raise ConfigError("an empty batch has no predictions.")
    if graph.patches is not None:
        if tuple(inputs.shape[1:]) != tuple(graph.entry.image):
            wanted = ", ".join(map(str, graph.entry.image))
            raise ConfigError(
                f"pixels are [batch, {wanted}] for this model; got {tuple(inputs.shape)}."
            )
        return
    if inputs.dim() != 2:
        raise ConfigError(f"token ids are [batch, tokens]; got {tuple(inputs.shape)}.")
    if inputs.is_floating_point() or inputs.dtype == torch.bool:
        raise ConfigError(f"token ids are integers, not {inputs.dtype}.")
    rows, longest = graph.entry.tables["token"].rows().shape[0], graph.entry.longest
    low, high = (int(v) for v in inputs.aminmax())
    if low < 0 or high >= rows:
        wrong = low if low < 0 else high
        raise ConfigError(
            f"token ids lie in [0, {rows}), the rows of the embedding; got {wrong}. (-100 is for "
            "labels.)"
        )
    if longest is not None and inputs.shape[1] > longest:
        raise ConfigError(
            f"sequences of this model have at most {longest} tokens; got {inputs.shape[1]}."
        )
    graph.entry.refuse_padding(inputs)
