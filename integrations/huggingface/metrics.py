"""What LipschitzCallback logs and writes about a model in training.

There are certificates, norms over caps, activations and attention entropies; METRICS explains each
key. On a sharded model (FSDP2) every process has to call these functions, and the first one
computes.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lip_plugin.certificate.certify import certify
from lip_plugin.certificate.graph.attention import attentions
from lip_plugin.certificate.graph.base import Watch
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.result import Certificate
from lip_plugin.distributed.gather import together
from lip_plugin.distributed.owners import on_first
from lip_plugin.errors import (
    CertificateError,
    DistributedError,
    LipschitzError,
    UnsupportedModelError,
)
from lip_plugin.files import write_whole
from lip_plugin.model.adapters import BlockNorms
from lip_plugin.model.batches import measured_once
from lip_plugin.model.layers import constrained_modules
from lip_plugin.model.layout import ROW
from lip_plugin.model.normalization import steepest_norm
from lip_plugin.model.parts import parts
from lip_plugin.surgery.block_norms import block_norms
from lip_plugin.surgery.state import RetrofitState, find_retrofit

CERTIFICATE = "certificate.json"
logger = logging.getLogger(__name__)
# What an entry of the log is made of. Each part is measured when the run has time for it.
PARTS = ("caps", "weights", "seen")
METRICS = {
    "lip/certificate": "the certificate from the weights itself, where it is below 1.8e308",
    "lip/log10_certificate": (
        "log10 of the certificate from the weights as they are (embeddings -> logits)"
    ),
    "lip/certificate_caps": "the certificate from the caps itself, where it is below 1.8e308",
    "lip/log10_certificate_caps": (
        "log10 of the certificate from the caps alone: holds until a schedule changes them, but "
        "for biases, and as long as lip/worst_norm_over_cap is at most 1.001"
    ),
    "lip/radius": "proven token norm of what enters the first block",
    "lip/worst_norm_over_cap": (
        "largest proven block norm over its cap, or change of an adapter over its budget; at most "
        "1.001"
    ),
    "lip/steepest_norm": (
        "largest Lipschitz constant of a norm, gain / max(sqrt(eps), floor); 0 where norms were "
        "removed"
    ),
    "lip/largest_cap": "largest RMS->RMS cap of a matrix now",
    "lip/largest_activation": "largest absolute activation seen on two training sequences",
    "lip/attention_entropy_seen": (
        "smallest entropy, in nats, of a full-length attention row on them"
    ),
    "lip/attention_entropy_proven": "proven lower bound of that entropy, for any input",
    "lip/seconds_projecting": (
        "seconds spent in projections since training began (launch time only on a GPU)"
    ),
    "lip/seconds_projecting_step": "the same for one step, on average since the last entry",
    "lip/seconds_certifying": (
        "seconds spent in certificates and these measurements since training began"
    ),
    "lip/seconds_certifying_entry": "the same for this entry of the log alone",
}
# These are in every entry, whatever the run has time for.
TIMES = tuple(key for key in METRICS if key.startswith("lip/seconds"))


@dataclass
class Measured:
    """An entry of the log.

    Attributes:
        values: by the keys of METRICS.
        problems: one sentence for each part of the values that is missing, and why.
        certificate: the one from the weights, if it was wanted and could be given.
        seconds: what each part took.
        norms: the blocks, if they were measured.
    """

    values: dict[str, float]
    problems: list[str]
    certificate: Certificate | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    norms: list[BlockNorms] = field(default_factory=list)


def measured(
    model: nn.Module, ids: torch.Tensor | None, wanted: Collection[str] = PARTS
) -> Measured:
    """`measure` on the first process, with its answer on all of them. Every process has to call it.

    Errors of lip_plugin become sentences in the answer. Only DistributedError is raised.
    """
    problems: list[str] = []
    with _noted("what is logged of the model", problems):
        return together(
            model,
            lambda whole: measure(
                whole, ids if whole is model or ids is None else ids.cpu(), wanted
            ),
        )
    return Measured({}, problems)  # a sharded model could not be gathered, on every process


def measure(
    model: nn.Module, ids: torch.Tensor | None, wanted: Collection[str] = PARTS
) -> Measured:
    """Compute the values of METRICS for a model now, except the times.

    The norm of a block is proven once, for the certificate and for its cap.

    Args:
        model: the model in training.
        ids: token ids [batch, tokens], or pixels. None leaves out what is seen on them.
        wanted: which of PARTS to compute.
    """
    entry = Measured({}, [])
    adds = {
        "weights": lambda: _add_weights(entry, model),
        "caps": lambda: _add_caps(entry, model),
        "seen": lambda: _add_seen(entry, model, ids),
    }
    with measured_once():
        for part in (p for p in adds if p in wanted):
            began = time.perf_counter()
            adds[part]()
            entry.seconds[part] = time.perf_counter() - began
    return entry


def _add_weights(entry: Measured, model: nn.Module) -> None:
    """The certificate from the weights, and norms over caps."""
    # Without a family the model has adapters, and nothing else can be proven about it.
    if find_retrofit(model) is not None or _known(model):
        with _noted("the certificate from the weights", entry.problems):
            entry.certificate = certify(model)
            entry.values |= _bound("certificate", entry.certificate)
            entry.values["lip/radius"] = entry.certificate.radius
    with _noted("norms over caps", entry.problems):
        entry.norms = block_norms(model)
        entry.values["lip/worst_norm_over_cap"] = max(b.worst_over_cap for b in entry.norms)


def _add_caps(entry: Measured, model: nn.Module) -> None:
    """What the caps say. Blocks that were measured now have to be within them."""
    found = find_retrofit(model)
    if found is not None:
        with _noted("the certificate from the caps", entry.problems):
            entry.values |= _bound("certificate_caps", certify(model, "caps", norms=entry.norms))
        with _noted("caps and norms of the model", entry.problems):
            entry.values |= _shape_of(*found)


def _add_seen(entry: Measured, model: nn.Module, ids: torch.Tensor | None) -> None:
    """What is seen on training sequences."""
    if ids is not None and (find_retrofit(model) is not None or _known(model)):
        with _noted("what is seen on training sequences", entry.problems):
            entry.values |= _seen(model, ids, entry.certificate)


def _bound(name: str, certificate: Certificate) -> dict[str, float]:
    """The bound of a certificate, and its logarithm, under their keys."""
    values = {f"lip/log10_{name}": certificate.log10_lipschitz}
    if math.isfinite(certificate.lipschitz):
        values[f"lip/{name}"] = certificate.lipschitz
    return values


@contextmanager
def _noted(what: str, problems: list[str]) -> Iterator[None]:
    """Note an error of lip_plugin in `problems` and go on. A DistributedError is raised."""
    try:
        yield
    except DistributedError:
        raise
    except LipschitzError as error:
        problems.append(f"{what} cannot be logged: {error}")


def _shape_of(root: nn.Module, state: RetrofitState) -> dict[str, float]:
    """The largest cap of a matrix, and the Lipschitz constant of the steepest norm."""
    layouts = [m.layout for _, m in constrained_modules(root) if m.layout.norm != ROW]
    caps = [s.cap for layout in layouts for s in layout.segments if s.cap]
    steepest = 0.0 if state.config.recipe else _steepest_norm(root, state)
    return {"lip/largest_cap": max(caps), "lip/steepest_norm": steepest}


def _seen(model: nn.Module, ids: torch.Tensor, certificate: Certificate | None) -> dict[str, float]:
    """Activations and entropies seen on `ids`, and the proven entropy if there is a certificate."""
    watch, graph = Watch(), build(model)
    with torch.no_grad():
        x = graph.embed(ids, torch.float32)
        graph.body.run(x, watch)
    windows = [
        attention.window for _, attention in attentions(graph.body.nodes) if attention.window
    ]
    visible = min([x.shape[1], *windows])  # how many tokens the last one sees: all, or a window
    values = {
        "lip/largest_activation": watch.largest_activation,
        "lip/attention_entropy_seen": watch.smallest_entropy,
    }
    if certificate is not None:
        values["lip/attention_entropy_proven"] = certificate.smallest_entropy_lower(visible)
    return values


def _steepest_norm(root: nn.Module, state: RetrofitState) -> float:
    return steepest_norm(root, parts(root, state.architecture).norms())


def _known(model: nn.Module) -> bool:
    """Whether the model is of a known family, so that a certificate can be asked for."""
    try:
        build(model)
    except UnsupportedModelError:
        return False
    return True


def write_certificate(model: nn.Module, folder: Path, latest: Certificate | None = None) -> None:
    """Write `certificate.json` of the present weights into `folder`, whole or not at all.

    For a model of an unknown family an old certificate is removed, and none is written. Every
    process has to call it. The first one writes, and if it cannot (the disk is full, say) all of
    them raise.

    Args:
        model: the model in training.
        folder: where to write.
        latest: a certificate from weights. If it is about the very weights of now, it is written,
            and nothing is measured again.
    """

    def write(whole: nn.Module) -> None:
        if find_retrofit(whole) is None and not _known(whole):
            (folder / CERTIFICATE).unlink(missing_ok=True)
            return
        fresh = latest if latest is not None and _of_now(latest, whole) else certify(whole)
        write_whole(folder / CERTIFICATE, fresh.to_json())

    together(model, write)


def _of_now(certificate: Certificate, model: nn.Module) -> bool:
    """Whether a certificate is about the weights and the function of the model as it is now."""
    try:
        certificate.verify(model)
    except CertificateError:
        return False
    return True


def certificate_or_reason(
    model: nn.Module, folder: Path, latest: Certificate | None = None
) -> str | None:
    """Write `certificate.json` into `folder`, or leave none there and return the reason.

    Every process has to call it, and all get the same answer.

    Returns:
        None if the certificate was written, or else a sentence that says why there is none.

    Raises:
        OSError: it could not be written. It is raised on all processes.
        DistributedError: the processes disagree, or one of them failed.
    """
    try:
        write_certificate(model, folder, latest)
    except DistributedError:
        raise
    except LipschitzError as error:  # every process has the same error
        on_first(lambda: (folder / CERTIFICATE).unlink(missing_ok=True))
        return f"{folder} has no {CERTIFICATE}, because none can be given: {error}"
    return None


def probe(loader: Any, model: nn.Module, tokens: int) -> torch.Tensor | None:
    """The first two sequences of the training set, cut to `tokens` (images stay whole).

    Returns:
        What the model takes as input, or None if the data cannot be indexed.
    """
    try:
        dataset = loader.dataset
        batch = loader.collate_fn([dataset[i] for i in range(min(2, len(dataset)))])
        name = getattr(model, "main_input_name", "input_ids")
        ids = batch[name][:, :tokens] if name == "input_ids" else batch[name]
    except (AttributeError, TypeError, KeyError, IndexError, NotImplementedError):
        logger.info("training data cannot be indexed: activations and entropies are not measured")
        return None
    return ids.to(next(model.parameters()).device)
