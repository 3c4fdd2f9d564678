"""Certified radii of predictions, certified accuracy, and the accuracy that survives an attack.

The argument `norm` says in which norm a change of the input is measured:

- "token" is the token norm (largest RMS norm of a token) of the change of what enters the first
  block.
- "pixel_l2" is the 2-norm of the change of a whole image, which may leave the range of pixels.

A token model predicts at every token. A classifier has one prediction for each sequence or image,
which counts as one token here. How the radii are proven is in margins.py and in docs/maths.md,
section 11.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lip_plugin.certificate.comparison.compare import check_graph, check_on_inputs
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.inputs import refuse_odd_inputs
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

    All tensors are [batch, tokens], or [batch, 1] for a classifier.

    Attributes:
        radius: no change of at most this size, in the norm asked for, can change the prediction. It
            is 0 where nothing is proven, and where the prediction is not the label.
        prediction: index of the largest logit in float64.
        correct: whether the prediction is the label. It is true everywhere if no labels were given.
    """

    radius: Tensor
    prediction: Tensor
    correct: Tensor


@dataclass(frozen=True)
class Accuracies:
    """Share of counted tokens whose prediction is right, for each size eps of a change.

    "Right" means proven to be right (`certified_accuracy`), or not turned by an attack
    (`attacked_accuracy`).

    Attributes:
        eps: the sizes of a change.
        accuracy: the share at each of them.
        clean: the accuracy without any change of the input.
        right: bool [eps, tokens], which of the counted tokens are right.
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
    """The largest proven eps at which each prediction stays what it is.

    The size eps of a change is measured in `norm`. In token norm all tokens of a sequence may move
    at once, each by an RMS norm of at most eps. The radii lie on a geometric grid of `points`
    values from 1e-6 to 1 times the size of the batch. That size is the token norm of the
    embeddings, or the largest 2-norm of an image. A radius is rounded down to the grid, so it is a
    proven value.

    Args:
        model: a model of a known family.
        inputs: token ids [batch, tokens], or pixels [batch, channels, height, width].
        labels: [batch, tokens], or [batch] for a classifier. Where the prediction is another class
            the radius is 0. Without labels each prediction's own stability is measured.
        norm: "token", or "pixel_l2" for images.
        refine: backward passes that are spent on a prediction at most. Each is spent on the pair of
            classes that holds the radius back. 0 leaves the bound from sizes alone.
        points: number of values on the grid.

    Raises:
        CertificateError: a node has no local rule, or the graph does not reproduce the model.
        ConfigError: inputs or labels have a wrong shape, or the norm does not fit the model.
    """
    graph = _checked(model)
    ball = ball_of(graph, norm)
    refuse_odd_inputs(graph, inputs)
    labels = _check_labels(graph, inputs, labels)
    check_on_inputs(graph, inputs)
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
    """Share of predictions that are proven right under every change of size at most eps.

    Args:
        model: a model of a known family.
        batches: mappings with `input_ids` or `pixel_values`, and with `labels` as Hugging Face
            takes them. Labels of a causal model are not shifted, a classifier has one for each
            sequence or image, and -100 is ignored. For a causal model a batch may also be the token
            ids [batch, tokens] alone. The label of each token is then the next one.
        eps: sizes of a change, positive and increasing, in units of `norm`.
        norm: "token" for the RMS norm of the change of every embedding, "pixel_l2" for the 2-norm
            of the change of the image.
        refine: as in `certified_radius`.

    Raises:
        CertificateError, ConfigError: as in `certified_radius`.
    """
    graph, grid = _checked(model), _grid(eps)
    certifier, right, clean = Certifier(graph, ball_of(graph, norm), grid, refine), [], []
    for inputs, labels in _compared(graph, batches):
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

    It is an upper bound of the true robust accuracy, so it is never below `certified_accuracy` at
    the same eps. A change counts only after a check that it lies in the ball, and a float64 run of
    it.

    Args:
        model, batches, eps, norm: as in `certified_accuracy`.
        restarts: number of starts of the descent at each eps.
        steps: steps of each start.
        seed: seed of the random starts.

    Raises:
        CertificateError, ConfigError: as in `certified_accuracy`.
    """
    graph, grid = _checked(model), _grid(eps)
    ball: Ball = ball_of(graph, norm)
    right, clean = [], []
    for inputs, labels in _compared(graph, batches):
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
    """The graph of a model, compared with the model."""
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite_weights(graph.root)
        check_graph(graph)
    return graph


