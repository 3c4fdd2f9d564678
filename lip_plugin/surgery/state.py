"""What a retrofitted model remembers of it. Nobody else reads the mark."""

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
    """What a retrofitted model remembers of it (a plain attribute of its root module)."""

    config: LipschitzConfig
    architecture: Architecture


def set_state(root: nn.Module, state: RetrofitState) -> None:
    """Have the model's root remember this."""
    root.__dict__[_MARK] = state


def find_retrofit(model: nn.Module) -> tuple[nn.Module, RetrofitState] | None:
    """(root, state) of the retrofitted model inside `model`, whatever wraps it; None if there is none.

    Raises UnsupportedModelError if there are several: no call could be about all of them.
    """
    found = [module for module in model.modules() if is_retrofitted(module)]
    if len(found) > 1:
        kinds = ", ".join(type(module).__name__ for module in found[:3])
        raise UnsupportedModelError(
            f"{type(model).__name__} holds {len(found)} retrofitted models ({kinds}). Pass the one that is meant."
        )
    return (found[0], found[0].__dict__[_MARK]) if found else None


def is_retrofitted(module: nn.Module) -> bool:
    """Whether this very module is the root of a retrofitted model."""
    return isinstance(module.__dict__.get(_MARK), RetrofitState)


def config_of(model: nn.Module) -> LipschitzConfig:
    """The LipschitzConfig that a model was retrofitted with, every choice written out; raises NotRetrofittedError."""
    require_module(model, "config_of")
    return require_retrofit(model)[1].config


def require_retrofit(model: nn.Module) -> Any:
    """(root, state) of the retrofitted model inside, its weights settled; raises NotRetrofittedError."""
    found = find_retrofit(model)
    if found is None:
        raise NotRetrofittedError(
            f"{type(model).__name__} has no constrained layer. Call retrofit(model, LipschitzConfig(...)) first. "
            "(Adapters of peft on an untouched base: constrain_adapters(model, budget=...).)"
        )
    settle_(model)
    return found


def constraints_of(model: nn.Module) -> tuple[nn.Module, LipschitzConfig]:
    """(root, config) of a model with something to hold: retrofitted, or with budgets on its adapters, or both.

    A model that was never retrofitted is its own root, and its config the default. Raises NotRetrofittedError for any other.
    """
    require_module(model, "this")
    if find_retrofit(model) is None and any(wrapper.holds(model) for wrapper in layer_wrappers()):
        settle_(model)
        return model, LipschitzConfig()
    root, state = require_retrofit(model)
    return root, state.config
