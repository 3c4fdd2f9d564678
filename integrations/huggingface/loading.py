"""Saved Hugging Face models: loaded with every check that can be made, or streamed layer by layer.

`from_pretrained` is forgiving. It initializes what is missing, drops what it does not know, and
believes what config.json says. No proof can be based on that. Here a folder is read only if

- its files are whole,
- its keys are exactly those of the model,
- its config is the one that the model was retrofitted with.

Nothing is downloaded, and no code of a checkpoint is run.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.utils import logging as hf_logging

from lip_plugin.certificate.fingerprint import differences, settings_of
from lip_plugin.certificate.result import Certificate
from lip_plugin.certificate.streaming import Progress, certify_layers
from lip_plugin.config import LipschitzConfig
from lip_plugin.errors import CheckpointError, ConfigError, LipschitzError, UnsupportedModelError
from lip_plugin.integrations.huggingface.shards import (
    CONFIG,
    Shards,
    check_keys,
    first_line,
    read_json,
)
from lip_plugin.model.architecture import find_family
from lip_plugin.model.parts import parts
from lip_plugin.surgery.retrofit import retrofit

# The twin's number of tokens and width of MLPs. The code is the same at any size, and at full size
# these take most of the memory.
_TWIN_SIZES = {
    "vocab_size": 64,
    "intermediate_size": 128,
    "n_inner": 128,
    "ffn_dim": 128,
    "hidden_dim": 128,
}


def load_saved_model(folder: str | Path) -> nn.Module:
    """Load the model that save_pretrained or a Trainer has saved in `folder`.

    Returns:
        The model in eval mode, on the CPU, in its own dtype.

    Raises:
        CheckpointError: there is no model, a file is truncated, keys are missing or unexpected,
            shapes differ, or config.json is not the one that the model was retrofitted with.
        UnsupportedModelError: the family or architecture has no description.
    """
    shards = Shards(folder)
    config, cls = read_config(shards.folder)
    check_keys(shards, _skeleton(cls, config))
    try:
        with _quiet():
            model, info = cls.from_pretrained(
                str(shards.folder),
                output_loading_info=True,
                local_files_only=True,
                use_safetensors=True,
            )
    except LipschitzError:
        raise
    except (OSError, ValueError, RuntimeError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} cannot be loaded: {first_line(error)}") from error
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            raise CheckpointError(
                f"{folder} does not fit its config: {what} {sorted(map(str, info[what]))[:4]}"
            )
    check_recorded_settings(shards.folder, model)
    return model.eval()


def certify_streamed(
    folder: str | Path, source: str = "weights", *, progress: Progress = iter
) -> Certificate:
    """Compute `certify(load_saved_model(folder), source)` with the memory of one layer.

    If the head is larger than a layer, the memory of the head is needed.

    Args:
        folder: the folder of the saved model.
        source: `"weights"` or `"caps"`, as in `certify`.
        progress: wraps the list of groups of tensors, to show a progress bar, say.

    Raises:
        What `load_saved_model` and `certify` raise.
    """
    shards = Shards(folder)
    config, cls = read_config(shards.folder)
    skeleton = _skeleton(cls, config)
    shared = check_keys(shards, skeleton)
    check_recorded_settings(shards.folder, skeleton)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else None

    def read(name: str) -> Tensor:
        value = shards.read(next(n for n in shared[name] if n in shards.files))
        return value.to(dtype) if dtype is not None and value.is_floating_point() else value

    return certify_layers(skeleton, _twin(cls, config), read, source, progress)


def read_config(folder: Path) -> tuple[Any, Any]:
    """The (config, model class) of a saved model.

    The class is looked up in transformers by its name, so no code of the checkpoint is run.
    """
    values = read_json(folder / CONFIG)
    kind = values.get("model_type")
    try:
        config = AutoConfig.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(kind, str) and kind not in transformers.CONFIG_MAPPING:
            raise UnsupportedModelError(
                f"{folder}: model_type {kind!r} is not known to transformers."
            ) from error
        raise CheckpointError(
            f"{folder / CONFIG} is not a model's config: {first_line(error)}"
        ) from error
    names = values.get("architectures") or []
    name = names[0] if isinstance(names, list) and names else None
    cls = getattr(transformers, str(name), None)
    if not (isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)):
        raise UnsupportedModelError(
            f"{folder}: architecture {name!r} is not a model class of transformers. Save the model "
            "with save_pretrained."
        )
    if cls.config_class is not type(config):
        raise CheckpointError(
            f"{folder / CONFIG}: {name} is no model of model_type {kind!r}; restore it."
        )
    return config, cls


def check_recorded_settings(folder: Path, model: Any) -> None:
    """Raise CheckpointError if config.json is not what the model was retrofitted with.

    The retrofit has recorded the config's fields there; see LipschitzPersistenceConfig in
    saving.py.
    """
    recorded = (read_json(folder / CONFIG).get("quantization_config") or {}).get("settings") or {}
    wrong = differences(recorded, settings_of(model))
    if wrong:
        raise CheckpointError(
            f"{folder / CONFIG} disagrees with the retrofit that it records: "
            f"{'; '.join(wrong[:4])}. Restore it; if the change was meant, make it on the model "
            "before retrofit()."
        )


def _skeleton(cls: Any, config: Any) -> nn.Module:
    """The model on the meta device, retrofitted as from_pretrained would do it."""
    try:
        with torch.device("meta"):
            model = cls(copy.deepcopy(config))
    except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointError(
            f"{CONFIG} describes no {cls.__name__}: {first_line(error)}"
        ) from error
    saved = _saved_retrofit(config)
    if saved is not None:
        try:
            retrofit(model, saved, _loading=True)
        except ConfigError as error:
            raise CheckpointError(
                f"{CONFIG}: its retrofit does not fit its model: {error}"
            ) from error
    return model.eval()


def _saved_retrofit(config: Any) -> LipschitzConfig | None:
    found = getattr(config, "quantization_config", None)
    if not found:
        return None
    found = found if isinstance(found, dict) else found.to_dict()
    if "lipschitz" not in found:
        raise UnsupportedModelError(
            f"this model is quantized ({found.get('quant_method')}): its weights have no norms "
            "here. Load it dequantized."
        )
    try:
        return LipschitzConfig.from_saved(found["lipschitz"])
    except ConfigError as error:
        raise CheckpointError(f"{CONFIG}: its quantization_config was edited: {error}") from error


def _twin(cls: Any, config: Any) -> nn.Module:
    """A small random model of the same config, which runs the same code as the whole one.

    It has one layer of every kind, at least two layers, few tokens, and narrow MLPs.
    """
    small = copy.deepcopy(config)
    count = config.num_hidden_layers
    by_layer = {
        k: v for k, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == count
    }
    kinds: dict[str, int] = {}
    for i in range(count):
        kinds.setdefault(repr([v[i] for v in by_layer.values()]), i)
    chosen = sorted(kinds.values())
    chosen += [i for i in range(count) if i not in chosen][: max(0, 2 - len(chosen))]
    small.num_hidden_layers = len(chosen)
    for key, values in by_layer.items():
        setattr(small, key, [values[i] for i in chosen])
    for key, size in _TWIN_SIZES.items():
        if hasattr(small, key):
            setattr(small, key, size)
    padding = getattr(small, "pad_token_id", None)
    for key in [k for k in vars(small) if k.endswith("_token_id")]:
        setattr(small, key, None)
    # A classifier looks for the padding token, and roberta's positions begin behind its id.
    if padding is not None:
        small.pad_token_id = min(padding, _TWIN_SIZES["vocab_size"] - 1)
    small.dtype = torch.float32
    twin = cls(small)
    saved = _saved_retrofit(config)
    if saved is not None:
        # The twin lacks layers that the overrides may name. Caps do not change what it computes.
        plain = {**saved.to_dict(), "overrides": {}, "init": "keep"}
        if saved.norm_floors:
            plain["norm_floors"] = _floors_of(twin, chosen, saved.norm_floors)
        retrofit(twin, LipschitzConfig.from_dict(plain))
    return twin.eval()


def _floors_of(twin: nn.Module, chosen: list[int], floors: Mapping[str, float]) -> dict[str, float]:
    """The floors of the twin's norms. Its layer i is layer chosen[i] of the whole model."""
    architecture = find_family(twin).architecture
    found = {}
    for slot in parts(twin, architecture).norms():
        before, layers, rest = slot.partition(f"{architecture.layers}.")
        index, dot, leaf = rest.partition(".")
        found[slot] = floors[f"{before}{layers}{chosen[int(index)]}{dot}{leaf}" if layers else slot]
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings; what they would say becomes an error."""
    bars, level = hf_logging.is_progress_bar_enabled(), hf_logging.get_verbosity()
    hf_logging.disable_progress_bar()
    hf_logging.set_verbosity_error()
    try:
        yield
    finally:
        hf_logging.set_verbosity(level)
        if bars:
            hf_logging.enable_progress_bar()
