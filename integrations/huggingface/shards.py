"""The files of a saved Hugging Face model: whole, and with exactly the tensors of the model in its config."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming

from lip_plugin.certificate.fingerprint import stored_tensors
from lip_plugin.errors import CheckpointError, UnsupportedModelError

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"


class Shards:
    """The safetensors files of a saved model; opening them checks that each is whole.

    Raises CheckpointError: no folder, no weights, a shard that is missing or truncated.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise CheckpointError(
                f"{folder} is not a folder. Give one that save_pretrained or a Trainer wrote."
            )
        if not (self.folder / CONFIG).is_file():
            raise CheckpointError(f"{folder} has no {CONFIG}{_hint(self.folder)}")
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._stored: dict[str, str] = {}
        for path in self._paths():
            with self._open(path) as file:
                for name in file.keys():  # noqa: SIM118 (not a dict)
                    self.files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def _paths(self) -> list[Path]:
        if (self.folder / WEIGHTS).is_file():
            return [self.folder / WEIGHTS]
        if not (self.folder / INDEX).is_file():
            raise CheckpointError(
                f"{self.folder} has no {WEIGHTS}. Weights of other formats are not read: load the model where it was "
                "made, and save it again with save_pretrained."
            )
        index = read_json(self.folder / INDEX)
        names = index.get("weight_map")
        if not isinstance(names, dict):
            raise CheckpointError(
                f"{self.folder / INDEX} has no weight_map: copy the checkpoint anew."
            )
        return [self.folder / Path(name).name for name in sorted({str(v) for v in names.values()})]

    @contextmanager
    def _open(self, path: Path) -> Iterator[Any]:
        try:
            with safe_open(path, "pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise CheckpointError(
                f"{path} is missing, truncated or damaged ({first_line(error)}): copy the checkpoint anew."
            ) from error

    def rename(self, names: dict[str, str]) -> None:
        """Call tensors by other names from here on: {name in the files: name of the model's}."""
        self.files = {names[name]: path for name, path in self.files.items()}
        self.shapes = {names[name]: shape for name, shape in self.shapes.items()}
        self._stored = {new: old for old, new in names.items()}

    def read(self, name: str) -> Tensor:
        """One tensor; its file is opened for it alone, so that nothing else stays in memory."""
        with self._open(self.files[name]) as file:
            return file.get_tensor(self._stored.get(name, name))


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file; raises CheckpointError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def _model_names(shards: Shards, skeleton: Any) -> dict[str, str]:
    """{name in the files: name of the model's}, as from_pretrained maps them: some families are saved under old names.

    Raises UnsupportedModelError for families whose tensors are cut or joined on the way, and CheckpointError
    where two tensors would get one name.
    """
    conversions = get_model_conversion_mapping(skeleton)
    renamings = [c for c in conversions if isinstance(c, WeightRenaming)]
    converters = [c for c in conversions if not isinstance(c, WeightRenaming)]
    names = {}
    for stored in shards.files:
        name = stored
        for renaming in renamings:
            name = renaming.rename_source_key(name)[0]
        if any(converter.rename_source_key(name)[1] is not None for converter in converters):
            raise UnsupportedModelError(
                f"{stored} is not stored as {type(skeleton).__name__} keeps it (transformers converts it while "
                "loading). Load the whole model with from_pretrained, and call certify(model)."
            )
        names[stored] = name
    if len(set(names.values())) < len(names):
        twice = sorted(s for s, n in names.items() if list(names.values()).count(n) > 1)
        raise CheckpointError(
            f"{shards.folder} holds the same tensor under several names: {twice[:4]}. Restore it."
        )
    return names


def check_keys(shards: Shards, skeleton: nn.Module) -> dict[str, list[str]]:
    """All names of each stored tensor, by each of them; the shards then go by these names.

    Raises CheckpointError for keys or shapes that differ.
    """
    shards.rename(_model_names(shards, skeleton))
    tensors = stored_tensors(skeleton)
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors.items():
        groups.setdefault(id(tensor), []).append(name)
    shared = {name: groups[id(tensor)] for name, tensor in tensors.items()}
    missing = [n for n in tensors if not any(other in shards.files for other in shared[n])]
    unexpected = [n for n in shards.files if n not in tensors]
    if missing or unexpected:
        lists = {"missing": missing, "unexpected": unexpected}
        told = "; ".join(f"{len(v)} {k} ({', '.join(v[:3])})" for k, v in lists.items() if v)
        raise CheckpointError(
            f"the weights in {shards.folder} are not those of the {type(skeleton).__name__} in {CONFIG}: {told}. "
            "The files belong to different models, or one was edited; a checkpoint of a base model or of adapters is "
            "loaded and saved again as a whole first."
        )
    for name, shape in shards.shapes.items():
        if shape != tuple(tensors[name].shape):
            raise CheckpointError(
                f"{name} is {list(shape)} in {shards.folder}, and {list(tensors[name].shape)} by its {CONFIG}: one of the "
                "two was edited. Restore it."
            )
    return shared


def _hint(folder: Path) -> str:
    """What a folder without a config may want to say."""
    steps = [p for p in folder.glob("checkpoint-*") if (p / CONFIG).is_file()]
    if steps:
        last = max(
            steps, key=lambda p: int(p.name.rpartition("-")[2]) if p.name[11:].isdigit() else -1
        )
        return f", but {len(steps)} checkpoints inside: give one of them, {last}."
    if (folder / "model" / CONFIG).is_file():
        return f", but a model inside: give {folder / 'model'}."
    return ": give a folder that save_pretrained or a Trainer wrote."


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
