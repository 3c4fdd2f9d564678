"""Certified radius of predictions, and accuracy that is proven beside accuracy that survives an attack.

ProvenNorms of the change, by the argument `norm`:

    "token"     token norm (largest RMS norm of a token) of the change of what enters the first block
    "pixel_l2"  2-norm of the change of a whole image, which may leave the range of pixels

Token models predict at every token; classifiers have one prediction for each sequence or image, counted as one
"token". How the radii are proven: margins.py, and docs/maths.md, section 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lip_plugin.certificate.comparison.compare import check_graph
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.nodes import OneToken
from lip_plugin.certificate.robustness.attack import attack
from lip_plugin.certificate.robustness.balls import Ball, ball_of
from lip_plugin.certificate.robustness.margins import Certifier
from lip_plugin.certificate.weight_norms import refuse_non_finite_weights
from lip_plugin.errors import ConfigError

EPS = (0.001, 0.003, 0.01, 0.03, 0.1)


@dataclass(frozen=True)
class Radii:
    """Certified radii of one batch.

    Attributes:
        radius: [batch, tokens] ([batch, 1] of a classifier), in the norm asked for; the prediction cannot change
            by a change of at most this size; 0 where that could not be proven, or the prediction is not the label.
        prediction: of the same shape, the largest logit in float64.
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
    inputs: Tensor,
    labels: Tensor | None = None,
    *,
    norm: str = "token",
    refine: int = 4,
    points: int = 64,
) -> Radii:
    """Largest proven eps at which a prediction stays what it is, of every token or of a classifier.

    In token norm all tokens of a sequence may move at once, each by RMS norm at most eps. Radii lie on a geometric
    grid of `points` values from 1e-6 to 1 times the batch's size (token norm of the embeddings, or largest 2-norm of
    an image), so they are proven values, rounded down.

    Args:
        inputs: token ids [batch, tokens], or pixels [batch, channels, height, width].
        labels: [batch, tokens], or [batch] of a classifier; where the prediction is another class the radius is 0.
            None: no labels, the prediction's own stability.
        norm: "token" or, of images, "pixel_l2".
        refine: backward passes spent on a prediction at most, each on the pair of classes that holds it back; 0
            leaves the bound from sizes alone.

    Raises:
        CertificateError: a node without a local rule, or a graph that does not reproduce the model.
        ConfigError: inputs or labels of a wrong shape, or a norm that does not fit the model.
    """
    graph = _checked(model)
    ball = ball_of(graph, norm)
    labels = _check_batch(graph, inputs, labels)
    with torch.no_grad():
        top = float(ball.size(ball.point(inputs)).amax())
    if not top > 0:
        raise ConfigError(
            "inputs of size 0 have no grid of radii; use certified_accuracy with eps of your own."
        )
    eps = torch.logspace(-6, 0, points, dtype=torch.float64) * top
    found = Certifier(graph, ball, eps, refine).run(inputs, labels)
    steps = torch.cat([torch.zeros(1, dtype=torch.float64), eps]).to(inputs.device)
    radius = steps[found.count.long()].where(found.correct, 0.0)
    return Radii(radius, found.prediction, found.correct)


def certified_accuracy(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    eps: Sequence[float] = EPS,
    *,
    norm: str = "token",
    refine: int = 4,
) -> Accuracies:
    """Share of predictions proven to be right whatever moves the input by at most eps.

    Args:
        batches: mappings with `input_ids` or `pixel_values`, and `labels`, as Hugging Face takes them: unshifted
            of a causal model, one a sequence or image of a classifier, -100 ignored. Or, of causal models, token
            ids [batch, tokens] alone, each token's label being the next one.
        eps: increasing, positive, in units of `norm`.
        norm: "token": RMS norm of every embedding's change; "pixel_l2": 2-norm of the image's change.

    Raises what `certified_radius` raises.
    """
    graph, grid = _checked(model), _grid(eps)
    certifier, right, clean = Certifier(graph, ball_of(graph, norm), grid, refine), [], []
    for inputs, labels in (_labelled(graph, batch) for batch in batches):
        found = certifier.run(inputs, labels)
        counted = labels >= 0
        order = torch.arange(1, len(grid) + 1, device=inputs.device)[:, None]
        right.append((found.count[counted] >= order) & found.correct[counted])
        clean.append(found.correct[counted])
    return _accuracies(grid, right, clean)


