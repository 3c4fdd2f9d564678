"""falsify(model): attack the certificate from below, by gradient ascent over inputs and directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lip_plugin.certificate.build import Graph, build
from lip_plugin.certificate.compare import check_graph
from lip_plugin.certificate.measure import refuse_non_finite
from lip_plugin.certificate.nodes import attentions
from lip_plugin.certificate.radius import radius_of
from lip_plugin.certificate.upper import to_float
from lip_plugin.errors import CertificateError, ConfigError
from lip_plugin.linalg.norms import rms_norm

_STEP = 1e-5  # half distance of the two ends, over the radius: steep places of kept norms are 1e-3 wide
_NOISE = 1e-13  # of the output's size: what a float64 forward may be off by, generously


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
    tokens: int = 17,
    lr: float = 0.05,
    seed: int = 0,
) -> Falsification:
    """Largest secant slope found between two inputs of the certificate's ball, token norm to token norm.

    A secant norm(F(e + h v) - F(e - h v)) / norm(2 h v) is a lower bound of the Lipschitz constant
    whatever h is. It is ascended, in float64, over inputs e and directions v [tokens, d], from random
    and structured starts side by side: Adam moves e, and v goes to the steepest direction in every
    token (a power iteration in the token norm, which never descends for a linear map). Both ends
    stay in the ball that the certificate is about.

    Args:
        restarts: starts run side by side; steps: ascent steps.
        tokens: length of the sequence; odd is best (pairs of opposite values, and one that asks).
        lr: Adam's rate, in units of the radius.

    Raises:
        ConfigError: counts below 1.
        CertificateError: the graph does not reproduce the model, or all embeddings are zero.
    """
    if min(restarts, steps, tokens) < 1:
        raise ConfigError("falsify: restarts, steps and tokens must be at least 1.")
    with torch.no_grad():
        graph = build(model)
        refuse_non_finite(graph.root)
        check_graph(graph)
        radius = to_float(radius_of(graph, "weights"))
        if radius == 0:
            raise CertificateError("All embeddings are zero: there are no two inputs to compare.")
        tokens = min(tokens, graph.entry.longest or tokens)
        inputs, directions = _starts(graph, restarts, tokens, seed)
    best, witness = -1.0, None
    step = _STEP * radius
    inputs.requires_grad_(True)
    optimizer = torch.optim.Adam([inputs], lr=lr)
    for i in range(steps + 1):
        e = _in_ball(inputs, 1.0) * (radius * (1 - 1e-12) - step)
        v = _steepest(directions).requires_grad_(True)
        by_token = _gains(graph, e, v, step)
        gains = by_token.amax(-1)
        found = gains.detach()
        top = int(found.argmax())
        if float(found[top]) > best:
            best = float(found[top])
            witness = Witness(e[top].detach().clone(), v[top].detach().clone(), step)
        # not backward(): the model's own gradients may be in the middle of a training step
        # First the directions alone, so that a good start is not left for a bad direction, and for the
        # last token, which sees all others: an early one would soon be steepest and hide them.
        warm = i < steps // 5
        goal = (by_token[:, -1] if warm else gains).clamp_min(1e-300).log().sum()
        inputs.grad, slope = torch.autograd.grad(-goal, [inputs, v])
        if not warm:
            optimizer.step()
        # tokens that the output cannot see have no gradient and keep their direction
        seen = slope.abs().amax(-1, keepdim=True) > 0
        directions = torch.where(seen, -slope, v.detach())
    assert witness is not None
    return Falsification(attained(graph, witness), witness, radius)


@torch.no_grad()
def attained(graph: Graph, witness: Witness) -> float:
    """Secant slope of a witness on the graph, token norm to token norm, less what rounding may have added."""
    e, v, h = witness.embeddings, witness.direction, witness.step
    ends = torch.stack([e + h * v, e - h * v])
    out = graph.body.run(ends)
    gap = rms_norm(ends[0] - ends[1]).amax()
    noise = _NOISE * rms_norm(out).amax()
    slope = (rms_norm(out[0] - out[1]).amax() - noise) / gap
    return max(0.0, float(slope) * (1 - 1e-9))


def _gains(graph: Graph, e: Tensor, v: Tensor, step: float) -> Tensor:
    """Secant slope of each start and output token [restarts, tokens]; v has token norm 1."""
    out = graph.body.run(torch.cat([e + step * v, e - step * v]))
    plus, minus = out.chunk(2)
    return rms_norm(plus - minus) / (2 * step)


def _in_ball(x: Tensor, radius: float) -> Tensor:
    """Each token scaled down to RMS norm at most `radius`."""
    return x * (radius / rms_norm(x).clamp_min(1e-300)).clamp_max(1.0).unsqueeze(-1)


def _steepest(gradient: Tensor) -> Tensor:
    """Each token scaled to RMS norm 1: the corner of the token norm's ball that a gradient points to."""
    return (gradient / rms_norm(gradient).clamp_min(1e-300).unsqueeze(-1)).detach()


def _starts(graph: Graph, restarts: int, tokens: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and directions [restarts, tokens, d] in units of the radius, by turns:

    two opposite values, what attention fears, built for one head (those with the largest norms first)
    or of random values; near zero, where kept norms are steep; random.
    """
    d, device = graph.entry.width, next(graph.root.parameters()).device
    generator = torch.Generator().manual_seed(seed)
    inputs = 2 * torch.randn(restarts, tokens, d, generator=generator, dtype=torch.float64)
    directions = torch.randn(restarts, tokens, d, generator=generator, dtype=torch.float64)
    signs = torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).double()[:, None]
    heads = _heads(graph)[: (restarts + 1) // 2]
    for i in range(restarts):
        if i % 5 == 1:
            inputs[i] = signs * inputs[i, :1]
        elif i % 5 == 3:
            inputs[i] *= 1e-3
        elif heads and i % 5 != 4:
            inputs[i] = _opposite_values(*heads.pop(0), signs, inputs[i]) * d**0.5
    return inputs.to(device), directions.to(device)


def _heads(graph: Graph) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(q, k, v) rows of every head [d_head, d], largest product of Frobenius norms first."""
    found = []
    for _, attention in attentions(graph.body.nodes):
        parts = [
            p.linear.weight()[p.start : p.stop].detach().double().cpu().unflatten(0, (p.heads, -1))
            for p in (attention.q, attention.k, attention.v)
        ]
        group = attention.q.heads // attention.k.heads
        for h in range(attention.q.heads):
            head = (parts[0][h], parts[1][h // group], parts[2][h // group])
            size = torch.stack([w.norm() for w in head]).log().sum()
            found.append((float(size.nan_to_num(neginf=-1e9)), head))
    return [head for _, head in sorted(found, key=lambda pair: -pair[0])]


def _opposite_values(q: Tensor, k: Tensor, v: Tensor, signs: Tensor, fallback: Tensor) -> Tensor:
    """Tokens +-w, w what keys and values read best together; the last token what the query reads beside w."""
    if min(float(w.norm()) for w in (q, k, v)) == 0:
        return fallback
    w = torch.linalg.svd(torch.cat([k / k.norm(), v / v.norm()]), full_matrices=False).Vh[0]
    asks = torch.linalg.svd(q - (q @ w)[:, None] * w, full_matrices=False).Vh[0]
    x = signs * w
    x[len(x) - 2 + len(x) % 2 :] = asks  # an even number of tokens before: no sign prevails
    return x
