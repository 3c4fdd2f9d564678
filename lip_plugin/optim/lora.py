"""Steps of LoRA factors in LipschitzMuon, at rates that mean the same as the rate of a matrix.

A layer with an adapter computes with W0 + s B A. The rate lr of its factors is in RMS->RMS norm
per step of that sum, whatever rank, alpha and width are. `norm` is the spectral norm here:

    B <- B - lr sqrt(d_out/d_in) / (s norm(A)) orth(momentum of B)

moves s B A by at most lr in the RMS->RMS norm, each block of rows on its own, and

    A <- A - lr norm(A) orth(momentum of A)

moves it by at most lr times s norm(B) norm(A). The step of A is relative to A itself. If it were
measured by what it does to s B A, its rate would be infinite at B = 0, where adapters start.
norm(A) of the r x d_in matrix A is computed from its r x r Gram matrix.

LoRA+ (arXiv 2402.12354) asks for a much larger rate of B than of A, entry by entry. Here the ratio
follows from the shapes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.linalg.polar import orthogonalize
from lip_plugin.model.layers import Constrained
from lip_plugin.model.layout import Layout

KIND = "factors"


def adapter_pairs(model: nn.Module) -> Iterator[tuple[str, Any, nn.Parameter, nn.Parameter, float]]:
    """Find every LoRA adapter on a linear map that has something to train.

    peft's layers are recognized by their attributes, because the core does not import peft.

    Yields:
        (name, layer, A [r, d_in], B [d_out, r], s).
    """
    for name, module in model.named_modules():
        layer: Any = module
        for adapter, a in getattr(layer, "lora_A", {}).items() if hasattr(layer, "scaling") else ():
            b = layer.lora_B[adapter]
            if a.weight.dim() == 2 and (a.weight.requires_grad or b.weight.requires_grad):
                yield f"{name}.{adapter}", layer, a.weight, b.weight, float(layer.scaling[adapter])


def factor_group(model: nn.Module, lr: float, adapter_lr: float) -> dict[str, Any]:
    """Make the parameter group of all adapters.

    Returns:
        A group whose `params` are A, B, A, B, ... and whose `pairs` give (s, layout) for each A and
        B. The layout tells the blocks of the rows of B; it is None if the layer has none.
    """
    group: dict[str, Any] = {
        "params": [],
        "kind": KIND,
        "pairs": [],
        "lr": lr,
        "lr_ratio": adapter_lr / lr,
    }
    for name, layer, a, b, scale in adapter_pairs(model):
        base = layer.base_layer
        held = base.layout if isinstance(base, Constrained) else layer.__dict__.get("lip_budget")
        group["params"] += [(f"{name}.lora_A", a), (f"{name}.lora_B", b)]
        group["pairs"].append((scale, None if held is None else held.to_plain()))
    return group


def step_factors_(group: dict[str, Any], updates: dict[int, Tensor], dtype: Any) -> None:
    """Move the factors of a group by one step, in place.

    Args:
        group: as `factor_group` makes it.
        updates: the momentum of each parameter by the parameter's id, float32. Parameters without a
            gradient are left out.
        dtype: a function of an update that gives the dtype to orthogonalize it in.
    """
    rate = group["lr"] * group["lr_ratio"]
    if rate == 0:
        return
    params = group["params"]
    for (scale, plain), a, b in zip(group["pairs"], params[::2], params[1::2], strict=True):
        rows = a.detach().to(torch.promote_types(a.dtype, torch.float32))
        length = torch.linalg.eigvalsh(rows @ rows.T)[-1].clamp_min(0.0).sqrt()
        if id(b) in updates and scale:
            per_block = rate / abs(scale) / length.clamp_min(torch.finfo(length.dtype).tiny)
            # With A = 0 no step of B would change the product.
            per_block = torch.where(length > 0, per_block, 0.0)
            for update, block in _blocks(plain, updates[id(b)], b.detach()):
                step = orthogonalize(update, steps=group["steps"], dtype=dtype(update))
                size = per_block * math.sqrt(block.shape[-2] / a.shape[1])
                block.sub_((step * size).to(block.dtype))
        if id(a) in updates:
            step = orthogonalize(
                updates[id(a)][None], steps=group["steps"], dtype=dtype(updates[id(a)][None])
            )[0]
            a.sub_((step * (rate * length)).to(a.dtype))


def _blocks(plain: tuple | None, update: Tensor, b: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield (update, view of B), both [count, d_out, r], for each segment of the rows."""
    if plain is None:
        yield update[None], b[None]
        return
    for s in Layout.from_plain(plain).segments:
        at = slice(s.start, s.stop)
        yield update[at].unflatten(0, (s.count, s.d_out)), b[at].unflatten(0, (s.count, s.d_out))
