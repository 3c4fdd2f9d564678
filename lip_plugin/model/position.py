"""Attention by position: a bias on the logits that depends on head and offset only, learned or fixed.

It costs nothing in a certificate: a bias that does not depend on the input moves no logit. The module's
forward is not rewritten. It runs inside a mode that sees its one call of
`torch.nn.functional.scaled_dot_product_attention` and adds the bias to that call's mask; so it works in every
library that attends by that function, with and without KV cache, under compile and checkpointing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lip_plugin.errors import UnsupportedModelError

MAX_OFFSETS = (
    4096  # further tokens share the last entry, so the biases of any length lie in one range
)
_SLOT = "position_bias"


def alibi_slopes(heads: int) -> list[float]:
    """Slopes 2^(-8 (h+1) / H) of ALiBi's heads (arXiv 2108.12409, section 3), steepest first."""
    return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]


class OffsetBias(nn.Module):
    """Attention biases [heads, offsets]: `weight[h, o]` is added to the logit of a key o tokens back.

    Starts as ALiBi, -slope_h * o. Where attention is not causal, o is the distance to either side.

    Args:
        heads: query heads.
        offsets: entries of the table; the last one is that of every larger offset.
        content: False leaves q.k out: attention by position alone.
        causal: offsets are counted backwards.
    """

    def __init__(
        self,
        heads: int,
        offsets: int,
        *,
        content: bool,
        causal: bool = True,
        like: Tensor | None = None,
    ) -> None:
        super().__init__()
        slopes = torch.tensor(alibi_slopes(heads))
        table = -slopes[:, None] * torch.arange(offsets)
        self.weight = nn.Parameter(table if like is None else table.to(like))
        self.content, self.causal = content, causal

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """Biases [heads, len(queries), len(keys)], or [batch, heads, ...] for queries [batch, queries]."""
        offset = queries.unsqueeze(-1) - keys
        offset = offset.clamp_min(0) if self.causal else offset.abs()
        table = self.weight[:, offset.clamp_max(self.weight.shape[1] - 1)]
        return table if queries.dim() == 1 else table.transpose(0, 1)

    def spread(self) -> float:
        """Largest difference of two biases of one head, rounded up: by so much position may part two logits."""
        table = self.weight.detach().double()
        return float((table.amax(1) - table.amin(1)).amax()) * (1 + 1e-15)

    def extra_repr(self) -> str:
        heads, offsets = self.weight.shape
        return f"heads={heads}, offsets={offsets}, content={self.content}, causal={self.causal}"


class _BiasedCall(TorchFunctionMode):
    """Adds the bias to calls of scaled_dot_product_attention; everything else passes."""

    def __init__(self, bias: OffsetBias, calls: list[int]) -> None:
        super().__init__()
        self.bias, self.calls = bias, calls

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is not nn.functional.scaled_dot_product_attention:
            return func(*args, **kwargs)
        self.calls.append(1)
        return biased_attention(self.bias, func, *args, **kwargs)


def biased_attention(
    bias: OffsetBias,
    attention: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`attention(query, key, value, ...)` with the bias in its mask; without content its weights at once.

    A query's position is its row's; behind a cache that of the last key it sees, or the last one without mask.
    While it decodes one token, transformers packs the query heads that share a key head as rows of it.
    """
    group = bias.weight.shape[0] // query.shape[-3]
    rows, columns = query.shape[-2] // group, key.shape[-2]
    if group > 1 and rows != 1:
        raise UnsupportedModelError(
            f"position biases of {bias.weight.shape[0]} heads met queries {tuple(query.shape)}: heads packed "
            "in a way not known here."
        )
    keys = torch.arange(columns, device=query.device)
    table = bias(_positions(attn_mask, is_causal, rows, keys), keys).to(query.dtype)
    if group > 1:
        table = table.unflatten(-3, (-1, group)).squeeze(-2)
    # finfo.min and not -inf: a row that sees nothing (padding) becomes uniform instead of nan
    lowest = torch.finfo(query.dtype).min
    if is_causal:
        mask = table.masked_fill(torch.arange(rows, device=keys.device)[:, None] < keys, lowest)
    elif attn_mask is None:
        mask = table
    elif attn_mask.dtype == torch.bool:
        mask = torch.where(attn_mask, table, lowest)
    else:
        mask = (table + attn_mask).clamp_min(lowest)
    if bias.content:
        mask = mask.expand(*query.shape[:-1], columns)
        return attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout_p,
            scale=scale,
            enable_gqa=enable_gqa,
        )
    weights = mask.softmax(-1, dtype=torch.promote_types(mask.dtype, torch.float32)).to(value.dtype)
    weights = nn.functional.dropout(weights, dropout_p) if dropout_p else weights
    if enable_gqa:
        value = value.repeat_interleave(query.shape[-3] // value.shape[-3], -3)
    return weights @ value


def _positions(attn_mask: Tensor | None, is_causal: bool, rows: int, keys: Tensor) -> Tensor:
    """Positions of the queries among the keys, [rows], or [batch, rows] where a mask tells."""
    columns = keys.shape[0]
    queries = torch.arange(rows, device=keys.device)
    if attn_mask is None or rows == columns:
        return queries if is_causal else queries + (columns - rows)
    seen = (
        attn_mask
        if attn_mask.dtype == torch.bool
        else attn_mask > torch.finfo(attn_mask.dtype).min / 2
    )
    return torch.where(seen, keys, 0).amax(-1)[:, 0, :rows]


class PositionBiased:
    """Mixin in front of an attention class: the same forward, its attention biased by `position_bias`."""

    position_bias: OffsetBias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        calls: list[int] = []  # not on the mode: compile does not give its attributes back
        with _BiasedCall(self.position_bias, calls):
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if len(calls) != 1:
            raise UnsupportedModelError(
                f"{type(self).__name__} called scaled_dot_product_attention {len(calls)} times, so its position biases are "
                'not what was asked for. Load the model with attn_implementation="sdpa".'
            )
        return output


_NAME = "PositionBiased/"


def __getattr__(name: str) -> Any:
    """The biased class of an attention class, by a name that pickle can look up: PositionBiased/module/Class."""
    if not name.startswith(_NAME):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    *path, leaf = name.removeprefix(_NAME).split("/")
    return _biased(getattr(importlib.import_module(".".join(path)), leaf))


def _biased(parent: type) -> type:
    name = _NAME + "/".join([*parent.__module__.split("."), parent.__name__])
    known = globals().get(name)
    if (
        known is None or known.__mro__[2] is not parent
    ):  # a reloaded module has another class of that name
        known = type(name, (PositionBiased, parent), {"__module__": __name__, "__qualname__": name})
        globals()[name] = known
    return known


def position_bias(module: nn.Module) -> OffsetBias | None:
    """The biases of an attention module; None without any."""
    return module.position_bias if isinstance(module, PositionBiased) else None


def set_position_bias_(module: nn.Module, bias: OffsetBias | None) -> None:
    """Give an attention module these biases, its class and forward else untouched; None takes them away."""
    if isinstance(module, PositionBiased):
        del module.position_bias
        module.__class__ = type(module).__mro__[2]
    if bias is not None:
        module.__class__ = _biased(type(module))
        setattr(module, _SLOT, bias)
