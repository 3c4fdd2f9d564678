"""falsify(model): attack the certificate from below, by gradient ascent over inputs and directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lip_plugin.certificate.build import Graph, build, check_graph, radius_of
from lip_plugin.certificate.upper import to_float
from lip_plugin.errors import ConfigError
from lip_plugin.linalg.norms import rms_norm


@dataclass(frozen=True)
class Witness:
    """The pair of inputs embeddings +- step * direction that attains a lower bound; [tokens, d], float64."""

    embeddings: Tensor
    direction: Tensor
    step: float


@dataclass(frozen=True)
class Falsification:
    """What an attack found: `lower_bound` is attained by `witness`, so no true constant is below it."""

    lower_bound: float
    witness: Witness
    radius: float


def falsify(
    model: nn.Module,
    restarts: int = 8,
    steps: int = 100,
    *,
    tokens: int = 8,
    lr: float = 0.05,
    seed: int = 0,
) -> Falsification:
    """Largest secant slope found between two inputs of the certificate's ball, token norm to token norm.

    Ascends, with Adam in float64, the ratio norm(F(e + h v) - F(e - h v)) / norm(2 h v) over inputs
    e and directions v [tokens, d], from random and structured starts; both ends stay in the ball
    that the certificate is about. A secant is a lower bound of the Lipschitz constant whatever h is.

    Args:
        restarts: starts run side by side; steps: ascent steps; tokens: length of the sequence.

    Raises:
        ConfigError: counts below 1.
        CertificateError: the graph does not reproduce the model.
    """
    if min(restarts, steps, tokens) < 1:
        raise ConfigError("falsify: restarts, steps and tokens must be at least 1.")
    with torch.no_grad():
        graph = build(model)
        check_graph(graph)
        radius = to_float(radius_of(graph, "weights")) or 1.0
    head = graph.root.get_submodule(graph.parts.tokens)
    device = head.weight.device  # type: ignore[union-attr]
    if graph.parts.positions:
        tokens = min(tokens, graph.root.get_submodule(graph.parts.positions).weight.shape[0])  # type: ignore[union-attr,index,arg-type]
    d = head.weight.shape[1]  # type: ignore[union-attr,index]
    step = 1e-4 * radius
    inputs, directions = (t.to(device) for t in _starts(restarts, tokens, int(d), seed))  # type: ignore[arg-type]
    inputs.requires_grad_(True)
    directions.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs, directions], lr=lr)
    best, witness = -1.0, None
    for _ in range(steps + 1):
        e, v = _in_ball(inputs, radius - step), _unit(directions)
        gains = _gains(graph, e, v, step)
        top = int(gains.argmax())
        if float(gains[top]) > best:
            best = float(gains[top])
            witness = Witness(e[top].detach().clone(), v[top].detach().clone(), step)
        optimizer.zero_grad()
        (-gains.clamp_min(1e-300).log().sum()).backward()
        optimizer.step()
    assert witness is not None
    return Falsification(attained(graph, witness), witness, radius)


@torch.no_grad()
def attained(graph: Graph, witness: Witness) -> float:
    """Secant slope of a witness on the graph, token norm to token norm, computed once more."""
    gains = _gains(graph, witness.embeddings[None], witness.direction[None], witness.step)
    return float(gains[0]) * (1 - 1e-9)  # rounding: outputs of size 1 in float64 over steps of 1e-4


def _gains(graph: Graph, e: Tensor, v: Tensor, step: float) -> Tensor:
    """Secant slope of each start [restarts]: token norm out over token norm in."""
    moved = graph.body.run(e + step * v) - graph.body.run(e - step * v)
    return rms_norm(moved).amax(-1) / (2 * step * rms_norm(v).amax(-1))


def _in_ball(x: Tensor, radius: float) -> Tensor:
    """Each token scaled down to RMS norm at most `radius`."""
    return x * (radius / rms_norm(x).clamp_min(1e-300)).clamp_max(1.0).unsqueeze(-1)


def _unit(x: Tensor) -> Tensor:
    """Scaled to token norm 1."""
    return x / rms_norm(x).amax(-1).clamp_min(1e-300)[..., None, None]


def _starts(restarts: int, tokens: int, d: int, seed: int) -> tuple[Tensor, Tensor]:
    """Random starts, and every third with two opposite halves of the sequence (what attention fears)."""
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.randn(restarts, tokens, d, generator=generator, dtype=torch.float64)
    directions = torch.randn(restarts, tokens, d, generator=generator, dtype=torch.float64)
    one = inputs[:, :1].expand(-1, tokens, -1)
    signs = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0)[None, :, None].double()
    opposite = torch.arange(restarts) % 3 == 1
    inputs[opposite] = (one * signs)[opposite]
    directions[opposite] = (directions[:, :1] * signs)[opposite]
    return inputs.clone(), directions.clone()
