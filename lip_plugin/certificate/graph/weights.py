"""Linear maps of a model: what a module really multiplies with, as nodes whose weights are read when needed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lip_plugin.certificate.graph.nodes import Linear
from lip_plugin.errors import UnsupportedModelError
from lip_plugin.model.adapters import dequantized, layer_wrappers, runs_inside
from lip_plugin.model.layers import is_linear, is_patches, is_transposed, rows_of


def read_linear(module: Any, name: str) -> tuple[Any, Callable[[], Tensor]]:
    """(plain linear module, reader of the weight it multiplies with, in the plain module's storage)."""
    module = runs_inside(module)
    _refuse_computed(module, name)
    if is_linear(module):
        return module, lambda: module.weight
    if is_patches(module):
        return module, lambda: module.weight.flatten(1)
    read: Any
    if dequantized(module) is not None:
        read = partial(dequantized, module)
        return module, read
    base = getattr(module, "base_layer", None)
    plain = base is not None and (is_linear(base) or dequantized(base) is not None)
    for wrapper in layer_wrappers() if plain else ():
        if wrapper.weight(module) is not None:
            return base, partial(wrapper.weight, module)
    raise UnsupportedModelError(
        f"{name} is {type(module).__module__}.{type(module).__name__}: what it computes has no proven "
        "rule here. Merge adapters (merge_and_unload) or take the wrapper off, then certify."
    )


def _refuse_computed(module: Any, name: str) -> None:
    """Raise UnsupportedModelError for a weight that is no Parameter but computed before each forward."""
    base = getattr(module, "base_layer", module)
    weight = getattr(base, "weight", None)
    if (
        isinstance(weight, Tensor)
        and "weight" not in base._parameters
        and "weight_orig" in base._parameters
    ):
        raise UnsupportedModelError(
            f"{name} is pruned: its weight is computed from weight_orig at every forward. Make it permanent first: "
            f"torch.nn.utils.prune.remove(model.{name}, 'weight')."
        )
    if isinstance(weight, Tensor) and "weight" not in base._parameters:
        raise UnsupportedModelError(
            f"{name}'s weight is no Parameter: it is computed at every forward (weight_norm, parametrize). Remove the "
            "parametrization first."
        )


Reader = Callable[[], Any]


def maps_of(
    root: nn.Module, role: str, name: str, interleaved: int | None
) -> list[tuple[str, str, Reader, Reader]]:
    """(role, node's name, reader of its weight, of its bias) of each map in a module, as stored.

    A fused gate and up are two maps. Rows of `interleaved` heads are put in the order q, k, v.
    """
    base, weight = read_linear(root.get_submodule(name), name)
    dim = 1 if is_transposed(base) else 0
    rows = rows_of(base)

    def bias() -> Tensor | None:
        return getattr(base, "bias", None)

    def select(index: Tensor) -> tuple[Reader, Reader]:
        def picked() -> Tensor | None:
            b = bias()
            return None if b is None else b[index.to(b.device)]

        return lambda: weight().index_select(dim, index.to(base.weight.device)), picked

    if role == "gate_up":
        halves = torch.arange(rows).chunk(2)
        return [
            (r, f"{name}[{r}]", *select(i)) for r, i in zip(("gate", "up"), halves, strict=True)
        ]
    if role == "qkv" and interleaved:
        order = torch.arange(rows).view(interleaved, 3, -1).transpose(0, 1).flatten()
        return [(role, name, *select(order))]
    return [(role, name, weight, bias)]


def linears_of(
    root: nn.Module, role: str, name: str, interleaved: int | None = None
) -> list[Linear]:
    """Nodes of the maps in a module: one, or gate and up of a fused one. Raises UnsupportedModelError (see `read_linear`)."""
    base, _ = read_linear(root.get_submodule(name), name)
    transposed = is_transposed(base)
    found = []
    for _, node, weight, bias in maps_of(root, role, name, interleaved):
        d_out, d_in = weight().t().shape if transposed else weight().shape
        read = partial(_transposed, weight) if transposed else weight
        found.append(Linear(node, weight=read, bias=bias, d_out=int(d_out), d_in=int(d_in)))
    return found


def _transposed(weight: Reader) -> Tensor:
    return weight().t()


def linear_of(root: nn.Module, role: str, name: str, interleaved: int | None = None) -> Linear:
    """The node of a module that is one map."""
    return linears_of(root, role, name, interleaved)[0]
