"""`last_checkpoint(folder)`: the newest checkpoint of a Trainer that was written to its end."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lip_plugin.errors import CheckpointError
from lip_plugin.integrations.huggingface.shards import Shards

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """Find the newest complete `checkpoint-N`, for `trainer.train(resume_from_checkpoint=...)`.

    The Trainer writes into the folder itself, so a process that is killed while it saves leaves a
    part of a checkpoint. transformers' own get_last_checkpoint would choose that one. Here every
    file has to be whole, as far as its end tells:

    - safetensors have the stated length,
    - torch files have the directory at their end,
    - JSON parses,
    - a checkpoint of torch.distributed.checkpoint has its .metadata,
    - trainer_state.json is there, which the Trainer writes last.

    Args:
        folder: the Trainer's output_dir.

    Returns:
        The path of the checkpoint, or None if none is complete.
    """
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdecimal()]
    for path in sorted(found, key=lambda p: -int(p.name[11:])):
        torn = _torn(path)
        if torn is None:
            return str(path)
        logger.warning("%s is not complete (%s): passed over", path, torn)
    return None


def _torn(path: Path) -> str | None:
    """The first thing in a checkpoint that is missing or cut off, or None if all is whole."""
    if not (path / "trainer_state.json").is_file():
        return "no trainer_state.json"
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        if not _whole(file):
            return file.name
    for folder in {p.parent for p in path.rglob("*.distcp")}:
        if not (folder / ".metadata").is_file():  # torch.distributed.checkpoint writes it last
            return f"{folder.name} without its .metadata"
    weights = (*path.glob("*model.safetensors*"), *path.glob("pytorch_model*"))
    if not weights:
        return "no weights"
    if (path / "config.json").is_file() and any(path.glob("model.safetensors*")):
        try:
            Shards(path)  # opens every part that the index names
        except CheckpointError as error:
            return str(error)
    kept = [any(path.glob(pattern)) for pattern in ("optimizer*", "scheduler.pt", "rng_state*.pth")]
    if any(kept) and not all(kept):  # with save_only_model there are none of them
        return "a part of optimizer, scheduler and random numbers"
    return None


def _whole(file: Path) -> bool:
    """Whether a file is whole, judged by what is at its end."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_text())
        elif file.suffix in (".pt", ".pth", ".bin"):
            return zipfile.is_zipfile(file)
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                pass
        elif file.suffix == ".distcp":
            return file.stat().st_size > 0
    except (OSError, ValueError, SafetensorError):
        return False
    return True
