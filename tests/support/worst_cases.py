"""Hand-made weights and inputs that attain what attention can do, and the formula they break."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lip_plugin import retrofit
from tests.support.families import tiny
from tests.support.oracles import paper


def one_head_rows(d: int, d_head: int) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices q, k and v [d, d] of sigma_max 1, all of it in the first head.

    Queries map e1 to f1 and e2 to f2, keys e2 to f2 and e3 to f1, values e2 to f1. So tokens at
    +-e2 have opposite values and keys. A query at e1 weighs them equally, and is blind to itself.
    """
    q, k, v = (torch.zeros(d, d, dtype=torch.float64) for _ in range(3))
    q[0, 0] = q[1, 1] = 1.0
    k[1, 1] = k[0, 2] = 1.0
    v[0, 1] = 1.0
    return q, k, v


def worst_tokens(d: int, d_head: int, pairs: int, positive: bool = True) -> tuple[Tensor, Tensor]:
    """Inputs and a direction of token norm 1 that attain H + sqrt(1 + H^2).

    Both are [2 pairs + 1, d], and H = d / d_head.
    """
    heads, size = d / d_head, d**0.5
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(pairs)
    x, v = torch.zeros(2, 2 * pairs + 1, d, dtype=torch.float64)
    x[:-1, 1] = size * signs
    x[-1, 0] = size
    v[:-1, 1] = size / (1 + heads**2) ** 0.5  # all values move together
    v[:-1, 2] = size * signs * heads / (1 + heads**2) ** 0.5  # keys move apart
    v[-1, 1] = size
    return x, v if positive else -v


def one_head_gpt2(heads: int, width: int = 48) -> Any:
    """A GPT-2 of one layer with all of q, k and v in one head.

    Every norm is 1 or 0, and embeddings have RMS norm 1.
    """
    model: Any = tiny("gpt2", num_hidden_layers=1, hidden_size=width, num_attention_heads=heads)
    retrofit(model, paper(granularity="matrix", logit_scale=1.0))
    attention, mlp = model.transformer.h[0].attn, model.transformer.h[0].mlp
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        q, k, v = one_head_rows(width, width // heads)
        attention.c_attn.weight.copy_(torch.cat([q, k, v]).t())
        attention.c_proj.weight[0, 1] = (
            1.0  # f1 -> e2, where the query moves: the residual adds to it
        )
        assert not mlp.c_fc.weight.any()
        rows = model.lm_head.weight.shape[0]
        model.lm_head.weight[:width].copy_((rows / width) ** 0.5 * torch.eye(width))
        table = model.transformer.wte.weight
        table.copy_(torch.randn(table.shape, generator=torch.Generator().manual_seed(0)))
        table.div_(table.square().mean(-1, keepdim=True).sqrt())
    return model


def published_claim(model: Any) -> float:
    """What the published formula says of such a model.

    It takes whole-matrix norms and the constants of the recipe.

    L_attention = w v (1 + 2 q k) / 3, each block (1 - a) + a L with a = 1 / (2 layers), here on
    measured norms; the feed-forward block is zero and the head has norm 1.
    """
    layer = model.transformer.h[0]
    width = layer.attn.c_proj.weight.shape[0]
    q, k, v = layer.attn.c_attn.weight.detach().double().t().split(width)
    norm = {n: float(torch.linalg.matrix_norm(w, 2)) for n, w in (("q", q), ("k", k), ("v", v))}
    w = float(torch.linalg.matrix_norm(layer.attn.c_proj.weight.detach().double(), 2))
    attention = w * norm["v"] * (1 + 2 * norm["q"] * norm["k"]) / 3
    a = 0.5
    return ((1 - a) + a * attention) * (1 - a)


def layered_gpt2(heads: int, layers: int, width: int = 48) -> Any:
    """A GPT-2 of any depth with `one_head_rows` in every attention.

    Feed-forward parts are zero, and every norm is 1 or 0.
    """
    model: Any = tiny(
        "gpt2", num_hidden_layers=layers, hidden_size=width, num_attention_heads=heads
    )
    retrofit(model, paper(granularity="matrix", logit_scale=1.0))
    one = one_head_gpt2(heads, width)
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        for layer in model.transformer.h:
            for part in ("c_attn", "c_proj"):
                source = one.transformer.h[0].attn.get_submodule(part).weight
                layer.attn.get_submodule(part).weight.copy_(source)
        model.lm_head.weight.copy_(one.lm_head.weight)
        model.transformer.wte.weight.copy_(one.transformer.wte.weight)
    return model
