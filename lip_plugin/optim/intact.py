"""Checks that a model is still the one that was retrofitted, and that its parameters are stepped.

They run when an optimizer is built or attached, and before each of its steps. Since the retrofit a
layer may have been replaced, pruned, tied again or given another Parameter. Without these checks it
would silently lose its cap, or would silently not train.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lip_plugin.distributed.owners import settle_
from lip_plugin.errors import ConfigError, UnsupportedModelError
from lip_plugin.model.architecture import families
from lip_plugin.model.layers import Constrained, RowParameter, constrained_modules, table_of
from lip_plugin.model.layout import ROW
from lip_plugin.model.parts import parts
from lip_plugin.surgery.state import find_retrofit

_AGAIN = (
    "Order: change the model first, then retrofit it, then build the optimizer. To go on from "
    "here: config = config_of(model); release(model); retrofit(model, config); and a new optimizer."
)


class Held:
    """The layers of a model that have to stay within caps or budgets, by name.

    Args:
        root: the model that was retrofitted, or that carries adapters with budgets.
    """

    def __init__(self, root: nn.Module) -> None:
        self._root = root
        found = find_retrofit(root)
        self._stepped: set[str] = set()  # names of the weights that the optimizer has had
        self._linears: list[str] = []
        self._tables: list[str] = []
        # Only a registered family's architecture describes the model by the names of its parts.
        if found is not None and found[1].architecture.name in families():
            names = parts(root, found[1].architecture)
            self._linears = [name for _, name in names.linears()]
            self._tables = [name for _, name in names.tables()]

    def check(self, groups: Iterable[Mapping[str, Any]], optimizer: str) -> None:
        """Raise unless every layer has its cap and a group holds each of its trainable weights.

        Args:
            groups: parameter groups of the optimizer, or of all optimizers together.
            optimizer: what messages call the optimizer.

        Raises:
            UnsupportedModelError: a layer is plain again, pruned, parametrized, or tied to another
                one.
            ConfigError: no group holds a trainable weight of a capped or adapted layer.
        """
        settle_(self._root)  # a sharded model then has the Parameters that an optimizer steps
        if self._linears and find_retrofit(self._root) is None:
            raise UnsupportedModelError(
                f"The model of this {optimizer} was released: it has no caps any more. Call "
                "retrofit(model, config) and build a new optimizer."
            )
        self._check_places()
        held = list(constrained_modules(self._root))
        _check_weights(held)
        kinds = {id(p): group.get("kind") for group in groups for p in group["params"]}
        for name, p in self._trained(held):
            if id(p) in kinds:
                self._stepped.add(name)
            elif p.requires_grad or name in self._stepped:
                raise ConfigError(
                    f"{name} is trainable and not among the parameters of this {optimizer}, so it "
                    "would never train. It was made or replaced after the optimizer was built "
                    "(retrofit() unties the head; get_peft_model adds adapters). Order: "
                    "retrofit(model), then get_peft_model if there are adapters, then the "
                    "optimizer from model.parameters(), then attach_projection(optimizer, model), "
                    "with a list of optimizers if several share the work; or freeze it."
                )
        for name, module in held:
            kind = kinds.get(id(module.weight))
            if kind not in (None, "row" if module.layout.norm == ROW else "matrix"):
                raise ConfigError(
                    f"{name}'s weight has a cap, and its group is of kind {kind!r}, which keeps "
                    f"none. Build the {optimizer} from the model, and leave `kind` as it is."
                )

    def _check_places(self) -> None:
        """Check that every described layer is constrained, or wrapped by an adapter."""
        for name in (*self._linears, *self._tables):
            module = (
                table_of(self._root, name)
                if name in self._tables
                else self._root.get_submodule(name)
            )
            if isinstance(module, RowParameter):
                held = module.layout is not None
            else:  # a layer with an adapter counts, because the adapter has checks of its own
                held = any(
                    isinstance(m, Constrained) or hasattr(m, "base_layer") for m in module.modules()
                )
            if not held:
                raise UnsupportedModelError(
                    f"{name} is a plain {type(module).__name__} now and has no cap: something "
                    f"replaced the layer after retrofit() (resize_token_embeddings does). {_AGAIN}"
                )

    def _trained(self, held: list[tuple[str, Any]]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yield (name, parameter) of weights with caps, and of what adapters add to layers."""
        for name, module in held:
            yield name if isinstance(module, RowParameter) else f"{name}.weight", module.weight
        for name, module in self._root.named_modules():
            if isinstance(getattr(module, "base_layer", None), nn.Module):
                for leaf, p in module.named_parameters():
                    if not leaf.startswith("base_layer."):
                        yield f"{name}.{leaf}", p


def _check_weights(held: list[tuple[str, Any]]) -> None:
    """Check that each weight is a Parameter of its layer, and of no other layer."""
    owners: dict[int, str] = {}
    for name, module in held:
        if isinstance(module, RowParameter):
            continue
        if "weight" not in module._parameters:
            pruned = "weight_orig" in module._parameters
            what = "pruned" if pruned else "parametrized"
            cure = (
                f"torch.nn.utils.prune.remove(model.{name}, 'weight')"
                if pruned
                else "remove the parametrization"
            )
            raise UnsupportedModelError(
                f"{name} is {what}: its weight is computed at every forward, so no projection can "
                f"hold it. Make it permanent first ({cure}), then build the optimizer; zeros that "
                "have to stay need a mask in your own loop."
            )
        other = owners.setdefault(id(module.weight), name)
        if other != name:
            raise UnsupportedModelError(
                f"{other} and {name} share one Parameter (tied again after retrofit()): their caps "
                f"are different. Give {name} its own: model.{name}.weight = "
                f"nn.Parameter(model.{name}.weight.detach().clone()), and build a new optimizer."
            )
