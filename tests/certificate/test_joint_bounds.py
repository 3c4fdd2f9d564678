"""Bounds of all heads together with the output map hold and are attained.

The joint rules from caps are attacked as well, and weakened rules are exceeded.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields, replace
from decimal import Decimal
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lip_plugin import project_, retrofit
from lip_plugin.certificate.graph import joint_attention
from lip_plugin.certificate.graph.base import ProvenNorms
from lip_plugin.certificate.graph.build import build
from lip_plugin.certificate.graph.containers import walk
from lip_plugin.certificate.graph.decimals import up
from lip_plugin.certificate.graph.joint_attention import AttentionOut, HeadNorms
from lip_plugin.certificate.graph.joint_bounds import GatedMlp, MlpResidual
from lip_plugin.certificate.graph.nodes import Scale
from lip_plugin.certificate.weight_norms import cap_norms, weight_norms
from tests.support.families import FAMILIES, tiny
from tests.support.joint_nodes import (
    EXACT,
    TIGHT,
    Turn,
    attack,
    attention_out,
    joint_only,
    plain_only,
    rand,
    rms,
    secant,
    unit,
)
from tests.support.oracles import paper, randomize_

# ---- attention through its output map: attained --------------------------------------------------


def aligned(heads: int, d: int = 4, d_head: int = 2) -> dict[str, Tensor]:
    """Weights of which every head is the same.

    Queries map e1 to f1 and e2 to f2, keys e2 to f2 and e3 to f1, values e2 to f1. The output map
    leads from f1 to e2.
    """
    q, k, v = torch.zeros(3, d_head, d, dtype=torch.float64)
    q[0, 0] = q[1, 1] = k[1, 1] = k[0, 2] = v[0, 1] = 1.0
    out = torch.zeros(d, d_head, dtype=torch.float64)
    out[1, 0] = 1.0
    w = {"q": q, "k": k, "v": v}
    return {n: t.repeat(heads, 1) for n, t in w.items()} | {"out": out.repeat(1, heads)}


def worst(d: int, beta: float, pairs: int) -> tuple[Tensor, Tensor]:
    """Tokens at +-e2 and a query at e1, with the directions in which they move.

    Values move along e2, keys along +-e3, and the query along e2.
    """
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
    """The joint rule is attained where the norms lie in directions that never meet.

    The output map is large where no value arrives, and a key is large where no query asks.
    """
    w = aligned(3)
    w["out"][0, 1::2] = 20.0  # f2, which no value reaches
    node, norms = attention_out(w, 3, 3, 0.5)
    x, v = worst(4, 2.0, 400)
    _, constant = joint_only(node, 1.0, norms)
    assert 0.997 * constant < secant(node, x, v) < constant
    assert plain_only(node, 1.0, norms)[1] > 19 * constant


def test_one_head_among_empty_ones_is_attained_by_its_own_weights() -> None:
    """Heads that are empty do not count.

    The weights omega of heads are chosen by the size of M_h. Equal weights would count empty heads.
    """
    w = aligned(4)
    for name in ("q", "k", "v"):
        w[name][2:] = 0.0
    node, norms = attention_out(w, 4, 4, 0.5)
    x, v = worst(4, 2.0, 400)
    _, constant = joint_only(node, 1.0, norms)
    assert 0.997 * constant < secant(node, x, v) < constant
    equal = ProvenNorms(norms)
    equal.joint["o"] = norms.joint["o"][:1]
    assert joint_only(node, 1.0, equal)[1] > 1.05 * constant


FIELDS = ("spread", "values", "scores", "both")


@pytest.mark.parametrize("field", FIELDS)
def test_a_weakened_joint_rule_is_exceeded(field: str) -> None:
    """A rule with a tenth less of one norm, or without omega, is below what is attained."""
    node, norms = attention_out(aligned(2), 2, 2, 0.5)
    x, v = worst(4, 2.0, 400)
    seen = secant(node, x, v)
    for factor in (Decimal("0.9"), Decimal("0.5"), Decimal(0)):
        broken = ProvenNorms(norms)
        broken.joint["o"] = tuple(
            replace(h, **{field: getattr(h, field) * factor}) for h in norms.joint["o"]
        )
        assert joint_only(node, 1.0, broken)[1] < seen, (field, factor)
    assert seen < joint_only(node, 1.0, norms)[1]


def test_the_sum_of_products_cannot_be_left_out_and_is_attained_by_oblique_keys() -> None:
    """The sum of products cannot be left out, and oblique keys attain it.

    Only the query counts here. There are two heads, with values e1 and keys at an angle t to it.
    Two tokens on the bisector attain (G B + C) / 2 with C = G B cos t. With C halved it is
    exceeded.
    """
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
    """With turned keys one movement raises a logit and lowers another one: 1 + 2 beta.

    Two tokens stand half a turn apart.
    """
    d, beta = 4, 1.5
    q, k, v = torch.zeros(3, d, d, dtype=torch.float64)
    k[0, 0] = v[0, 0] = 1.0
    w = {"q": q, "k": k, "v": v, "out": torch.eye(d, dtype=torch.float64)}
    bias = {"q": beta * unit(d, 0)}
    turned, norms = attention_out(
        w, 1, 1, 1.0, bias=bias, rotary=Turn(d, speed=math.pi, alike=True)
    )
    straight, straight_norms = attention_out(w, 1, 1, 1.0, bias=bias)
    x = torch.stack([-2 * unit(d, 0), 2 * unit(d, 0)])
    seen = secant(turned, x, (2 * unit(d, 0)).expand(2, d))
    _, constant = joint_only(turned, 1.0, norms)
    assert seen == pytest.approx(1 + 2 * beta)
    assert seen <= constant * EXACT
    assert constant <= seen * TIGHT
    assert joint_only(straight, 1.0, straight_norms)[1] == pytest.approx(
        math.hypot(1, 2 * beta), rel=1e-5
    )
    broken = ProvenNorms(norms)
    broken.joint["o"] = tuple(replace(h, query_bias=h.query_bias / 2) for h in norms.joint["o"])
    assert joint_only(turned, 1.0, broken)[1] < seen


# ---- attention through its output map: attacked --------------------------------------------------

KINDS = (
    "random",
    "aligned",
    "orthogonal outputs",
    "values are keys",
    "rank one",
    "uneven",
    "empty head",
)


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
    """No attack exceeds the joint rule, whatever the form of attention.

    There are grouped heads, d_head * heads other than d, biases, turns with a scaling, and
    constants for QK-norms.
    """
    d = 5
    w = structured(kind, *heads, d_head, d, d_out, seed)
    biases = {n: bias * rand(len(m), seed=seed + 20 + i) for i, (n, m) in enumerate(w.items())}
    rotary = Turn(d_head, 1.3) if form == "turned" else None
    slots = [Scale("q_norm", -0.7), Scale("k_norm", 1.6)] if form == "scaled" else [None, None]
    node, norms = attention_out(
        w,
        *heads,
        tau,
        bias=biases if bias else None,
        rotary=rotary,
        q_norm=slots[0],
        k_norm=slots[1],
    )
    size, slope = attack(node, d, tokens, r, seed=seed)
    for radius, constant in (joint_only(node, r, norms), plain_only(node, r, norms)):
        assert size <= radius * EXACT
        assert slope <= constant * EXACT
    # any weights of the heads are proven, however odd
    odd = 10 ** (
        -3
        * torch.rand(heads[0], generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    )
    norms.joint["o"] = (joint_attention._Heads.of(*node._parts()).norms(odd, norms),)
    radius, constant = joint_only(node, r, norms)
    assert size <= radius * EXACT
    assert slope <= constant * EXACT


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("big", [1e30, 1e-30, 1e150, 1e-150])
def test_sizes_that_cancel_leave_the_bound_as_it_was(big: float, turned: bool) -> None:
    """Sizes that cancel leave the bound as it was.

    q and v are multiplied by `big`, k and out divided by it, which is the same function.
    """
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
        assert (
            constant < 1e-100
        )  # not exactly 0: a product of zeros carries a bound on its underflow


# ---- from caps -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "granularity"),
    [(f, g) for f in FAMILIES for g in ("matrix", "head") if (f[:8], g) != ("gpt_neox", "matrix")],
)
def test_what_the_caps_say_is_never_below_what_the_weights_say(
    family: str, granularity: str
) -> None:
    """Every joint norm and every bound of a node is at most what the caps give.

    Weights and biases are random, and projected onto the caps.
    """
    model: Any = tiny(family)
    retrofit(model, paper(granularity=granularity))
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
        retrofit(model, paper())
        graph = build(model)
        with torch.no_grad():
            kinds |= {
                type(n) for n in walk(graph.body.nodes) if n.name in weight_norms(graph).joint
            }
    assert {AttentionOut, MlpResidual, GatedMlp} <= kinds
