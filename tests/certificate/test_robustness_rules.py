"""Local rules hold, for no input within a movement leaves the size that is proven.

Remainders are within their bounds, and unknown nodes are refused.
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.functional import jvp

import lip_plugin.certificate.robustness.attention_rule as local_attention
from lip_plugin import certify, retrofit
from lip_plugin.certificate.graph.attention import Attention
from lip_plugin.certificate.graph.build import Graph, build
from lip_plugin.certificate.graph.containers import Chain, walk
from lip_plugin.certificate.graph.nodes import Activation, Gate, Norm, Softcap
from lip_plugin.certificate.robustness.movement import Local, Matrix, Movement
from lip_plugin.certificate.robustness.rules import CURVATURE_UPPER, move, norm_rule
from lip_plugin.errors import CertificateError
from lip_plugin.model.activations import ACTIVATIONS
from tests.support.families import FAMILIES, inputs_for, tiny
from tests.support.oracles import paper, randomize_

# What float64 rounding may add to an attained movement: 1e-13 of the outputs' size, generously.
ROUNDING = 1e-12


@cache
def _retrofitted(name: str, norms: str, overrides: tuple[tuple[str, Any], ...]) -> Any:
    model = tiny(name, **dict(overrides))
    # "capped": the entries of a gate's two factors too, low enough to matter
    kind, cap = ("remove", 0.3) if norms == "capped" else (norms, None)
    retrofit(model, paper(norms=kind, attention_scale=3.0, gate_max=cap))
    return model


def graph_of(name: str, norms: str = "remove", seed: int = 3, **overrides: Any) -> Graph:
    """The graph of a tiny model, whose weights are drawn anew at every call."""
    model = _retrofitted(name, norms, tuple(overrides.items()))
    graph = build(randomize_(model, seed))
    for p in model.parameters():
        p.requires_grad_(False)
    return graph


def ball(x: Tensor, eps: float) -> Movement:
    """Token norm at most eps."""
    return Movement.ball(
        torch.full((1, *x.shape[:2]), eps * math.sqrt(x.shape[-1]), dtype=torch.float64)
    )


def unit(x: Tensor) -> Tensor:
    """Each token scaled to 2-norm 1."""
    return x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(1e-300)


def attained_over_proven(node: Any, x: Tensor, movement: Movement, steps: int = 12) -> float:
    """The largest share of the proven movement that gradient ascent attains.

    It is taken at any token of the node's output.
    """
    local = Local()
    with torch.no_grad():
        centre, out = move(node, x, movement, local)
    proven, size = out.total(local)[0], movement.total(local)[0, ..., None]
    noise = ROUNDING * (1.0 + float(centre.abs().max())) * math.sqrt(centre.shape[-1])
    direction, worst = torch.randn_like(x), 0.0
    for step in range(steps):
        change = (unit(direction) * size * (1 - 1e-12)).requires_grad_(True)
        gap = torch.linalg.vector_norm(node.run(x + change) - centre, dim=-1)
        worst = max(worst, float(((gap.detach() - noise) / proven.clamp_min(1e-300)).max()))
        goal = gap[:, -1].sum() if step % 2 else gap.sum()
        (direction,) = torch.autograd.grad(goal, change)
        direction = direction + 1e-30 * torch.randn_like(x)  # tokens that are not seen
    return worst


EVERY = [(name, norms) for name in FAMILIES for norms in ("remove", "keep")]
EVERY += [("llama", "capped"), ("phi3", "capped")]


@pytest.mark.parametrize(("name", "norms"), EVERY)
def test_no_sub_block_moves_further_than_proven(name: str, norms: str) -> None:
    """Attacked node by node, from tiny movements to ones that throw the input away."""
    graph = graph_of(name, norms)
    inputs = inputs_for(name, 2, 6)
    for eps in (1e-5, 1e-2, 0.3, 10.0):
        x, local = graph.embed(inputs, torch.float64), Local()
        for node in graph.body.nodes:
            movement = ball(x, eps)
            assert attained_over_proven(node, x, movement, 6) <= 1.0, (node.name, eps)
            x, _ = move(node, x, movement, local)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_whole_model_moves_no_further_and_products_are_never_worse(name: str) -> None:
    graph = graph_of(name)
    x = graph.embed(inputs_for(name, 2, 6), torch.float64)
    for eps in (1e-4, 1e-2, 1.0):
        share = attained_over_proven(graph.body, x, ball(x, eps))
        assert (
            (1e-3 if eps < 1e-3 else 1e-12) < share <= 1.0
        )  # an attack that does nothing proves nothing
        tight, loose = Local(), Local(products=False)
        sizes = [
            move(graph.body, x, ball(x, eps), local)[1].total(local) for local in (tight, loose)
        ]
        assert bool(
            (sizes[0] <= sizes[1] * (1 + 2e-3)).all()
        )  # 2e-3: sigma_max_upper's own looseness


@pytest.mark.parametrize(("name", "norms"), EVERY)
def test_what_linearizing_leaves_out_is_within_its_bound(name: str, norms: str) -> None:
    """What linearizing leaves out, y' - y - J dx, is within the bound in both norms.

    This holds for each node that is not linear.
    """
    graph = graph_of(name, norms)
    x = graph.embed(inputs_for(name, 2, 6), torch.float64)
    checked = 0
    for block in graph.body.nodes:
        for branch in block.added() or [Chain("alone", [block])]:
            y = x
            for node in _leaves(branch):
                for eps in (1e-3, 0.05, 2.0):
                    if isinstance(node, (Attention, Gate, Norm, Activation, Softcap)):
                        _check_remainder(node, y, eps)
                        checked += 1
                y = node.run(y)
        x = block.run(x)
    assert checked >= 6


def _leaves(chain: Chain) -> list[Any]:
    """The nodes of a chain and of chains inside it, in running order."""
    return [
        n for part in chain.nodes for n in (_leaves(part) if isinstance(part, Chain) else [part])
    ]


def _check_remainder(node: Any, x: Tensor, eps: float) -> None:
    local = Local(remainders=[])
    centre, _ = move(node, x, ball(x, eps), local)
    assert local.remainders is not None
    (point,) = local.remainders
    heads = point.two.shape[-1]
    for trial in range(6):
        change = unit(torch.randn_like(x)) * eps * math.sqrt(x.shape[-1])
        if trial % 3 == 1:  # all tokens alike, and opposite
            signs = torch.tensor([1.0, -1.0] * 5)[: x.shape[1], None]
            change = change[:, :1].expand_as(change).contiguous() * signs
        if trial % 3 == 2:  # against the centre, where kept norms are steep
            change = -unit(x) * eps * math.sqrt(x.shape[-1])
        _, tangent = jvp(node.run, x, change)
        rest = (node.run(x + change) - centre - tangent).unflatten(-1, (heads, -1))
        noise = (
            ROUNDING * (1.0 + float(centre.abs().max()) + float(tangent.abs().max())) * x.shape[-1]
        )
        two, one = torch.linalg.vector_norm(rest, dim=-1), rest.abs().sum(-1)
        assert bool((two <= point.two[0] + noise).all()), (
            node.name,
            eps,
            float((two / point.two[0]).max()),
        )
        assert bool((one <= point.one[0] + noise).all()), (
            node.name,
            eps,
            float((one / point.one[0]).max()),
        )


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2), (4, 4)]),
    name=st.sampled_from(["gpt2", "llama", "qwen3", "vit"]),
    capped=st.booleans(),
    peak=st.sampled_from([0.01, 1.0, 30.0]),
    log_eps=st.floats(-7.0, 1.5),
    tokens=st.integers(1, 7),
    twins=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_random_attention_never_moves_further(
    heads: tuple[int, int],
    name: str,
    capped: bool,
    peak: float,
    log_eps: float,
    tokens: int,
    twins: bool,
    seed: int,
) -> None:
    """No movement within the ball moves attention further than is proven.

    Weights are flat, peaked or capped, tokens may be twins, and there are grouped heads, rotations,
    normed keys and both directions.
    """
    grouped = {} if name in ("gpt2", "vit") else {"num_key_value_heads": heads[1]}
    norms = "keep" if name == "qwen3" else "remove"
    graph = graph_of(
        name, norms, seed, num_attention_heads=heads[0], num_hidden_layers=1, **grouped
    )
    node = next(n for n in walk(graph.body.nodes) if isinstance(n, Attention))
    node.tau *= peak
    node.softcap = 1.5 if capped else None
    torch.manual_seed(seed)
    x = torch.randn(1, tokens, 32, dtype=torch.float64)
    if twins:
        x = x[:, :1].expand_as(x).contiguous()
    assert attained_over_proven(node, x, ball(x, 10**log_eps), 8) <= 1.0
    _check_remainder_any_length(node, x, 10**log_eps)


def _check_remainder_any_length(node: Any, x: Tensor, eps: float) -> None:
    local = Local(remainders=[])
    centre, _ = move(node, x, ball(x, eps), local)
    assert local.remainders is not None
    point = local.remainders[0]
    change = unit(torch.randn_like(x)) * eps * math.sqrt(32)
    _, tangent = jvp(node.run, x, change)
    rest = (node.run(x + change) - centre - tangent).unflatten(-1, (point.two.shape[-1], -1))
    noise = ROUNDING * (1.0 + float(centre.abs().max()) + float(tangent.abs().max())) * 32
    assert bool((torch.linalg.vector_norm(rest, dim=-1) <= point.two[0] + noise).all())


def test_local_sizes_beat_the_global_constant_where_norms_are_kept() -> None:
    """Local sizes beat the global constant where norms are kept.

    The global constant is gain / sqrt(eps), and around an input it is about gain / RMS.
    """
    graph = graph_of("llama", "keep")
    x, local = graph.embed(torch.randint(0, 67, (1, 5)), torch.float64), Local()
    _, out = move(graph.body, x, ball(x, 1e-6), local)
    around = float(out.total(local).max()) / math.sqrt(out.terms[-1].matrix.value.shape[0]) / 1e-6  # type: ignore[union-attr]
    assert math.log10(around) < certify(graph.root).log10_lipschitz - 6


@given(
    log_rms=st.floats(-6, 3),
    log_size=st.floats(-9, 4),
    eps=st.sampled_from([1e-12, 1e-6, 1e-5, 1.0]),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_kept_norm_rule(log_rms: float, log_size: float, eps: float) -> None:
    """Along the centre, against it and across it, where its derivatives are largest."""
    module = torch.nn.LayerNorm(6, eps=eps).double()
    node = Norm("n", module, eps, False, None, None)
    x = unit(torch.randn(1, 1, 6, dtype=torch.float64)) * math.sqrt(6) * 10**log_rms
    size = torch.full((1, 1, 1), 10**log_size, dtype=torch.float64)
    moved, rest = norm_rule(node, x, size)
    across = torch.randn_like(x)
    across = unit(across - (across * unit(x)).sum() * unit(x))
    for angle in torch.linspace(0, math.pi, 13, dtype=torch.float64):
        change = (unit(x) * torch.cos(angle) + across * torch.sin(angle)) * size[0]
        _, tangent = jvp(node.run, x, change)
        gap = node.run(x + change) - node.run(x)
        # 1e-9: float64 rounding near the norm's steep place, over eps as small as 1e-12
        assert float(gap.norm()) <= float(moved) * (1 + 1e-9) + 1e-12
        assert float((gap - tangent).norm()) <= float(rest) * (1 + 1e-6) + 1e-11 * (
            1 + float(tangent.norm())
        )


def test_second_derivatives_are_where_the_table_says() -> None:
    """Second derivatives stay within the table on a grid of width 1e-4.

    Between its points f'' exceeds them by at most h^2 / 8 sup f'''' < 1e-8.
    """
    z = torch.linspace(-12, 12, 240_001, dtype=torch.float64, requires_grad=True)
    for kind, f in ACTIVATIONS.items():
        if kind in ("relu", "abs"):
            assert CURVATURE_UPPER[kind] == math.inf
            continue
        (slope,) = torch.autograd.grad(f(z).sum(), z, create_graph=True)
        (bend,) = torch.autograd.grad(slope.sum(), z)
        assert float(bend.abs().max()) <= CURVATURE_UPPER[kind] <= float(bend.abs().max()) + 2e-8, (
            kind
        )


def test_integrals_of_exponentials_are_bounded_from_above() -> None:
    """Integrals of exponentials are bounded from above.

    The truth is the series summed in exact fractions, which only grows: 40 terms up to x = 5.
    """
    for x in [0.0, 1e-12, 1e-7, 1e-6, 1e-3, 0.05, 0.0999, 0.1, 0.5, 2.0, 5.0]:
        once = math.fsum(x**n / math.factorial(n + 1) for n in range(40))
        twice = math.fsum(x**n / math.factorial(n + 2) for n in range(40))
        at = torch.tensor(x, dtype=torch.float64)
        # 1e-13: expm1 and a cancellation at x >= 0.1, both covered by the slack on margins
        assert float(local_attention.growth(at)) >= once * (1 - 1e-15)
        assert float(local_attention.curvature(at)) >= twice * (1 - 1e-13)
        assert float(local_attention.curvature(at)) <= twice * 1.01


def test_a_node_without_a_rule_is_refused_by_name() -> None:
    class Strange:
        name = "h.3.strange"

    x = torch.zeros(1, 2, 4, dtype=torch.float64)
    with pytest.raises(CertificateError, match=r"h\.3\.strange is Strange"):
        move(Chain("c", [Strange()]), x, ball(x, 0.1), Local())  # type: ignore[list-item]


def test_attention_that_does_more_than_its_rule_knows_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    graph = graph_of("gpt2")
    x = graph.embed(torch.randint(0, 67, (1, 5)), torch.float64)
    plain = Attention.run
    monkeypatch.setattr(
        Attention, "run", lambda self, x, watch=None: torch.tanh(plain(self, x, watch))
    )
    with pytest.raises(CertificateError, match="no local rule knows"):
        move(graph.body, x, ball(x, 0.1), Local())


def test_products_are_widened_for_their_own_rounding() -> None:
    a, b = torch.randn(7, 9, dtype=torch.float64), torch.randn(5, 7, dtype=torch.float64)
    product = Matrix().times(a).times(b).times(torch.randn(3, 5, dtype=torch.float64))
    assert 0 < product.error < 1e-12
    assert float(Local().sigma((1,), product)) >= float(torch.linalg.matrix_norm(product.value, 2))
