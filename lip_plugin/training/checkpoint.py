"""Checkpoints for your own training loop, on any number of processes, with a certificate.

    step = load_checkpoint("run", model, optimizer) or 0
    save_checkpoint("run", step, model, optimizer)                # every so often

A folder `run/step-N` holds the weights, the state of the optimizer by the names of the parameters,
what else you passed, and `certificate.json` of these very weights.

A checkpoint is whole or not there. It is written under another name and renamed when it is
complete, and older ones are removed only after that. So a process that is killed at any moment
leaves the last good checkpoint. Tensors are written by torch.distributed.checkpoint, so a run of
two processes can go on with four, or with one.

The Trainer has its own checkpoints; see
lip_plugin.integrations.huggingface.resume.last_checkpoint.
"""

from __future__ import annotations

import os
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.optim import Optimizer

from lip_plugin.certificate.certify import certify
from lip_plugin.certificate.result import Certificate
from lip_plugin.distributed.gather import has_shards, together
from lip_plugin.distributed.owners import on_first, processes
from lip_plugin.errors import CheckpointError, ConfigError
from lip_plugin.face import require_module
from lip_plugin.surgery.state import require_retrofit

_NAME, _PARTIAL = "step-", ".partial-"
_REPLACED = ".replaced-"  # an earlier checkpoint of a step that is being written again
_CERTIFICATE, _LOOP = "certificate.json", "loop.pt"
# Keys of a parameter group that belong to the present model or optimizer, and are not saved.
_NOT_SAVED = ("params", "param_names", "layouts", "kind", "method")


def save_checkpoint(
    folder: str | Path,
    step: int,
    model: nn.Module,
    optimizer: Optimizer,
    extra: dict[str, Any] | None = None,
    *,
    keep: int = 2,
) -> Path:
    """Write the checkpoint `folder/step-N`, whole or not at all. Every process has to call it.

    Nothing in the model or the optimizer is changed.

    Args:
        folder: the folder of the run.
        step: how many optimizer steps the weights have taken.
        model: a retrofitted model: plain, under DDP, or sharded by FSDP2.
        optimizer: its optimizer, or accelerate's wrapper of it.
        extra: what else the loop needs, such as a scheduler's state_dict, made of plain python and
            tensors. That of the first process is kept.
        keep: how many complete checkpoints stay, at least 1. The oldest ones are removed after this
            one is complete.

    Returns:
        The path of the checkpoint.

    Raises, on every process:
        OSError: it could not be written (the disk is full, say). What was there before is as it
            was.
        ConfigError: the folder holds later steps, so they are of another run.
        CertificateError, NonFiniteError: the weights cannot be certified; nothing was written.
    """
    require_module(model, "save_checkpoint")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ConfigError(
            f"save_checkpoint(folder, step={step!r}, ...): how many steps were taken, 0 or more."
        )
    parent = Path(folder)
    target, partial = parent / f"{_NAME}{step}", parent / f"{_PARTIAL}{step}"
    certificate = certify(model) if has_shards(model) else on_first(lambda: certify(model))
    names, inner = _names(model), getattr(optimizer, "optimizer", optimizer)
    tensors, plain = _state(inner, names)

    def begin() -> None:
        later = [p for p in _complete(parent) if _step(p) > step]
        if later:
            raise ConfigError(
                f"{parent} holds {later[0].name}, of a later step than {step}, and the newest is "
                "what load_checkpoint takes. Give this run a folder of its own, or remove the "
                "later ones."
            )
        for left in parent.glob(f"{_PARTIAL}*"):
            shutil.rmtree(left, ignore_errors=True)
        partial.mkdir(parents=True)

    on_first(begin)
    root, _ = require_retrofit(model)
    try:
        _write({"model": root.state_dict(), "optimizer": tensors}, partial)
    except CheckpointException as error:  # torch raises it on all processes if one fails
        on_first(lambda: shutil.rmtree(partial, ignore_errors=True))
        causes = "; ".join(
            sorted({str(e[0] if isinstance(e, tuple) else e) for e in error.failures.values()})
        )
        raise OSError(
            f"{target} could not be written: {causes}. Earlier checkpoints are as they were."
        ) from error

    def finish() -> None:
        try:
            _save_through(partial / _LOOP, {"step": step, "extra": extra or {}, **plain})
            # The certificate is written last, because it says that the rest is there.
            _write_through(partial / _CERTIFICATE, certificate.to_json())
            _take_place(partial, target, parent / f"{_REPLACED}{step}")
        except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            shutil.rmtree(partial, ignore_errors=True)
            raise OSError(
                f"{target} could not be written: {error}. Earlier checkpoints are as they were."
            ) from error
        for old in _complete(parent)[max(1, keep) :]:
            _remove(old)

    on_first(finish)
    return target


