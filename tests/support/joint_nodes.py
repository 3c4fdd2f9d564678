"""Attention, MLP and gate nodes from plain weights, and an attack on any of them.

The nodes come with their proven norms.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from lip_plugin.certificate.graph.attention import Attention, HeadRows
from lip_plugin.certificate.graph.base import Bound, LinearNorms, ProvenNorms
from lip_plugin.certificate.graph.containers import Chain, Residual
from lip_plugin.certificate.graph.decimals import INF, to_float, up
from lip_plugin.certificate.graph.joint_attention import AttentionOut
from lip_plugin.certificate.graph.joint_bounds import GatedMlp, MlpResidual
from lip_plugin.certificate.graph.nodes import Activation, Gate, Linear, Scale
from lip_plugin.linalg.norms import row_rms_max_upper, sigma_max_upper
from lip_plugin.model.activations import ACTIVATIONS, ScaledActivation
from tests.support.oracles import rand, rms

EXACT = 1 + 1e-9  # secants over 2e-5 of the radius in float64, sizes near 1: good to 1e-10
TIGHT = (
    1 + 1e-5
)  # sigma_max_upper of small matrices is 5e-7 high, and a rule has three such factors


def unit(d: int, i: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)[i]


def linear(name: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return Linear(name, lambda: weight, lambda: bias, weight.shape[0], weight.shape[1])


def measured(node: Any, linears: dict[str, tuple[Linear, int]]) -> ProvenNorms:
    """Proven norms of each linear map, and what the joint node measures of them.

    A map has `heads` parts.
    """
    norms = ProvenNorms()
    for role, (one, heads) in linears.items():
        weight = one.weight()
        sigma = up(float(sigma_max_upper(weight)))
        row = up(float(row_rms_max_upper(weight)) * weight.shape[1] ** 0.5 * (1 + 1e-15))
        parts = (
            [up(float(s)) for s in sigma_max_upper(weight.unflatten(0, (heads, -1)))]
            if heads
            else []
        )
        norms[one.name] = LinearNorms(sigma, row, {role: sigma}, {role: parts})
    norms.joint[node.name] = node.measure(norms)
    return norms


def attention_out(
    w: dict[str, Tensor],
    heads: int,
    kv: int,
    tau: float,
    *,
    bias: dict[str, Tensor] | None = None,
    rotary: Any = None,
    q_norm: Any = None,
    k_norm: Any = None,
) -> tuple[AttentionOut, ProvenNorms]:
    """w: q, k, v [heads * d_head, d_in] and out [d_out, heads * d_head]."""
    nodes = {role: linear(role, w[role], (bias or {}).get(role)) for role in ("q", "k", "v", "out")}
    counts = {"q": heads, "k": kv, "v": kv}
    parts = [HeadRows(r, nodes[r], 0, nodes[r].d_out, n) for r, n in counts.items()]
    d_head = nodes["q"].d_out // heads
    attention = Attention("a", *parts, tau, d_head, nodes["q"].d_in, q_norm, k_norm, rotary)
    node = AttentionOut("o", [attention, nodes["out"]])
    return node, measured(node, {r: (n, counts.get(r, 0)) for r, n in nodes.items()})


def gated(
    g: Tensor, u: Tensor, d: Tensor, act: Activation, *b: Tensor | None
) -> tuple[GatedMlp, ProvenNorms]:
    bias = [*b, None, None, None][:3]
    nodes = [
        linear(n, w, x) for n, w, x in zip(("gate", "up", "down"), (g, u, d), bias, strict=True)
    ]
    node = GatedMlp("m", [Gate("g", nodes[0], nodes[1], act), nodes[2]])
    return node, measured(node, {n.name: (n, 0) for n in nodes})


def mlp(
    w1: Tensor, w2: Tensor, act: Activation, c: float, g: float, *b: Tensor | None
) -> tuple[MlpResidual, ProvenNorms]:
    bias = [*b, None, None][:2]
    first, second = linear("up", w1, bias[0]), linear("down", w2, bias[1])
    node = MlpResidual("m", Chain("c", [Scale("s", c), first, act, second, Scale("t", g)]))
    return node, measured(node, {"up": (first, 0), "down": (second, 0)})


def activation(kind: str, scaled: bool = False) -> Activation:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ACTIVATIONS[kind](x)

    return Activation("act", ScaledActivation(Plain(), kind) if scaled else Plain(), kind)


def joint_only(node: Any, r: float, norms: ProvenNorms) -> tuple[float, float]:
    """Radius and constant by the joint rule alone; the other rules are made infinite."""
    nothing = mock.Mock(return_value=Bound(INF, INF))
    with mock.patch.object(Chain, "bound", nothing), mock.patch.object(Residual, "bound", nothing):
        bound = node.bound(up(r), norms)
    return to_float(bound.radius), to_float(bound.lipschitz)


def plain_only(node: Any, r: float, norms: ProvenNorms) -> tuple[float, float]:
    """Radius and constant by the rules of single maps."""
    single = ProvenNorms(norms)
    single.joint[node.name] = () if isinstance(node, AttentionOut) else None
    bound = node.bound(up(r), single)
    return to_float(bound.radius), to_float(bound.lipschitz)


def attack(
    node: Any, d: int, tokens: int, r: float, *, seed: int, steps: int = 20
) -> tuple[float, float]:
    """Attack a node on the ball of radius r; gives the size and the slope that are attained.

    Adam moves the inputs, directions are the steepest, and norms are token norms. 1e-10 of size / r
    is taken from the slope, for a forward that is off by 1e-15 over ends that are 2e-5 r apart.
    """
    h = 1e-5 * r
    start = 2 * rand(6, tokens, d, seed=seed)
    start[::2] *= torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).double()[:, None]
    start[1] = (
        start[1, :1] * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).double()[:, None]
    )
    x = (start * r).requires_grad_(True)
    v = rand(6, tokens, d, seed=seed + 1)
    optimizer = torch.optim.Adam([x], lr=0.1 * r)
    slope, size = 0.0, 0.0
    for _ in range(steps):
        e = x * ((r - h) / rms(x).clamp_min(1e-9 * r)).clamp_max(1.0).unsqueeze(-1)
        v = (v / rms(v).unsqueeze(-1).clamp_min(1e-300)).detach().requires_grad_(True)
        out = node.run(torch.cat([e + h * v, e - h * v]))
        size = max(size, float(rms(out.detach()).max()))
        plus, minus = out.chunk(2)
        gains = rms(plus - minus).amax(-1) / (2 * h)
        slope = max(slope, float(gains.detach().max()))
        x.grad, turn = torch.autograd.grad(-gains.clamp_min(1e-300).log().sum(), [x, v])
        optimizer.step()
        v = torch.where(turn.abs().amax(-1, keepdim=True) > 0, -turn, v.detach())
    return size, max(0.0, slope - 1e-10 * size / r)


def secant(node: Any, x: Tensor, v: Tensor, h: float = 1e-6) -> float:
    """The slope of the last token's output, along a direction v of token norm 1."""
    assert float(rms(v).max()) == pytest.approx(1.0)
    return float(rms(node.run((x + h * v)[None]) - node.run((x - h * v)[None]))[0, -1]) / (2 * h)


class Turn(nn.Module):
    """Rotary positions, whose angles grow with the position by `speed`.

    All pairs turn alike where `alike` says so.
    """

    def __init__(
        self, d_head: int, scaling: float = 1.0, speed: float = 1.0, alike: bool = False
    ) -> None:
        super().__init__()
        self.attention_scaling = scaling
        steps = torch.arange(d_head // 2) * (0 if alike else 1)
        self.speeds = speed * torch.cat([2.0**-steps, 2.0**-steps]).double()

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].double() * self.speeds
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling
