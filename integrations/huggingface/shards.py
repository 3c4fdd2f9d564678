"""The files of a saved Hugging Face model, and the check that they hold exactly its tensors."""

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
    """The safetensors files of a saved model. Opening them checks that each one is whole.

    Attributes:
        folder: the folder of the model.
        files: the file that holds each tensor, by the tensor's name.
        shapes: the shape of each tensor, by its name.

    Raises:
        CheckpointError: there is no folder or no weights, or a file is missing or truncated.
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
                f"{self.folder} has no {WEIGHTS}. Weights of other formats are not read: load the "
                "model where it was made, and save it again with save_pretrained."
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
                f"{path} is missing, truncated or damaged ({first_line(error)}): copy the "
                "checkpoint anew."
            ) from error

    def rename(self, names: dict[str, str]) -> None:
        """Call the tensors by other names from now on.

        Args:
            names: the model's name of each tensor, by its name in the files.
        """
        self.files = {names[name]: path for name, path in self.files.items()}
        self.shapes = {names[name]: shape for name, shape in self.shapes.items()}
        self._stored = {new: old for old, new in names.items()}

    def read(self, name: str) -> Tensor:
        """Read one tensor.

        Its file is opened for it alone, so that nothing else stays in memory.
        """
        with self._open(self.files[name]) as file:
            return file.get_tensor(self._stored.get(name, name))


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file. Raises CheckpointError for anything else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, not an object.")
    return values


def _model_names(shards: Shards, skeleton: Any) -> dict[str, str]:
    """The model's name of each tensor, by its name in the files.

    from_pretrained maps names in the same way, because some families are saved under old names.
    Raises UnsupportedModelError for families whose tensors are cut or joined while they are loaded,
    and CheckpointError if two tensors would get one name.
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
                f"{stored} is not stored as {type(skeleton).__name__} keeps it (transformers "
                "converts it while loading). Load the whole model with from_pretrained, and call "
                "certify(model)."
            )
        names[stored] = name
    if len(set(names.values())) < len(names):
        twice = sorted(s for s, n in names.items() if list(names.values()).count(n) > 1)
        raise CheckpointError(
            f"{shards.folder} holds the same tensor under several names: {twice[:4]}. Restore it."
        )
    return names


def check_keys(shards: Shards, skeleton: nn.Module) -> dict[str, list[str]]:
    """Check that the files hold exactly the tensors of the model, in their shapes.

    The shards use the model's names afterwards.

    Args:
        shards: the files.
        skeleton: the model on the meta device.

    Returns:
        For each name in the model, all names of the same tensor. (Tied weights have several.)

    Raises:
        CheckpointError: a key is missing or unexpected, or a shape differs.
        UnsupportedModelError: transformers would cut or join the tensors while it loads them.
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
            f"the weights in {shards.folder} are not those of the {type(skeleton).__name__} in "
            f"{CONFIG}: {told}. The files belong to different models, or one was edited; a "
            "checkpoint of a base model or of adapters is loaded and saved again as a whole first."
        )
    for name, shape in shards.shapes.items():
        if shape != tuple(tensors[name].shape):
            raise CheckpointError(
                f"{name} is {list(shape)} in {shards.folder}, and {list(tensors[name].shape)} by "
                f"its {CONFIG}: one of the two was edited. Restore it."
            )
    return shared


def _hint(folder: Path) -> str:
    """Advice on a folder without a config: what is in it, and which folder to give."""
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
