"""Attention by position: a bias on the logits that depends on head and offset only.

Such a bias does not depend on the input, so it moves no logit when the input moves, and costs
nothing in a certificate. It can be learned or fixed.

The attention module's forward is not rewritten. It runs inside a mode that sees its one call of
`torch.nn.functional.scaled_dot_product_attention`, and adds the bias to the mask of that call. So
it works in every library that attends by this function, with and without KV cache, under compile
and under checkpointing.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lip_plugin.errors import UnsupportedModelError

# Tokens that are further away share the last entry. So the biases lie in one range for any length.
MAX_OFFSETS = 4096
_SLOT = "position_bias"


def alibi_slopes(heads: int) -> list[float]:
    """The slopes 2^(-8 (h+1) / H) of ALiBi's heads, steepest first.

    Source: arXiv 2108.12409, section 3.
    """
    return [2.0 ** (-8.0 * (h + 1) / heads) for h in range(heads)]


class OffsetBias(nn.Module):
    """Attention biases: `weight[h, o]` is added to the logit of a key that is o tokens back.

    The table [heads, offsets] starts as ALiBi, -slope_h * o. If attention is not causal, o is the
    distance to either side.

    Args:
        heads: The number of query heads.
        offsets: The number of entries for each head. The last one is that of every larger offset
            too.
        content: False leaves q.k out, which is attention by position alone.
        causal: Whether offsets are counted backwards only.
        like: A tensor whose dtype and device the table takes. None takes torch's defaults.
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
        """The biases between queries and keys.

        Args:
            queries: Positions [queries], or [batch, queries].
            keys: Positions [keys].

        Returns:
            [heads, queries, keys], or [batch, heads, queries, keys].
        """
        offset = queries.unsqueeze(-1) - keys
        offset = offset.clamp_min(0) if self.causal else offset.abs()
        table = self.weight[:, offset.clamp_max(self.weight.shape[1] - 1)]
        return table if queries.dim() == 1 else table.transpose(0, 1)

    @property
    def learned(self) -> bool:
        """Whether the table is trained."""
        return self.weight.requires_grad

    def spread(self) -> float:
        """The largest difference of two biases of one head, rounded up.

        By so much the position alone can part two logits.
        """
        table = self.weight.detach().double()
        return float((table.amax(1) - table.amin(1)).amax()) * (1 + 1e-15)

    def extra_repr(self) -> str:
        heads, offsets = self.weight.shape
        return f"heads={heads}, offsets={offsets}, content={self.content}, causal={self.causal}"


class _BiasedCall(TorchFunctionMode):
    """Adds the bias to calls of scaled_dot_product_attention. All other calls pass unchanged."""

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
    """`attention(query, key, value, ...)` with the bias in its mask.

    Without content, the softmax of the mask gives the attention weights at once. Without a cache
    the position of a query is that of its row. Behind a cache it is that of the last key that the
    mask lets it see; without a mask the last query has the position of the last key. While it
    decodes one token, transformers packs the query heads that share a key head as rows of it. The
    biases are then packed alike.

    Args:
        bias: The biases.
        attention: scaled_dot_product_attention itself. The other arguments are its own.

    Returns:
        What `attention` returns.

    Raises:
        UnsupportedModelError: The heads are packed in a way that is not known here.
    """
    group = bias.weight.shape[0] // query.shape[-3]
    rows, columns = query.shape[-2] // group, key.shape[-2]
    if group > 1 and rows != 1:
        raise UnsupportedModelError(
            f"position biases of {bias.weight.shape[0]} heads met queries {tuple(query.shape)}: "
            "heads packed in a way not known here."
        )
    keys = torch.arange(columns, device=query.device)
    table = bias(_positions(attn_mask, is_causal, rows, keys), keys).to(query.dtype)
    if group > 1:
        table = table.unflatten(-3, (-1, group)).squeeze(-2)
    # This is finfo.min and not -inf, so that a row that sees nothing (padding) becomes uniform and
    # not nan.
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
    """Positions of the queries among the keys: [rows], or [batch, rows] if the mask tells them."""
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
    """Mixin in front of an attention class: the same forward, with biased attention."""

    position_bias: OffsetBias

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        # Calls are not counted on the mode, because compile does not give its attributes back.
        calls: list[int] = []
        with _BiasedCall(self.position_bias, calls):
            output = super().forward(*args, **kwargs)  # type: ignore[misc]
        if len(calls) != 1:
            raise UnsupportedModelError(
                f"{type(self).__name__} called scaled_dot_product_attention {len(calls)} times, "
                "so its position biases are "
                'not what was asked for. Load the model with attn_implementation="sdpa".'
            )
        return output


_NAME = "PositionBiased/"


def __getattr__(name: str) -> Any:
    """The biased class of an attention class, by a name that pickle can look up.

    The name is PositionBiased/module/Class, with one part for each part of the module's name.
    """
    if not name.startswith(_NAME):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    *path, leaf = name.removeprefix(_NAME).split("/")
    return _biased(getattr(importlib.import_module(".".join(path)), leaf))


# The biased class of an attention class. It is made once, and kept under its name in this module.
def _biased(parent: type) -> type:
    name = _NAME + "/".join([*parent.__module__.split("."), parent.__name__])
    known = globals().get(name)
    # A module that was reloaded has another class of the same name.
    if known is None or known.__mro__[2] is not parent:
        known = type(name, (PositionBiased, parent), {"__module__": __name__, "__qualname__": name})
        globals()[name] = known
    return known


def position_bias(module: nn.Module) -> OffsetBias | None:
    """The biases of an attention module. None without any."""
    return module.position_bias if isinstance(module, PositionBiased) else None


def set_position_bias_(module: nn.Module, bias: OffsetBias | None) -> None:
    """Give an attention module these biases, or take them away with None.

    Its class and forward are otherwise untouched.
    """
    if isinstance(module, PositionBiased):
        del module.position_bias
        module.__class__ = type(module).__mro__[2]
    if bias is not None:
        module.__class__ = _biased(type(module))
        setattr(module, _SLOT, bias)
