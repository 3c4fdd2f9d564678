"""Checkpoints for a training loop of your own: whole or not there, on any number of processes, with a certificate.

    step = load_checkpoint("run", model, optimizer)               # None the first time
    save_checkpoint("run", step, model, optimizer)                # every so often

A folder `run/step-N` holds the weights, the optimizer's state, what else you gave, and `certificate.json` of these very
weights. It is written under another name and renamed when it is complete, and older ones are removed after that,
so a process that is killed at any moment leaves the last good one. The weights are written by torch.distributed.checkpoint:
a run of two processes goes on with four, or with one. Trainer has checkpoints of its own: see
lip_plugin.integrations.hf_trainer.last_checkpoint.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.optim import Optimizer

from lip_plugin.certificate.certify import Certificate, certify
from lip_plugin.distributed import on_first, processes
from lip_plugin.errors import CheckpointError

_NAME, _PARTIAL, _CERTIFICATE = "step-", ".partial-", "certificate.json"
_REPLACED = ".replaced-"  # what a step of the same number has just taken the place of


def save_checkpoint(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    extra: dict[str, Any] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Write `folder/step-N`, whole or not at all; collective. Returns it.

    Args:
        step: how many optimizer steps the weights have taken.
        model: retrofitted; plain, under DDP, or sharded by FSDP2.
        optimizer: its optimizer, or an accelerate wrapper of it.
        extra: what else the loop needs (a scheduler's state_dict, say), of plain python or tensors; the first
            process's is kept.
        keep: complete checkpoints that stay, at least 1: the oldest others are removed after this one is complete.

    Raises:
        OSError, on every process: it could not be written (a full disk). What was there before is as it was.
        CertificateError, NonFiniteError: the weights cannot be certified; nothing was written.
    """
    parent = Path(folder)
    target, partial = parent / f"{_NAME}{step}", parent / f"{_PARTIAL}{step}"
    certificate = certify(model)

    def begin() -> None:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)

    on_first(begin)
    try:
        _write(_state(model, optimizer, {"step": step, **(extra or {})}), partial)
    except CheckpointException as error:  # of any process, raised on all
        on_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        causes = "; ".join(
            sorted({str(e[0] if isinstance(e, tuple) else e) for e in error.failures.values()})
        )
        raise OSError(
            f"{target} could not be written: {causes}. Earlier checkpoints are as they were."
        ) from error

    def finish() -> None:
        try:
            _write_through(partial / _CERTIFICATE, certificate.to_json())
            aside = parent / f"{_REPLACED}{step}"
            if target.exists():  # an earlier attempt got as far: it counts until the new one is in its place
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(target, aside)
            os.replace(partial, target)
            shutil.rmtree(aside, ignore_errors=True)
        except OSError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        for old in _complete(parent)[max(1, keep) :]:
            shutil.rmtree(old, ignore_errors=True)

    on_first(finish)
    return target


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any] | None = None
) -> int | None:
    """Bring model and optimizer to the newest complete checkpoint in `folder`; its step, or None without any. Collective.

    Args:
        model: retrofitted with the config it was saved with; on any number of processes.
        extra: the dictionary given to `save_checkpoint`, or one with the same keys; its values are replaced.

    Raises:
        CheckpointError: the checkpoint does not fit the model.
        CertificateError: the certificate beside the weights belongs to others.
    """
    found = on_first(lambda: _complete(Path(folder)))
    if not found:
        return None
    newest = found[0]
    state = _state(model, optimizer, {"step": 0, **(extra or {})})
    try:
        _read(state, newest)
    except (CheckpointException, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{newest} does not fit this model and optimizer: {error}. Build both as they were when it was written."
        ) from error
    inner = getattr(optimizer, "optimizer", optimizer)
    set_state_dict(model, inner, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    Certificate.from_json((newest / _CERTIFICATE).read_text()).verify(model)
    for key in extra or {}:
        extra[key] = state["extra"][key]  # type: ignore[index]
    return int(state["extra"]["step"])


def _state(model: nn.Module, optimizer: Optimizer, extra: dict[str, Any]) -> dict[str, Any]:
    weights, moments = get_state_dict(model, getattr(optimizer, "optimizer", optimizer))
    return {"model": weights, "optimizer": moments, "extra": extra}


def _write(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():  # torch's, that one process is assumed: it is
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, no_dist=processes() == 1)


def _read(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=processes() == 1)


def _complete(parent: Path) -> list[Path]:
    """Complete checkpoints, the newest first. The certificate is the last file that is written."""
    found = [
        (int(p.name[len(prefix) :]), prefix == _NAME, p)
        for prefix in (_NAME, _REPLACED)
        for p in parent.glob(f"{prefix}*")
        if p.name[len(prefix) :].isdecimal() and (p / _CERTIFICATE).is_file()
    ]
    return [p for _, _, p in sorted(found, reverse=True)]


def _write_through(path: Path, text: str) -> None:
    """Write, and wait until the disk has it: a rename must not overtake what it names."""
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
