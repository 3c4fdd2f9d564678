"""last_checkpoint(folder): the newest checkpoint of a Trainer that was written to its end."""

from __future__ import annotations

import json
import logging
import zipfile
from pathlib import Path

from lip_plugin.errors import CheckpointError
from lip_plugin.integrations.hf_shards import Shards

logger = logging.getLogger(__name__)


def last_checkpoint(folder: str | Path) -> str | None:
    """For `trainer.train(resume_from_checkpoint=...)`: the newest complete `checkpoint-N` in `folder`; None without any.

    Trainer writes into the folder itself, so a process that is killed while it saves leaves a part of a checkpoint, which
    transformers' own get_last_checkpoint would choose. Here every file has to be whole: safetensors of the stated
    length, torch files with the directory at their end, and trainer_state.json, which Trainer writes last.
    Sharded checkpoints of accelerate's FSDP are taken by the same rule, file by file.
    """
    found = [p for p in Path(folder).glob("checkpoint-*") if p.name[11:].isdecimal()]
    for path in sorted(found, key=lambda p: -int(p.name[11:])):
        torn = _torn(path)
        if torn is None:
            return str(path)
        logger.warning("%s is not complete (%s): passed over", path, torn)
    return None


def _torn(path: Path) -> str | None:
    """The first file that is missing or cut off; None if all are whole."""
    state = path / "trainer_state.json"
    try:
        json.loads(state.read_text())
    except (OSError, ValueError):
        return state.name
    for file in sorted(path.rglob("*.pt")) + sorted(path.rglob("*.pth")) + sorted(path.rglob("*.bin")):
        if not zipfile.is_zipfile(file):
            return file.name
    if (path / "config.json").is_file() and any(path.glob("*.safetensors*")):
        try:
            Shards(path)
        except CheckpointError as error:
            return str(error)
    return None