def _compared(
    graph: Graph, batches: Iterable[Tensor | Mapping[str, Tensor]]
) -> Iterator[tuple[Tensor, Tensor]]:
    """(inputs, labels) of each batch, on which the graph computes what the model does."""
    for batch in batches:
        inputs, labels = _labelled(graph, batch)
        check_on_inputs(graph, inputs)
        yield inputs, labels


def _check_labels(graph: Graph, inputs: Tensor, labels: Tensor | None) -> Tensor | None:
    """The labels, those of a classifier as [batch, 1]. Raises ConfigError for odd ones."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        raise ConfigError("labels are a tensor of integers, the classes that are right.")
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
    """Whether the model has one prediction for a whole sequence or image."""
    return any(isinstance(node, OneToken) for node in graph.body.nodes)


def _grid(eps: Sequence[float]) -> Tensor:
    if isinstance(eps, (int, float, str)):
        raise ConfigError(f"eps is a sequence of sizes, as in eps=(0.01, 0.03); got {eps!r}.")
    grid = torch.tensor(list(eps), dtype=torch.float64)
    if not len(grid) or not bool((grid > 0).all()) or not bool((grid.diff() > 0).all()):
        raise ConfigError(f"eps must be positive and increasing, got {list(eps)}.")
    return grid


def _labelled(graph: Graph, batch: Tensor | Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The inputs of a batch, and the label of every prediction.

    The label of a causal model is the next token. The last token has none and gets -100, which is
    not counted.
    """
    causal = graph.parts.architecture.attention.causal and not _classifies(graph)
    if isinstance(batch, Tensor):
        if not causal:
            raise ConfigError(
                "this model does not predict the next token: give mappings with `labels`."
            )
        batch = {"input_ids": batch}
    _refuse_more(graph, batch)
    inputs = batch["pixel_values" if graph.patches is not None else "input_ids"]
    refuse_odd_inputs(graph, inputs)
    given = batch.get("labels", inputs if causal else None)
    if given is None:
        raise ConfigError("batches of this model need `labels`.")
    labels = _check_labels(graph, inputs, given)
    assert labels is not None
    if causal:
        labels = torch.cat([labels[:, 1:], torch.full_like(labels[:, :1], -100)], 1)
    return inputs, labels


_KNOWN = ("input_ids", "pixel_values", "labels", "attention_mask", "token_type_ids")


def _refuse_more(graph: Graph, batch: Mapping[str, Tensor]) -> None:
    """Raise ConfigError for what a model would read besides its inputs: the graph does not.

    The graph sees every token in its order. It gives each one type 0 if the model has types.
    """
    if not isinstance(batch, Mapping):
        raise ConfigError(
            f"batches are tensors of token ids, or mappings; got a {type(batch).__name__}."
        )
    wanted = "pixel_values" if graph.patches is not None else "input_ids"
    if wanted not in batch:
        raise ConfigError(f"batches of this model need `{wanted}`; got {', '.join(batch)}.")
    other = "input_ids" if wanted == "pixel_values" else "pixel_values"
    odd = [key for key in batch if key not in _KNOWN or key == other]
    types = batch.get("token_type_ids")
    if types is not None and "type" not in graph.entry.tables:
        odd.append("token_type_ids")
    if odd:
        raise ConfigError(
            f"batches hold {', '.join(odd)}, which the model would read and the proof does not "
            "know. Leave them out if the model does not need them."
        )
    mask = batch.get("attention_mask")
    if mask is not None and mask.shape != batch[wanted].shape:
        raise ConfigError(
            f"attention_mask is {tuple(mask.shape)}: another mask than one entry for each token of "
            f"{tuple(batch[wanted].shape)} changes who sees whom, and the proof does not know it."
        )
    if (mask is not None and not bool(mask.all())) or (types is not None and bool(types.any())):
        raise ConfigError(
            "radii are proven for sequences without padding, of token type 0: "
            "batch sequences of equal length."
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