def load_checkpoint(
    folder: str | Path, model: nn.Module, optimizer: Optimizer, extra: dict[str, Any] | None = None
) -> int | None:
    """Bring model and optimizer to the newest complete checkpoint in `folder`.

    Every process has to call it. Rates and other numbers are restored for each of the optimizer's
    groups. Caps stay the model's own.

    Args:
        folder: the folder of the run.
        model: retrofitted like the model that was saved, except for its caps, on any number of
            processes.
        optimizer: its optimizer, or accelerate's wrapper of it.
        extra: a dictionary whose values are replaced by those that `save_checkpoint` was given, for
            the keys that it has.

    Returns:
        The step of the checkpoint, or None if there is none.

    Raises, on every process:
        CheckpointError: the checkpoint does not fit the model.
        CertificateError: the certificate beside the weights belongs to other weights.
    """
    require_module(model, "load_checkpoint")
    found = on_first(lambda: _complete(Path(folder)))
    if not found:
        return None
    newest = found[0]
    names, inner = _names(model), getattr(optimizer, "optimizer", optimizer)
    loop = torch.load(newest / _LOOP, weights_only=True, map_location="cpu")
    root, _ = require_retrofit(model)
    state = {"model": root.state_dict(), "optimizer": _room_for(newest, inner, names)}
    try:
        _read(state, newest)
    except (CheckpointException, KeyError, ValueError, RuntimeError) as error:
        raise CheckpointError(
            f"{newest} does not fit this model and optimizer: {error}. Build both as they were "
            "when it was written."
        ) from error
    _restore(inner, names, state["optimizer"], loop)
    together(model, Certificate.from_json((newest / _CERTIFICATE).read_text()).verify)
    for key in extra or {}:
        if key in loop["extra"]:
            extra[key] = loop["extra"][key]  # type: ignore[index]
    return int(loop["step"])


def _names(model: nn.Module) -> dict[int, str]:
    """The names of the parameters by their ids, without the prefixes of wrappers."""
    return {id(p): name for name, p in require_retrofit(model)[0].named_parameters()}


def _state(optimizer: Optimizer, names: dict[int, str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split the optimizer's state into tensors by "parameter/key", and the rest as plain python."""
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, Any] = {}
    for p, values in optimizer.state.items():
        for key, value in values.items():
            home = tensors if isinstance(value, Tensor) else numbers
            home[f"{names[id(p)]}/{key}"] = value
    groups = [{k: v for k, v in g.items() if k not in _NOT_SAVED} for g in optimizer.param_groups]
    return tensors, {"numbers": numbers, "groups": groups}


def _room_for(checkpoint: Path, optimizer: Optimizer, names: dict[int, str]) -> dict[str, Tensor]:
    """Empty tensors to load the optimizer's state into, each placed like its parameter."""
    stored = dcp.FileSystemReader(checkpoint).read_metadata().state_dict_metadata
    params = {
        names[id(p)]: p for g in optimizer.param_groups for p in g["params"] if id(p) in names
    }
    room: dict[str, Tensor] = {}
    for name, meta in stored.items():
        kind, _, key = name.partition(".")
        parameter = params.get(key.rpartition("/")[0])
        if kind != "optimizer" or parameter is None or not isinstance(meta, TensorStorageMetadata):
            continue
        if meta.size == parameter.shape:
            room[key] = torch.zeros_like(
                parameter, dtype=meta.properties.dtype, requires_grad=False
            )
        else:  # it is a step count
            room[key] = torch.zeros(meta.size, dtype=meta.properties.dtype)
    return room


def _restore(
    optimizer: Optimizer, names: dict[int, str], tensors: dict[str, Tensor], loop: dict[str, Any]
) -> None:
    by_name: dict[str, dict[str, Any]] = {}
    for name, value in {**loop["numbers"], **tensors}.items():
        parameter, _, key = name.rpartition("/")
        by_name.setdefault(parameter, {})[key] = value
    if len(loop["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint's optimizer has {len(loop['groups'])} groups of parameters, and this "
            f"one {len(optimizer.param_groups)}. Build it as it was."
        )
    plain = optimizer.state_dict()
    params = [p for g in optimizer.param_groups for p in g["params"]]
    numbers = [i for g in plain["param_groups"] for i in g["params"]]
    groups = [
        {**now, **saved} for now, saved in zip(plain["param_groups"], loop["groups"], strict=True)
    ]
    state = {
        i: by_name[names[id(p)]]
        for i, p in zip(numbers, params, strict=True)
        if names.get(id(p)) in by_name
    }
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def _write(state: dict[str, Any], folder: Path) -> None:
    planner = DefaultSavePlanner(dedup_save_to_lowest_rank=True)  # the first replica saves it all
    with warnings.catch_warnings():  # torch warns that it assumes one process, which is right
        warnings.simplefilter("ignore")
        dcp.save(state, checkpoint_id=folder, planner=planner, no_dist=processes() == 1)


def _read(state: dict[str, Any], folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=processes() == 1)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _complete(parent: Path) -> list[Path]:
    """The complete checkpoints, the newest first.

    The certificate is the last file that is written, so a checkpoint with it is complete.
    """
    found = [
        p
        for prefix in (_NAME, _REPLACED)
        for p in parent.glob(f"{prefix}*")
        if p.name[len(prefix) :].isdecimal() and (p / _CERTIFICATE).is_file()
    ]
    return sorted(found, key=lambda p: (_step(p), p.name.startswith(_NAME)), reverse=True)


def _take_place(partial: Path, target: Path, aside: Path) -> None:
    """Rename the finished checkpoint to its final name.

    An earlier checkpoint of the same step is set aside under a name that still counts, until the
    new one is in its place.
    """
    if target.exists():
        _remove(aside)
        os.replace(target, aside)
    os.replace(partial, target)
    _remove(aside)


def _remove(folder: Path) -> None:
    """Remove a checkpoint.

    Its certificate goes first, so that a half-removed checkpoint does not count as complete.
    """
    (folder / _CERTIFICATE).unlink(missing_ok=True)
    shutil.rmtree(folder, ignore_errors=True)


def _save_through(path: Path, value: Any) -> None:
    with path.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())


def _write_through(path: Path, text: str) -> None:
    """Write a text and wait until the disk has it.

    Otherwise the rename of the folder could reach the disk before the file does.
    """
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
