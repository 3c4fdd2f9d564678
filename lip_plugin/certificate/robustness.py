"""Certified radius of predictions, and accuracy that is proven beside accuracy that survives an attack.

Norm: token norm (largest RMS norm of a token) of the change of what enters the first block. How the radii are
proven: margins.py, and docs/maths.md, section 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lip_plugin.certificate.build import Graph, build
from lip_plugin.certificate.compare import check_graph
from lip_plugin.certificate.margins import Certifier
from lip_plugin.certificate.measure import refuse_non_finite
from lip_plugin.certificate.pgd import attack
from lip_plugin.errors import ConfigError
from lip_plugin.linalg.norms import rms_norm

EPS = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Radii:
    """Certified radii of one batch.

    Attributes:
        radius: [batch, tokens], in token norm; the prediction cannot change while every token moves by less than
            or as much as this; 0 where that could not be proven, or the prediction is not the label.
        prediction: [batch, tokens], the largest logit in float64.
        correct: prediction is the label; all true without labels.
    """

    radius: Tensor
    prediction: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Accuracies:
    """Share of counted tokens whose prediction is right, at each eps: proven (certified) or surviving (attacked).

    `right` [eps, tokens] says which; `clean` is the accuracy without any change of the input.
    """

    eps: tuple[float, ...]
    accuracy: tuple[float, ...]
    clean: float
    right: Tensor = field(repr=False)


def certified_radius(
    model: nn.Module,
    ids: Tensor,
    labels: Tensor | None = None,
    *,
    refine: int = 4,
    points: int = 64,
) -> Radii:
    """Largest proven eps, per token, at which the prediction stays what it is, in token norm of the embeddings.

    All tokens of the sequence may move at once, each by RMS norm at most eps. Radii lie on a geometric grid of
    `points` values from 1e-6 to 1 times the batch's token norm, so they are proven values, rounded down.

    Args:
        ids: token ids [batch, tokens].
        labels: [batch, tokens]; where the prediction is another class the radius is 0. None: no labels, the
            prediction's own stability.
        refine: backward passes spent on a token at most, each on the pair of classes that holds it back; 0 leaves
            the bound from sizes alone.

    Raises:
        CertificateError: a node without a local rule, or a graph that does not reproduce the model.
        ConfigError: ids or labels of a wrong shape.
    """
    _check_batch(ids, labels)
    graph = _checked(model)
    with torch.no_grad():
        top = float(rms_norm(graph.embed(ids, torch.float64)).amax())
    eps = torch.logspace(-6, 0, points, dtype=torch.float64) * top
    found = Certifier(graph, eps, refine).run(ids, labels)
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), eps]).to(ids.device)
    radius = steps[found.count.long()].where(found.correct, 0.0)
    return Radii(radius, found.prediction, found.correct)


def certified_accuracy(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    eps: Sequence[float] = EPS,
    *,
    refine: int = 4,
) -> Accuracies:
    """Share of tokens proven to be predicted right whatever moves every embedding by at most eps in RMS norm.

    Args:
        batches: token ids [batch, tokens], each token's label being the next one; or mappings with
            `input_ids` and `labels` as Hugging Face takes them (unshifted, -100 ignored).
        eps: increasing, positive.

    Raises what `certified_radius` raises.
    """
    graph, grid = _checked(model), _grid(eps)
    certifier, right, clean = Certifier(graph, grid, refine), [], []
    for ids, labels in map(_labelled, batches):
        found = certifier.run(ids, labels)
        counted = labels >= 0
        order = torch.arange(1, len(grid) + 1, device=ids.device)[:, None]
        right.append((found.count[counted] >= order) & found.correct[counted])
        clean.append(found.correct[counted])
    return _accuracies(grid, right, clean)


def attacked_accuracy(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    eps: Sequence[float] = EPS,
    *,
    restarts: int = 4,
    steps: int = 30,
    seed: int = 0,
) -> Accuracies:
    """Share of tokens predicted right that projected gradient descent on the embeddings could not turn.

    An upper bound of the true robust accuracy, so never below `certified_accuracy` at the same eps. Batches, norm
    and errors as there. Each change counts only after a float64 run of it, and a check that it lies in the ball.
    """
    graph, grid = _checked(model), _grid(eps)
    right, clean = [], []
    for ids, labels in map(_labelled, batches):
        with torch.no_grad():
            x = graph.embed(ids, torch.float64)
            correct = graph.body.run(x).argmax(-1) == labels
        counted = labels >= 0
        clean.append(correct[counted])
        broken = attack(graph, x, labels, correct & counted, grid.tolist(), restarts, steps, seed)
        right.append((correct & ~broken)[:, counted])
    return _accuracies(grid, right, clean)


def _checked(model: nn.Module) -> Graph:
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite(graph.root)
        check_graph(graph)
    return graph


def _check_batch(ids: Tensor, labels: Tensor | None) -> None:
    if ids.dim() != 2 or (labels is not None and labels.shape != ids.shape):
        raise ConfigError(
            f"token ids are [batch, tokens] and labels of the same shape; got {tuple(ids.shape)}"
            + ("." if labels is None else f" and {tuple(labels.shape)}.")
        )
    if ids.numel() == 0:
        raise ConfigError("an empty batch has no predictions.")


def _grid(eps: Sequence[float]) -> Tensor:
    grid = torch.tensor(list(eps), dtype=torch.float64)
    if not len(grid) or not bool((grid > 0).all()) or not bool((grid.diff() > 0).all()):
        raise ConfigError(f"eps must be positive and increasing, got {list(eps)}.")
    return grid


def _labelled(batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(ids, the label of every token): the next token; -100, not counted, for the last."""
    ids = batch if isinstance(batch, Tensor) else batch["input_ids"]
    given = ids if isinstance(batch, Tensor) else batch.get("labels", ids)
    _check_batch(ids, given)
    return ids, torch.cat([given[:, 1:], torch.full_like(given[:, :1], -100)], 1)


def _accuracies(grid: Tensor, right: list[Tensor], clean: list[Tensor]) -> Accuracies:
    if not right:
        raise ConfigError("no batches were given.")
    counted, all_right = torch.cat(clean), torch.cat(right, 1)
    shares = all_right.double().mean(1)
    return Accuracies(
        tuple(grid.tolist()), tuple(shares.tolist()), float(counted.double().mean()), all_right.cpu()
    )