def attacked_accuracy(
    model: nn.Module,
    batches: Iterable[Tensor | Mapping[str, Tensor]],
    eps: Sequence[float] = EPS,
    *,
    norm: str = "token",
    restarts: int = 4,
    steps: int = 30,
    seed: int = 0,
) -> Accuracies:
    """Share of right predictions that projected gradient descent within the ball could not turn.

    An upper bound of the true robust accuracy, so never below `certified_accuracy` at the same eps. Batches, norm
    and errors as there. Each change counts only after a float64 run of it, and a check that it lies in the ball.
    """
    graph, grid = _checked(model), _grid(eps)
    ball: Ball = ball_of(graph, norm)
    right, clean = [], []
    for inputs, labels in (_labelled(graph, batch) for batch in batches):
        with torch.no_grad():
            point = ball.point(inputs)
            correct = graph.body.run(ball.enter(point)).argmax(-1) == labels
        counted = labels >= 0
        clean.append(correct[counted])
        broken = attack(
            ball, point, labels, correct & counted, grid.tolist(), restarts, steps, seed
        )
        right.append((correct & ~broken)[:, counted])
    return _accuracies(grid, right, clean)


def _checked(model: nn.Module) -> Graph:
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite_weights(graph.root)
        check_graph(graph)
    return graph


def _check_batch(graph: Graph, inputs: Tensor, labels: Tensor | None) -> Tensor | None:
    """The labels, a classifier's as [batch, 1]; refuses shapes that do not fit the model."""
    if inputs.numel() == 0:
        raise ConfigError("an empty batch has no predictions.")
    if graph.patches is not None:
        if tuple(inputs.shape[1:]) != tuple(graph.entry.image):
            wanted = ", ".join(map(str, graph.entry.image))
            raise ConfigError(
                f"pixels are [batch, {wanted}] for this model; got {tuple(inputs.shape)}."
            )
    elif inputs.dim() != 2:
        raise ConfigError(f"token ids are [batch, tokens]; got {tuple(inputs.shape)}.")
    graph.entry.refuse_padding(inputs)
    if labels is None:
        return None
    if _classifies(graph):
        if labels.numel() != len(inputs):
            raise ConfigError(
                f"a classifier has one label each: [{len(inputs)}]; got {tuple(labels.shape)}."
            )
        return labels.reshape(-1, 1)
    if labels.shape != inputs.shape:
        raise ConfigError(f"token ids {tuple(inputs.shape)} and labels must be of the same shape.")
    return labels


def _classifies(graph: Graph) -> bool:
    """One prediction for a whole sequence or image, in place of one for every token."""
    return any(isinstance(node, OneToken) for node in graph.body.nodes)


def _grid(eps: Sequence[float]) -> Tensor:
    grid = torch.tensor(list(eps), dtype=torch.float64)
    if not len(grid) or not bool((grid > 0).all()) or not bool((grid.diff() > 0).all()):
        raise ConfigError(f"eps must be positive and increasing, got {list(eps)}.")
    return grid


def _labelled(graph: Graph, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(inputs, the label of every prediction): of a causal model the next token, -100, not counted, for the last."""
    causal = graph.parts.architecture.attention.causal and not _classifies(graph)
    if isinstance(batch, Tensor):
        if not causal:
            raise ConfigError(
                "this model does not predict the next token: give mappings with `labels`."
            )
        batch = {"input_ids": batch}
    _refuse_padding(batch)
    inputs = batch["pixel_values" if graph.patches is not None else "input_ids"]
    given = batch.get("labels", inputs if causal else None)
    if given is None:
        raise ConfigError("batches of this model need `labels`.")
    labels = _check_batch(graph, inputs, given)
    assert labels is not None
    if causal:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return inputs, labels


def _refuse_padding(batch: Mapping[str, Tensor]) -> None:
    """The graph sees every token, in order, of type 0."""
    mask, types = batch.get("attention_mask"), batch.get("token_type_ids")
    if (mask is not None and not bool(mask.all())) or (types is not None and bool(types.any())):
        raise ConfigError(
            "radii are proven for sequences without padding, of token type 0: batch sequences of equal length."
        )


def _accuracies(grid: Tensor, right: list[Tensor], clean: list[Tensor]) -> Accuracies:
    if not right:
        raise ConfigError("no batches were given.")
    counted, all_right = torch.cat(clean), torch.cat(right, 1)
    shares = all_right.double().mean(1)
    return Accuracies(
        tuple(grid.tolist()),
        tuple(shares.tolist()),
        float(counted.double().mean()),
        all_right.cpu(),
    )
