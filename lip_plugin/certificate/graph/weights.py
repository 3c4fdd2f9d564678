"""The linear maps of a model, as nodes.

A module may not multiply with its `weight` alone. It may be wrapped by an adapter, quantized, or
computed at every forward. `read_linear` finds out what a module really multiplies with, or refuses
the module. The nodes made here read their weights each time they are needed.
"""

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
    """Find out what a linear module multiplies with.

    Args:
        module: the module at that place of the model, with an adapter around it or not.
        name: its name, for messages.

    Returns:
        The plain linear module, and a function that gives the weight. That weight is stored as the
        plain module's own is. A convolution's is flattened to a matrix.

    Raises:
        UnsupportedModelError: nothing is proven about what the module computes.
    """
    module = runs_inside(module)
    refuse_computed(getattr(module, "base_layer", module), name)
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
            read = partial(wrapper.weight, module)
            return base, read
    raise UnsupportedModelError(
        f"{name} is {type(module).__module__}.{type(module).__name__}: what it computes has no "
        "proven rule here. Merge adapters (merge_and_unload) or take the wrapper off, then certify."
    )


def refuse_computed(module: Any, name: str) -> None:
    """Raise UnsupportedModelError if a module's weight or bias is no Parameter.

    It is then computed before each forward (pruning, weight_norm), or held where neither an
    optimizer nor a fingerprint looks.
    """
    for leaf in ("weight", "bias"):
        if not isinstance(getattr(module, leaf, None), Tensor) or leaf in module._parameters:
            continue
        if f"{leaf}_orig" in module._parameters:
            raise UnsupportedModelError(
                f"{name} is pruned: its {leaf} is computed from {leaf}_orig at every forward. Make "
                f"it permanent first: torch.nn.utils.prune.remove(model.{name}, {leaf!r})."
            )
        raise UnsupportedModelError(
            f"{name}'s {leaf} is no Parameter: it is computed at every forward (weight_norm, "
            "parametrize), or held as a buffer. Remove the parametrization, or make it an "
            "nn.Parameter, first."
        )


Reader = Callable[[], Any]


def maps_of(
    root: nn.Module, role: str, name: str, interleaved: int | None
) -> list[tuple[str, str, Reader, Reader]]:
    """The maps in one module of a model, which are two for a fused gate and up and else one.

    Args:
        root: the model of a known family.
        role: what the module is: "q", "qkv", "out", "gate_up", "head" and so on.
        name: the module's full name.
        interleaved: the number of heads, if the module's rows are those of q, k and v head by head.
            They are then put in the order of all q, all k, all v. None leaves all rows in place.

    Returns:
        For each map its role, the name of its node, a function that gives its weight, and one that
        gives its bias. The weight is stored as the module's is.
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
    """The nodes of the maps in one module, see `maps_of`.

    Raises UnsupportedModelError as `read_linear` does.
    """
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
    """The node of a module that is one map. See `maps_of` for the arguments."""
    return linears_of(root, role, name, interleaved)[0]
