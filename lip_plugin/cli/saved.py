"""What lies in a folder: a saved model of any kind, the certificate beside it, the log of its run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from torch import nn

from lip_plugin.certificate.result import Certificate
from lip_plugin.errors import CertificateError, CheckpointError, ConfigError

CERTIFICATE, CHECKPOINT = "certificate.json", "ckpt.pt"


def folder_of(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def has_weights(folder: Path) -> bool:
    return any((folder / name).is_file() for name in ("config.json", CHECKPOINT))


def load(path: Path, nanogpt_dir: Path | None = None) -> nn.Module:
    """The model at the path, whole, with every check that its kind of checkpoint allows."""
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


def beside(path: Path) -> Certificate | None:
    """The certificate that was given, or lies beside the weights; None if there is none."""
    file = path if path.suffix == ".json" else folder_of(path) / CERTIFICATE
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.")
    if not file.is_file():
        return None
    try:
        return Certificate.from_json(file.read_text(encoding="utf-8"))
    except (CertificateError, UnicodeDecodeError) as error:
        raise CertificateError(f"{file}: {error}") from error


def model_of_run(run: Path) -> Path:
    """Where a run keeps its last model: itself, its folder `model`, or its last checkpoint."""
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
    """The Trainer's log: trainer_state.json of the newest place that has one, or metrics.json."""
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
