"""`load_nanogpt`: checkpoints of nanoGPT, loaded with every check that can be made.

They may be plain ones, or written by the runner in run.py.
"""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_plugin.errors import CheckpointError, ConfigError, UnsupportedModelError
from lip_plugin.integrations.nanogpt.checkout import CHECKPOINT, SETTINGS, inside
from lip_plugin.integrations.nanogpt.patch import Options, _retrofit


def load_nanogpt(path: str | Path, directory: str | Path) -> nn.Module:
    """Load the model of a ckpt.pt, in eval mode, on the CPU.

    A `lipschitz.json` beside the checkpoint says that it was trained under the constraint, and with
    which options.

    Args:
        path: the ckpt.pt, or the folder that holds it.
        directory: a nanoGPT checkout. Its `model.py` has the code of the model, and is imported.

    Raises:
        ConfigError: `directory` is no checkout.
        UnsupportedModelError: its `model.py` is not nanoGPT's.
        CheckpointError: a file is missing or truncated, or does not fit the model that it
            describes.
    """
    path, folder = Path(path), Path(directory).resolve()
    path = path / CHECKPOINT if path.is_dir() else path
    if not (folder / "model.py").is_file():
        raise ConfigError(
            f"{folder} has no model.py: --nanogpt-dir takes the folder of a nanoGPT checkout."
        )
    stored, options = _read(path), _settings(path.with_name(SETTINGS))
    with inside(folder, ["model.py"]):
        module = importlib.import_module("model")
    if not hasattr(module, "GPT") or not hasattr(module, "GPTConfig"):
        raise UnsupportedModelError(
            f"{folder / 'model.py'} has no GPT and GPTConfig: that is not nanoGPT."
        )
    try:
        model = module.GPT(module.GPTConfig(**stored["model_args"]))
    except (TypeError, ValueError, AssertionError, RuntimeError) as error:
        raise CheckpointError(
            f"{path}: its model_args describe no GPT of {folder}: {error}"
        ) from error
    if options is not None:
        _retrofit(model, options.config)
    weights = {k.removeprefix("_orig_mod."): v for k, v in stored["model"].items()}
    try:
        model.load_state_dict(weights, strict=True)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not fit its own model_args and {SETTINGS}: {error}"
        ) from error
    return model.eval()


def _read(path: Path) -> dict[str, Any]:
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist.") from error
    except Exception as error:  # an unpickler may raise any exception when it reads garbage
        raise CheckpointError(f"{path} is truncated or no checkpoint: copy it anew.") from error
    if not isinstance(stored, dict) or not {"model", "model_args"} <= stored.keys():
        raise CheckpointError(f"{path} is not nanoGPT's: it has no 'model' and 'model_args'.")
    return stored


def _settings(path: Path) -> Options | None:
    if not path.exists():
        return None
    try:
        return Options.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, AttributeError) as error:  # ConfigError is a ValueError
        raise CheckpointError(
            f"{path} cannot be read: {error}. Restore the one written with {CHECKPOINT}."
        ) from error
