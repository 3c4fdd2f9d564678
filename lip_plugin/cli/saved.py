"""Find and read what the commands need from a folder.

A folder can hold a saved model of any known kind, the certificate beside it, and the log of the run
that made it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from lip_plugin.errors import CertificateError, CheckpointError, ConfigError
from lip_plugin.stated import Stated

if TYPE_CHECKING:
    from torch import nn

_S = TypeVar("_S", bound=Stated)

CERTIFICATE, CHECKPOINT = "certificate.json", "ckpt.pt"


def folder_of(path: Path) -> Path:
    """The path itself if it is a folder, and otherwise the folder around the file."""
    return path if path.is_dir() else path.parent


def has_weights(folder: Path) -> bool:
    """Whether a folder holds a saved model, of Hugging Face or of nanoGPT."""
    return any((folder / name).is_file() for name in ("config.json", CHECKPOINT))


def load(path: Path, nanogpt_dir: Path | None = None) -> nn.Module:
    """Load the whole model at the path, with every check that its kind of checkpoint allows.

    Args:
        path: a folder, or a file in it.
        nanogpt_dir: checkout of nanoGPT whose model.py made a ckpt.pt; other models need none.

    Raises:
        ConfigError: the model is nanoGPT's and its checkout was not given.
        CheckpointError: the path is a file that cannot be loaded by itself, or the model is broken.
    """
    folder = folder_of(path)
    if path.name == CHECKPOINT or (folder / CHECKPOINT).is_file():
        if nanogpt_dir is None:
            raise ConfigError(f"{path}: nanoGPT's model.py is needed: --nanogpt-dir DIR.")
        from lip_plugin.integrations.nanogpt.checkpoint import load_nanogpt

        return load_nanogpt(folder / CHECKPOINT, nanogpt_dir)
    if path.is_file() and path.suffix != ".json":
        raise CheckpointError(f"{path}: give the folder around it, with its config.json.")
    from lip_plugin.integrations.huggingface.loading import load_saved_model

    return load_saved_model(folder)


def beside(path: Path, kind: type[_S]) -> _S | None:
    """Read the certificate that was given, or the one that lies beside the weights.

    Args:
        path: a certificate, or a folder or file of a model.
        kind: the class to read it as, Stated or Certificate.

    Returns:
        The certificate, or None if there is none.

    Raises:
        CheckpointError: the path does not exist.
        CertificateError: the certificate was truncated or edited.
    """
    file = path if path.suffix == ".json" else folder_of(path) / CERTIFICATE
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if not file.is_file():
        return None
    try:
        return kind.from_json(file.read_text(encoding="utf-8"))
    except (CertificateError, UnicodeDecodeError) as error:
        raise CertificateError(f"{file}: {error}") from error


def model_of_run(run: Path) -> Path:
    """Find where a run keeps its last model: itself, its folder `model`, or its last checkpoint.

    Raises:
        CheckpointError: there is no model in any of these places.
    """
    if run.is_file() or has_weights(run):
        return run
    steps = [p for p in run.glob("checkpoint-*") if p.name[11:].isdecimal() and has_weights(p)]
    places = [run / "model", *sorted(steps, key=lambda p: -int(p.name[11:]))]
    for place in places:
        if has_weights(place):
            return place
    raise CheckpointError(
        f"{run} has no model: give a run's output folder, or a folder that save_pretrained wrote."
    )


def history(run: Path, model: Path) -> list[dict[str, Any]]:
    """Read the Trainer's log of a run.

    Args:
        run: output folder of the run.
        model: folder of its last model.

    Returns:
        The rows of the first file that there is: trainer_state.json beside the model or in the run,
        metrics.json in the run, trainer_state.json of the newest checkpoint. [] if there is none.

    Raises:
        CheckpointError: that file is not a log.
    """
    folder = run if run.is_dir() else run.parent
    newest = sorted(folder.glob("checkpoint-*/trainer_state.json"), key=lambda p: p.stat().st_mtime)
    for path in (
        model / "trainer_state.json",
        folder / "trainer_state.json",
        folder / "metrics.json",
        *newest[::-1],
    ):
        if path.is_file():
            try:
                values = json.loads(path.read_text(encoding="utf-8"))
                rows = values["log_history"] if isinstance(values, dict) else values
                return [row for row in rows if isinstance(row, dict)]
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise CheckpointError(
                    f"{path} is not a Trainer's log ({error}): restore or remove it."
                ) from error
    return []
