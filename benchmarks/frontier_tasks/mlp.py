"""Task mlp: an MLP on images, under caps or not, as a graph that the certificate's own rules bound.

Images are flattened and have pixels in [-1, 1]. They are scikit-learn's digits (8 x 8, offline), or
any image data set of the hub. Bounds are from the RMS norm of the input to the RMS norm of the
logits. eps is the 2-norm of an image's change.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from types import SimpleNamespace
from typing import Any

import torch
from common import recipe
from torch import Tensor, nn

from frontier_tasks.runs import Run, Steps
from lip_plugin import LipschitzConfig
from lip_plugin.certificate.certify import bound_of
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import Graph
from lip_plugin.certificate.graph.entry import Entry
from lip_plugin.certificate.graph.nodes import Activation, Linear
from lip_plugin.certificate.robustness.attack import attack
from lip_plugin.certificate.robustness.margins import Certifier
from lip_plugin.certificate.robustness.movement import Local, Movement
from lip_plugin.certificate.weight_norms import cap_norms, weight_norms
from lip_plugin.model.architecture import Architecture, Attention, Family, Mlp
from lip_plugin.model.layers import constrain_, constrained_modules
from lip_plugin.model.layout import one_block
from lip_plugin.model.parts import Parts
from lip_plugin.surgery.caps import cap_of
from lip_plugin.surgery.orthogonal_init import init_orthogonal_
from lip_plugin.surgery.state import RetrofitState

EPS = (0.1, 0.2, 0.5, 1.0, 1.5)
_NOTHING = {"module": "", "act": "", "down": ""}


class Images(nn.Module):
    """Linear maps without biases and ReLU between them.

    Maps x [batch, widths[0]] to logits [batch, widths[-1]].
    """

    def __init__(self, widths: tuple[int, ...]) -> None:
        super().__init__()
        self.maps = nn.ModuleList(nn.Linear(a, b, bias=False) for a, b in zip(widths, widths[1:]))
        self.act = nn.ReLU()
        self.config = SimpleNamespace(model_type="mlp", widths=list(widths))

    def forward(self, x: Tensor) -> Tensor:
        for i, linear in enumerate(self.maps):
            x = linear(x if i == 0 else self.act(x))
        return x

    def names(self) -> list[str]:
        return [f"maps.{i}" for i in range(len(self.maps))]


def constrain(model: Images, config: LipschitzConfig, *, capped: bool = True) -> None:
    """Do what `retrofit` does for known families: caps, orthogonal start, mark of a retrofit.

    Args:
        capped: False keeps the same start and drops the caps, which makes a baseline that every
            optimizer here accepts.
    """

    def give(on: bool) -> None:
        for name, linear in zip(model.names(), model.maps, strict=True):
            constrain_(
                linear,
                one_block("dense", linear.weight.shape[0], cap_of(name, config) if on else None),
            )

    give(True)
    init_orthogonal_(model)
    give(capped)
    model.__dict__["lip_retrofit"] = RetrofitState(config, _architecture(model))


def _architecture(model: Images) -> Architecture:
    """No layers: everything is between the input and the head."""
    *dense, head = model.names()
    steps = tuple(step for name in dense for step in (("dense", name), ("act", "act")))
    attention = Attention(module="", out="")
    return Architecture(
        name="mlp", layers="", attention=attention, mlp=Mlp(**_NOTHING), head=head, readout=steps
    )


def graph_of(model: Images) -> Graph:
    """The MLP as nodes that run and bound; inputs are [batch, 1, d]."""
    architecture = _architecture(model)
    nodes: list[Any] = []
    for name, linear in zip(model.names(), model.maps, strict=True):
        d_out, d_in = linear.weight.shape
        nodes.append(Linear(name, lambda m=linear: m.weight, lambda: None, d_out, d_in))
        nodes.append(Activation("act", model.act, "relu"))
    family = Family(architecture, matches=lambda m: m is model)
    found = Parts(architecture, layers=(), knobs=(), n_heads=1, n_kv_heads=1)
    # No tables and no patches enter, no blocks follow, and the last activation is none.
    return Graph(model, model, family, found, Entry({}), blocks=(), readout=tuple(nodes[:-1]))


class InputBall:
    """Changes of the flattened image [batch, 1, d] of 2-norm at most eps.

    certificate/robustness/balls.py has the same for ViT.
    """

    name = "pixel_l2"

    def __init__(self, graph: Graph, width: int) -> None:
        self.graph, self.width = graph, width

    def point(self, inputs: Tensor) -> Tensor:
        return inputs.detach().double().unsqueeze(1)

    def enter(self, point: Tensor) -> Tensor:
        return point

    def movement(self, point: Tensor, x: Tensor, eps: Tensor, local: Local) -> Movement:
        return Movement.ball((eps[:, None, None] * (1 + 1e-12)).expand(-1, *x.shape[:2]))

    def token_norm(self, eps: float, norms: ProvenNorms) -> float:
        return eps / self.width**0.5 * (1 + 1e-12)

    def dual(self, gradient: Tensor) -> Tensor:
        return torch.linalg.vector_norm(gradient.flatten(1), dim=-1)

    def size(self, change: Tensor) -> Tensor:
        return torch.linalg.vector_norm(change.double(), dim=(-2, -1), keepdim=True)


@dataclass(frozen=True)
class Split:
    """Images [n, d] and labels: to train on, to choose a learning rate by, and for the results."""

    train: tuple[Tensor, Tensor]
    choose: tuple[Tensor, Tensor]
    held_out: tuple[Tensor, Tensor]


def data(options: Any, seed: int) -> Split:
    return _data(options.dataset, seed, options.examples)


@cache
def _data(dataset: str | None, seed: int, images: int) -> Split:
    """Three fifths, one fifth and one fifth of the digits, cut by the seed.

    Of a data set of the hub, the results are on its test split.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    if dataset is None:
        from sklearn.datasets import load_digits

        found = load_digits()
        x, y = torch.tensor(found.data, dtype=torch.float32) / 8.0 - 1.0, torch.tensor(found.target)
        order = torch.randperm(len(x), generator=generator)
        a, b, c = order.split([len(x) - 2 * (len(x) // 5), len(x) // 5, len(x) // 5])
        return Split((x[a], y[a]), (x[b], y[b]), (x[c[:images]], y[c[:images]]))
    x, y = _hub(dataset, "train")
    held_out = _hub(dataset, "test")
    order = torch.randperm(len(x), generator=generator)
    a, b = order[: 9 * len(x) // 10], order[9 * len(x) // 10 :]
    return Split((x[a], y[a]), (x[b], y[b]), (held_out[0][:images], held_out[1][:images]))


def _hub(dataset: str, split: str) -> tuple[Tensor, Tensor]:
    from datasets import load_dataset

    found = load_dataset(dataset, split=split)
    kinds = {str(feature): name for name, feature in found.features.items()}
    image = next(name for kind, name in kinds.items() if kind.startswith("Image"))
    label = next(name for kind, name in kinds.items() if kind.startswith("ClassLabel"))
    pixels = torch.stack([torch.as_tensor(row) for row in found.with_format("torch")[image]])
    return pixels.flatten(1).float() / 127.5 - 1.0, torch.tensor(found[label])


def train(
    run: Run, lr: float, seed: int, split: Split, options: Any, steps: int
) -> Iterator[Images]:
    """Yields the model after every step (the same object)."""
    torch.manual_seed(seed)
    x, y = split.train
    model = Images((x.shape[1], *options.widths, int(y.max()) + 1))
    constrain(model, recipe(**(run.config or {})), capped=run.config is not None)
    stepping = Steps(run, model, lr, steps)
    for _ in range(steps):
        at = torch.randint(len(x), (options.batch,))
        stepping.take(nn.functional.cross_entropy(model(x[at]) / run.temperature, y[at]))
        yield model


def choose(model: Images, split: Split, temperature: float) -> dict[str, float]:
    """Scores at the training temperature on the images that learning rates are chosen by."""
    return score(model, *split.choose, temperature)


@torch.no_grad()
def score(model: Images, x: Tensor, y: Tensor, temperature: float = 1.0) -> dict[str, float]:
    """Accuracy and loss, by default at the network's own scale."""
    logits = model(x) / temperature
    return {
        "accuracy": float((logits.argmax(-1) == y).double().mean()),
        "loss": float(nn.functional.cross_entropy(logits, y)),
    }


def evaluate(model: Images, split: Split, options: Any) -> dict[str, Any]:
    """Scores, proven bounds, certified and attacked accuracy on the held-out images."""
    x, y = split.held_out
    graph, width = graph_of(model), x.shape[1]
    found: dict[str, Any] = score(model, x, y)
    with torch.no_grad():
        # pixels in [-1, 1], so RMS norm at most 1; the bound is the same on every ball
        bounds = {"weights": bound_of(graph, weight_norms(graph), "weights", Decimal(1))}
        if all(m.layout.segments[0].cap is not None for _, m in constrained_modules(model)):
            bounds["caps"] = bound_of(graph, cap_norms(graph), "caps", Decimal(1))
    found["bound"] = {source: c.lipschitz for source, c in bounds.items()}
    found["logit_difference"] = {source: c.logit_difference for source, c in bounds.items()}
    ball: Any = InputBall(graph, width)
    eps = torch.tensor(EPS, dtype=torch.float64)
    labels = y[:, None]
    proven = Certifier(graph, ball, eps, options.refine).run(x, labels)
    order = torch.arange(1, len(EPS) + 1)[:, None]
    certified = (proven.count[:, 0] >= order) & proven.correct[:, 0]
    broken = attack(ball, ball.point(x), labels, proven.correct, EPS, *options.attack, 0)
    attacked = (proven.correct & ~broken)[:, :, 0]
    assert not bool((certified & ~attacked).any()), "an attack broke what was proven"
    found |= {"eps": EPS, "certified": certified.double().mean(1).tolist()}
    found |= {"attacked": attacked.double().mean(1).tolist(), "examples": len(y)}
    return found
