"""Which rows of a linear map belong to which head of q, k and v.

Heads are usually capped one by one, so this file makes the layouts of linear maps.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from lip_plugin.errors import ConfigError, UnsupportedModelError
from lip_plugin.model.layers import (
    is_transposed,
    rows_of,
)
from lip_plugin.model.layout import RMS_TO_RMS, Layout, Segment, one_block
from lip_plugin.model.parts import LayerParts, Parts


def head_dim(model: nn.Module, layer: LayerParts, names: Parts) -> int:
    """The width of one attention head."""
    linears = layer.attention.linears
    module: Any = model.get_submodule(linears.get("qkv") or linears["q"])
    module = getattr(module, "base_layer", module)  # an adapter may wrap it
    rows = rows_of(module)
    total = names.n_heads + 2 * names.n_kv_heads if "qkv" in linears else names.n_heads
    return rows // total


def linear_layout(
    module: Any, role: str, cap: float, names: Parts, granularity: str, *, interleaved: bool = False
) -> Layout:
    """The blocks of one linear map, as a Layout with caps in the RMS->RMS norm.

    q, k and v are cut into heads, or are one block each. The gate and the up map of a fused
    `gate_up` are one block each. Every other map is one block.

    Args:
        module: The linear map.
        role: Its role: "q", "k", "v", "qkv", "gate_up", or another one.
        cap: The cap of each block.
        names: The parts of the model, for the numbers of heads.
        granularity: `"head"` or `"matrix"`, as in LipschitzConfig.
        interleaved: Whether the rows of a fused map are those of q, k and v head by head, as some
            families store the weight. (The weights in a certificate's graph have all rows of q
            first, then those of k, then those of v.)

    Raises:
        UnsupportedModelError: The rows do not fall into heads of equal size.
        ConfigError: granularity "matrix" for interleaved rows.
    """
    transposed = is_transposed(module)
    d_out = rows_of(module)
    heads = {"q": names.n_heads, "k": names.n_kv_heads, "v": names.n_kv_heads}
    roles = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}.get(role, (role,))
    if role == "gate_up":
        half = d_out // 2
        parts_ = tuple(Segment(r, i * half, 1, half, cap) for i, r in enumerate(roles))
        return Layout(RMS_TO_RMS, transposed, parts_)
    if role not in (*heads, "qkv"):
        return one_block(role, d_out, cap, transposed=transposed)
    total = sum(heads[r] for r in roles)
    if d_out % total:
        raise UnsupportedModelError(
            f"{role}: {d_out} rows do not fall into {total} heads of equal size."
        )
    d_head = d_out // total
    if interleaved and role == "qkv":
        if granularity != "head":
            raise ConfigError(
                "The rows of q, k and v are interleaved in the fused maps of "
                f"{names.architecture.name}, so none of them is one block of its weight. Use "
                "granularity='head'."
            )
        turns = [(h, r) for h in range(names.n_heads) for r in roles]
        one_each = [Segment(r, i * d_head, 1, d_head, cap) for i, (_, r) in enumerate(turns)]
        return Layout(RMS_TO_RMS, transposed, tuple(one_each))
    segments, start = [], 0
    for r in roles:
        count = heads[r] if granularity == "head" else 1
        rows = heads[r] * d_head
        segments.append(Segment(r, start, count, rows // count, cap))
        start += rows
    return Layout(RMS_TO_RMS, transposed, tuple(segments))
