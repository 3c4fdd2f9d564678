"""The rules for several maps together are theorems: attacked, attained, and seen to fail when weakened."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any
from unittest import mock

import pytest
import torch
from families import FAMILIES, tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import randomize_
from torch import Tensor, nn

from lip_plugin import LipschitzConfig, project_, retrofit
from lip_plugin.certificate import joint
from lip_plugin.certificate.attention import Attention, Projection
from lip_plugin.certificate.build import build
from lip_plugin.certificate.graph import (
    Activation,
    Bound,
    Chain,
    Gate,
    Linear,
    LinearNorms,
    Norms,
    Residual,
    Scale,
    walk,
)
from lip_plugin.certificate.joint import AttentionOut, GatedMlp, HeadNorms, MlpResidual
from lip_plugin.certificate.measure import cap_norms, weight_norms
from lip_plugin.certificate.upper import INF, to_float, up
from lip_plugin.linalg.norms import row_rms_max_upper, sigma_max_upper
from lip_plugin.modules import ACTIVATIONS, SLOPE_UPPER, ScaledActivation

EXACT = 1 + 1e-9  # secants over 2e-5 of the radius in float64, sizes near 1: good to 1e-10
TIGHT = 1 + 1e-5  # sigma_max_upper of small matrices is 5e-7 high, and a rule has three such factors


def rms(x: Tensor) -> Tensor:
    return x.square().mean(-1).sqrt()


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit(d: int, i: int) -> Tensor:
    return torch.eye(d, dtype=torch.float64)[i]


# ---- nodes from weights ----------------------------------------------------------------------------


def linear(name: str, weight: Tensor, bias: Tensor | None = None) -> Linear:
    return Linear(name, lambda: weight, lambda: bias, weight.shape[0], weight.shape[1])


def measured(node: Any, linears: dict[str, tuple[Linear, int]]) -> Norms:
    """Proven norms of each linear map (of `heads` parts), and what the joint node measures of them."""
    norms = Norms()
    for role, (one, heads) in linears.items():
        weight = one.weight()
        sigma = up(float(sigma_max_upper(weight)))
        row = up(float(row_rms_max_upper(weight)) * weight.shape[1] ** 0.5 * (1 + 1e-15))
        parts = [up(float(s)) for s in sigma_max_upper(weight.unflatten(0, (heads, -1)))] if heads else []
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
) -> tuple[AttentionOut, Norms]:
    """w: q, k, v [heads * d_head, d_in] and out [d_out, heads * d_head]."""
    nodes = {role: linear(role, w[role], (bias or {}).get(role)) for role in ("q", "k", "v", "out")}
    counts = {"q": heads, "k": kv, "v": kv}
    parts = [Projection(r, nodes[r], 0, nodes[r].d_out, n) for r, n in counts.items()]
    d_head = nodes["q"].d_out // heads
    attention = Attention("a", *parts, tau, d_head, nodes["q"].d_in, q_norm, k_norm, rotary)
    node = AttentionOut("o", [attention, nodes["out"]])
    return node, measured(node, {r: (n, counts.get(r, 0)) for r, n in nodes.items()})


def gated(g: Tensor, u: Tensor, d: Tensor, act: Activation, *b: Tensor | None) -> tuple[GatedMlp, Norms]:
    bias = [*b, None, None, None][:3]
    nodes = [linear(n, w, x) for n, w, x in zip(("gate", "up", "down"), (g, u, d), bias, strict=True)]
    node = GatedMlp("m", [Gate("g", nodes[0], nodes[1], act), nodes[2]])
    return node, measured(node, {n.name: (n, 0) for n in nodes})


def mlp(
    w1: Tensor, w2: Tensor, act: Activation, c: float, g: float, *b: Tensor | None
) -> tuple[MlpResidual, Norms]:
    bias = [*b, None, None][:2]
    first, second = linear("up", w1, bias[0]), linear("down", w2, bias[1])
    node = MlpResidual("m", Chain("c", [Scale("s", c), first, act, second, Scale("t", g)]))
    return node, measured(node, {"up": (first, 0), "down": (second, 0)})


def activation(kind: str, scaled: bool = False) -> Activation:
    class Plain(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return ACTIVATIONS[kind](x)

    return Activation("act", ScaledActivation(Plain(), kind) if scaled else Plain(), kind)


def joint_only(node: Any, r: float, norms: Norms) -> tuple[float, float]:
    """(radius, constant) by the joint rule alone: the old ones are made infinite."""
    nothing = mock.Mock(return_value=Bound(INF, INF))
    with mock.patch.object(Chain, "bound", nothing), mock.patch.object(Residual, "bound", nothing):
        bound = node.bound(up(r), norms)
    return to_float(bound.radius), to_float(bound.lipschitz)


def plain_only(node: Any, r: float, norms: Norms) -> tuple[float, float]:
    """(radius, constant) by the rules of single maps."""
    single = Norms(norms)
    single.joint[node.name] = () if isinstance(node, AttentionOut) else None
    bound = node.bound(up(r), single)
    return to_float(bound.radius), to_float(bound.lipschitz)


def attack(node: Any, d: int, tokens: int, r: float, *, seed: int, steps: int = 20) -> tuple[float, float]:
    """(size, slope) attained on the ball of radius r: Adam on inputs, steepest directions, token norms.

    The slope less 1e-10 of size / r: a forward off by 1e-15, over ends that are 2e-5 r apart.
    """
    h = 1e-5 * r
    start = 2 * rand(6, tokens, d, seed=seed)
    start[::2] *= torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).double()[:, None]
    start[1] = start[1, :1] * torch.where(torch.arange(tokens) % 2 == 0, 1.0, -1.0).double()[:, None]
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
    """Slope of the last token's output; v has token norm 1."""
    assert float(rms(v).max()) == pytest.approx(1.0)
    return float(rms(node.run((x + h * v)[None]) - node.run((x - h * v)[None]))[0, -1]) / (2 * h)


