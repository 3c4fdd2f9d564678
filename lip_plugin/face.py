"""Errors for wrong arguments: what did the user pass, and what should be passed instead?

Public functions call `require_module` on what they get for the model. It tells common mistakes
apart by type, such as a path, a Trainer or a config, and names the cure for each.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from os import PathLike, fspath
from typing import Any

import torch
from torch import nn

from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import ConfigError


def require_module(model: Any, what: str) -> None:
    """Check that `model` is a torch module.

    Args:
        model: What a user passed for the model.
        what: The name of the function that was called, without brackets.

    Raises:
        ConfigError: It is no module. The message says what it is and what to pass.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"{what} takes the model: {_instead_of_a_model(model, what)}")


def _instead_of_a_model(given: Any, what: str) -> str:
    """A sentence that says what was given in place of a model, and how to get the model."""
    kind = type(given).__name__
    if kind == "RetrofitReport":
        return (
            "retrofit() changes the model in place and gives a report back. Pass the model that "
            "was retrofitted."
        )
    if isinstance(given, (str, PathLike)):
        path = fspath(given)
        return (
            f"{path!r} is a path. Load it first (AutoModelForCausalLM.from_pretrained(...), or "
            "lip_plugin.integrations.huggingface.loading.load_saved_model(...), which checks it "
            f"as well), or ask on the command line: lip-plugin certify {path}"
        )
    if isinstance(given, LipschitzConfig):
        return "this is a LipschitzConfig. The model comes first, as in retrofit(model, config)."
    if isinstance(given, torch.optim.Optimizer):
        return f"this is an optimizer ({kind}). Pass the model whose parameters it steps."
    if isinstance(given, type):
        return f"{given.__name__} is a class. Build the model first and pass what that gives."
    inner = getattr(given, "model", None)
    if isinstance(inner, nn.Module):
        owner = "trainer" if "Trainer" in kind else "its"
        return f"this is of type {kind}. Pass the model inside it: {owner}.model."
    if isinstance(given, Mapping):
        return (
            f"this is of type {kind}. A state_dict holds weights only: build the model and call "
            "its load_state_dict."
        )
    if isinstance(given, (list, tuple)) or hasattr(given, "__next__"):
        return f"this is of type {kind}. Call {what} with one model at a time, a torch.nn.Module."
    return (
        f"this is of type {kind}. Pass a torch.nn.Module, as from_pretrained or a model's class "
        "gives it."
    )


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for a misspelled name.

    Args:
        name: What the user wrote.
        known: The names that exist.

    Returns:
        A sentence that names the most similar known name, with a space in front, so that it can be
        appended to a message. It is empty if no name is similar.
    """
    found = get_close_matches(name, list(known), n=1)
    return f" Did you mean {found[0]!r}?" if found else ""
