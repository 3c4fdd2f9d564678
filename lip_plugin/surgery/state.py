"""The record that a retrofit leaves on a model, and the functions that find it again.

A retrofitted model carries its config and its architecture as a plain attribute of its root module.
The other files ask for them through the functions here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.distributed.owners import settle_
from lip_plugin.errors import NotRetrofittedError, UnsupportedModelError
from lip_plugin.face import require_module
from lip_plugin.model.adapters import layer_wrappers
from lip_plugin.model.architecture import Architecture

_MARK = "lip_retrofit"


@dataclass(frozen=True)
class RetrofitState:
    """The record of a retrofit: the config, and the architecture that the model was taken for.

    It is a plain attribute of the model's root module.
    """

    config: LipschitzConfig
    architecture: Architecture


def set_state(root: nn.Module, state: RetrofitState) -> None:
    """Write the record onto the model's root module."""
    root.__dict__[_MARK] = state


def find_retrofit(model: nn.Module) -> tuple[nn.Module, RetrofitState] | None:
    """Find the retrofitted model inside `model`, whatever wraps it.

    Returns:
        (root, state), or None if there is no retrofitted model.

    Raises:
        UnsupportedModelError: there are several, so it is not clear which one is meant.
    """
    found = [module for module in model.modules() if is_retrofitted(module)]
    if len(found) > 1:
        kinds = ", ".join(type(module).__name__ for module in found[:3])
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} retrofitted models ({kinds}). Pass the one "
            "that is meant."
        )
    return (found[0], found[0].__dict__[_MARK]) if found else None


def is_retrofitted(module: nn.Module) -> bool:
    """Whether this very module is the root of a retrofitted model."""
    return isinstance(module.__dict__.get(_MARK), RetrofitState)


def config_of(model: nn.Module) -> LipschitzConfig:
    """The LipschitzConfig that a model was retrofitted with, with every default written out.

    Raises:
        NotRetrofittedError: the model was never retrofitted.
    """
    require_module(model, "config_of")
    return require_retrofit(model)[1].config


def require_retrofit(model: nn.Module) -> Any:
    """The (root, state) of the retrofitted model inside `model`.

    If the model is sharded, its modules hold the sharded parameters when this returns.

    Raises:
        NotRetrofittedError: there is no retrofitted model inside.
    """
    found = find_retrofit(model)
    if found is None:
        raise NotRetrofittedError(
            f"{type(model).__name__} has no constrained layer. Call retrofit(model, "
            "LipschitzConfig(...)) first. (Adapters of peft on an untouched base: "
            "constrain_adapters(model, budget=...).)"
        )
    settle_(model)
    return found


def constraints_of(model: nn.Module) -> tuple[nn.Module, LipschitzConfig]:
    """The (root, config) of a model that has caps, or budgets on its adapters, or both.

    A model with budgets that was never retrofitted is its own root, and its config is the default.

    Raises:
        NotRetrofittedError: the model has neither caps nor budgets.
    """
    require_module(model, "this")
    if find_retrofit(model) is None and any(wrapper.holds(model) for wrapper in layer_wrappers()):
        settle_(model)
        return model, LipschitzConfig()
    root, state = require_retrofit(model)
    return root, state.config