class Turn(nn.Module):
    """Rotary positions; angles grow with the position by `speed`, all pairs alike where `alike`."""

    def __init__(self, d_head: int, scaling: float = 1.0, speed: float = 1.0, alike: bool = False) -> None:
        super().__init__()
        self.attention_scaling = scaling
        steps = torch.arange(d_head // 2) * (0 if alike else 1)
        self.speeds = speed * torch.cat([2.0**-steps, 2.0**-steps]).double()

    def forward(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        angles = positions[..., None].double() * self.speeds
        return angles.cos() * self.attention_scaling, angles.sin() * self.attention_scaling


# ---- attention through its output map: attained ----------------------------------------------------


def aligned(heads: int, d: int = 4, d_head: int = 2) -> dict[str, Tensor]:
    """Every head the same: query e1 -> f1, e2 -> f2; key e2 -> f2, e3 -> f1; value e2 -> f1; out f1 -> e2."""
    q, k, v = torch.zeros(3, d_head, d, dtype=torch.float64)
    q[0, 0] = q[1, 1] = k[1, 1] = k[0, 2] = v[0, 1] = 1.0
    out = torch.zeros(d, d_head, dtype=torch.float64)
    out[1, 0] = 1.0
    w = {"q": q, "k": k, "v": v}
    return {n: t.repeat(heads, 1) for n, t in w.items()} | {"out": out.repeat(1, heads)}


def worst(d: int, beta: float, pairs: int) -> tuple[Tensor, Tensor]:
    """Tokens +-e2 and a query at e1; values move along e2, keys along +-e3, the query along e2."""
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(pairs)
    x, v = torch.zeros(2, 2 * pairs + 1, d, dtype=torch.float64)
    x[:-1, 1], x[-1, 0] = signs, 1.0
    v[:-1, 1], v[:-1, 2] = 1 / math.hypot(1, beta), signs * beta / math.hypot(1, beta)
    v[-1, 1] = 1.0
    return x * d**0.5, v * d**0.5


@pytest.mark.parametrize("heads", [1, 2, 5])
@pytest.mark.parametrize("tau", [0.5, -0.5])
def test_aligned_heads_attain_the_joint_rule(heads: int, tau: float) -> None:
    """H (sqrt(1 + beta^2) + beta) with beta = tau rho^2, less one token in 801 that asks."""
    d, pairs = 4, 400
    beta = abs(tau) * d
    node, norms = attention_out(aligned(heads), heads, heads, tau)
    radius, constant = joint_only(node, 1.0, norms)
    x, v = worst(d, beta, pairs)
    x[:-1, 2] = 0
    v[-1] *= math.copysign(1.0, tau)
    v[:-1, 2] *= math.copysign(1.0, tau)
    assert constant == pytest.approx(heads * (math.hypot(1, beta) + beta), rel=1e-5)
    assert 0.997 * constant < secant(node, x, v) < constant
    same = unit(d, 1).expand(3, d) * d**0.5
    assert float(rms(node.run(same)).max()) <= radius <= float(rms(node.run(same)).max()) * TIGHT


def test_the_joint_rule_is_attained_where_single_norms_are_twenty_times_too_large() -> None:
    """An output map that is large where no value arrives, and a key that is large where no query asks."""
    w = aligned(3)
    w["out"][0, 1::2] = 20.0  # f2, which no value reaches
    node, norms = attention_out(w, 3, 3, 0.5)
    x, v = worst(4, 2.0, 400)
    _, constant = joint_only(node, 1.0, norms)
    assert 0.997 * constant < secant(node, x, v) < constant
    assert plain_only(node, 1.0, norms)[1] > 19 * constant


def test_one_head_among_empty_ones_is_attained_by_its_own_weights() -> None:
    """Equal weights would count the empty heads in omega; the choice by the size of M_h does not."""
    w = aligned(4)
    for name in ("q", "k", "v"):
        w[name][2:] = 0.0
    node, norms = attention_out(w, 4, 4, 0.5)
    x, v = worst(4, 2.0, 400)
    _, constant = joint_only(node, 1.0, norms)
    assert 0.997 * constant < secant(node, x, v) < constant
    equal = Norms(norms)
    equal.joint["o"] = norms.joint["o"][:1]
    assert joint_only(node, 1.0, equal)[1] > 1.05 * constant


FIELDS = ("spread", "values", "scores", "both")


@pytest.mark.parametrize("field", FIELDS)
def test_a_weakened_joint_rule_is_exceeded(field: str) -> None:
    """Break it, see it fail: each norm a tenth smaller, and omega dropped, is below what is attained."""
    node, norms = attention_out(aligned(2), 2, 2, 0.5)
    x, v = worst(4, 2.0, 400)
    seen = secant(node, x, v)
    for factor in (Decimal("0.9"), Decimal("0.5"), Decimal(0)):
        broken = Norms(norms)
        broken.joint["o"] = tuple(replace(h, **{field: getattr(h, field) * factor}) for h in norms.joint["o"])
        assert joint_only(node, 1.0, broken)[1] < seen, (field, factor)
    assert seen < joint_only(node, 1.0, norms)[1]


def test_the_sum_of_products_cannot_be_left_out_and_is_attained_by_oblique_keys() -> None:
    """The query's part alone, two heads, values e1 and keys at an angle t to it: (G B + C) / 2 with
    C = G B cos t, attained by two tokens on the bisector; with C halved it is exceeded."""
    d, tau, t = 4, 0.3, 1.0
    q, k, v = torch.zeros(3, 2, d, dtype=torch.float64)
    q[0, 2] = v[0, 0] = 1.0
    k[0, 0], k[0, 1] = math.cos(t), math.sin(t)
    out = torch.zeros(d, 2, dtype=torch.float64)
    out[3, 0] = 1.0
    w = {n: m.repeat(2, 1) for n, m in (("q", q), ("k", k), ("v", v))} | {"out": out.repeat(1, 2)}
    node, norms = attention_out(w, 2, 2, tau)
    heads: HeadNorms = norms.joint["o"][0]
    assert float(heads.both) == pytest.approx(2 * math.cos(t), rel=1e-5)
    assert float(heads.values * heads.scores) == pytest.approx(2.0, rel=1e-5)

    def query_part(h: HeadNorms) -> float:
        """The rule, less what it says when values and scores of the query's part are 0."""
        rho = up(d).sqrt()
        none = replace(h, both=-h.values * h.scores)
        return float(h.lipschitz(rho, up(tau)) - none.lipschitz(rho, up(tau)))

    pairs = 400
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(pairs)
    x, moves = torch.zeros(2, 2 * pairs + 1, d, dtype=torch.float64)
    x[:-1, 0], x[:-1, 1] = signs * math.cos(t / 2), signs * math.sin(t / 2)
    moves[-1, 2] = 1.0
    seen = secant(node, x * d**0.5, moves * d**0.5)
    assert 0.997 * query_part(heads) < seen < query_part(heads) * EXACT
    assert heads.both is not None
    assert query_part(replace(heads, both=heads.both / 2)) < 0.9 * seen


def test_turned_keys_attain_the_sum_that_unturned_ones_do_not_reach() -> None:
    """Half a turn between two tokens: one movement raises a logit and lowers the other, 1 + 2 beta."""
    d, beta = 4, 1.5
    q, k, v = torch.zeros(3, d, d, dtype=torch.float64)
    k[0, 0] = v[0, 0] = 1.0
    w = {"q": q, "k": k, "v": v, "out": torch.eye(d, dtype=torch.float64)}
    bias = {"q": beta * unit(d, 0)}
    turned, norms = attention_out(w, 1, 1, 1.0, bias=bias, rotary=Turn(d, speed=math.pi, alike=True))
    straight, straight_norms = attention_out(w, 1, 1, 1.0, bias=bias)
    x = torch.stack([-2 * unit(d, 0), 2 * unit(d, 0)])
    seen = secant(turned, x, (2 * unit(d, 0)).expand(2, d))
    _, constant = joint_only(turned, 1.0, norms)
    assert seen == pytest.approx(1 + 2 * beta)
    assert seen <= constant * EXACT
    assert constant <= seen * TIGHT
    assert joint_only(straight, 1.0, straight_norms)[1] == pytest.approx(math.hypot(1, 2 * beta), rel=1e-5)
    broken = Norms(norms)
    broken.joint["o"] = tuple(replace(h, query_bias=h.query_bias / 2) for h in norms.joint["o"])
    assert joint_only(turned, 1.0, broken)[1] < seen


# ---- attention through its output map: attacked ----------------------------------------------------

KINDS = ("random", "aligned", "orthogonal outputs", "values are keys", "rank one", "uneven", "empty head")


def structured(
    kind: str, heads: int, kv: int, d_head: int, d: int, d_out: int, seed: int
) -> dict[str, Tensor]:
    shapes = {"q": (heads * d_head, d), "k": (kv * d_head, d), "v": (kv * d_head, d)}
    w = {n: rand(*s, seed=seed + i) / d**0.5 for i, (n, s) in enumerate(shapes.items())}
    w["out"] = rand(d_out, heads * d_head, seed=seed + 9) / d**0.5
    if kind == "aligned":
        for n, count in (("q", heads), ("k", kv), ("v", kv)):
            w[n] = w[n][:d_head].repeat(count, 1)
        w["out"] = w["out"][:, :d_head].repeat(1, heads)
    elif kind == "orthogonal outputs":
        w["out"] = torch.linalg.qr(rand(heads * d_head, d_out, seed=seed)).Q.T.contiguous()
    elif kind == "values are keys":
        w["v"] = w["k"].clone()
        w["out"] = (w["q"].T[:d_out] if d_out <= d else w["out"]).contiguous()
    elif kind == "rank one":
        for n in ("q", "k", "v"):
            w[n] = w[n][:, :1] * unit(d, 0) + 0.0
    elif kind == "uneven":
        w["q"][:d_head] *= 30
        w["v"][-d_head:] *= 30
        w["out"][:, :d_head] *= 0.01
    elif kind == "empty head":
        w["q"][:d_head] = 0.0
        w["v"][-d_head:] = 0.0
    return w


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.sampled_from([(1, 1), (2, 2), (2, 1), (4, 2), (3, 3)]),
    st.sampled_from([2, 4]),
    st.sampled_from([3, 5]),
    st.sampled_from([0.0, 0.7, 3.0]),
    st.sampled_from([-0.8, 0.2, 1.0]),
    st.floats(0.2, 2.0),
    st.sampled_from(["no", "turned", "scaled"]),
    st.integers(2, 7),
    st.integers(0, 10**6),
)
def test_attention_through_its_output_map_holds_under_attack(
    kind: str,
    heads: tuple[int, int],
    d_head: int,
    d_out: int,
    bias: float,
    tau: float,
    r: float,
    form: str,
    tokens: int,
    seed: int,
) -> None:
    """Grouped heads, d_head * heads other than d, biases, turns with a scaling, constants for QK-norms."""
    d = 5
    w = structured(kind, *heads, d_head, d, d_out, seed)
    biases = {n: bias * rand(len(m), seed=seed + 20 + i) for i, (n, m) in enumerate(w.items())}
    rotary = Turn(d_head, 1.3) if form == "turned" else None
    slots = [Scale("q_norm", -0.7), Scale("k_norm", 1.6)] if form == "scaled" else [None, None]
    node, norms = attention_out(
        w, *heads, tau, bias=biases if bias else None, rotary=rotary, q_norm=slots[0], k_norm=slots[1]
    )
    size, slope = attack(node, d, tokens, r, seed=seed)
    for radius, constant in (joint_only(node, r, norms), plain_only(node, r, norms)):
        assert size <= radius * EXACT
        assert slope <= constant * EXACT
    # any weights of the heads are proven, however odd
    odd = 10 ** (
        -3 * torch.rand(heads[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    norms.joint["o"] = (joint._Heads.of(*node._parts()).norms(odd, norms),)
    radius, constant = joint_only(node, r, norms)
    assert size <= radius * EXACT
    assert slope <= constant * EXACT


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("big", [1e30, 1e-30, 1e150, 1e-150])
def test_sizes_that_cancel_leave_the_bound_as_it_was(big: float, turned: bool) -> None:
    """q and v times `big`, k and out divided by it: one and the same function."""
    w = structured("random", 2, 1, 2, 5, 5, 3)
    bias = {"q": rand(4, seed=5), "v": rand(2, seed=6), "k": rand(2, seed=7)}
    factor = {"q": big, "k": 1 / big, "v": big, "out": 1 / big}
    rotary = Turn(2) if turned else None
    bounds = []
    for on in (False, True):
        weights = {n: m * factor[n] ** on for n, m in w.items()}
        biases = {n: m * factor[n] ** on for n, m in bias.items()}
        node, norms = attention_out(weights, 2, 1, 0.5, bias=biases, rotary=rotary)
        bounds.append(joint_only(node, 1.0, norms))
    # the float64 products round other numbers, and the guess of sigma_max moves: 1e-6 of it at most
    assert bounds[1] == pytest.approx(bounds[0], rel=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_stored_dtypes_are_converted_exactly(dtype: torch.dtype) -> None:
    w = {n: m.to(dtype) for n, m in structured("uneven", 2, 1, 2, 5, 5, 4).items()}
    wide = {n: m.double() for n, m in w.items()}
    (narrow, a), (full, b) = (attention_out(x, 2, 1, 0.5) for x in (w, wide))
    assert joint_only(narrow, 1.0, a) == joint_only(full, 1.0, b)


@pytest.mark.parametrize("zero", ["q", "k", "v", "out", "all"])
@pytest.mark.parametrize("turned", [False, True])
def test_zero_matrices_are_bounded_and_still_not_beaten(zero: str, turned: bool) -> None:
    w = structured("random", 2, 2, 2, 5, 5, 8)
    for name in w if zero == "all" else [zero]:
        w[name].zero_()
    node, norms = attention_out(w, 2, 2, 1.0, rotary=Turn(2) if turned else None)
    size, slope = attack(node, 5, 4, 1.0, seed=1, steps=8)
    radius, constant = joint_only(node, 1.0, norms)
    assert size <= radius * EXACT
    assert slope <= constant * EXACT
    if zero in ("v", "out", "all"):
        assert constant < 1e-100  # not exactly 0: a product of zeros carries a bound on its underflow


# ---- MLP with its residual -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(SLOPE_UPPER))
def test_odd_parts_of_activations_are_as_small_and_flat_as_the_proof_says(kind: str) -> None:
    """e(z) = f(z) - z / 2: abs(e) <= abs(z) / 2, and abs(e') <= slope - 1/2 on a grid of 1e-3."""
    z = torch.linspace(-40, 40, 80001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(ACTIVATIONS[kind](z).sum(), z)
    e = (ACTIVATIONS[kind](z) - z / 2).detach()
    assert bool((e.abs() <= z.detach().abs() / 2 * (1 + 1e-15)).all())
    assert float((slope - 0.5).abs().max()) <= SLOPE_UPPER[kind] - 0.5 + 1e-15


@pytest.mark.parametrize("kind", sorted(SLOPE_UPPER))
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_mlp_with_its_residual_is_attained_where_the_slope_is_extreme(
    kind: str, scaled: bool, sign: float
) -> None:
    """c g W_2 W_1 = +-I: 1 + largest slope, and 1 - smallest one; relu at -I gives 1, where single norms say 2."""
    act = activation(kind, scaled)
    z = torch.linspace(-8, 8, 160001, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(act.run(z).sum(), z)
    at = float(z[(sign * slope).argmax()].detach())
    truth = 1 + float((sign * slope).max())
    turn = torch.linalg.qr(rand(3, 3, seed=1)).Q
    node, norms = mlp(2.0 * turn, turn.T.contiguous(), act, c=-0.5, g=-sign)
    radius, constant = joint_only(node, 8.0, norms)
    x = (turn.T @ torch.full((3,), -at, dtype=torch.float64))[None]
    move = (turn.T @ torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64))[None] * 3**0.5
    seen = secant(node, x, move, h=1e-6 if kind != "relu" or abs(at) > 1e-3 else 1e-9)
    assert seen == pytest.approx(truth, rel=1e-6)
    assert seen <= constant * EXACT
    assert constant <= truth * (1 + 1e-5)
    size, _ = attack(node, 3, 1, 8.0, seed=2, steps=5)
    assert size <= radius * EXACT
    if kind == "relu" and not scaled and sign < 0:
        assert plain_only(node, 8.0, norms)[1] > 1.99
        assert radius == pytest.approx(8.0, rel=1e-5)
        far = -x * (8.0 / float(rms(x)[0])) if at > 0 else x * (8.0 / max(float(rms(x)[0]), 1e-9))
        assert max(float(rms(node.run(s * far))[0]) for s in (1, -1)) == pytest.approx(8.0, rel=1e-5)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(SLOPE_UPPER)),
    st.booleans(),
    st.integers(1, 7),
    st.sampled_from([-1.3, 0.4, 1.0]),
    st.sampled_from([-2.0, 0.7]),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.floats(0.1, 4.0),
    st.integers(0, 10**6),
)
def test_mlp_with_its_residual_holds_under_attack(
    kind: str, scaled: bool, width: int, c: float, g: float, bias: float, r: float, seed: int
) -> None:
    w1 = rand(width, 4, seed=seed)
    w2 = -w1.T.contiguous() if seed % 2 else rand(4, width, seed=seed + 1)
    biases = [bias * rand(width, seed=seed + 2), bias * rand(4, seed=seed + 3)] if bias else []
    node, norms = mlp(w1, w2, activation(kind, scaled), c, g, *biases)
    size, slope = attack(node, 4, 1, r, seed=seed)
    for radius, constant in (joint_only(node, r, norms), plain_only(node, r, norms)):
        assert size <= radius * EXACT
        assert slope <= constant * EXACT


def test_a_weakened_mlp_rule_is_exceeded() -> None:
    """The identity without the linear half of the branch, or a swing of half the size, fails for relu."""
    eye = torch.eye(3, dtype=torch.float64)
    on = torch.full((1, 3), 1.0, dtype=torch.float64)
    node, norms = mlp(eye, eye, activation("relu"), 1.0, 1.0)
    seen = secant(node, on, on)
    assert seen == pytest.approx(2.0)
    broken = Norms(norms)
    broken.joint["m"] = replace(norms.joint["m"], linear=Decimal("1.000001"))
    assert joint_only(node, 1.0, broken)[1] < seen
    with mock.patch.object(Activation, "swing", return_value=Decimal("0.25")):
        assert joint_only(node, 1.0, norms)[1] < seen
    assert seen <= joint_only(node, 1.0, norms)[1] * EXACT


def test_a_constant_beside_the_activation_is_not_measured() -> None:
    """x + W_2 f(2 W_1 x) is not x + 2 W_2 f(W_1 x) where f is curved: such a branch gets the plain rule."""
    eye = torch.eye(3, dtype=torch.float64)
    first, second, act = linear("up", eye), linear("down", eye), activation("gelu")
    for nodes in ([first, Scale("s", 2.0), act, second], [first, act, Scale("s", 2.0), second]):
        node = MlpResidual("m", Chain("c", nodes))
        assert measured(node, {"up": (first, 0), "down": (second, 0)}).joint["m"] is None


# ---- gate through its output map -------------------------------------------------------------------


@pytest.mark.parametrize("d", [1, 4, 9])
def test_identity_gates_attain_two_roots_of_the_width(d: int) -> None:
    """relu(x) * x along the first coordinate: x_1^2 has slope 2 sqrt(d), size sqrt(d)."""
    eye = torch.eye(d, dtype=torch.float64)
    node, norms = gated(eye, eye, eye, activation("relu"))
    radius, constant = joint_only(node, 1.0, norms)
    x = unit(d, 0)[None] * d**0.5
    assert secant(node, x, x) == pytest.approx(2 * d**0.5)
    assert 2 * d**0.5 <= constant <= 2 * d**0.5 * TIGHT
    assert float(rms(node.run(x))[0]) <= radius <= d**0.5 * TIGHT
    with mock.patch.object(joint, "_HADAMARD_UP_TO", d - 1):
        assert node.measure(norms) is None, "too wide to square: the plain rule alone"


def test_the_gate_rule_is_attained_where_single_norms_are_ten_times_too_large() -> None:
    """Rows that are large in one map and small in the other: 10, where norms of single maps say 100."""
    w_g, w_u = (torch.diag(torch.tensor(s, dtype=torch.float64)) for s in ([10.0, 1.0], [1.0, 10.0]))
    node, norms = gated(w_g, w_u, torch.eye(2, dtype=torch.float64), activation("relu"))
    radius, constant = joint_only(node, 1.0, norms)
    x = unit(2, 0)[None] * 2**0.5
    seen = secant(node, x, x)
    assert seen == pytest.approx(20 * 2**0.5)
    assert seen <= constant * EXACT <= seen * TIGHT
    assert float(rms(node.run(x))[0]) <= radius * EXACT
    assert plain_only(node, 1.0, norms)[1] > 9.9 * constant
    broken = Norms(norms)
    broken.joint["m"] = joint.GateNorms(norms.joint["m"].product / 2)
    assert joint_only(node, 1.0, broken)[1] < seen


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    st.sampled_from(sorted(SLOPE_UPPER)),
    st.booleans(),
    st.integers(1, 7),
    st.sampled_from(["random", "same", "rank one", "uneven"]),
    st.sampled_from([0.0, 0.5, 5.0]),
    st.floats(0.1, 4.0),
    st.integers(0, 10**6),
)
def test_gate_through_its_output_map_holds_under_attack(
    kind: str, scaled: bool, width: int, form: str, bias: float, r: float, seed: int
) -> None:
    w_g, w_u = rand(width, 4, seed=seed), rand(width, 4, seed=seed + 1)
    w_d = rand(3, width, seed=seed + 2)
    if form == "same":
        w_u, w_d = w_g.clone(), w_g[:, :3].T.contiguous()
    elif form == "rank one":
        w_g, w_u = (w[:, :1] * unit(4, 1) for w in (w_g, w_u))
    elif form == "uneven":
        w_g[0] *= 20
        w_d[:, -1] *= 20
    biases = [bias * rand(n, seed=seed + 3 + i) for i, n in enumerate((width, width, 3))] if bias else []
    node, norms = gated(w_g, w_u, w_d, activation(kind, scaled), *biases)
    size, slope = attack(node, 4, 1, r, seed=seed)
    for radius, constant in (joint_only(node, r, norms), plain_only(node, r, norms)):
        assert size <= radius * EXACT
        assert slope <= constant * EXACT


# ---- from caps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("granularity", ["matrix", "head"])
def test_what_the_caps_say_is_never_below_what_the_weights_say(family: str, granularity: str) -> None:
    """Random weights, biases too, projected into the caps: every joint norm, and every bound of every node."""
    model: Any = tiny(family)
    retrofit(model, LipschitzConfig(granularity=granularity))
    project_(randomize_(model))
    with torch.no_grad():
        graph = build(model)
        now, caps = weight_norms(graph), cap_norms(graph)
    found = 0
    for node in walk(graph.body.nodes):
        for r in (up(0.3), up(1.0), up(4.0)):
            a, b = node.bound(r, now), node.bound(r, caps)
            assert a.radius <= b.radius
            assert a.lipschitz <= b.lipschitz
        if isinstance(node, AttentionOut):
            found += 1
            ours, theirs = now.joint[node.name][0], caps.joint[node.name][0]
            for field in fields(HeadNorms):
                small, large = getattr(ours, field.name), getattr(theirs, field.name)
                assert small is large is None or small <= large * Decimal("1.000000001"), field.name
        if isinstance(node, GatedMlp):
            found += 1
            assert now.joint[node.name].product <= caps.joint[node.name].product
    assert found >= 2


def test_every_joint_rule_is_asked_in_some_family() -> None:
    """A rule that no graph contains would be tested here and used nowhere."""
    kinds: set[Callable[..., Any]] = set()
    for family in ("gpt2", "llama"):
        model: Any = tiny(family)
        retrofit(model, LipschitzConfig())
        graph = build(model)
        with torch.no_grad():
            kinds |= {type(n) for n in walk(graph.body.nodes) if n.name in weight_norms(graph).joint}
    assert {AttentionOut, MlpResidual, GatedMlp} <= kinds
